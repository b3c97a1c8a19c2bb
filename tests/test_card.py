"""What `decode.card` reports: counts that add up, a timeline that follows from them, and a person's mistakes.

On devices of their own the halves of its rounds say what one device says.
"""

import json

import jax
import numpy as np
import pytest

from decode import card
from decode.card import Card, simulated
from jaxspec import pooled, serving, sharding
from jaxspec.config import Mesh, UserError
from jaxspec.requests import Request, room_of
from jaxspec.store.loading import load_pool


def test_the_command_counts_and_simulates(pool, world, tmp_path, capsys):
    out = tmp_path / "card.json"
    asked = {"layers": (1, 3), "layer_nodes": (2,), "limit": 1, "max_new_tokens": 12, "num_speculative_tokens": 2}
    card.run(Card(pool=pool, prompts=str(world.prompts), json=str(out), target_milliseconds=6.0, passes=1, **asked))
    found = json.loads(out.read_text())
    assert found["milliseconds"] == {"target_milliseconds": 6.0, "drafter_milliseconds": "measured"}
    assert [row["layers"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["hit"] + row["partial"] + row["miss"] == pytest.approx(1)
        assert row["tokens"] == pytest.approx(row["rounds"] * row["mean_acceptance_length"])
        assert 0 < row["drafter_calls_a_round"] <= row["layers"]
        assert sum(own["rounds"] for own in row["tasks"].values()) == row["rounds"] and len(row["tasks"]) == 3
        assert row["simulated"]["target_milliseconds"] == 6.0
        assert row["simulated"]["side_by_side"] >= row["simulated"]["in_turn"]
    said = capsys.readouterr().out
    assert "simulated, target call 6.0, drafter call measured" in said and said.count("\n| ") == 6


def answers(pool, slots: int, rule: str, meshes=None) -> list[tuple]:
    """All of nine prompts' answers that must not depend on where they are decoded."""
    engine = pooled.querying(pool, 2, rule, layers=3, width=3, slots=slots, room=room_of(32, 16), meshes=meshes)
    ids = lambda i: tuple(np.random.default_rng(i).integers(8, 400, size=3 + i).tolist())
    settings = lambda i: {"temperature": i % 3 / 2, "top_k": 20} if rule == "rejection" else {}
    asked = [Request(ids=ids(i), max_new_tokens=1 + 2 * i, number=i, route=i % 4 - 1, **settings(i)) for i in range(9)]
    done = engine.complete(asked, serving.given(pool, slots))
    return [(own.ids, own.finish_reason, own.record.tolist(), own.counts.num_accepted_tokens) for own in done]


@pytest.mark.parametrize(
    ("wide", "narrow", "rule"),
    [
        (Mesh(), Mesh(), "greedy"),
        pytest.param(Mesh(), Mesh(data=2), "rejection", marks=pytest.mark.slow),
        pytest.param(Mesh(data=2, model=2), Mesh(data=4), "rejection", marks=pytest.mark.slow),
    ],
    ids=["one and one", "one and two", "four and four"],
)
def test_a_pool_on_devices_of_their_own_says_what_it_says_on_one(pool, loaded, wide, narrow, rule):
    """Tokens, outcomes and counts, also of rows that take a slot that another has left, at a stop or at its budget."""
    slots, meshes = max(wide.data, narrow.data), sharding.sides(wide, narrow)
    found = answers(load_pool(pool, mesh=sharding.asked(wide)), slots, rule, meshes)
    assert found == answers(loaded, slots, rule)
    assert np.sum([own[2] for own in found], axis=(0, 2)).all() and sum(own[3] for own in found) > 0


def test_the_command_runs_and_times_it_so(pool, world, tmp_path, capsys):
    asked = {"layers": (3,), "layer_nodes": (2,), "limit": 1, "max_new_tokens": 12, "num_speculative_tokens": 2}
    asked |= {"pool": pool, "prompts": str(world.prompts), "target_milliseconds": 6.0, "drafter_milliseconds": 2.0}
    found = {}
    for apart in (False, True):
        card.run(Card(**asked, passes=1, apart=apart, json=str(tmp_path / "card.json")))
        found[apart] = json.loads((tmp_path / "card.json").read_text())
    one, two = (own["rows"][0] for own in found.values())
    measured = two.pop("measured")
    assert one.pop("measured") is None and one == two
    assert measured["round_milliseconds"] > 0 and measured["tokens_per_second"] > 0
    device = jax.devices()[0].device_kind
    assert (found[False]["apart"], found[True]["apart"]) == (
        None,
        dict.fromkeys(("target", "drafter"), f"1 x {device}"),
    )
    assert f"measured, target on 1 x {device}, drafter on 1 x {device}" in capsys.readouterr().out


def test_a_round_lasts_as_long_as_the_longer_of_its_calls():
    """Three rounds without a drafter call, two with one, one with four: 10 ms a target call, 4 ms a drafter call."""
    found = simulated(np.array([3, 2, 0, 0, 1]), 12, 10.0, 4.0)
    assert found["side_by_side"] == pytest.approx(1e3 * 12 / (5 * 10 + 16))
    assert found["in_turn"] == pytest.approx(1e3 * 12 / (6 * 10 + 6 * 4))
    assert found["hidden"] == pytest.approx((2 * 4 + 10) / (6 * 4))
    assert found["autoregressive"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": (0,)}, "--layers 0 will not do; give a number from 1 to 64"),
        ({"layer_nodes": (8, 65)}, "--layer-nodes 65 will not do"),
        ({"target_milliseconds": 0.0}, "--target-milliseconds 0.0 will not do; give a number above 0"),
        ({"drafter_milliseconds": -1.0}, "--drafter-milliseconds -1.0 will not do"),
        ({"draft_mesh": Mesh(data=2)}, "--draft-mesh of data=2 x model=1 goes with --apart; add it"),
        ({"apart": True, "mesh": Mesh(model=8)}, "8 devices for the target and 1 for the drafter are 9, 8 are there"),
    ],
)
def test_what_will_not_do_is_told(wrong, said):
    with pytest.raises(UserError, match=said):
        card.run(Card(pool="nowhere", **wrong))
