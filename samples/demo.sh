#!/usr/bin/env bash
# Train an adapter of a new subject on the bundled base, on the CPU, and show the result.
# All output is in outputs/demo, or in the folder given as the first argument.
set -euo pipefail
output="${1:-}"
case "$output" in
    "") output="outputs/demo" ;;
    /*) ;;
    *) output="$PWD/$output" ;; # relative to the caller's folder
esac
cd "$(dirname "$0")/.."
. .ci/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
# for such a small model, one thread is nearly as fast as two, and other processes slow it down less
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

accelerate launch --num_processes 1 --cpu --mixed_precision no --dynamo_backend no --num_machines 1 \
    train_scripts/train_dreambooth_gralora.py \
    --config samples/configs/tiny_robot.yaml --output_dir "$output" --overwrite_output_dir

gralora sample --base samples/tiny-base --adapter "$output" --compare \
    --reference samples/subjects/robot/train \
    --prompt "a sks toy in the snow" "a sks toy on the beach" "a sks toy at night" \
    "a sks toy on a brick wall" --guidance_scale 1.5 --output "$output/grid.png"

echo
echo "adapter:        $output/pytorch_gralora_weights.safetensors"
echo "training curve: $output/training_curve.png"
echo "grid:           $output/grid.png"
