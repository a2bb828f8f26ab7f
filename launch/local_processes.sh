#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on several processes of this machine, each with its own CPU devices, to try things out:
#   launch/local_processes.sh 2 4 run --config=configs/demo.py --workdir=work/two   # 2 x 4 devices
# Ctrl-C or SIGTERM stops them all after the same step. PORT=29500 by default.
set -euo pipefail

if (($# < 3)); then
  sed -n '3,5p' "$0" >&2
  exit 2
fi
num_processes=$1 num_devices=$2
shift 2

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$num_devices"
export JAX_COORDINATOR_ADDRESS="localhost:${PORT:-29500}"
export JAX_NUM_PROCESSES="$num_processes"

children=()
for ((i = 0; i < num_processes; i++)); do
  JAX_PROCESS_ID=$i hubert "$@" &
  children+=($!)
done
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM

# The exit code is the first process' that did not end well; a signal cuts `wait` short.
code=0
for child in "${children[@]}"; do
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if ((status != 0 && code == 0)); then code=$status; fi
done
exit "$code"
