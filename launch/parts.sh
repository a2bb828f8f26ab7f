#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Parts of an unattended run, each a process with a time limit of its own; sourced:
#   . launch/parts.sh      wants OUT (a folder), PARTS (a regex), BUDGET (seconds), PYTHON
# Each leaves NAME.log, and a line in summary.tsv. What would start after BUDGET is skipped. In one
# process torch and JAX would share the GPU's memory, and one failure would take the rest with it.

: "$OUT" "$PARTS" "$BUDGET" "$PYTHON"
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
