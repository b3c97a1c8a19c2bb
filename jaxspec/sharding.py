"""Where arrays live: the only file that knows that a mesh has axes named data and model.

Rows are split over `data`. The target is tensor-parallel over `model`, and so is a drafter in training, whose float32 masters,
gradients and moments are eight times its weights' bytes in bfloat16; drafters that draft, small as they are, are whole on every
device. Library functions never say where: arguments are placed, `jit` follows them, and a program that is fed its own
output names its layout with `shardings`, so that the layout, and with it the program, stays the same.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxspec import config
from jaxspec.config import UserError
from jaxspec.transformer import Cache, LMConfig
from jaxspec.types import ONE_DEVICE, Placement, SpecParams, SpecState

NAMES = ("data", "model")
# Logical axis -> mesh axis, for each part. A layout is changed here and nowhere else.
SPLIT = {"rows": "data", "vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model"}
TRAINED = "trained drafter"
RULES: dict[str, dict[str, str]] = {"target": SPLIT, TRAINED: SPLIT, "drafter": {"rows": "data"}}
# Logical axes of a kernel `[in, out]`, or a table, by its module; a bias has the last. The embedding and the head are
# split over the vocabulary, not the width: a lookup then adds only zeros and each logit is summed on one device.
AXES = {
    "embed": ("vocab", "width"),
    "head": ("width", "vocab"),
    "q": ("width", "heads"),
    "k": ("width", "kv_heads"),
    "v": ("width", "kv_heads"),
    "o": ("heads", "width"),
    "gate": ("width", "mlp"),
    "up": ("width", "mlp"),
    "down": ("mlp", "width"),
}
CACHE = ("rows", "kv_heads", "slots", "head_dim")


def start(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to its job, before any other use of JAX.

    On a TPU pod or under SLURM no argument is needed; elsewhere give the first process's `host:port`, their number and
    this one's.
    """
    try:
        # A process that is done waits for the others, whose share may take hours longer.
        jax.distributed.initialize(address, processes, process, shutdown_timeout_seconds=7 * 24 * 3600)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"this process cannot join a job ({reason}); start it on every worker of a TPU pod or by SLURM, or, with "
            "decode.generate, give --processes and --process in place of --distributed"
        ) from error


def make_mesh(data: int, model: int, devices: list | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, by default of the first of all that there are."""
    there = jax.devices() if devices is None else devices
    if data * model > len(there):
        raise UserError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, {len(there)} are there; "
            f"give --mesh.data and --mesh.model whose product is at most {len(there)}"
        )
    # Explicit axes, the default, refuse to index a table with a sharded index.
    return jax.make_mesh((data, model), NAMES, (AxisType.Auto,) * 2, devices=there[: data * model])


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """A mesh of devices that need not exist, for planning."""
    return AbstractMesh((data, model), NAMES, axis_types=(AxisType.Auto,) * 2)


def check(config: LMConfig, mesh: Mesh | AbstractMesh, batch: int | None = None, part: str = "target") -> None:
    """Raises UserError, naming the sizes that work, for a model or a batch that the mesh does not divide."""
    sizes = {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.mlp_width,
        "vocab": config.vocab_size,
    }
    split = {axis: size for axis, size in sizes.items() if RULES[part].get(axis) == "model"}
    across = mesh.shape["model"]
    for axis, size in split.items():
        if size % across:
            able = math.gcd(*split.values())
            raise UserError(
                f"--mesh.model {across} does not divide the {part}'s {size} {axis.replace('_', ' ')}; "
                f"give one of {', '.join(str(n) for n in range(1, able + 1) if able % n == 0)}"
            )
    if batch is not None:
        check_rows(batch, mesh)


def asked(sizes: config.Mesh, devices: list | None = None) -> Mesh | None:
    """The mesh that a config asks for; None where one device does."""
    return None if (sizes.data, sizes.model) == (1, 1) else make_mesh(sizes.data, sizes.model, devices)


def check_rows(number: int, mesh: Mesh | AbstractMesh | None, name: str = "a batch") -> None:
    """Raises UserError, naming the nearest numbers that work, for rows that the mesh does not divide."""
    parts = num_row_parts(mesh) if mesh else 1
    if number % parts:
        near = sorted({max(parts, number // parts * parts), -(-number // parts) * parts})
        raise UserError(
            f"{name} of {number} does not divide over --mesh.data {parts}; give {' or '.join(map(str, near))}"
        )


def spec(*axes: str | None, part: str) -> P:
    """Where an array of these logical axes lives, None for an axis that is never split."""
    return P(*[RULES[part].get(axis) if axis else None for axis in axes])


def param_specs(params: Any, part: str = "target") -> Any:
    """Specs of a transformer's parameters, of a LoRA bank, or of any tree with such leaves, as an optimiser's state.

    What is not named in AXES is whole on every device; axes before those of AXES, as of drafters side by side, are not split.
    """

    def own(path, leaf) -> P:
        axes = _axes([str(getattr(p, "key", p)) for p in path])
        return spec(*[None] * (leaf.ndim - len(axes)), *axes, part=part) if axes else P()

    return jax.tree.map_with_path(own, params)


def _axes(path: list[str]) -> tuple[str | None, ...]:
    """Logical axes of a leaf by its path, none where it is whole; an adapter is a pair, a `[in, r]` and b `[r, out]`.

    Of a pair that factor is split on whose side the kernel is, so that the update lies where the kernel's product does; the
    other, of the width by the rank, is whole.
    """
    axes = AXES.get(path[-2], ()) if len(path) > 1 else ()
    kinds = {"kernel": axes, "embedding": axes, "bias": axes[-1:], "[0]": (*axes[:1], None), "[1]": (None, *axes[1:])}
    return kinds.get(path[-1], ()) if axes else ()


def row_specs(tree: Any, part: str = "drafter") -> Any:
    """Specs of a per-row tree, whose leaves have rows first; caches are split over heads too where `part` is."""
    is_cache = lambda node: isinstance(node, Cache)

    def own(node) -> Any:
        return jax.tree.map(lambda leaf: spec(*CACHE, part=part), node) if is_cache(node) else spec("rows", part=part)

    return jax.tree.map(own, tree, is_leaf=is_cache)


def state_specs(state: SpecState) -> SpecState:
    """Specs of a speculator's state: rows over `data`, the target's cache over `model` as well."""
    return row_specs(state)._replace(target=row_specs(state.target, "target"))


def column_specs(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Specs of leaves `[D, rows, ...]`, batches of several drafters; rows that do not divide are whole everywhere."""
    divides = lambda leaf: leaf.shape[1] % num_row_parts(mesh) == 0
    return jax.tree.map(lambda leaf: spec(None, "rows" if divides(leaf) else None, part="drafter"), tree)


def num_row_parts(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts rows are split."""
    return mesh.shape["data"]


def shardings(specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Specs on a mesh, as `in_shardings` and `out_shardings` of `jit` want them."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """The tree's leaves on the mesh; with several processes each holds the whole leaf and places its own part."""

    def put(leaf, sharding: NamedSharding):
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings(specs, mesh))


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """The tree on every device of the mesh, as drafters that draft are; as it is without one."""
    return tree if mesh is None else place(tree, param_specs(tree, "drafter"), mesh)


def gathered(tree: Any) -> Any:
    """The tree with leaves that every process can read; those split over several processes are gathered by all of them."""
    here = lambda leaf: leaf.is_fully_addressable or leaf.is_fully_replicated
    return jax.tree.map(lambda leaf: leaf if here(leaf) else process_allgather(leaf, tiled=True), tree)


def over(mesh: Mesh | None) -> Placement:
    """Rows over `data`, the target over `model`; rows that do not divide are whole on every device. None: one device."""
    if mesh is None:
        return ONE_DEVICE

    def params(own: SpecParams) -> SpecParams:
        return place(own, SpecParams(param_specs(own.target), param_specs(own.drafter, "drafter")), mesh)

    def rows(tree: Any) -> Any:
        divides = lambda leaf: leaf.shape[0] % num_row_parts(mesh) == 0
        return place(
            tree, jax.tree.map(lambda leaf: spec("rows" if divides(leaf) else None, part="drafter"), tree), mesh
        )

    def state(own: Any) -> Any:
        specs = row_specs(own)._replace(spec=state_specs(own.spec))
        return jax.lax.with_sharding_constraint(own, shardings(specs, mesh))

    return Placement(params, rows, state)


def sides(target: config.Mesh, drafter: config.Mesh, devices: list | None = None) -> tuple[Mesh, Mesh]:
    """Meshes of the target's devices and, behind them, of the drafter's, by default of all that there are."""
    there = jax.devices() if devices is None else devices
    own, need = target.data * target.model, drafter.data * drafter.model
    if own + need > len(there):
        raise UserError(
            f"{own} devices for the target and {need} for the drafter are {own + need}, {len(there)} are there; give meshes of "
            f"at most as many, on a CPU after XLA_FLAGS=--xla_force_host_platform_device_count={own + need}"
        )
    return make_mesh(target.data, target.model, there[:own]), make_mesh(drafter.data, drafter.model, there[own:])


def apart_params(params: SpecParams, target: Mesh, drafter: Mesh) -> SpecParams:
    """Parameters, each part on its own mesh."""
    specs = SpecParams(param_specs(params.target), param_specs(params.drafter, "drafter"))
    return SpecParams(place(params.target, specs.target, target), place(params.drafter, specs.drafter, drafter))


def moved(tree: Any, mesh: Mesh, part: str) -> Any:
    """A tree with rows first on the mesh of a part, which need not be where it was."""
    return place(tree, row_specs(tree, part), mesh)


def held(mesh: Mesh, part: str) -> Callable[[Any], Any]:
    """A traced tree with rows first -> the same, constrained to where `moved` would put it."""
    return lambda tree: jax.lax.with_sharding_constraint(tree, shardings(row_specs(tree, part), mesh))


def device_bytes(tree: Any, specs: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes that the tree, or its abstract shapes, takes on each device."""
    size = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings(specs, mesh))))
