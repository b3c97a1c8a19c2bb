"""A training run is the same run however it is split, killed or watched, and what is split is split."""

import dataclasses
import re
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_resume import interrupt_call
from test_sharding import MESHES, mesh_of

from jaxspec import sharding, training
from jaxspec.adapters import init_bank
from jaxspec.config import Align, Experiment
from jaxspec.packing import packed_rows
from jaxspec.store.curves import read_curves
from jaxspec.store.huggingface import Model
from jaxspec.store.traces import Traces
from jaxspec.training import Course
from jaxspec.transformer import init
from tests import fleet
from train import align

VOCAB = 72  # no other size of the learner or of a step
LEARNER = dataclasses.replace(fleet.TARGET, vocab_size=VOCAB, width=16, num_layers=1, mlp_width=32)
SPEC = Align(rank=4, alpha=8.0, rows=8, row_tokens=32, checkpoint_every=2, evaluate_every=2)
STEPS, RATE = 5, 1e-3
KINDS = ("full", "lora")
FAST = {("full", (2, 4)), ("lora", (1, 8))}
MODEL = 4
# The axis, from the last, that lies over `model`: of kernels `[in, out]`, and of adapters, a `[in, r]` and b `[r, out]`.
OUT, IN = ("q", "k", "v", "gate", "up", "head"), ("o", "down", "embed")
SPLIT = {name: {"kernel": -1, "[1]": -1} for name in OUT}
SPLIT |= {name: {"kernel": -2, "embedding": -2, "[0]": -2} for name in IN}


@cache
def traces(number: int = 40, top: int = 4) -> Traces:
    rng = np.random.default_rng(0)
    prompts, outputs = rng.integers(2, 6, number), rng.integers(3, 12, number)
    tokens = [rng.integers(0, VOCAB, p + o).astype(np.int32) for p, o in zip(prompts, outputs, strict=True)]
    log_p = np.asarray(jax.nn.log_softmax(rng.normal(size=(number, 12, VOCAB), scale=2.0).astype(np.float32), -1))
    ids = np.argsort(-log_p, axis=-1)[..., :top]
    kept = np.take_along_axis(log_p, ids, -1)
    none = np.zeros(number)
    return Traces([{}] * number, tokens, prompts, ids, kept, np.log1p(-np.exp(kept).sum(-1)), none, none, none, {})


def course(kind: str) -> Course:
    """Two drafters with rows of their own, of which the last quarter is held out."""
    weights = jax.jit(init, static_argnums=0)(LEARNER, jax.random.key(0))
    draft, experiment = Model(LEARNER, weights, "", "", ()), Experiment(align=SPEC)
    lengths = [len(own) for own in traces().tokens]
    rows = lambda begin, end, number: [
        packed_rows(lengths, np.arange(begin, end), number, SPEC.row_tokens, seed) for seed in (0, 1)
    ]
    known = {"train": rows(0, 30, STEPS * SPEC.rows), "held": rows(30, 40, 8), "steps": STEPS, "rates": (RATE,)}
    if kind == "full":
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), weights)
        return Course(kind, align.full_fine_tune(experiment, draft, VOCAB), (), both, **known)
    own = align._aligner(experiment, partial(align._lora_log_q, draft, SPEC.alpha / SPEC.rank, VOCAB))
    return Course(kind, own, weights, init_bank(weights, jax.random.key(1), tasks=2, rank=SPEC.rank), **known)


def run(kind: str, shape: tuple[int, int], folder: Path, spec: Align = SPEC) -> dict:
    return training.trained(spec, traces(), course(kind), folder, mesh_of(*shape), None)


@cache
def alone(kind: str) -> tuple[dict, dict]:
    """The run on one device, and its curves."""
    with TemporaryDirectory() as folder:
        result = run(kind, (1, 1), Path(folder))
        return jax.device_get(result), read_curves(Path(folder, "metrics.jsonl"))[kind]


def assert_same_weights(found, expected):
    """To rounding: where a gradient is as small as its own rounding, an Adam step is still as long as elsewhere, and so nearly
    all weights are the same to their last bits, and all of them to a hundredth of the way that they can have gone."""
    leaves = zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(expected), strict=True)
    away = np.concatenate([np.abs(one - other).ravel() for one, other in leaves])
    assert np.quantile(away, 0.999) < 8 * np.finfo(np.float32).eps and away.max() < 0.01 * STEPS * RATE


def assert_same_curves(found: dict, expected: dict):
    """They are written to four decimals."""
    for one, other in ((found, expected), (found["held"], expected["held"])):
        assert one["step"] == other["step"]
        for field in ("loss", "agreement"):
            np.testing.assert_allclose(one[field], other[field], atol=1.1e-4)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=() if (kind, shape) in FAST else pytest.mark.slow)
        for kind in KINDS
        for shape in MESHES
    ],
)
def test_training_on_a_mesh_has_the_weights_and_curves_of_one_device(kind, shape, tmp_path):
    expected, curves = alone(kind)
    found = run(kind, shape, tmp_path)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected["params"], course(kind).params)
    assert min(jax.tree.leaves(moved)) > RATE  # else the same weights would say nothing
    assert_same_weights(found["params"], expected["params"])
    assert_same_curves(read_curves(tmp_path / "metrics.jsonl")[kind], curves)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_moments_are_split_and_stay_so(kind):
    own, mesh = course(kind), mesh_of(2, MODEL)
    own = own._replace(params=training.placed(own.params, mesh), frozen=training.placed(own.frozen, mesh))
    programs = training._programs(SPEC, traces(), own, mesh, None, None)
    first = programs.fresh()
    assert_split((own.frozen, own.params, first))
    assert_split(programs.advance(first, 0, RATE)[0])


def assert_split(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        names = [str(getattr(part, "key", part)) for part in path]
        axis = SPLIT.get(names[-2], {}).get(names[-1], 0) % (leaf.ndim + 1)
        shape = [size // MODEL if at == axis - 1 else size for at, size in enumerate(leaf.shape)]
        assert list(leaf.addressable_shards[0].data.shape) == shape, names


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)])
def test_no_device_has_logits_of_the_whole_vocabulary(kind):
    """Nor any other array as wide, gradients among them."""
    own, rows = (
        course(kind),
        fleet._batch()._replace(tokens=np.zeros((8, 32), np.int32), segments=np.zeros((8, 32), np.int32)),
    )
    batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), rows)
    programs = {}
    for mesh in (mesh_of(1, 8), mesh_of(8, 1)):
        state = training.placed(jax.vmap(own.aligner.init)(own.params), mesh)
        frozen = training.placed(own.frozen, mesh)
        placed = sharding.place(batch, sharding.column_specs(batch, mesh), mesh)
        step = jax.jit(partial(training._each, own.aligner.step))
        programs[mesh.shape["model"]] = step.lower(frozen, state, placed, RATE, None).compile().as_text()
    wide = {number: re.findall(rf"\w+\[(?:\d+,)*{VOCAB}(?:,\d+)*\]", text) for number, text in programs.items()}
    assert wide[1] and not wide[8]


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_on_another_mesh(kind, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_call(patch, training, "schedule", 3)
        with pytest.raises(KeyboardInterrupt):
            run(kind, (2, 4), tmp_path)
    calls = interrupt_call(monkeypatch, training, "schedule", -1)
    found = run(kind, (4, 1), tmp_path)
    assert [step for step, *_ in calls] == [2, 3, 4]
    assert_same_weights(found["params"], alone(kind)[0]["params"])
    assert_same_curves(read_curves(tmp_path / "metrics.jsonl")[kind], alone(kind)[1])


def test_held_out_curves_begin_and_end_with_the_runs_own_figures_and_change_nothing(tmp_path):
    expected, curves = alone("lora")
    assert curves["held"]["step"] == [0, 2, 4, 5] and curves["step"] == [5]
    ends = [np.mean(curves["held"]["agreement"][at]) for at in (0, -1)]
    np.testing.assert_allclose(ends, [expected["before"], expected["agreement"]], atol=1e-4)
    unwatched = run("lora", (1, 1), tmp_path, dataclasses.replace(SPEC, evaluate_every=0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(unwatched["params"]), expected["params"])
    assert "held" not in read_curves(tmp_path / "metrics.jsonl")["lora"]
