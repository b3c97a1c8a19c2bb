"""jaxspec: lossless speculative decoding for JAX that learns its workload."""

from jaxspec import verify as verify
from jaxspec.engine import Engine as Engine
from jaxspec.engine import Method as Method
from jaxspec.engine import unrouted as unrouted
from jaxspec.requests import Request as Request
from jaxspec.speculate import run as run
from jaxspec.speculate import speculator as speculator
from jaxspec.store.loading import load_pool as load_pool
from jaxspec.store.pool import Pool as Pool
from jaxspec.target import lm_target as lm_target
from jaxspec.text import Completion as Completion
from jaxspec.text import Piece as Piece
from jaxspec.text import generate as generate
from jaxspec.text import stream as stream
from jaxspec.types import Draft as Draft
from jaxspec.types import Drafter as Drafter
from jaxspec.types import Prompt as Prompt
from jaxspec.types import Sampling as Sampling
from jaxspec.types import Scores as Scores
from jaxspec.types import SpecParams as SpecParams
from jaxspec.types import Target as Target
from jaxspec.types import Verdict as Verdict
