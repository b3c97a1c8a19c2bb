"""Laws of merging: what each method leaves alone, and what it lowers."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import bench
from jaxspec import merging
from jaxspec.adapters import Whole, added, init_bank, merge, updates
from jaxspec.config import UserError
from jaxspec.store.loading import load_pool
from jaxspec.store.stages import write_arrays
from tests import fleet
from train import extras

TASKS, IN, OUT = 3, 12, 10


def drawn(seed: int = 0) -> merging.Updates:
    """Two layers of two kernels, one of them wide, whose tasks have something in common."""
    rng = np.random.default_rng(seed)
    kernel = lambda *shape: jnp.asarray(rng.normal(size=(TASKS, *shape)) + rng.normal(size=shape), jnp.float32)
    shapes = {"q": (IN, OUT), "up": (IN, 2 * OUT)}
    return {f"{layer}.{name}": kernel(*shape) for layer in range(2) for name, shape in shapes.items()}


def flat(tau: merging.Updates) -> np.ndarray:
    leaves = jax.tree.leaves(tau)
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def cosines(tau: merging.Updates) -> np.ndarray:
    own = flat(tau)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return np.abs(own @ own.T)[np.triu_indices(TASKS, 1)]


def test_updates_are_what_merging_an_adapter_adds():
    params = fleet.weights("none").drafter.weights
    bank = jax.tree.map(lambda x: x + 0.1, init_bank(params, jax.random.key(0), tasks=TASKS, rank=4))
    full = Whole(jax.tree.map(lambda x: x + jnp.arange(TASKS).reshape(-1, *(1,) * x.ndim), params))
    for task in range(TASKS):
        own = jax.tree.map(lambda leaf, task=task: leaf[task], updates(params, full))
        same = partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(same, added(params, own), jax.tree.map(lambda leaf, task=task: leaf + task, params))
        own = jax.tree.map(lambda leaf, task=task: leaf[task], updates(params, bank))
        jax.tree.map(np.testing.assert_array_equal, added(params, own), merge(params, bank, task))
    assert any(
        (x != y).any() for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(added(params, own)), strict=True)
    )


def test_the_average_of_equal_updates_is_the_update():
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], TASKS, axis=0), drawn())
    found = merging.task_arithmetic(same, 1 / TASKS)
    jax.tree.map(lambda one, all: np.testing.assert_allclose(one, all[0], rtol=1e-5), found, same)


def test_disentangling_makes_updates_less_alike_by_one_vector_for_all():
    tau = drawn()
    left = merging.awd(tau)
    assert (cosines(left) < 0.8 * cosines(tau)).all()
    gone = flat(tau) - flat(left)
    np.testing.assert_allclose(gone, np.broadcast_to(gone[0], gone.shape), atol=1e-5)
    common = flat(tau).mean(0)
    assert gone[0] @ common / np.linalg.norm(gone[0]) / np.linalg.norm(common) > 0.9


def test_disentangling_leaves_orthogonal_updates_alone():
    eye = jnp.eye(TASKS * 4, dtype=jnp.float32).reshape(TASKS, 4, TASKS, 4).sum(1)  # each task has columns of its own
    tau = {"q": eye}
    jax.tree.map(np.testing.assert_array_equal, merging.awd(tau), tau)


def test_doge_without_correction_or_mask_is_arithmetic_by_norm():
    tau = drawn()
    found = merging.doge(tau, kept=1.0, steps=0)
    for name, leaf in tau.items():
        share = 0.07 / np.linalg.norm(leaf, axis=(1, 2))
        np.testing.assert_allclose(found[name], np.einsum("t,tio->io", share, leaf), rtol=1e-4, atol=1e-7)


def test_doge_keeps_the_places_where_a_task_changed_most():
    tau = drawn()
    alone = {name: leaf.at[1:].set(0.0) for name, leaf in tau.items()}
    found = merging.doge(alone, kept=0.25, steps=0)
    places = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(found)])
    first = np.abs(flat(alone)[0])
    assert (places != 0).sum() == pytest.approx(0.25 * places.size, abs=1)
    assert first[places != 0].min() >= first[places == 0].max()


def test_the_correction_of_doge_lowers_its_loss_less_where_tasks_share_more():
    leaf = drawn()["0.q"]
    share = 0.07 / jnp.linalg.norm(leaf, axis=(1, 2))

    def loss(delta):
        whole = np.einsum("t,tio->io", share, leaf + delta)
        return np.sum(np.sum(np.asarray(leaf) * (np.asarray(leaf) - whole), axis=1) ** 2)

    delta = np.asarray(merging._correction(leaf, share, 6, 400, 1e-4))
    assert loss(delta) < loss(np.zeros_like(delta))
    assert loss(delta) < loss(-delta)
    whole = np.asarray(merging._correction(leaf, share, 1, 400, 1e-4))  # every direction is shared
    assert loss(whole) > loss(delta)


def test_extras_are_made_from_the_pool_and_measured_like_any_drafter(finished, out_with, tmp_path):
    out = out_with("trace", "partition", "align", "router", "pool")
    pool = load_pool(str(out / "pool"))
    with pytest.raises(UserError, match=r"no drafter 'merged-average'; `python -m train\.extras`"):
        pool.drafter("merged-average")
    extras.run(dataclasses.replace(finished, out=str(out)))
    said = json.loads((out / "pool" / "extras.json").read_text())
    table, counted = pool.trigrams, said.pop("adaptive")
    assert counted["texts"] > 0 and (table.bigram[:, 1] >= 0).sum() == counted["bigrams"] > 0
    assert said.keys() == {"merged-average", "merged-awd", "merged-doge"}
    for own in said.values():
        scores = own["acceptance_length"]
        assert scores[str(own["coefficient"])] == max(scores.values()) and min(scores.values()) >= 1
    bank, trunk = updates(pool.trunk, pool.bank), pool.trunk
    mean = jax.tree.map(lambda leaf: leaf.mean(0), bank)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), pool.drafter("merged-average"), added(trunk, mean)
    )
    file = out / "pool" / "trigrams.npz"
    whole = file.read_bytes()
    write_arrays(file, {"bigram": np.asarray(table.bigram), "tokens": np.asarray(table.tokens)})
    with pytest.raises(UserError, match=r"lacks weight.*remove it, which leaves an empty table"):
        assert pool.trigrams
    file.write_bytes(whole)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "the cat sat on the mat"}\n')
    settings = {"passes": 1, "max_new_tokens": 8, "widths": (1,), "num_speculative_tokens": 2}
    where = {"pool": str(out / "pool"), "prompts": str(tmp_path / "eval.jsonl"), "json": str(tmp_path / "bench.json")}
    bench.run(bench.Bench(**where, **settings, methods=("adaptive", *said)))
    row = json.loads((tmp_path / "bench.json").read_text())["tasks"]["all"]
    assert all(row[name]["equal_to_autoregressive"] == 1.0 and row[name]["draft_accuracy"] is not None for name in said)
