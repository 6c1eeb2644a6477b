"""How often the verdicts are wrong, on simulated scores: at most 6.5 % where 5 % is promised."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qlora_recipes.comparison.paired import (
    TaskScores,
    bits_per_byte_difference,
    compare,
    needed_documents,
    overall,
)
from qlora_recipes.comparison.power import detectable_difference, plan_sentence
from qlora_recipes.errors import ComparisonError

ALLOWED = 0.065  # of 1,500 repetitions of a true 5 %, 2.7 standard errors
NO_MARGIN = 1e-6  # nothing is equivalent to within it, so that it hides no false "different"


def slow(*cases: object) -> list[Any]:
    """Leave further cases of the same to `make test-all`."""
    return [pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow) for case in cases]


def rates(verdicts: Iterator[str]) -> dict[str, float]:
    counts = Counter(verdicts)
    return {name: counts[name] / counts.total() for name in ("equivalent", "different", "inconclusive")}


@functools.cache
def verdict_of_counts(gains: int, losses: int, n: int, margin: float) -> str:
    """Without subjects the counts are all that matters, which spares most of the repetitions."""
    differences = np.repeat([1.0, -1.0, 0.0], [gains, losses, n - gains - losses])
    return compare((differences > 0) * 1, (differences < 0) * 1, margin=margin).verdict


def flip_rates(n: int, up: float, down: float, margin: float, seed: int, times: int) -> dict[str, float]:
    drawn = np.random.default_rng(seed).multinomial(n, [up, down, 1 - up - down], times)
    return rates(verdict_of_counts(int(row[0]), int(row[1]), n, margin) for row in drawn)


@pytest.mark.parametrize(("n", "flipped"), [(3000, 0.05), *slow((1000, 0.02), (300, 0.06), (100, 0.03))])
def test_no_true_difference_is_seldom_called_different(n: int, flipped: float) -> None:
    assert flip_rates(n, flipped / 2, flipped / 2, NO_MARGIN, 0, 1500)["different"] <= ALLOWED


@pytest.mark.parametrize("sign", [1, -1])
def test_a_true_difference_at_the_margin_is_seldom_called_equivalent(sign: int) -> None:
    up, down = (0.025 + sign * 0.005, 0.025 - sign * 0.005)
    assert flip_rates(3000, up, down, 0.01, 1, 1500)["equivalent"] <= ALLOWED


@pytest.mark.parametrize(("n", "up"), [(320, 0.0), (500, 0.0), (500, 0.002), (900, 0.003)])
def test_nor_where_flips_are_rare(n: int, up: float) -> None:
    assert flip_rates(n, up, up + 0.01, 0.01, 2, 1500)["equivalent"] <= ALLOWED


def test_the_t_interval_alone_is_wrong_where_flips_are_rare() -> None:
    losses = np.random.default_rng(3).binomial(320, 0.01, 4000)
    half = stats.t.isf(0.05, 319) * np.sqrt(losses / 320 * (1 - losses / 320) / 319)
    assert np.mean(-losses / 320 - half > -0.01) > 0.12


def test_a_difference_of_1_2_points_is_found() -> None:
    assert flip_rates(3000, 0.019, 0.031, 0.01, 4, 1500)["different"] >= 0.75


def test_the_needed_documents_are_enough() -> None:
    n = needed_documents(sd=np.sqrt(0.05), margin=0.01)
    assert 0.77 <= flip_rates(n, 0.025, 0.025, 0.01, 5, 600)["equivalent"] <= 0.83


def subjects(sizes: np.ndarray, spread: float, mean: float, seed: int) -> Callable[[], np.ndarray]:
    """Differences of documents of which 20 % flip, in each subject more one way or the other."""
    rng, of_document = np.random.default_rng(seed), np.repeat(np.arange(len(sizes)), sizes)

    def draw() -> np.ndarray:
        lean = np.clip(mean + spread * rng.standard_normal(len(sizes)), -0.2, 0.2)[of_document]
        drawn = rng.uniform(size=len(lean))
        return np.where(drawn < 0.1 + lean / 2, 1, np.where(drawn > 0.9 + lean / 2, -1, 0))

    return draw


DESIGNS = {
    "30 alike": np.full(30, 60),
    "57 as in MMLU": np.r_[np.full(40, 60), np.full(14, 150), 450, 400, 700],
    "6 alike": np.full(6, 150),
    "6, one of them 60 %": np.array([40, 60, 80, 100, 120, 600]),
}


@pytest.mark.parametrize("design", ["6 alike", *slow("30 alike", "57 as in MMLU", "6, one of them 60 %")])
def test_subjects_that_share_effects_do_not_mislead(design: str) -> None:
    sizes = DESIGNS[design]
    labels = np.repeat(np.arange(len(sizes)), sizes).tolist()
    null, at_margin = subjects(sizes, 0.05, 0.0, 6), subjects(sizes, 0.05, 0.05, 7)
    assert rates(verdict(null(), NO_MARGIN, labels) for _ in range(1000))["different"] <= ALLOWED
    assert rates(verdict(at_margin(), 0.05, labels) for _ in range(1000))["equivalent"] <= ALLOWED


def test_without_subjects_the_same_scores_mislead_twice_as_often() -> None:
    null, at_margin = (subjects(DESIGNS["30 alike"], 0.05, mean, 8) for mean in (0.0, 0.05))
    assert rates(verdict(null(), NO_MARGIN, None) for _ in range(600))["different"] >= 0.10
    assert rates(verdict(at_margin(), 0.05, None) for _ in range(600))["equivalent"] >= 0.10


def verdict(differences: np.ndarray, margin: float, labels: list[int] | None) -> str:
    return compare(differences > 0, differences < 0, margin=margin, clusters=labels).verdict


def test_real_scores_at_the_margin() -> None:
    rng = np.random.default_rng(9)
    scores = rng.uniform(0.2, 0.8, (700, 150))
    shifted = scores + 0.02 + rng.standard_t(5, (700, 150)) * 0.08
    pairs = list(zip(shifted, scores, strict=True))
    assert rates(compare(a, b, margin=0.02).verdict for a, b in pairs)["equivalent"] <= ALLOWED
    assert rates(compare(a, b + 0.02, margin=NO_MARGIN).verdict for a, b in pairs)["different"] <= ALLOWED


def test_several_tasks_of_unlike_size_and_spread() -> None:
    rng = np.random.default_rng(10)

    def draw(shift: float, margin: float) -> str:
        small = rng.multinomial(1, [0.08 + shift, 0.08 - shift, 0.84], 150)
        large = rng.multinomial(1, [0.03 + shift, 0.03 - shift, 0.94], 2000)
        tasks = {"small": TaskScores(*small.T[:2]), "large": TaskScores(*large.T[:2])}
        return overall(tasks, margin=margin).verdict

    assert rates(draw(0.0, NO_MARGIN) for _ in range(700))["different"] <= ALLOWED
    assert rates(draw(0.01, 0.02) for _ in range(700))["equivalent"] <= ALLOWED


@pytest.mark.slow
def test_seeds_that_vary_are_seldom_called_equivalent_at_the_margin() -> None:
    rng = np.random.default_rng(11)

    def draw(mean: float) -> tuple[np.ndarray, np.ndarray]:
        lean = np.clip(mean + 0.01 * rng.standard_normal(3), -0.05, 0.05)[:, None]
        drawn = rng.uniform(size=(3, 6000))
        return drawn < 0.025 + lean / 2, drawn > 0.975 + lean / 2

    at_margin, alike = [draw(0.01) for _ in range(400)], [draw(0.0) for _ in range(400)]
    assert rates(compare(*x, margin=0.01).verdict for x in at_margin)["equivalent"] <= ALLOWED
    assert rates(compare(*x, margin=NO_MARGIN).verdict for x in alike)["different"] <= ALLOWED
    one = rates(compare(a[0], b[0], margin=0.01).verdict for a, b in at_margin)
    assert one["equivalent"] > 0.15  # a single seed knows nothing of the others


def test_the_bootstrap_covers() -> None:
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(400):
        sizes = rng.uniform(500, 1500, 100)
        bits = sizes * (0.01 + 0.05 * rng.standard_normal(100))
        low, high = bits_per_byte_difference(bits, np.zeros(100), sizes, resamples=500).interval
        covered += low < 0.01 < high
    assert 0.86 <= covered / 400 <= 0.94


# Tasks that ask the same documents, or of the same subjects


def two_tasks(share: float, spread: float, seed: int, n: int = 600) -> Callable[[float], dict[str, TaskScores]]:
    """Two tasks that share a part of their documents, with their answers, and effects of eight subjects."""
    rng = np.random.default_rng(seed)

    def draw(mean: float) -> dict[str, TaskScores]:
        effects = mean + spread * rng.standard_normal(8)
        tasks, shared = {}, int(share * n)
        subject, drawn = rng.integers(0, 8, n), rng.uniform(size=n)
        for name in ("one", "other"):
            lean = np.clip(effects[subject], -0.2, 0.2)
            gained, lost = drawn < 0.1 + lean / 2, drawn > 0.9 + lean / 2
            texts = [*range(shared), *((name, i) for i in range(n - shared))]
            tasks[name] = TaskScores(gained, lost, subject.tolist() if spread else None, texts)
            subject = np.r_[subject[:shared], rng.integers(0, 8, n - shared)]
            drawn = np.r_[drawn[:shared], rng.uniform(size=n - shared)]
        return tasks

    return draw


def apart(tasks: dict[str, TaskScores]) -> dict[str, TaskScores]:
    """The same scores, of which nobody knows that tasks share anything."""
    return {
        name: TaskScores(task.a, task.b, task.clusters and [(name, label) for label in task.clusters])
        for name, task in tasks.items()
    }


@pytest.mark.parametrize("share", [*slow(0.0, 0.25, 0.5), 1.0])
@pytest.mark.parametrize("spread", [*slow(0.0), 0.05])
def test_tasks_that_share_documents_and_subjects_do_not_mislead(share: float, spread: float) -> None:
    draw = two_tasks(share, spread, 13)
    null = rates(overall(draw(0.0), margin=NO_MARGIN).verdict for _ in range(1000))
    at_margin = rates(overall(draw(0.05), margin=0.05).verdict for _ in range(1000))
    print(f"share {share:.0%}, subjects' spread {spread}: {null['different']:.1%}, {at_margin['equivalent']:.1%} false")
    assert null["different"] <= ALLOWED
    assert at_margin["equivalent"] <= ALLOWED


@pytest.mark.parametrize(("share", "spread"), [(1.0, 0.0), (0.0, 0.05)])
def test_taken_for_independent_they_mislead(share: float, spread: float) -> None:
    draw = two_tasks(share, spread, 14)
    assert rates(overall(apart(draw(0.0)), margin=NO_MARGIN).verdict for _ in range(600))["different"] >= 0.065


@pytest.mark.slow
@pytest.mark.parametrize("flipped", [0.01, 0.03])
def test_nor_where_flips_are_rare_and_shared(flipped: float) -> None:
    rng = np.random.default_rng(15)

    def draw(up: float, down: float) -> dict[str, TaskScores]:
        drawn = rng.uniform(size=500)
        scores = TaskScores(drawn < up, drawn > 1 - down, None, range(500))
        return {"asked": scores, "asked again": scores}

    null = [draw(flipped / 2, flipped / 2) for _ in range(300)]
    at_margin = [draw(flipped / 2 + 0.005, max(flipped / 2 - 0.005, 0)) for _ in range(300)]
    assert rates(overall(tasks, margin=NO_MARGIN).verdict for tasks in null)["different"] <= ALLOWED
    assert rates(overall(tasks, margin=0.01).verdict for tasks in at_margin)["equivalent"] <= ALLOWED


# Power: what a benchmark can find


@pytest.mark.parametrize(("seeds", "power"), [(2, 0.18), *slow((1, 0.84), (5, 0.9))])
def test_the_power_that_seeds_leave(seeds: int, power: float) -> None:
    """A true difference of 1.2 points, half a point of noise between seeds, 3,000 documents of which 5 % flip."""
    rng = np.random.default_rng(16)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        mean = 0.012 + (0.005 * rng.standard_normal(seeds) if seeds > 1 else np.zeros(1))
        lean = np.clip(mean, -0.05, 0.05)[:, None]
        drawn = rng.uniform(size=(seeds, 3000))
        return drawn < 0.025 + lean / 2, drawn > 0.975 + lean / 2

    found = rates(compare(*draw(), margin=NO_MARGIN).verdict for _ in range(500))["different"]
    print(f"{seeds} seeds: power {found:.0%}")
    assert abs(found - power) < 0.08


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.5), (3, 0.5), (5, 0.5), (5, 0.0)])
def test_the_difference_that_a_plan_promises_is_found(seeds: int, spread: float) -> None:
    n, changed, rng = 2000, 0.05, np.random.default_rng(17)
    mean = detectable_difference([n], seeds, changed=changed, seed_spread=spread) / 100

    def draw() -> tuple[np.ndarray, np.ndarray]:
        noise = spread / 100 * rng.standard_normal(seeds) if seeds > 1 else np.zeros(1)
        lean = np.clip(mean + noise, -changed, changed)[:, None]
        drawn = rng.uniform(size=(seeds, n))
        return drawn < (changed + lean) / 2, drawn > 1 - (changed - lean) / 2

    found = rates(compare(*draw(), margin=NO_MARGIN).verdict for _ in range(300))["different"]
    print(f"{seeds} seeds that spread by {spread}: {100 * mean:.2f} points found with a power of {found:.0%}")
    assert 0.72 <= found <= 0.88


def test_more_documents_and_seeds_find_smaller_differences() -> None:
    by_documents = [detectable_difference([n], 1) for n in (100, 880, 3000)]
    by_seeds = [detectable_difference([880], seeds) for seeds in (2, 3, 5, 10)]
    assert by_documents == sorted(by_documents, reverse=True)
    assert by_seeds == sorted(by_seeds, reverse=True)
    assert detectable_difference([440, 440], 1) == pytest.approx(detectable_difference([880], 1), rel=1e-6)


def test_the_plan_says_what_it_assumes() -> None:
    said = plan_sentence([880], 1)
    assert said.startswith(
        "with 880 different documents and 1 seed a true difference of 3.3 points is found (80 % power"
    )
    assert said.endswith("which training noise alone can make")
    assert "12 % of the answers change and seeds spread by 0.5 points" in plan_sentence([880, 1000], 3)
    with pytest.raises(ComparisonError, match="expected at least 2 documents a task"):
        detectable_difference([], 1)
