# What train.sbatch and sweep.sbatch share. Sourced in the folder that sbatch was called from; leaves in the variables
#   logs    this job's folder: logs, its memory, notes of its ranks
#   asked   what the job was told: nothing, time_limit (SIGUSR1), end (SIGTERM: cancelled or preempted)
#   code    exit status of the last step

say() { echo "job: $*" >&2; }

. slurm/env.sh || { say "slurm/env.sh ended with status $?, so nothing is started"; return 2; }
set -uo pipefail  # not before: what modules and environments source minds no unset variables
if ! python -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("anima") and f("torch")))'; then
    printf 'error: this node has no Python with Anima in it\n  where:   %s\n  got:     %s\n  fix:     %s\n' \
        "slurm/env.sh" "$(command -v python || echo 'no python')" \
        "make venv, on a file system that all nodes share; or set PATH in slurm/env.sh" >&2
    return 2
fi

# Element 3 of array 100 is 100_3: its SLURM_JOB_ID may be that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
logs=${ANIMA_LOGS:-runs/slurm}/$job
mkdir -p "$logs/exit" || return 2
export ANIMA_LOG_DIR=$logs ANIMA_EXIT_DIR=

asked=nothing step= code=0
trap 'asked=time_limit; say "the time limit is near: the run saves and stops"; forward' USR1
trap 'asked=end; say "told to end (cancelled or preempted)"' TERM

# Tell all processes of the step, again and again: a process that is only starting does not listen yet.
forward() {
    [ -n "$step" ] || return 0
    (
        trap '' USR1
        while kill -USR1 "$step" 2> /dev/null; do sleep 10; done
    ) &
}

# srun in the background, because bash handles signals only while it waits.
run_step() {
    rm -f "$logs"/exit/rank-*
    touch "$logs/exit/began"
    srun --export=ALL --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
    step=$!
    [ "$asked" != time_limit ] || forward
    while :; do
        wait "$step"
        code=$?
        kill -0 "$step" 2> /dev/null || break
    done
    step=
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

requeue() {
    trap 'exit 75' TERM  # so does Slurm end this script
    if scontrol requeue "$job"; then
        sleep 600 &
        wait $!
        exit 75
    fi
    say "Slurm does not requeue this job. The same sbatch command goes on where it stopped; for a chain of jobs see"
    say "README.md (--dependency=singleton)"
    exit 75
}
