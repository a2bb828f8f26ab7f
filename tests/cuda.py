# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA's GPUs on a CPU: interpreted, or lowered and verified but not run."""

import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
SHARDS = (2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2


@pytest.fixture
def hopper(monkeypatch):
    """What asks for the GPU is told of one; what is then lowered is still for the CPU."""

    def local_devices(*, backend=None):
        if backend is not None:
            raise RuntimeError("there is none: Pallas then asks the abstract mesh")
        return [types.SimpleNamespace(compute_capability="9.0")]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run, slowly, on the CPU; the names of those that did."""
    from jax.experimental import pallas as pl

    from hubert_jax import flash

    call, names = pl.pallas_call, set()

    def interpret(*args, **options):
        names.add(options["name"])
        return call(*args, **options | {"interpret": True})

    monkeypatch.setattr(pl, "pallas_call", interpret)
    monkeypatch.setattr(flash, "_exp2", lambda x, how: jax.numpy.exp2(x))
    return names


@pytest.fixture
def checked_kernels(monkeypatch):
    """Kernels whose code has been verified, which otherwise only the GPU's compiler does."""
    from jax._src.pallas.triton import lowering  # jax may drop it, and the other tests run on

    lower = lowering.lower_jaxpr_to_triton_module
    kernels = []

    def lower_and_verify(*args, **options):
        result = lower(*args, **options)
        result.module.operation.verify()
        kernels.append(result)
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", lower_and_verify)
    return kernels


def lowered(function, *args, mesh=((), ())) -> str:
    """The program for an NVIDIA GPU, or for several of a mesh."""
    with jax.sharding.use_abstract_mesh(AbstractMesh(*mesh, abstract_device=GPU)):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
