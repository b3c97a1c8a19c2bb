"""Whether a CPU multiplies few rows faster with kernels in blocks of columns, by a trial on the machine at hand.

On one server CPU a window of five columns took .86 as long with them, on another 1.5 times: see LOG.md.
"""

import math
import statistics
import time
from functools import lru_cache

import jax
import jax.numpy as jnp

from jaxspec.transformer import blocks, product

ROWS = 5  # of a window of four drafted tokens
TRIES = 9
ENOUGH = 0.9  # of the time without; what is nearly equal is left as it is
LARGE = 1 << 26  # bytes of kernels that no cache holds
SMALL = 1 << 20  # bytes of kernels that a trial would say nothing of


def blocks_pay(params: dict) -> bool:
    """Whether they do for a model of this shape; tried once a shape and process, in a second or two. Not for the smallest."""
    kernel = params["layers"][0]["mlp"]["up"]["kernel"]
    size = 2 * kernel.size * kernel.dtype.itemsize
    if size * len(params["layers"]) < SMALL:
        return False
    return _tried(min(len(params["layers"]), math.ceil(LARGE / size)), *kernel.shape, kernel.dtype)


@lru_cache(maxsize=16)
def _tried(layers: int, width: int, mlp_width: int, dtype) -> bool:
    drawn = lambda number, *shape: jax.random.normal(jax.random.key(number), shape, dtype) / math.sqrt(shape[0])
    plain = [(drawn(2 * i, width, mlp_width), drawn(2 * i + 1, mlp_width, width)) for i in range(layers)]

    @jax.jit
    def run(kernels):
        x = jnp.ones((ROWS, width), dtype)
        for up, down in kernels:
            x = x + product(jax.nn.silu(product(x, up, mlp_width)), down, width)
        return x

    def seconds(kernels) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(kernels))
        return time.perf_counter() - start

    ways = plain, jax.tree.map(blocks, plain)
    tries = [[seconds(kernels) for kernels in ways] for _ in range(TRIES + 1)][1:]  # the first compiles
    without, within = (statistics.median(own) for own in zip(*tries, strict=True))
    return within < ENOUGH * without
