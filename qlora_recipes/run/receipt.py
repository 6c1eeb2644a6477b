"""What a run writes down of itself: its receipt and its beginning. Dataclasses only; knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from qlora_recipes.chat_templates import Origin


@dataclass
class DatasetReceipt:
    """What one of several datasets contributed."""

    source: str
    share: float
    """Share of its rows that was drawn."""
    rows_in: int
    """Rows drawn."""
    rows_used: int
    rows_held_out: int
    rows_dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    revision: str | None = None


@dataclass
class DataReceipt:
    """What was read, what was used, and what the loss covers."""

    source: str
    """Hub id or file name."""
    fingerprint: str
    """SHA-256 over every conversation used, in order."""
    rows_in: int
    rows_used: int
    """Rows trained on."""
    rows_held_out: int
    rows_dropped: dict[str, int]
    """Reason to number of rows."""
    tokens: int
    """Tokens of the rows trained on, after cutting to max_length."""
    supervised_tokens: int
    """Those of them that are in the loss."""
    rows_truncated: int
    """Rows longer than max_length."""
    answers_truncated: int
    """Rows that lost supervised tokens by it."""
    supervised_tokens_lost: int
    """Supervised tokens cut away."""
    max_length: int
    """Longest row allowed, in tokens."""
    columns_unread: dict[str, int] = field(default_factory=dict)
    """Columns that the formatter reads in no row, to the number of times that they are filled."""
    revision: str | None = None
    """Commit of a hub dataset that was read; None for a file, and where it is not known."""
    contents: dict[str, int] = field(default_factory=dict)
    """What the rows hold that are used or held out: each role to its messages, and `calls`, `reasoning` and such."""
    datasets: list[DatasetReceipt] = field(default_factory=list)
    """Each of several datasets, whose sums are above."""


@dataclass
class TemplateReceipt:
    """The chat template that training rendered, and what evaluation and chat must render."""

    name: str
    sha256: str
    role_markers: str | None
    """Regular expression for the strings of the template that a message's text may not hold; None for none."""
    bos_per_row: list[int]
    """Smallest and largest number of BOS tokens in a row: one a turn pair with Llama-2, none where BOS is EOS."""
    end_token: str
    """The token that ends an answer."""
    end_token_trained: bool
    """Whether it is in the loss in every answer that was not cut."""
    origin: Origin = "recipe"
    """Where the template is from."""
    date: str | None = None
    """The day that it writes in place of today's, in ISO 8601; None where it writes none."""


@dataclass
class QuantizedReceipt:
    """Matrices that should be stored in fewer bits, of linear layers and stacks of experts, and those that are."""

    expected: int
    found: int
    outlier_threshold: float | None = None
    """LLM.int8's: a column of activations that reaches it anywhere in a batch is multiplied in 16 bits; else None."""
    share: float = 1.0
    """Those that are, as a share of the weights of all that should be."""
    overlooked: list[str] = field(default_factory=list)
    """Names of those that should be and are not."""


@dataclass
class BaseReceipt:
    """The frozen base as it is in memory."""

    model: str
    revision: str | None
    """Commit that was loaded; None for a local folder."""
    dtype: str
    """16-bit dtype of loading and computing."""
    linears: dict[str, int]
    """Class name to number of linear layers, the output layer left out, and of stacks of fused experts."""
    quantized: QuantizedReceipt
    parameters: int
    """Number of weights, counted before quantization."""
    bytes: int
    """Memory of weights, buffers and quantization constants."""
    bytes_by_storage: dict[str, int]
    """Storage dtype to bytes."""
    sha256: str
    """Hash over the stored bytes of the base."""
    storage: str = "packed"
    """How weights were kept: as stored, 4-bit ones dequantized for every product (`packed`); those dequantized once and
    kept, too (`expanded`); or all in 16 bits, laid out for products on a CPU, too (`blocked`)."""
    missing_keys: list[str] = field(default_factory=list)
    """Weights that are not in the checkpoint: they are random."""
    architecture: dict[str, str] = field(default_factory=dict)
    """What was found of the model, as the plan shows it: layers, heads, experts, window, linears, weights."""
    parameters_by_storage: dict[str, int] = field(default_factory=dict)
    """Storage to number of weights: `4-bit`, `int8`, or a dtype."""


@dataclass
class AdapterReceipt:
    """The trained adapter, before and after."""

    targets: list[str]
    """Suffixes of the modules that carry it."""
    modules: int
    """Number of such modules."""
    parameters: int
    """Trainable weights; of PiSSA's and OLoRA's, whose frozen half is saved with them, those that train."""
    dtype: str
    initial_sha256: str
    """Hash of the weights before the first step; equal for all precisions of one seed, but LoftQ's. DoRA's magnitudes,
    norms of the base's weights as stored, are left out."""
    final_sha256: str
    all_finite: bool
    unchanged: list[str]
    """Tensors that are what they were before the first step."""
    bytes: int
    """Size of the saved file."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank to number of modules, as saved."""


@dataclass
class TrainingReceipt:
    """How far the training went and how fast."""

    steps: int
    micro_batches: int
    """Forward and backward passes, over all processes."""
    epochs: float
    first_loss: float
    final_loss: float
    """Mean of the last tenth of the logged losses, since single steps are noisy."""
    tokens: int
    """Real tokens processed, padding left out, over all processes."""
    supervised_tokens: int
    padding_share: float
    """Share of the processed positions that were padding."""
    tokens_per_second: float
    seconds: float
    """Wall time of the training loop."""
    packed: bool
    processes: int
    device: str
    attention: str
    margins: list[float] = field(default_factory=list)
    """Of preferences: how much more than the start it prefers the chosen answers (`rewards/margins`), mean of the first
    and of the last tenth of the logged steps."""
    optimizer_state: dict[str, int] = field(default_factory=dict)
    """Storage dtype to bytes that the optimizer of one process keeps; `float32 paged` can move to the host."""
    skipped_steps: int = 0
    """Those of the steps that float16's loss scaler did not apply, since their gradients overflowed."""


@dataclass
class MemoryReceipt:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""

    peak_bytes: int
    base_bytes: int
    """Peak before the first step, with the base loaded."""
    training_bytes: int
    """The peak without what was held besides the weights right before the first step: Python, libraries, rows."""
    planned_bytes: int | None
    """What the plan said of that; None where the run has no plan."""
    reserved_bytes: int | None = None
    """The most that PyTorch's allocator took from the GPU, with what it could not use; None on a CPU."""


@dataclass
class SpreadReceipt:
    """How a run was spread over processes when it ended; `training.tokens` are those of all of them."""

    processes: int = 1
    nodes: int = 1
    """Machines, or launchers on one machine."""
    wrapper: str = "none"
    """What joins the processes: none, DDP or FSDP2."""
    sharding: str = "none"
    """What each process has only a part of: none, or FULL_SHARD: weights, gradients and optimizer."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """What is computed in what: `autocast`, and what FSDP2 casts: `param_dtype`, `reduce_dtype` or `output_dtype`."""
    peak_bytes: list[int] = field(default_factory=list)
    """Peak memory of each process, as `memory.peak_bytes` is that of the first."""


@dataclass
class Check:
    """One thing that was verified."""

    name: str
    verdict: str
    """pass, untested, warn, fail or off."""
    figure: str
    advice: str = ""
    """What to do when it is not a pass."""


@dataclass
class Resume:
    """One time that the run was resumed after it had been interrupted."""

    at: str
    """UTC, ISO 8601."""
    from_step: int
    """The step of the checkpoint; 0 where there was none yet."""
    reason: str = ""
    """Why, where this package resumed it by itself."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Newer checkpoints that were damaged, and how."""
    versions_changed: dict[str, str] = field(default_factory=dict)
    """Packages of another version than the run was started with; the same bits cannot be promised then."""
    processes_changed: str = ""
    """How many processes saved the checkpoint and how many resumed it, where these differ: the rows of each step are
    the same, but the run is no longer bit-exact."""


@dataclass
class SettingsReceipt:
    """What the recipe, the demo and the flags resolved to."""

    lora: dict[str, Any]
    """LoraConfig fields."""
    training: dict[str, Any]
    """SFTConfig fields, or DPOConfig's."""
    eval_tasks: list[str]
    method: str = "sft"


@dataclass
class Receipt:
    """Everything a run can prove about itself."""

    recipe: str
    precision: str
    dtype: str
    seed: int
    demo: bool
    settings: SettingsReceipt
    command: list[str]
    versions: dict[str, str]
    """Package to version."""
    git: dict[str, Any] | None
    """Commit and whether the work tree was clean; None outside a repository."""
    started: str
    """UTC, ISO 8601."""
    data: DataReceipt
    template: TemplateReceipt
    base: BaseReceipt
    adapter: AdapterReceipt
    training: TrainingReceipt
    memory: MemoryReceipt
    repairs: list[str]
    """Upstream defects found and repaired in this run."""
    checks: list[Check] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    start: StartReceipt | None = None
    """The run whose adapter this one began with; None for an adapter of its own."""
    schema_version: Literal[1] = 1
    spread: SpreadReceipt = field(default_factory=SpreadReceipt)


@dataclass
class StartReceipt:
    """A finished run that another one began with, as it was then."""

    run: str
    """Its folder, as it was given."""
    sha256: str
    """Hash of its `run.json`."""
    receipt: Receipt
    """All that it proves: its recipe, its rows, its base, its adapter, and the run that it began with itself."""


@dataclass
class Started:
    """What a run was started as, in `started.json`, and every time that it was resumed."""

    started: str
    """UTC, ISO 8601."""
    run: dict[str, Any]
    """What must be equal for the run to be resumed."""
    versions: dict[str, str]
    resumes: list[Resume] = field(default_factory=list)


@dataclass(frozen=True)
class LoggedStep:
    """What is read of one line of `metrics.jsonl`, which may hold any number of other keys."""

    step: int
    loss: float | None = None
    """Nats a supervised token; None in a line that logs something else, such as a held-out loss."""
    __pydantic_config__: ClassVar = {"extra": "ignore", "strict": True, "allow_inf_nan": False}
