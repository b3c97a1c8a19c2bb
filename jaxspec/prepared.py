"""A pool's weights as its engines want them: merged or side by side, joined on a GPU, in blocks of columns on a CPU."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np

from jaxspec.adapters import Bank, Stacked, Whole, stack, with_base
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.joining import join, pays
from jaxspec.layouts import blocks_pay
from jaxspec.store.huggingface import Model
from jaxspec.store.pool import Pool
from jaxspec.transformer import NARROW, LMConfig, abstract, lay_out

WIDE = 8  # columns of a window that is called wide
STACK = 1 << 28  # bytes of all tasks' kernels that an accelerator reads sooner than it launches more products


@lru_cache(maxsize=4)
def adapted(pool: Pool, slots: int) -> Callable[[np.ndarray], LMDrafterParams]:
    """Routes -> drafter parameters: merged weights for one slot, which has one route, else the trunk and the bank."""

    @cache
    def merged(route: int) -> LMDrafterParams:
        return LMDrafterParams(jax.block_until_ready(laid(pool.weights(route), slots)))

    if slots == 1:
        return lambda routes: merged(int(routes[0]))
    every = banked(pool.pair.draft.config, pool.trunk, pool.bank, slots)
    return lambda routes: every


def banked(draft: LMConfig, trunk: dict, bank: Bank, slots: int) -> LMDrafterParams:
    """The trunk and all tasks' updates, as rows of many routes draft with them."""
    if isinstance(bank, Whole):
        return LMDrafterParams(trunk, with_base(trunk, bank))
    dtype = jax.tree.leaves(trunk)[0].dtype
    if stacks(draft, len(jax.tree.leaves(bank)[0]), dtype):
        return LMDrafterParams(stack(trunk, bank), Stacked())
    weights = _in_blocks(trunk, slots)  # adapters were merged into plain kernels, so the layout comes last
    return LMDrafterParams(weights, jax.tree.map(lambda x: x.astype(dtype), bank))


def stacks(draft: LMConfig, tasks: int, dtype: Any) -> bool:
    """Whether rows of many routes draft with all tasks' merged kernels side by side, not with adapters of their own."""
    kernels = abstract(draft, dtype)["layers"]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kernels))
    return jax.default_backend() != "cpu" and (tasks + 1) * size <= STACK


def laid(weights: dict, slots: int) -> dict:
    """Weights as windows of so many slots want them: joined on a GPU, in blocks of columns on a CPU, where the rows are few."""
    return join(weights) if pays(weights) else _in_blocks(weights, slots)


def _in_blocks(weights: dict, slots: int) -> dict:
    return lay_out(weights) if few(weights, slots) else weights


def few(weights: dict, slots: int, width: int = 0) -> bool:
    """Whether weights are laid out for windows of so many slots, of at least WIDE columns."""
    alone = len(jax.tree.leaves(weights)[0].devices()) == 1
    narrow = alone and jax.default_backend() == "cpu" and slots * max(width, WIDE) <= NARROW
    return narrow and blocks_pay(weights)


@lru_cache(maxsize=4)
def target_in_blocks(target: Model) -> dict:
    return lay_out(target.params)


def dtype_of(pool: Pool):
    return jax.tree.leaves(pool.pair.target.params)[0].dtype
