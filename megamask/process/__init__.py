"""This process: which rank it is, what it holds, how it is told to stop. Nothing imports torch."""
