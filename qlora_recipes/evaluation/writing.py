"""What a disk does to results that are written: one error that says where, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_recipes.errors import RecipesError, RunFolderError


@contextmanager
def disk_faults(folder: Path, advice: str) -> Iterator[None]:
    """Turn what the system raises where the block writes into our error.

    Raises:
        RunFolderError: naming the folder, the system's reason and the fix.
    """
    try:
        yield
    except RecipesError:
        raise
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror or error}. {advice}") from error
