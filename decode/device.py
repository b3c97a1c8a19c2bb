"""What the device can do, measured in the same run as what is asked of it: bytes a second, operations a second, launches."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.profiler import ProfileData, ProfileOptions

from jaxspec.plan import device_memory
from jaxspec.roofline import Interval, busy, leaves
from jaxspec.timing import paced

GIB = 2**30
COLUMNS = 4096  # of the array that is read
LEAST_H200 = 4.2e12  # bytes per second, below which something else is on the card or its clocks are down
# What the lines are called that hold what a device ran: a GPU's streams, a TPU's operations.
LINES = ("Stream", "XLA Ops")


class Bandwidth(NamedTuple):
    """Bytes per second of a read-only reduction and of a copy, both directions counted, over an array of `size` bytes."""

    read: float
    copy: float
    size: int

    @property
    def best(self) -> float:
        return max(self.read, self.copy)


class Launches(NamedTuple):
    """Of a step: kernels launched, and the share of its time in which none runs."""

    number: float
    between: float


class NotMeasured(Exception):
    """A profile that could not be made or read, and why."""


def sample_bytes() -> int:
    """What bandwidth is measured over: 4 GiB on an accelerator, less where it has under 16, 1 GiB on a CPU."""
    if jax.default_backend() == "cpu":
        return GIB
    return min(4 * GIB, (device_memory() or 16 * GIB) // 4)


def shown(
    dtype: Any, *, passes: int, seconds: float, rate: float | None = None, operations: float | None = None
) -> tuple[Bandwidth | None, float]:
    """Bandwidth, None where its `rate` is known, and operations per second, if they are not known either."""
    known = {"passes": passes, "seconds": seconds}
    return None if rate else bandwidth(sample_bytes(), **known), operations or peak(dtype, **known)


def is_void(kind: str, bandwidth: float) -> bool:
    """Whether a device of this kind reads so slowly that nothing measured beside it counts."""
    return "H200" in kind and bandwidth < LEAST_H200


def bandwidth(size: int, *, passes: int, seconds: float) -> Bandwidth:
    """Measures it by the fastest passes; of several ways to reduce the best counts, as XLA threads some better than others."""
    array = jnp.ones((size // (4 * COLUMNS), COLUMNS), jnp.float32)
    reading = {name: _chained(lambda x, seen, way=way: 1e-12 * way(x, seen), array) for name, way in READS.items()}
    copying = {"copy": _chained(lambda x, moved: moved + 1e-3, array, array)}
    read = {name: array.nbytes / own.fastest for name, own in paced(reading, seconds=seconds, passes=passes).items()}
    (copy,) = paced(copying, seconds=seconds, passes=passes).values()
    return Bandwidth(max(read.values()), 2 * array.nbytes / copy.fastest, array.nbytes)


def peak(dtype: Any, *, passes: int, seconds: float) -> float:
    """Operations per second of a product of square matrices, by the fastest passes."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.full((size, size), 1 / size, dtype)
    (own,) = paced({"product": _chained(jnp.matmul, matrix, matrix)}, seconds=seconds, passes=passes).values()
    return 2 * size**3 / own.fastest


def launches(run: Callable[[int], object], few: int, many: int) -> Launches:
    """What a step of `run(steps)` launches, by the slope of two profiles.

    Raises:
        NotMeasured: there is no profiler, or its planes and lines are not those of a GPU or TPU.
    """
    (first, short, span), (second, long, whole) = (_profiled(run, steps) for steps in (few, many))
    if whole <= span:
        raise NotMeasured(f"{many} steps took no longer than {few} in the profile")
    return Launches((second - first) / (many - few), 1 - (long - short) / (whole - span))


def ran(planes: Any) -> list[list[Interval]]:
    """Intervals in nanoseconds of what the devices of a profile ran, line by line."""
    lines = [(plane.name, line) for plane in planes if plane.name.startswith("/device:") for line in plane.lines]
    known = [line for _, line in lines if line.name.startswith(LINES)]
    found = [leaves([(event.start_ns, event.start_ns + event.duration_ns) for event in line.events]) for line in known]
    if not any(found):
        names = ", ".join(f"{plane}/{line.name}" for plane, line in lines) or ", ".join(own.name for own in planes)
        raise NotMeasured(f"the profile has no events on lines named {' or '.join(LINES)}; it has {names or 'nothing'}")
    return found


def _profiled(run: Callable[[int], object], steps: int) -> tuple[int, float, float]:
    """Kernels, busy nanoseconds, and nanoseconds from the first one's begin to the last one's end."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                run(steps)
            (file,) = Path(folder).rglob("*.xplane.pb")
            found = ran(list(ProfileData.from_file(str(file)).planes))
    except (RuntimeError, ValueError, OSError) as error:  # a platform's profiler that is missing, or in use
        raise NotMeasured(f"the profiler failed: {error}") from error
    every = [interval for line in found for interval in line]
    return len(every), busy(found), max(end for _, end in every) - min(begin for begin, _ in every)


def _chained(step: Callable[[Array, Any], Any], array: Array, start: Any = 0.0) -> Callable[[int], object]:
    """steps -> what `step(array, carry)` comes to after so many, each fed by the one before; waits for it."""
    program = jax.jit(lambda array, start, steps: jax.lax.fori_loop(0, steps, lambda _, x: step(array, x), start))
    return lambda steps: jax.block_until_ready(program(array, start, steps))


# The carry is in every term, so that no reduction is the same twice and XLA cannot move it out of the loop.
READS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": lambda x, seen: jnp.sum(jnp.where(x > seen, x, 0.0)),
    "rows": lambda x, seen: jnp.sum(jnp.sum(jnp.where(x > seen, x, 0.0), axis=1)),
    "product": lambda x, seen: jnp.max(x @ (seen + jnp.linspace(0.0, 1.0, x.shape[1]))),
}
