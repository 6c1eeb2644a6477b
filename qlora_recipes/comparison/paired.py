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
from statsmodels.regression.linear_model import WLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.rates import confint_poisson_2indep, test_poisson_2indep, tost_poisson_2indep

from qlora_recipes.errors import ComparisonError

Interval = tuple[float, float]
Verdict = Literal["equivalent", "different", "inconclusive"]

FEW_DIFFER = 100  # above it the two intervals agree within 3 %, and the score test costs 9 ms
TOO_FEW_DIFFER = 10  # below it, what an unseen document may do is judged by the span of the scores
FEWEST_TEXTS = 10  # fewer give a bootstrap little but repeats


@dataclass(frozen=True)
class TaskScores:
    """Both arms' scores of one task, `(documents,)` or `(seeds, documents)`, and each document's subject."""

    a: ArrayLike
    b: ArrayLike
    clusters: Sequence[Hashable] | None = None


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
    """Documents."""
    n_clusters: int
    """Subjects; every document is its own where none were given."""
    n_needed: int | None
    """When inconclusive, the documents that would bring a verdict; None where there are so many already."""
    seed_differences: tuple[float, ...]
    """Mean of a - b of each seed."""
    seed_interval: Interval | None
    """90 % over seeds; None for one seed."""
    limited: bool


class _Sample(NamedTuple):
    differences: np.ndarray  # (seeds, documents)
    clusters: np.ndarray  # (documents,), numbered from 0
    span: float  # from the lowest score, or zero, to the highest


class _Reading(NamedTuple):
    interval: Interval
    interval_95: Interval
    p_equivalence: float
    p_difference: float


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
    return _judge([_sample(TaskScores(scores_a, scores_b, clusters))], margin, limited)


def overall(tasks: Mapping[str, TaskScores], *, margin: float, limited: bool = False) -> Comparison:
    """Compare two arms over several tasks, by the plain mean of the tasks' differences.

    Each task counts the same, as in the leaderboards' average, so that 10,000 documents of one do not drown
    800 of another. What varies is documents and subjects within the tasks: the verdict is about these tasks.
    """
    samples = [_sample(task, f"task {name}: ") for name, task in tasks.items()]
    seeds = {name: len(sample.differences) for name, sample in zip(tasks, samples, strict=True)}
    if len(set(seeds.values())) != 1:
        raise ComparisonError(f"got tasks with {seeds} seeds, expected as many of each; evaluate the rest")
    return _judge(samples, margin, limited)


def _judge(samples: list[_Sample], margin: float, limited: bool) -> Comparison:
    _check_margin(margin, max(sample.span for sample in samples))
    per_seed = np.mean([sample.differences.mean(axis=1) for sample in samples], axis=0)
    documents = _over_documents(samples, margin)
    seeds = [_student([(per_seed, np.ones(len(per_seed)))], margin)] if len(per_seed) > 1 else []
    reading = _widest(documents + seeds)
    verdict = _verdict(reading, margin, limited)
    n = sum(len(sample.clusters) for sample in samples)
    needed = _documents_for_a_verdict(documents, n, margin)
    return Comparison(
        difference=float(per_seed.mean()),
        **reading._asdict(),
        verdict=verdict,
        margin=float(margin),
        n=n,
        n_clusters=sum(int(sample.clusters.max()) + 1 for sample in samples),
        n_needed=needed if verdict == "inconclusive" and needed > n else None,
        seed_differences=tuple(per_seed.tolist()),
        seed_interval=seeds[0].interval if seeds else None,
        limited=limited,
    )


def _verdict(reading: _Reading, margin: float, limited: bool) -> Verdict:
    low, high = reading.interval
    if -margin < low and high < margin:
        return "inconclusive" if limited else "equivalent"
    low, high = reading.interval_95
    return "different" if low > 0 or high < 0 else "inconclusive"


def _widest(readings: list[_Reading]) -> _Reading:
    """The hull of the intervals and the largest p-values: nothing is claimed that one reading denies."""
    intervals, intervals_95, p_equivalence, p_difference = zip(*readings, strict=True)
    return _Reading(_hull(intervals), _hull(intervals_95), max(p_equivalence), max(p_difference))


def _hull(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _over_documents(samples: list[_Sample], margin: float) -> list[_Reading]:
    readings = [_student([_cluster_means(sample) for sample in samples], margin)]
    n = sum(len(sample.clusters) for sample in samples)
    # Weighted so that the mean over all documents is the mean over tasks.
    weights = [n / (len(samples) * len(sample.clusters)) for sample in samples]
    pairs = list(zip(weights, samples, strict=True))
    events = np.concatenate([weight * sample.differences.mean(axis=0) for weight, sample in pairs])
    if np.count_nonzero(events) < FEW_DIFFER:
        span = max(weight * sample.span for weight, sample in pairs)
        readings.append(_rare_events(events, span, margin))
    return readings


def _cluster_means(sample: _Sample) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.bincount(sample.clusters)
    return np.bincount(sample.clusters, weights=sample.differences.mean(axis=0)) / sizes, sizes


def _student(parts: list[tuple[np.ndarray, np.ndarray]], margin: float) -> _Reading:
    """The t interval of the plain mean of parts, each the `(means, sizes)` of its clusters.

    HC2 of means weighted by size is CR2 of the documents (Bell and McCaffrey 2002), and the plain paired t
    test where each document is its own cluster. Parts join with Welch's degrees of freedom.
    """
    fits = [WLS(means, np.ones(len(means)), weights=sizes).fit(cov_type="HC2") for means, sizes in parts]
    difference = float(np.mean([fit.params[0] for fit in fits]))
    variances = np.array([fit.bse[0] for fit in fits]) ** 2
    error = math.sqrt(variances.sum()) / len(fits)
    shares = variances / variances.sum() if error else np.full(len(fits), 1 / len(fits))
    t = stats.t(1 / np.sum(shares**2 / [_degrees_of_freedom(sizes) for _, sizes in parts]))
    half, half_95 = (t.isf([0.05, 0.025]) * error).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread: infinite, and 0 / 0 at a bound
        z = np.nan_to_num(np.array([margin + difference, margin - difference, abs(difference)]) / error)
    below, above, beyond = t.sf(z).tolist()
    return _Reading(
        (difference - half, difference + half),
        (difference - half_95, difference + half_95),
        max(below, above),
        2 * beyond,
    )


def _degrees_of_freedom(sizes: np.ndarray) -> float:
    """Satterthwaite's for the CR2 variance of a mean (Bell and McCaffrey 2002, Survey Methodology 28).

    That is clusters - 1 where all are alike, and fewer where a few outweigh the rest: with 6 subjects, one of
    them 60 % of the documents, clusters - 1 finds a difference that is not there in 14 %, this in 4 %.
    """
    share = sizes / sizes.sum()
    cross = share**2 / (1 - share)
    return float(1 / (np.sum(share**2) + np.sum(cross) ** 2 - np.sum(cross**2)))


def _rare_events(events: np.ndarray, span: float, margin: float) -> _Reading:
    """The score test of gains against losses, as two Poisson counts among as many documents.

    With few flips the t interval is too short: at 272 documents and a true loss of one point, all of it right
    to wrong, it is inside a margin of one point in 24 %, the score interval in 6.5 %. Events of unequal size
    are counted in units of sum(d^2) / sum(|d|), which keeps mean and variance (the scaled Poisson
    distribution of Bohm and Zech 2014, arXiv 1309.1287); of 0/1 scores that is flips.
    """
    size = np.abs(events)
    unit = np.sum(size**2) / np.sum(size) if np.count_nonzero(size) >= TOO_FEW_DIFFER else span
    unit = unit or 100 * margin  # all scores are zero: take the margin for one point of a hundred
    gains, losses = np.sum(size[events > 0]) / unit, np.sum(size[events < 0]) / unit
    counts, kind = (gains, len(size), losses, len(size)), {"method": "score", "compare": "diff"}
    with np.errstate(divide="ignore", invalid="ignore"):  # statsmodels forms a ratio too, which is not used
        p_equivalence = tost_poisson_2indep(*counts, -margin / unit, margin / unit, **kind).pvalue
        p_difference = test_poisson_2indep(*counts, value=0, **kind).pvalue if gains + losses else 1.0
        low, high = confint_poisson_2indep(*counts, alpha=0.1, **kind)
        low_95, high_95 = confint_poisson_2indep(*counts, alpha=0.05, **kind)
    low, high, low_95, high_95 = (float(unit * bound) for bound in (low, high, low_95, high_95))
    return _Reading((low, high), (low_95, high_95), float(p_equivalence), float(p_difference))


def _documents_for_a_verdict(readings: list[_Reading], n: int, margin: float) -> int:
    """Where the half widths at 90 and at 95 % add up to the margin, no outcome is inconclusive any more.

    The t interval shrinks with the root of the documents, that of rare events about with their number.
    """
    student, widest = (
        float(np.ptp(reading.interval) + np.ptp(reading.interval_95)) / 2
        for reading in (readings[0], _widest(readings))
    )
    sd = student * math.sqrt(n) / float(stats.norm.isf(0.05) + stats.norm.isf(0.025))
    return max(needed_documents(sd, margin, power=0.95), math.ceil(n * widest / margin))


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
    a, b = _numbers(scores_a, "scores a"), _numbers(scores_b, "scores b")
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
    a, b, sizes = _numbers(bits_a, "bits a"), _numbers(bits_b, "bits b"), _numbers(n_bytes, "bytes")
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


def _sample(task: TaskScores, where: str = "") -> _Sample:
    a, b = (np.atleast_2d(_numbers(x, f"{where}scores {arm}")) for arm, x in (("a", task.a), ("b", task.b)))
    if a.shape != b.shape or a.ndim != 2 or not a.size or a.shape[1] < 2:
        raise ComparisonError(
            f"{where}got scores of shape {a.shape} and {b.shape}, expected the same (seeds, documents) of "
            "both, at least 2 documents; align the runs first"
        )
    span = float(max(a.max(), b.max(), 0.0) - min(a.min(), b.min(), 0.0))
    if task.clusters is None:
        return _Sample(a - b, np.arange(a.shape[1]), span)
    numbers = {label: i for i, label in enumerate(dict.fromkeys(task.clusters))}
    if len(task.clusters) != a.shape[1] or len(numbers) < 2:
        raise ComparisonError(
            f"{where}got {len(task.clusters)} cluster labels, {len(numbers)} of them distinct, for "
            f"{a.shape[1]} documents, expected one each and 2 distinct; leave clusters out for a single subject"
        )
    return _Sample(a - b, np.array([numbers[label] for label in task.clusters]), span)


def _numbers(values: ArrayLike, what: str) -> np.ndarray:
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
