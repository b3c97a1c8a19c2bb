"""Finds the tasks in the trace: features, K-means, the number of clusters, a card for each; and splits the log.

    python -m train.partition --config configs/testbed.py --out runs/testbed ...

Clusters are fit on the train split alone and then assigned to the others. Labels in the log are only compared with.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxspec.config import Experiment, UserError, command_line, plain
from jaxspec.store.huggingface import read_tokenizer
from jaxspec.store.stages import finish, manifest, open_stage, write_arrays, write_whole
from jaxspec.store.traces import Traces, read_traces, split_of
from jaxspec.tasks import assign, clean, cluster, encoder_features, purity_and_nmi, tfidf_features, top_terms


class Found(NamedTuple):
    """The tasks and the splits of a log of N prompts.

    task: `[N]` cluster of each prompt; split: `[N]` index in SPLITS; centroids: `[tasks, F]`.
    informed: `[N]` the same clusters carried over to prompt plus output, with which a router of prompts should agree.
    silhouettes: score of each number of clusters that was tried.
    """

    task: np.ndarray
    informed: np.ndarray
    split: np.ndarray
    centroids: np.ndarray
    silhouettes: dict[int, float]


def run(experiment: Experiment) -> None:
    """Writes `out/partition`: `partition.npz` and `cards.md`."""
    parent = manifest(experiment.out, "trace")
    config = {"partition": plain(experiment.partition), "seed": experiment.seed}
    stage = open_stage(experiment.out, "partition", config=config, parents={"trace": parent["digest"]})
    if stage.complete:
        return print(f"partition: complete in {stage.folder}")
    traces = read_traces(experiment.out)
    _check_seed(experiment, parent["config"])
    texts = _texts(experiment, traces)
    found = find(experiment, traces, texts)
    labels = [line["task"] for line in traces.log]
    agreement = purity_and_nmi(found.task, labels)
    arrays = {"task": found.task, "informed": found.informed, "split": found.split, "centroids": found.centroids}
    write_arrays(stage.folder / "partition.npz", arrays)
    cards = _cards(traces, texts, found, agreement)
    write_whole(stage.folder / "cards.md", lambda part: part.write_text(cards))
    tasks = len(found.centroids)
    finish(stage, tasks=tasks, silhouettes=found.silhouettes, **agreement)
    said = ", ".join(f"{name} {value:.3f}" for name, value in agreement.items() if value is not None)
    print(
        f"partition: {tasks} tasks in {len(labels)} prompts {said and f'({said})'}; cards in {stage.folder / 'cards.md'}"
    )


def find(experiment: Experiment, traces: Traces, texts: Sequence[str]) -> Found:
    """Splits the log, clusters its train part, and gives every prompt its nearest centroid."""
    spec = experiment.partition
    split = split_of(len(traces.log), experiment.seed)
    train = split == 0
    if spec.num_clusters is not None and spec.num_clusters > train.sum():
        raise UserError(
            f"partition.num_clusters {spec.num_clusters} exceeds the {train.sum()} prompts of the train split; lower it"
        )
    features = _features(experiment, traces, texts, train)
    if spec.min_clusters > spec.max_clusters:
        raise UserError(
            f"partition.min_clusters {spec.min_clusters} is above partition.max_clusters {spec.max_clusters}; lower it"
        )
    tried = [k for k in range(spec.min_clusters, spec.max_clusters + 1) if k < train.sum()] or [1]
    wanted = [spec.num_clusters] if spec.num_clusters else tried
    centroids, silhouettes = cluster(features[train], wanted, seed=experiment.seed)
    task = assign(features, centroids)
    both = hidden_features(traces, ["prompt", "output"], train)
    means = np.stack([both[train & (task == t)].mean(0) for t in range(len(centroids))])
    return Found(task, assign(both, means), split, centroids, silhouettes)


def _check_seed(experiment: Experiment, traced: dict) -> None:
    """The trace kept drafters' texts out of the splits that its own seed draws."""
    if experiment.seed != traced["seed"] and traced["trace"].get("texts") in ("draft", "mix"):
        raise UserError(
            f"--seed {experiment.seed} splits the log otherwise than the trace's seed {traced['seed']}, and texts that the "
            f"drafter wrote would be measured on; give --seed {traced['seed']}"
        )


def _features(experiment: Experiment, traces: Traces, texts: Sequence[str], train: np.ndarray) -> np.ndarray:
    spec = experiment.partition
    if spec.features == "hidden":
        return hidden_features(traces, ["prompt"] if spec.embed == "prompt" else ["prompt", "draft", "output"], train)
    cleaned = [clean(text) for text in texts]
    if spec.features == "tfidf":
        return tfidf_features(cleaned, train, seed=experiment.seed)
    if not spec.encoder:
        raise UserError("partition.features=encoder needs --partition.encoder FOLDER")
    return encoder_features(cleaned, spec.encoder)


def hidden_features(traces: Traces, parts: Sequence[str], train: np.ndarray) -> np.ndarray:
    """The target's pooled states, standardised on the train split so that no direction rules: unit vectors `[N, F]`."""
    stacked = np.concatenate([traces.features[part] for part in parts], axis=1)
    scaled = (stacked - stacked[train].mean(0)) / np.maximum(stacked[train].std(0), 1e-6)
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


def _texts(experiment: Experiment, traces: Traces) -> list[str]:
    """What a person would read: the prompt, and with embed=everything the base draft and the output behind it."""
    prompts = ["\n".join(m["content"] for m in line["messages"]) for line in traces.log]
    if experiment.partition.embed == "prompt":
        return prompts
    tokenizer = read_tokenizer(experiment.target)
    say = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
    return [
        f"{prompt}\n{say(draft[draft >= 0])}\n{say(output)}"
        for prompt, draft, output in zip(prompts, traces.draft, traces.outputs(), strict=True)
    ]


def _cards(traces: Traces, texts: Sequence[str], found: Found, agreement: dict) -> str:
    terms = top_terms([clean(text) for text in texts], found.task, len(found.centroids))
    said = ", ".join(f"{name} {value:.3f}" for name, value in agreement.items() if value is not None)
    parts = [f"# {len(found.centroids)} tasks in {len(texts)} prompts\n\n{said or 'The log has no labels.'}\n"]
    parts += [_card(traces, found, task, terms[task]) for task in range(len(found.centroids))]
    return "\n".join(parts)


def _card(traces: Traces, found: Found, task: int, terms: Sequence[str]) -> str:
    rows = np.flatnonzero(found.task == task)
    drafted, accepted = traces.drafted[rows].sum(), traces.accepted[rows].sum()
    labels = Counter(traces.log[i]["task"] for i in rows if traces.log[i]["task"])
    lines = [
        f"## Task {task}",
        f"- prompts: {len(rows)}",
        f"- base draft accuracy: {accepted / drafted:.3f}" if drafted else "- base draft accuracy: nothing was drafted",
        f"- top terms: {', '.join(terms)}",
    ]
    if labels:
        lines.append("- labels: " + ", ".join(f"{name} {count}" for name, count in labels.most_common(4)))
    examples = [traces.log[i]["messages"][-1]["content"] for i in rows[:3]]
    return "\n".join([*lines, "- examples:", *(f"    - {' '.join(text.split())[:160]}" for text in examples), ""])


if __name__ == "__main__":
    command_line(Experiment, run)
