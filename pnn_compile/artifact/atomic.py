"""Replace a directory completely or not at all, even if the process is killed in between.

A new directory is written beside the target under a hidden name, then exchanged with it in one
step, or in two renames where the system cannot exchange:

    net                    the target, until the exchange
    .net.1a2b3c4d.new      the new directory; after the exchange the old one, until it is removed
    .net.1a2b3c4d.old      the old one between the two renames

A process locks the hidden directories that it writes, and the lock ends with the process. An
unlocked one was therefore left by a killed process: the next save or load moves the `.old` one back
if the target is missing, and removes all others.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_log = logging.getLogger(__name__)

Keep = Callable[[Path], bool]
"""Whether an entry of the old directory belongs to the user, and goes into the new one."""


@contextmanager
def replace_directory(target: Path, keep: Keep) -> Iterator[Path]:
    """Yield a new directory that replaces `target` if the block succeeds.

    Args:
        target: An absolute path, of a directory or of nothing.
        keep: Entries of the old directory to carry over.

    Raises:
        OSError: A file cannot be written; the old directory is unchanged then.
    """
    recover(target, keep)
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{unique}.{kind}") for kind in ("new", "old"))
    with ExitStack() as locks:
        with _locked(target.parent):  # so that no `recover` sees the directory before it is locked
            new.mkdir()
            locks.enter_context(_locked(new))
        try:
            yield new
            if target.exists():
                locks.enter_context(_locked(target))
                _carry_over(target, new, keep)
                if not _exchange(new, target):
                    os.rename(target, old)
                    os.rename(new, target)
            else:
                os.rename(new, target)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for leftover in (old, new):
                _remove(leftover, target, keep)


def recover(target: Path, keep: Keep) -> None:
    """Undo what a killed process left beside `target`; what a running one writes stays.

    Nothing changes where the directory above is not writable or the file system has no locks.
    """
    with suppress(OSError):
        if not _hidden(target):
            return
        with _locked(target.parent) as parent_locked:
            for path in _hidden(target) if parent_locked else ():
                with suppress(OSError), _locked(path, wait=False) as abandoned:
                    if not abandoned:
                        continue
                    if path.suffix == ".old" and not target.exists():
                        os.rename(path, target)
                        _log.warning("%s was moved away by a process that died: restored", target)
                    else:
                        _remove(path, target, keep)


def _hidden(target: Path) -> list[Path]:
    """List the hidden directories of a target, the `.old` ones first."""
    if not target.parent.is_dir():
        return []
    prefix, names = f".{target.name}.", os.listdir(target.parent)
    hidden = [
        name
        for name in names
        if name.startswith(prefix)
        and name[len(prefix) :].count(".") == 1
        and name.endswith((".old", ".new"))
    ]
    return [
        target.with_name(name)
        for name in sorted(hidden, key=lambda name: not name.endswith(".old"))
    ]


def _remove(path: Path, target: Path, keep: Keep) -> None:
    """Remove a directory, after the user's entries are carried over to `target`."""
    with suppress(OSError):
        if path.exists():
            if target.exists():
                _carry_over(path, target, keep)
            shutil.rmtree(path, ignore_errors=True)


def _carry_over(old: Path, new: Path, keep: Keep) -> None:
    """Copy the user's entries of one directory to another, apart from names that exist there."""
    for entry in old.iterdir():
        copy = new / entry.name
        if not keep(entry) or os.path.lexists(copy):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(entry, copy)


def _link(source: str | Path, target: str | Path) -> None:
    """Make a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a directory until the end of the block or of the process.

    Args:
        folder: The directory.
        wait: Whether to wait for another process that holds the lock.

    Yields:
        Whether the directory is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


_RENAME_EXCHANGE = 2  # RENAME_SWAP on macOS
_AT_FDCWD = -100 if sys.platform == "linux" else -2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step.

    Returns:
        Whether the system supports it; if not, nothing changed.

    Raises:
        OSError: The exchange failed.
    """
    library = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None
    rename = getattr(library, "renameat2", None) or getattr(library, "renameatx_np", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))
