# SPDX-License-Identifier: Apache-2.0
"""What a table was made with: versions, hardware and what the environment sets."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

from hubert_jax.bench import memory
from hubert_jax.data import cards

# As they are called where they are installed from.
PEERS = ("torch", "torchaudio", "transformers", "minimal-hubert", "scikit-learn", "faiss-cpu")
VARIABLES = ("GLIBC_TUNABLES", "JAX_PLATFORMS")  # times depend on them
CPUINFO = pathlib.Path("/proc/cpuinfo")


def described() -> dict[str, Any]:
    return {
        "versions": versions(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "memory_GiB": round(memory.machine_bytes() / 2**30, 2),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of ours and of the peers that are installed, none of which is imported."""
    found = cards.versions() | {"python": platform.python_version()}
    for package in ("flax", *PEERS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> str:
    """The name of the model."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
