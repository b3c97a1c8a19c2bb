"""Every preset is what a command takes, and a variant differs from its origin in what it says and no more."""

from pathlib import Path

import pytest

from decode.subjects import Roofline
from jaxspec.align import LOSSES
from jaxspec.config import Experiment, command_line, load_preset, plain
from jaxspec.published import PUBLISHED

CONFIGS = Path(__file__).parents[1] / "configs"


EXPERIMENTS = [file for file in sorted(CONFIGS.glob("*.py")) if file.stem != "roofline_7b"]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_a_preset_is_what_a_command_takes(file):
    taken = []
    command_line(Experiment, lambda experiment: taken.append(experiment), ["--config", str(file), "--out", "somewhere"])
    assert plain(taken[0]) == plain(load_preset(str(file))) | {"out": "somewhere"}
    assert taken[0].align.divergence in LOSSES


def test_the_roofline_has_a_preset_of_its_own():
    taken = []
    file = str(CONFIGS / "roofline_7b.py")
    command_line(Roofline, lambda experiment: taken.append(experiment), ["--config", file, "--room", "700"])
    assert plain(taken[0]) == plain(load_preset(file)) | {"room": 700}
    assert set(taken[0].shapes) <= PUBLISHED.keys()


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
