"""Several processes are one job: trained together as by one, and what each answers for its rows is what one answers."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspec.store.parts import merge
from tests import fleet

ROOT = Path(__file__).parents[1]


def launch(folder: Path, processes: int) -> list[subprocess.Popen]:
    """One process a host, all on loopback, each with two fake devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = lambda process: [sys.executable, "-m", "tests.fleet", address, str(processes), str(process), str(folder)]
    return [
        subprocess.Popen(command(process), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for process in range(processes)
    ]


def finish(job: list[subprocess.Popen]) -> None:
    try:
        said = [process.communicate(timeout=300)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    assert [process.returncode for process in job] == [0] * len(job), "\n".join(said)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_and_answer_as_one(tmp_path, processes):
    finish(launch(tmp_path, processes))
    curves = [json.loads((tmp_path / f"losses-{process}.json").read_text()) for process in range(processes)]
    assert all(curve == curves[0] for curve in curves)
    np.testing.assert_allclose(curves[0], fleet.losses(), rtol=128 * np.finfo(np.float32).eps)
    case, output = fleet.CASES["base"], tmp_path / "out.jsonl"
    merge(output, fleet.ROWS, processes)
    fleet.write_lines(tmp_path / "one.jsonl", range(fleet.ROWS), fleet.answer(case, fleet.engine(case)))
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
