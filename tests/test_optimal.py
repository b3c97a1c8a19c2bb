"""What `decode.optimal` reports: the acceptance of the shipped rules, and a row for all that is asked."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from test_multidraft import pairs, single, summed

from decode import optimal
from decode.optimal import Optimal, acceptances
from jaxspec.config import UserError
from jaxspec.multidraft import SCHEMES
from jaxspec.pooled import SEVERAL


@pytest.mark.parametrize("number", [2, 3])
def test_acceptance_is_that_of_the_shipped_rules(number):
    """Five deviations where rejected drafts are drawn."""
    found = jax.jit(partial(acceptances, number=number, draws=4000))
    for name in ("random", "sharp", "alike", "zeros in p", "p sure"):
        p, q = pairs(4)[name]
        with np.errstate(divide="ignore"):
            at = found(single(np.log(p)), single(np.log(q)), jax.random.key(0))
        for way, (scheme, rule) in SEVERAL.items():
            expected = summed(scheme, rule, p, q, number)[1]
            rounding = 5 * 0.5 / np.sqrt(4000) if way == "recursive" else 1e-5
            assert float(at[way]) == pytest.approx(expected, abs=rounding), (name, way)


def test_there_is_a_row_for_every_drafter_temperature_and_number(pool, world, tmp_path, capsys):
    out = tmp_path / "optimal.json"
    asked = {"drafts": (1, 2), "temperature": (0.7,), "draws": 2, "max_new_tokens": 6, "limit": 1}
    optimal.run(Optimal(pool=pool, prompts=str(world.prompts), json=str(out), **asked))
    rows = json.loads(out.read_text())["rows"]
    assert {(row["drafter"], row["temperature"], row["drafts"]) for row in rows} == {
        (drafter, temperature, number) for drafter in ("base", "routed") for temperature in (0.7,) for number in (1, 2)
    }
    for row in rows:
        assert len(row["tasks"]) == 3
        of = lambda name, row=row: row["mean"][name]
        for way, (scheme, _) in SEVERAL.items():
            assert of(way) <= of(f"optimum {scheme}") + 1e-5
            assert of(way) >= of("one draft") - 1e-5
        if row["drafts"] == 1:
            every = [of(name) for name in (*SEVERAL, *(f"optimum {scheme}" for scheme in SCHEMES))]
            np.testing.assert_allclose(every, of("one draft"), atol=1e-5)
    assert capsys.readouterr().out.count("\n| ") == 4


@pytest.mark.parametrize("wrong", [{"drafts": (0,)}, {"temperature": (0.0,)}, {"draws": 0}, {"drafts": ()}])
def test_a_number_that_will_not_do_is_told(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        optimal.run(Optimal(pool="nowhere", **wrong))
