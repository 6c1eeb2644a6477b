"""Every private name of a library that this package calls, overrides or replaces, in one list. Imports nothing.

Private names change without notice. tests/test_upstream.py fails when the source of one has changed since it was read
here, and when the package uses one that is not listed. To renew an entry, read the new source and the code that uses
it, then write down the fingerprint that the test prints. Defects that upstream has are in `repairs.py`.
"""

from __future__ import annotations

from typing import NamedTuple

VERSIONS = "torch 2.13, transformers 5.23, trl 1.16, lm-eval 0.4.9, evaluate 0.4.6"
"""What the entries were read in."""


class Private(NamedTuple):
    """One private name."""

    owner: str
    """Module, or module:class, that defines it."""
    name: str
    fingerprint: str
    """Hash of its source and of the lines of its owner that mention it."""
    used_in: str
    """File of this package."""
    reason: str
    until: str
    """What would make the entry unnecessary."""


_TRAINER, _SFT = "transformers.trainer:Trainer", "trl.trainer.sft_trainer:SFTTrainer"
_OURS, _LM = "training/trainer.py", "lm_eval.models.huggingface:HFLM"
_RESUMED = "a resumed run loses it, because checkpoints do not hold it"
_HELD = "a checkpoint of upstream holds it"
_DOCUMENTED = "never: overriding it is the documented way"

PRIVATE_NAMES = (
    Private(_TRAINER, "_run_epoch", "0d37ba76df5f", _OURS, "takes one step too many when no step is left", "it checks first"),
    Private(_TRAINER, "_finalize_training", "3d1605f103a5", _OURS, "deletes checkpoints unchecked", "a hook before it"),
    Private(_TRAINER, "_get_grad_norm", "d9290d357b7d", _OURS, "the norm, before it is applied", "on_pre_optimizer_step has it"),
    Private(_TRAINER, "_get_output_dir", "455c34a21678", _OURS, "saves under another name first", "saving is atomic upstream"),
    Private(_TRAINER, "_save_checkpoint", "655fd00d1a0f", _OURS, "writes in place and rotates unchecked", "saving is atomic upstream"),
    Private(_SFT, "_save_checkpoint", "3b1433b99717", _OURS, "stands between ours and Trainer's", "saving is atomic upstream"),
    Private(_TRAINER, "_save", "7df2bfe705d2", _OURS, "writes training_args.bin, a pickle", "it can be told not to"),
    Private(_TRAINER, "_load_best_model", "0de30ee83294", _OURS, "freezes the adapter", "the adapter stays trainable"),
    Private(_TRAINER, "_evaluate", "7cfde4230969", _OURS, "does an evaluation that a fault prevented", "upstream resumes it"),
    Private(_TRAINER, "_determine_best_metric", "7f685d259403", _OURS, "as above, for the best checkpoint", "upstream resumes it"),
    Private(_TRAINER, "_tr_loss", "bcae5253513f", _OURS, _RESUMED, _HELD),
    Private(_TRAINER, "_globalstep_last_logged", "dd0b3fccb37d", _OURS, _RESUMED, _HELD),
    Private(_SFT, "_metrics", "d7c231d886c9", _OURS, _RESUMED, _HELD),
    Private(_SFT, "_total_train_tokens", "346721ad1d12", _OURS, _RESUMED, _HELD),
    Private("trl.trainer.utils", "_use_triton", "daba93371fee", "kernels/output_layer.py", "a CPU gets the GPU's tiles", "as below"),
    Private(
        "trl.trainer.utils", "_ChunkedLogProbFunction", "b81616cb60c8", "kernels/output_layer.py",
        "scores every token in float32, twice", "TRL's is as fast on a CPU (docs/performance.md)",
    ),
    Private("trl.kernels.chunked_logprob", "_use_triton", "cc520b91b50e", "kernels/output_layer.py", "is still asked", "as above"),
    Private("torch", "_softmax_backward_data", "2827cddc7f79", "kernels/attention.py", "softmax's gradient", "it has a public name"),
    Private(
        "transformers.models.falcon.modeling_falcon:FalconAttention", "_split_heads", "e6674f3c855c", "base/repairs.py",
        "splits the fused product", "route_falcon_attention is not needed",
    ),
    Private(
        "transformers.tokenization_utils_tokenizers:TokenizersBackend", "_tokenizer", "5a4e17a9e5a1", "base/repairs.py",
        "replaces the merges", "merge_spaces_last is not needed",
    ),
    Private(
        "transformers.configuration_utils:PreTrainedConfig", "_commit_hash", "aa8e91fec1b0", "base/loading.py",
        "the commit that was loaded", "it has a public name",
    ),
    Private(
        "transformers.configuration_utils:PreTrainedConfig", "_attn_implementation", "a62d7600635f", "training/build.py",
        "the attention that was chosen", "it has a public name",
    ),
    Private(_LM, "_loglikelihood_tokens", "c677997b413c", "evaluation/language_model.py", "scores by position", _DOCUMENTED),
    Private(_LM, "_model_call", "71a2a7231978", "evaluation/language_model.py", "computes under autocast", _DOCUMENTED),
    Private(_LM, "_model_generate", "59ca30373f9b", "evaluation/language_model.py", "is refused", _DOCUMENTED),
    Private("evaluate.module:EvaluationModule", "_info", "c536f8c9b409", "evaluation/metrics.py", "a metric's name", _DOCUMENTED),
    Private("evaluate.module:EvaluationModule", "_compute", "8103b89d3fe8", "evaluation/metrics.py", "a metric", _DOCUMENTED),
)  # fmt: skip
