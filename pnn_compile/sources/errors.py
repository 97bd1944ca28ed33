"""Say what the user's code raised, and where."""

from __future__ import annotations

import difflib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from passes.errors import SourceError

__all__ = ["advise", "blame", "first_line", "library"]

_stdlib = Path(sysconfig.get_path("stdlib")).resolve()


def advise(word: str, names: Sequence[str]) -> str:
    """Say which name was meant, or else which there are."""
    if close := difflib.get_close_matches(word, names):
        return f"did you mean {' or '.join(close)}?"
    return f"there is {', '.join(names[:8]) or 'none'}"


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Report whatever the user's code raises: its type, message, file and line."""
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as exc:
        message = exc.msg if isinstance(exc, SyntaxError) else first_line(exc)
        said = f"{type(exc).__name__}: {message}" if message else type(exc).__name__
        advice = "--debug shows the traceback"
        if isinstance(exc, ModuleNotFoundError):
            advice = f"install it for {sys.executable}, or mend its name"
        elif isinstance(exc, ImportError) and "relative import" in message:
            advice = "name a file of a package as package.module:name"
        elif isinstance(exc, SystemExit):
            advice = 'put what runs the program under `if __name__ == "__main__":`'
        raise SourceError(f"{what} raises {said}{_where(exc)}; {advice}") from exc


def _where(exc: BaseException) -> str:
    """Return " (file:line)" of the innermost line of the user's own code."""
    lines = [(Path(at.filename), at.lineno) for at in traceback.extract_tb(exc.__traceback__)]
    lines = [each for each in lines if each[0].is_file() and not _machinery(each[0])]
    lines = [each for each in lines if not library(each[0])] or lines
    if isinstance(exc, SyntaxError) and exc.filename and Path(exc.filename).is_file():
        lines.append((Path(exc.filename), exc.lineno or 1))
    if not lines:
        return ""
    file, number = lines[-1]
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f" ({shown}:{number})"


def _machinery(file: Path) -> bool:
    return file.is_relative_to(Path(__file__).parent) or file == Path(importlib.__file__)


def library(file: Path) -> bool:
    """Whether a file is of Python or of an installed package."""
    return file.is_relative_to(_stdlib) or bool({"site-packages", "dist-packages"} & {*file.parts})


def first_line(value: object) -> str:
    """Return the first line of a value's text that is not blank, at most 200 characters."""
    return next((line.strip() for line in str(value).splitlines() if line.strip()), "")[:200]
