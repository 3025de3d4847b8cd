"""Slurm: commands.py talks to it, launch.py waits for a job on the login node, task.py runs on the compute node."""
