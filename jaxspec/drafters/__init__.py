"""Ways of drafting, one file each; every factory returns a `jaxspec.types.Drafter`."""

from jaxspec.drafters.adaptive import adaptive_drafter as adaptive_drafter
from jaxspec.drafters.cached import cached_drafter as cached_drafter
from jaxspec.drafters.feature import feature_drafter as feature_drafter
from jaxspec.drafters.graph import graph_drafter as graph_drafter
from jaxspec.drafters.hedge import hedged as hedged
from jaxspec.drafters.lm import lm_drafter as lm_drafter
from jaxspec.drafters.merged_trees import merged_tree_drafter as merged_tree_drafter
from jaxspec.drafters.multi import multi_drafter as multi_drafter
from jaxspec.drafters.ngram import ngram_drafter as ngram_drafter
from jaxspec.drafters.silent import silent_drafter as silent_drafter
from jaxspec.drafters.tree import tree_drafter as tree_drafter
