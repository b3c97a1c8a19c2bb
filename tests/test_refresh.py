"""A router that traffic has left behind is put right from features alone, and forgets none of its tasks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec import pooled, replay, router, shift
from jaxspec.config import command_line
from jaxspec.replay import Known, Served
from jaxspec.store.loading import load_pool
from jaxspec.store.names import REPLAY
from jaxspec.store.stages import read_arrays, write_arrays
from train import refresh

DRIFTED = 24


@pytest.fixture(scope="module")
def known(pool) -> Known:
    return Known(**read_arrays(Path(pool, REPLAY)))


@pytest.fixture(scope="module")
def served(known) -> Served:
    """Prompts of task 0 in a new wording, which looks like task 1 but for a direction in which no prompt ever went."""
    draw, centres = np.random.default_rng(0), [known.features[known.task == task].mean(0) for task in range(3)]
    own = known.features[known.task == 0]
    unseen = draw.normal(size=own.shape[1])
    unseen -= unseen @ (centres[1] - centres[0]) * (centres[1] - centres[0]) / np.sum((centres[1] - centres[0]) ** 2)
    moved = centres[1] - centres[0] + known.features.std() * unseen / np.sqrt(np.mean(unseen**2))
    rows = own[draw.integers(len(own), size=DRIFTED)] + 0.01 * draw.normal(size=(DRIFTED, own.shape[1]))
    agreement = np.tile([3.0, -2.0, -2.0, 1.0, 0.5], (DRIFTED, 1))
    names, count = np.array([f"new {i}" for i in range(DRIFTED)]), np.full(DRIFTED, 4)
    return Served(names, (rows + moved).astype(np.float32), np.ones(DRIFTED, int), agreement, count, 2 * count)


CENTRES = 4 * np.eye(24)
OLD, NEW = 240, 64
settings = {"steps": 600, "batch": 128, "learning_rate": 3e-3, "seed": 0}


def around(centre, number, seed):
    return (centre + np.random.default_rng(seed).normal(size=(number, 24))).astype(np.float32)


@pytest.fixture(scope="module")
def three_tasks():
    """A router of three clusters, and prompts of task 0 beside task 1, eight deviations away where none ever was."""
    features, task = np.concatenate([around(CENTRES[t], OLD, t) for t in range(3)]), np.repeat(np.arange(3), OLD)
    names = np.array([f"old {i}" for i in range(len(task))])
    params = router.train(router.init(features, 32, 3, 0), features, task, **settings)
    new, count = CENTRES[1] + 2 * CENTRES[10], np.full(NEW, 4)
    agreement = np.tile([3.0, -2.0, -2.0, 1.0, 0.5], (NEW, 1))
    served = Served(names[:NEW], around(new, NEW, 3), np.ones(NEW, int), agreement, count, 2 * count)
    served = served._replace(name=np.array([f"new {i}" for i in range(NEW)]))
    return params, Known(names, features, task, np.zeros(len(task), int)), served, new


def routed(params, features):
    return np.asarray(router.probabilities(params, jnp.asarray(features))).argmax(-1)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_what_is_learnt_holds_for_more_of_the_kind_and_no_task_is_forgotten(three_tasks, mixup):
    params, known, served, new = three_tasks
    after = refresh.refreshed(params, known, served, **settings, mixup=mixup)
    assert (routed(params, around(new, 200, 4)) == 1).mean() > 0.95
    assert (routed(after.params, around(new, 200, 4)) == 0).mean() > 0.9
    for task in range(3):
        assert (routed(after.params, around(CENTRES[task], 200, 5)) == task).mean() > 0.95


def test_without_mixtures_training_is_what_it_was_to_the_bit(three_tasks):
    """The loop as it was before there were any, written out."""
    params, known, *_ = three_tasks
    steps, batch, inputs, labels = 50, 128, jnp.asarray(known.features), jnp.asarray(known.task)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)

    def loss(mlp, x, y):
        logits = router._logits(params._replace(mlp=mlp), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, key):
        (mlp, opt), (pick, noise) = carry, jax.random.split(key)
        rows = jax.random.randint(pick, (batch,), 0, len(labels))
        x = inputs[rows] + 0.1 * params.deviation * jax.random.normal(noise, (batch, inputs.shape[1]))
        updates, opt = tx.update(jax.grad(loss)(mlp, x, labels[rows]), opt, mlp)
        return (optax.apply_updates(mlp, updates), opt), None

    keys = jax.random.split(jax.random.key(0), steps)
    (expected, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params.mlp, tx.init(params.mlp)))
    plain = {"steps": steps, "batch": batch, "learning_rate": 3e-3, "seed": 0}
    train = lambda share: router.train(params, known.features, known.task, **plain, mixup=share).mlp
    jax.tree.map(np.testing.assert_array_equal, train(0.0), expected)
    assert not np.array_equal(train(0.5)["outer"]["kernel"], expected["outer"]["kernel"])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_features_and_tasks_are_mixed_alike(three_tasks, weight):
    """The loss and its gradient are those of mixed prompts whose labels are mixed in the same shares."""
    params, known, *_ = three_tasks
    features, task = known.features[::60], known.task[::60]
    mix = lambda own: weight * own + (1 - weight) * own[np.arange(len(own)) - 1]
    logits = lambda mlp: router._logits(params._replace(mlp=mlp), mix(features))
    expected = lambda mlp: optax.softmax_cross_entropy(logits(mlp), mix(np.eye(3)[task])).mean()
    ours = lambda mlp: router.mixed_loss(params._replace(mlp=mlp), features, task, weight)
    for own, other in zip(*map(jax.tree.leaves, (jax.value_and_grad(f)(params.mlp) for f in (ours, expected)))):
        np.testing.assert_allclose(own, other, atol=1e-5)


def test_a_new_wording_is_normal_and_what_lies_elsewhere_is_not(three_tasks):
    params, known, served, new = three_tasks
    after = refresh.refreshed(params, known, served, **settings)
    scaled = lambda features: np.asarray(router.standardised(after.params, features))
    far = lambda features: shift.far(after.normal, scaled(features), routed(after.params, features))
    assert far(around(new, 400, 4)).mean() < 0.1 and far(around(CENTRES[1], 400, 5)).mean() < 0.1
    assert far(around(2 * CENTRES[15], 400, 6)).mean() > 0.9


@pytest.fixture(scope="module")
def refreshed(pool, served, tmp_path_factory):
    """The pool after a refresh, on disk."""
    folder = tmp_path_factory.mktemp("refresh")
    write_arrays(folder / "out.jsonl.replay.npz", served._asdict())
    command = ["--pool", pool, "--replay", str(folder / "out.jsonl.replay.npz"), "--out", str(folder)]
    command_line(refresh.Refresh, refresh.run, argv=[*command, "--steps", "200"])
    return folder / "pool", command


def tasks_of(own, features):
    return np.asarray(router.probabilities(own.router, jnp.asarray(features))).argmax(-1)


def test_a_new_wording_finds_its_task_and_old_prompts_keep_theirs(loaded, known, served, refreshed):
    after = load_pool(str(refreshed[0]))
    assert (tasks_of(loaded, served.features) == 1).mean() > 0.9
    assert (tasks_of(after, served.features) == 0).all()
    before = tasks_of(loaded, known.features)
    assert (tasks_of(after, known.features) == before).mean() > 0.95 and len(set(before.tolist())) == 3


def test_prompts_that_were_not_trained_on_are_routed_alike_and_no_longer_strange(loaded, served, refreshed):
    after, more = load_pool(str(refreshed[0])), served.features + np.float32(0.01)
    assert (tasks_of(after, more) == 0).all()
    far = lambda own: np.asarray(shift.far(own.normal, router.standardised(own.router, more), tasks_of(own, more)))
    assert far(loaded).mean() > 0.9 and far(after).mean() < 0.1


def test_all_else_of_the_pool_is_as_it_was_and_what_is_known_grows(loaded, known, served, refreshed):
    after = load_pool(str(refreshed[0]))
    assert after.facts == loaded.facts and after.digest != loaded.digest
    assert pooled.candidates(after) == pooled.candidates(loaded)
    for name in ("bank.safetensors", "mixed.safetensors", "test.jsonl", "points.npz"):
        assert (after.path / name).read_bytes() == (loaded.path / name).read_bytes()
    grown = Known(**read_arrays(after.path / REPLAY))
    assert set(grown.name) == {*known.name, *served.name}
    assert (grown.refresh == np.isin(grown.name, served.name)).all()


def test_asked_again_it_is_complete_and_other_files_are_another_refresh(refreshed, served, tmp_path, capsys):
    folder, command = refreshed
    before = (folder / "router.safetensors").read_bytes()
    command_line(refresh.Refresh, refresh.run, argv=[*command, "--steps", "200"])
    assert "complete" in capsys.readouterr().out and (folder / "router.safetensors").read_bytes() == before
    again = [*command[:-1], str(tmp_path)]
    command_line(refresh.Refresh, refresh.run, argv=[*again, "--steps", "200"])
    assert "move from task 1 to task 0" in capsys.readouterr().out
    assert (tmp_path / "pool" / "router.safetensors").read_bytes() == before  # the same seed, the same router
    with pytest.raises(SystemExit):
        command_line(refresh.Refresh, refresh.run, argv=[*command, "--steps", "100"])
    assert "steps was 200 there and is 100 now" in capsys.readouterr().err


def test_a_prompt_is_of_the_task_whose_drafter_did_clearly_best():
    agreement = np.array([[2.0, 0, 0, 0], [0, 0.9, 0, 0], [0, 3.0, 0, 2.5], [0, 0.5, 0, 4.0]])
    column = np.zeros(4, int)
    served = Served(np.array(list("abcd")), np.eye(4), column, agreement, column, column)
    found = replay.labelled(served, 3, 7)
    assert found.name.tolist() == ["a", "b", "c"] and found.task.tolist() == [0, 0, 1]
    assert set(found.refresh) == {7}


def test_what_is_known_is_bounded_in_every_task_and_does_not_depend_on_the_order():
    names = np.array([f"prompt {i}" for i in range(900)])
    whole = Known(names, np.arange(900.0)[:, None], np.repeat([0, 1, 2], (800, 90, 10)), np.zeros(900, int))
    rows = lambda at: Known(*(column[at] for column in whole))
    once = replay.bounded_by_task([whole], 50)
    assert np.bincount(once.task).tolist() == [50, 50, 10]
    parts = [replay.bounded_by_task([rows(np.arange(0, 900, 2))], 50), rows(np.arange(1, 900, 2)[::-1])]
    for ours, theirs in zip(replay.bounded_by_task(parts, 50), once, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 0.2 <= replay.held_out(once).mean() <= 0.25


@pytest.mark.parametrize(
    "change, said", [({"task": None}, "is not of"), ({"agreement": np.zeros((DRIFTED, 9))}, "(9, 32)")]
)
def test_files_that_will_not_do_are_refused(pool, served, tmp_path, capsys, change, said):
    arrays = {name: value for name, value in {**served._asdict(), **change}.items() if value is not None}
    write_arrays(tmp_path / "bad.npz", arrays)
    with pytest.raises(SystemExit):
        command_line(
            refresh.Refresh,
            refresh.run,
            argv=["--pool", pool, "--replay", str(tmp_path / "bad.npz"), "--out", str(tmp_path)],
        )
    assert said in capsys.readouterr().err and not (tmp_path / "pool").exists()
