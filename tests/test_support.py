"""Top-k and top-p keep what sorting keeps, and the last token that is kept is found without sorting."""

import sys
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_table

from jaxspec import sampling
from jaxspec.attention import NEVER
from jaxspec.types import Sampling

V = 3 * sampling.CANDIDATES + 16
ROUNDING = V * 2.0**-23  # of a float32 sum of V terms, as a share of it, and of the terms
TOP_K = [1, 2, 5, sampling.CANDIDATES - 1, sampling.CANDIDATES, sampling.CANDIDATES + 1, V - 1, V, 10 * V]
TOP_P = [1e-6, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6, 1.0]
GRID = list(product(TOP_K, TOP_P))
KINDS = [
    "random",
    "peaked",
    "all but flat",
    "flat",
    "tied",
    "two levels",
    "zeros of both signs",
    "one token",
    "padded",
    "far from zero",
]

log_probs = jax.jit(sampling.log_probs)
in_order = jax.jit(lambda *args: sampling.log_probs(*args))  # a program of its own


def logits_of(kind: str) -> np.ndarray:
    """`[V]` with all that might make a search end elsewhere than a sort."""
    random = np.random.default_rng(0).normal(size=V).astype(np.float32)
    padded = np.where(np.arange(V) % 3 == 1, np.float32(NEVER), random)
    return {
        "random": random,
        "peaked": 12 * random,
        "all but flat": 1 + 1e-6 * random,
        "flat": np.zeros(V, np.float32),
        "tied": np.round(random),
        "two levels": np.where(np.arange(V) % 5 == 0, np.float32(1), np.float32(-1)),
        "zeros of both signs": np.where(np.arange(V) % 2 == 0, np.float32(-0.0), np.float32(0.0)),
        "one token": np.where(np.arange(V) == 3, np.float32(200), random),
        "padded": padded,
        "far from zero": 1e6 + 8 * random,
    }[kind].astype(np.float32)


def supports(logits: np.ndarray, grid) -> np.ndarray:
    """`[rows, V]` what is kept in rows of the same logits, `[rows, V]`, by each pair of the grid."""
    k, p = (np.array(column) for column in zip(*grid, strict=True))
    settings = Sampling(jnp.ones(len(grid)), jnp.asarray(k, jnp.int32), jnp.asarray(p, jnp.float32))
    return np.isfinite(log_probs(jnp.asarray(logits), settings))


def kept(logits: np.ndarray, k: int, p: float) -> np.ndarray:
    """`[V]` what a full sort keeps, with sums in float64."""
    descending = -np.sort(-logits.astype(np.float64))[: max(k, 1)]
    weight = np.exp(descending - descending[0])
    before = np.cumsum(weight) - weight
    inside = (before < p * weight.sum()) | (p >= 1)
    inside[0] = True
    return logits >= descending[inside].min()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True], ids=["candidates", "all in order, as on accelerators"])
def test_what_is_kept_is_what_a_sort_keeps(kind, whole, monkeypatch):
    logits = logits_of(kind)
    if whole:
        monkeypatch.setattr(sampling, "_candidates", lambda vocab: vocab)
        monkeypatch.setattr(sys.modules[__name__], "log_probs", in_order)
    found = supports(np.broadcast_to(logits, (len(GRID), V)), GRID)
    for own, (k, p) in zip(found, GRID, strict=True):
        nudged = lambda push, k=k, p=p: kept(logits, k, p if p == 1 else p + push)
        least, most = nudged(-ROUNDING), nudged(ROUNDING)
        assert (least <= own).all() and (own <= most).all(), (k, p, own.sum(), least.sum(), most.sum())
        assert own.sum() == logits[own].size == (logits >= logits[own].min()).sum()


@pytest.mark.parametrize("seed", range(4))
def test_nuclei_of_random_rows_in_one_batch(seed):
    """Each row with logits, k and p of its own: what ends the search of one row ends no other's."""
    draw = np.random.default_rng(seed)
    logits = (draw.uniform(0.01, 10, (len(GRID), 1)) * draw.normal(size=(len(GRID), V))).astype(np.float32)
    grid = [(int(draw.choice([draw.integers(1, V), V])), float(np.float32(draw.uniform(0.05, 1)))) for _ in GRID]
    found = supports(logits, grid)
    for own, row, (k, p) in zip(found, logits, grid, strict=True):
        assert (kept(row, k, p - ROUNDING) <= own).all() and (own <= kept(row, k, p + ROUNDING)).all()
    np.testing.assert_array_equal(supports(logits[::-1], grid[::-1])[::-1], found)


def test_the_wanted_row_is_searched_and_no_other(monkeypatch):
    """A search that is not needed is slow, never wrong: so its steps are counted."""
    middles = []
    number = sampling._float
    monkeypatch.setattr(sampling, "_float", lambda ordinal: middles.append(ordinal) or number(ordinal))

    def steps(kind: str, temperature: float, k: int, p: float) -> int:
        middles.clear()
        full = lambda value, dtype: jnp.full(1, value, dtype)
        with jax.disable_jit():
            own = Sampling(full(temperature, jnp.float32), full(k, jnp.int32), full(p, jnp.float32))
            other = Sampling(full(1, jnp.float32), full(1, jnp.int32), full(1, jnp.float32))
            both = jax.tree.map(lambda *rows: jnp.concatenate(rows), own, other)
            sampling.log_probs(jnp.asarray(logits_of(kind))[None].repeat(2, 0), both)
        return len(middles) - 2  # each of the two searches says once what it found

    assert steps("random", 1.0, 50, 0.9) == steps("random", 1.0, sampling.CANDIDATES, 1.0) == 0
    assert steps("peaked", 1.0, V, 0.9) == steps("random", 1.0, V, 1.0) == steps("random", 0.0, V, 0.9) == 0
    assert 0 < steps("random", 1.0, V, 0.9) <= 32 and 0 < steps("random", 1.0, V - 1, 1.0) <= 32
    assert 0 < steps("random", 1.0, V - 1, 0.9) <= 64


def test_no_row_is_sorted_on_a_cpu():
    """XLA has a partial sort of its own there, and only for some ways of writing it."""
    settings = Sampling(jnp.ones(2), jnp.full(2, 9), jnp.full(2, 0.5))
    program = log_probs.lower(jnp.zeros((2, 3, V)), settings).compile().as_text()
    assert "TopK" in program and " sort(" not in program


@pytest.mark.parametrize("support", [1, 3, 40])
def test_a_draw_is_that_of_jax(support):
    logits = jnp.asarray(random_table(1, 40))
    log_p = log_probs(logits, Sampling(jnp.full(40, 1.3), jnp.full(40, support)))
    keys = jax.random.split(jax.random.key(support), 40)
    expected = jax.vmap(jax.random.categorical)(keys, log_p)
    found = jax.vmap(sampling.draw)(keys, log_p)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and len(set(found.tolist())) > 1
