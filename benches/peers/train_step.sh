#!/bin/sh
# Alternates valor's and PyTorch's training step on the same machine: train_step.sh [ROUNDS]
# PYTHON names an interpreter with torch and transformers.
set -eu
cd "$(dirname "$0")/../.."
export RAYON_NUM_THREADS="${RAYON_NUM_THREADS:-2}" OMP_NUM_THREADS="${RAYON_NUM_THREADS:-2}"
cargo bench --bench qwen3_train --no-run 2>&1 | tail -1 >&2
for _ in $(seq "${1:-3}"); do
    cargo bench --quiet --bench qwen3_train
    "${PYTHON:-python3}" benches/peers/train_step.py
done
