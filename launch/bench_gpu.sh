#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, unattended, on one NVIDIA GPU:
#   launch/bench_gpu.sh              results in ./bench_out
#   OUT=/results launch/bench_gpu.sh
#   SMALL=1 launch/bench_gpu.sh      the same parts on a CPU, small: does the script work?
# PARTS=REGEX runs the parts whose names match. WHEELS=FOLDER installs the wheels there first, below
# OUT: for a machine without a network.
#
# Each part is a process of its own with its own time limit (torch and JAX would otherwise share the
# GPU's memory, and one failure would take the rest with it) and leaves NAME.log and NAME.json. What
# would start after BUDGET seconds is skipped. Parts stand in the order of what is missed most.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

OUT="${OUT:-$PWD/bench_out}"
SMALL="${SMALL:-}"
PARTS="${PARTS:-.}"
BUDGET="${BUDGET:-460}" # seconds: under 8 minutes with the last part's end
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
mkdir -p "$OUT"
if [[ -n "${WHEELS:-}" ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$OUT/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$OUT/site"
fi
SUMMARY="$OUT/summary.tsv"
printf 'part\tresult\tseconds\n' >"$SUMMARY"

hubert() { "$PYTHON" -c 'from hubert_jax import cli; cli.main()' "$@"; }

# part NAME LIMIT COMMAND...: runs the command for LIMIT seconds at most.
part() {
    local name="$1" limit="$2" started=$SECONDS result=0
    shift 2
    [[ "$name" =~ $PARTS ]] || return
    if ((SECONDS + 15 > BUDGET)); then
        printf '%s\tskipped, %s s are gone\t0\n' "$name" "$SECONDS" | tee -a "$SUMMARY"
        return
    fi
    ((limit > BUDGET - SECONDS)) && limit=$((BUDGET - SECONDS))
    # a shell of its own, because timeout knows programs and no functions
    export -f hubert
    export PYTHON
    timeout --kill-after=5 "$limit" bash -c '"$@"' - "$@" >"$OUT/$name.log" 2>&1 || result=$?
    case $result in
        0) result="done" ;;
        124 | 137) result="out of time ($limit s)" ;;
        *) result="failed ($result)" ;;
    esac
    printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - started))" | tee -a "$SUMMARY"
}

bench() { # bench NAME LIMIT ARGUMENTS...: a part that leaves a table
    local name="$1" limit="$2"
    shift 2
    [[ "$name" =~ $PARTS ]] || return
    part "$name" "$limit" hubert bench "$@" --out="$OUT/$name.json"
    grep -h '^|' "$OUT/$name.log" 2>/dev/null
}

# peer NAME LIMIT ARGUMENTS...: a contender on torch; JAX only measures the matmuls there
peer() { XLA_PYTHON_CLIENT_PREALLOCATE=false bench "$@"; }

if [[ -n "$SMALL" ]]; then
    export JAX_PLATFORMS=cpu
    MODELS="configs/demo.py" SECONDS_LONG=2 ROWS=4 ROUNDS=2 FRAMES=20000 CODEBOOK=64x50 STEPS=60
    COMPILE=()
else
    MODELS="configs/base.py configs/large.py" SECONDS_LONG=15.625 ROWS=max ROUNDS=5
    FRAMES=10000000 CODEBOOK=768x500 STEPS=300
    COMPILE=(--compile)
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
fi

devices() {
    nvidia-smi || true
    "$PYTHON" - <<'PROGRAM'
import importlib.metadata, jax, platform
print("python", platform.python_version(), "devices", jax.devices())
for name in "jax jaxlib flax optax orbax-checkpoint numpy torch torchaudio transformers".split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PROGRAM
}

# The stages on noise of eight colours, which the first part makes; the loss has to fall.
loop() {
    local work="$OUT/loop" config=configs/demo.py stage
    hubert bench input --config=$config --rounds=2 --workdir="$work" \
        --out="$OUT/input.json" || return 1
    for stage in features cluster label pretrain; do
        hubert $stage --config=$config --workdir="$work" --config.train.num_steps="$STEPS" \
            --config.optim.warmup_steps=20 --config.train.report_every=10 \
            --config.train.validate_every="$STEPS" || return 1
    done
    "$PYTHON" - "$work/it1/logs/metrics.jsonl" <<'PROGRAM'
import json, sys
losses = [x["train/loss"] for x in map(json.loads, open(sys.argv[1])) if "train/loss" in x]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
sys.exit(losses[-1] >= losses[0])
PROGRAM
}
export -f loop
export OUT STEPS
export -f devices

part devices 60 devices
for config in $MODELS; do
    name="$(basename "$config" .py)"
    sizes=(--config="$config" --seconds="$SECONDS_LONG" --rows="$ROWS" --rounds="$ROUNDS")
    bench "train-$name-ours" 150 training "${sizes[@]}" --only=hubert_jax
    who="transformers${COMPILE:+, torch.compile}"
    peer "train-$name-transformers" 120 training "${sizes[@]}" "${COMPILE[@]}" --only="$who"
done
bench kmeans 90 kmeans --config=configs/base.py --frames="$FRAMES" --codebooks="$CODEBOOK" \
    --rounds=1 --only=hubert_jax
part loop 120 loop
for config in $MODELS; do
    name="$(basename "$config" .py)"
    sizes=(--config="$config" --seconds="$SECONDS_LONG" --rows="$ROWS" --rounds="$ROUNDS")
    who="torchaudio${COMPILE:+, torch.compile}"
    peer "train-$name-torchaudio" 120 training "${sizes[@]}" "${COMPILE[@]}" --only="$who"
done
first="${MODELS%% *}"
bench breakdown 120 breakdown --config="$first" --seconds="$SECONDS_LONG" --rows="${ROWS/max/24}"
peer extraction 60 extraction --config="$first" --seconds="$SECONDS_LONG" --rows="${ROWS/max/16}"

echo "$SECONDS s in all"
column -t -s $'\t' "$SUMMARY"
