"""Every program of a pool is exported for platforms that need not be here.

A program is (name, jitted function, arguments), arguments of abstract shapes; add a line to `table` for a new one.
"""

from functools import cache

import jax
import numpy as np
import pytest
from jax import export

from jaxspec.requests import as_prompt, as_sampling
from tests import fleet

PLATFORMS = ("tpu", "cuda")


PROGRAMS = ("prefill", "admit", "chunk", "halt")


@cache
def table() -> dict[str, tuple]:
    """Name -> (function, arguments), of an engine's programs in each case."""
    rows = {}
    for name, case in fleet.CASES.items():
        own = fleet.engine(case)
        requests = fleet.requests(case)
        params = jax.eval_shape(lambda case=case: fleet.weights(case.adapters))
        prompt = as_prompt(requests, fleet.ROWS, 32, fleet.ROUTES)
        sampling = as_sampling(requests, fleet.ROWS, fleet.TARGET.vocab_size) if case.sampled else None
        read = params.target, prompt.tokens, prompt.length
        state, _ = jax.eval_shape(own.programs.prefill, *read)
        slots = jax.eval_shape(own._empty, params)
        number = jax.ShapeDtypeStruct((), np.int32)
        arguments = {
            "prefill": read,
            "admit": (params, slots, prompt, state, sampling, np.arange(fleet.ROWS, dtype=np.int32)),
            "chunk": (params, slots, number, number),
            "halt": (slots, np.zeros(fleet.ROWS, bool)),
        }
        rows |= {f"{name}: {program}": (getattr(own.programs, program), arguments[program]) for program in PROGRAMS}
    return rows


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", [f"{case}: {program}" for case in fleet.CASES for program in PROGRAMS])
def test_a_program_is_exported(name, platform):
    function, arguments = table()[name]
    exported = export.export(function, platforms=(platform,))(*arguments)
    assert exported.platforms == (platform,)
    assert not any(
        word in exported.mlir_module() for word in ("lapack", "xla_python_cpu_callback", "xla_ffi_python_cpu")
    )
    assert ("stablehlo.while" in exported.mlir_module()) or not name.endswith("chunk")
