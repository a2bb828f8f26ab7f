#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One machine, with all its devices:
#   launch/local.sh run --config=configs/demo.py --workdir=work/demo
set -euo pipefail
shopt -s nullglob

# On a CPU, memory that comes fresh from the system costs as much as arithmetic, and more in a
# virtual machine that hands back what is free: huge pages for malloc, which keeps what it has had.
# glibc reads this once, before the process starts.
accelerators=(/dev/nvidia[0-9]* /dev/accel* /dev/vfio/[0-9]* /dev/kfd*)
tunables=glibc.malloc.hugetlb=1
if [[ "${JAX_PLATFORMS:-}" == cpu || ${#accelerators[@]} == 0 ]]; then
  tunables+=:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000
  tunables+=:glibc.malloc.arena_max=1 # the others cannot keep what is larger than 64 MB
fi
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"

exec hubert "$@"
