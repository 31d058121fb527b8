#!/bin/bash
# One node's share of a training; srun starts it once a node. Starts the launcher, which starts the ranks.
cd "$SLURM_SUBMIT_DIR" && . slurm/env.sh || exit 2

# Slurm signals every process of a step. The ranks catch SIGUSR1; launchers would die of it. SIGTERM reaches launcher
# and ranks by itself; this shell waits for them.
trap '' USR1
trap : TERM

ranks=${ANIMA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks ? cpus / ranks : 1))}
export ANIMA_EXIT_DIR=$ANIMA_LOG_DIR/exit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120  # seconds that a rank has to save and to finish its uploads
log=$ANIMA_LOG_DIR/node-$SLURM_NODEID.log

case ${ANIMA_LAUNCHER:-torchrun} in
    torchrun)
        torchrun --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$ranks" \
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
            --no_python slurm/rank.sh launch/train.py "$@" 2>> "$log"
        ;;
    deepspeed)
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks/" > "$ANIMA_LOG_DIR/hosts-$SLURM_NODEID"
        deepspeed --hostfile="$ANIMA_LOG_DIR/hosts-$SLURM_NODEID" --no_ssh --node_rank="$SLURM_NODEID" --quiet \
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
            --no_python --no_local_rank slurm/rank.sh launch/train.py "$@" 2>> "$log"
        ;;
    *)
        printf 'error: there is no launcher %s\n  where:   ANIMA_LAUNCHER\n  allowed: torchrun or deepspeed\n' \
            "$ANIMA_LAUNCHER" >&2
        exit 2
        ;;
esac
code=$?

sleep 0.5  # rank 0's last lines are on their way through tee
# Ranks that have stopped on request are no failure of this node: srun would cut off the others, who still upload.
first=$((SLURM_NODEID * ranks))
for rank in $(seq "$first" $((first + ranks - 1))); do
    read -r status 2> /dev/null < "$ANIMA_EXIT_DIR/rank-$rank"
    [ "$status" = 75 ] || [ "$status" = 0 ] || exit "$code"
    status=
done
exit 0
