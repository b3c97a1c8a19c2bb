"""Completes a file of prompts with a pool: one JSON line a prompt, in the order of the input.

    python -m decode.generate --pool runs/testbed/pool --input prompts.jsonl --output out.jsonl

A killed job goes on where its output ends. A prompt that is too long becomes a record with `error`; the others are
answered all the same, and the exit code is 2.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxspec import serving
from jaxspec.config import UserError, command_line
from jaxspec.generate import MAX_DRAFT, Completion, Decoder, Request, group
from jaxspec.router import BASE
from jaxspec.store.models import decode, encode
from jaxspec.store.pool import Pool, read_pool
from jaxspec.store.prompts import Line, read_prompts

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "drafter")
# What a request's numbers may be: their types, whether a value holds, and how a person says it.
RULES = {
    "max_new_tokens": ((int,), lambda x: x >= 1, "a whole number from 1"),
    "temperature": ((int, float), lambda x: 0 <= x < math.inf, "a number from 0"),
    "top_k": ((int, type(None)), lambda x: x is None or x >= 1, "a whole number from 1"),
    "top_p": ((int, float, type(None)), lambda x: x is None or 0 < x <= 1, "a number above 0 and up to 1"),
    "seed": ((int,), lambda x: 0 <= x < 2**31, "a whole number from 0 to 2147483647"),
}


@dataclass(frozen=True, kw_only=True)
class Generate:
    """A batch job; a line's own settings go before these."""

    pool: str
    """Folder of the pool."""
    input: str
    """Prompts: a .jsonl or .jsonl.gz file or a folder of them."""
    output: str
    """File for the completions."""
    batch: int = 8
    """Prompts decoded together."""
    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample among so many tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens of this mass."""
    seed: int = 0
    """Seed of sampling."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round; None is what calibration chose."""
    dtype: str = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""


def run(config: Generate) -> None:
    """Appends what is missing in the output, window by window; a window that was cut off is decoded as a whole again."""
    if (config.num_speculative_tokens or 1) > MAX_DRAFT:
        raise UserError(
            f"--num-speculative-tokens {config.num_speculative_tokens} is too large; give at most {MAX_DRAFT}"
        )
    lines = read_prompts(config.input)
    done = _resume(Path(config.output), lines)
    pool = read_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype)
    requests = [_request(config, pool, number, line) for number, line in enumerate(lines)]
    forced = [_forced(pool, line) for line in lines]
    sampled = any(isinstance(r, Request) and r.temperature > 0 for r in requests)
    k = config.num_speculative_tokens or pool.facts["num_speculative_tokens"]
    pool = serving.prepared(pool, config.batch * (k + 1))
    programs = serving.speculative(pool, k, sampled=sampled)
    failed = sum(isinstance(r, str) for r in requests)
    with open(config.output, "ab") as out, tqdm(total=len(lines), initial=done, desc="generate", unit="prompt") as bar:
        for rows in _windows(done, len(lines), 8 * config.batch):
            records = _window(config, pool, programs, lines, requests, forced, rows)[max(0, done - rows.start) :]
            out.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            out.flush()
            os.fsync(out.fileno())
            bar.update(len(records))
    print(f"generate: {len(lines) - failed} of {len(lines)} prompts answered in {config.output}")
    if failed:
        first = next((line.source, r) for line, r in zip(lines, requests, strict=True) if isinstance(r, str))
        raise UserError(f"{failed} prompts were not answered, the first at {first[0]}: {first[1]}")


def _resume(output: Path, lines: Sequence[Line]) -> int:
    """How many prompts the output answers already; a torn last line is cut off."""
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it first")
    if not output.exists():
        return 0
    whole = output.read_bytes().split(b"\n")[:-1]
    if len(whole) > len(lines):
        raise UserError(f"{output} has {len(whole)} records for {len(lines)} prompts; it belongs to another input")
    for number, (record, line) in enumerate(zip(whole, lines, strict=False), 1):
        if _id_of(record) != line.id:
            raise UserError(
                f"{output}, line {number} answers another prompt than {line.source}; choose another --output"
            )
    os.truncate(output, sum(len(record) + 1 for record in whole))
    return len(whole)


def _id_of(record: bytes) -> str | None:
    try:
        return json.loads(record).get("id")
    except (ValueError, AttributeError):
        return None


def _request(config: Generate, pool: Pool, number: int, line: Line) -> Request | str:
    """The line's request, or why it cannot be answered."""
    unknown = line.settings.keys() - {*SETTINGS, "cluster"}
    if unknown:
        raise UserError(f"{line.source}: unknown key {sorted(unknown)[0]!r}; a line may have {', '.join(SETTINGS)}")
    own = {name: _setting(config, line, name) for name in RULES}
    if not all(isinstance(stop, str) for stop in _stops(line)):
        raise UserError(f"{line.source}: stop {line.settings['stop']!r} will not do; give a text or a list of texts")
    ids = encode(pool.pair.tokenizer, line)
    room = pool.pair.longest - own["max_new_tokens"]
    if len(ids) > room:
        return f"prompt of {len(ids)} tokens is longer than {room}, the models' positions less max_new_tokens"
    return Request(ids=ids, number=number, **own)


def _setting(config: Generate, line: Line, name: str) -> Any:
    """What the line says, or else the command."""
    value = getattr(config, name) if line.settings.get(name) is None else line.settings[name]
    kinds, holds, wanted = RULES[name]
    if type(value) not in kinds or not holds(value):
        raise UserError(f"{line.source}: {name} {value!r} will not do; give {wanted}")
    return value


def _stops(line: Line) -> list:
    stops = line.settings.get("stop") or []
    return stops if isinstance(stops, list) else [stops]


def _forced(pool: Pool, line: Line) -> int | None:
    """The route that the line asks for; None leaves it to the router."""
    name = line.settings.get("drafter")
    if name is None:
        return None
    if name == "base":
        return BASE
    names = {
        **{label: t for t, label in enumerate(pool.facts["labels"]) if label},
        **{t: i for i, t in enumerate(pool.tasks)},
    }
    if not isinstance(name, str) or name not in names:
        raise UserError(f"{line.source}: no drafter {name!r} in this pool; it has base, {', '.join(map(str, names))}")
    return names[name]


def _windows(done: int, number: int, size: int) -> Iterator[range]:
    """Windows that begin at the same prompts wherever a run was cut off, so that batches and their bits are the same."""
    return (range(at, min(at + size, number)) for at in range(done - done % size, number, size))


def _window(
    config: Generate,
    pool: Pool,
    programs: Decoder,
    lines: Sequence[Line],
    requests: Sequence[Request | str],
    forced: Sequence[int | None],
    rows: range,
) -> list[dict[str, Any]]:
    """Records of some prompts, in their order; batches are made by prompt length."""
    records: dict[int, dict[str, Any]] = {}
    good: list[tuple[int, Request]] = []
    for i in rows:
        request = requests[i]
        if isinstance(request, str):
            records[i] = {"id": lines[i].id, "error": request}
        else:
            good.append((i, request))
    budget = max((r.max_new_tokens for r in requests if isinstance(r, Request)), default=1)
    for part in group([request for _, request in good], config.batch):
        own = [good[j] for j in part]
        confidence = np.ones(len(own))

        def hear(routes, probability, confidence=confidence):
            confidence[:] = probability.max(-1)

        method = serving.overridden(serving.routed(pool, hear), [forced[i] for i, _ in own])
        timed = serving.answer(pool, programs, method, [r for _, r in own], batch=config.batch, budget=budget)
        for at, (i, _) in enumerate(own):
            route = int(timed.route[at])
            sure = None if forced[i] is not None else round(float(confidence[at]), 4)
            records[i] = _record(pool, lines[i], timed.completions[at], route, sure)
    return [records[i] for i in rows]


def _record(pool: Pool, line: Line, completion: Completion, route: int, confidence: float | None) -> dict[str, Any]:
    ids, reason = completion.ids, completion.finish_reason
    text = decode(pool.pair.tokenizer, ids)
    found = [at for stop in _stops(line) if stop and (at := text.find(stop)) >= 0]
    if found:
        text, reason = text[: min(found)], "stop"
        ids = ids[: next(n for n in range(len(ids) + 1) if len(decode(pool.pair.tokenizer, ids[:n])) >= len(text))]
    counts = completion.counts
    return {
        "id": line.id,
        "text": text,
        "token_ids": ids,
        "finish_reason": reason,
        "drafter": "base" if route == BASE else pool.tasks[route],
        "route_confidence": confidence,
        "num_drafts": int(counts.num_drafts),
        "num_draft_tokens": int(counts.num_draft_tokens),
        "num_accepted_tokens": int(counts.num_accepted_tokens),
    }


if __name__ == "__main__":
    command_line(Generate, run)
