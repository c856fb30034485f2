"""The memory and time that a learning run will need, and whether it fits a device.

The plan is arithmetic alone; nothing is launched.
"""
