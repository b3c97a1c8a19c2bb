"""Attention that reads the valid slots alone says what attention to all of them says, and reads nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.attention import PIECE, WIDEST, dense, fastest, valid
from jaxspec.transformer import Cache, LMConfig, extend, init

interpreted = partial(valid, interpret=True)


@pytest.mark.parametrize(
    ("width", "group", "window", "slots"),
    [(1, 2, None, 3 * PIECE + 5), (5, 3, None, 5 * PIECE), (5, 4, 20, 2 * PIECE), (2, 1, None, PIECE // 2)],
)
def test_the_valid_slots_are_all_that_is_read(width, group, window, slots):
    """What lies behind a row's tokens is NaN in one call and zero in the other."""
    kv, dim, start = 2, 16, jnp.array([3, slots - width - 9, 0])
    keys = jax.random.split(jax.random.key(width), 3)
    q = jax.random.normal(keys[0], (3, width, kv * group, dim))
    cached = [jax.random.normal(key, (3, kv, slots, dim)) for key in keys[1:]]
    slot, position = jnp.arange(slots), start[:, None] + jnp.arange(width)
    mask = slot <= position[:, :, None]
    if window is not None:
        mask &= slot > position[:, :, None] - window
    behind = (slot >= (start + width)[:, None])[:, None, :, None]
    whole = dense(q, *(jnp.where(behind, 0, x) for x in cached), mask, start, window)
    part = interpreted(q, *(jnp.where(behind, jnp.nan, x) for x in cached), mask, start, window)
    np.testing.assert_allclose(part, whole, atol=2e-6)


def test_a_model_says_the_same_through_either():
    config = LMConfig(
        vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_positions=64,
        windows=(None, 6),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: 5 * leaf, init(config, jax.random.key(0)))
    filled = lambda seed: jax.random.normal(jax.random.key(seed), (2, 2, 40, 8))
    cache = Cache((filled(1), filled(2)), (filled(3), filled(4)))
    tokens, start = jnp.array([[5, 9, 11], [3, 1, 2]]), jnp.array([17, 4])
    whole, written = extend(config, params, cache, tokens, start)
    part, same = extend(config, params, cache, tokens, start, attend=interpreted)
    np.testing.assert_allclose(part, whole, atol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), same, written)


def test_what_the_kernel_is_not_for_goes_the_other_way():
    """A wide window, and heads of a size that is no power of two."""
    for width, dim in ((WIDEST + 1, 16), (2, 12)):
        q, cached = jnp.ones((1, width, 2, dim)), jnp.ones((1, 2, 80, dim))
        mask = jnp.arange(80) <= jnp.arange(width)[:, None]
        args = (q, cached, cached, mask[None], jnp.zeros(1, jnp.int32), None)
        assert np.array_equal(valid(*args), dense(*args))  # no interpreter was asked for, so a kernel would fail here


def test_here_the_whole_cache_is_read():
    assert jax.default_backend() != "cpu" or fastest(False, jnp.bfloat16) is dense
    assert fastest(True, jnp.bfloat16) is dense
