#!/usr/bin/env bash
# SFT of the LLaMA-33B shape with random weights on one GPU of 80 GB, through launch/train.py:
#   one rank on the whole card, then two ranks sharing it over gloo, each capped to what a 40 GB card offers.
# Usage: tests/gpu/train_33b.sh OUTPUT_DIR DATA_FILE...
set -euo pipefail
cd "$(dirname "$0")/../.."
output_dir=$1
shift
shape=${SHAPE:-llama-33b}
model="$output_dir/$shape"
python3 tests/gpu/make_shape.py --shape "$shape" --train_files "$@" --output_dir "$model"
common=(
    --config tests/gpu/train_33b.yaml --model_name_or_path "$model" --train_files "$@" --device cuda
)
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

echo "== one rank, whole card"
python3 launch/train.py "${common[@]}" --output_dir "$output_dir/one-rank" ${ONE_RANK:-}

echo "== two ranks on one card, 40 GB each, ZeRO-2 over gloo"
export MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29517} WORLD_SIZE=2 LOCAL_RANK=0
two=("${common[@]}" --backend gloo --max_gpu_memory_gib 39 --output_dir "$output_dir/two-ranks" ${TWO_RANKS:-})
RANK=1 python3 launch/train.py "${two[@]}" &
RANK=0 python3 launch/train.py "${two[@]}"
wait
