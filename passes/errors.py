"""Errors of the compiler: one base class, one kind per thing that can go wrong.

A message says what failed, where, the numbers involved, and what to do next. The command line
prints it in one piece, without a traceback, and exits with 2 (3 for `VerificationError`).
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CaptureError",
    "ExportError",
    "OptionError",
    "PartitionError",
    "PnnError",
    "RuntimeFault",
    "SourceError",
    "SynthesisError",
    "VerificationError",
]


class PnnError(Exception):
    """Base class of every error that a user of the compiler can meet."""


class OptionError(PnnError):
    """An option has a value that the compiler does not know or cannot use."""


class SourceError(PnnError):
    """The model, or inputs to trace it with, could not be found where the user pointed."""


class CaptureError(PnnError):
    """No capture front end produced a graph that equals the model."""


class PartitionError(PnnError):
    """The graph cannot be cut into the stages asked for."""


class SynthesisError(PnnError):
    """No preprocessing operator or coarse propagator can be made for an interface."""


class VerificationError(PnnError):
    """A compiled network disagrees with the model it was made from."""


class ArtifactError(PnnError):
    """A saved artifact cannot be written or read."""


class RuntimeFault(PnnError):
    """A network cannot be distributed, or a step of it failed on some rank."""


class ExportError(PnnError):
    """A compiled network cannot be written in the format asked for."""
