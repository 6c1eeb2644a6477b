"""How every program starts and ends: quiet libraries, one message for an error, and its exit code.

Knows no command.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from qlora_recipes.environment import check_launch, check_sharding, expandable_segments, quiet_libraries
from qlora_recipes.errors import EXIT_CODE, RecipesError


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a command with its command line (the process's own by default).

    An error of ours is printed as one message, with its traceback under `--debug`, and ends the program with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The libraries make two million objects that stay: not worth being looked through for garbage hundreds of times,
    # and not at the end of the process either.
    gc.set_threshold(100_000, 20, 20)
    quiet_libraries()
    expandable_segments()
    try:
        check_launch()
    except RecipesError as error:
        _end_with(error, argv)
    try:
        check_sharding()
        main(argv)
    except RecipesError as error:
        _leave_it_to_the_first()
        _end_with(error, argv)
    except BrokenPipeError:  # whoever read it, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)  # what is finished is on the disk
    except Exception:
        _leave_it_to_the_first()
        raise
    finally:
        gc.freeze()


def _end_with(error: RecipesError, argv: Sequence[str]) -> NoReturn:
    if "--debug" in argv:
        traceback.print_exc()
    message = f"error: {error}".encode("utf-8", "backslashreplace").decode()  # it may quote half a character
    print(message, file=sys.stderr)
    sys.exit(EXIT_CODE)


def _leave_it_to_the_first() -> None:
    """End quietly where another process of the run has failed before: one message, not one for each process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from qlora_recipes.preflight.ranks import fails_first

        if not fails_first():
            sys.exit(EXIT_CODE)
