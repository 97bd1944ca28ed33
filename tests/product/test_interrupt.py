"""Ctrl-C ends a command, and the ranks that it started, at once and with one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pnn_compile as pnn

ENDLESS = {"run": ("--steps", "10000000"), "bench": ("--rounds", "10000000")}


def _processes() -> Iterator[tuple[int, int]]:
    """Pairs of a living process and its parent, from Linux's table."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    yield int(entry.name), int(parent)


def _children(parent: int) -> list[int]:
    return [process for process, its_parent in _processes() if its_parent == parent]


def _listen() -> None:
    # A job in the background of a shell ignores the signal, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pnn_compile", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_listen,
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the processes of Linux")
@pytest.mark.parametrize(
    ("command", "everyone"),
    [pytest.param("run", False, marks=pytest.mark.slow), ("run", True), ("bench", False)],
)
def test_an_interrupt_ends_the_ranks(
    command: str, everyone: bool, unet_compiled: pnn.Compiled, tmp_path: Path
) -> None:
    artifact = str(unet_compiled.save(tmp_path / "artifact"))
    process = _start(command, artifact, "--ranks", "2", *ENDLESS[command])
    while len(_children(process.pid)) < 3 and process.poll() is None:  # two ranks and a tracker
        time.sleep(0.05)
    time.sleep(2)
    ranks = _children(process.pid)
    begun = time.monotonic()
    # A terminal sends the signal to all processes of the command.
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert time.monotonic() - begun < 30
    steps = r"(opening: \d+\.\d s\n)?"  # what was done before
    assert (process.returncode, output) == (130, "")
    assert re.fullmatch(f"{steps}interrupted\n", errors)
    time.sleep(0.5)
    assert not {*ranks} & {process for process, _ in _processes()}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the processes of Linux")
def test_an_interrupt_during_imports_is_one_line() -> None:
    process = _start("assess", "nowhere.py", "nowhere.npz")
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
