"""Trigram tables and what is drafted from them: they know what was said, and where they know the text nothing is rejected."""

import itertools
from collections import Counter, defaultdict
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, EOS, PROMPTS, answer, engine, plain_greedy
from test_lossless import RULES, code, laws, texts, walks
from toys import SETTINGS, prompt_of, random_table, table_target

from jaxspec import trigrams, verify
from jaxspec.drafters import adaptive_drafter
from jaxspec.drafters.adaptive import AdaptiveState, search
from jaxspec.sampling import log_probs
from jaxspec.speculate import run, speculator
from jaxspec.trigrams import GAIN, MOST, NOBODY, SUCCESSORS
from jaxspec.types import Draft, SpecParams

DEPTH, NODES = 3, 8
TREE = engine(adaptive_drafter(NODES, depth=DEPTH, beam=2))
NOTHING = trigrams.empty(256)
LITTLE = adaptive_drafter(3, depth=2, beam=2, buckets=16)
begin = jax.jit(lambda table, prompts: LITTLE.init(table, prompt_of(prompts, limit=9), 9))
propose = jax.jit(lambda table, state: LITTLE.propose(table, state, None, None, None, None)[0])
commit = jax.jit(lambda state, verdict: LITTLE.commit(None, state, verdict, None))
learn = jax.jit(trigrams.learnt)


@cache
def known() -> trigrams.Trigrams:
    """The table of the target's own greedy texts."""
    return trigrams.counted([[*ids, *plain_greedy(ids)] for ids in PROMPTS], len(NOTHING.bigram))


def said(table, *bigram) -> dict[int, float]:
    """Successors of a bigram and their weights."""
    tokens, weight = map(np.asarray, trigrams.looked_up(table, jnp.array(bigram, jnp.int32)))
    found = {int(token): float(own) for token, own in zip(tokens, weight, strict=True) if own > 0}
    assert len(found) == (weight > 0).sum()
    return found


def learnt(*text, table=None, number=None):
    """A table after a text, in which further tokens may stand that do not count."""
    padded = np.full(80, 9, np.int32)
    padded[: len(text)] = text
    return learn(trigrams.empty(256) if table is None else table, padded, len(text) - 2 if number is None else number)


def in_one_bucket(buckets: int, number: int) -> list[tuple[int, int]]:
    """So many bigrams that share a bucket."""
    pairs = np.array(list(itertools.product(range(40), repeat=2)), np.int32)
    bucket = np.asarray(trigrams._bucket(jnp.asarray(pairs), buckets))
    return [tuple(map(int, pair)) for pair in pairs[bucket == np.bincount(bucket).argmax()][:number]]


def test_a_table_knows_the_shares_of_what_followed():
    rng = np.random.default_rng(0)
    rows = [rng.zipf(1.5, size=n) % 30 for n in (400, 1, 300, 0, 2)]
    table, expected = trigrams.counted(rows, 64), defaultdict(Counter)
    for row in rows:
        begun = [NOBODY, *row.tolist()]
        for a, b, c in zip(begun, begun[1:], begun[2:], strict=False):
            expected[a, b][c] += 1
    assert max(map(len, expected.values())) > SUCCESSORS and len(table.bigram) >= 2 * len(expected)
    missing = [own for own in expected if not said(table, *own)]
    bucket = lambda own: int(trigrams._bucket(jnp.array(own), len(table.bigram)))
    owner = {bucket(own): own for own in expected if own not in missing}
    assert all(expected[owner[bucket(own)]].total() >= expected[own].total() for own in missing)
    for own, counts in expected.items():
        found = said(table, *own)
        best = sorted(counts.values(), reverse=True)[: SUCCESSORS if own not in missing else 0]
        assert sorted(found.values(), reverse=True) == pytest.approx([n / counts.total() for n in best])
        assert all(weight == pytest.approx(counts[token] / counts.total()) for token, weight in found.items())


def test_what_is_said_gains_weight_up_to_a_limit():
    table = learnt(1, 2, 3, 1, 2, 3, 1, 2, 4)
    assert said(table, 1, 2) == pytest.approx({3: 2 * GAIN, 4: GAIN}) and said(table, 3, 1) == pytest.approx(
        {2: 2 * GAIN}
    )
    assert said(table, 2, 4) == said(table, 4, 9) == said(learnt(1, 2, 3, number=0), 1, 2) == {}
    assert said(learnt(*[5] * 60), 5, 5) == {5: MOST}


def test_a_new_successor_takes_the_place_of_the_least():
    table = trigrams.empty(256)
    for token in [*range(SUCCESSORS)] * 2 + [0]:
        table = learnt(6, 7, token, table=table)
    full = learnt(6, 7, 30, table=learnt(6, 7, 1, table=table))
    assert set(said(full, 6, 7)) == {*range(SUCCESSORS)} - {2} | {30}
    assert said(full, 6, 7)[30] == pytest.approx(GAIN) and said(full, 6, 7)[0] == pytest.approx(3 * GAIN)


def test_of_two_bigrams_that_want_one_bucket_the_one_said_more_often_keeps_it():
    first, second = in_one_bucket(64, 2)
    assert trigrams._bucket(jnp.array(first), 64) == trigrams._bucket(jnp.array(second), 64)
    table = learnt(*first, 3, table=learnt(*first, 3, table=trigrams.empty(64)))
    table = learnt(*second, 4, table=table)
    assert said(table, *first) == pytest.approx({3: GAIN}) and said(table, *second) == {}
    table = learnt(*second, 4, table=table)
    assert said(table, *second) == pytest.approx({4: GAIN}) and said(table, *first) == {}


def test_finished_texts_teach_what_rows_share():
    growing, text = trigrams.Growing(trigrams.empty(256)), list(range(33))
    growing.saw(text)
    assert said(growing.params(None), NOBODY, 0) == {1: pytest.approx(GAIN)} and said(growing.table, 30, 31) != {}
    assert said(growing.table, 31, 32) == {}


def test_the_beam_finds_the_likeliest_nodes_of_both_tables():
    """Against a search of every node, with scores of its own."""
    rng = np.random.default_rng(1)
    shared = trigrams.counted([rng.integers(0, 4, size=200)], 1 << 10)
    own = learnt(*rng.integers(0, 4, size=60).tolist())
    state = AdaptiveState(jax.tree.map(lambda leaf: leaf[None], own), jnp.array([[1, 2]]))
    found = jax.jit(lambda: search(shared, state, depth=3, beam=16))()

    def log_p(*bigram) -> dict[int, float]:
        weight = Counter(said(shared, *bigram)) + Counter(said(own, *bigram))
        return {token: np.log(own / (weight.total() + GAIN)) for token, own in weight.items()}

    first = log_p(1, 2)
    every = {(token,): score for token, score in first.items()}
    every |= {(a, b): own + score for a, own in first.items() for b, score in log_p(2, a).items()}
    pairs = [way for way in every if len(way) == 2]
    every |= {(*own, c): every[own] + score for own in pairs for c, score in log_p(*own).items()}
    tokens, score, parent = (np.asarray(leaf)[0] for leaf in (found.tokens, found.score, found.parent))
    way = lambda node: (*way(parent[node]), int(tokens[node])) if node else ()
    met = {way(node): score[node] for node in range(1, len(score)) if np.isfinite(score[node])}
    assert met == pytest.approx(every, abs=1e-5) and len(every) > 60


@pytest.mark.parametrize("gain", [0.0, GAIN])
def test_where_the_table_knows_the_text_nothing_is_rejected(gain):
    """Every round emits a token a level and the bonus, whether rows have learnt or not; also from a text of one token."""
    vocab, limit = 12, 24
    target = random_table(3, vocab)
    greedy = [[start] for start in range(vocab)]
    for text in greedy:
        text.extend(itertools.islice(_following(target, text[0]), limit))
    table = trigrams.counted(greedy, 1 << 14)
    assert all(said(table, a, b) for text in greedy for a, b in itertools.pairwise([NOBODY, *text[:-1]]))
    spec = speculator(
        table_target(), adaptive_drafter(DEPTH, depth=DEPTH, beam=1, gain=gain), verify.greedy, stop_tokens=()
    )
    params = SpecParams(jnp.asarray(target), table)
    state = spec.init(params, prompt_of([text[:1] for text in greedy], limit=limit), (), None, limit + DEPTH + 2)
    state, rounds = jax.jit(lambda state: run(spec.step, lambda stats, info: stats + 1, params, state, 0))(state)
    assert np.asarray(state.tokens[:, : limit + 1]).tolist() == greedy
    assert rounds == limit // (DEPTH + 1)


def _following(target: np.ndarray, token: int):
    while True:
        token = int(target[token].argmax())
        yield token


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_two_rounds_leave_the_targets_law(rule, setting):
    """Summed over every draw: what the rows have learnt in the first round is what drafts in the second."""
    vocab, nodes = 3, LITTLE.num_nodes
    target = random_table(5, vocab)
    p = np.exp(np.asarray(log_probs(jnp.asarray(target)[None], SETTINGS[setting]), np.float64))[0]
    table = trigrams.counted([np.random.default_rng(2).integers(0, vocab, size=9)], 16)
    draws = jax.nn.one_hot(texts(vocab, nodes + 1), vocab)

    def round_of(state):
        draft = propose(table, state)
        verdict = walks(draft, draws)
        law = laws(RULES[rule].law, draft, jnp.log(p)[_window(state, draft)].astype(jnp.float32))
        mass = np.asarray(law, np.float64)[:, np.arange(nodes + 1), texts(vocab, nodes + 1)].prod(-1)
        return draft, verdict, mass

    prompts = texts(vocab, 3)
    state = begin(table, prompts)
    draft, verdict, mass = round_of(state)
    assert len({*map(tuple, np.asarray(draft.parents).tolist())}) > 1 and draft.num_drafted.max() > 0
    each = len(draws)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, each, axis=0), state)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), verdict)
    _, then, second = round_of(commit(repeated, flat))
    emitted, number = np.asarray(flat.tokens), np.asarray(flat.num_emitted)
    later, mass = np.asarray(then.tokens), mass.reshape(-1)
    both = np.zeros((len(mass), each, 2), np.int32)  # the first two tokens of the two rounds
    both[..., 0] = emitted[:, None, 0]
    both[..., 1] = np.where(number[:, None] > 1, emitted[:, None, 1], later[..., 0])
    total = np.zeros((len(prompts), vocab**2))
    row = np.repeat(np.arange(len(prompts)), each)[:, None]
    np.add.at(total, (row, code(both, vocab)), mass[:, None] * second)
    pairs = texts(vocab, 2)
    expected = p[prompts[:, -1:], pairs[:, 0]] * p[pairs[:, 0], pairs[:, 1]]
    np.testing.assert_allclose(total, expected, atol=1e-6)


def _window(state: AdaptiveState, draft: Draft) -> np.ndarray:
    """Tokens of the window's rows `[B, W]`."""
    return np.concatenate([np.asarray(state.last[:, 1:]), np.asarray(draft.tokens)], axis=1)


def test_greedy_equals_plain_decoding_and_tables_spare_rounds():
    """With an empty table, whose rows learn, and with one of the very texts; stops included."""
    plain, ends = [plain_greedy(ids) for ids in PROMPTS], []
    for table in NOTHING, known():
        found = answer(TREE, table)
        assert [each.ids for each in found] == plain
        ends.append(sum(each.counts.num_drafts for each in found))
        assert all(each.counts.num_drafter_calls == 0 for each in found)
    assert sum(map(len, plain)) > ends[0] > ends[1]
    assert any(text[-1] == EOS and len(text) < BUDGET for text in plain)
    assert TREE.programs.chunk._cache_size() == 1


def test_a_row_does_not_see_its_batch_nor_who_had_its_slot():
    counted = lambda own: (own.ids, own.counts.num_drafts, own.counts.accepted_by_position.tolist())
    together = answer(TREE, NOTHING)
    for i in (0, 3):
        again = answer(TREE, NOTHING, [PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)])
        assert counted(again[i]) == counted(together[i])
    assert [counted(own) for own in answer(TREE, NOTHING)] == [counted(own) for own in together]


def test_a_step_preserves_the_type_of_its_state():
    own = adaptive_drafter(NODES, depth=DEPTH, beam=2)
    spec = speculator(table_target(), own, verify.greedy, stop_tokens=())
    params = SpecParams(jnp.asarray(random_table(3, 5)), NOTHING)
    state = spec.init(params, prompt_of([[1, 2], [3, 4]], limit=9), (), None, 32)
    after = jax.eval_shape(spec.step, params, state)[0]
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert types(after) == types(state)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state.drafter))


@pytest.mark.slow
def test_under_gumbel_coupling_text_is_that_of_the_noise_whatever_is_drafted():
    own = engine(adaptive_drafter(NODES, depth=DEPTH, beam=2), verify.gumbel)
    silent = answer(own, NOTHING, temperature=0.4, draft_limit=0)
    table = trigrams.counted(
        [[*ids, *each.ids] for ids, each in zip(PROMPTS, silent, strict=True)], len(NOTHING.bigram)
    )
    found = answer(own, table, temperature=0.4)
    assert sum(each.counts.num_accepted_tokens for each in found) > 0
    assert [each.ids for each in found] == [each.ids for each in silent]


def test_a_tree_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="2 levels need as many"):
        adaptive_drafter(1, depth=2)
    with pytest.raises(ValueError, match="a beam of 25 is wider than two tables"):
        adaptive_drafter(8, depth=2, beam=25)
