"""A loaded run as lm-eval's HFLM, which counts what lm-eval would only warn of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from qlora_recipes.errors import RecipesError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from qlora_recipes.evaluation.bar import Bar
    from qlora_recipes.evaluation.loaded import RestoredRun


class RunLanguageModel(HFLM):
    """The model and tokenizer of a run, log-likelihoods in float32.

    Overrides lm-eval 0.4.13's HFLM where a method is named with the reason.
    """

    def __init__(self, run: RestoredRun, batch_size: int, bar: Bar) -> None:
        # In 16 bits 5 % of the choices tie exactly.
        super().__init__(pretrained=run.model, tokenizer=run.tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._encoder = run.encoder
        self._bar = bar
        self.truncated = 0
        """Requests that lost their beginning."""
        self.prompts_unlike_training = 0
        """Rendered prompts whose tokens differ from those of training, as when a document spells a control token."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render as HFLM does, and hold the tokens against those of training."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            try:
                trained = self._encoder.encode_prompt(chat_history)
            except RecipesError:
                trained = []
            self.prompts_unlike_training += self.tok_encode(text) != trained
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Start the bar."""
        self._bar.start(len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Start the bar, and leave the tokenizer's BOS out: the window has one, and a second would be scored."""
        self._bar.start(len(requests))
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Start the bar."""
        self._bar.start(len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Count what is cut from the left."""
        self.truncated += sum(len(context) + len(words) > self.max_length + 1 for _, context, words in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count what is cut from the left."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None:
            return ids, mask
        self.truncated += int((mask.sum(1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Move the bar."""
        logits = super()._model_call(inps, *args, **kwargs)
        self._bar.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Move the bar."""
        ids = super()._model_generate(context, *args, **kwargs)
        self._bar.advance(len(context))
        return ids
