"""Every program of a pool is exported for platforms that need not be here.

A program is (name, jitted function, arguments), arguments of abstract shapes; add a line to `table` for a new one.
"""

from functools import cache

import jax
import numpy as np
import pytest
from jax import export

from jaxspec import recording, router, verify
from jaxspec.drafters import ngram_drafter
from jaxspec.requests import as_prompt, as_sampling
from tests import fleet

PLATFORMS = ("tpu", "cuda")


PROGRAMS = ("prefill", "admit", "chunk", "halt")


CASES = {
    **fleet.CASES,
    "looking up": fleet.Case(verify.rejection, "none", True, drafter=ngram_drafter),
    "recorded": fleet.CASES["sampled"],
}
SETTINGS = {"recorded": {"recorder": recording.logprobs(fleet.ROOM)}}


@cache
def table() -> dict[str, tuple]:
    """Name -> (function, arguments), of an engine's programs in each case, and of what else runs on the device."""
    rows = dict(others())
    for name, case in CASES.items():
        own = fleet.engine(case, **SETTINGS.get(name, {}))
        requests = fleet.requests(case)
        params = jax.eval_shape(lambda case=case: fleet.weights(case.adapters))
        prompt = as_prompt(requests, fleet.ROWS, 32, fleet.ROUTES)
        sampling = as_sampling(requests, fleet.ROWS, fleet.TARGET.vocab_size) if case.sampled else None
        read = params.target, prompt.tokens, prompt.length
        state, _, seen = jax.eval_shape(own.programs.prefill, *read)
        slots = jax.eval_shape(own._empty[0], params)
        number = jax.ShapeDtypeStruct((), np.int32)
        arguments = {
            "prefill": read,
            "admit": (
                params,
                slots,
                prompt._replace(features=seen),
                state,
                sampling,
                np.arange(fleet.ROWS, dtype=np.int32),
            ),
            "chunk": (params, slots, number, number),
            "halt": (slots, np.zeros(fleet.ROWS, bool)),
        }
        rows |= {f"{name}: {program}": (getattr(own.programs, program), arguments[program]) for program in PROGRAMS}
    return rows


OTHERS = ("router", "long prompt", "alignment")


def others():
    """The router's probabilities, a prompt read in pieces, and a step of alignment."""
    abstract_of = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    features = jax.ShapeDtypeStruct((fleet.ROWS, fleet.TARGET.width), np.float32)
    yield "router", (jax.jit(router.probabilities), (router.abstract(fleet.TARGET.width, 16, 3), features))
    own, params = fleet.engine(fleet.CASES["base"]), fleet.weights("none").target
    tokens = np.zeros((fleet.ROWS, 2048), np.int32)
    yield "long prompt", (own.programs.prefill, (abstract_of(params), tokens, np.full(fleet.ROWS, 2000, np.int32)))
    step, state, batch = fleet.training()
    yield "alignment", (jax.jit(step), ((), abstract_of(state), batch, np.float32(1e-3)))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", [*OTHERS, *(f"{case}: {program}" for case in CASES for program in PROGRAMS)])
def test_a_program_is_exported(name, platform):
    function, arguments = table()[name]
    exported = export.export(function, platforms=(platform,))(*arguments)
    assert exported.platforms == (platform,)
    assert not any(
        word in exported.mlir_module() for word in ("lapack", "xla_python_cpu_callback", "xla_ffi_python_cpu")
    )
    assert ("stablehlo.while" in exported.mlir_module()) or not name.endswith("chunk")
