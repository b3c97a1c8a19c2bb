"""Cost along each axis stands beside a floor that grows as predicted; what is finished is kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import axes, chains, compiled, growth
from decode.axes import Growth
from decode.compiled import Compiling
from decode.subjects import Load, Models, banked, drawn
from jaxspec.config import UserError
from jaxspec.timing import Paced
from tests import fleet

SMALL = {"context": (20, 40), "tasks": (1, 3), "drafted": (0, 2), "vocabulary": (64, 96), "prefill": (32, 64)}
CONFIG = Growth(slots=2, cached=20, rank=2, passes=1, seconds=0.005, bandwidth=1e10, peak=1e11, **SMALL)
TARGET, DRAFT = fleet.TARGET, fleet.DRAFT
COLUMN = [2 * own.num_layers * own.num_kv_heads * own.head_dim * 4 for own in (TARGET, DRAFT)]
ADAPTER = sum(2 * sum(size) * 4 for size in ((16, 16), (16, 8), (16, 8), (16, 16), *[(16, 32)] * 3))
# What the second value adds over the first to the bytes that an iteration of two rows must read, at K = 2: one call of the
# target, two of the drafter.
ADDED = {
    "context": 2 * 20 * (COLUMN[0] + 2 * COLUMN[1]),
    "vocabulary": 32 * 4 * (TARGET.width + 2 * DRAFT.width),
    "tasks": 2 * ADAPTER,
}


@pytest.fixture(scope="module")
def models() -> Models:
    return drawn(TARGET, DRAFT, jnp.dtype("float32"))


@pytest.fixture
def shapes(world) -> dict:
    """Settings of a run on the world's models with random weights."""
    return {"shapes": (str(world.target), str(world.draft)), "dtype": "float32"}


@pytest.fixture
def paces(monkeypatch) -> list:
    """What was timed; nothing is run."""
    timed = []

    def paced(ways, **settings):
        timed.append(settings["most"])
        return {way: Paced(0.5, 0.25, 3) for way in ways}

    monkeypatch.setattr(growth, "paced", paced)
    return timed


@pytest.mark.parametrize("axis", SMALL)
def test_the_least_work_grows_with_its_axis_as_predicted(models, axis):
    few, many = (chain.work for _, chain in axes.points(CONFIG, models, 2, axis))
    assert many.bytes > few.bytes and many.operations >= few.operations
    if axis in ADDED:
        assert many.read - few.read == ADDED[axis]
    if axis == "prefill":
        assert 2 < many.operations / few.operations < 2.5  # every kernel twice, attention more


@pytest.mark.slow
def test_rows_of_a_fresh_bank_draft_as_what_it_belongs_on():
    params = fleet.weights("none").target
    own = banked(Models(TARGET, TARGET, params, params), 2, 3, 2)
    (drafting,) = own.drafters.values()
    assert drafting.routes == (0, 1)
    chain = chains.iterations(own, drafting, Load(context=20, room=80, number=1, bucket=32))
    assert (np.asarray(chain.run(9)) == 20 + 2 * 9).all()


def test_a_run_has_every_axis_and_each_point_its_floor(shapes, paces, tmp_path, capsys):
    out = tmp_path / "growth.json"
    growth.run(dataclasses.replace(CONFIG, **shapes, output=str(out)))
    found = json.loads(out.read_text())
    assert set(found["axes"]) == set(SMALL) and len(paces) == 10
    for axis, own in found["axes"].items():
        assert [row["value"] for row in own["rows"]] == list(SMALL[axis])
        for row in own["rows"]:
            assert row["floor"] == pytest.approx(max(row["bytes"] / 1e10, row["operations"] / 1e11))
    read = found["axes"]["prefill"]["rows"][0]
    assert read["tokens_per_second"] == 32 / 0.5 and read["first_token"] is None
    assert read["flop_utilisation"] == pytest.approx(read["operations"] / 0.5 / 1e11)
    assert capsys.readouterr().out.count("\n|") == 2 + 10


def test_a_killed_run_goes_on_with_what_is_missing(shapes, paces, tmp_path, monkeypatch):
    out = tmp_path / "growth.json"
    config = dataclasses.replace(CONFIG, **shapes, axes=("drafted", "prefill"), output=str(out))
    reading, read = axes.reading, []

    def killed(own, load):
        read.append(load.bucket)
        if len(read) == 2:
            raise KeyboardInterrupt
        return reading(own, load)

    monkeypatch.setattr(axes, "reading", killed)
    with pytest.raises(KeyboardInterrupt):
        growth.run(config)
    first = json.loads(out.read_text())
    assert set(first["axes"]) == {"drafted"} and len(paces) == 3
    growth.run(config)
    second = json.loads(out.read_text())
    assert second["axes"]["drafted"] == first["axes"]["drafted"] and len(paces) == 3 + 2
    growth.run(dataclasses.replace(config, drafted=(0,)))  # other values of an axis are measured anew
    assert len(paces) == 3 + 2 + 1
    with pytest.raises(UserError, match="was measured with slots 2, not 3; choose another file"):
        growth.run(dataclasses.replace(config, slots=3))


def test_with_a_pool_the_first_token_is_timed_through_the_engine(pool, paces, tmp_path):
    out = tmp_path / "growth.json"
    growth.run(dataclasses.replace(CONFIG, pool=pool, axes=("prefill",), prefill=(32,), output=str(out)))
    first = json.loads(out.read_text())["axes"]["prefill"]["rows"][0]["first_token"]
    assert first["seconds"] == pytest.approx(first["prefill"] + first["route"] + first["decode"])  # of one pass
    assert min(first.values()) > 0


@pytest.mark.slow
def test_every_program_of_a_job_has_its_seconds(pool, tmp_path):
    jax.clear_caches()
    compiled.run(Compiling(pool=pool, output=str(tmp_path / "own.json"), slots=2, prompt=20, num_speculative_tokens=2))
    programs = json.loads((tmp_path / "own.json").read_text())["programs"]
    assert programs.keys() == {"prefill, 1 x 32 tokens", "admit, 1 x 32 tokens", "chunk, 2 x 3 tokens", "halt"}
    assert min(programs.values()) > 0


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"compiling in a process of its own failed: .*nowhere.* is not a pool"):
        compiled.twice({"pool": str(tmp_path / "nowhere")})


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(pool):
    found = compiled.twice({"pool": pool, "slots": 2, "prompt": 20, "num_speculative_tokens": 2})
    *programs, whole = found["rows"]
    total = lambda when: sum(row[when] for row in programs)
    assert total("cached") < total("cold") < whole["cold"]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"shapes": ()}, "give either a pool or two shapes"),
        ({"axes": ("compile",)}, "--axes compile needs --pool"),
        ({"drafted": (0, 17)}, "--drafted 17 is out of range; give numbers from 0 to 16"),
        ({"prefill": (100,)}, "--prefill 100 is no size that prompts are padded to"),
        ({"longest": 10}, "--longest 10 leaves no value of --context; give at least 20"),
        ({"output": "nowhere/there.json"}, "its folder does not exist"),
        ({"output": "README.md"}, "README.md"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(shapes, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        growth.run(dataclasses.replace(CONFIG, **{**shapes, **settings}))
