"""Import a library that a user may or may not have."""

from __future__ import annotations

import importlib
from types import ModuleType

from passes.errors import SourceError
from pnn_compile.sources.errors import first_line

__all__ = ["require"]


def require(name: str, source: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: The library, also the word that installs it.
        source: What asked for it.

    Raises:
        SourceError: It is not installed, or does not fit the rest of the installation.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise SourceError(f"{source} needs {name}: pip install {name}") from error
        raise SourceError(
            f"{source} needs {name}, which lacks {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # whatever a library does on import
        raise SourceError(
            f"{source} needs {name}, which cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}): install builds of torch and {name} that were made for each "
            "other"
        ) from error
