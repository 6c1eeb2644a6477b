"""Paired statistics: did one arm match its baseline, document by document?

Numbers in, frozen dataclasses out; this module knows nothing of files, models or lm-eval. In every pair `a` is the arm
under test and `b` its baseline, so a negative difference is a loss. Scores of several seeds come as
`(seeds, documents)`, of one as `(documents,)`; the margin is in the units of the scores, so one point of 0/1 accuracy
is 0.01. The tests are scipy's and statsmodels', but for one: the t interval of clustered documents (CR2) and its
degrees of freedom are written here, from Bell and McCaffrey (2002). Bad input raises `ComparisonError`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail

from qlora_recipes.comparison.intervals import (
    Floats,
    Integers,
    Interval,
    Reading,
    joined,
    over_seeds,
    rare_events,
    student,
    widest,
)
from qlora_recipes.errors import ComparisonError

Verdict = Literal["equivalent", "different", "inconclusive"]

FEW_DIFFER = 100  # above it the two intervals agree within 3 %, and the score test costs 9 ms
FEWEST_TEXTS = 10  # fewer give a bootstrap little but repeats


@dataclass(frozen=True)
class TaskScores:
    """Both arms' scores of one task."""

    a: ArrayLike
    """Shape (documents,) or (seeds, documents)."""
    b: ArrayLike
    """The same of the baseline."""
    clusters: Sequence[Hashable] | None = None
    """Each document's subject. A subject that recurs in another task is the same one there."""
    documents: Sequence[Hashable] | None = None
    """What tells each document from others, such as its hash. One that recurs in another task is the same there."""


@dataclass(frozen=True)
class Comparison:
    """What the scores of two arms say about their difference."""

    difference: float
    """Mean of a - b, in the units of the scores."""
    interval: Interval
    """90 %; it lies inside the margin where two one-sided tests pass at 5 %."""
    interval_95: Interval
    verdict: Verdict
    p_equivalence: float
    """The larger of the two one-sided p-values; below 0.05 where `interval` is inside the margin."""
    p_difference: float
    margin: float
    n: int
    """Documents, each as often as tasks ask it."""
    n_distinct: int
    """Documents, each once."""
    n_clusters: int
    """Subjects; every document is its own where none were given."""
    n_needed: int | None
    """Documents that would bring a verdict on their own; None where they bring one already, or are so many."""
    seeds_needed: int | None
    """Seeds that would bring a verdict on their own if these are typical; None for one seed, where there is a verdict,
    or where these bring one on their own already."""
    seed_differences: tuple[float, ...]
    """Mean of a - b of each seed."""
    seed_interval: Interval | None
    """90 % over seeds; None for one seed."""
    limited: bool

    @property
    def interval_inside_margin(self) -> bool:
        """Whether the scores alone are equivalent, whatever else was found."""
        return -self.margin < self.interval[0] and self.interval[1] < self.margin


class _Sample(NamedTuple):
    differences: Floats  # (seeds, documents)
    texts: Sequence[Hashable]  # what tells each document from others
    subjects: Sequence[Hashable]  # each document's text where there are none
    span: float  # from the lowest score, or zero, to the highest
    right_or_wrong: bool  # no score but zero and one other


def compare(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    limited: bool = False,
) -> Comparison:
    """Say whether arm a scores as arm b does, to within a margin that was fixed beforehand.

    *Equivalent*: the 90 % interval lies inside the margin. *Different*: it does not, and the 95 % interval
    excludes zero. *Inconclusive*: the rest. A `limited` run is never equivalent.

    Documents are averaged over seeds, and their mean has a t interval with CR2 standard errors by cluster.
    Where few documents differ, a score test for rare events is added, and with several seeds a t interval
    over their means. The widest interval and the largest p-values are reported.
    """
    return overall({"": TaskScores(scores_a, scores_b, clusters)}, margin=margin, limited=limited)


def overall(tasks: Mapping[str, TaskScores], *, margin: float, limited: bool = False) -> Comparison:
    """Compare two arms over several tasks, by the plain mean of the tasks' differences.

    Each task counts the same, as in the leaderboards' average, so that 10,000 documents of one do not drown
    800 of another. What varies is documents and subjects within the tasks: the verdict is about these tasks.
    """
    samples = [_sample(name, task) for name, task in tasks.items()]
    seeds_of = {name: len(sample.differences) for name, sample in zip(tasks, samples, strict=True)}
    if len(set(seeds_of.values())) != 1:
        raise ComparisonError(f"got tasks with {seeds_of} seeds, expected as many of each; evaluate the rest")
    _check_margin(margin, max(sample.span for sample in samples))
    per_seed = np.mean([sample.differences.mean(axis=1) for sample in samples], axis=0)
    texts = _numbered([text for sample in samples for text in sample.texts])
    clusters = joined(texts, _numbered([subject for sample in samples for subject in sample.subjects]))
    documents = _over_documents(samples, texts, clusters, margin)
    seeds = [over_seeds(per_seed, margin)] if len(per_seed) > 1 else []
    reading = widest(documents + seeds)
    verdict = _verdict(reading, margin, limited)
    needed = _documents_for_a_verdict(documents, len(texts), margin)
    too_few = _verdict(widest(documents), margin, limited) == "inconclusive" and needed > len(texts)
    return Comparison(
        difference=float(per_seed.mean()),
        **reading._asdict(),
        verdict=verdict,
        margin=float(margin),
        n=len(texts),
        n_distinct=int(texts.max()) + 1,
        n_clusters=int(clusters.max()) + 1,
        n_needed=needed if too_few else None,
        seeds_needed=_seeds_for_a_verdict(per_seed, margin) if seeds and verdict == "inconclusive" else None,
        seed_differences=tuple(per_seed.tolist()),
        seed_interval=seeds[0].interval if seeds else None,
        limited=limited,
    )


def _verdict(reading: Reading, margin: float, limited: bool) -> Verdict:
    low, high = reading.interval
    if -margin < low and high < margin:
        return "inconclusive" if limited else "equivalent"
    return "different" if reading.p_difference < 0.05 else "inconclusive"


def _over_documents(samples: list[_Sample], texts: Integers, clusters: Integers, margin: float) -> list[Reading]:
    means = [sample.differences.mean(axis=0) for sample in samples]
    sizes, n = list(map(len, means)), len(texts)
    readings = [student(means, np.split(clusters, np.cumsum(sizes)[:-1]), margin)]
    # Weighted so that the mean over all documents is the mean over tasks; a document of two tasks is one event.
    weights = [n / (len(samples) * size) for size in sizes]
    events = np.bincount(texts, weights=np.repeat(weights, sizes) * np.concatenate(means)).astype(float)
    differ = np.count_nonzero(events)
    # Where most documents differ, of a table of ten means say, they are no rare events.
    if differ < FEW_DIFFER and (all(sample.right_or_wrong for sample in samples) or differ <= len(events) / 2):
        spans = np.multiply(weights, [sample.span for sample in samples])
        share, span = len(events) / n, float(np.bincount(texts, weights=np.repeat(spans, sizes)).max())
        readings.append(rare_events(events * share, span * share, margin))
    return readings


def _documents_for_a_verdict(readings: list[Reading], n: int, margin: float) -> int:
    """Where the half widths at 90 and at 95 % add up to the margin, no outcome is inconclusive any more.

    The t interval shrinks with the root of the documents, that of rare events about with their number.
    """
    of_t, of_all = (
        float(np.ptp(reading.interval) + np.ptp(reading.interval_95)) / 2 for reading in (readings[0], widest(readings))
    )
    sd = of_t * math.sqrt(n) / float(stats.norm.isf(0.05) + stats.norm.isf(0.025))
    return max(needed_documents(sd, margin, power=0.95), math.ceil(n * of_all / margin))


def _seeds_for_a_verdict(per_seed: Floats, margin: float) -> int | None:
    """Return the fewest seeds that would decide if mean and spread stayed; None where these do, or 100 would not."""
    difference, spread = abs(float(per_seed.mean())), float(np.std(per_seed, ddof=1))
    for seeds in range(len(per_seed), 101):
        half, half_95 = (stats.t(seeds - 1).isf([0.05, 0.025]) * spread / math.sqrt(seeds)).tolist()
        if difference + half < margin or difference > half_95:
            return seeds if seeds > len(per_seed) else None
    return None


def needed_documents(sd: float, margin: float, difference: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> int:
    """Say how many documents it takes to show equivalence when the true difference is `difference`.

    `sd` is that of one document's difference. The number is ((z(1 - alpha) + z((1 + power) / 2)) sd /
    (margin - |difference|))^2: Chow, Shao and Wang, Sample Size Calculations in Clinical Research, 3.1.
    """
    _check_margin(margin)
    room = margin - abs(difference)
    if not (room > 0 <= sd < math.inf and 0 < alpha < power < 1):
        raise ComparisonError(
            f"got sd {sd}, difference {difference}, margin {margin}, alpha {alpha}, power {power}; expected "
            "sd >= 0, 0 < alpha < power < 1 and the difference inside the margin"
        )
    return max(2, math.ceil(float(normal_sample_size_one_tail(room, (1 + power) / 2, alpha, std_null=sd))))


@dataclass(frozen=True)
class Flips:
    """Documents answered differently, from the baseline b to the arm under test a."""

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int | None
    """None where the answers themselves are not known."""
    n: int
    p: float
    """Exact McNemar test of the first two; it knows nothing of subjects."""


def flips(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    answers_a: Sequence[object] | None = None,
    answers_b: Sequence[object] | None = None,
) -> Flips:
    """Count the documents that b has right and a wrong, the reverse, and both wrong in different ways.

    Scores are 0 or 1, shape (documents,); answers are what each arm chose, compared with `!=`.
    """
    a, b = _finite(scores_a, "scores a"), _finite(scores_b, "scores b")
    answers = [x for x in (answers_a, answers_b) if x is not None]
    if not a.shape == b.shape == (a.size,) or len(answers) == 1 or {a.size, *map(len, answers)} != {a.size}:
        raise ComparisonError(
            f"got scores of shape {a.shape} and {b.shape} with {list(map(len, answers))} answers, expected "
            "(documents,) and the answers of both arms or of none; align the runs first"
        )
    if odd := set(a.tolist() + b.tolist()) - {0.0, 1.0}:
        raise ComparisonError(f"got the score {min(odd)}, expected 0 for wrong or 1 for right; use accuracy")
    table = [[int(np.sum((b == from_b) & (a == to_a))) for to_a in (1, 0)] for from_b in (1, 0)]
    both_wrong = zip((a == 0) & (b == 0), *answers, strict=True)
    other = sum(1 for wrong, *chosen in both_wrong if wrong and chosen[0] != chosen[1]) if answers else None
    return Flips(table[0][1], table[1][0], other, len(a), float(mcnemar(table, exact=True).pvalue))


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of both arms on the same texts; lower is better."""

    a: float
    b: float
    difference: float
    """a - b."""
    interval: Interval
    """90 %."""
    interval_95: Interval
    n: int


def bits_per_byte_difference(
    bits_a: ArrayLike, bits_b: ArrayLike, n_bytes: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> BitsPerByte:
    """Compare sum(bits) / sum(bytes) of two arms, with a paired BCa bootstrap over documents.

    All are of shape (documents,). Few texts of very unequal length make the interval too short: at 60, with
    a log-normal spread of 0.7, that of 90 % covers 83 % (600 simulations).
    """
    a, b, sizes = _finite(bits_a, "bits a"), _finite(bits_b, "bits b"), _finite(n_bytes, "bytes")
    if not a.shape == b.shape == sizes.shape == (a.size,) or a.size < FEWEST_TEXTS or sizes.min() <= 0:
        raise ComparisonError(
            f"got bits of shape {a.shape} and {b.shape} and bytes of shape {sizes.shape}, expected one of each "
            f"for at least {FEWEST_TEXTS} texts, none of them empty; cut long texts into pieces"
        )
    interval, interval_95 = _bootstrap_ratio(a - b, sizes, resamples, seed)
    of_a, of_b = float(a.sum() / sizes.sum()), float(b.sum() / sizes.sum())
    return BitsPerByte(of_a, of_b, of_a - of_b, interval, interval_95, len(a))


def _bootstrap_ratio(top: np.ndarray, bottom: np.ndarray, resamples: int, seed: int) -> tuple[Interval, Interval]:
    if not top.any():  # the same arm twice: BCa would divide zero by zero
        return (0.0, 0.0), (0.0, 0.0)

    def ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> Any:
        return top.sum(axis=axis) / bottom.sum(axis=axis)

    # 100 resamples at a time: BCa's jackknife at once is documents^2 numbers, 0.8 GB for 10,000.
    kind = {"paired": True, "vectorized": True, "method": "BCa", "batch": 100}
    data, rng = (top, bottom), np.random.default_rng(seed)
    first = stats.bootstrap(data, ratio, n_resamples=resamples, confidence_level=0.9, rng=rng, **kind)
    second = stats.bootstrap(data, ratio, n_resamples=0, bootstrap_result=first, **kind)
    (low, high), (low_95, high_95) = first.confidence_interval, second.confidence_interval
    return (float(low), float(high)), (float(low_95), float(high_95))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p-values of several tasks, so that the chance of any false find stays at 5 % (Holm 1979)."""
    if bad := {name: p for name, p in p_values.items() if not 0 <= p <= 1}:
        raise ComparisonError(f"got {bad}, expected p-values between 0 and 1")
    if len(p_values) < 2:  # nothing to adjust; statsmodels would collect garbage for half a second
        return dict(p_values)
    return dict(zip(p_values, multipletests(list(p_values.values()), method="holm")[1].tolist(), strict=True))


def _sample(name: str, task: TaskScores) -> _Sample:
    where = f"task {name}: " if name else ""
    a, b = (np.atleast_2d(_finite(x, f"{where}scores {arm}")) for arm, x in (("a", task.a), ("b", task.b)))
    if a.shape != b.shape or a.ndim != 2 or not a.size or a.shape[1] < 2:
        raise ComparisonError(
            f"{where}got scores of shape {a.shape} and {b.shape}, expected the same (seeds, documents) of "
            "both, at least 2 documents; align the runs first"
        )
    n, subjects = a.shape[1], task.clusters
    if subjects is not None and (len(subjects) != n or len(set(subjects)) < 2):
        raise ComparisonError(
            f"{where}got {len(subjects)} cluster labels, {len(set(subjects))} of them distinct, for {n} documents, "
            "expected one each and 2 distinct; leave clusters out for a single subject"
        )
    if task.documents is not None and len(task.documents) != n:
        raise ComparisonError(f"{where}got {len(task.documents)} document labels for {n} documents, expected one each")
    texts = list(task.documents or [(name, i) for i in range(n)])
    levels = set(np.unique(a)) | set(np.unique(b)) | {0.0}
    return _Sample(
        differences=a - b,
        texts=texts,
        subjects=[("subject", label) for label in subjects] if subjects is not None else texts,
        span=float(max(levels) - min(levels)),
        right_or_wrong=len(levels) <= 2,
    )


def _numbered(labels: Sequence[Hashable]) -> Integers:
    """Return each label's number, from 0 in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if len(bad := np.argwhere(~np.isfinite(numbers))):
        raise ComparisonError(
            f"{what}: got {len(bad)} NaN or infinite values, the first at {bad[0].tolist()}, expected finite "
            "numbers; look for NaN in the adapter and evaluate again"
        )
    return numbers


def _check_margin(margin: float, span: float = 0.0) -> None:
    if not 0 < margin < math.inf:
        raise ComparisonError(f"got a margin of {margin}, expected one above zero in the units of the scores")
    if margin >= 1 and 0 < span <= 1:
        raise ComparisonError(
            f"got a margin of {margin} for scores between 0 and 1, expected it in their units: {margin} points "
            f"of accuracy are {margin / 100:g}"
        )
