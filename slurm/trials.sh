#!/bin/bash
# Trials of a sweep on one node; srun starts it with what runs them: wandb agent, or launch/sweep.py.
cd "$SLURM_SUBMIT_DIR" && . slurm/env.sh || exit 2

# Slurm signals every process of the step: the ranks catch the signals, save and stop; the agent, which would die and
# leave them behind, does not hear them. launch/sweep.py listens by itself.
trap '' USR1 TERM
export ANIMA_EXIT_DIR=$ANIMA_LOG_DIR/exit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 WANDB_AGENT_DISABLE_FLAPPING=true
export WANDB_DIR=$ANIMA_LOG_DIR  # what the agent itself writes; the runs' files lie in their output folders
[ "$1" = wandb ] || ANIMA_EXIT_DIR=
exec "$@"
