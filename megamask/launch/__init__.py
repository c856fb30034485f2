"""Jobs: their scripts, their folders in the run folder, and the queue of Slurm. No torch."""
