"""A killed command, given again, ends where an undisturbed one ends, and does not do again what was done."""

from pathlib import Path

import numpy as np
import pytest

from jaxspec import training
from jaxspec.config import Experiment, command_line
from jaxspec.store.curves import read_curves
from train import __main__ as pipeline
from train import align, trace

NEVER = -1


def call(module, config_type, *argv):
    command_line(config_type, module.run, argv=[str(word) for word in argv])


def killed(capsys, module, config_type, *argv):
    """Runs a command that is interrupted; it says how to go on."""
    with pytest.raises(SystemExit) as left:
        call(module, config_type, *argv)
    assert left.value.code == 130
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]


def interrupt_call(monkeypatch, module, name: str, number: int) -> list:
    """Makes call `number` of `module.name`, counted from 0, an interrupt; returns the calls that went through."""
    real, calls = getattr(module, name), []

    def counted(*args, **settings):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **settings)

    monkeypatch.setattr(module, name, counted)
    return calls


def state_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with the moment it was written and its place on the disk, which is another once it is replaced."""
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*") if file.is_file()}


def assert_same_shards(folder: Path, expected: Path):
    ours, theirs = (sorted(own.glob("shard-*.npz")) for own in (folder, expected))
    assert [file.name for file in ours] == [file.name for file in theirs]
    for a, b in zip(ours, theirs, strict=True):
        with np.load(a) as left, np.load(b) as right:
            assert {name: (left[name].dtype, left[name].shape, left[name].tobytes()) for name in left.files} == {
                name: (right[name].dtype, right[name].shape, right[name].tobytes()) for name in right.files
            }


def test_a_killed_trace_goes_on_behind_its_shards(finished, preset, tmp_path, monkeypatch, capsys):
    command = trace, Experiment, "--config", preset, "--out", tmp_path
    with monkeypatch.context() as patch:
        interrupt_call(patch, trace, "write_arrays", 1)
        killed(capsys, *command)
    done = state_of(tmp_path)
    assert [file.name for file in done if file.suffix == ".npz"] == ["shard-00000.npz"]
    written = interrupt_call(monkeypatch, trace, "write_arrays", NEVER)
    call(*command)
    expected = Path(finished.out, "trace")
    assert_same_shards(tmp_path / "trace", expected)
    assert len(written) == len(list(expected.glob("*.npz"))) - 1
    shard = tmp_path / "trace" / "shard-00000.npz"
    assert state_of(tmp_path)[shard] == done[shard]
    assert (tmp_path / "trace" / "log.jsonl").read_bytes() == (expected / "log.jsonl").read_bytes()


def test_a_killed_alignment_goes_on_from_its_checkpoints(finished, preset, out_with, monkeypatch, capsys):
    out = out_with("trace", "partition")
    command = align, Experiment, "--config", preset, "--out", out
    calls = []
    for number in (3, 4 + 2 + 3):  # between the checkpoints of the trunk, then of mixed_lora
        with monkeypatch.context() as patch:
            calls.append(interrupt_call(patch, training, "schedule", number))
            killed(capsys, *command)
    calls.append(interrupt_call(monkeypatch, training, "schedule", NEVER))
    call(*command)
    assert [own[0][:2] for own in calls] == [(0, 6), (2, 6), (2, 12)]  # a checkpoint every second step
    for name in ("bank.safetensors", "mixed.safetensors", "trunk.safetensors"):
        assert (out / "align" / name).read_bytes() == Path(finished.out, "align", name).read_bytes()
    found, expected = (read_curves(Path(folder, "align", "metrics.jsonl")) for folder in (out, finished.out))
    assert found == expected and all("held" in own for own in found.values())


def test_a_finished_pipeline_is_left_alone(preset, out_with, capsys):
    out = out_with("trace", "partition", "align", "router", "pool")
    before = state_of(out)
    call(pipeline, Experiment, "--config", preset, "--out", out)
    assert state_of(out) == before
    assert capsys.readouterr().out.count("complete in") == 5
