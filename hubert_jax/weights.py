# SPDX-License-Identifier: Apache-2.0
"""Names of arrays: a tree of parameters as a flat dictionary, and back.

A name is the path through the modules, "encoder.layers.ffn_in.kernel"; stacked layers keep their
leading layer axis.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hubert_jax import sharding

Array = jax.Array | np.ndarray


def to_named(tree) -> dict[str, jax.Array]:
    """Every array of a module, an optimiser state or any other pytree, by its dotted name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def from_named(template, arrays: Mapping[str, Array]):
    """`template` (real or abstract) with its arrays taken from `arrays`.

    Raises ValueError that lists names that are missing or unknown and shapes that differ.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {_name(path): leaf for path, leaf in leaves}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - arrays.keys())]
    problems += [f"unknown {name}" for name in sorted(arrays.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {tuple(arrays[name].shape)}, the model wants {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in arrays and arrays[name].shape != leaf.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("arrays do not fit the model: " + "; ".join(problems[:8]) + more)
    return jax.tree.unflatten(treedef, [arrays[name] for name in wanted])


def digest(arrays: Mapping[str, Array]) -> str:
    """SHA-256 of arrays and their names."""
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha256.update(f"{name} {array.shape} {array.dtype}".encode())
        sha256.update(np.ascontiguousarray(array).data)
    return f"sha256:{sha256.hexdigest()}"


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """32 bits of every array, by name: the same on every mesh, another for any one value changed.

    Each value's bits times an odd number that tells its place, added up modulo 2^32; computed where
    the arrays are.
    """
    together: dict[Any, dict[str, Array]] = {}
    for name, array in arrays.items():
        together.setdefault(sharding.mesh_of(array), {})[name] = array
    found = []
    for mesh, part in together.items():  # one program wants its arrays on the mesh in use
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            found.append(_checksums(part))
    return {name: int(value) for part in jax.device_get(found) for name, value in part.items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _name(path) -> str:
    """Dotted; the last step into a flax Variable ("value") is no part of a name."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path
    ]
    return ".".join(keys[:-1] if keys[-1] == "value" else keys)
