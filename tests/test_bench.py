"""The bench's figures: equality holds for every prompt whatever its bucket, and the JSON has the fields that it promises."""

import json

import jax
import numpy as np
import pytest

from decode.bench import Bench, run
from jaxspec import serving
from jaxspec.generate import Request
from jaxspec.store.pool import read_pool
from jaxspec.transformer import NARROW

FIELDS = {
    "prompts", "tokens", "seconds", "prefill_seconds", "decode_seconds", "draft_accuracy", "draft_acceptance_rate",
    "mean_acceptance_length", "acceptance_by_position", "equal_to_autoregressive", "equal_to_fastest_autoregressive",
    "speedup_vs_autoregressive", "speedup_vs_base",
}  # fmt: skip
METHODS = ("autoregressive", "base", "mixed", "routed", "random", "wrong", "oracle")


@pytest.fixture(scope="module")
def bench(pool, tmp_path_factory):
    """Short and long prompts in turn, so that batches by bucket are not in the order of the prompts."""
    folder = tmp_path_factory.mktemp("bench")
    words = "the cat sat on the mat and looked at the moon "
    prompts = [{"id": str(i), "task": "one", "prompt": f"{i} {words * (1 + 2 * (i % 2 == 0))}"} for i in range(6)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    out = folder / "bench.json"
    run(
        Bench(
            pool=str(pool),
            prompts=str(folder / "eval.jsonl"),
            json=str(out),
            methods=METHODS,
            passes=1,
            max_new_tokens=8,
            widths=(1, 2),
            num_speculative_tokens=2,
        )
    )
    return json.loads(out.read_text())


def test_every_method_emits_what_autoregressive_decoding_emits(bench):
    for name in METHODS:
        row = bench["tasks"]["one"][name]
        assert row["equal_to_autoregressive"] == 1.0
        assert row["prompts"] == 6
        assert row["tokens"] == bench["tasks"]["one"]["autoregressive"]["tokens"]


def test_the_json_has_its_fields(bench):
    assert bench["schema"] == 1 and bench["autoregressive_width"] in (1, 2)
    for name in METHODS:
        assert bench["tasks"]["one"][name].keys() == bench["mean"][name].keys() == FIELDS
    assert bench["tasks"]["one"]["autoregressive"]["draft_accuracy"] is None
    assert bench["tasks"]["one"]["autoregressive"]["speedup_vs_autoregressive"] == 1.0
    counts = bench["router"]["confusion"]["counts"]
    assert sum(map(sum, counts)) == 6


def test_a_prepared_pool_gives_the_same_texts_by_every_method(pool):
    """Merged weights, the bank and the control, on plain kernels and on kernels laid out for few rows."""
    plain = read_pool(pool)
    placed = serving.prepared(plain, NARROW)
    assert serving.prepared(plain, NARROW + 1) is plain
    assert (placed.laid_out is not None) == (jax.default_backend() == "cpu")
    program = serving.speculative(plain, 2, sampled=False)
    requests = [Request(ids=(1, 3, 20 + i, 300), max_new_tokens=8, number=i) for i in range(2)]
    for routes in ([-1, -1], [1, 1], [0, 2], None):

        def texts(own, routes=routes):
            given = serving.unrouted(own, "mixed") if routes is None else None
            method = given or serving.given(own, "oracle", lambda: np.array(routes))
            kernel = method.drafter_params(np.array([1, 1])).weights["layers"][0]["mlp"]["up"]["kernel"]
            assert kernel.ndim == (2 if own.laid_out is None else 3)
            return [c.ids for c in serving.answer(own, program, method, requests, batch=2, budget=8).completions]

        assert texts(placed) == texts(plain)
