#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, unattended, on one NVIDIA GPU:
#   launch/bench_gpu.sh              results in ./bench_out
#   OUT=/results launch/bench_gpu.sh
#   SMALL=1 launch/bench_gpu.sh      the same parts on a CPU, small: does the script work?
#   PARTS=train-base ROWS=max ...    the largest batch, compiled twice; else 128, large 48, peers half
# PARTS=REGEX runs the parts whose names match; they stand in the order of what is missed most.
# WHEELS=FOLDER installs the wheels there first, below OUT: for a machine without a network.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

OUT="${OUT:-$PWD/bench_out}"
SMALL="${SMALL:-}" PARTS="${PARTS:-.}"
BUDGET="${BUDGET:-460}" # seconds: under 8 minutes with the last part's end
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" && mkdir -p "$OUT"
if [[ -n "${WHEELS:-}" ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$OUT/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$OUT/site"
fi
. launch/parts.sh

if [[ -n "$SMALL" ]]; then
    export JAX_PLATFORMS=cpu
    MODELS=configs/demo.py SECONDS_LONG=2 ROWS=4 ROUNDS=2 FRAMES=20000 CODEBOOK=64x50 STEPS=60 COMPILE=
else
    MODELS="configs/base.py configs/large.py" SECONDS_LONG=15.625 ROWS="${ROWS:-}" ROUNDS=5
    FRAMES=10000000 CODEBOOK=768x500 STEPS=300 COMPILE=--compile
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
fi

devices() {
    nvidia-smi || true
    "$PYTHON" -m pip list
    "$PYTHON" -c 'import jax; print(jax.devices())'
}

# The stages, in one process, on noise of eight colours; the loss has to fall.
loop() {
    "$PYTHON" -c '
import sys
from etils import epath
from hubert_jax import config_files, logs
from hubert_jax.bench import pipeline
from hubert_jax.stages import run
work = epath.Path(sys.argv[1])
pipeline.make_work(work, utterances={"train": 300, "validation": 10}, num_codes=100)
config = config_files.load("configs/demo.py:it1", sys.argv[2:])
for stage in run.arrows_of(config, work): run.walk(stage, config, work, place=stage)
lines = logs.read_metrics(work / "it1" / "logs" / "metrics.jsonl")
losses = [line["train/loss"] for line in lines if "train/loss" in line]
raise SystemExit(print("loss", losses[0], "->", losses[-1]) or not losses[-1] < losses[0])' "$@"
}
export -f loop devices

training() { # training WHO RUN LIMIT ROWS ROWS_OF_LARGE: one contender, a model at a time
    for config in $MODELS; do
        [[ "$config" == *large* ]] && rows="$5" || rows="$4"
        # shellcheck disable=SC2086 # COMPILE is one option or none
        "$2" "train-$(basename "$config" .py)-${1%%,*}" "$3" training --config="$config" $COMPILE \
            --seconds="$SECONDS_LONG" --rows="${ROWS:-$rows}" --rounds="$ROUNDS" --only="$1"
    done
}
torch="${COMPILE:+, torch.compile}" FEW="${ROWS:-max}"
part devices 60 devices
training hubert_jax bench 150 128 48
training "transformers$torch" peer 120 64 24
training "torchaudio$torch" peer 120 64 24
bench kmeans 150 kmeans --config=configs/base.py --frames="$FRAMES" --codebooks="$CODEBOOK" \
    --rounds=1 --only=hubert_jax
peer extraction 60 extraction --config="${MODELS%% *}" --seconds="$SECONDS_LONG" --rows="${FEW/max/16}"
part loop 120 loop "$OUT/loop" --config.train.{num_steps,validate_every}="$STEPS" \
    --config.train.report_every=10 --config.optim.warmup_steps=20
bench breakdown 120 breakdown --config="${MODELS%% *}" --seconds="$SECONDS_LONG" --rows="${FEW/max/128}"

echo "$SECONDS s in all"
column -t -s $'\t' "$SUMMARY" 2>/dev/null || cat "$SUMMARY"
