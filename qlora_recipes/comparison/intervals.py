"""What documents, flips and seeds each say of a mean difference: an interval and two p-values.

Arrays in, readings out; knows nothing of tasks' names, verdicts or files. The standard errors and degrees of freedom
(CR2, Bell and McCaffrey 2002) are computed here; distributions and tests are scipy's and statsmodels'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from statsmodels.stats.rates import confint_poisson_2indep, test_poisson_2indep, tost_poisson_2indep

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Interval = tuple[float, float]

TOO_FEW_DIFFER = 10  # below it, what an unseen document may do is judged by the span of the scores


class Reading(NamedTuple):
    """What one way of looking at the differences says."""

    interval: Interval
    """90 %."""
    interval_95: Interval
    p_equivalence: float
    """The larger of two one-sided p-values."""
    p_difference: float
    """Two-sided; below 0.05 where `interval_95` excludes zero."""


def widest(readings: Sequence[Reading]) -> Reading:
    """Return the hull of the intervals and the largest p-values: nothing is claimed that one reading denies."""
    intervals, intervals_95, p_equivalence, p_difference = zip(*readings, strict=True)
    return Reading(_hull(intervals), _hull(intervals_95), max(p_equivalence), max(p_difference))


def _hull(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def joined(texts: Integers, subjects: Integers) -> Integers:
    """Return each document's cluster, numbered from 0, by the numbers of its text and its subject, shape (documents,).

    Documents that share a text or a subject are of one cluster; and so are those that share one through others. Texts
    and subjects are each numbered from 0, without gaps.
    """
    nodes = texts, texts.max() + 1 + subjects
    graph = coo_array((np.ones(len(texts)), nodes), shape=(int(nodes[1].max()) + 1,) * 2)
    clusters: Integers = connected_components(graph, directed=False)[1][texts]
    return clusters


def student(differences: Sequence[Floats], clusters: Sequence[Integers], margin: float) -> Reading:
    """Return the t interval of the mean over tasks of each task's mean difference.

    `differences` and `clusters` hold one array of shape (documents,) a task; clusters are numbered from 0 over all
    tasks, and one that reaches over several enters with all of its documents. The standard error is CR2 of the
    regression on one constant a task, the degrees of freedom are Satterthwaite's (Bell and McCaffrey 2002, Survey
    Methodology 28), with each task's own variance as the working one. With one task and every document a cluster of its
    own this is the paired t test; with tasks that share nothing, Welch's; with 6 subjects of which one has 60 % of
    the documents, clusters - 1 degrees of freedom would find a difference that is not there in 14 %, these in 4 %.
    """
    tasks, count = len(differences), max(int(each.max()) for each in clusters) + 1
    sums, weights, shares = np.zeros(count), np.zeros(count), np.zeros((count, tasks))
    for task, (values, cluster) in enumerate(zip(differences, clusters, strict=True)):
        size = np.bincount(cluster, minlength=count)
        with np.errstate(divide="ignore"):  # a task of one cluster: no variance can be estimated
            scale = np.where(size > 0, 1 / (tasks * len(values) * np.sqrt(1 - size / len(values))), 0.0)
        part = scale * np.bincount(cluster, weights=values - values.mean(), minlength=count)
        working = np.sum(scale**2 * size) - np.sum((scale * size) ** 2) / len(values)
        variance = np.sum(part**2) / working if np.any(part) else 0.0
        sums += part
        weights += variance * scale**2 * size
        shares[:, task] = math.sqrt(variance / len(values)) * scale * size
    trace = weights.sum() - np.sum(shares**2)
    norm = np.sum(weights**2) - 2 * weights @ np.sum(shares**2, axis=1) + np.sum((shares.T @ shares) ** 2)
    freedom = trace**2 / norm if norm > 0 else count - 1
    difference = float(np.mean([values.mean() for values in differences]))
    return _t_reading(difference, float(np.sqrt(np.sum(sums**2))), freedom, margin)


def over_seeds(means: Floats, margin: float) -> Reading:
    """Return the t interval of the mean of the seeds' differences, shape (seeds,)."""
    error = float(np.std(means, ddof=1) / math.sqrt(len(means)))
    return _t_reading(float(means.mean()), error, len(means) - 1, margin)


def _t_reading(difference: float, error: float, freedom: float, margin: float) -> Reading:
    t = stats.t(freedom)
    half, half_95 = (t.isf([0.05, 0.025]) * error).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread: infinite, and 0 / 0 at a bound
        z = np.nan_to_num(np.array([margin + difference, margin - difference, abs(difference)]) / error)
    below, above, beyond = t.sf(z).tolist()
    return Reading(
        (difference - half, difference + half),
        (difference - half_95, difference + half_95),
        max(below, above),
        2 * beyond,
    )


def rare_events(events: Floats, span: float, margin: float) -> Reading:
    """Return what gains and losses say where few documents differ; `events` are differences, shape (documents,).

    With few flips the t interval is too short: at 272 documents and a true loss of one point, all of it right to
    wrong, it is inside a margin of one point in 24 %, the score interval of two Poisson counts in 6.5 %. Beside it
    stands the exact conditional test of gains against losses (McNemar's), so that 4 losses and no gain are no
    difference. Events of unequal size are counted in units of sum(d^2) / sum(|d|), which keeps mean and variance
    (the scaled Poisson distribution of Bohm and Zech 2014, arXiv 1309.1287); of 0/1 scores that is flips. Where fewer
    than ten differ, an event is as large as `span`, from the lowest score to the highest.
    """
    size = np.abs(events)
    unit = np.sum(size**2) / np.sum(size) if np.count_nonzero(size) >= TOO_FEW_DIFFER else span
    unit = unit or 100 * margin  # all scores are zero: take the margin for one point of a hundred
    gains, losses = np.sum(size[events > 0]) / unit, np.sum(size[events < 0]) / unit
    return widest([_score_test(gains, losses, len(size), unit, margin), _mcnemar(gains, losses, len(size), unit)])


def _score_test(gains: float, losses: float, n: int, unit: float, margin: float) -> Reading:
    counts, kind = (gains, n, losses, n), {"method": "score", "compare": "diff"}
    with np.errstate(divide="ignore", invalid="ignore"):  # statsmodels forms a ratio too, which is not used
        p_equivalence = tost_poisson_2indep(*counts, -margin / unit, margin / unit, **kind).pvalue
        p_difference = test_poisson_2indep(*counts, value=0, **kind).pvalue if gains + losses else 1.0
        bounds = [confint_poisson_2indep(*counts, alpha=alpha, **kind) for alpha in (0.1, 0.05)]
    interval, interval_95 = ((float(unit * low), float(unit * high)) for low, high in bounds)
    return Reading(interval, interval_95, float(p_equivalence), float(p_difference))


def _mcnemar(gains: float, losses: float, n: int, unit: float) -> Reading:
    """The exact test of gains among all flips with Clopper and Pearson's interval; says nothing of equivalence.

    Both take parts of a flip, through the beta distribution.
    """
    flips, difference = gains + losses, float(unit * (gains - losses) / n)
    if not flips:
        return Reading((0.0, 0.0), (0.0, 0.0), 0.0, 1.0)
    low = stats.beta.ppf(0.025, gains, losses + 1) if gains else 0.0
    high = stats.beta.isf(0.025, gains + 1, losses) if losses else 1.0
    interval_95 = float(unit * (2 * low - 1) * flips / n), float(unit * (2 * high - 1) * flips / n)
    tail = stats.beta.cdf(0.5, max(gains, losses), min(gains, losses) + 1)
    return Reading((difference, difference), interval_95, 0.0, float(min(1.0, 2 * tail)))
