"""Every private name of a library that this package calls, overrides or replaces. Imports nothing of the libraries.

Private names change without notice. tests/test_upstream.py fails when the source of one is no longer what was read, and
when the package uses one that is not listed. To renew an entry, read the new source and the file here that uses the
name, then write down the fingerprint that the test prints. What upstream does wrong is in `repairs.py`.
"""

from __future__ import annotations

from typing import NamedTuple

VERSIONS = {"torch": "2.13", "transformers": "5.23", "trl": "1.16", "lm_eval": "0.4.13", "evaluate": "0.4.6"}
"""What the entries were read in."""


class Private(NamedTuple):
    """One private name."""

    owner: str
    """Module, or module:class, that defines it."""
    name: str
    fingerprint: str
    """Hash of its source and of the lines of its owner that mention it."""
    reason: str
    """What it is used for or, if it is overridden or replaced, what is wrong with upstream's."""
    until: str
    """When the entry can go."""


_TRAINER, _SFT = "transformers.trainer:Trainer", "trl.trainer.sft_trainer:SFTTrainer"
_CONFIG = "transformers.configuration_utils:PreTrainedConfig"
_TOKENIZER = "transformers.tokenization_utils_tokenizers:TokenizersBackend"
_FALCON = "transformers.models.falcon.modeling_falcon:FalconAttention"
_LM, _METRIC = "lm_eval.models.huggingface:HFLM", "evaluate.module:EvaluationModule"

# fmt: off
USED_IN = {
    "training/trainer.py": (  # docs/trainer.md
        Private(_TRAINER, "_run_epoch", "0d37ba76", "takes a step when none is left", "it checks first"),
        Private(_TRAINER, "_finalize_training", "3d1605f1", "deletes checkpoints unchecked", "a callback runs before"),
        Private(_TRAINER, "_get_grad_norm", "d9290d35", "the norm before it is applied", "a callback has it"),
        Private(_TRAINER, "_get_output_dir", "455c34a2", "saves in place", "saving is atomic"),
        Private(_TRAINER, "_save_checkpoint", "655fd00d", "saves in place, deletes unchecked", "saving is atomic"),
        Private(_SFT, "_save_checkpoint", "3b1433b9", "is called between the two", "saving is atomic"),
        Private(_TRAINER, "_save", "7df2bfe7", "writes training_args.bin, a pickle", "it can be told not to"),
        Private(_TRAINER, "_load_best_model", "0de30ee8", "freezes the adapter", "the adapter stays trainable"),
        Private(_TRAINER, "_evaluate", "7cfde423", "resumes an evaluation", "upstream does it"),
        Private(_TRAINER, "_determine_best_metric", "7f685d25", "ranks that evaluation", "upstream does it"),
        Private(_TRAINER, "_tr_loss", "bcae5253", "is lost when a run resumes", "checkpoints hold it"),
        Private(_TRAINER, "_globalstep_last_logged", "dd0b3fcc", "is lost when a run resumes", "checkpoints hold it"),
        Private(_SFT, "_metrics", "d7c231d8", "is lost when a run resumes", "checkpoints hold it"),
        Private(_SFT, "_total_train_tokens", "346721ad", "is lost when a run resumes", "checkpoints hold it"),
    ),
    "training/build.py": (
        Private(_CONFIG, "_attn_implementation", "a62d7600", "the attention in use", "it has a public name"),
    ),
    "kernels/output_layer.py": (
        Private("trl.trainer.utils", "_use_triton", "daba9337", "has a CPU score every token", "it does not"),
        Private("trl.trainer.utils", "_ChunkedLogProbFunction", "b81616cb", "is slow on a CPU", "it is as fast"),
        Private("trl.kernels.chunked_logprob", "_use_triton", "cc520b91", "decides for a GPU", "the two above can go"),
    ),
    "kernels/attention.py": (
        Private("torch", "_softmax_backward_data", "2827cddc", "the gradient of softmax", "it has a public name"),
    ),
    "base/loading.py": (
        Private(_CONFIG, "_commit_hash", "aa8e91fe", "the commit that was loaded", "it has a public name"),
    ),
    "base/repairs.py": (
        Private(_FALCON, "_split_heads", "e6674f3c", "splits the fused product", "route_falcon_attention can go"),
        Private(_TOKENIZER, "_tokenizer", "5a4e17a9", "holds the merges", "merge_spaces_last can go"),
    ),
    "evaluation/language_model.py": (
        Private(_LM, "_loglikelihood_tokens", "c677997b", "does not count truncations", "lm-eval counts them"),
        Private(_LM, "_model_call", "71a2a723", "does not show progress", "lm-eval shows it"),
        Private(_LM, "_model_generate", "59ca3037", "does not show progress", "lm-eval shows it"),
    ),
    "evaluation/metrics.py": (
        Private(_METRIC, "_info", "c536f8c9", "is meant to be overridden", "metrics are functions"),
        Private(_METRIC, "_compute", "8103b89d", "is meant to be overridden", "metrics are functions"),
    ),
}
# fmt: on
"""File of this package -> the private names in it."""
