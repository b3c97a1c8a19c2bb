"""The bank: one update of the base drafter a task, and the ways for rows to have each their own.

A bank of LoRA adapters is a list over layers of {projection: (a `[tasks, in, r]`, b `[tasks, r, out]`)}; an adapter is the same
with rows in place of tasks. The scale alpha / r is folded into b when a bank is made, so applying needs no constant. Small
drafters on an accelerator are bound by launches, not by bytes: there the merged kernels of all tasks may stand side by side,
one product serves every row, and the adapter is only the row's route. Of a drafter that is mostly embedding the specialists
may be whole weights instead, and a row has its own of them.
Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

WINDOW = 17  # tokens of a row that are a window; a prompt has more
PROJECTIONS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


class Whole(NamedTuple):
    """Whole weights in place of low-rank updates: of each task, `[tasks, ...]`, or of each row, `[B, ...]`."""

    weights: dict


Bank = list[dict[str, tuple[Array, Array]]] | Whole
Adapter = list[dict[str, tuple[Array, Array]]] | Array | Whole


class Stacked(NamedTuple):
    """In place of a bank: the weights hold every task's kernels, see `stack`."""


def init_bank(params: dict, key: Array, *, tasks: int, rank: int) -> Bank:
    """A bank that changes nothing yet: a uniform as in PEFT (Kaiming, sqrt 5), b zero, float32; consumes `key`."""
    bank = []
    for layer, (_, name, kernel) in _kernels(params):
        if layer == len(bank):
            bank.append({})
        bound = 1 / math.sqrt(kernel.shape[0])
        own = jax.random.fold_in(jax.random.fold_in(key, layer), len(bank[layer]))
        a = jax.random.uniform(own, (tasks, kernel.shape[0], rank), minval=-bound, maxval=bound)
        bank[layer][name] = (a, jnp.zeros((tasks, rank, kernel.shape[1])))
    return bank


def scaled(bank: Bank, scale: float) -> Bank:
    """The bank with LoRA's factor alpha / r folded into b."""
    return [{name: (a, b * scale) for name, (a, b) in layer.items()} for layer in bank]


def with_base(params: dict, bank: Whole) -> Whole:
    """The specialists with the base drafter's weights as the last, which route -1 picks."""
    join = lambda own, base: jnp.concatenate([own, base[None]])
    return Whole(jax.tree.map(join, bank.weights, params))


def select(bank: Bank | Stacked, route: Array) -> Adapter:
    """Rows' own adapters: `route [B]` picks each row's task; -1 is the base drafter, an update of zero or the last weights."""
    if isinstance(bank, Stacked):
        return route
    if isinstance(bank, Whole):
        return jax.tree.map(lambda leaf: leaf[route], bank)
    served = (route >= 0)[:, None, None]
    pick = lambda stack: jnp.where(served, stack[jnp.maximum(route, 0)], 0).astype(stack.dtype)
    return jax.tree.map(pick, bank)


def merge(params: dict, bank: Bank, task: int) -> dict:
    """The base drafter's parameters with one task's update added in; the shape of the program does not change."""
    if task < 0:
        return params
    if isinstance(bank, Whole):
        return jax.tree.map(lambda own, leaf: own[task].astype(leaf.dtype), bank.weights, params)
    own = [{name: (a[task], b[task]) for name, (a, b) in layer.items()} for layer in bank]
    return added(params, _products(params, own))


def added(params: dict, update: dict[str, Array]) -> dict:
    """Parameters with an update added, in float32, to every leaf that it names by its path."""

    def own(path, leaf: Array) -> Array:
        change = update.get(_name(path))
        return leaf if change is None else (leaf.astype(jnp.float32) + change).astype(leaf.dtype)

    return jax.tree.map_with_path(own, params)


def updates(params: dict, bank: Bank) -> dict[str, Array]:
    """What each task adds to the base drafter, by the path of the leaf: `[tasks, in, out]` float32 of every kernel that has an
    adapter; of whole specialists `[tasks, ...]` of every leaf."""
    if not isinstance(bank, Whole):
        return _products(params, bank)
    wide = lambda leaf: leaf.astype(jnp.float32)
    changes = jax.tree.map(lambda own, base: wide(own) - wide(base), bank.weights, params)
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(changes)}


def _products(params: dict, bank: list) -> dict[str, Array]:
    return {_path(layer, block, name): _product(*bank[layer][name]) for layer, (block, name, _) in _kernels(params)}


def _path(layer: int, block: str, name: str) -> str:
    return f"layers.{layer}.{block}.{name}.kernel"


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _product(a: Array, b: Array) -> Array:
    return a.astype(jnp.float32) @ b.astype(jnp.float32)


def stack(params: dict, bank: Bank) -> dict:
    """Parameters whose kernels are `[in, (tasks + 1) * out]`: each task's with its update merged, the base's last."""
    tasks = bank[0]["q"][0].shape[0]
    merged = [merge(params, bank, task) for task in (*range(tasks), -1)]
    beside = lambda *kernels: jnp.concatenate(kernels, axis=1)
    join = lambda path, *leaves: beside(*leaves) if path[-1].key == "kernel" else leaves[0]
    layers = jax.tree.map_with_path(join, *(own["layers"] for own in merged))
    return {**params, "layers": layers}


def for_layer(adapter: Adapter | None, layer: int) -> dict:
    """What each projection of a layer gets of an adapter: low-rank updates, or the rows' routes."""
    if adapter is None:
        return {}
    if isinstance(adapter, list):
        return adapter[layer]
    return dict.fromkeys((name for names in PROJECTIONS.values() for name in names), adapter)


def by_route(x: Array, kernel: Array, route: Array, width_out: int) -> Array:
    """Each row `[B, T, in]` by the kernel of its route among those in `kernel [in, (tasks + 1) * out]`.

    A window is multiplied by all kernels, of which one product is kept: more bytes, no launch more. A prompt has its row's
    kernel gathered.
    """
    tasks = kernel.shape[1] // width_out
    own = route % tasks  # -1 is the last, the base's
    if x.shape[1] > WINDOW:
        return jnp.einsum("bti,ibo->bto", x, kernel.reshape(-1, tasks, width_out)[:, own])
    every = (x @ kernel).reshape(*x.shape[:-1], tasks, width_out)
    out = every[..., 0, :]
    for task in range(1, tasks):  # selects melt into what reads the product; a gather would be a launch
        out = jnp.where((own == task)[:, None, None], every[..., task, :], out)
    return out


def low_rank(x: Array, update: tuple[Array, Array]) -> Array:
    """x A B row by row: x `[B, T, in]`, a `[B, in, r]`, b `[B, r, out]`."""
    a, b = update
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _kernels(params: dict):
    for layer, blocks in params["layers"].items():
        for block, names in PROJECTIONS.items():
            for name in names:
                yield layer, (block, name, blocks[block][name]["kernel"])
