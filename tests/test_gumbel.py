"""Under Gumbel coupling the text is a function of the noise: whatever drafts, and however much."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, DRAFT, PARAMS, SMALL, TARGET, answer, engine, programs
from toys import decode, every_setting, prompt_of, random_table, table_drafter, table_target, table_tree

from jaxspec import verify
from jaxspec.adapters import init_bank
from jaxspec.drafters import silent_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.sampling import log_probs, row_key
from jaxspec.speculate import speculator
from jaxspec.transformer import forward, unembed
from jaxspec.types import Sampling, SpecParams

VOCAB, K, ROWS, LIMIT = 6, 3, 40, 20
TABLE, OTHER = random_table(20, VOCAB), random_table(21, VOCAB)
DRAFTERS = {
    "silent": (silent_drafter(K), OTHER),
    "another": (table_drafter(K), OTHER),
    "the target": (table_drafter(K), TABLE),
    "the likeliest": (table_drafter(K, deterministic=True), OTHER),
    "a tree": (table_tree((0, 0, 1)), TABLE),
    "a deep tree": (table_tree((0, 1, 0)), TABLE),
}


def one_at_a_time(table, prompt, sampling):
    """`[B, LIMIT]` autoregressive sampling, each token with the noise of its own position."""

    def follow(last, position):
        log_p = log_probs(jnp.asarray(table)[last], sampling)
        token = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row))(
            prompt.key, log_p
        )
        return token.astype(jnp.int32), token

    start = prompt.tokens.shape[1]
    return jax.lax.scan(follow, prompt.tokens[:, -1], start + jnp.arange(LIMIT))[1].T


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_that_of_autoregressive_sampling_with_the_same_noise(name):
    """Rows of every setting share the batch, and draft 0..K tokens, each its own number."""
    drafter, params = DRAFTERS[name]
    spec = speculator(table_target(), drafter, verify.gumbel, stop_tokens=())
    prompt = prompt_of(np.arange(2 * ROWS).reshape(ROWS, 2) % VOCAB, limit=LIMIT)
    prompt = prompt._replace(draft_limit=jnp.arange(ROWS) % (K + 1))
    sampling = every_setting(ROWS, VOCAB)
    state = decode(spec, TABLE, params, prompt, sampling)
    np.testing.assert_array_equal(state.tokens[:, 2 : 2 + LIMIT], one_at_a_time(TABLE, prompt, sampling))


def kept(rule, rows: int) -> float:
    """How often the first drafted token of a round is kept."""
    spec = speculator(table_target(), table_drafter(1), rule, stop_tokens=())
    params = SpecParams(jnp.asarray(TABLE), jnp.asarray(OTHER))
    state = spec.init(params, prompt_of(np.zeros((rows, 1)), limit=2), (), Sampling(jnp.ones(rows)), 4)
    return float(jax.jit(spec.step)(params, state)[1].num_accepted.mean())


def test_the_rate_of_acceptance_is_that_of_the_coupling(record_property):
    """Rejection keeps 1 - TV. Both pick i where noise i leads by max(log p_j / p_i, log q_j / q_i) over every other j."""
    p, q = (np.exp(np.asarray(log_probs(jnp.asarray(table[:1]), Sampling(np.ones(1)))))[0] for table in (TABLE, OTHER))
    overlap = np.minimum(p, q).sum()
    both = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(VOCAB))
    assert overlap / (2 - overlap) <= both <= overlap
    rows = 8_000
    for name, rate in {"rejection": overlap, "gumbel": both}.items():
        found = kept(getattr(verify, name), rows)
        record_property(name, found)
        assert abs(found - rate) < 4 * np.sqrt(rate * (1 - rate) / rows)


CUT = {"temperature": 0.9, "top_k": 12, "top_p": 0.8}


@cache
def silent(width: int):
    return engine(silent_drafter(width - 1), verify.gumbel, stops=())


def test_text_does_not_depend_on_drafter_route_or_number_drafted():
    """Through one width, on a model with caches."""
    text = lambda program, params, **kwargs: [c.ids for c in answer(program, params, **kwargs, **CUT)]
    expected = text(silent(K + 1), ())
    free = programs(SMALL, K, verify.gumbel, stops=())
    for limit in range(K + 1):
        assert text(free, LMDrafterParams(DRAFT), draft_limit=limit) == expected
    bank = init_bank(DRAFT, jax.random.key(2), tasks=3, rank=2)
    bank = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(3), x.shape), bank)
    for routes in ([2, -1, 0, 1], [0, 0, 2, -1]):
        assert text(free, LMDrafterParams(DRAFT, bank), route=routes) == expected
    assert text(programs(TARGET, K, verify.gumbel, stops=()), LMDrafterParams(PARAMS)) == expected


def could_choose(token, rather_than, logits, settings, key, rounding) -> bool:
    """Whether a push of the size of rounding, to the two logits or to top-p, makes `token` the choice."""
    push = rounding * (np.eye(len(logits))[token] - np.eye(len(logits))[rather_than])
    for nudge in (-rounding, 0.0, rounding):
        full = lambda value, dtype: np.full(1, value, dtype)
        top_k, top_p = settings.get("top_k", len(logits)), settings.get("top_p", 1.0) + nudge
        sampling = Sampling(full(settings["temperature"], np.float32), full(top_k, np.int32), full(top_p, np.float32))
        log_p = log_probs(jnp.asarray(logits + push, jnp.float32)[None], sampling)[0]
        if int(jax.random.categorical(key, log_p)) == token:
            return True
    return False


@jax.jit
def _next(params, text, last):
    return unembed(TARGET, params, forward(TARGET, params, text[None]))[0, last]


def next_logits(ids) -> np.ndarray:
    text = np.zeros(64, np.int32)
    text[: len(ids)] = ids
    return np.asarray(_next(PARAMS, text, len(ids) - 1))


def could_part(number: int, ids, ours: int, theirs: int, step: float) -> bool:
    """Whether both tokens after `ids` are within 16 steps of being chosen, by request `number` of seed 0."""
    logits, key = next_logits(ids), jax.random.fold_in(row_key(0, number), len(ids))
    rounding = 16 * step * np.abs(logits).max()
    choose = lambda token, other: could_choose(token, other, logits, CUT, key, rounding)
    return choose(ours, theirs) and choose(theirs, ours)


MANY = [tuple(np.random.default_rng(i).integers(8, 40, size=3 + i % 9).tolist()) for i in range(48)]
COARSE = 2.0**-9


def coarse_engine():
    """The wide program of a target whose weights are rounded to a step that parts texts, as widths do in bfloat16 on a GPU."""
    rounded = jax.tree.map(
        lambda x: x * (1 + COARSE * jax.random.uniform(jax.random.key(x.size), x.shape, minval=-1)), PARAMS
    )
    return engine(silent_drafter(K), verify.gumbel, stops=(), target=rounded)


@pytest.mark.parametrize(
    ("other", "step", "least"), [(lambda: silent(1), np.finfo(np.float32).eps, 0), (coarse_engine, COARSE, 2)]
)
def test_across_widths_text_parts_only_within_rounding(other, step, least):
    """The wide text is also told from one in which a token was exchanged, so that the law is not empty."""
    wide, narrow = (answer(program, (), MANY, **CUT) for program in (silent(K + 1), other()))
    parted, told = 0, []
    for number, (ids, ours, theirs) in enumerate(zip(MANY, wide, narrow, strict=True)):
        assert len(ours.ids) == BUDGET
        at = next((i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=True)) if a != b), None)
        if at is not None:
            parted += 1
            assert could_part(number, (*ids, *ours.ids[:at]), ours.ids[at], theirs.ids[at], step)
        another = (ours.ids[5] + 1) % TARGET.vocab_size
        if number < 6:
            told.append(not could_part(number, (*ids, *ours.ids[:5]), ours.ids[5], another, step))
    assert parted >= least and sum(told) >= 5
