"""Attention that reads the valid slots alone says what attention to all of them says, and reads nothing else."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.attention import PIECE, WIDEST, dense, fastest, valid
from jaxspec.transformer import Cache, LMConfig, empty_cache, extend, init

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


def test_one_column_of_one_row_is_attended_as_among_others():
    keys = jax.random.split(jax.random.key(0), 3)
    q, cached = jax.random.normal(keys[0], (3, 1, 6, 8)), [jax.random.normal(key, (3, 2, 40, 8)) for key in keys[1:]]
    mask = jnp.arange(40) <= jnp.array([0, 17, 39])[:, None, None]
    for dtype, atol in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
        low = [x.astype(dtype) for x in (q, *cached)]
        together = dense(*low, mask, jnp.zeros(3), None).astype(jnp.float32)
        for row in range(3):
            alone = dense(*(x[row:][:1] for x in (*low, mask, jnp.zeros(3))), None)
            assert alone.dtype == dtype
            np.testing.assert_allclose(alone.astype(jnp.float32)[0], together[row], atol=atol)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_no_step_copies_a_cache_on_a_cpu(width):
    """A loop copies the caches that it is given, once, and none in its steps."""
    config = LMConfig(
        vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_positions=64
    )

    def loop(params, cache, window, steps):
        def step(_, carry):
            window, cache = carry
            hidden, cache = extend(config, params, cache, window, jnp.array([9]))
            return jnp.argmax(hidden, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, step, (window, cache))

    params, cache = init(config, jax.random.key(0)), empty_cache(config, 1, 48)
    program = jax.jit(loop).lower(params, cache, jnp.ones((1, width), jnp.int32), 3).compile().as_text()
    copied = re.findall(r"= f32\[(?:1,)?2,48,8\]\S* copy\(", program)
    turned = re.findall(r"= f32\[(?:1,)?2,8,48\]", program)
    assert len(copied) <= 2 and not turned
