"""transformers beside a pool: equal texts, target calls counted right on both sides, and what is said without torch."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import pytest
import torch

from decode import peer
from decode.bench import Prepared
from decode.figures import Ask
from decode.methods import Chosen
from decode.rivals import Contender
from decode.settings import Bench
from decode.work import Work, quickest
from jaxspec import pooled, serving
from jaxspec.config import UserError
from jaxspec.engine import Seconds
from jaxspec.requests import Completion, Request
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Line

torch.set_num_threads(1)  # torch's threads spin, and on a shared machine wait for each other

K, BUDGET = 3, 14


@pytest.fixture(scope="module")
def result(pool, world, tmp_path_factory):
    """The command's JSON."""
    out = tmp_path_factory.mktemp("peer") / "peer.json"
    settings = {"passes": 1, "max_new_tokens": BUDGET, "widths": (1,), "num_speculative_tokens": K, "threads": (1,)}
    prompts = {"prompts": str(world.prompts), "limit": 2, "tasks": ("kitchen", "algebra")}
    peer.run(peer.Peer(pool=pool, json=str(out), **prompts, **settings))
    return json.loads(out.read_text())


def test_all_methods_emit_the_same_tokens(result):
    assert set(result["equal"].values()) == {1.0} and result["first_differences_from_generate"] == []
    assert result["tasks"].keys() == {"kitchen", "algebra"}
    for rows in (*result["tasks"].values(), result["mean"]):
        assert rows.keys() == {"autoregressive", "routed", "generate", "assisted"}
        assert len({row["tokens"] for row in rows.values()}) == 1
        assert {row["equal_to_autoregressive"] for row in rows.values()} == {1.0}
        assert {row["equal_to_fastest_autoregressive"] for row in rows.values()} == {1.0}


def test_both_sides_draft_equally_well(result):
    """The same drafter has the same number of target calls to the same text; without one there is a call a token."""
    for rows in result["tasks"].values():
        length = {name: row["mean_acceptance_length"] for name, row in rows.items()}
        assert length["assisted"] == length["routed"] > 1.0
        assert length["generate"] == length["autoregressive"] == 1.0


def test_the_json_says_how_it_was_measured(result):
    assert result["versions"].keys() == {"jax", "torch", "transformers"} and result["torch_threads"] == 1
    assert (result["dtype"], result["batch"], result["num_speculative_tokens"]) == ("float32", 1, K)
    for said, (own, other) in peer.RATIOS.items():
        for task, rows in result["tasks"].items():  # in one pass the ratio is that of the rates
            rate = lambda name, rows=rows: rows[name]["tokens"] / rows[name]["seconds"]
            assert result["ratios"][said][task] == pytest.approx(rate(own) / rate(other))


def knowing(pool: Pool, stop_tokens: tuple[int, ...] = ()) -> Pool:
    """The pool, were its base drafter the target itself, and were these the target's stop tokens."""
    target = dataclasses.replace(pool.pair.target, stop_tokens=stop_tokens)
    return dataclasses.replace(pool, pair=pool.pair._replace(target=target, draft=target))


def both(pool: Pool, k: int) -> list[tuple[Completion, Completion]]:
    """Ours and theirs, with the pool's base drafter."""
    base = pool.names.index("base")
    requests = [Request(ids=(1, 3, 20 + i, 300), max_new_tokens=BUDGET + i, route=base) for i in range(2)]
    method = serving.always(pool, "base", 1)
    theirs = peer.theirs_of(pool, [base], k, "cpu").complete(requests, method)
    return list(zip(pooled.speculative(pool, k, slots=1, room=64).complete(requests, method), theirs, strict=True))


@pytest.mark.parametrize("k", [1, K])
def test_a_drafter_that_is_the_target_loses_nothing_on_either_side(loaded, k):
    """Every round emits K + 1 tokens, the last one what is left; a stop token within a block ends both."""
    free = both(knowing(loaded), k)
    stop = free[0][0].ids[k + 2]
    for ours, theirs in [*free, *both(knowing(loaded, (stop,)), k)]:
        assert theirs.ids == ours.ids and theirs.finish_reason == ours.finish_reason
        assert theirs.counts.num_drafts == ours.counts.num_drafts == -(-len(ours.ids) // (k + 1))
        assert theirs.counts.num_emitted == len(ours.ids)
        assert theirs.counts.num_accepted_tokens == len(ours.ids) - ours.counts.num_drafts
        if theirs.finish_reason == "length":
            assert theirs.counts.num_accepted_tokens == theirs.counts.num_draft_tokens
    assert {ours.finish_reason for ours, _ in free} == {"length"}


def test_drafts_are_counted_by_their_place_in_the_round():
    """A prompt of 10 tokens and a draft of 3, of which 1 is accepted; then a draft of 3, all accepted; then the last token."""
    rounds = peer.Rounds()
    rounds.put(torch.zeros(1, 10))
    for width, emitted in ((13, 2), (4, 4), (1, 1)):
        rounds.see(None, (), {"input_ids": torch.zeros(1, width)})
        rounds.put(torch.zeros(1, emitted))
    found = rounds.counts(10, 17, 3)
    assert (found.num_drafts, found.num_draft_tokens, found.num_accepted_tokens, found.num_emitted) == (3, 6, 4, 7)
    assert found.drafted_by_position.tolist() == [2, 2, 2] and found.accepted_by_position.tolist() == [2, 1, 1]


def test_their_drafter_is_the_one_that_the_prompt_was_routed_to(loaded, monkeypatch):
    """Whatever the order of the batches; only the drafters that some prompt was sent to are loaded."""
    routed_to, loaded_there = [2, -1, 0], []
    reply = lambda request: SimpleNamespace(route=routed_to[request.number])
    router = SimpleNamespace(
        lengths=[K], seconds=Seconds(), complete=lambda requests, method: [reply(own) for own in requests]
    )
    asks = [
        Ask(Line("a", [], None, None, {}, ""), Request(ids=(1,), max_new_tokens=4, number=n), "", -1) for n in range(3)
    ]
    methods = {"routed": Chosen(serving.given(loaded, 1))}
    work = Work(Bench(pool=""), asks, [("", [2]), ("", [0]), ("", [1])], methods)
    monkeypatch.setattr(peer, "theirs_of", lambda pool, routes, k, place: loaded_there.extend(routes))
    contender = Contender("", loaded, ("routed",), asks)
    beside = peer.with_theirs(Prepared([contender], work, {"routed": router}, 1, {}), "cpu")
    assert beside.work.methods["assisted"].routes.tolist() == routed_to and sorted(loaded_there) == [-1, 0, 2]
    assert beside.work.methods["generate"].routes is None


def test_what_is_quickest_is_judged_without_the_first_try():
    tries = {1: iter([1.0, 5.0, 5.0, 5.0]), 2: iter([9.0, 4.0, 9.0, 4.0])}
    assert quickest({number: own.__next__ for number, own in tries.items()}) == 2


def _without_cuda(patch):
    patch.setattr(jax, "default_backend", lambda: "gpu")
    patch.setattr(torch.cuda, "is_available", lambda: False)


REFUSED = {
    "no torch": (lambda patch: patch.setitem(sys.modules, "torch", None), {}, "needs torch, .* install it with"),
    "no CUDA": (lambda patch: _without_cuda(patch), {}, "install torch with CUDA"),
    "TPU": (lambda patch: patch.setattr(jax, "default_backend", lambda: "tpu"), {}, "JAX runs on 'tpu'"),
    "no such task": (lambda patch: None, {"tasks": ("cooking",)}, "no prompt of cooking"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(pool, monkeypatch, name):
    broken, settings, said = REFUSED[name]
    broken(monkeypatch)
    with pytest.raises(UserError, match=said):
        peer.run(peer.Peer(pool=pool, **settings))
