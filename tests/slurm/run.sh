#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The demo, shortened, by launch/slurm.sh as it ships, on two nodes of the SLURM of start.sh: once in
# one go, once preempted in the middle of it1's training, put back and finished. Then the weights of
# both are compared. Minutes. `hubert` and `python` on PATH; as root:
#   tests/slurm/run.sh FOLDER            # or a part: straight, then stopped
#   ITERATIONS="('it1','it2')" STEPS=200 tests/slurm/run.sh FOLDER
set -euo pipefail
folder=$(realpath -m "$1")
part=${2:-both}
root=$(realpath "$(dirname "$0")/../..")
"$root/tests/slurm/start.sh" "$folder"
export SLURM_CONF="$folder/slurm.conf"
trap '"$root/tests/slurm/start.sh" "$folder" stop' EXIT
cd "$folder"

flags=(
  --config="$root/configs/demo.py" --config.iterations="${ITERATIONS:-('it1',)}"
  --config.corpus.synth.train_minutes=3 --config.corpus.synth.validation_minutes=1
  --config.corpus.num_workers=1 --config.kmeans.num_codes=25 --config.kmeans.seed_rows=3000
  --config.kmeans.max_passes=2 --config.kmeans.lloyd_passes=2 --config.kmeans.num_restarts=1
  --config.train.num_steps="${STEPS:-60}" --config.train.report_every=5
  --config.optim.warmup_steps=10 --heartbeat_timeout=600
)

submit() {
  sbatch --parsable --nodes=2 --ntasks-per-node=1 "$root/launch/slurm.sh" run "${flags[@]}" \
    --workdir="$folder/$1"
}

field() { scontrol show job "$1" | grep -o "$2=[A-Za-z0-9]*" | head -1 | cut -d= -f2; }

finish() { # waits for the end of a job
  until [[ $(field "$1" JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL ]]; do sleep 1; done
  echo "$(date +%T) job $1: $(field "$1" JobState), put back $(field "$1" Restarts) times"
  [[ $(field "$1" JobState) == COMPLETED ]]
}

if [[ $part != stopped ]]; then
  finish "$(submit straight)"
fi
if [[ $part == straight ]]; then exit; fi

stopped=$(submit stopped)
until grep -q masked_loss "$folder/stopped/it1/logs/metrics.jsonl" 2>/dev/null; do sleep 0.2; done
finish "$(sbatch --parsable --partition=high --nodes=2 --output=/dev/null --wrap 'sleep 2')"
finish "$stopped"
[[ $(field "$stopped" Restarts) == 1 ]]
grep -h 'stopped by\|slurm.sh\|going on after' "hubert-$stopped.log"

python - "$folder" <<'EOF'
import pathlib, sys
import numpy as np
from hubert_jax import checkpoints

folder = pathlib.Path(sys.argv[1])
for path in sorted((folder / "straight").glob("it*/checkpoints")):
    straight, stopped = (
        checkpoints.load_weights(folder / name / path.parent.name / "checkpoints")[0].arrays
        for name in ("straight", "stopped")
    )
    assert straight.keys() == stopped.keys()
    for name, array in straight.items():
        np.testing.assert_array_equal(stopped[name], array, err_msg=name)
    print(f"{path.parent.name}: {len(straight)} arrays, the same bits")
EOF
