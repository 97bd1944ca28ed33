"""End the command on Ctrl-C with one line, also while it still imports.

Imports take seconds, and a KeyboardInterrupt in the middle of them ends in a long traceback, or in
an ImportError of an extension module. So the command ends in the signal handler itself until
everything is imported. A program that imports the package keeps its own handling.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""


def end_on_interrupt() -> None:
    """End this process on Ctrl-C, if it is the command, until `raise_on_interrupt` is called."""
    module = sys.argv[:1] == ["-m"] and "pnn_compile" in sys.orig_argv
    is_command = module or os.path.basename(sys.argv[0] if sys.argv else "") == "pnn-compile"
    is_main = threading.current_thread() is threading.main_thread()
    if is_command and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Raise KeyboardInterrupt again: from here on a command may have something to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_interrupted() -> NoReturn:
    """End this process with one line, after everything was cleaned up.

    Not with `sys.exit`: Python would send itself the signal again if the KeyboardInterrupt came
    from within `exec`, and a second Ctrl-C would disturb the end.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    _end()


def _end(*_: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
