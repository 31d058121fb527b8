"""Many runs of one recipe: sweep_file, command, check, journal, sampler, guard, trial, running, table, plot.

The files of launch/sweeps are W&B's; here they are checked, and run without W&B.
"""
