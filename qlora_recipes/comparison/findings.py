"""What a comparison found: the typed content of `report.json`, from which every report is rendered.

Records only. Percentages and scores are in points (a score of 0 to 1 times 100), bits per byte in bits, KL in nats.
Knows nothing of how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_recipes.comparison.intervals import Interval
from qlora_recipes.comparison.paired import BitsPerByte, Comparison, Flips
from qlora_recipes.evaluation.records import Divergence, LayerError


@dataclass(frozen=True)
class LossCurve:
    """The logged losses of one run."""

    precision: str
    seed: int
    steps: list[int]
    losses: list[float]


@dataclass(frozen=True)
class OverallScore:
    """The mean score over the tasks of the verdict, in points."""

    mean: float
    interval_95: Interval
    """Of this score alone. Arms answer the same documents, so intervals that overlap say nothing of a difference."""


@dataclass(frozen=True)
class StoredWeights:
    """What one weight of the linear layers takes; of an arm that quantizes none, what any weight takes."""

    quantized: int
    """Weights stored in fewer than 16 bits."""
    bits: float
    """Bits a weight as stored, quantization constants and code tables included."""
    table_bits: float
    """Those of them that are bitsandbytes' code tables: one size for any layer, so they weigh on small layers alone."""


@dataclass(frozen=True)
class Arm:
    """One precision over all its seeds: what it cost, and how it scored."""

    precision: str
    seeds: list[int]
    scores: dict[str, float]
    """Task to score in points, the mean over seeds."""
    base_bytes: int
    """The base as stored, quantization constants included."""
    peak_bytes: int
    """Highest peak of any seed while training."""
    adapter_bytes: int
    """Size of the adapter's file."""
    tokens_per_second: float
    """Mean over seeds, while training."""
    seconds: float
    """Mean wall time of the training loop."""
    final_loss: float
    """Mean over seeds of the last tenth of the logged losses."""
    overall: OverallScore
    weights: StoredWeights | None
    """None where the receipt does not tell."""


@dataclass(frozen=True)
class TaskContrast:
    """One task's difference between an arm and its baseline."""

    task: str
    metric: str
    score: float
    """Of the arm, in points."""
    baseline_score: float
    comparison: Comparison
    p_holm: float
    """`comparison.p_difference`, adjusted over the tasks (Holm)."""


@dataclass(frozen=True)
class FlipCount:
    """Documents of one task that were answered differently, for one seed."""

    task: str
    seed: int
    flips: Flips


@dataclass(frozen=True)
class ChangedAnswer:
    """One document that the two arms answered differently."""

    task: str
    subject: str | None
    doc_id: str
    seed: int
    change: str
    """`right to wrong`, `wrong to right` or `wrong to other wrong`, from the baseline to the arm."""
    prompt: str
    target: str
    baseline_answer: str
    answer: str

    @property
    def goes_on(self) -> Literal["arm", "baseline"] | None:
        """Whose answer holds the other's, or the one expected, and goes on: it says more than was asked."""
        arm, baseline, target = (text.casefold().split() for text in (self.answer, self.baseline_answer, self.target))
        if _continues(arm, baseline) or (_continues(arm, target) and not _continues(baseline, target)):
            return "arm"
        if _continues(baseline, arm) or (_continues(baseline, target) and not _continues(arm, target)):
            return "baseline"
        return None


def _continues(words: list[str], shorter: list[str]) -> bool:
    """Whether words hold all of the shorter ones in a row, not at their end; punctuation after a word is no matter."""
    longer, shorter = ([word.rstrip(".,;:!?") for word in each] for each in (words, shorter))
    starts = range(len(longer) - len(shorter))
    return bool(shorter) and any(longer[start : start + len(shorter)] == shorter for start in starts)


@dataclass(frozen=True)
class BitsContrast:
    """Bits per byte of held-out text in one task, the mean over seeds."""

    task: str
    a: float
    """Of the arm."""
    b: float
    """Of the baseline."""
    comparison: BitsPerByte | None
    """None where the texts are too few for an interval."""


@dataclass(frozen=True)
class Contrast:
    """One arm against its baseline."""

    name: str
    """What is under test, such as `nf4`."""
    baseline: str
    sentence: str
    """The verdict, with margin, documents and seeds."""
    overall: Comparison
    tasks: list[TaskContrast]
    flips: list[FlipCount]
    changed: list[ChangedAnswer]
    """A sample of the documents that were answered differently."""
    changed_share: float | None
    """Points: share of all documents answered differently, right or wrong; None where no task is right or wrong."""
    bits: list[BitsContrast]
    divergence: Divergence | None
    quantization_error: list[LayerError]
    doubts: list[str]
    """Why agreement of these arms means nothing, in some task or in all; such agreement is never `equivalent`."""


@dataclass(frozen=True)
class Control:
    """A measurement that is no arm: a base before tuning, or an adapter on another base."""

    name: str
    scores: dict[str, float]
    """Task to score in points, the mean over seeds."""
    overall: OverallScore


def before_tuning(precision: str) -> str:
    """Return the name of the control that is a precision's base without an adapter."""
    return f"{precision} base before tuning"


@dataclass(frozen=True)
class Effect:
    """One of the steps that lead from the baseline to an arm."""

    name: str
    meaning: str
    comparison: Comparison


@dataclass(frozen=True)
class Claim:
    """Something that a paper found, beside what was found here."""

    claim: str
    source: str
    verdict: Literal["found", "not found", "cannot be said here"]
    figure: str
    """What was found here, with its number."""


@dataclass(frozen=True)
class Fact:
    """One thing that was counted or verified."""

    name: str
    verdict: str
    """pass, warn or fail."""
    figure: str


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    recipe: str
    trained: tuple[str, str]
    """When the first and the last of the runs were started, UTC, ISO 8601."""
    command: list[str]
    """What was called, without secrets."""
    versions: dict[str, str]
    """Package to version, while training."""
    demo: bool
    model: str
    dtype: str
    """16-bit dtype that every arm computes in."""
    baseline: str
    """Precision of the baseline."""
    seeds: list[int]
    margin: float
    """Points."""
    earlier_margins: list[float]
    """Margins given before this one, the first one first; a verdict under a changed margin is weaker."""
    exploratory: list[str]
    """How this departs from what was fixed before the first score, in words; empty where it is confirmatory."""
    limit: int | None
    """Documents per task that the evaluation was limited to; a report with a limit is no result."""
    arms: list[Arm]
    """The baseline first."""
    contrasts: list[Contrast]
    """Every other arm against the baseline."""
    noise: Contrast | None
    """The baseline's second seed against its first: what differs where the precision does not."""
    controls: list[Control]
    effects: list[Effect]
    claims: list[Claim]
    """Of the QLoRA paper, where more than two arms are compared."""
    losses: list[LossCurve]
    validity: list[Fact]
    caveats: list[str]
    """Reasons to believe a verdict less than its interval says."""
    schema_version: Literal[1] = 1
