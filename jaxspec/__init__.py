"""jaxspec: lossless speculative decoding for JAX that learns its workload."""

from jaxspec.speculate import run as run
from jaxspec.speculate import speculator as speculator
from jaxspec.types import Draft as Draft
from jaxspec.types import Drafter as Drafter
from jaxspec.types import Prompt as Prompt
from jaxspec.types import Sampling as Sampling
from jaxspec.types import Scores as Scores
from jaxspec.types import SpecParams as SpecParams
from jaxspec.types import Target as Target
from jaxspec.types import Verdict as Verdict
