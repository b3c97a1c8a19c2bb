"""How far from the optimum the rules for several drafts of one token are, along the target's own texts.

    python -m decode.optimal --pool runs/testbed/pool --prompts ../shared/data/eval --limit 2 --drafts 2 4 --json optimal.json

At every place of a text that the target wrote the probability that the next token is one of the drafts is summed over drafts
and draws, and beside it stands the most that any rule could accept of drafts of that scheme. Nothing is drawn but the
rejected drafts on which the later ones depend where draws are without replacement; there the mean of several is taken.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from decode.bench import Prepared, prepare
from decode.settings import Bench
from jaxspec.config import UserError, command_line
from jaxspec.multidraft import SCHEMES, optimal_acceptance
from jaxspec.pooled import SEVERAL
from jaxspec.requests import bucket_of
from jaxspec.sampling import draw, log_probs
from jaxspec.store.pool import Pool
from jaxspec.store.stages import write_json
from jaxspec.transformer import LMConfig, forward, unembed
from jaxspec.types import Sampling
from jaxspec.verify import k_seq_factor, one_draft

AT_ONCE = 16  # places


@dataclass(frozen=True, kw_only=True)
class Optimal:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts whose texts the target writes; without it the pool's own test split."""
    limit: int = 2
    """First prompts taken of each task."""
    drafts: tuple[int, ...] = (2, 4)
    """Numbers of drafts."""
    temperature: tuple[float, ...] = (0.3, 0.7, 1.0)
    """Temperatures at which texts are written, drafted and verified."""
    draws: int = 16
    """Sets of rejected drafts at every place, for draws without replacement."""
    max_new_tokens: int = 64
    """Places of a text that are looked at, at most."""
    seed: int = 0
    """Seed of texts and drafts."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    json: str = ""
    """File for the figures."""


class Text(NamedTuple):
    """A task's prompt with what the target wrote at a temperature, the prompt's length and who drafted, by route."""

    task: str
    ids: tuple[int, ...]
    begin: int
    route: int


def run(config: Optimal) -> None:
    """Prints the table and writes the JSON."""
    _check(config)
    asked = {"pool": config.pool, "prompts": config.prompts, "limit": config.limit, "seed": config.seed}
    asked |= {"dtype": config.dtype, "target": config.target, "draft": config.draft}
    settings = {"methods": ("routed",), "temperature": 1.0, "widths": (1,), "max_new_tokens": config.max_new_tokens}
    prepared = prepare(Bench(**asked, **settings))
    pool = prepared.contenders[0].pool
    rows = []
    for temperature in config.temperature:
        texts = list(_texts(prepared, temperature))
        for name in ("base", "routed"):
            rows += _measured(config, pool, texts, temperature, name)
    _print(rows)
    if config.json:
        write_json(Path(config.json), {"pool": config.pool, "draws": config.draws, "limit": config.limit, "rows": rows})


def acceptances(log_p: Array, log_q: Array, key: Array, *, number: int, draws: int) -> dict[str, Array]:
    """At one place: what one draft has accepted, what each of `pooled.SEVERAL` has, and the optimum of every scheme.

    Args:
        log_p, log_q: `[V]` of target and drafter.
        draws: sets of rejected drafts, for `recursive`.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    optima = {f"optimum {scheme}": optimal_acceptance(p, q, number, scheme) for scheme in SCHEMES}
    without = jax.vmap(partial(_recursive, p, log_q, number))(jax.random.split(key, draws))
    return optima | {
        "one draft": jnp.minimum(p, q).sum(),
        "greedy-drafts": optima["optimum greedy-drafts"],  # which is how that formula is found
        "recursive": without.mean(),
        "recursive-with-replacement": _recursive(p, log_q, number, None),
        "k-seq": _in_sequence(p, q, number),
    }


def _recursive(p: Array, log_q: Array, number: int, key: Array | None) -> Array:
    """1 - the product of what each draft's overlap with the residual leaves; no key: with replacement.

    Without, each draft is drawn from what the rejected ones leave, which are drawn from q where it exceeds the residual.
    """
    residual, left, fails = p, log_q, jnp.ones(())
    for step in range(number):
        q = jnp.exp(left)
        fails *= 1 - jnp.minimum(residual, q).sum()
        if key is not None:
            rejected = draw(jax.random.fold_in(key, step), jnp.log(jnp.maximum(q - residual, 0.0)))
            left = jax.nn.log_softmax(jnp.where(jnp.arange(len(p)) == rejected, -jnp.inf, left))
        residual = one_draft(residual, q, jnp.zeros_like(p))[1]
    return 1 - fails


def _in_sequence(p: Array, q: Array, number: int) -> Array:
    rho = k_seq_factor(p, q, jnp.full(1, number))
    return 1 - (1 - jnp.minimum(q, p / rho).sum()) ** number


def _check(config: Optimal) -> None:
    for name, values, holds, wanted in (
        ("drafts", config.drafts, lambda n: 1 <= n <= 16, "whole numbers from 1 to 16"),
        ("temperature", config.temperature, lambda t: t > 0, "numbers above 0"),
        ("draws", (config.draws,), lambda n: n >= 1, "a number from 1 on"),
    ):
        if not values or not all(map(holds, values)):
            raise UserError(f"--{name} {' '.join(map(str, values))} will not do; give {wanted}")


def _texts(prepared: Prepared, temperature: float) -> Iterator[Text]:
    work, engine = prepared.work, prepared.engines["routed"]
    for task, rows in work.batches:
        done = work.decode(engine, "routed", rows, temperature=temperature).completions
        for i, completion in zip(rows, done, strict=True):
            ids = work.asks[i].request.ids
            yield Text(task, (*ids, *completion.ids), len(ids), completion.route)


def _measured(config: Optimal, pool: Pool, texts: Sequence[Text], temperature: float, name: str) -> list[dict]:
    """A row for every number of drafts: means over places, then prompts, then tasks."""
    longest = bucket_of(max(len(text.ids) for text in texts))
    settings = {"vocab_size": pool.pair.vocab_size, "room": config.max_new_tokens}
    settings |= {"numbers": config.drafts, "draws": config.draws}
    by_task: dict[str, list[dict]] = defaultdict(list)
    for i, text in enumerate(tqdm(texts, desc=f"{name} at temperature {temperature}", leave=False)):
        weights = pool.weights(text.route) if name == "routed" else pool.drafter(name)
        tokens = np.pad(np.array(text.ids, np.int32), (0, longest - len(text.ids)))[None]
        heat, key = np.full(1, temperature, np.float32), jax.random.fold_in(jax.random.key(config.seed), i)
        models = pool.pair.target.config, pool.pair.draft.config, pool.pair.target.params, weights
        found = _along(*models, tokens, text.begin, heat, key, **settings)
        real = len(text.ids) - text.begin
        by_task[text.task].append(jax.tree.map(lambda own, real=real: float(np.mean(own[:real])), found))
    mean = lambda rows: jax.tree.map(lambda *values: float(np.mean(values)), *rows)
    tasks = {task: mean(rows) for task, rows in by_task.items()}
    of_all, row = mean([*tasks.values()]), {"drafter": name, "temperature": temperature}
    of = lambda n: {"mean": of_all[n], "tasks": {task: own[n] for task, own in tasks.items()}}
    return [{**row, "drafts": n, **of(n)} for n in config.drafts]


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("vocab_size", "room", "numbers", "draws"))
def _along(
    target: LMConfig,
    draft: LMConfig,
    params: dict,
    weights: dict,
    tokens: Array,
    begin: Array,
    temperature: Array,
    key: Array,
    *,
    vocab_size: int,
    room: int,
    numbers: tuple[int, ...],
    draws: int,
) -> dict[int, dict[str, Array]]:
    """`acceptances` of the `room` places from `begin` on of a text `[1, L]`, by number of drafts."""
    at = jnp.minimum(begin - 1 + jnp.arange(room), tokens.shape[1] - 1)
    say = lambda config, own: unembed(config, own, forward(config, own, tokens)[:, at], vocab_size)
    sampling = Sampling(temperature)
    both = (log_probs(say(*model), sampling)[0] for model in ((target, params), (draft, weights)))
    one = lambda place: {n: acceptances(*place, number=n, draws=draws) for n in numbers}
    return jax.lax.map(one, (*both, jax.random.split(key, room)), batch_size=AT_ONCE)


def _print(rows: list[dict]) -> None:
    """What is accepted of the drafts of a place, the optimum of each scheme, and in brackets what a rule lacks of it."""
    columns = [*SEVERAL, *(f"optimum {scheme}" for scheme in SCHEMES)]
    print(f"| drafter | temperature | drafts | one draft | {' | '.join(columns)} |")
    print("|---|" + "---:|" * (3 + len(columns)))
    for row in rows:
        mean = row["mean"]
        lacks = {way: mean[f"optimum {scheme}"] - mean[way] for way, (scheme, _) in SEVERAL.items()}
        cells = [f"{mean[name]:.4f}" + (f" ({lacks[name]:.4f})" if name in lacks else "") for name in columns]
        said = row["drafter"], row["temperature"], row["drafts"], f"{mean['one draft']:.4f}", *cells
        print(f"| {' | '.join(map(str, said))} |")


if __name__ == "__main__":
    command_line(Optimal, run)
