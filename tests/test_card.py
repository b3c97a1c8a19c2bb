"""What `decode.card` reports: counts that add up, a timeline that follows from them, and a person's mistakes."""

import json

import numpy as np
import pytest

from decode import card
from decode.card import Card, simulated
from jaxspec.config import UserError


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
    ],
)
def test_what_will_not_do_is_told(wrong, said):
    with pytest.raises(UserError, match=said):
        card.run(Card(pool="nowhere", **wrong))
