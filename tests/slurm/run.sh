#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The demo, shortened, by launch/slurm.sh as it ships, on two nodes of the SLURM of start.sh: in one
# go; preempted in the middle of it1's training, put back and finished; stopped close to a time limit
# of 4 minutes, as often as it takes; cancelled, and not put back. Weights are compared with those of
# the first. 12 minutes and more. `hubert` and `python` on PATH; as root:
#   tests/slurm/run.sh FOLDER [straight] [preempted] [limited] [cancelled]
#   ITERATIONS="('it1','it2')" STEPS=60 tests/slurm/run.sh FOLDER straight preempted
# On a busy machine LIMIT=5 (minutes) leaves time for more than a few steps before the signal.
set -euo pipefail
folder=$(realpath -m "$1")
parts=("${@:2}")
if ((!${#parts[@]})); then parts=(straight preempted limited cancelled); fi
root=$(realpath "$(dirname "$0")/../..")
"$root/tests/slurm/start.sh" "$folder"
export SLURM_CONF="$folder/slurm.conf" JAX_PLATFORMS=cpu
trap '"$root/tests/slurm/start.sh" "$folder" stop' EXIT
cd "$folder"

flags=(
  --config="$root/configs/demo.py" --config.iterations="${ITERATIONS:-('it1',)}"
  --config.corpus.synth.train_minutes=3 --config.corpus.synth.validation_minutes=1
  --config.corpus.num_workers=1 --config.kmeans.num_codes=25 --config.kmeans.seed_rows=3000
  --config.kmeans.max_passes=2 --config.kmeans.lloyd_passes=2 --config.kmeans.num_restarts=1
  --config.train.num_steps="${STEPS:-300}" --config.train.report_every=5
  --config.optim.warmup_steps=10 --heartbeat_timeout=600
)

submit() { # submit WORKDIR [OPTION OF SBATCH...]
  sbatch --parsable --nodes=2 --ntasks-per-node=1 "${@:2}" "$root/launch/slurm.sh" run "${flags[@]}" \
    --workdir="$folder/$1"
}

field() { scontrol show job "$1" | grep -o "$2=[A-Za-z0-9]*" | head -1 | cut -d= -f2; }

finish() { # waits for the end of a job
  until [[ $(field "$1" JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL ]]; do sleep 1; done
  echo "$(date +%T) job $1: $(field "$1" JobState), put back $(field "$1" Restarts) times"
  [[ $(field "$1" JobState) == COMPLETED ]]
}

compare() { # compare WORKDIR: with the straight one, bit by bit
  python - "$folder" "$1" <<'PYTHON'
import pathlib, sys
import numpy as np
from hubert_jax import checkpoints

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
for path in sorted((folder / "straight").glob("it*/checkpoints")):
    straight, other = (
        checkpoints.load_weights(folder / each / path.parent.name / "checkpoints")[0].arrays
        for each in ("straight", name)
    )
    assert straight.keys() == other.keys()
    for key, array in straight.items():
        np.testing.assert_array_equal(other[key], array, err_msg=key)
    print(f"{name}, {path.parent.name}: {len(straight)} arrays, the same bits")
PYTHON
}

straight() { finish "$(submit straight)"; }

in_training() { # in_training WORKDIR: waits until it is
  until grep -q masked_loss "$folder/$1/it1/logs/metrics.jsonl" 2>/dev/null; do sleep 0.2; done
}

preempted() {
  local job
  job=$(submit preempted)
  in_training preempted
  finish "$(sbatch --parsable --partition=high --nodes=2 --output=/dev/null --wrap 'sleep 2')"
  finish "$job"
  grep -h 'run: stopped by\|slurm.sh\|going on after' "hubert-$job.log"
  [[ $(field "$job" Restarts) == 1 ]]
  compare preempted
}

limited() { # USR1 comes 180 s before the limit, or up to 60 s sooner
  local job
  job=$(submit limited --time="${LIMIT:-4}")
  finish "$job"
  grep -h 'run: stopped by\|slurm.sh\|going on after' "hubert-$job.log"
  (($(field "$job" Restarts) > 0))
  compare limited
}

cancelled() {
  local job
  job=$(submit cancelled)
  in_training cancelled
  scancel "$job"
  finish "$job" || true
  grep -h 'run: stopped by\|slurm.sh' "hubert-$job.log"
  [[ $(field "$job" JobState) == CANCELLED && $(field "$job" Restarts) == 0 ]]
}

for part in "${parts[@]}"; do
  echo "$(date +%T) $part"
  "$part"
done
