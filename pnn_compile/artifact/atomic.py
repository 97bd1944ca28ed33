"""Directories that are replaced whole or not at all, whatever kills the process on the way.

A new directory is written beside its place, under a hidden name, and then takes it in one step
where the system can exchange two directories. What a killed process left is told from what a
running one is writing by a lock on the directory itself, which ends with its owner: the next save
or load puts back a directory that was moved aside, and removes the rest.
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

__all__ = ["link", "recover", "replacing"]

_log = logging.getLogger(__name__)

Keep = Callable[[Path], bool]
"""Whether an entry of an older directory is the user's, and moves into the new one."""


@contextmanager
def replacing(target: Path, keep: Keep) -> Iterator[Path]:
    """Give a new directory that takes the place of `target` if the block succeeds.

    Args:
        target: An absolute path, of a directory or of nothing.
        keep: Which entries of the older directory the new one gets too.

    Raises:
        OSError: Something cannot be written; the older directory is whole then.
    """
    recover(target, keep)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("new", "old"))
    with ExitStack() as locks:
        with _locked(target.parent):  # nobody looks for what is left between these two steps
            fresh.mkdir()
            locks.enter_context(_locked(fresh))
        try:
            yield fresh
            if target.exists():
                locks.enter_context(_locked(target))
                _carry_over(target, fresh, keep)
                if not _exchange(fresh, target):
                    os.rename(target, old)
                    os.rename(fresh, target)
            else:
                os.rename(fresh, target)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for rest in (old, fresh):
                _remove(rest, target, keep)


def recover(target: Path, keep: Keep) -> None:
    """Put back what a killed process moved aside, and remove what no process is writing.

    Where this directory may not be written to, or has no locks, all is left as it is.
    """
    with suppress(OSError):
        if not _hidden(target):
            return
        with _locked(target.parent) as certain:
            for path in _hidden(target) if certain else ():
                with suppress(OSError), _locked(path, wait=False) as orphan:
                    if not orphan:
                        continue
                    if path.suffix == ".old" and not target.exists():
                        os.rename(path, target)
                        _log.warning("%s was moved aside by a process that died: back", target)
                    else:
                        _remove(path, target, keep)


def _hidden(target: Path) -> list[Path]:
    """What processes wrote beside a directory; what was moved aside comes first."""
    if not target.parent.is_dir():
        return []
    prefix, names = f".{target.name}.", os.listdir(target.parent)
    found = [
        name
        for name in names
        if name.startswith(prefix)
        and name[len(prefix) :].count(".") == 1
        and name.endswith((".old", ".new"))
    ]
    return [target.with_name(name) for name in sorted(found, key=lambda name: name[::-1])]


def _remove(path: Path, target: Path, keep: Keep) -> None:
    """Remove a directory; what is the user's in it, and not in `target`, moves there first."""
    with suppress(OSError):
        if path.exists():
            if target.exists():
                _carry_over(path, target, keep)
            shutil.rmtree(path, ignore_errors=True)


def _carry_over(old: Path, fresh: Path, keep: Keep) -> None:
    """Give a directory what another one holds of the user's, where it has nothing of the name."""
    for entry in old.iterdir():
        place = fresh / entry.name
        if not keep(entry) or os.path.lexists(place):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=link)
        else:
            link(entry, place)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a directory until the end of the block or of the process; gives whether it could be."""
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


_SWAP = 2
_HERE = -100 if sys.platform == "linux" else -2
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; gives whether the system can.

    Raises:
        OSError: It can, and it failed.
    """
    library = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None
    rename = getattr(library, "renameat2", None) or getattr(library, "renameatx_np", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(other))
