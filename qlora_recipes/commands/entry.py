"""How every program starts and ends: quiet libraries, one message for an error, and its exit code.

Knows no command.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from qlora_recipes.environment import check_launch, expandable_segments, quiet_libraries
from qlora_recipes.errors import EXIT_CODE, RecipesError


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call a command with its command line (the process's own by default).

    An error of ours is printed as one message, with its traceback under `--debug`, and ends the program with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    expandable_segments()
    speaks = True
    try:
        check_launch()
        speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0  # one message, not one for each process
        main(argv)
    except RecipesError as error:
        if "--debug" in argv:
            traceback.print_exc()
        if speaks:
            message = f"error: {error}".encode("utf-8", "backslashreplace").decode()  # it may quote half a character
            print(message, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except BrokenPipeError:  # whoever read it, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)  # what is finished is on the disk
