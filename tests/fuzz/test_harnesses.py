"""A moment of the harnesses, and saves on a full disk."""

import os
import resource
import signal
from pathlib import Path

import pytest

from tests.fuzz import artifacts, models, saves

ROOM = 3000


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_random_models_are_equal_or_refused(count: int) -> None:
    outcomes = [*models.check_many(range(10**6, 10**6 + count), jobs=1)]
    assert [outcome for outcome in outcomes if outcome.kind not in ("equal", "refused")] == []
    assert sum(outcome.kind == "equal" for outcome in outcomes) > count / 2


@pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_artifacts_are_refused_or_whole(count: int) -> None:
    results = artifacts.run(range(10**6, 10**6 + count), jobs=1)
    assert len(results) == count
    assert [row for row in results if row[2] in artifacts.BAD] == []
    assert sum(row[2] == "refused" for row in results) > 10


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_saves_leave_the_old_or_the_new(count: int) -> None:
    results = saves.run(count)
    assert len(results) == count
    assert [row for row in results if row[1] not in ("old", "new")] == []


@pytest.mark.parametrize("kind", saves.KINDS)
def test_a_full_disk_is_one_error_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    saved, folder = saves.KINDS[kind], tmp_path / "out"
    folder.mkdir()

    def save_in_little_room() -> None:
        saves._network(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
        saved.save(folder, 1)

    _, status = os.waitpid(saves.in_child(lambda: saved.save(folder, 0)), 0)
    assert status == 0
    before = sorted(folder.rglob("*"))
    _, status = os.waitpid(saves.in_child(save_in_little_room), 0)
    assert os.waitstatus_to_exitcode(status) == saves.REFUSED
    assert sorted(folder.rglob("*")) == before
    assert saves.read_in_child(saved, folder) == 0
