"""Removes secrets from what is written to files. Knows nothing of files."""

from __future__ import annotations

import os
import re
from typing import Any

_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY|CREDENTIAL|(PAT|PASS|KEY)$", re.IGNORECASE)
# Of Hugging Face, GitHub, GitLab, OpenAI and those who took its form, Slack, AWS.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|(AKIA|ASIA)[A-Z0-9]{16})"
)
_NAMED = re.compile("token(?!s)")
_SHORTEST = 8  # a shorter value is no secret: TOKENIZERS_PARALLELISM=false


def masked(value: Any) -> Any:
    """Return a value without keys by their form and values of secret environment variables, in all text in it."""
    if isinstance(value, dict):
        return {masked(name): masked(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked(part) for part in value]
    if not isinstance(value, str):
        return value
    secrets = [secret for name, secret in os.environ.items() if _NAMES.search(name) and len(secret) >= _SHORTEST]
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
        value = value.replace(secret, "***")
    return _FORMS.sub("***", value)


def names_secret(name: str) -> bool:
    """Return whether a setting or a flag of this name holds a secret, such as `hub_token`."""
    return _NAMED.search(name) is not None
