"""Tasks are found when they are there, and the router sends prompts to them."""

import numpy as np
import pytest

from jaxspec import router
from jaxspec.tasks import assign, clean, cluster, purity_and_nmi, tfidf_features, top_terms

WORDS = {
    "sql": "select table rows where column",
    "cook": "bake flour oven sugar recipe",
    "sport": "goal team match score coach",
}


def texts(number: int = 30):
    rng = np.random.default_rng(0)
    made = [(label, " ".join(rng.choice(words.split(), 8))) for label, words in WORDS.items() for _ in range(number)]
    return [text for _, text in made], [label for label, _ in made]


def blobs(number: int = 4, each: int = 40, width: int = 12):
    rng = np.random.default_rng(1)
    centres = 3 * rng.normal(size=(number, width))
    label = np.repeat(np.arange(number), each)
    return (centres[label] + 0.3 * rng.normal(size=(len(label), width))).astype(np.float32), label


def test_silhouette_finds_the_number_of_blobs():
    features, label = blobs()
    centroids, silhouettes = cluster(features, range(2, 8), seed=0)
    assert len(centroids) == 4 == max(silhouettes, key=silhouettes.get)
    assert purity_and_nmi(assign(features, centroids), label.tolist()) == {"purity": 1.0, "nmi": pytest.approx(1.0)}


def test_tfidf_tells_vocabularies_apart():
    made, labels = texts()
    features = tfidf_features([clean(t) for t in made], np.ones(len(made), bool), seed=0, width=8)
    centroids, _ = cluster(features, range(2, 6), seed=0)
    assert purity_and_nmi(assign(features, centroids), labels)["nmi"] > 0.9


def test_labels_are_compared_where_they_are():
    assert purity_and_nmi(np.array([0, 1]), [None, None]) == {"purity": None, "nmi": None}
    assert purity_and_nmi(np.array([0, 0, 1, 1]), ["a", "b", "c", None])["purity"] == pytest.approx(2 / 3)


def test_cleaning_drops_stop_words_and_special_characters():
    assert clean("The SELECT * of, a table_column!?") == "select table column"


def test_top_terms_are_the_clusters_own():
    made, labels = texts()
    names = sorted(WORDS)
    terms = top_terms(made, np.array([names.index(label) for label in labels]), 3)
    for name, own in zip(names, terms, strict=True):
        assert set(own) == set(WORDS[name].split())


def test_the_router_learns_blobs_and_falls_back_when_unsure():
    features, label = blobs()
    params = router.train(
        router.init(features, 16, 4, 0), features, label, steps=200, batch=64, learning_rate=1e-2, seed=0
    )
    probability = np.asarray(router.probabilities(params, features))
    assert (router.choose(probability, 0.5) == label).mean() == 1.0
    between = np.asarray(router.probabilities(params, features[:1] * 0.5 + features[-1:] * 0.5))
    assert router.choose(between, 1.1) == [router.TRUNK]
    np.testing.assert_allclose(probability.sum(-1), 1.0, rtol=1e-5)
