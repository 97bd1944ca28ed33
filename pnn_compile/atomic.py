"""Replace files and directories completely or not at all, even if the process is killed in between.

New contents are written beside the target under a hidden name, flushed to the disk, and moved in
one step: a file over the old one, a directory in exchange for it, or in two renames where the
system cannot exchange:

    net                    the target, until the exchange
    .net.1a2b3c4d.new      the new contents; after the exchange the old ones, until they are removed
    .net.1a2b3c4d.old      the old ones between the two renames
    .net.1a2b3c4d.moves    new entries that are about to move into the directory `net`

A process locks what it writes, and the lock ends with the process. What is unlocked was therefore
left by a killed process: the next save or load moves the `.old` one back if the target is missing,
finishes the `.moves`, and removes all others.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
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
            _flush(new)
            if target.exists():
                locks.enter_context(_locked(target))
                _carry_over(target, new, keep)
                if not _exchange(new, target):
                    os.rename(target, old)
                    os.rename(new, target)
            else:
                os.rename(new, target)
            _flush(target.parent, recurse=False)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for leftover in (old, new):
                _remove(leftover, target, keep)


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; the file replaces `target` if the block succeeds.

    What is not a plain file, such as /dev/stdout, is written in place.

    Raises:
        OSError: The file cannot be written; the old one is unchanged then.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    recover(target, lambda _: False)
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.new")
    with ExitStack() as locks:
        with _locked(target.parent):
            new.touch()
            locks.enter_context(_locked(new))
        try:
            yield new
            if target.exists():
                shutil.copymode(target, new)
            _flush(new)
            os.replace(new, target)
            _flush(target.parent, recurse=False)
        finally:
            new.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text as `target`, in UTF-8, completely or not at all.

    Raises:
        OSError: The file cannot be written; the old one is unchanged then.
    """
    with replace_file(target) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def replace_entries(folder: Path) -> Iterator[Path]:
    """Yield a directory whose entries replace those of the same names in `folder`, all or none.

    Raises:
        OSError: Something cannot be written; the directory is unchanged then.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recover_entries(folder)
    new = folder / f".{folder.name}.{uuid.uuid4().hex[:8]}.new"
    moves = new.with_suffix(".moves")
    with ExitStack() as locks:
        with _locked(folder):
            new.mkdir()
            locks.enter_context(_locked(new))
        try:
            yield new
            _flush(new)
            os.rename(new, moves)  # from here on a killed process is finished by the next one
            _move_entries(moves, folder)
            _flush(folder, recurse=False)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def recover_entries(folder: Path) -> None:
    """Finish what a killed process was about to move into a directory, and remove its drafts."""
    folder = folder.resolve()
    recover(folder / folder.name, lambda _: False)


def _move_entries(moves: Path, folder: Path) -> None:
    for entry in sorted(moves.iterdir()):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    moves.rmdir()


def _flush(path: Path, *, recurse: bool = True) -> None:
    """Have the system write a file, or a directory and all in it, to the disk."""
    if recurse and path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            _flush(entry)
    if path.is_symlink() or (sys.platform == "win32" and path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
                    if path.suffix == ".moves":
                        _move_entries(path, path.parent)
                    elif path.suffix == ".old" and not target.exists():
                        os.rename(path, target)
                        _log.warning("%s was moved away by a process that died: restored", target)
                    else:
                        _remove(path, target, keep)


def _hidden(target: Path) -> list[Path]:
    """List the hidden files and directories of a target, the `.new` ones last."""
    if not target.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(old|new|moves)")
    hidden = filter(pattern.fullmatch, os.listdir(target.parent))
    return [target.with_name(name) for name in sorted(hidden, key=lambda name: name[-4:] == ".new")]


def _remove(path: Path, target: Path, keep: Keep) -> None:
    """Remove a file, or a directory after the user's entries are carried over to `target`."""
    with suppress(OSError):
        if path.is_file():
            path.unlink()
        elif path.exists():
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
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file or directory until the end of the block or of the process.

    Args:
        path: The file or directory.
        wait: Whether to wait for another process that holds the lock.

    Yields:
        Whether it is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle = os.open(path, os.O_RDONLY)
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
