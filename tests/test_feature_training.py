"""Drafters of features are trained into a pool: they learn, a killed run goes on, and bench decodes with the best of them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import PARAMS, TARGET
from test_resume import call, interrupt_call, killed, state_of

from decode import bench
from decode.settings import Bench
from jaxspec import align, serving
from jaxspec.align import Batch
from jaxspec.config import UserError
from jaxspec.drafters.feature import VARIANTS, init_weights, single_layer
from jaxspec.regression import before, noisy, smooth_l1, trainer
from jaxspec.store import features
from jaxspec.store.loading import load_pool
from jaxspec.store.stages import read_json
from train import feature
from train.feature import Feature

LAYER = single_layer(TARGET)
TAUGHT = ("sampling", "alignment")
SHORT = {"steps": 4, "rows": 2, "row_tokens": 64, "texts": 2, "checkpoint_every": 2, "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def own(finished, tmp_path_factory) -> str:
    """A copy of the pool, with the stages that it was made from beside it."""
    folder = tmp_path_factory.mktemp("feature")
    for stage in ("trace", "partition", "pool"):
        shutil.copytree(Path(finished.out, stage), folder / stage)
    return str(folder / "pool")


@pytest.fixture(scope="module")
def taught(own) -> str:
    """The pool once two variants are trained."""
    feature.run(Feature(pool=own, variants=TAUGHT, **SHORT))
    return own


def batch_of(rows: int = 4, width: int = 32) -> Batch:
    """Random texts, two in a row, of which every place but the last counts."""
    tokens = np.random.default_rng(0).integers(0, TARGET.vocab_size, (rows, width)).astype(np.int32)
    at = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    unused = np.zeros((rows, width, 1), np.float32)
    return Batch(
        tokens, (at >= width // 2).astype(np.int32), at, at < width - 1, tokens, unused.astype(np.int32), unused
    )


@pytest.mark.parametrize("variant", ["plain", pytest.param("sampling", marks=pytest.mark.slow), "alignment"])
def test_every_variant_learns_what_the_target_says(variant):
    """Features and distribution alike, on one batch that it sees again and again."""
    own = trainer(TARGET, LAYER, align.optimiser(), logits_weight=0.1, noise=0.0)
    step, batch = jax.jit(own.step), batch_of()
    state, curve = own.init(init_weights(LAYER, variant, PARAMS, jax.random.key(0))), []
    for _ in range(60):
        state, metrics = step(PARAMS, state, batch, 1e-2, jax.random.key(1))
        curve.append({name: float(value) for name, value in metrics.items()})
    first, last = curve[0], curve[-1]
    assert last["regression"] < 0.2 * first["regression"]
    assert last["cross_entropy"] < first["cross_entropy"] - 0.1
    assert last["agreement"] > 0.6 > first["agreement"] + 0.5
    assert variant != "alignment" or np.abs(state.params.residual.up).max() > 0


def test_only_the_logits_move_the_residual():
    """Without their term it stays as it began, while all else moves."""
    own = trainer(TARGET, LAYER, align.optimiser(), logits_weight=0.0, noise=0.0)
    start = init_weights(LAYER, "alignment", PARAMS, jax.random.key(0))
    state, _ = jax.jit(own.step)(PARAMS, own.init(start), batch_of(), 1e-2, jax.random.key(1))
    same = jax.tree.map(np.array_equal, state.params, start)
    assert all(same.residual) and not any(jax.tree.leaves(same._replace(residual=None)))


def test_a_texts_first_token_has_no_feature_before_it_and_the_others_their_own():
    features = jnp.arange(12.0).reshape(1, 6, 2) + 1
    read = np.asarray(before(features, jnp.array([[0, 0, 1, 1, 1, -1]])))[0]
    expected = [[0, 0], features[0, 0], [0, 0], features[0, 2], features[0, 3], [0, 0]]
    np.testing.assert_array_equal(read, np.array(expected))


def test_noise_is_a_share_of_the_features_and_smooth_l1_is_its_formula():
    features = 3 * jax.random.normal(jax.random.key(0), (2, 50, 40))
    moved = np.asarray(noisy(features, 0.1, jax.random.key(1)) - features)
    level = float(np.sqrt(np.square(features).mean()))
    assert 0.095 * level < np.abs(moved).max() <= 0.1001 * level and abs(moved.mean()) < 0.01 * level
    error = np.array([0.0, 0.5, -1.0, 3.0])
    assert float(smooth_l1(jnp.asarray(error), jnp.zeros(4))) == np.mean([0.0, 0.125, 0.5, 2.5])


def test_a_pool_holds_every_variant_and_serves_the_best(taught, capsys):
    pool = load_pool(taught)
    found = features.measured_of(pool)
    assert found.keys() == set(TAUGHT)
    lengths = {name: said["mean_acceptance_length"] for name, said in found.items()}
    assert all(1 <= length <= 3 for length in lengths.values())
    own = features.best(pool)
    fusion, residual = VARIANTS[max(lengths, key=lengths.__getitem__)]
    assert own.config == single_layer(pool.pair.target.config)
    assert isinstance(own.weights.fusion, fusion) and (own.weights.residual is not None) == residual
    before = state_of(Path(taught))
    feature.run(Feature(pool=taught, variants=TAUGHT, **SHORT))
    assert state_of(Path(taught)) == before
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table and f"{length:.3f} |" in table for name, length in lengths.items())


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint(taught, tmp_path, monkeypatch, capsys):
    """And ends with the weights of one that was not disturbed."""
    folder = Path(taught).parent
    for stage in ("trace", "partition"):
        (tmp_path / stage).symlink_to(folder / stage)
    shutil.copytree(taught, tmp_path / "pool", ignore=shutil.ignore_patterns("feature"))
    flags = [word for name, value in SHORT.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = feature, Feature, "--pool", tmp_path / "pool", "--variants", "sampling", *flags
    with monkeypatch.context() as patch:
        interrupt_call(patch, feature, "schedule", 3)
        killed(capsys, *command)
    steps = interrupt_call(monkeypatch, feature, "schedule", -1)
    call(*command)
    assert [step[0] for step in steps] == [2, 3]
    ours, theirs = (Path(own, "feature", "sampling", features.FILE) for own in (tmp_path / "pool", taught))
    assert ours.read_bytes() == theirs.read_bytes()


def test_other_settings_are_refused_and_nothing_is_overwritten(taught):
    before = state_of(Path(taught))
    with pytest.raises(UserError, match=r"feature.steps was 4 there and is 5 now"):
        feature.run(Feature(pool=taught, variants=TAUGHT[:1], **{**SHORT, "steps": 5}))
    assert state_of(Path(taught)) == before


def test_a_pool_without_such_a_drafter_says_how_to_train_one(loaded):
    with pytest.raises(UserError, match=r"has no drafter of features; `python -m train.feature --pool"):
        features.best(loaded)


def test_bench_decodes_with_it_what_autoregressive_decoding_says(taught, tmp_path):
    words = "stir the onion butter into the pot and look at the harbour "
    lines = [{"id": str(i), "task": "one", "prompt": f"{i} {words * (1 + i % 2)}"} for i in range(3)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = {"pool": taught, "prompts": str(tmp_path / "eval.jsonl"), "methods": ("base", "feature")}
    shape = {"passes": 1, "max_new_tokens": 8, "widths": (1,), "num_speculative_tokens": 2}
    bench.run(Bench(**asked, **shape, json=str(tmp_path / "bench.json")))
    row = read_json(tmp_path / "bench.json")["tasks"]["one"]["feature"]
    assert row["equal_to_autoregressive"] == 1 and row["tokens"] == 3 * 8
    assert [row["nodes_a_round"], row["drafter_calls_a_round"]] == [2, 2]


def test_tables_are_the_targets_own(taught):
    """By reference, and so no copy of them."""
    pool = load_pool(taught)
    params = serving.featured(pool, features.best(pool), 64).drafter_params(np.array([-1]))
    assert params.tables["embed"]["embedding"] is pool.pair.target.params["embed"]["embedding"]
