"""The laws of expected acceptance: the rule's by enumeration, everything where p is q, greedy's counts near temperature 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import expected, forced, trigrams, verify
from jaxspec.drafters import adaptive_drafter, ngram_drafter
from jaxspec.requests import MAX_DRAFT
from jaxspec.store.recalibration import read_sample
from jaxspec.transformer import forward, unembed


@pytest.fixture(scope="module")
def sample(loaded):
    return read_sample(loaded.path)


@pytest.fixture(scope="module")
def judges(loaded, sample):
    """A judge of all texts by temperature."""
    return {t: expected.Judge(loaded.pair, sample, 48, t) for t in (0.0, 1e-3, 0.7, 1.0)}


def by_the_rule(p, q) -> float:
    """Probability that the shipped rule keeps a draft, over all drafts."""
    kept = [float(verify.one_draft(p, q, jax.nn.one_hot(token, len(q)))[0][0]) for token in range(len(q))]
    return float(np.dot(kept, q))


def test_the_overlap_is_what_the_shipped_rule_keeps_of_all_drafts():
    draw = np.random.default_rng(0)
    for _ in range(20):
        p, q = draw.dirichlet(np.full(5, 0.5), 2).astype(np.float32)
        assert float(expected.overlap(jnp.log(p), jnp.log(q))) == pytest.approx(by_the_rule(p, q), abs=1e-6)


def rounds_from(kept, number: int, place: int = 0) -> float:
    """Expected rounds from a place on, by all that may become of the round that begins there."""
    if place >= len(kept):
        return 0.0
    reach = [1.0, *np.cumprod(kept[place, :number]), 0.0]
    return 1 + sum((reach[n] - reach[n + 1]) * rounds_from(kept, number, place + n + 1) for n in range(number + 1))


def test_expected_rounds_are_those_of_all_outcomes():
    draw = np.random.default_rng(0)
    for end in (1, 2, 6):
        kept = draw.uniform(size=(end, 4)) * (np.arange(end)[:, None] + np.arange(4) < end)
        assert expected.rounds(expected.in_chains(kept)) == pytest.approx(
            [rounds_from(kept, number) for number in range(5)]
        )


def test_certain_rounds_are_those_of_greedy_chains():
    for seed in range(20):
        agrees = np.random.default_rng(seed).random(17) < 0.7
        run, found = forced.agreeing(agrees), expected.rounds(expected.in_chains(expected.along(agrees.astype(float))))
        assert found == pytest.approx([forced.chain(run, k).rounds for k in range(MAX_DRAFT + 1)])


@jax.jit
def _kept(p, q):
    """`by_the_rule` of rows of p and q."""
    drafts = jnp.eye(p.shape[1])
    return jax.vmap(lambda p, q: q @ verify.one_draft(p[None], q[None], drafts)[0][:, 0])(p, q)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_round_of_one_draft_keeps_what_the_rule_keeps_of_whole_distributions(loaded, sample, judges, temperature):
    """Read text by text and without packing, and enumerated at each place."""
    target, draft, weights = loaded.pair.target, loaded.pair.draft, loaded.drafter("mixed")
    found, task = judges[temperature].lengths(weights), int(np.argmax(np.bincount(sample.task)))
    tokens = rounds = 0.0
    for i in sample.of_each(48)[task]:
        ids, begin = sample.texts.tokens[i][None], int(sample.texts.prompt_length[i])
        p, q = (
            jax.nn.softmax(unembed(config, params, forward(config, params, ids), 400)[0, begin - 1 : -1] / temperature)
            for config, params in ((target.config, target.params), (draft.config, weights))
        )
        keep = np.asarray(_kept(p, q))
        tokens, rounds = tokens + len(keep), rounds + rounds_from(keep[:, None], 1)
    assert found[task][1] == pytest.approx(tokens / rounds, rel=1e-4)
    assert 1.0 < found[task][1] < 2.0  # else the law says little


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_target_as_its_own_drafter_loses_nothing(loaded, sample, judges, temperature):
    target = loaded.pair.target
    own = judges[temperature].of(loaded.pair._replace(draft=target)).lengths(target.params)
    for rows, found in zip(sample.of_each(48), own, strict=True):
        ends = [len(sample.texts.tokens[i]) - sample.texts.prompt_length[i] for i in rows]
        for k in (0, 1, 3, MAX_DRAFT):
            assert (found and found[k]) == (
                pytest.approx(sum(ends) / sum(-(-e // (k + 1)) for e in ends)) if rows else None
            )


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_near_temperature_0_they_are_the_counts_of_greedy_rounds(loaded, sample, judges, temperature):
    greedy, own = forced.Judge(loaded.pair, sample, 48), judges[temperature]
    ngram = ngram_drafter(MAX_DRAFT)
    close = lambda found: [row and pytest.approx(row, rel=1e-2 if temperature else 1e-5) for row in found]
    for name in ("base", "mixed", "task 0"):
        assert own.lengths(loaded.drafter(name)) == close(greedy.lengths(loaded.drafter(name)))
    assert own.looked_up(ngram) == close(greedy.looked_up(ngram))
    tables, known = adaptive_drafter(MAX_DRAFT, depth=6), trigrams.counted(sample.texts.tokens[::3], 1 << 10)
    assert own.looked_up(tables, known) == close(greedy.looked_up(tables, known))
    assert judges[1.0].lengths(loaded.drafter("mixed")) != close(greedy.lengths(loaded.drafter("mixed")))


def test_what_is_looked_up_is_kept_with_what_the_target_says_of_it(loaded, sample, judges):
    """A proposal without q is kept with p of it: at K = 1 place by place, from the drafter itself."""
    target, ngram = loaded.pair.target, ngram_drafter(MAX_DRAFT)
    found, task = judges[1.0].looked_up(ngram), int(np.argmax(np.bincount(sample.task)))
    tokens = rounds = 0.0
    for i in sample.of_each(48)[task]:
        ids, begin = sample.texts.tokens[i], int(sample.texts.prompt_length[i])
        length = np.arange(begin, len(ids))
        row = np.broadcast_to(np.pad(ids, (0, 64)), (len(length), len(ids) + 64))
        draft, _ = ngram.propose((), (), jnp.asarray(row), jnp.asarray(length), None, None)
        p = jax.nn.softmax(unembed(target.config, target.params, forward(target.config, target.params, ids[None]))[0])
        kept = np.asarray(p)[length - 1, draft.tokens[:, 0]] * np.asarray(draft.num_drafted > 0)
        tokens, rounds = tokens + len(length), rounds + rounds_from(kept[:, None], 1)
    assert found[task][1] == pytest.approx(tokens / rounds, rel=1e-4)
