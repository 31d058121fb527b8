"""Jobs of a cluster: staging (the base on node-local disk), outcome (what came of a start, and what is next).

Submits nothing itself: slurm/*.sbatch do, and ask launch/job.py.
"""
