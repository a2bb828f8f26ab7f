#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One machine, with all its devices:
#   launch/local.sh run --config=configs/demo.py --workdir=work/demo
set -euo pipefail

# On a CPU the page faults of XLA's fresh buffers cost as much as arithmetic: huge pages for malloc.
# glibc reads this once, before the process starts.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

exec hubert "$@"
