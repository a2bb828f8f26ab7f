# SPDX-License-Identifier: Apache-2.0
"""Names of arrays: a tree of parameters as a flat dictionary, and back.

A name is the path through the modules, "encoder.layers.ffn_in.kernel"; stacked layers keep their
leading layer axis.
"""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

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


def _name(path) -> str:
    """Dotted; the last step into a flax Variable ("value") is no part of a name."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path
    ]
    return ".".join(keys[:-1] if keys[-1] == "value" else keys)
