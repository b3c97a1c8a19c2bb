"""A pool beside transformers: same target, same merged drafters, same K, greedy, one prompt at a time, in one process.

    python -m decode.peer --pool runs/testbed/pool --prompts ../shared/data/eval --limit 4 --num-speculative-tokens 4

`autoregressive` and `routed` are the pool's, measured as `decode.bench` does; `generate` is transformers' greedy decoding with
its cache, and `assisted` its assisted generation with the drafter to which the router sent the prompt, written as by
`decode.export --to hf`, with a constant K and no confidence threshold. The four take turns prompt by prompt, never two at
once. transformers is told the routes, so that routing is in the time of `routed` alone, and has the number of threads that it
is fastest with; a rate is of a method's own tokens.
It runs where JAX does, on the CPU or on a GPU that torch sees too. JAX takes most of a GPU's memory for itself unless
XLA_PYTHON_CLIENT_PREALLOCATE says otherwise, which this command sets to false where it is not set.
"""

import importlib.metadata
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from decode.bench import Prepared, measure, prepare
from decode.export import write_drafter
from decode.figures import Pass, first_differences, speedups
from decode.methods import Chosen
from decode.settings import Bench
from decode.work import quickest
from jaxspec.config import UserError, command_line
from jaxspec.engine import Method, Seconds, unrouted
from jaxspec.metrics import Counts, counts
from jaxspec.requests import Completion, Request
from jaxspec.router import TRUNK
from jaxspec.store.facts import draft_length
from jaxspec.store.pool import Pool
from jaxspec.store.stages import write_json

OURS, THEIRS = ("autoregressive", "routed"), ("generate", "assisted")
RATIOS = {"routed / assisted": ("routed", "assisted"), "routed / autoregressive": ("routed", "autoregressive")}
TRIED = 8  # tokens of each prompt by which torch's numbers of threads are judged
PLACES = {"cpu": "cpu", "gpu": "cuda"}
"""JAX's name of a backend, and torch's of the device that it is."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What is measured, and how."""

    pool: str
    """Folder of the pool."""
    prompts: str = ""
    """Prompts to decode; without it the pool's own test split."""
    include: tuple[str, ...] = ()
    """Files of the prompts folder, named without suffix; none means those that the pool was trained on."""
    tasks: tuple[str, ...] = ()
    """Tasks whose prompts are taken, by their labels; none means all."""
    limit: int | None = 4
    """First prompts taken of each task."""
    json: str = ""
    """File for the results."""
    smallest_bucket: int = 32
    """Prompts of the pool's methods are padded to at least so many tokens; a large value means fewer programs to compile."""
    passes: int = 3
    """Timed passes over all prompts."""
    max_new_tokens: int = 96
    """Longest completion, in tokens."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round on both sides; None is what calibration chose."""
    widths: tuple[int, ...] = (1, 2, 4, 8)
    """Widths at which the pool's autoregressive decoding is tried; the fastest is timed."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16, on both sides; empty is what the pool was made with."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    threads: tuple[int, ...] = ()
    """Numbers of torch's threads that are tried; the fastest is timed. None means one, and as many as there are cores."""


def run(config: Peer) -> None:
    """Prints the table and writes the JSON."""
    place = _place()
    settings = dict(vars(config))
    threads = settings.pop("threads")
    beside = with_theirs(prepare(Bench(methods=OURS, **settings)), place)
    _set_threads(beside, threads or tuple({1, cores()}))
    bench, passes = measure(beside)
    result = {**bench, **_compared(beside, passes)}
    _print(result)
    if config.json:
        write_json(Path(config.json), result)


class Transformers:
    """transformers behind the face of an engine of one slot, greedy.

    A request that names a route is decoded with that route's assistant, one that names none, or may draft nothing, without.

    Args:
        target, assistants: models of transformers, the assistants by route.
        num_speculative_tokens: drafted a round, always so many.
        stop_tokens: end a completion.
    """

    def __init__(
        self, target: Any, assistants: Mapping[int, Any], num_speculative_tokens: int, stop_tokens: Sequence[int]
    ):
        from transformers import GenerationConfig

        self.target, self.assistants, self.lengths = target, assistants, [num_speculative_tokens]
        self.seconds, self.stop_tokens = Seconds(), stop_tokens
        ends: dict[str, Any] = {"eos_token_id": list(stop_tokens) or None, "pad_token_id": next(iter(stop_tokens), 0)}
        # A folder's own settings, such as a penalty on repetition, would change the text.
        self.target.generation_config = GenerationConfig(do_sample=False, use_cache=True, **ends)
        for model in assistants.values():
            model.generation_config = GenerationConfig(
                num_assistant_tokens=num_speculative_tokens,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )

    def complete(self, requests: Sequence[Request], method: Method) -> list[Completion]:
        """Completions one after another; `self.seconds` tells what they took, prompts read within `decode`."""
        del method
        self.seconds = Seconds()
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        route = TRUNK if request.route is None else request.route
        assistant = None if request.route is None or request.draft_limit == 0 else self.assistants[route]
        rounds, begin = Rounds(), len(request.ids)
        watch = self.target.register_forward_pre_hook(rounds.see, with_kwargs=True)
        start = time.perf_counter()
        ids = self._generate(request, assistant, rounds)
        self.seconds = Seconds(decode=self.seconds.decode + time.perf_counter() - start)
        watch.remove()
        (k,) = self.lengths
        return Completion(
            ids=ids,
            finish_reason="stop" if ids[-1] in self.stop_tokens else "length",
            counts=rounds.counts(begin, begin + len(ids), k),
            route=route,
            num_speculative_tokens=k if assistant else 0,
            task=TRUNK,
            confidence=1.0,
            features=np.zeros(0),
            record=(),
        )

    def _generate(self, request: Request, assistant: Any, rounds: "Rounds") -> list[int]:
        import torch

        ids = torch.tensor([request.ids], device=self.target.device)
        out = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            assistant_model=assistant,
            streamer=rounds,
        )
        return out[0, len(request.ids) :].tolist()


class Rounds:
    """What a call of `generate` did in each target call, as a streamer and a hook of the target are told it."""

    def __init__(self):
        self.widths: list[int] = []
        self.pieces: list[int] = []

    def see(self, module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A target call begins: the tokens that it reads."""
        self.widths.append(kwargs["input_ids"].shape[1])

    def put(self, value: Any) -> None:
        """First the prompt, then what each target call emitted."""
        self.pieces.append(value.numel())

    def end(self) -> None:
        """A streamer's; nothing is left over."""

    def counts(self, begin: int, end: int, num_nodes: int) -> Counts:
        """Of a completion in the places from `begin` to `end`, with at most `num_nodes` tokens drafted a round.

        The first call reads the prompt and a draft, later ones a token and a draft; of what was emitted all but the last
        token was drafted.
        """
        emitted = np.array(self.pieces[1:])
        drafted = np.array(self.widths) - [begin, *[1] * (len(self.widths) - 1)]
        blocks = np.stack([begin + np.cumsum(emitted) - emitted, drafted, emitted - 1], axis=1)
        found = counts(len(blocks), blocks, begin, end, num_nodes, num_nodes=0, num_calls=0)
        return found._replace(num_verified_nodes=drafted.sum(), num_drafter_calls=drafted.sum())


def _place() -> str:
    """torch's name of the device that JAX runs on; UserError where it has none."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "decode.peer needs torch, which is not installed; install it with `pip install -e '.[test]'`"
        ) from error
    backend = jax.default_backend()
    if backend not in PLACES:
        raise UserError(f"decode.peer compares on a CPU or a GPU, JAX runs on {backend!r}; set JAX_PLATFORMS=cpu")
    if backend == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on a GPU that torch {torch.__version__} does not see; install torch with CUDA, "
            "or set JAX_PLATFORMS=cpu"
        )
    return PLACES[backend]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_theirs(prepared: Prepared, place: str) -> Prepared:
    """transformers' methods beside the pool's."""
    pool, work = prepared.contenders[0].pool, prepared.work
    routes = np.full(len(work.asks), TRUNK)
    for _, rows in work.batches:
        done = work.decode(prepared.engines["routed"], "routed", rows, max_new_tokens=1).completions
        routes[rows] = [completion.route for completion in done]
    theirs = theirs_of(pool, np.unique(routes).tolist(), prepared.work.config.num_speculative_tokens, place)
    nobody = lambda name: Method(name, unrouted, lambda routes: ())
    methods = {"generate": Chosen(nobody("generate")), "assisted": Chosen(nobody("assisted"), routes)}
    work = work._replace(methods={**work.methods, **methods})
    return prepared._replace(work=work, engines={**prepared.engines, **dict.fromkeys(THEIRS, theirs)})


def _set_threads(prepared: Prepared, numbers: Sequence[int]) -> None:
    """Gives torch the number of threads with which a few tokens of a few prompts take the least, by both of its methods.

    On a busy machine one thread may be several times as fast as one a core: threads that wait for each other lose their turns.
    """
    import torch

    def seconds(number: int) -> float:
        torch.set_num_threads(number)
        once = lambda name, rows: work.decode(prepared.engines[name], name, rows, max_new_tokens=TRIED)
        return sum(sum(once(name, rows).seconds) for name, rows in itertools.product(THEIRS, work.sample))

    work = prepared.work
    best = quickest({n: partial(seconds, n) for n in numbers}) if len(numbers) > 1 else numbers[0]
    torch.set_num_threads(best)


def theirs_of(pool: Pool, routes: Iterable[int], num_speculative_tokens: int | None, place: str) -> Transformers:
    """The pool's target and the merged drafters of routes, loaded by transformers onto torch's device `place`."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = jax.tree.leaves(pool.pair.target.params)[0].dtype

    def load(path: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind.name))
        return model.to(place).eval()

    target, assistants = load(pool.pair.target.path), {}
    with tempfile.TemporaryDirectory() as folder:
        for route in routes:
            write_drafter(Path(folder, str(route)), pool, pool.names[route])
            assistants[route] = load(str(Path(folder, str(route))))
            # transformers takes a drafter whose vocabulary is padded further for one of another tokenizer.
            assistants[route].resize_token_embeddings(pool.pair.vocab_size, mean_resizing=False)
    k = draft_length(pool.facts, num_speculative_tokens, least=1)
    return Transformers(target, assistants, k, pool.pair.stop_tokens)


def _compared(prepared: Prepared, passes: Sequence[Pass]) -> dict:
    """Rates and ratios by task, where texts part from transformers', and what ran."""
    import torch

    asks, pool = prepared.work.asks, prepared.contenders[0].pool
    ratios = {said: speedups(asks, passes, *names) for said, names in RATIOS.items()}
    texts = {name: {i: own.ids for i, own in _completions(passes[-1], name)} for name in (*OURS, *THEIRS)}
    same = lambda a, b: float(np.mean([texts[a][i] == texts[b][i] for i in texts[a]]))
    return {
        "ratios": {said: {**own, "mean": float(np.mean([*own.values()]))} for said, own in ratios.items()},
        "equal": {f"{a}, {b}": same(a, b) for a, b in (("routed", "assisted"), ("autoregressive", "generate"))},
        "first_differences_from_generate": first_differences(pool, asks, texts["autoregressive"], texts["generate"]),
        "torch_threads": torch.get_num_threads(),
        "cores": cores(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")},
    }


def _completions(results: Pass, name: str) -> Iterable[tuple[int, Completion]]:
    return (pair for result in results[name] for pair in zip(result.rows, result.completions, strict=True))


def _print(result: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    said = f"{result['device']}, {result['dtype']}, batch 1, greedy, K = {result['num_speculative_tokens']}"
    print(f"{said}, {versions}, torch's threads {result['torch_threads']} of {result['cores']} cores")
    names = [*OURS, *THEIRS]
    calls = ("routed", "assisted")
    print(
        "| task | " + " | ".join(f"{name}, tokens/s" for name in names) + " | " + " | ".join(RATIOS) + " | "
        "tokens a target call, " + " | ".join(calls) + " |"
    )
    print("|---|" + "---:|" * (len(names) + len(RATIOS) + len(calls)))
    for task, rows in [*result["tasks"].items(), ("mean", result["mean"])]:
        cells = [f"{rows[name]['tokens'] / rows[name]['seconds']:.1f}" for name in names]
        cells += [f"{result['ratios'][said][task]:.2f}" for said in RATIOS]
        cells += [f"{rows[name]['mean_acceptance_length']:.2f}" for name in calls]
        print(f"| {task} | " + " | ".join(cells) + " |")
    print("texts equal: " + "; ".join(f"{pair} {share:.3f}" for pair, share in result["equal"].items()))
    gaps = [own["gap"] for own in result["first_differences_from_generate"] if own["gap"] is not None]
    if gaps:
        print(
            f"where autoregressive and generate part, their logits are at most {max(gaps):.1f} steps of bfloat16 apart"
        )


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    command_line(Peer, run)
