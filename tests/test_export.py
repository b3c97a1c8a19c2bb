"""Every program of a pool is exported for platforms that need not be here.

A program is (name, jitted function, arguments), arguments of abstract shapes; add a line to `table` for a new one.
"""

from functools import cache, partial

import jax
import pytest
from jax import export

from jaxspec.types import SpecParams
from tests import fleet

PLATFORMS = ("tpu", "cuda")


@cache
def table() -> dict[str, tuple]:
    """Name -> (function, arguments), of prefill and of the decode loop of each case."""
    rows = {}
    for name, case in fleet.CASES.items():
        decoding = fleet.programs(case)
        params, prompt, sampling = jax.eval_shape(partial(fleet.arguments, case))
        prefill = jax.jit(partial(decoding.prefill, slots=fleet.SLOTS))
        read = (params.target, prompt.tokens, prompt.length)
        rows[f"{name}: prefill"] = prefill, read
        state, _ = jax.eval_shape(prefill, *read)
        loop = jax.jit(partial(decoding.decode, slots=fleet.SLOTS))
        rows[f"{name}: decode"] = loop, (SpecParams(*params), prompt, state, sampling)
    return rows


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", [f"{case}: {program}" for case in fleet.CASES for program in ("prefill", "decode")])
def test_a_program_is_exported(name, platform):
    function, arguments = table()[name]
    exported = export.export(function, platforms=(platform,))(*arguments)
    assert exported.platforms == (platform,)
    assert not any(
        word in exported.mlir_module() for word in ("lapack", "xla_python_cpu_callback", "xla_ffi_python_cpu")
    )
    assert ("stablehlo.while" in exported.mlir_module()) == name.endswith("decode")
