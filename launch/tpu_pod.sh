#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A TPU pod of Google Cloud, all hosts at once; project and zone are those gcloud is configured for.
#   launch/tpu_pod.sh create  NAME v5litepod-64 [--spot ...]   # ask for it, and wait until it is there
#   launch/tpu_pod.sh install NAME                             # this commit, on every host
#   launch/tpu_pod.sh run     NAME run --config=configs/base.py --workdir=/mnt/work/base
#   launch/tpu_pod.sh log     NAME                             # follow the first host's
#   launch/tpu_pod.sh stop    NAME                             # it saves first; run goes on
#   launch/tpu_pod.sh delete  NAME
# The work directory is a disk that all hosts have mounted (Filestore, Cloud Storage FUSE).
set -euo pipefail

if (($# < 2)); then
  sed -n '3,10p' "$0" >&2
  exit 2
fi
action=$1 name=$2
shift 2

resources() { gcloud compute tpus queued-resources "$@"; }
on_hosts() { gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

runtime() { # the system image that belongs to an accelerator type
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *)
      echo "tpu_pod.sh: $1 is no accelerator type known here: v4-N, v5litepod-N, v5p-N, v6e-N" >&2
      return 1
      ;;
  esac
}

case $action in
  create)
    type=$1
    shift
    version=$(runtime "$type")
    resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$version" "$@"
    while true; do
      state=$(resources describe "$name" --format='value(state.state)')
      echo "$(date +%T) $name: $state"
      case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED) exit 1 ;;
      esac
      sleep "${SECONDS_BETWEEN_LOOKS:-30}"
    done
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:hubert_jax.tar.gz" --worker=all
    on_hosts all 'mkdir -p hubert_jax && tar -xzf hubert_jax.tar.gz -C hubert_jax && cd hubert_jax &&
      python3 -m venv .venv && .venv/bin/pip install --quiet --editable ".[tpu]"'
    ;;
  run) # detached: it goes on when this terminal is closed
    printf -v words ' %q' "$@" --coordinator=auto
    on_hosts all "cd hubert_jax &&
      { setsid nohup .venv/bin/hubert$words >> hubert.log 2>&1 < /dev/null & echo \$! > hubert.pid; }"
    ;;
  log) on_hosts 0 'tail -n 100 -F hubert_jax/hubert.log' ;;
  stop) on_hosts all "kill -TERM \"\$(cat hubert_jax/hubert.pid)\"" ;;
  delete) resources delete "$name" --force --quiet ;;
  *)
    echo "tpu_pod.sh: unknown action $action" >&2
    exit 2
    ;;
esac
