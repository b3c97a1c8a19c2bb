"""The house: imports run one way, only store touches files, and the README shows the tree and commands that are there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "jaxspec"
ALLOWED = {
    "types": set(),
    "ancestry": set(),
    "config": set(),
    "metrics": {"types"},
    "sampling": {"types"},
    "adapters": set(),
    "attention": set(),
    "transformer": {"adapters", "attention"},
    "encoder": set(),
    "verify": {"types", "ancestry", "sampling"},
    "target": {"types", "ancestry", "attention", "sampling", "transformer"},
    "multidraft": set(),
    "trigrams": set(),
    "candidates": set(),
    "drafters": {
        "types",
        "ancestry",
        "candidates",
        "attention",
        "sampling",
        "transformer",
        "adapters",
        "recording",
        "multidraft",
        "trigrams",
        "drafters",
    },
    "speculate": {"types", "sampling", "verify"},
    "apart": {"types", "sharding", "speculate"},
    "apart_engine": {"types", "apart", "engine", "metrics", "recording", "sharding", "slots", "speculate"},
    "recording": {"types"},
    "requests": {"types", "config", "sampling", "metrics"},
    "slots": {"types", "speculate", "metrics", "recording"},
    "engine": {"types", "metrics", "recording", "requests", "slots", "verify"},
    "align": set(),
    "regression": {"align", "drafters", "transformer"},
    "timing": {"metrics", "engine", "requests"},
    "router": set(),
    "shift": set(),
    "replay": {"router", "shift"},
    "experience": {"drafters", "engine", "router"},
    "reliability": {"engine", "router", "store"},
    "tasks": {"store"},
    "packing": {"align", "store"},
    "training": {"align", "config", "packing", "sharding", "store"},
    "forced": {"align", "ancestry", "packing", "requests", "store", "transformer", "types"},
    "expected": {"align", "forced", "requests", "sampling", "store", "transformer", "types"},
    "writing": {"align", "drafters", "requests", "speculate", "store", "target", "transformer", "types", "verify"},
    "merging": set(),
    "prepared": {"adapters", "drafters", "joining", "layouts", "store", "transformer"},
    "pooled": {
        "apart_engine",
        "attention",
        "drafters",
        "engine",
        "prepared",
        "recording",
        "requests",
        "sharding",
        "store",
        "target",
        "transformer",
        "types",
        "verify",
    },
    "serving": {"drafters", "engine", "experience", "pooled", "prepared", "router", "shift", "store"},
    "text": {"config", "verify", "router", "engine", "pooled", "recording", "requests", "serving", "store"},
    "sharding": {"types", "config", "transformer"},
    "published": {"transformer"},
    "joining": {"transformer"},
    "layouts": {"transformer"},
    "widening": {"config", "published", "sharding", "transformer"},
    "roofline": {"adapters", "transformer"},
    "plan": {
        "types",
        "config",
        "sharding",
        "verify",
        "adapters",
        "drafters",
        "recording",
        "requests",
        "slots",
        "target",
        "transformer",
    },
    "store": {
        "config",
        "sharding",
        "requests",
        "router",
        "shift",
        "adapters",
        "drafters",
        "transformer",
        "encoder",
        "store",
        "align",
        "joining",
        "widening",
        "trigrams",
        "replay",
    },
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(LIBRARY.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_follow_the_map(file):
    parts = file.relative_to(LIBRARY).with_suffix("").parts
    own = parts[0]
    if own == "__init__":
        return
    used = {name.split(".")[1] for name in imports(file) if name.startswith("jaxspec.")}
    assert used & ALLOWED.keys() <= ALLOWED[own] | ({own} if len(parts) > 1 else set())
    assert not any(name.split(".")[0] in ("train", "decode", "torch") for name in imports(file))


@pytest.mark.parametrize("file", sorted((ROOT / "train").glob("*.py")), ids=lambda f: f.name)
def test_stages_meet_on_disk(file):
    others = {"train", "decode"} - ({"train"} if file.stem in ("__main__", "pretrain", "compare") else set())
    assert not any(name.split(".")[0] in others for name in imports(file))


def test_the_readmes_tree_is_the_tree():
    tree = re.search(r"```\njaxspec/.*?```", (ROOT / "README.md").read_text(), re.S).group()
    named = set(re.findall(r"^    (\w+(?:\.py|/))", tree, re.M))
    there = {f.name for f in LIBRARY.glob("*.py") if f.name != "__init__.py"}
    there |= {f"{d.name}/" for d in LIBRARY.iterdir() if d.is_dir() and d.name != "__pycache__"}
    assert named == there


OTHERS = [
    "train.align",
    "train.feature",
    "decode.generate",
    "decode.peer",
    "decode.report",
    "decode.roofline",
    "decode.growth",
    "decode.optimal",
    "decode.card",
]


@pytest.mark.parametrize(
    "command", ["train", "decode.bench", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_the_readmes_commands_explain_themselves(command):
    assert f"python -m {command}" in (ROOT / "README.md").read_text()
    done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def test_the_readmes_python_runs(pool):
    """As it stands, on another pool; the drafter that it shows is one that a reader could write."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert max(len(block.strip().splitlines()) for block in blocks) <= 30 and len(blocks) == 2
    names: dict = {}
    exec(blocks[0].replace("runs/demo/pool", pool), names)
    assert names["completion"].text and names["piece"].completion.finish_reason in ("stop", "length")
    exec(blocks[1], names)
    assert 0 < len(names["completion"].ids) <= 24 and names["completion"].counts.num_draft_tokens > 0
