"""A small pair and what is done with it on any mesh; as a program, one process of several.

python -m tests.fleet HOST:PORT PROCESSES PROCESS FOLDER
"""

import dataclasses
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import align, sharding, verify
from jaxspec.adapters import init_bank
from jaxspec.align import Batch
from jaxspec.drafters import lm_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.generate import Decoder, Request, as_prompt, as_sampling, decoder, slots_of
from jaxspec.store.parts import own_rows, part_file
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, forward, init, unembed
from jaxspec.types import SpecParams

# Eight of everything, so that a mesh of (1, 8) divides it.
TARGET = LMConfig(
    vocab_size=64, width=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, mlp_width=64, max_positions=128,
    tied=False,
)  # fmt: skip
DRAFT = dataclasses.replace(TARGET, width=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=32)
EOS, ROWS, BUDGET, SLOTS = 7, 8, 24, slots_of(32, 24)
ROUTES = np.array([0, 1, 2, -1, 0, 1, 2, -1], np.int32)


class Case(NamedTuple):
    """A way of decoding: its law, its rows' adapters, whether rows sample."""

    law: Any
    banked: bool
    sampled: bool


CASES = {
    "base": Case(verify.greedy, False, False),
    "banked": Case(verify.greedy, True, False),
    "sampled": Case(verify.rejection, True, True),
}


def programs(case: Case) -> Decoder:
    """The case's two programs."""
    return decoder(lm_target(TARGET), lm_drafter(DRAFT, 3), case.law, stop_tokens=(EOS,))


@cache
def weights(banked: bool) -> SpecParams:
    """Random weights whose texts vary, and a bank whose adapters matter."""
    strong = lambda tree: jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, tree)
    drawn = lambda config, seed: strong(jax.jit(init, static_argnums=0)(config, jax.random.key(seed)))
    draft = drawn(DRAFT, 1)
    bank = init_bank(draft, jax.random.key(2), tasks=3, rank=4)
    noise = lambda x: 0.2 * jax.random.normal(jax.random.key(3), x.shape)
    params = LMDrafterParams(draft, jax.tree.map(noise, bank) if banked else None)
    return SpecParams(drawn(TARGET, 0), params)


def requests(case: Case, numbers=range(ROWS)) -> list[Request]:
    """Rows of different lengths; of those that sample, some are greedy and all have top-k and top-p."""
    settings = lambda i: {"temperature": i % 3 / 2, "top_k": 20, "top_p": 0.9} if case.sampled else {}
    ids = lambda i: tuple(np.random.default_rng(i).integers(8, 64, size=3 + i).tolist())
    return [Request(ids=ids(i), max_new_tokens=BUDGET, number=i, **settings(i)) for i in numbers]


def arguments(case: Case, mesh=None, numbers=range(ROWS)) -> tuple:
    """(params, prompt, sampling), placed if there is a mesh."""
    rows = requests(case, numbers)
    routes = np.resize(ROUTES[list(numbers)] if case.banked else -1, ROWS).astype(np.int32)
    prompt = as_prompt(rows, ROWS)._replace(route=routes)
    params, sampling = weights(case.banked), as_sampling(rows, ROWS, TARGET.vocab_size)
    if mesh is None:
        return params, prompt, sampling
    specs = SpecParams(sharding.param_specs(params.target), sharding.param_specs(params.drafter, "drafter"))
    rows_placed = sharding.place((prompt, sampling), sharding.row_specs((prompt, sampling)), mesh)
    return sharding.place(params, specs, mesh), *rows_placed


def answer(case: Case, decoding: Decoder, mesh=None, numbers=range(ROWS)) -> tuple:
    """Tokens, lengths and counts of all rows."""
    params, prompt, sampling = arguments(case, mesh, numbers)
    state, _ = decoding.prefill(params.target, prompt.tokens, prompt.length, SLOTS)
    tokens, length, _, counts, _ = decoding.decode(params, prompt, state, sampling, SLOTS)
    return jax.device_get((tokens, length, counts))


def losses(mesh=None, steps: int = 5) -> list[float]:
    """The loss curve of a full fine-tune of the drafter on random distributions, rows over the mesh."""

    def log_q(frozen, params, tokens, segments, at):
        hidden = forward(DRAFT, params, tokens, segments=segments)
        return jax.nn.log_softmax(unembed(DRAFT, params, jnp.take_along_axis(hidden, at[..., None], 1)), -1)

    own = align.aligner(log_q, align.forward_kl, align.optimiser())
    state, batch = own.init(weights(False).drafter.weights), _batch()
    if mesh is not None:
        state = sharding.place(state, sharding.param_specs(state, "drafter"), mesh)
        batch = sharding.place(batch, sharding.row_specs(batch), mesh)
    step, curve = jax.jit(own.step), []
    for _ in range(steps):
        state, metrics = step((), state, batch, 1e-3)
        curve.append(float(metrics["loss"]))
    return curve


def _batch(width: int = 16, kept: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(0, TARGET.vocab_size, (ROWS, width, *shape), np.int32)
    log_p = np.asarray(jax.nn.log_softmax(rng.normal(size=(ROWS, width, kept + 1)).astype(np.float32), -1))
    at = np.broadcast_to(np.arange(width, dtype=np.int32), (ROWS, width))
    segments = (at >= width // 2).astype(np.int32)
    return Batch(ids(), segments, at.copy(), rng.random((ROWS, width)) < 0.8, ids(), ids(kept), log_p)


def main(address: str, processes: int, process: int, folder: Path) -> None:
    """Takes part in training on all processes' devices, then answers its own rows on its own devices."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    sharding.start(address, processes, process)
    curve = losses(sharding.make_mesh(processes, 2))
    (folder / f"losses-{process}.json").write_text(json.dumps(curve))
    case, own = CASES["base"], own_rows(ROWS, process, processes)
    mesh = sharding.make_mesh(2, 1, jax.local_devices())
    write_lines(part_file(folder / "out.jsonl", process, processes), own, answer(case, programs(case), mesh, own))


def write_lines(file: Path, numbers, answered: tuple) -> None:
    """A line a row: its number and its tokens."""
    tokens, length, _ = answered
    lines = [json.dumps({"id": n, "ids": tokens[i, : length[i]].tolist()}) for i, n in enumerate(numbers)]
    file.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
