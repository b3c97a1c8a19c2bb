"""Kernels that read one input together: the same model, taken apart again to the last bit, and decoded with alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import joining, pooled, prepared, serving
from jaxspec.adapters import init_bank, merge, select
from jaxspec.requests import Request, room_of
from jaxspec.store import loading
from jaxspec.transformer import LMConfig, empty_cache, extend, forward, init, lay_out

PLAIN = LMConfig(
    vocab_size=48, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40, max_positions=64
)
FAMILIES = {
    "llama": PLAIN,
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True, mlp_bias=True),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, tied=False),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, size=(2, 9)))


def drawn(config: LMConfig) -> dict:
    """Weights of which no two parts are alike, biases too."""
    params, key = init(config, jax.random.key(0)), jax.random.key(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape), params
    )


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_joined_model_is_the_same_function_and_comes_apart_to_the_last_bit(config):
    params = drawn(config)
    joined = joining.join(params)
    assert set(joined["layers"][1]["attention"]) >= {"qkv", "o"} and "q" not in joined["layers"][1]["attention"]
    np.testing.assert_allclose(forward(config, joined, TOKENS), forward(config, params, TOKENS), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, joining.apart(config, joined), params)
    jax.tree.map(np.testing.assert_array_equal, joining.apart(config, params), params)
    assert jax.tree.structure(joining.join(joined)) == jax.tree.structure(joined)


@pytest.mark.slow
def test_windows_and_blocks_of_columns_read_a_joined_model():
    params = drawn(PLAIN)
    start = jnp.zeros(2, jnp.int32)
    read = lambda own: extend(PLAIN, own, empty_cache(PLAIN, 2, 16), TOKENS, start)[0]
    for own in (joining.join(params), lay_out(joining.join(params))):
        np.testing.assert_allclose(read(own), read(params), atol=2e-5)


def test_joining_in_place_leaves_no_kernel_behind():
    params, expected = drawn(PLAIN), joining.join(drawn(PLAIN))
    old, kept = params["layers"][0]["attention"]["q"]["kernel"], params["layers"][0]["attention"]["o"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, joining.joined_in_place(params), expected)
    assert old.is_deleted() and not kept.is_deleted()
    assert params["layers"][0]["attention"].keys() == {"qkv", "o"}


def test_an_adapter_on_joined_weights_is_refused_not_left_out():
    params = drawn(PLAIN)
    bank = init_bank(params, jax.random.key(0), tasks=2, rank=2)
    with pytest.raises(ValueError, match="joined"):
        forward(PLAIN, joining.join(params), TOKENS, adapter=select(bank, jnp.array([0, 1])))
    np.testing.assert_allclose(
        forward(PLAIN, joining.join(merge(params, bank, 0)), TOKENS),
        forward(PLAIN, merge(params, bank, 0), TOKENS),
        atol=2e-5,
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch, pool):
    """The pool as one accelerator holds it."""
    for module in (loading, prepared):
        monkeypatch.setattr(module, "pays", lambda params: True)
    for module in (pooled, prepared, serving):
        monkeypatch.setattr(module, "few", lambda *own: False)
    prepared.adapted.cache_clear()
    yield loading.load_pool(pool)
    prepared.adapted.cache_clear()


@pytest.mark.parametrize("slots", [1, 2])
def test_a_pool_with_joined_weights_says_what_it_said(as_on_a_gpu, loaded, slots):
    assert "qkv" in as_on_a_gpu.pair.target.params["layers"][0]["attention"]
    requests = [Request(ids=tuple(range(5 + i, 12)), max_new_tokens=10, number=i, route=i) for i in range(3)]

    def texts(own):
        engine = pooled.speculative(own, 2, slots=slots, room=room_of(32, 10))
        return [done.ids for done in engine.complete(requests, serving.given(own, slots))]

    assert texts(as_on_a_gpu) == texts(loaded)


def test_a_joined_target_is_widened_like_another(as_on_a_gpu, loaded):
    own = loaded.pair.target.config
    shape = dataclasses.replace(own, width=64, num_layers=3, num_heads=8, num_kv_heads=4, mlp_width=64, vocab_size=512)
    wide, plain = (loading.widen(own, shape).pair.target for own in (as_on_a_gpu, loaded))
    tokens = jnp.arange(5, 15)[None]
    assert "qkv" in wide.params["layers"][2]["attention"]
    np.testing.assert_allclose(
        forward(wide.config, wide.params, tokens), forward(plain.config, plain.params, tokens), atol=2e-4
    )
