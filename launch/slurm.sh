#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SLURM, one node or many. Preempted, or close to its time limit, the job saves, and goes on later:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00 \
#     launch/slurm.sh run --config=configs/base.py --workdir=/shared/work/base
# A task per GPU; WORKDIR on a disk that every node sees; `hubert` on PATH, or HUBERT=/path/to/it.
# More options of sbatch (partition, account) go in front of the script. The log: hubert-JOB.log.
# scancel JOB ends it for good, saved if KillWait (30 s) is enough; the same sbatch goes on from there.
#SBATCH --job-name=hubert
#SBATCH --output=hubert-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

requeue() { # SLURM ends this script on the way
  # A job that was cancelled is ending, and one that SLURM puts back itself needs no help.
  local state # none where the controller does not answer
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  [[ ${state:-RUNNING} == RUNNING ]] || return 0
  echo "slurm.sh: job $SLURM_JOB_ID is put back into the queue (so far: ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60
}

# USR1 comes 180 s before the limit and, where SLURM is told so (send_user_signal), at preemption.
# The tasks hear TERM and save after the step they are at; what does not save (features, labels) is
# whole shard by shard and needs no more than to be started again. A preemption signals tasks itself.
is_asked=no timer=
# shellcheck disable=SC2317,SC2329 # called by the traps
on_signal() {
  is_asked=yes
  if [[ $1 == USR1 ]]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
  if [[ ! $timer ]]; then
    # It outlives this script where SLURM does not find it; the job may be running again by then.
    (sleep 120 >/dev/null 2>&1 && kill -0 $$ && requeue) &
    timer=$!
  fi
}
# Until `step` is known a signal is only noted: the timer's start would change $!.
early=
trap 'early=USR1' USR1
trap 'early=TERM' TERM
srun --kill-on-bad-exit=1 "${HUBERT:-hubert}" "$@" &
step=$!
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
if [[ $early ]]; then on_signal "$early"; fi
while true; do
  code=0
  wait "$step" || code=$?
  kill -0 "$step" 2>/dev/null || break # a signal cuts `wait` short
done
trap '' USR1
trap - TERM # from here on it only means the end
echo "slurm.sh: hubert ended with code $code"
if [[ $timer ]]; then kill "$timer" 2>/dev/null || true; fi
# 130: it saved and stopped, as it was told to; 143: it was stopped where there is nothing to save.
if ((code == 130 || code == 143)) || [[ $is_asked == yes && $code -ne 0 ]]; then
  requeue
fi
exit "$code"
