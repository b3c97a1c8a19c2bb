"""Query and correct: drafted rightly, which verification would hide, and the same on one device and on two.

A drafter that is the target must lose nothing; one that is right now and then is recomputed round by round, its tree as texts.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData, ProfileOptions
from test_decoding import BUDGET, EOS, NEAR, PARAMS, PROMPTS, TARGET, answer, counted, engine, plain_greedy
from toys import prompt_of

from jaxspec import sharding, verify
from jaxspec.apart import apart
from jaxspec.apart_engine import ApartEngine
from jaxspec.candidates import HIT, MISS, PARTIAL
from jaxspec.config import Mesh, UserError
from jaxspec.drafters import cached_drafter
from jaxspec.drafters.cached import outcomes
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Method, unrouted
from jaxspec.requests import Request, room_of
from jaxspec.speculate import speculator
from jaxspec.target import lm_target
from jaxspec.transformer import forward, init, unembed
from jaxspec.types import SpecParams

K, LAYERS, WIDTH = 3, 5, 3
DEPTH = 2 * K + 1
OWN = LMDrafterParams(NEAR)


@cache
def program(layers=LAYERS, rule="greedy"):
    own = cached_drafter(TARGET, K, layers=layers, width=WIDTH)
    return engine(own, verify.RULES[rule], recorder=outcomes(layers))


@pytest.mark.parametrize("layers", [pytest.param(2, marks=pytest.mark.slow), LAYERS])
def test_a_drafter_that_is_the_target_loses_nothing(layers):
    """The first round finds an empty cache; with more layers a round than K all later ones emit K + 1 tokens."""
    for own, ids in zip(answer(program(layers), LMDrafterParams(PARAMS)), PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        emitted, filled, rounds = 0, 0, 0
        while emitted < len(own.ids):
            kept = min(K, filled) + 1
            emitted, filled, rounds = emitted + kept, min(filled + layers, DEPTH) - kept, rounds + 1
        assert own.counts.num_drafts == rounds == own.record[HIT].sum()
        assert (own.counts.accepted_by_position == own.counts.drafted_by_position).all()
        if layers > K:
            assert rounds == 1 + -(-(len(own.ids) - 1) // (K + 1))


@cache
def likeliest(text: tuple[int, ...]) -> list[tuple[float, int]]:
    """What NEAR says follows a text, read from scratch: the best tokens with their log probabilities."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    gains, tokens = _best(NEAR, padded, len(text) - 1)
    return list(zip(gains.tolist(), tokens.tolist(), strict=True))


@jax.jit
def _best(params, text, at):
    logits = unembed(TARGET, params, forward(TARGET, params, text)[:, at])
    return jax.lax.top_k(jax.nn.log_softmax(logits)[0], WIDTH)


class Tree:
    """The candidates of a row, layer after layer, each a path of tokens from the text on and its log probability."""

    def __init__(self, text: tuple[int, ...]):
        self.text, self.layers, self.lead = text, [{(): 0.0}], [()]

    def add(self) -> int:
        """One layer more, if there is room."""
        if len(self.layers) > DEPTH:
            return 0
        *_, last = self.layers
        below = {
            (*path, token): weight + gain
            for path, weight in last.items()
            for gain, token in likeliest(self.text + path)
        }
        heir = None if self.lead[-1] is None else (*self.lead[-1], likeliest(self.text + self.lead[-1])[0][1])
        best = sorted(below, key=lambda path: (path != heir, -below[path]))[:WIDTH]
        self.layers.append({path: below[path] for path in best})
        self.lead.append(heir)
        return 1

    def correct(self, new: tuple[int, ...]) -> int:
        """Goes on with `new`; which outcome that is."""
        number, own = len(new), self.layers
        if number >= len(own) or new not in own[number]:
            self.__init__(self.text + new)
            return MISS
        below = [
            {p[number:]: w - own[number][new] for p, w in one.items() if p[:number] == new} for one in own[number:]
        ]
        deep = sum(map(bool, below)) - 1
        missing = deep < len(below) - 1
        refill = len(below) > 1
        self.text, self.layers = self.text + new, below[: min(deep, max(len(below) - 2, 0)) + 1]
        self.lead = [()]
        for one in self.layers[1:]:
            heirs = {p: likeliest(self.text + p[:-1]) for p in one if p[:-1] == self.lead[-1]}
            rank = lambda p, heirs=heirs: [token for _, token in heirs[p]].index(p[-1])
            self.lead.append(min(heirs, key=rank, default=None))
        if refill:
            self.add()
        return PARTIAL if missing else HIT


def recomputed(ids, out) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Rounds by outcome and layers added, and rounds, drafted and accepted tokens, places past the text's end left out."""
    tree, at, drafted, accepted = Tree(ids), 0, 0, 0
    record = np.zeros((3, LAYERS + 1), int)
    while at < len(out):
        chain = [path[-1] for path in tree.lead[1 : K + 1] if path is not None][: len(out) - at]
        kept = int(np.cumprod([token == own for token, own in zip(chain, out[at:], strict=False)]).sum())
        made = sum([tree.add() for _ in range(LAYERS)])
        new = tuple(out[at : at + kept + 1])
        record[tree.correct(new), made] += 1
        at, drafted, accepted = at + len(new), drafted + len(chain), accepted + kept
    return record, (record.sum(), drafted, accepted)


def test_text_is_plain_decodings_and_every_round_that_of_a_recomputation():
    """So what verdicts leave is what the drafter would say of the new text: paths, weights, caches and refilled layers."""
    total = 0
    for own, ids in zip(answer(program(), OWN), PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        record, counts = recomputed(ids, own.ids)
        np.testing.assert_array_equal(own.record, record)
        assert counted(own.counts) == counts
        assert own.counts.num_drafter_calls == LAYERS * own.counts.num_drafts
        total = total + record
    assert (total.sum(1) > 3).all() and total[:, :LAYERS].sum() > 0
    assert program().programs.chunk._cache_size() == 1


def test_a_row_does_not_see_its_batch_and_drafting_nothing_is_the_same_text():
    said = lambda own: (own.ids, own.record.tolist(), counted(own.counts))
    together = answer(program(), OWN)
    for i in (0, 3):
        again = answer(program(), OWN, [PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)])
        assert said(again[i]) == said(together[i])
    assert [own.ids for own in answer(program(), OWN, draft_limit=0)] == [own.ids for own in together]


@pytest.mark.slow
def test_under_gumbel_coupling_text_is_that_of_the_noise_whatever_is_drafted():
    found, nothing = (answer(program(rule="gumbel"), OWN, temperature=0.1, draft_limit=limit) for limit in (K, 0))
    assert sum(own.counts.num_accepted_tokens for own in found) > 5
    assert [own.ids for own in found] == [own.ids for own in nothing]


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="3 tokens of 0 layers of 8 nodes cannot be"):
        cached_drafter(TARGET, 3, layers=0)


def spans(profile: ProfileData, name: str, rounds: int) -> np.ndarray:
    """`[rounds, 2]` nanoseconds between which a program's operations ran, of which every round has as many."""
    lines = (line for plane in profile.planes for line in plane.lines)
    ran = lambda event: dict(event.stats).get("hlo_module") == f"jit_{name}"
    own = sorted((event.start_ns, event.end_ns) for line in lines for event in line.events if ran(event))
    of_round = np.array(own).reshape(rounds, -1, 2)
    return np.stack([of_round[:, 0, 0], of_round[..., 1].max(1)], axis=1)


@cache
def driver(wide: Mesh, narrow: Mesh, slow: bool = False):
    """The meshes of the target and of the drafter, and a call that decodes all prompts with them; a slow target says else."""
    large = dataclasses.replace(TARGET, mlp_width=1 << 15)
    config, weights = (large, init(large, jax.random.key(0))) if slow else (TARGET, PARAMS)
    drafter, recorder = cached_drafter(TARGET, K, layers=LAYERS, width=WIDTH), outcomes(LAYERS)
    spec = speculator(lm_target(config), drafter, verify.greedy, stop_tokens=(EOS,))
    padded = np.array([np.pad(ids, (0, 14 - len(ids))) for ids in PROMPTS])
    prompt = prompt_of(padded, limit=BUDGET)._replace(length=jnp.array([len(ids) for ids in PROMPTS]))
    params = SpecParams(weights, OWN)
    begin = jax.jit(lambda: spec.init(params, prompt, lm_target(config).init(weights, prompt, 64)[0], None, 64))
    meshes = sharding.sides(wide, narrow, jax.devices("cpu"))
    decode = apart(spec, recorder.fold, target=meshes[0], drafter=meshes[1])
    placed = sharding.apart_params(params, *meshes)
    return meshes, lambda: jax.block_until_ready(decode(placed, begin(), recorder.init(prompt)))


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(Mesh(), Mesh()), pytest.param(Mesh(data=2, model=2), Mesh(data=2), marks=pytest.mark.slow)],
    ids=["one and one", "four and two"],
)
def test_drafter_and_target_on_devices_of_their_own_say_what_one_device_says(wide, narrow, caplog):
    meshes, decode = driver(wide, narrow)
    decode()
    with jax.log_compiles():
        state, record = decode()
    assert "Compiling" not in caplog.text
    for row, ids, own, counts in zip(state.tokens, PROMPTS, answer(program(), OWN), record, strict=True):
        assert row[len(ids) : len(ids) + len(own.ids)].tolist() == own.ids
        np.testing.assert_array_equal(counts, own.record)
    assert [own.devices() for own in (state.tokens, record)] == [set(mesh.devices.flat) for mesh in meshes]


def test_an_engine_on_two_meshes_drafts_with_the_weights_of_each_route():
    """One slot after the other: the programs cut in two give it up and take the next row, with the other weights."""
    drafter, shape = cached_drafter(TARGET, K, layers=LAYERS, width=WIDTH), {"slots": 1, "room": room_of(32, BUDGET)}
    parts = lm_target(TARGET), drafter, verify.greedy, PARAMS
    settings = {"stop_tokens": (EOS,), "vocab_size": TARGET.vocab_size, "recorder": outcomes(LAYERS), **shape}
    own = ApartEngine(*parts, meshes=sharding.sides(Mesh(), Mesh()), **settings)
    ways = OWN, LMDrafterParams(PARAMS)
    asked = [Request(ids=ids, max_new_tokens=BUDGET, number=i, route=i % 2) for i, ids in enumerate(PROMPTS)]
    found = own.complete(asked, Method("given", unrouted, lambda routes: ways[max(int(routes[0]), 0)]))
    one = [answer(program(), params) for params in ways]
    said = lambda done: (done.ids, done.finish_reason, done.record.tolist(), counted(done.counts))
    assert [said(done) for done in found] == [said(one[i % 2][i]) for i in range(len(PROMPTS))]
    assert any(said(one[0][i]) != said(one[1][i]) for i in (1, 3))


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")  # JAX's own, on Python 3.12
def test_drafter_and_target_work_at_once(tmp_path):
    """The profiler's word for it: the target's half of a round had begun and not ended while the drafter's ran."""
    _, decode = driver(Mesh(), Mesh(), slow=True)
    decode()
    options = ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(tmp_path, profiler_options=options):
        _, record = decode()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    rounds = int(record.sum((1, 2)).max()) + 1  # the host learns a round late that all rows have ended
    verify, meanwhile = (spans(ProfileData.from_file(str(trace)), name, rounds) for name in ("verify", "meanwhile"))
    assert ((verify[:, 0] < meanwhile[:, 1]) & (meanwhile[:, 0] < verify[:, 1])).sum() > rounds / 2


def test_devices_that_are_not_there_are_told():
    with pytest.raises(UserError, match="2 devices for the target and 1 for the drafter are 3, 2 are there"):
        sharding.sides(Mesh(model=2), Mesh(), jax.devices("cpu")[:2])
