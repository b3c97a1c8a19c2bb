"""Tasks in a prompt log: text cleaning, features, K-means, how many clusters, and how they compare with labels."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

SAMPLE = 4000  # silhouette compares all pairs


def clean(text: str) -> str:
    """TaskSpec's cleaning: lower case, no special characters, no stop words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return " ".join(word for word in words if word not in ENGLISH_STOP_WORDS)


def cluster(features: np.ndarray, numbers: Iterable[int], *, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    """K-means centroids `[tasks, F]` for the number of clusters with the best silhouette, and all silhouettes.

    Args:
        features: `[N, F]` of the train split.
        numbers: candidates; one alone is taken as it is, without a silhouette.
    """
    numbers = list(numbers)
    settings: dict[str, Any] = {"n_init": 4, "random_state": seed}
    fits = {k: KMeans(k, **settings).fit(features) for k in numbers}
    if len(numbers) == 1:
        return fits[numbers[0]].cluster_centers_, {}
    size = min(SAMPLE, len(features))
    score = lambda fit: float(silhouette_score(features, fit.labels_, sample_size=size, random_state=seed))
    silhouettes = {k: score(fit) for k, fit in fits.items()}
    best = max(silhouettes, key=silhouettes.__getitem__)
    return fits[best].cluster_centers_, silhouettes


def assign(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroid of each row: `[N, F]`, `[tasks, F]` -> `[N]`."""
    squared = (centroids**2).sum(1) - 2 * features @ centroids.T
    return squared.argmin(1)


def tfidf_features(texts: Sequence[str], train: np.ndarray, *, seed: int, width: int = 64) -> np.ndarray:
    """TF-IDF of cleaned texts, fit where `train [N]` is true, reduced by SVD to unit vectors `[N, width]`."""
    known = [text for text, own in zip(texts, train, strict=True) if own]
    of = lambda rarest: TfidfVectorizer(sublinear_tf=True, min_df=rarest, max_features=20_000).fit(known)
    try:
        vectorizer = of(2)
    except ValueError:  # no word is in two texts
        vectorizer = of(1)
    counts = vectorizer.transform(texts)
    svd = TruncatedSVD(min(width, counts.shape[1] - 1), random_state=seed).fit(counts[train])
    reduced = svd.transform(counts)
    return reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-9)


def encoder_features(texts: Sequence[str], folder: str) -> np.ndarray:
    """Mean-pooled unit vectors `[N, H]` of a Hugging Face folder, BERT-like or decoder-only."""
    from jaxspec.store.encoders import embed

    return embed(texts, folder)


def purity_and_nmi(task: np.ndarray, labels: Sequence[str | None]) -> dict[str, float | None]:
    """Share of prompts whose cluster's majority label is theirs, and NMI; None where the log has no labels."""
    known = np.array([label is not None for label in labels])
    if not known.any():
        return {"purity": None, "nmi": None}
    names = np.unique([label for label in labels if label is not None], return_inverse=True)[1]
    own = task[known]
    table = np.zeros((own.max() + 1, names.max() + 1), int)
    np.add.at(table, (own, names), 1)
    purity = table.max(1).sum() / table.sum()
    return {"purity": float(purity), "nmi": float(normalized_mutual_info_score(names, own))}


def top_terms(texts: Sequence[str], task: np.ndarray, tasks: int, number: int = 10) -> list[list[str]]:
    """The words that set each cluster's cleaned texts apart: highest TF-IDF of the cluster as one document."""
    joined = [" ".join(text for text, own in zip(texts, task, strict=True) if own == t) or "-" for t in range(tasks)]
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+")
    weights: Any = vectorizer.fit_transform(joined)
    words = vectorizer.get_feature_names_out()
    return [[str(words[i]) for i in np.argsort(-own)[:number] if own[i] > 0] for own in weights.toarray()]
