"""What methods took to train: parameters and seconds, as a pool's stages wrote them down; None where they did not."""

from jaxspec.store import features
from jaxspec.store.names import EXTRAS
from jaxspec.store.pool import Pool
from jaxspec.store.stages import read_json

Cost = dict[str, float]


def nothing(pool: Pool) -> Cost | None:
    """Of what the pool was given, or what needs no training."""
    del pool
    return {"parameters": 0, "seconds": 0.0}


def mixed(pool: Pool) -> Cost | None:
    return _sum(pool, "trunk", "mixed")


def specialists(pool: Pool) -> Cost | None:
    return _sum(pool, "trunk", "specialists")


def both(pool: Pool) -> Cost | None:
    return _sum(pool, "trunk", "specialists", "mixed")


def of_features(pool: Pool) -> Cost | None:
    """Of the drafter of features that serves."""
    own = features.measured_of(pool)[features.best_name(pool)]
    return {name: own[name] for name in ("parameters", "seconds")} if "seconds" in own else None


def added(name: str, pool: Pool) -> Cost | None:
    """Of a drafter that `train.extras` made; mergers need the specialists first. What was adopted was trained elsewhere."""
    file = pool.path / EXTRAS
    own = read_json(file).get(name, {}) if file.exists() else {}
    before = specialists(pool) if own.get("of_specialists") else nothing(pool)
    if before is None or "seconds" not in own:
        return None
    return {key: before[key] + own[key] for key in ("parameters", "seconds")}


def _sum(pool: Pool, *parts: str) -> Cost | None:
    known = pool.facts["trained"]
    if known is None:
        return None
    return {key: sum(known[part][key] for part in parts if part in known) for key in ("parameters", "seconds")}
