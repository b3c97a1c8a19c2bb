"""Every preset is what a command takes, and a variant differs from its origin in what it says and no more."""

from pathlib import Path

import pytest

from decode.settings import Card
from decode.subjects import Roofline
from jaxspec import sharding
from jaxspec.align import LOSSES
from jaxspec.config import Experiment, command_line, load_preset, plain
from jaxspec.published import PUBLISHED

CONFIGS = Path(__file__).parents[1] / "configs"


OTHERS = {"roofline_7b": (Roofline, {"room": 700}), "card_v5e8": (Card, {"pool": "somewhere"})}
EXPERIMENTS = [file for file in sorted(CONFIGS.glob("*.py")) if file.stem not in OTHERS]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_a_preset_is_what_a_command_takes(file):
    taken = []
    command_line(Experiment, lambda experiment: taken.append(experiment), ["--config", str(file), "--out", "somewhere"])
    assert plain(taken[0]) == plain(load_preset(str(file))) | {"out": "somewhere"}
    assert taken[0].align.divergence in LOSSES


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_have_presets_of_their_own(name):
    taken, (config_type, asked) = [], OTHERS[name]
    file, flags = str(CONFIGS / f"{name}.py"), [f"--{flag}={value}" for flag, value in asked.items()]
    command_line(config_type, lambda experiment: taken.append(experiment), ["--config", file, *flags])
    assert plain(taken[0]) == plain(load_preset(file)) | asked


def test_the_rooflines_shapes_are_published():
    assert set(load_preset(str(CONFIGS / "roofline_7b.py")).shapes) <= PUBLISHED.keys()


def test_the_halves_of_a_slice_are_all_of_it_and_divide_the_target():
    own = load_preset(str(CONFIGS / "card_v5e8.py"))
    sizes = [mesh.size for mesh in sharding.sides(own.mesh, own.draft_mesh)]
    assert own.apart and sum(sizes) == 8
    sharding.check(PUBLISHED["meta-llama/Llama-3.1-8B"], sharding.abstract_mesh(own.mesh.data, own.mesh.model))


def test_taskspec_differs_from_the_testbed_in_what_the_paper_does_otherwise():
    own, testbed = (plain(load_preset(str(CONFIGS / f"{name}.py"))) for name in ("taskspec", "testbed_gpu"))
    assert own.keys() == testbed.keys()
    parts = {name: part for name, part in own.items() if isinstance(part, dict)}
    differ = {f"{part}.{name}" for part in parts for name in parts[part] if parts[part][name] != testbed[part][name]}
    assert differ == {
        *("partition.embed", "align.divergence", "align.trunk", "align.specialists", "align.mixed"),
        *("router.fallback_below", "calibrate.lengths"),
    }
    assert {name for name in own.keys() - parts.keys() if own[name] != testbed[name]} == set()
