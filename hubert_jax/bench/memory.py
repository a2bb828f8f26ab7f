# SPDX-License-Identifier: Apache-2.0
"""How much memory a contender takes, and the largest batch that fits.

Both are measured in a process in which nobody else works: that of JAX and of torch, or of two
contenders on one CPU, cannot be told apart.
"""

import gc
import math
import os
import resource
import sys
from collections.abc import Callable

import jax

from hubert_jax import logs
from hubert_jax.bench.timing import Contender
from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import HubertConfig

# Parameters, gradients and AdamW's two moments in float32.
STATE_BYTES = 16
USABLE = 0.95  # of what JAX may take: the rest is workspaces and holes
SMALLER = 0.9  # rows, after a batch that did not fit


def peak() -> int:
    """Bytes that this process has held at most: on the GPU where there is one, else in all."""
    on_gpu = 0
    if jax.default_backend() == "gpu":
        statistics = jax.local_devices()[0].memory_stats() or {}
        on_gpu = statistics.get("peak_bytes_in_use", 0)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        on_gpu = max(on_gpu, sys.modules["torch"].cuda.max_memory_allocated())
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit() -> int:
    """Bytes that a batch may take: of the GPU, or half of the machine's memory."""
    if jax.default_backend() == "gpu":
        statistics = jax.local_devices()[0].memory_stats() or {}
        return int(USABLE * statistics["bytes_limit"])
    return machine_bytes() // 2


def machine_bytes() -> int:
    """Of the main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest(
    contender: Callable[[int], Contender], *, fixed: int, limit: int, probe: int, most: int
) -> int:
    """Rows of the largest batch within `limit` bytes, from what `probe` rows take beside `fixed`.

    Extrapolated, not tried: the caller takes fewer where it does not fit after all.
    """
    work = contender(probe).prepare()
    work()
    work()
    taken = peak()
    del work
    gc.collect()
    a_row = max(taken - fixed, 1) / probe
    rows = max(1, min(most, math.floor((limit - fixed) / a_row)))
    logs.info(
        f"{probe} rows take {taken / 2**30:.2f} GiB, {fixed / 2**30:.2f} of it whatever the rows:"
        f" {rows} rows for {limit / 2**30:.1f} GiB"
    )
    return rows


def is_exhausted(error: BaseException) -> bool:
    """Whether JAX or torch says that there is no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def state_bytes(config: HubertConfig, head: HeadConfig, num_codes: int) -> int:
    """Of parameters, gradients and the optimiser in training."""
    make = lambda: Hubert(config, head, (num_codes,), key=jax.random.key(0))  # noqa: E731
    return STATE_BYTES * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make)))
