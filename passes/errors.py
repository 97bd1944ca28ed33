"""Errors of the compiler: one base class, and one class per part that can fail.

A message says what failed, where, with which numbers, and what to do next. The command line
prints it in one piece, without a traceback, and exits with 2 (3 for `VerificationError`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def printable(text: str) -> str:
    r"""Write out what a terminal would obey, such as escape sequences in a name from a file.

    >>> print(printable("stage \x1b[2J of\nmodel"))
    stage \x1b[2J of
    model
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def suggest(word: str, names: Sequence[str]) -> str:
    """Return close matches of a misspelled name, or else the first names that exist.

    >>> suggest("Nett", ["Net", "nn"])
    'did you mean Net?'
    """
    if close := difflib.get_close_matches(word, names):
        return f"did you mean {' or '.join(close)}?"
    return f"there is {', '.join(names[:8]) or 'none'}"


def amount(count: int, noun: str) -> str:
    """Return a number of things in words.

    >>> amount(1, "stage"), amount(2, "stage")
    ('1 stage', '2 stages')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class PnnError(Exception):
    """Base class of all errors of the compiler."""

    def __str__(self) -> str:
        return printable(super().__str__())


class OptionError(PnnError):
    """An option has an unknown or unusable value."""


class SourceError(PnnError):
    """The model or its example inputs could not be found at the given place."""


class CaptureError(PnnError):
    """No capture front end produced a graph that is equal to the model."""


class PartitionError(PnnError):
    """The graph cannot be cut into the requested stages."""


class SynthesisError(PnnError):
    """No preprocessing operator or coarse propagator can be built for an interface."""


class VerificationError(PnnError):
    """A compiled network disagrees with its model."""


class ArtifactError(PnnError):
    """A saved artifact cannot be written or read."""


class RuntimeFault(PnnError):
    """A network cannot be distributed, or a step failed on a rank."""


class ExportError(PnnError):
    """A compiled network cannot be written in the requested format."""


def why(error: BaseException) -> str:
    """Return what went wrong, of an error of the system without its number and its path."""
    return getattr(error, "strerror", None) or str(error)


def first_line(value: object) -> str:
    r"""Return the first line that is not blank of a text or a message; "" if there is none.

    >>> first_line(ValueError("\n out of memory\nat ...")), first_line(ValueError())
    ('out of memory', '')
    """
    return next((line.strip() for line in str(value).splitlines() if line.strip()), "")
