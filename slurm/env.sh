# The facts of your cluster, and the only file of this folder to change. Every job reads it, on every node, in the folder
# that sbatch was called from. What begins with # is an example.

# Software: modules, and the environment that `make venv` made on a file system that all nodes share.
# module purge && module load cuda
export PATH="$PWD/.venv/bin:$PATH"

# Network between nodes: the interface that reaches the other nodes (ip -brief address), and InfiniBand's adapters.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# Caches, on a file system that all nodes share; a home folder often has a small quota.
# export HF_HOME=/scratch/$USER/huggingface
# export ANIMA_DATA_CACHE_DIR=/scratch/$USER/anima/data
# export ANIMA_REFERENCE_CACHE_DIR=/scratch/$USER/anima/reference

# A disk of the node itself: the base is copied there once a node, and ranks load it from there.
# export ANIMA_BASE_STAGING_DIR=$TMPDIR

# Nodes without internet: models and data must lie on a disk; W&B writes files (wandb sync sends them later).
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline

# torchrun or deepspeed, once a node; ranks a node, where that is not the number of GPUs.
# export ANIMA_LAUNCHER=torchrun
# export ANIMA_RANKS_PER_NODE=2
