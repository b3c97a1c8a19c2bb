"""Blocks of columns are used where a trial on this machine finds them faster, and only there."""

import dataclasses
from itertools import cycle
from types import SimpleNamespace

import jax
import pytest

from jaxspec import layouts, prepared
from jaxspec.transformer import LMConfig, init

CONFIG = LMConfig(
    vocab_size=32, width=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=512, max_positions=64
)
TINY = dataclasses.replace(CONFIG, mlp_width=24)


@pytest.mark.parametrize(("within", "pays"), [(0.5, True), (0.89, True), (0.95, False), (2.0, False)])
def test_the_faster_layout_is_taken_and_of_near_equals_the_plain_one(monkeypatch, within, pays):
    """A clock by which plain kernels take a second, and blocks so many."""
    now, spent = [0.0], cycle([0.0, 1.0, 0.0, within])  # before and after each of the two

    def clock():
        now[0] += next(spent)
        return now[0]

    monkeypatch.setattr(layouts, "time", SimpleNamespace(perf_counter=clock))
    layouts._tried.cache_clear()
    params = init(CONFIG, jax.random.key(0))
    assert layouts.blocks_pay(params) == pays
    monkeypatch.setattr(prepared, "blocks_pay", layouts.blocks_pay)
    kernel = prepared.laid(params, 1)["layers"][0]["mlp"]["up"]["kernel"]
    assert (kernel.ndim == 3) == (pays and jax.default_backend() == "cpu")
    layouts._tried.cache_clear()


def test_a_shape_is_tried_once():
    layouts._tried.cache_clear()
    params = init(CONFIG, jax.random.key(0))
    first = layouts.blocks_pay(params)
    assert all(layouts.blocks_pay(init(CONFIG, jax.random.key(i))) == first for i in range(3))
    assert layouts._tried.cache_info().misses == 1
    assert not layouts.blocks_pay(init(TINY, jax.random.key(0))) and layouts._tried.cache_info().misses == 1
