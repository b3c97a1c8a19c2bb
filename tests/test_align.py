"""Laws of alignment: what divergences mean, that training lowers rejection, and that packing changes nothing."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec import align
from jaxspec.config import Align
from jaxspec.packing import as_batch, pack, packed_rows, places
from jaxspec.store.curves import read_curves
from jaxspec.store.huggingface import read_model
from jaxspec.store.stages import manifest, read_arrays
from jaxspec.store.traces import Traces, read_traces
from train import align as stage

VOCAB = 6
BATCH = align.Batch(*[np.zeros((1, 1), np.int32)] * 7)  # of which a test replaces what it needs


def log_softmax(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=2.0)), -1))


def traces(number: int = 9, top: int = 3, seed: int = 0) -> Traces:
    rng = np.random.default_rng(seed)
    prompt_length = rng.integers(1, 6, number)
    outputs = rng.integers(1, 8, number)
    tokens = [rng.integers(0, VOCAB, p + o).astype(np.int32) for p, o in zip(prompt_length, outputs, strict=True)]
    log_p = log_softmax(seed, number, 8, VOCAB)
    ids = np.argsort(-log_p, axis=-1)[..., :top]
    kept = np.take_along_axis(log_p, ids, -1)
    tail = np.log1p(-np.exp(kept).sum(-1))
    none = np.zeros(number)
    return Traces([{}] * number, tokens, prompt_length, ids, kept, tail, none, none, none, {})


def gradient_at(divergence, logits, log_p):
    return jax.grad(lambda x: divergence(jax.nn.log_softmax(x), log_p).sum())(logits)


@pytest.mark.parametrize("name", sorted(align.DIVERGENCES.keys() - {"total_variation_policy"}))
def test_a_divergence_is_zero_at_p_and_its_gradient_is_right(name):
    divergence = align.DIVERGENCES[name]
    log_p, logits = jnp.asarray(log_softmax(0, VOCAB)), jnp.asarray(np.random.default_rng(1).normal(size=VOCAB))
    assert float(divergence(log_p, log_p)) == pytest.approx(0.0, abs=1e-6)
    value = lambda x: divergence(jax.nn.log_softmax(x), log_p)
    gradient = jax.grad(value)(logits)
    h = 1e-2  # central differences in float32: error h^2 / 6 of a third derivative below 1, plus 1e-7 / h
    for v in range(VOCAB):
        step = h * jnp.eye(VOCAB)[v]
        assert float(gradient[v]) == pytest.approx(
            float(value(logits + step) - value(logits - step)) / (2 * h), abs=2e-3
        )


def test_the_policy_gradient_of_total_variation_is_its_gradient_at_another_scale():
    log_p, logits = jnp.asarray(log_softmax(0, 5, VOCAB)), jnp.asarray(np.random.default_rng(1).normal(size=(5, VOCAB)))
    sigma = np.std(np.asarray(log_p > jax.nn.log_softmax(logits)), axis=-1, keepdims=True)
    assert (sigma > 0).all()
    expected = gradient_at(align.total_variation, logits, log_p) / sigma
    np.testing.assert_allclose(gradient_at(align.total_variation_policy, logits, log_p), expected, atol=1e-6)


def test_likelihood_is_forward_kl_from_certainty_and_its_gradient_is_right():
    """Also of a token that the trace did not keep."""
    rng = np.random.default_rng(0)
    logits, emitted = jnp.asarray(rng.normal(size=(1, 5, VOCAB))), jnp.asarray(rng.integers(0, VOCAB, (1, 5)))
    certain = jnp.asarray(np.tile(np.array([0.0, -1e9], np.float32), (1, 5, 1)))
    batch = BATCH._replace(emitted=emitted, top_ids=emitted[..., None], log_p=certain)
    lost = lambda name, x: align.LOSSES[name](jax.nn.log_softmax(x), batch)
    np.testing.assert_allclose(lost("negative_log_likelihood", logits), lost("forward_kl", logits), rtol=1e-5)
    unkept = batch._replace(top_ids=(emitted[..., None] + 1) % VOCAB)
    value = lambda x: align.negative_log_likelihood(jax.nn.log_softmax(x), unkept).sum()
    gradient, h = jax.grad(value)(logits), 1e-2  # as above
    for v in np.ndindex(logits.shape):
        step = jnp.zeros_like(logits).at[v].set(h)
        assert float(gradient[v]) == pytest.approx(
            float(value(logits + step) - value(logits - step)) / (2 * h), abs=2e-3
        )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("name", align.LOSSES)
def test_a_temperature_is_that_of_both_models_among_what_is_kept(name, temperature):
    """As if both had divided their logits by it, and of the target only the kept tokens were there."""
    p, q = (np.random.default_rng(seed).normal(size=(1, 5, VOCAB)) for seed in (0, 1))
    ids, emitted = np.argsort(-p, -1)[..., :3], np.full((1, 5), 2)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(own)) for own in (p, q))
    batch = BATCH._replace(emitted=emitted, top_ids=jnp.asarray(ids), log_p=align.coarse(log_p, jnp.asarray(ids)))
    found = align.LOSSES[name](log_q, batch, temperature)
    of_kept = lambda x: jax.nn.log_softmax(jnp.asarray(np.take_along_axis(x, ids, -1) / temperature))
    if name == "negative_log_likelihood":
        expected = -jax.nn.log_softmax(jnp.asarray(q / temperature))[..., 2]
    else:
        expected = align.DIVERGENCES[name](of_kept(q), of_kept(p))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found, align.LOSSES[name](log_q, batch, 1.0), rtol=0.05)


def test_a_preset_may_name_every_loss_and_no_other():
    assert set(get_args(get_type_hints(Align)["divergence"])) == align.LOSSES.keys()


def test_jensen_shannon_lies_between_its_two_ends():
    """At beta near 0 it is beta KL(p || q), near 1 it is (1 - beta) KL(q || p), and at a half it is symmetric."""
    log_p, log_q = (jnp.asarray(log_softmax(s, VOCAB)) for s in (2, 3))
    js = align.jensen_shannon
    assert float(js(log_q, log_p, 1e-3)) / 1e-3 == pytest.approx(float(align.forward_kl(log_q, log_p)), rel=0.02)
    assert float(js(log_q, log_p, 1 - 1e-3)) / 1e-3 == pytest.approx(float(align.reverse_kl(log_q, log_p)), rel=0.02)
    assert float(js(log_q, log_p)) == pytest.approx(float(js(log_p, log_q)), rel=1e-5)


def test_negative_log_acceptance_is_that_of_what_total_variation_leaves():
    log_p, log_q = (jnp.asarray(log_softmax(s, 20, VOCAB)) for s in (2, 3))
    expected = -np.log1p(-np.asarray(align.total_variation(log_q, log_p)))
    np.testing.assert_allclose(align.negative_log_acceptance(log_q, log_p), expected, rtol=1e-5)


def test_total_variation_is_the_rejection_rate():
    number = 40_000
    log_p, log_q = (jnp.asarray(log_softmax(s, VOCAB)) for s in (2, 3))
    drafted = jax.random.categorical(jax.random.key(0), log_q, shape=(number,))
    u = jax.random.uniform(jax.random.key(1), (number,))
    rejected = float(jnp.mean(u * jnp.exp(log_q[drafted]) >= jnp.exp(log_p[drafted])))
    rate = float(align.total_variation(log_q, log_p))
    assert abs(rejected - rate) < 4 * np.sqrt(rate * (1 - rate) / number)


@pytest.mark.parametrize("name", align.LOSSES)
def test_every_loss_raises_acceptance(name):
    """Of a table of which 2,000 tokens a row were emitted, and all but two outcomes kept."""
    log_p = jnp.asarray(log_softmax(4, VOCAB, VOCAB))
    kept, emitted = (
        jnp.argsort(-log_p, -1)[:, :-2],
        jax.random.categorical(jax.random.key(0), log_p, shape=(2000, VOCAB)),
    )
    batch = BATCH._replace(emitted=emitted, top_ids=kept[None], log_p=align.coarse(log_p, kept)[None])
    tx = optax.adam(0.05)
    table = jnp.zeros((VOCAB, VOCAB))

    def step(carry, _):
        table, opt = carry
        loss = lambda t: align.LOSSES[name](jax.nn.log_softmax(jnp.broadcast_to(t, (2000, *t.shape))), batch).mean()
        updates, opt = tx.update(jax.grad(loss)(table), opt)
        return (optax.apply_updates(table, updates), opt), None

    rejection = lambda t: float(align.total_variation(jax.nn.log_softmax(t), log_p).mean())
    (after, _), _ = jax.lax.scan(step, (table, tx.init(table)), length=300)
    assert rejection(after) < rejection(table) / 5


def test_a_tail_keeps_the_mass():
    log_q = jnp.asarray(log_softmax(5, 4, VOCAB))
    ids = jnp.argsort(-log_q, -1)[:, :2]
    coarse = np.exp(align.coarse(log_q, ids))
    np.testing.assert_allclose(coarse.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        coarse[:, :2], np.exp(np.take_along_axis(np.asarray(log_q), np.asarray(ids), -1)), rtol=1e-5
    )


def test_rows_hold_every_example_once_an_epoch_and_never_overflow():
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    rows = pack(lengths, range(50), 48)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(sum(lengths[i] for i in row) <= 48 for row in rows)
    assert packed_rows(lengths, np.arange(50), 99, 48, seed=1) == packed_rows(lengths, np.arange(50), 99, 48, seed=1)


@pytest.mark.parametrize("row_tokens", [32, 8])
def test_packed_places_are_those_of_the_examples_alone(row_tokens):
    """A model that looks up the current token: packed or alone, the same tokens are predicted from the same tokens."""
    log = traces()
    rows = pack([len(t) for t in log.tokens], range(9), row_tokens)
    batch = as_batch(log, rows, row_tokens, places(log, rows, row_tokens))
    found = []
    for r in range(len(rows)):
        for m in np.flatnonzero(batch.mask[r]):
            at = batch.at[r, m]
            found.append((batch.tokens[r, at], batch.emitted[r, m], tuple(batch.top_ids[r, m])))
    expected = []
    for i, own in enumerate(log.tokens):
        for place in range(len(own) - log.prompt_length[i]):
            at = log.prompt_length[i] + place
            if len(own) - (at - 1) <= row_tokens:
                expected.append((own[at - 1], own[at], tuple(log.top_ids[i, place])))
    assert sorted(found) == sorted(expected)


def test_a_step_of_the_aligner_moves_down_and_skips_masked_places():
    log = traces()
    rows = pack([len(t) for t in log.tokens], range(9), 32)
    batch = as_batch(log, rows, 32, places(log, rows, 32))
    aligner = align.aligner(LOG_Q, align.LOSSES["forward_kl"], align.optimiser())
    state = aligner.init(jnp.zeros((VOCAB, VOCAB)))
    first, _, count = aligner.evaluate((), state.params, batch)
    assert int(count) == sum(len(t) for t in log.tokens) - log.prompt_length.sum()
    for _ in range(20):
        state, _ = aligner.step((), state, batch, 0.1)
    assert float(aligner.evaluate((), state.params, batch)[0]) < float(first)
    spoiled = batch._replace(log_p=np.where(batch.mask[..., None], batch.log_p, 7.0))
    assert float(aligner.evaluate((), state.params, spoiled)[0]) == float(aligner.evaluate((), state.params, batch)[0])


LOG_Q = lambda frozen, table, tokens, segments, at: jax.nn.log_softmax(table[jnp.take_along_axis(tokens, at, 1)])


def stepped(batch, **settings):
    """A table's gradient in one step, which plain descent of rate 1 shows."""
    reference = settings.pop("reference", None)
    own = align.aligner(LOG_Q, align.LOSSES["forward_kl"], optax.identity(), **settings)
    table = jnp.asarray(log_softmax(7, VOCAB, VOCAB))
    state, metrics = jax.jit(own.step)((), own.init(table), batch, 1.0, reference)
    return np.asarray(table - state.params), metrics


def packed(row_tokens: int = 16):
    log = traces(number=40)
    rows = pack([len(t) for t in log.tokens], range(40), row_tokens)[:12]
    return as_batch(log, rows, row_tokens, places(log, rows, row_tokens))


@pytest.mark.parametrize("share", [0.05, 0.4, 0.75, 1.0])
def test_the_tokens_furthest_behind_the_reference_count_and_no_other(share):
    batch, reference = packed(), jnp.asarray(log_softmax(8, VOCAB, VOCAB))
    lost = lambda table: np.asarray(align.LOSSES["forward_kl"](LOG_Q((), table, *batch[:3]), batch))
    excess = np.where(batch.mask, lost(jnp.asarray(log_softmax(7, VOCAB, VOCAB))) - lost(reference), -np.inf)
    number = max(1, round(share * batch.mask.sum()))
    best = sorted(np.ndindex(excess.shape), key=lambda place: -excess[place])[:number]
    chosen = np.zeros_like(batch.mask)
    chosen[tuple(np.transpose(best))] = True
    np.testing.assert_array_equal(align.hardest(jnp.asarray(excess), jnp.asarray(batch.mask), share), chosen)
    assert (share == 1) == (chosen == batch.mask).all()
    # The same places by one program that finds them and one that is told: the same numbers bit for bit.
    for ours, theirs in zip(stepped(batch, share=share, reference=reference), stepped(batch._replace(mask=chosen))):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_of_equal_tokens_the_earlier_count():
    mask = jnp.array([[False, True, True], [True, False, True]])
    assert align.hardest(jnp.zeros((2, 3)), mask, 0.5).tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_rows_read_in_parts_have_the_gradient_of_all_of_them(parts, share):
    reference = None if share == 1 else jnp.asarray(log_softmax(8, VOCAB, VOCAB))
    batch = packed()
    assert np.ptp(batch.mask.sum(1)) > 0  # else a mean of the parts' means would pass
    ours, theirs = (stepped(batch, share=share, reference=reference, parts=own) for own in (parts, 1))
    # Means of at most `mask.sum()` terms below 1 in another order.
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=batch.mask.sum() * np.finfo(np.float32).eps)


def test_a_rate_falls_to_a_tenth_unless_another_run_goes_on_from_there():
    falling, staying = ([align.schedule(i, 40, 1e-3, 0.1, falls=falls) for i in range(40)] for falls in (True, False))
    assert falling[:5] == staying[:5] == sorted(staying[:5]) and max(falling) == pytest.approx(1e-3)
    assert falling[4:] == sorted(falling[4:], reverse=True) and falling[-1] == pytest.approx(1e-4, rel=0.05)
    assert staying[4:] == pytest.approx([1e-3] * 36)


def test_mixed_is_paid_what_trunk_and_specialists_are_paid_and_both_go_on_from_the_trunk(finished):
    traces, partition = read_traces(finished.out), read_arrays(Path(finished.out, "partition", "partition.npz"))
    draft = read_model(finished.draft, jnp.float32)
    trunk = jax.tree.map(lambda x: x[None] + 1, draft.params)
    results = {"trunk": {"params": trunk}}
    courses = {own.name: own for own in stage._courses(finished, traces, partition, draft, 300, results)}
    spent = {name: course.steps * len(course.train) for name, course in courses.items()}
    whole = finished.align.steps * len(partition["centroids"])
    assert spent["trunk"] + spent["bank_lora"] == spent["trunk"] + spent["mixed_full"] == spent["mixed_lora"] == whole
    assert courses["trunk"].train[0] + courses["mixed_full"].train[0] == courses["mixed_lora"].train[0]
    assert not courses["trunk"].falls and all(course.falls for name, course in courses.items() if name != "trunk")
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    jax.tree.map(same, courses["mixed_full"].params, trunk)
    jax.tree.map(lambda x, y: same(x, y[0]), courses["bank_lora"].frozen, trunk)
    jax.tree.map(same, courses["mixed_lora"].frozen, draft.params)
    said = manifest(finished.out, "align")["results"]
    assert said["mixed_full"]["before"] == pytest.approx(said["trunk"]["agreement"])


def test_without_a_trunk_specialists_start_from_the_base(finished, out_with):
    out = out_with("trace", "partition")
    spec = dataclasses.replace(finished.align, trunk=0.0, steps=2)
    stage.run(dataclasses.replace(finished, out=str(out), align=spec))
    assert manifest(str(out), "align")["results"].keys() >= {"bank_lora", "mixed_lora", "mixed_full", "mixed"}
    assert not (out / "align" / "trunk.safetensors").exists()


def test_the_pool_keeps_the_curves_of_every_course_and_each_step_once(finished, tmp_path):
    known = manifest(finished.out, "pool")["results"]["curves"]
    assert list(known) == ["trunk", "bank_lora", "mixed_lora", "mixed_full"]
    assert {name: own["step"] for name, own in known.items()} == {
        "trunk": [6], "bank_lora": [2], "mixed_lora": [10, 12], "mixed_full": [6]
    }  # fmt: skip
    assert [len(own["loss"][0]) for own in known.values()] == [1, 3, 1, 1]
    held = {name: (own["held"]["step"], len(own["held"]["loss"][0])) for name, own in known.items()}
    assert held == {
        "trunk": ([0, 6], 1),
        "bank_lora": ([0, 2], 3),
        "mixed_lora": ([0, 12], 1),
        "mixed_full": ([0, 6], 1),
    }
    said = [("bank", 10, 0.5), ("bank", 20, 0.4), ("bank", 20, 0.3), ("mixed", 10, 0.9)]  # killed and gone on
    lines = [json.dumps({"course": c, "step": s, "loss": [x], "agreement": [1 - x]}) for c, s, x in said]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_curves(tmp_path / "metrics.jsonl")
    assert found["bank"] == {"step": [10, 20], "loss": [[0.5], [0.3]], "agreement": [[0.5], [0.7]]}
    assert found["mixed"]["step"] == [10]


def test_beta_is_the_mixture_of_jensen_shannon_and_of_nothing_else():
    log_q, log_p = (jnp.asarray(log_softmax(seed, 1, 1, VOCAB)) for seed in (0, 1))
    batch = BATCH._replace(
        top_ids=np.arange(VOCAB - 1)[None, None], log_p=align.coarse(log_p, jnp.arange(VOCAB - 1)[None, None])
    )
    of = lambda name, beta: float(align.loss_of(name, beta)(log_q, batch)[0, 0])
    assert of("jensen_shannon", 0.2) == pytest.approx(float(align.jensen_shannon(log_q, log_p, 0.2)[0, 0]), rel=1e-4)
    assert of("jensen_shannon", 0.2) != pytest.approx(of("jensen_shannon", 0.5), rel=1e-2)
    assert of("forward_kl", 0.2) == of("forward_kl", 0.5)


def test_bfloat16_is_computed_with_and_float32_is_trained(finished, world):
    """A step that bfloat16 could not take is kept in the masters."""
    draft = read_model(str(world.draft), jnp.bfloat16)
    own = stage.full_fine_tune(finished, draft, 400)
    masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), draft.params)
    found, rows = read_traces(finished.out), [[0], [1]]
    batch = as_batch(found, rows, 64, places(found, rows, 64))
    state, _ = jax.jit(own.step)((), own.init(masters), batch, 1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    lost = lambda new, old: bool(((new.astype(jnp.bfloat16) == old) & (new != old.astype(jnp.float32))).any())
    assert all(jax.tree.leaves(jax.tree.map(lost, state.params["layers"], draft.params["layers"])))
    say = lambda params: stage._full_log_q(draft, 400, (), params, batch.tokens, batch.segments, batch.at)
    assert say(state.params).dtype == jnp.float32 and "bf16" in str(jax.make_jaxpr(say)(masters))
