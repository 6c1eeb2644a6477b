"""The paired statistics against scipy and statsmodels on hand-made examples, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.power import normal_power
from statsmodels.stats.weightstats import ttost_paired

from qlora_recipes.comparison.paired import (
    TaskScores,
    bits_per_byte_difference,
    compare,
    flips,
    holm,
    needed_documents,
    overall,
)
from qlora_recipes.errors import ComparisonError


def accuracy(gains: int, losses: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a and b with so many documents won and lost; the others are right in both."""
    a, b = np.ones(n), np.ones(n)
    b[:gains] = 0
    a[gains : gains + losses] = 0
    return a, b


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    b = rng.uniform(size=240)
    return np.clip(b + rng.normal(-0.01, 0.05, 240), 0, 1), b


# The verdict


@pytest.mark.parametrize(
    ("gains", "losses", "verdict"),
    [
        (60, 60, "equivalent"),
        (50, 60, "equivalent"),  # equivalence comes first: whether zero is excluded is not asked
        (50, 90, "different"),
        (60, 90, "different"),
        (60, 80, "inconclusive"),
    ],
)
def test_verdict_of_3000_documents_at_one_point(gains: int, losses: int, verdict: str) -> None:
    result = compare(*accuracy(gains, losses, 3000), margin=0.01)
    assert result.verdict == verdict
    assert result.difference == pytest.approx((gains - losses) / 3000)
    assert (result.n, result.n_clusters, result.margin) == (3000, 3000, 0.01)
    assert (result.n_needed is None) == (verdict != "inconclusive")


def test_a_difference_inside_the_margin_is_equivalent_though_it_excludes_zero() -> None:
    result = compare(*accuracy(100, 160, 30_000), margin=0.01)
    assert result.verdict == "equivalent"
    assert result.interval_95[1] < 0
    assert result.p_difference < 0.05


def test_points_and_shares_give_the_same_verdict() -> None:
    for gains, losses, n in [(60, 80, 3000), (3, 1, 400), (0, 0, 500)]:
        a, b = accuracy(gains, losses, n)
        share, points = compare(a, b, margin=0.01), compare(100 * a, 100 * b, margin=1.0)
        assert share.verdict == points.verdict
        np.testing.assert_allclose(points.interval, 100 * np.array(share.interval), atol=1e-4)
        assert points.p_equivalence == pytest.approx(share.p_equivalence)


def test_swapping_the_arms_mirrors_the_result() -> None:
    a, b = accuracy(4, 9, 700)
    one, other = compare(a, b, margin=0.01), compare(b, a, margin=0.01)
    np.testing.assert_allclose(one.interval, -np.array(other.interval)[::-1], atol=1e-6)
    assert one.p_equivalence == pytest.approx(other.p_equivalence)
    assert one.p_difference == pytest.approx(other.p_difference)


def test_a_limited_run_is_never_equivalent_but_may_be_different() -> None:
    a, b = accuracy(60, 60, 3000)
    assert compare(a, b, margin=0.01).verdict == "equivalent"
    limited = compare(a, b, margin=0.01, limited=True)
    assert (limited.verdict, limited.limited) == ("inconclusive", True)
    assert compare(*accuracy(60, 120, 3000), margin=0.01, limited=True).verdict == "different"


def test_p_values_and_intervals_agree() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        n, margin = int(rng.choice([60, 400, 3000])), rng.uniform(0.002, 0.05)
        gains, losses = rng.integers(0, 20, 2)
        result = compare(*accuracy(gains, losses, n), margin=margin)
        inside = -margin < result.interval[0] and result.interval[1] < margin
        assert (result.p_equivalence < 0.05) == inside
        assert (result.p_difference < 0.05) == (result.interval_95[0] > 0 or result.interval_95[1] < 0)
        assert result.interval_95[0] <= result.interval[0] <= result.difference <= result.interval[1]


# Identities


def test_without_clusters_it_is_the_paired_t_test(scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    result, student = compare(a, b, margin=0.02), stats.ttest_rel(a, b)
    np.testing.assert_allclose(result.interval, student.confidence_interval(0.90))
    np.testing.assert_allclose(result.interval_95, student.confidence_interval(0.95))
    assert result.p_difference == pytest.approx(student.pvalue)
    assert result.p_equivalence == pytest.approx(ttost_paired(a, b, -0.02, 0.02)[0])


def test_with_equal_clusters_it_is_the_clustered_regression(scores: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = scores
    subjects = np.arange(240) % 12
    fit = OLS(a - b, np.ones(240)).fit(cov_type="cluster", cov_kwds={"groups": subjects}, use_t=True)
    result = compare(a, b, margin=0.02, clusters=[f"subject {i}" for i in subjects])
    np.testing.assert_allclose(result.interval, fit.conf_int(0.1)[0])
    assert result.p_difference == pytest.approx(fit.pvalues[0])
    assert result.n_clusters == 12


def test_with_unequal_clusters_it_is_cr2_and_its_degrees_of_freedom(
    scores: tuple[np.ndarray, np.ndarray],
) -> None:
    a, b = scores
    sizes = [120, 60, 30, 20, 10]
    subjects, n = np.repeat(range(5), sizes), 240
    rest = np.eye(n) - np.full((n, n), 1 / n)
    columns = []  # (I - H)' A e / n of each cluster, with A = (I - H_gg)^(-1/2), Bell and McCaffrey 2002
    for subject in range(5):
        chosen = np.flatnonzero(subjects == subject)
        values, vectors = np.linalg.eigh(rest[np.ix_(chosen, chosen)])
        columns.append(rest[:, chosen] @ (vectors / np.sqrt(values)) @ vectors.T @ np.ones(len(chosen)) / n)
    matrix = np.array(columns)
    error = np.linalg.norm(matrix @ (a - b))
    values = np.linalg.eigvalsh(matrix @ matrix.T)
    freedom = values.sum() ** 2 / (values**2).sum()
    expected = np.mean(a - b) + np.array([-1, 1]) * stats.t.isf(0.05, freedom) * error
    np.testing.assert_allclose(compare(a, b, margin=0.02, clusters=subjects).interval, expected)


def test_overall_of_two_tasks_is_welchs_test() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.normal(0.01, 0.1, 150), rng.normal(-0.03, 0.3, 900)
    tasks = {"one": TaskScores(one, 0 * one), "two": TaskScores(two, 0 * two)}
    result, welch = overall(tasks, margin=0.02), stats.ttest_ind(one, -two, equal_var=False)
    assert result.difference == pytest.approx((one.mean() + two.mean()) / 2)
    np.testing.assert_allclose(result.interval, np.array(welch.confidence_interval(0.9)) / 2)
    assert result.p_difference == pytest.approx(welch.pvalue)
    assert result.n == 1050


def test_overall_of_one_task_is_that_task() -> None:
    for gains, losses, n in [(80, 90, 3000), (5, 3, 400), (0, 0, 400)]:
        a, b = accuracy(gains, losses, n)
        subjects = [i % 7 for i in range(n)]
        assert overall({"task": TaskScores(a, b, subjects)}, margin=0.01) == compare(
            a, b, margin=0.01, clusters=subjects
        )


def test_overall_counts_each_task_the_same() -> None:
    large, small = TaskScores(*accuracy(0, 0, 10_000)), TaskScores(*accuracy(0, 40, 200))
    result = overall({"large": large, "small": small}, margin=0.01)
    assert result.difference == pytest.approx(-0.1)
    assert result.verdict == "different"


# Few differences


def test_no_difference_is_no_proof_until_300_documents() -> None:
    few, more = (compare(*accuracy(0, 0, n), margin=0.01) for n in (5, 300))
    assert few.verdict == "inconclusive"
    assert few.interval[1] > 0.5
    assert few.p_difference == 1
    assert 250 < few.n_needed < 1000
    assert more.verdict == "equivalent"
    # The rule of three says 3 / 300; the score bound is z^2 / n = 2.71 / 300.
    assert more.interval[1] == pytest.approx(stats.norm.isf(0.05) ** 2 / 300, rel=1e-3)


def test_one_flip_does_not_shorten_the_interval_to_nothing() -> None:
    student = stats.ttest_rel(*accuracy(0, 1, 300)).confidence_interval(0.9)
    assert student.low > -0.01  # the t interval alone would say equivalent
    result = compare(*accuracy(0, 1, 300), margin=0.01)
    assert result.interval[0] < -0.01
    assert result.verdict == "inconclusive"


def test_real_scores_that_never_differ_are_bounded_by_their_span() -> None:
    scores = np.linspace(0, 2.5, 40)
    result = compare(scores, scores, margin=0.05)
    assert result.verdict == "inconclusive"
    assert result.interval[1] == pytest.approx(2.5 * stats.norm.isf(0.05) ** 2 / 40, rel=1e-3)


def test_scores_that_are_all_zero_take_their_scale_from_the_margin() -> None:
    for margin in (0.01, 1.0):
        assert compare(np.zeros(100), np.zeros(100), margin=margin).verdict == "inconclusive"
        assert compare(np.zeros(400), np.zeros(400), margin=margin).verdict == "equivalent"


def test_the_same_difference_everywhere_is_different() -> None:
    result = compare(np.full(200, 2.5), np.full(200, 2.25), margin=0.1)
    assert result.verdict == "different"
    assert result.interval == pytest.approx((0.25, 0.25))
    assert result.p_difference == 0


def test_rare_events_and_t_agree_where_one_takes_over_from_the_other() -> None:
    below, above = (compare(*accuracy(n // 2, n - n // 2, 3000), margin=0.01) for n in (98, 100))
    assert np.ptp(below.interval) == pytest.approx(np.ptp(above.interval), rel=0.02)


# Seeds


def test_over_seeds_the_wider_interval_wins() -> None:
    b = np.ones((3, 3000))
    a = b.copy()
    for seed, losses in enumerate([120, 240, 390]):
        a[seed, :losses] = 0
    result = compare(a, b, margin=0.5)
    per_seed = (a - b).mean(axis=1)
    over_seeds = stats.ttest_1samp(per_seed, 0).confidence_interval(0.9)
    assert result.seed_differences == pytest.approx(tuple(per_seed))
    assert result.seed_interval == pytest.approx(tuple(over_seeds))
    assert result.interval == pytest.approx(tuple(over_seeds))
    documents = compare((a - b).mean(axis=0), np.zeros(3000), margin=0.5).interval
    assert result.interval[0] < documents[0] < documents[1] < result.interval[1]


def test_seeds_that_disagree_are_not_equivalent_though_their_mean_is() -> None:
    steady = compare(*seeds_of([(30, 30), (31, 30), (30, 31)]), margin=0.01)
    assert steady.verdict == "equivalent"
    assert steady.interval != pytest.approx(steady.seed_interval)
    wild = compare(*seeds_of([(90, 30), (60, 60), (30, 90)]), margin=0.01)
    assert wild.verdict == "inconclusive"
    assert wild.interval == pytest.approx(wild.seed_interval)


def seeds_of(flips_of_seeds: list[tuple[int, int]], n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    a, b = zip(*(accuracy(gains, losses, n) for gains, losses in flips_of_seeds), strict=True)
    return np.array(a), np.array(b)


def test_one_seed_in_two_dimensions_is_one_in_one() -> None:
    a, b = accuracy(40, 60, 2000)
    assert compare(a[None], b[None], margin=0.01) == compare(a, b, margin=0.01)


# How many documents


def test_needed_documents_is_what_two_one_sided_tests_need() -> None:
    n = needed_documents(0.2236, 0.01)
    assert n == 4282
    # At no true difference both bounds are as far away: 1 - 2 * 0.1 is the power of 0.8.
    assert normal_power(0.01 / 0.2236, n, 0.05, alternative="larger") == pytest.approx(0.9, abs=1e-3)
    assert needed_documents(0.2236, 0.01, difference=0.005) == pytest.approx(4 * n, abs=4)
    assert needed_documents(0, 0.01) == 2


@pytest.mark.parametrize(
    ("gains", "losses", "n", "slack"),
    [(60, 80, 3000, 1.0), (20, 28, 1200, 1.0), (1, 2, 300, 1.2), (0, 0, 20, 1.0)],
)
def test_with_the_needed_documents_there_is_a_verdict(gains: int, losses: int, n: int, slack: float) -> None:
    needed = compare(*accuracy(gains, losses, n), margin=0.01).n_needed
    assert needed > n
    flipped = (gains + losses) * needed // n
    for won in range(flipped // 2 + 1):  # as many flips per document, shared out in every way
        result = compare(*accuracy(won, flipped - won, int(slack * needed)), margin=0.01)
        assert result.verdict != "inconclusive"


# Beside accuracy


def test_flips_are_counted_from_the_baseline() -> None:
    a, b = [1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 1]
    result = flips(a, b, list("AXYABCZ"), list("BAAACCA"))
    assert (result.right_to_wrong, result.wrong_to_right, result.wrong_to_other_wrong) == (3, 1, 1)
    assert result.p == pytest.approx(stats.binomtest(1, 4).pvalue)
    assert result.n == 7
    assert flips(a, b).wrong_to_other_wrong is None
    assert flips([1, 1], [1, 1]).p == 1
    assert np.mean(a) - np.mean(b) == pytest.approx((1 - 3) / 7)


def test_bits_per_byte_is_the_ratio_of_sums_with_scipys_interval() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(200, 2000, 80)
    b = sizes * rng.normal(0.9, 0.1, 80)
    a = b + sizes * rng.normal(0.01, 0.02, 80)
    result = bits_per_byte_difference(a, b, sizes)
    assert result.a == pytest.approx(a.sum() / sizes.sum())
    assert result.difference == pytest.approx((a - b).sum() / sizes.sum())
    scipys = stats.bootstrap(
        (a - b, sizes),
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=2000,
        rng=np.random.default_rng(0),
        confidence_level=0.9,
    )
    assert result.interval == pytest.approx(tuple(scipys.confidence_interval))
    assert result.interval_95[0] < result.interval[0] < result.difference < result.interval[1]
    assert result == bits_per_byte_difference(a, b, sizes)
    same = bits_per_byte_difference(b, b, sizes)
    assert (same.difference, same.interval, same.interval_95) == (0, (0, 0), (0, 0))


def test_holm_on_four_tasks() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {}


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"margin": 0}, "margin of 0, expected one above zero"),
        ({"margin": -0.01}, "margin of -0.01"),
        ({"margin": float("nan")}, "margin of nan"),
        ({"margin": 1.5}, "1.5 points of accuracy are 0.015"),
        ({"scores_a": [1, 0, 1]}, r"shape \(1, 3\) and \(1, 4\)"),
        ({"scores_a": [[1, 0, 1, 1]] * 2}, r"shape \(2, 4\) and \(1, 4\)"),
        ({"scores_a": [1], "scores_b": [1]}, "at least 2 documents"),
        ({"scores_a": [], "scores_b": []}, "at least 2 documents"),
        ({"scores_a": np.ones((0, 4)), "scores_b": np.ones((0, 4))}, "at least 2 documents"),
        ({"scores_a": [1, np.nan, 1, np.inf]}, r"scores a: got 2 NaN or infinite values, the first at \[1\]"),
        ({"clusters": [1, 2]}, "2 cluster labels, 2 of them distinct, for 4 documents"),
        ({"clusters": ["law"] * 4}, "1 of them distinct.*leave clusters out"),
    ],
)
def test_compare_refuses(change: dict[str, object], said: str) -> None:
    given = {"scores_a": [1, 0, 1, 1], "scores_b": [1, 1, 0, 1], "margin": 0.01} | change
    with pytest.raises(ComparisonError, match=said):
        compare(**given)


def test_overall_refuses_and_names_the_task() -> None:
    with pytest.raises(ComparisonError, match="task arc: got scores of shape"):
        overall({"mmlu": TaskScores([1, 0], [0, 0]), "arc": TaskScores([1, 0], [0])}, margin=0.01)
    with pytest.raises(ComparisonError, match="'mmlu': 1, 'arc': 2"):
        overall({"mmlu": TaskScores([1, 0], [0, 0]), "arc": TaskScores(np.eye(2), np.eye(2))}, margin=0.01)
    with pytest.raises(ComparisonError, match=r"got tasks with \{\} seeds"):
        overall({}, margin=0.01)


def test_the_others_refuse() -> None:
    with pytest.raises(ComparisonError, match=r"got the score 0\.5"):
        flips([0.5, 1], [0, 1])
    with pytest.raises(ComparisonError, match="the answers of both arms or of none"):
        flips([0, 1], [0, 1], ["A", "B"])
    with pytest.raises(ComparisonError, match=r"shape \(2,\) and \(3,\)"):
        flips([0, 1], [0, 1, 1])
    with pytest.raises(ComparisonError, match=r"with \[2, 3\] answers"):
        flips([0, 1], [0, 1], list("AB"), list("ABC"))
    with pytest.raises(ComparisonError, match="at least 10 texts"):
        bits_per_byte_difference([1.0] * 9, [2.0] * 9, [1] * 9)
    with pytest.raises(ComparisonError, match="none of them empty"):
        bits_per_byte_difference([1.0] * 10, [2.0] * 10, [1] * 9 + [0])
    with pytest.raises(ComparisonError, match="'b': nan"):
        holm({"a": 0.1, "b": float("nan")})
    with pytest.raises(ComparisonError, match="the difference inside the margin"):
        needed_documents(0.2, 0.01, difference=0.01)
    with pytest.raises(ComparisonError, match="got sd -1"):
        needed_documents(-1, 0.01)


# A table of means, as papers print them: eight cells of MMLU, QLoRA's Table 4 (arXiv 2305.14314)

BF16 = [38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5]
TABLE_4 = {
    "fp4": ([37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3], -0.85, (-1.51, -0.19), "different"),
    "nf4": ([39.0, 44.5, 47.5, 50.7, 57.3, 59.2, 61.8, 63.9], -0.05, (-0.64, 0.54), "equivalent"),
}


@pytest.mark.parametrize("precision", TABLE_4)
def test_a_small_table_of_means_has_the_paired_t_interval(precision: str) -> None:
    scores, difference, interval, verdict = TABLE_4[precision]
    found = compare(scores, BF16, margin=1.0)
    assert found.difference == pytest.approx(difference)
    assert found.interval == pytest.approx(interval, abs=0.005)
    assert found.verdict == verdict
    if precision == "nf4":
        assert found.p_equivalence == pytest.approx(0.009, abs=0.0005)


def test_four_losses_and_no_gain_are_no_difference() -> None:
    before, after = np.ones(880), np.r_[np.zeros(4), np.ones(876)]
    found = compare(after, before, margin=0.001)
    assert found.p_difference == pytest.approx(flips(after, before).p) == pytest.approx(0.125)
    assert found.interval_95[0] < 0 < found.interval_95[1]
    assert found.verdict == "inconclusive"


def test_the_same_questions_asked_twice_are_as_many_as_asked_once() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    once = compare(a, b, margin=0.01)
    twice = overall({name: TaskScores(a, b, None, range(300)) for name in ("asked", "asked again")}, margin=0.01)
    assert twice.interval == pytest.approx(once.interval)
    assert (twice.n, twice.n_clusters) == (600, 300)
    subjects = [i % 20 for i in range(300)]
    of_one = compare(a, b, margin=0.01, clusters=subjects)
    of_two = overall({name: TaskScores(a, b, subjects) for name in ("asked", "asked again")}, margin=0.01)
    assert of_two.interval_95 == pytest.approx(of_one.interval_95)
    assert of_two.n_clusters == 20


def test_where_seeds_are_missing_documents_are_not_asked_for() -> None:
    rng = np.random.default_rng(4)
    lost = np.array([0.005, 0.031])[:, None]
    scores = (rng.uniform(size=(2, 20_000)) > lost).astype(float)
    found = compare(scores, np.ones_like(scores), margin=0.001)
    assert found.verdict == "inconclusive"
    assert found.n_needed is None
    assert found.seeds_needed is not None and found.seeds_needed > 2
