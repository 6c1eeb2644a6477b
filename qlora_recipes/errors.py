"""Every error a user can cause, in one tree.

    RecipesError
    ├── RecipeError          (TypeError)      a recipe declares something that cannot work
    ├── UsageError           (ValueError)     a flag, a name or a combination of them
    ├── DataError            (ValueError)     a file, a row or a column
    ├── TemplateError        (ValueError)     a chat template, or text that it cannot hold
    ├── ModelError           (OSError)        a base model or an adapter that cannot be had
    ├── QuantizationError    (RuntimeError)   the base is not stored as the precision says
    ├── CheckError           (RuntimeError)   a check on the loaded model or the trained adapter failed
    ├── DivergenceError      (ArithmeticError) a loss or a gradient that is NaN or infinite
    ├── SetupError     (RuntimeError)   versions, devices, disk or network
    ├── RunFolderError       (OSError)        a run folder that is taken, damaged or another's
    └── ComparisonError      (ValueError)     two runs that cannot be held against each other

Each also is the builtin that it refines, so that `except ValueError` still works for who knows nothing
of this package. A message says what was got, what was expected and the likely fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class RecipesError(Exception):
    """Something a user can mend; the command line prints it without a traceback and exits with 2."""


class RecipeError(RecipesError, TypeError):
    """A recipe class declares something that cannot work."""


class UsageError(RecipesError, ValueError):
    """A flag, a name, or a combination of them that means nothing."""


class DataError(RecipesError, ValueError):
    """A data file, a row or a column that cannot be used."""


class TemplateError(RecipesError, ValueError):
    """A chat template that cannot be used, or text that it cannot hold."""


class ModelError(RecipesError, OSError):
    """A base model or an adapter that is missing, gated or not what it says."""


class QuantizationError(RecipesError, RuntimeError):
    """The base is not stored in the precision that was asked for."""


class CheckError(RecipesError, RuntimeError):
    """A check on the loaded model or on the trained adapter failed."""


class DivergenceError(RecipesError, ArithmeticError):
    """The loss or a gradient is NaN or infinite."""


class SetupError(RecipesError, RuntimeError):
    """Package versions, devices, disk or network are not what the run needs."""


class RunFolderError(RecipesError, OSError):
    """A run folder that is taken, damaged, or belongs to another run."""


class ComparisonError(RecipesError, ValueError):
    """Two runs that differ in more than what is compared."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the valid name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
