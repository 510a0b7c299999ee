#!/usr/bin/env bash
# Teach the bundled base a subject it has never seen, on the CPU, and show what came of it.
# Everything it makes lies in outputs/demo, or in the folder given as the first argument.
set -euo pipefail
output="${1:-}"
case "$output" in
    "") output="outputs/demo" ;;
    /*) ;;
    *) output="$PWD/$output" ;; # from where the caller is
esac
cd "$(dirname "$0")/.."
. .ci/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
# on a model this small one thread does nearly what two do, and nothing beside it slows it down
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
