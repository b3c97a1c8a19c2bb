"""A small pair and what is done with it on any mesh; as a program, one process of several.

python -m tests.fleet HOST:PORT PROCESSES PROCESS FOLDER
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import align, sharding, trigrams, verify
from jaxspec.adapters import Stacked, Whole, init_bank, merge, stack, with_base
from jaxspec.align import Batch
from jaxspec.drafters import (
    adaptive_drafter,
    cached_drafter,
    feature_drafter,
    graph_drafter,
    lm_drafter,
    merged_tree_drafter,
    multi_drafter,
    silent_drafter,
    tree_drafter,
)
from jaxspec.drafters.feature import FeatureParams, init_weights, single_layer, tables_of
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.drafters.merged_trees import TwoDrafters
from jaxspec.engine import Engine, Method, unrouted
from jaxspec.requests import Request, room_of
from jaxspec.store.parts import own_rows, part_file
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, forward, init, unembed
from jaxspec.types import ONE_DEVICE, Drafter, SpecParams

# Eight of everything, so that a mesh of (1, 8) divides it.
TARGET = LMConfig(
    vocab_size=64, width=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, mlp_width=64, max_positions=128,
    tied=False,
)  # fmt: skip
DRAFT = dataclasses.replace(TARGET, width=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_width=32)
EOS, ROWS, BUDGET, ROOM = 7, 8, 24, room_of(32, 24)
ROUTES = [0, 1, 2, -1, 0, 1, 2, -1]


class Case(NamedTuple):
    """A way of decoding: its law, its rows' adapters (none, `gathered`, `in pairs`, `side by side` or `whole`; or `features`
    or `trigrams` in place of a language model), whether rows sample."""

    law: Any
    adapters: str
    sampled: bool
    drafted: int = 3
    drafter: Callable[[int], Drafter] = lambda k: lm_drafter(DRAFT, k) if k else silent_drafter(1)


CASES = {
    "base": Case(verify.greedy, "none", False),
    "banked": Case(verify.greedy, "gathered", False),
    "sampled": Case(verify.rejection, "gathered", True),
    "stacked": Case(verify.gumbel, "side by side", True),
    "whole": Case(verify.greedy, "whole", False),
    "several drafts": Case(
        verify.recursive, "gathered", True, drafter=lambda k: multi_drafter(DRAFT, k, 2, "without-replacement")
    ),
    "tree": Case(verify.rejection, "gathered", True, 6, lambda k: tree_drafter(DRAFT, k, depth=3, beam=2)),
    "graph": Case(verify.gumbel, "gathered", True, 6, lambda k: graph_drafter(DRAFT, k, depth=3, beam=2)),
    "merged trees": Case(
        verify.rejection, "in pairs", True, 6, lambda k: merged_tree_drafter(DRAFT, k, depth=3, beam=2)
    ),
    "adaptive": Case(verify.rejection, "trigrams", True, 6, lambda k: adaptive_drafter(k, depth=3, beam=2)),
    "features": Case(verify.rejection, "features", True, drafter=lambda k: feature_drafter(single_layer(TARGET), k)),
    "query and correct": Case(
        verify.rejection, "gathered", True, drafter=lambda k: cached_drafter(DRAFT, k, layers=k + 1, width=16)
    ),
    "silent": Case(verify.greedy, "none", False, drafted=0),
}


def engine(case: Case, mesh=None, **settings) -> Engine:
    """The case's engine, on a mesh if there is one."""
    placement = ONE_DEVICE if mesh is None else sharding.over(mesh)
    params = placement.params(weights(case.adapters)).target
    shape = {"slots": ROWS, "room": ROOM, "vocab_size": TARGET.vocab_size, "admit_rows": ROWS, **settings}
    own = lm_target(TARGET), case.drafter(case.drafted), case.law
    return Engine(*own, params, stop_tokens=(EOS,), placement=placement, **shape)


@cache
def weights(adapters: str) -> SpecParams:
    """Random weights whose texts vary, and a bank whose adapters matter."""
    strong = lambda tree: jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, tree)
    drawn = lambda config, seed: strong(jax.jit(init, static_argnums=0)(config, jax.random.key(seed)))
    if adapters == "trigrams":
        return SpecParams(drawn(TARGET, 0), trigrams.counted(np.random.default_rng(4).integers(8, 64, (1, 4000)), 64))
    draft = drawn(DRAFT, 1)
    bank = init_bank(draft, jax.random.key(2), tasks=3, rank=4)
    noise = lambda x: 0.2 * jax.random.normal(jax.random.key(3), x.shape)
    bank = jax.tree.map(noise, bank)
    ways = {"none": (draft, None), "gathered": (draft, bank), "side by side": (stack(draft, bank), Stacked())}
    whole = Whole(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(merge(draft, bank, task) for task in range(3))))
    ways |= {"whole": (draft, with_base(draft, whole))}
    target, layer = drawn(TARGET, 0), single_layer(TARGET)
    if adapters == "features":
        own = init_weights(layer, "alignment", target, jax.random.key(4))
        return SpecParams(target, FeatureParams(own, tables_of(layer, target)))
    if adapters == "in pairs":
        own = LMDrafterParams(*ways["gathered"])
        return SpecParams(target, TwoDrafters(own, own, jnp.array([[0, 1], [1, -1], [2, 0], [-1, -1]])))
    return SpecParams(target, LMDrafterParams(*ways[adapters]))


def requests(case: Case, numbers=range(ROWS)) -> list[Request]:
    """Rows of different lengths; of those that sample, some are greedy and all have top-k and top-p."""
    settings = lambda i: {"temperature": i % 3 / 2, "top_k": 20, "top_p": 0.9} if case.sampled else {}
    ids = lambda i: tuple(np.random.default_rng(i).integers(8, 64, size=3 + i).tolist())
    route = lambda i: ROUTES[i] if case.adapters not in ("none", "trigrams") else -1
    return [Request(ids=ids(i), max_new_tokens=BUDGET, number=i, route=route(i), **settings(i)) for i in numbers]


def answer(case: Case, own: Engine, mesh=None, numbers=range(ROWS)) -> list[tuple]:
    """Tokens and counts of the rows."""
    own_weights = weights(case.adapters)
    params = own_weights if mesh is None else sharding.over(mesh).params(own_weights)
    method = Method("given", unrouted, lambda routes: params.drafter)
    return [(completion.ids, completion.counts) for completion in own.complete(requests(case, numbers), method)]


def training():
    """The step of a full fine-tune of the drafter, its first state, and a batch of random distributions."""

    def log_q(frozen, params, tokens, segments, at):
        hidden = forward(DRAFT, params, tokens, segments=segments)
        return jax.nn.log_softmax(unembed(DRAFT, params, jnp.take_along_axis(hidden, at[..., None], 1)), -1)

    own = align.aligner(log_q, align.LOSSES["forward_kl"], align.optimiser())
    return own.step, own.init(weights("none").drafter.weights), _batch()


def losses(mesh=None, steps: int = 5) -> list[float]:
    """The loss curve, rows over the mesh's `data`, weights and moments over `model`."""
    step, state, batch = training()
    if mesh is not None:
        state = sharding.place(state, sharding.param_specs(state, sharding.TRAINED), mesh)
        batch = sharding.place(batch, sharding.row_specs(batch), mesh)
    step, curve = jax.jit(step), []
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
    file = part_file(folder / "out.jsonl", process, processes)
    write_lines(file, own, answer(case, engine(case, mesh), mesh, own))


def write_lines(file: Path, numbers, answered: list[tuple]) -> None:
    """A line a row: its number and its tokens."""
    lines = [json.dumps({"id": n, "ids": ids}) for n, (ids, _) in zip(numbers, answered, strict=True)]
    file.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
