# SPDX-License-Identifier: Apache-2.0
"""The mesh, and the one table that says which axis of an array lies on which axis of the mesh.

Parameters carry the names of their logical axes (`nnx.Param(..., axes=(...))`), activations are
constrained by the same names at a few points of the model; nothing else knows about devices.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
HOPPER = 9.0  # a compute capability: H100, H200

# logical axis -> mesh axis. An axis that is not divisible by its mesh axis stays whole.
RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",  # of parameters: gathered when used
    "heads": "tensor",
    "ffn": "tensor",
    "conv_in": None,
    "conv_out": "fsdp",
    "frames": None,
    "residual": None,  # the width of activations
    "code": None,
    "code_width": None,
}


def make_mesh(*, data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """A mesh ("data", "fsdp", "tensor"); at most one size may be -1: all devices that are left.

    Over several islands (slices of TPUs, nodes of GPUs) fsdp and tensor stay inside of one where
    they fit, so that only the gradients of data parallelism cross the slower network.
    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data=data, fsdp=fsdp, tensor=tensor, num_devices=len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    num_islands, island = islands(devices)
    inside = len(devices) // num_islands
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if num_islands == 1 or inside % (sizes["fsdp"] * sizes["tensor"]):
        return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=axis_types)
    grid = mesh_utils.create_hybrid_device_mesh(
        (sizes["data"] // num_islands, sizes["fsdp"], sizes["tensor"]),
        (num_islands, 1, 1),
        devices,
        process_is_granule=island == "process_index",
    )
    return Mesh(grid, MESH_AXES, axis_types=axis_types)


def mesh_sizes(*, data: int, fsdp: int, tensor: int, num_devices: int) -> dict[str, int]:
    """The size of every axis, -1 replaced. Raises ValueError where `make_mesh` would."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or taken < 1 or num_devices % taken or (not free and taken != num_devices):
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise ValueError(
            f"mesh {sizes} does not fit {num_devices} devices: give sizes among {divisors} whose"
            " product is the number of devices; one of them may be -1"
        )
    for axis in free:
        sizes[axis] = num_devices // taken
    return sizes


def abstract_mesh(*, data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh of these sizes without devices, to ask how arrays would be split."""
    return AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_of(array: jax.Array | np.ndarray) -> Mesh | None:
    """The mesh that an array lies on, one of a single device among them; None for numpy's."""
    if not isinstance(array, jax.Array):
        return None
    mesh = getattr(array.sharding, "mesh", None)
    if isinstance(mesh, Mesh):
        return mesh
    return make_mesh(data=-1, fsdp=1, tensor=1, devices=list(array.sharding.device_set))


def islands(devices: Sequence[Any]) -> tuple[int, str]:
    """How many groups of devices with a fast network inside, and the attribute that tells them.

    jax numbers slices of TPUs and, on GPUs, hosts (or what NVLink joins); elsewhere
    it is processes. One group where they are not equally large.
    """
    attribute = "slice_index" if hasattr(devices[0], "slice_index") else "process_index"
    sizes = collections.Counter(getattr(device, attribute) for device in devices)
    return (len(sizes) if len({*sizes.values()}) == 1 else 1), attribute


def cuda_capability() -> float:
    """The compute capability of an NVIDIA GPU, such as 9.0; 0 of whatever else the first device is.

    AMD's GPUs have one that is no number, such as "gfx942"; there may be no device at all.
    """
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", ""))
    except (ValueError, IndexError):
        return 0.0


def is_hopper() -> bool:
    """Whether the first device is one of the NVIDIA GPUs that our kernels were measured on."""
    return HOPPER <= cuda_capability() < HOPPER + 1


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x` with its axes laid out as the table says, on the mesh in use; `x` itself without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes, dict(mesh.shape)))


def ways(axis: str) -> int:
    """Into how many parts the mesh in use may cut this logical axis."""
    return _ways(axis, dict(jax.sharding.get_abstract_mesh().shape))


def on_own_rows(function: Callable[..., Any], rows: Any, *whole: jax.Array) -> Any:
    """`function(rows, *whole)`: every device has its own rows (of a tree) and all of the others.

    The gradient of the others is summed over the devices where it leaves function. Left to itself,
    XLA sums right after the product over rows, whatever that product is expanded from.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_rows = len(jax.tree.leaves(rows)[0])
    if mesh.empty or mesh.size == 1 or num_rows % batch_ways(mesh):
        return function(rows, *whole)
    axes = ("data", "fsdp")

    def own(rows, *whole):
        # What is cast here is summed here on the way back, not where it meets the rows.
        return function(rows, *(jax.lax.pcast(each, axes, to="varying") for each in whole))

    specs = (P(axes), *(P() for _ in whole))
    return jax.shard_map(own, in_specs=specs, out_specs=P(axes))(rows, *whole)


def on_own_heads(
    function: Callable[..., Any], x: jax.Array, per_row: jax.Array, *whole: jax.Array, ndim: int
) -> jax.Array:
    """`function(first, x, per_row, *whole)`: every device has its own rows and heads of x.

    x and what function makes of it, of `ndim` axes, are (rows, ..., heads, width); per_row has rows
    first, and every device has all of the others. `first` says where its first row and head are
    among all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function((0, 0), x, per_row, *whole)
    rows, heads = _spec((len(x), x.shape[-2]), ("batch", "heads"), dict(mesh.shape))

    def own(x, per_row, *whole):
        first_row = jax.lax.axis_index(rows) * len(x) if rows else 0
        first_head = jax.lax.axis_index(heads) * x.shape[-2] if heads else 0
        return function((first_row, first_head), x, per_row, *whole)

    def place(ndim: int) -> P:
        return P(rows, *(None,) * (ndim - 3), heads, None)

    specs = (place(x.ndim), P(rows), *(P() for _ in whole))
    # Pallas' interpreter does not know over which axes a value varies.
    split = jax.shard_map(own, in_specs=specs, out_specs=place(ndim), check_vma=False)
    return split(x, per_row, *whole)


def param_shardings(mesh: Mesh | AbstractMesh, model):
    """A NamedSharding for every parameter of a model (abstract or real), in the model's tree."""
    sizes = dict(mesh.shape)

    def shard(param):
        (shape,) = (value.shape for value in jax.tree.leaves(param))
        # Stacked layers have a leading axis that the block's own names do not mention.
        axes = ("frames",) * (len(shape) - len(param.axes)) + tuple(param.axes)
        return jax.tree.map(lambda _: NamedSharding(mesh, _spec(shape, axes, sizes)), param)

    return jax.tree.map(shard, model, is_leaf=lambda leaf: hasattr(leaf, "axes"))


def make_sharded(make: Callable[[jax.Array], Any], key, mesh):
    """`make(key)`, a model, created with every parameter already where the mesh wants it."""
    shardings = param_shardings(mesh, jax.eval_shape(make, key))
    return jax.jit(make, out_shardings=shardings)(key)


def _spec(shape, axes, sizes: dict[str, int]) -> P:
    """The PartitionSpec for `axes`; an axis that does not divide evenly stays whole."""
    if len(shape) != len(axes):
        raise AssertionError(f"axes {axes} for shape {shape}")

    def place(size, axis):
        num_parts = _ways(axis, sizes)
        return RULES[axis] if num_parts > 1 and size % num_parts == 0 else None

    return P(*(place(size, axis) for size, axis in zip(shape, axes, strict=True)))


def _ways(axis: str, sizes: dict[str, int]) -> int:
    target = RULES[axis]
    names = (target,) if isinstance(target, str) else (target or ())
    return math.prod(sizes.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, as a global one; each device is given its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Parts(NamedTuple):
    """The parts of a batch that a process holds, of `num_parts` equal runs of its rows."""

    held: tuple[int, ...]
    num_parts: int


def batch_parts(mesh: Mesh) -> Parts:
    """Which rows this process has to load.

    They follow from where its devices are in the mesh: not one run of rows on every network, and
    the same rows in several processes where a tensor axis spans them.
    """
    count = batch_ways(mesh)
    index_of = batch_sharding(mesh).addressable_devices_indices_map((count,))
    held = {index[0].indices(count)[0] for index in index_of.values() if index is not None}
    return Parts(tuple(sorted(held)), count)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The rows of a batch that this process holds, in their order, made into global arrays."""
    sharding, parts = batch_sharding(mesh), batch_parts(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) // len(parts.held) * parts.num_parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: put(rows) for name, rows in batch.items()}
