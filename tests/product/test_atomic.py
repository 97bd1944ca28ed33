"""Saves that are killed at every step: an artifact is the old one or the new one, and whole."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pnn_compile as pnn
from pnn_compile import atomic
from pnn_compile.artifact import directory
from tests.models.builders import block_chain

EVENTS = ("os.", "shutil.", "open", "ctypes.call_function", "fcntl.flock")


def _network(width: int) -> pnn.Compiled:
    return pnn.compile(block_chain(4, width), torch.randn(3, width), stages=2)


@pytest.fixture(scope="module")
def networks() -> tuple[pnn.Compiled, pnn.Compiled]:
    return _network(4), _network(5)


@pytest.fixture
def target(networks: tuple[pnn.Compiled, pnn.Compiled], tmp_path: Path) -> Path:
    folder = networks[0].save(tmp_path / "out" / "net")
    (folder / "notes.txt").write_text("mine")
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "log").write_text("mine too")
    return folder


def _run_in_child(work: Callable[[], object], kill_at: int | None = None) -> tuple[int, int]:
    """Call a function in a forked process that is killed before its n-th system call.

    Returns:
        The signal that ended it (0 for none), and the number of calls if none did.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: tuple[Any, ...]) -> None:
            nonlocal count
            if event.startswith(EVENTS):
                count += 1
                if count - 1 == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os.write(writing, count.to_bytes(4))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    calls = int.from_bytes(os.read(reading, 4))
    os.close(reading)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, calls


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(params=["exchange", "two renames"])
def _exchange_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)


@pytest.fixture(autouse=True)
def _without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnn_compile.artifact.directory._report", lambda *_: None)


@pytest.mark.usefixtures("_exchange_mode")
def test_a_save_that_is_killed_anywhere_loses_nothing(
    networks: tuple[pnn.Compiled, pnn.Compiled], target: Path
) -> None:
    new, old = (_contents(network.save(target)) for network in reversed(networks))
    assert {"notes.txt", "runs/first/log", "plan.json"} < old.keys()
    versions: list[int] = []
    ended: int = signal.SIGKILL
    while ended == signal.SIGKILL:
        ended, _ = _run_in_child(lambda: networks[1].save(target), kill_at=len(versions))
        if target.exists() and len(versions) % 8:
            atomic.recover(target, directory._is_users)  # what loading begins with
        else:
            pnn.load(target)
        assert os.listdir(target.parent) == [target.name]
        versions.append([old, new].index(_contents(target)))
        if versions[-1]:
            networks[0].save(target)
    assert ended == 0
    assert len(versions) > 30
    assert versions == sorted(versions)  # the old one until the exchange, from then on the new one


@pytest.mark.usefixtures("_exchange_mode")
def test_a_save_after_one_that_was_killed_finds_everything(
    networks: tuple[pnn.Compiled, pnn.Compiled], target: Path
) -> None:
    before = _contents(networks[0].save(target))
    _, calls = _run_in_child(lambda: networks[1].save(target))
    for number in range(0, calls, 5):
        _run_in_child(lambda: networks[1].save(target), number)
        networks[0].save(target)
        assert _contents(target) == before
        assert os.listdir(target.parent) == [target.name]


def test_a_killed_first_save_leaves_nothing_behind(
    networks: tuple[pnn.Compiled, pnn.Compiled], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "net"
    _, calls = _run_in_child(lambda: networks[0].save(tmp_path / "other" / "net"))
    for number in range(0, calls, 5):
        _run_in_child(lambda: networks[0].save(target), number)
        if not target.exists():
            with pytest.raises(pnn.PnnError, match="does not exist"):
                pnn.load(target)
        assert not target.parent.exists() or set(os.listdir(target.parent)) <= {"net"}
    networks[0].save(target)


def test_what_a_running_process_writes_is_left_alone(
    networks: tuple[pnn.Compiled, pnn.Compiled], target: Path
) -> None:
    with atomic.replace_directory(target, lambda _: True) as fresh:
        (fresh / "half").write_text("written")
        pnn.load(target)
        networks[1].save(target)
        assert (fresh / "half").exists()
        assert sorted(os.listdir(target.parent)) == sorted([fresh.name, target.name])
        for name in ("plan.json", "program.json"):
            (fresh / name).write_text("{}")
    assert os.listdir(target.parent) == [target.name]


def test_a_file_that_appears_during_a_save_stays(target: Path) -> None:
    with atomic.replace_directory(target, lambda entry: entry.suffix == ".txt") as fresh:
        (target / "late.txt").write_text("late")
        (fresh / "plan.json").write_text("{}")
    assert (target / "late.txt").read_text() == "late"
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "runs").exists()


def test_an_error_in_a_save_leaves_the_older_directory(target: Path) -> None:
    before = sorted(os.listdir(target))

    def fail() -> None:
        with atomic.replace_directory(target, lambda _: True) as fresh:
            (fresh / "plan.json").write_text("{}")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert sorted(os.listdir(target)) == before
    assert os.listdir(target.parent) == [target.name]


@pytest.fixture
def _other_names(target: Path) -> Iterator[None]:
    names = [".net.old", ".net.a.b.new", ".network.12345678.new", "net.12345678.old"]
    for name in names:
        (target.parent / name).mkdir()
    yield
    assert set(names) < set(os.listdir(target.parent))


@pytest.mark.usefixtures("_other_names")
def test_directories_of_other_names_are_not_touched(target: Path) -> None:
    pnn.load(target)
