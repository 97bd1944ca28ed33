"""What a program holds that the graph file has no form for."""

from __future__ import annotations

from passes.errors import ArtifactError

__all__ = ["UnknownError"]


class UnknownError(ArtifactError):
    """A module, operator or value is outside the lists of what the graph file can hold."""
