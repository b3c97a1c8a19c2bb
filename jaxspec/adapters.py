"""The LoRA bank: one low-rank update of the base drafter a task, stacked and gathered per row.

A bank is a list over layers of {projection: (a `[tasks, in, r]`, b `[tasks, r, out]`)}; an adapter is the same with rows
in place of tasks. The scale alpha / r is folded into b when a bank is made, so applying needs no constant.
Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

PROJECTIONS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}

Bank = list[dict[str, tuple[Array, Array]]]
Adapter = list[dict[str, tuple[Array, Array]]]


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


def select(bank: Bank, route: Array) -> Adapter:
    """Rows' own adapters: `route [B]` picks each row's task; -1 is the base drafter, an update of zero."""
    served = (route >= 0)[:, None, None]
    pick = lambda stack: jnp.where(served, stack[jnp.maximum(route, 0)], 0).astype(stack.dtype)
    return jax.tree.map(pick, bank)


def merge(params: dict, bank: Bank, task: int) -> dict:
    """The base drafter's parameters with one task's update added in; the shape of the program does not change."""
    if task < 0:
        return params
    layers = {i: {block: dict(parts) for block, parts in layer.items()} for i, layer in params["layers"].items()}
    for layer, (block, name, kernel) in _kernels(params):
        a, b = bank[layer][name]
        dense = dict(layers[layer][block][name])
        update = a[task].astype(jnp.float32) @ b[task].astype(jnp.float32)
        dense["kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
        layers[layer][block][name] = dense
    return {**params, "layers": layers}


def low_rank(x: Array, update: tuple[Array, Array]) -> Array:
    """x A B row by row: x `[B, T, in]`, a `[B, in, r]`, b `[B, r, out]`."""
    a, b = update
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _kernels(params: dict):
    for layer, blocks in params["layers"].items():
        for block, names in PROJECTIONS.items():
            for name in names:
                yield layer, (block, name, blocks[block][name]["kernel"])
