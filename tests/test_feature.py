"""The drafter of features: perfect where it can be, and elsewhere what its text read from scratch would draft.

Verification hides drafting bugs. Two targets have drafters that know them: of one a layer that reads tokens alone says all,
so that its cache must hold them; of the other what a token follows is in the feature before it and nowhere else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, EOS, PARAMS, PROMPTS, TARGET, answer, counted, engine, plain_greedy
from test_lossless import emitted, likelihoods, texts
from test_widening import grown
from toys import prompt_of

from jaxspec import metrics, verify
from jaxspec.drafters import feature, feature_drafter, lm
from jaxspec.drafters.feature import (
    VARIANTS,
    Concatenation,
    FeatureParams,
    FeatureWeights,
    Residual,
    fused,
    init_weights,
    logits,
    shifted,
    single_layer,
    tables_of,
)
from jaxspec.engine import Engine
from jaxspec.requests import room_of
from jaxspec.sampling import log_probs
from jaxspec.speculate import speculator
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, forward, init, unembed
from jaxspec.types import Sampling, SpecParams

K, SLOTS, WIDTH = 3, 64, TARGET.width
LAYER = single_layer(TARGET)
SILENT = ("o", "down")  # modules that write to the residual


def without_output(layer: dict) -> dict:
    """A layer that adds nothing."""
    zero = lambda path, leaf: jnp.zeros_like(leaf) if path[-2].key in SILENT else leaf
    return jax.tree.map_with_path(zero, layer)


def noisy(tree, share: float):
    """Weights with noise of this share of their spread."""
    of = lambda i, x: x + share * x.std() * jax.random.normal(jax.random.key(i), x.shape)
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([of(i, leaf) for i, leaf in enumerate(leaves)])


# One layer of two speaks, and so the drafter's can be that layer.
ONE = PARAMS | {"layers": {0: without_output(PARAMS["layers"][0]), 1: PARAMS["layers"][1]}}
TABLES = tables_of(LAYER, ONE)
PASS = Concatenation(jnp.concatenate([jnp.zeros((WIDTH, WIDTH)), jnp.eye(WIDTH)]), jnp.zeros(WIDTH))
TWIN = FeatureWeights({"layers": {0: ONE["layers"][1]}, "norm": ONE["norm"]}, PASS)
NEARLY = noisy(TWIN, 0.1)
SIDEWAYS = Residual(
    jax.random.normal(jax.random.key(5), (WIDTH, 4)), 0.3 * jax.random.normal(jax.random.key(6), (4, WIDTH))
)
OWN = {
    "concatenation": NEARLY,
    "residual": NEARLY._replace(residual=SIDEWAYS),
    "sampler": init_weights(LAYER, "sampling", ONE, jax.random.key(0)),
}
PROGRAM = engine(feature_drafter(LAYER, K), target=ONE)


def by(weights: FeatureWeights) -> FeatureParams:
    return FeatureParams(weights, TABLES)


def follower() -> tuple[LMConfig, dict, FeatureParams]:
    """A target whose feature holds its token's code and the code before; the drafter copies that from the feature.

    Embeddings are `[c, -c]`, and the layer, which sees two tokens alike, adds `[0, c + c before]`.
    """
    config, half = dataclasses.replace(TARGET, num_layers=1, windows=(2,)), WIDTH // 2
    code = jax.random.normal(jax.random.key(1), (TARGET.vocab_size, half))
    code /= jnp.linalg.norm(code, axis=1, keepdims=True)
    params = jax.tree.map(jnp.zeros_like, init(config, jax.random.key(2)))
    layer, level = params["layers"][0], jnp.sqrt(WIDTH / 2)  # of every norm, as |c| = 1
    layer["attention_norm"]["scale"] += 1
    layer["attention"]["v"]["kernel"] = jnp.concatenate([jnp.eye(half), jnp.zeros((half, half))]) / level
    kept = jnp.arange(WIDTH).reshape(4, 8)[jnp.array([0, 2])].reshape(-1)  # the first head of either group
    layer["attention"]["o"]["kernel"] = jnp.zeros((WIDTH, WIDTH)).at[kept, half + jnp.arange(half)].set(2.0)
    params["embed"]["embedding"] = jnp.concatenate([code, -code], axis=1)
    params["norm"]["scale"] += 1
    params["head"]["kernel"] = jax.random.normal(jax.random.key(8), params["head"]["kernel"].shape)
    kernel = jnp.zeros((2 * WIDTH, WIDTH))
    kernel = kernel.at[jnp.arange(half), half + jnp.arange(half)].set(1 / level)
    kernel = kernel.at[WIDTH + jnp.arange(half), jnp.arange(half)].set(1.0)
    fusion = Concatenation(kernel, jnp.zeros(WIDTH))
    own = FeatureWeights({"layers": {0: without_output(layer)}, "norm": params["norm"]}, fusion)
    return config, params, FeatureParams(own, tables_of(single_layer(config), params))


@pytest.mark.parametrize(
    "rule, temperature", [("greedy", 0.0), ("rejection", 1.0), pytest.param("gumbel", 1.0, marks=pytest.mark.slow)]
)
def test_a_layer_that_is_the_targets_loses_nothing(rule, temperature):
    """Kept with certainty at temperature 0 and, as q is p, at temperature 1 but for rounding between two programs."""
    own = PROGRAM if rule == "greedy" else engine(feature_drafter(LAYER, K), verify.RULES[rule], (), ONE)
    for completion, ids in zip(answer(own, by(TWIN), temperature=temperature), PROMPTS, strict=True):
        counts = completion.counts
        assert (counts.accepted_by_position == counts.drafted_by_position).all()
        assert counts.num_drafts == -(-len(completion.ids) // (K + 1))
        assert counts.num_drafter_calls == K * counts.num_drafts
        assert temperature or completion.ids == plain_greedy(ids, params=ONE)


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_drafter_that_needs_the_feature_before_each_token_loses_nothing(k):
    """A feature of another row or place would be another token's."""
    config, target, params = follower()
    shape = {"slots": 4, "room": room_of(32, BUDGET), "vocab_size": config.vocab_size, "stop_tokens": ()}
    own = Engine(lm_target(config), feature_drafter(single_layer(config), k), verify.greedy, target, **shape)
    prompts = [ids for ids in PROMPTS if len(ids) > 1]  # before the first token there is no feature
    for limit in (k, 1):  # which also ends rounds where rows of the window are left over
        found = answer(own, params, prompts, draft_limit=limit)
        assert all(len(set(done.ids)) > 10 for done in found)
        total = metrics.total(done.counts for done in found)
        assert (total.accepted_by_position == total.drafted_by_position).all()
        assert total.num_drafts == len(prompts) * -(-BUDGET // (limit + 1))


@jax.jit
def true_features(text):
    return forward(TARGET, ONE, text)


@jax.jit
def guesses(params, text, before):
    """What the layer makes of a whole text, read without a cache, and the tokens that follow."""
    hidden = forward(LAYER, params.model, fused(params, text, before))
    return hidden, jnp.argmax(logits(LAYER, params, hidden), -1)


def drafted(params, ids) -> list[int]:
    """The next K tokens by a drafter that reads all of `ids` anew for each."""
    text, end = np.zeros((1, SLOTS), np.int32), len(ids)
    text[0, :end] = ids
    before = np.array(shifted(true_features(text)))
    for at in range(end, end + K):
        hidden, best = guesses(params, text, before)
        text[0, at], before[0, at] = best[0, at - 1], hidden[0, at - 1]
    return text[0, end : end + K].tolist()


def recomputed(params, ids, out) -> tuple[int, int, int]:
    """Rounds, drafted and accepted tokens along an output."""
    rounds = number = accepted = at = 0
    while at < len(out):
        block = np.array(drafted(params, (*ids, *out[:at]))[: len(out) - at]) == np.array(out[at : at + K])
        kept = int(np.cumprod(block).sum())
        rounds, number, accepted, at = rounds + 1, number + len(block), accepted + kept, at + kept + 1
    return rounds, number, accepted


@pytest.mark.parametrize("name", OWN)
def test_text_is_plain_decodings_and_counts_are_those_of_a_recomputation(name):
    """Every round drafts what it would after reading its whole text with the target's features."""
    completions = answer(PROGRAM, by(OWN[name]))
    for completion, ids in zip(completions, PROMPTS, strict=True):
        assert completion.ids == plain_greedy(ids, params=ONE)
        assert counted(completion.counts) == recomputed(by(OWN[name]), ids, completion.ids)
    accepted, number = np.sum([counted(own.counts) for own in completions], 0)[[2, 1]]
    assert name == "sampler" or 0.1 < accepted / number < 0.95
    assert [own.ids for own in answer(PROGRAM, by(OWN[name]), draft_limit=0)] == [own.ids for own in completions]


def test_weights_of_a_kind_share_a_program():
    before = PROGRAM.programs.chunk._cache_size()
    answer(PROGRAM, by(NEARLY))
    size = PROGRAM.programs.chunk._cache_size()
    answer(PROGRAM, by(TWIN)), answer(PROGRAM, by(NEARLY), draft_limit=1)
    assert PROGRAM.programs.chunk._cache_size() == size <= before + 1


@pytest.mark.slow
def test_a_drafter_that_reads_several_columns_a_call_drafts_what_it_drafts_with_one(monkeypatch):
    """As accelerators do with one row."""
    found = []
    for columns in (1, 2):
        monkeypatch.setattr(feature, "least_columns", lambda rows, columns=columns: columns)
        own = engine(feature_drafter(LAYER, K), target=ONE, slots=1)
        found.append([(done.ids, counted(done.counts)) for done in answer(own, by(NEARLY))])
    assert found[0] == found[1]


def test_a_row_does_not_see_its_batch():
    together = answer(PROGRAM, by(NEARLY))
    for i in (0, 3):
        again = answer(PROGRAM, by(NEARLY), [PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)])
        assert (again[i].ids, counted(again[i].counts)) == (together[i].ids, counted(together[i].counts))


@pytest.mark.slow
def test_a_prompt_that_is_read_in_pieces_loses_nothing():
    ids = tuple(np.random.default_rng(0).integers(8, 40, size=700).tolist())
    own = engine(feature_drafter(LAYER, K), target=ONE, slots=1, room=room_of(1024, 8), stops=())
    (done,) = answer(own, by(TWIN), [ids], max_new_tokens=8)
    assert done.counts.num_accepted_tokens == done.counts.num_draft_tokens == 2 * K


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_preserves_the_type_of_its_state(variant, sampled):
    """In bfloat16, where a stray float32 would show."""
    low = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    target, own = lm_target(TARGET, jnp.bfloat16), feature_drafter(LAYER, K, dtype=jnp.bfloat16)
    spec = speculator(target, own, verify.rejection, stop_tokens=(EOS,))
    weights = init_weights(LAYER, variant, ONE, jax.random.key(0))
    params, sampling = SpecParams(low(ONE), low(by(weights))), Sampling(jnp.ones(2)) if sampled else None

    def start():
        prompt = prompt_of([[1, 2, 3], [4, 5, 6]], limit=5)
        state, features = target.init(params.target, prompt, SLOTS)
        return spec.init(params, prompt._replace(features=own.sees(features)), state, sampling, SLOTS)

    before = jax.eval_shape(start)
    after = jax.eval_shape(lambda: spec.step(params, start())[0])
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.shape[0] == 2


@pytest.mark.slow
def test_a_finished_row_stays_as_it_is():
    target, own = lm_target(TARGET), feature_drafter(LAYER, K)
    spec, params = speculator(target, own, verify.greedy, stop_tokens=()), SpecParams(ONE, by(NEARLY))
    prompt = prompt_of([[9, 8, 7], [5, 6, 4]], limit=1)._replace(limit=jnp.array([1, 20]))

    @jax.jit
    def two_rounds():
        state, features = target.init(ONE, prompt, SLOTS)
        begun = spec.init(params, prompt._replace(features=own.sees(features)), state, None, SLOTS)
        once, _ = spec.step(params, begun)
        return once, spec.step(params, once)[0]

    once, later = two_rounds()
    assert once.done.tolist() == [True, False]
    np.testing.assert_array_equal(later.drafter.feature[0], once.drafter.feature[0])
    assert later.drafter.length.tolist() == [4, later.length[1]]
    for before, after in zip(jax.tree.leaves(once.drafter.cache), jax.tree.leaves(later.drafter.cache), strict=True):
        np.testing.assert_array_equal(after[0, :, :4], before[0, :, :4])


@pytest.mark.parametrize("case", ["llama-2-7b", pytest.param("llama-3.2-1b", marks=pytest.mark.slow)])
def test_tables_of_a_widened_target_are_those_that_it_had(case):
    """Also where the shape has a head apart and the target has none."""
    old, params, _, wide = grown(case)
    found, expected = (tables_of(single_layer(old), own) for own in (wide, params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert expected["embed"]["embedding"] is params["embed"]["embedding"]


@pytest.mark.parametrize(
    "variant", [*(pytest.param(own, marks=pytest.mark.slow) for own in ("plain", "sampling")), "alignment"]
)
def test_what_it_drafts_leaves_the_targets_law(variant, monkeypatch):
    """By enumeration: every chain that could be drawn, with the probability that it says it has, by the shipped rule."""
    vocab, k = 3, 2
    config = dataclasses.replace(TARGET, vocab_size=vocab, num_layers=1)
    target = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(config, jax.random.key(3)))
    layer, rows = single_layer(config), vocab**k
    weights = noisy(init_weights(layer, variant, target, jax.random.key(4)), 0.3)
    params, own = FeatureParams(weights, tables_of(layer, target)), feature_drafter(layer, k)
    sampling = Sampling(jnp.full(rows, 0.8), jnp.full(rows, vocab, jnp.int32), jnp.full(rows, 0.9))
    prompt, every = prompt_of([[1, 0, 2]] * rows, limit=4), jnp.asarray(texts(vocab, k))
    monkeypatch.setattr(lm, "draw", lambda token, log_q: token)

    @jax.jit
    def propose():
        begun = own.init(params, prompt._replace(features=forward(config, target, prompt.tokens)), 16)
        return own.propose(params, begun, prompt.tokens, prompt.length, lambda step: every[:, step], sampling)[0]

    draft = propose()
    np.testing.assert_array_equal(draft.tokens, every)

    @jax.jit
    def said(text):
        same = Sampling(*(jnp.resize(leaf, len(text)) for leaf in sampling))
        return log_probs(unembed(config, target, forward(config, target, text)[:, -1]), same)

    behind = lambda number: np.pad(texts(vocab, number), ((0, 0), (3, 0))) + np.pad([1, 0, 2], (0, number))
    p = [np.asarray(said(behind(number))) for number in range(k + 1)]
    q = np.exp(np.take_along_axis(np.asarray(draft.log_q, np.float64), np.asarray(every)[..., None], 2)).prod((1, 2))
    for number in range(k + 1):
        found = emitted(verify.rejection.law, draft._replace(num_drafted=jnp.full(rows, number)), p, None, number)
        np.testing.assert_allclose(q @ found, likelihoods(p, texts(vocab, k + 1)).prod(1), atol=1e-6)
    assert q.sum() == pytest.approx(1, abs=1e-6) and not np.allclose(
        q, likelihoods(p, np.asarray(every)).prod(1), atol=0.01
    )
