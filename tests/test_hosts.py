"""Several processes are one job: trained together as by one, and what each answers for its rows is what one answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from decode import generate
from jaxspec.store.parts import merge, part_file
from jaxspec.store.stages import manifest
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


def kill(job: list[subprocess.Popen]) -> None:
    """SIGKILL in the order given, and their pipes closed."""
    for process in job:
        process.kill()
        process.communicate()


def start(process: int, job: int, argv: list) -> subprocess.Popen:
    """`python -m ...` as SLURM would start it, every host on loopback and with one device."""
    slurm = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": process, "LOCALID": 0}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def answered(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("notice", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_of_two_hosts_goes_on_when_one_of_them_was_killed(pool, tmp_path, notice):
    """In the middle of its records, and it does not wait for the other; the scheduler starts the same command again."""
    prompts = [{"id": str(i), "prompt": f"stir the onion {i}", "temperature": i % 2 * 0.7} for i in range(600)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    files = {"pool": pool, "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "alone.jsonl")}
    generate.run(generate.Generate(**files, max_new_tokens=24, batch=2))
    output = tmp_path / "out.jsonl"
    argv = [
        "decode.generate",
        "--distributed",
        "--pool",
        pool,
        "--input",
        files["input"],
        "--output",
        output,
        "--max-new-tokens",
        24,
        "--batch",
        2,
    ]
    job = [start(process, os.getpid(), argv) for process in range(2)]
    mine, deadline = part_file(output, 1, 2), time.monotonic() + 120
    while answered(mine) == 0 and time.monotonic() < deadline and job[1].poll() is None:
        time.sleep(0.02)
    job[1].send_signal(notice)
    job[1].communicate(timeout=10)
    assert job[1].returncode == (143 if notice == signal.SIGTERM else -notice) and job[0].poll() is None
    assert 0 < answered(mine) < 300 and answered(part_file(output, 0, 2)) < 300 and not output.exists()
    kill(job[:1])
    kept = mine.read_bytes()
    finish([start(process, os.getpid() + 1, argv) for process in range(2)])
    assert mine.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert output.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["data", "model"])
def test_two_hosts_align_as_one_and_go_on_when_one_of_them_was_killed(finished, preset, out_with, split):
    """As near the target as one process comes, to the rounding of sums in another order; one host writes, of weights that both
    have a part of, too."""
    out = out_with("trace", "partition")
    argv = ["train.align", "--config", preset, "--out", out, "--distributed", f"--mesh.{split}", 2]
    job = [start(process, os.getpid() + 2, argv) for process in range(2)]
    deadline = time.monotonic() + 200
    while not list(out.glob("align/checkpoints/*/2")) and time.monotonic() < deadline and job[1].poll() is None:
        time.sleep(0.02)
    kill(job[::-1])
    assert not (out / "align" / "manifest.json").exists()
    finish([start(process, os.getpid() + 3, argv) for process in range(2)])
    one, two = (manifest(str(folder), "align")["results"] for folder in (finished.out, out))
    for course in ("trunk", "bank_lora", "mixed_lora", "mixed_full"):
        np.testing.assert_allclose(two[course]["divergence"], one[course]["divergence"], rtol=1e-3)
    like, bank = (load_file(Path(folder, "align", "bank.safetensors")) for folder in (finished.out, out))
    assert {name: leaf.shape for name, leaf in bank.items()} == {name: leaf.shape for name, leaf in like.items()}
