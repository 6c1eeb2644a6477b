"""Removes secrets from what is written to files. Knows nothing of files."""

from __future__ import annotations

import os
import re
from typing import Any

_NAMES = re.compile("TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SHORTEST = 8  # a shorter value is no secret: TOKENIZERS_PARALLELISM=false


def masked(value: Any) -> Any:
    """Return text without hub tokens and the values of secret environment variables; other values unchanged."""
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if _NAMES.search(name) and len(secret) >= _SHORTEST:
            value = value.replace(secret, "***")
    return _HUB_TOKEN.sub("***", value)
