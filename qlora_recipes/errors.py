"""Every error a user can cause: a RecipesError, and the builtin that it refines, so that `except ValueError` works.

A message says what was found, what was expected and the likely fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class RecipesError(Exception):
    """Something a user can fix; the command line prints it without a traceback and exits with 2."""


class RecipeError(RecipesError, TypeError):
    """A recipe class declares something invalid."""


class UsageError(RecipesError, ValueError):
    """An unknown flag or name, or a combination of them that makes no sense."""


class DataError(RecipesError, ValueError):
    """A data file, a row or a column that cannot be used."""


class TemplateError(RecipesError, ValueError):
    """A chat template that cannot be used, or text that it cannot render."""


class ModelError(RecipesError, OSError):
    """A base model or an adapter that is missing, gated or damaged."""


class UnreadableModelError(ModelError):
    """A model whose `config.json` is missing, damaged or out of reach; loading it may say more."""


class QuantizationError(RecipesError, RuntimeError):
    """The base is not stored in the requested precision."""


class CheckError(RecipesError, RuntimeError):
    """A check on the loaded model or on the trained adapter failed."""


class DivergenceError(RecipesError, ArithmeticError):
    """The loss or a gradient is NaN or infinite."""


class SetupError(RecipesError, RuntimeError):
    """Package versions, devices, disk or network are not what the run needs."""


class RunFolderError(RecipesError, OSError):
    """A run folder that is taken, damaged, or belongs to another run."""


class ComparisonError(RecipesError, ValueError):
    """Runs that cannot be compared, for example because they differ in more than one setting."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the valid name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
