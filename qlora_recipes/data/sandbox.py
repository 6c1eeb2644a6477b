"""Limits for untrusted code: a template can loop forever, or allocate all memory. Knows nothing of what it runs."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_in_force = False


@contextmanager
def limits(seconds: float, more: int | None) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer, MemoryError when it allocates `more` bytes than there are now.

    A block inside of another is under the limits of the outer one. Memory is limited only on Linux and where `more` is
    given; it is that of the whole process, whose other threads must not allocate meanwhile. Outside the main thread
    there are no limits.
    """
    global _in_force
    if _in_force or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"it ran for {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _in_force = True
    try:
        if more is not None and sys.platform == "linux":
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            allowed = [limit for limit in (soft, hard, now + more) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
        yield
    finally:
        _in_force = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
