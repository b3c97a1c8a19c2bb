"""A pool whose target has a published model's shape and cost, and says what it said: real acceptance at real cost.

What drafters have accepted does not depend on what the target costs; which of them, and how many tokens, pay does. So the
target is made where it fits, and its rounds are timed before anything is chosen by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec import plan, pooled, serving, sharding, widening
from jaxspec.config import UserError
from jaxspec.engine import Engine, Method, Routes
from jaxspec.plan import GIB, Load
from jaxspec.requests import Request, checked
from jaxspec.store.facts import calibration, tokens_a_round
from jaxspec.store.families import lengths_of, options
from jaxspec.store.loading import widen
from jaxspec.store.names import drafter_names, measured_names
from jaxspec.store.pool import Pool
from jaxspec.timing import timed

SAMPLE, TOKENS, PASSES = 4, 32, 2  # prompts a slot, tokens of each and passes by which rounds are timed

Way = tuple[str, int]  # a family and a draft length


def name_of(pool: Pool, shape: str) -> str:
    """What tables call the target; `shape` is that of `--widen`, empty for a target as it was read."""
    target = pool.pair.target
    kept = shape and target.config.vocab_size > widening.shape_of(shape).vocab_size
    return Path(target.path).name + (f" widened to {shape}" if shape else "") + (", its own vocabulary" if kept else "")


def widened(pool: Pool, shape: str, load: Load, memory: float | None) -> Pool:
    """The pool with its target widened, once it is known that this load fits.

    Args:
        memory: of a device, in GiB; None asks the device.

    Raises:
        UserError: no such shape, one that does not hold the target, or a load that does not fit.
    """
    limit = plan.device_memory() if memory is None else int(memory * GIB)
    try:
        wide = widening.shape_of(shape)
        config = widening.outline(pool.pair.target.config, wide)
        plan.fit(config, pool.pair.draft.config, load, pool.mesh or sharding.abstract_mesh(1, 1), limit)
        return widen(pool, wide)
    except UserError as error:
        raise UserError(f"--widen {shape}: {error}") from error


def load_of(pool: Pool, requests: Sequence[Request], slots: int, admit_rows: int, num_speculative_tokens: int) -> Load:
    """What measuring these requests needs: the bank, and every drafter merged beside it."""
    facts, lora = pool.facts, pool.facts["specialists"] == "bank_lora"
    return Load(
        batch=slots,
        prompt_tokens=max(len(own.ids) for own in requests),
        max_new_tokens=max(own.max_new_tokens for own in requests),
        num_speculative_tokens=num_speculative_tokens,
        dtype=str(jax.tree.leaves(pool.pair.target.params)[0].dtype),
        tasks=len(pool.tasks),
        rank=facts["rank"] if lora else 0,
        drafters=len(pool.names) + 1,
        prefill_rows=admit_rows,
    )


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises UserError for draft lengths that cannot be timed, or of which none drafts."""
    if lengths and not max(checked("num_speculative_tokens", k) for k in lengths):
        raise UserError(f"--lengths {' '.join(map(str, lengths))}: one of them must be above 0")


def retimed(
    pool: Pool, requests: Sequence[Request], lengths: Sequence[int] = (), rule: str = "greedy", **shape
) -> Pool:
    """The pool with calibration's rounds exchanged for those of the target that it has now, on this device.

    Args:
        lengths: draft lengths to time; none means calibration's.
        shape: `slots`, `room` and what else an `Engine` takes.
    """
    facts, slots = pool.facts, shape["slots"]
    lengths = sorted(set(lengths) or calibration(facts))
    step = max(1, len(requests) // (SAMPLE * slots))
    sample = [replace(own, max_new_tokens=min(own.max_new_tokens, TOKENS)) for own in requests[::step]]
    ways = _one_engine(pool, lengths, rule, shape) if slots == 1 else _engines(pool, lengths, rule, shape)
    rounds = {way: row["round_milliseconds"] for way, row in timed(ways, sample[: SAMPLE * slots], PASSES).items()}
    of = lambda name: {k: own for (family, k), own in rounds.items() if family == name}
    own = _calibration(facts, facts, drafter_names(facts), of(""), slots)
    known: dict[str, Any] = {"calibration_by_slots": {slots: own}}
    if slots == 1:
        known["further"] = {
            name: {**own, "calibration": _calibration(facts, own, list(own["acceptance_length"]), of(name), slots)}
            for name, own in facts["further"].items()
        }
    return replace(pool, facts={**facts, **known})


def _one_engine(
    pool: Pool, lengths: Sequence[int], rule: str, shape: Mapping[str, Any]
) -> dict[Way, tuple[Engine, Method]]:
    """Every family at every length as programs of one engine, which reads prompts with one; see `serving.chosen`."""
    further, among = pool.facts["further"], options(pool.facts)
    families = (("", tuple(lengths)), *((name, lengths_of(name, lengths)) for name in further))
    sizes = [len(measured_names(pool.facts)), *(len(own["acceptance_length"]) for own in further.values())]
    own = serving.chosen(pool, 1, among._replace(families=families, family=np.repeat(np.arange(len(sizes)), sizes)))
    first = dict(zip([name for name, _ in families], np.cumsum([0, *sizes]).tolist(), strict=False))
    engine = pooled.choosing(pool, families, rule, **shape)
    at = lambda name, k: own._replace(route=lambda features: _always(first[name], k, len(features)))
    return {(name, k): (engine, at(name, k)) for name, ks in families for k in ks}


def _always(route: int, num_speculative_tokens: int, rows: int) -> Routes:
    full = lambda value: np.full(rows, value)
    return Routes(full(route), full(0), np.ones(rows), full(num_speculative_tokens))


def _engines(
    pool: Pool, lengths: Sequence[int], rule: str, shape: Mapping[str, Any]
) -> dict[Way, tuple[Engine, Method]]:
    """An engine a length, as several slots share theirs."""
    given = serving.given(pool, shape["slots"])
    return {("", k): (pooled.speculative(pool, k, rule, **shape), given) for k in lengths}


def _calibration(
    facts: Mapping[str, Any], measured: Mapping[str, Any], names: Sequence[str], rounds: Mapping[int, float], slots: int
) -> dict[int, dict[str, float]]:
    """What calibration says of each length; tokens per second are those to expect if the best of these serves each task."""
    share = np.array(facts["sizes"]) / sum(facts["sizes"])
    most = tokens_a_round(measured, names, list(rounds)).max(0)
    seconds = share @ (np.array(list(rounds.values())) / 1e3 / most)
    rate = dict(zip(rounds, (slots / seconds).tolist(), strict=True))
    return {k: {"tokens_per_second": rate[k], "round_milliseconds": own} for k, own in rounds.items()}
