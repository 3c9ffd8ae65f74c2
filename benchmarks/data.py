"""Sentences to finetune on: human-rated ones from a PyPI package, or GLUE through the `datasets` library."""

import html
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fetch import fetch

# C.J. Hutto and E. Gilbert, "VADER", ICWSM 2014: each sentence rated from -4 to 4 by 20 people (MIT licence).
RATED = {
    "movie": ("movie reviews", "movieReviewSnippets"),
    "product": ("product reviews", "amazonReviewSnippets"),
    "tweets": ("tweets", "tweets"),
    "editorials": ("newspaper editorials", "nytEditorialSnippets"),
}
PACKAGE = "vaderSentiment==3.2.1"
PACKAGE_FILE = "vaderSentiment-3.2.1.tar.gz"
PACKAGE_SHA256 = "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803"

# Ratings nearer to 0 are neutral: their sign is noise.
CLEAR_RATING = 0.5


@dataclass
class Examples:
    """Sentences, or pairs of them, and their labels: class numbers, or floats for regression."""

    first: list[str]
    second: list[str] | None
    labels: list

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int | None) -> "Examples":
        return Examples(self.first[:count], self.second and self.second[:count], self.labels[:count])


@dataclass
class Task:
    """A training and a dev set, how a dev prediction is scored, and the score of always giving the same answer."""

    name: str
    train: Examples
    dev: Examples
    classes: int
    metric: str
    chance: float

    def score(self, predictions: Tensor) -> float:
        return METRICS[self.metric](predictions, torch.tensor(self.dev.labels))


def rated_sentences(source: str, kind: str, train_size: int, dev_size: int) -> Task:
    """The rated sentences of `source` (a key of RATED) as kind "classification" (sign) or "regression" (rating).

    The split is fixed: restarts differ in seeds, never in sentences.
    """
    rows = _read_ratings(source)
    if kind == "classification":
        rows = [(text, int(rating > 0)) for text, rating in rows if abs(rating) > CLEAR_RATING]
    random.Random(0).shuffle(rows)
    train = _examples(rows[:train_size])
    dev = _examples(rows[train_size : train_size + dev_size])
    name = f"{RATED[source][0]}, {'sign of the rating' if kind == 'classification' else 'rating'}"
    if kind == "regression":
        return Task(name, train, dev, 1, "Spearman", 0.0)
    return Task(name, train, dev, 2, "accuracy", _largest_share(dev.labels))


def glue(name: str, train_size: int | None, dev_size: int | None) -> Task:
    """RTE, MRPC, CoLA or STS-B with the paper's metric: the first `train_size` and `dev_size` examples, or all."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise RuntimeError(f"--data {name} needs the datasets library and a network: pip install datasets") from None
    columns, metric = GLUE[name]
    splits = load_dataset("nyu-mll/glue", name)

    def examples(split, size):
        first, second = (list(splits[split][column]) if column else None for column in columns)
        return Examples(first, second, list(splits[split]["label"])).head(size)

    train, dev = examples("train", train_size), examples("validation", dev_size)
    chance = {"accuracy": _largest_share(dev.labels), "F1": _f1_of_always_yes(dev.labels)}.get(metric, 0.0)
    return Task(f"GLUE {name}", train, dev, 1 if metric == "Spearman" else 2, metric, chance)


GLUE = {
    "rte": (("sentence1", "sentence2"), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), "F1"),
    "cola": (("sentence", None), "Matthews"),
    "stsb": (("sentence1", "sentence2"), "Spearman"),
}


def _read_ratings(source: str) -> list[tuple[str, float]]:
    path = fetch(PACKAGE, PACKAGE_FILE, PACKAGE_SHA256)
    inner = f"{PACKAGE_FILE.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        text = archive.extractfile(f"hutto_ICWSM_2014/{RATED[source][1]}_GroundTruth.txt").read().decode("utf-8")
    rows = (line.split("\t", 2) for line in text.splitlines() if line.strip())
    # A sentence that occurs twice must not be in both the training and the dev set.
    return list({html.unescape(sentence.strip()): float(rating) for _, rating, sentence in rows}.items())


def _examples(rows: list[tuple[str, float]]) -> Examples:
    return Examples([text for text, _ in rows], None, [label for _, label in rows])


def _largest_share(labels: list[int]) -> float:
    return max(labels.count(label) for label in set(labels)) / len(labels)


def _f1_of_always_yes(labels: list[int]) -> float:
    return 2 * sum(labels) / (sum(labels) + len(labels))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    return 2 * hits / max(1, (predicted == 1).sum().item() + (labels == 1).sum().item())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 if one of the two is constant. For two binary vectors it is Matthews'."""
    return torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].nan_to_num().item()


def spearman(predicted: Tensor, labels: Tensor) -> float:
    return correlation(_ranks(predicted), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank."""
    _, group, size = values.unique(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - (size - 1) / 2)[group]


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": correlation,
    "Spearman": spearman,
}
