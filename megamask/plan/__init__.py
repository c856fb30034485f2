"""What a learning run will need, before anything is launched: memory, time, and whether it fits.
Pure arithmetic.
"""
