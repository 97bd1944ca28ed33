"""A distributed run goes on from its checkpoint bit by bit, on as many ranks as there are."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import pnn_compile as pnn
from pnn_compile.runtime.checkpoint_files import _Unpickler
from tests.distributed.ranks import start
from tests.models.distributed_models import batches, loss, network

STEPS = 4


def _optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    weights = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, 0.01)


def _run(
    rank: int, kind: str, optimizer: str, folder: str, steps: int, placement: list[int] | None
) -> dict[str, Any]:
    """Train up to a number of steps, from where the checkpoint in the folder stands."""
    compiled = network(4, kind)
    torch.manual_seed(5)
    module = pnn.runtime.distribute(compiled, placement=placement).train()
    local = _optimizer(optimizer, module)
    schedule = torch.optim.lr_scheduler.ExponentialLR(local, 0.9)
    checkpoints = pnn.runtime.Checkpoints(folder, module, local, {"schedule": schedule})
    begun = checkpoints.resume()
    losses = []
    for batch in batches(STEPS)[begun:steps]:
        losses.append(module.train_step(batch, loss, local).item())
        schedule.step()
        checkpoints.save()
    return {
        "begun": begun, "losses": losses, "state": module.network.state_dict(),
        "original": module.original_state_dict(),
    }  # fmt: skip


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: value for rank in ranks for key, value in rank["state"].items()}


@pytest.mark.parametrize(("kind", "optimizer"), [("blocks", "adamw"), ("tied", "sgd")])
def test_a_run_goes_on_bit_by_bit_on_any_placement(
    kind: str, optimizer: str, tmp_path: Path
) -> None:
    whole, halves, other = (str(tmp_path / name) for name in ("whole", "halves", "other"))
    expected = start(_run, 2, tmp_path, kind, optimizer, whole, STEPS, None)
    first = start(_run, 2, tmp_path, kind, optimizer, halves, 2, None)
    os.rename(halves, other)
    second = start(_run, 3, tmp_path, kind, optimizer, other, STEPS, [0, 1, 2, 1])
    assert [rank["begun"] for rank in second] == [2, 2, 2]
    assert first[0]["losses"] + second[0]["losses"] == expected[0]["losses"]
    result = _merged(second)
    for key, value in _merged(expected).items():
        assert torch.equal(result[key], value), key
    assert sorted(os.listdir(other)) == ["step-00000003", "step-00000004"]


def test_weights_go_in_and_out_by_the_names_of_the_model(tmp_path: Path) -> None:
    first, second = start(_run, 2, tmp_path, "tied", "sgd", str(tmp_path / "run"), 1, None)
    assert second["original"] == {}
    compiled = network(4, "tied")
    assert first["original"].keys() == compiled.original_state_dict().keys()
    compiled.load_original_state_dict(first["original"])
    expected = _merged([first, second])
    for key, value in compiled.module.state_dict().items():
        if key.startswith(("fine_", "head")):
            assert torch.equal(value, expected[key]), key
    path = tmp_path / "original.pt"
    torch.save({key: torch.full_like(v, 2) for key, v in first["original"].items()}, path)
    for state in start(_load_original, 2, tmp_path, str(path)):
        assert all((value == 2).all() for key, value in state.items() if "fine" in key)


def _load_original(rank: int, path: str) -> dict[str, Tensor]:
    module = pnn.runtime.distribute(network(4, "tied"))
    module.load_original_state_dict(torch.load(path, mmap=True))
    return module.network.state_dict()


def _misfits(rank: int, folder: str) -> list[str]:
    module = pnn.runtime.distribute(network(4))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer)
    module.train_step(batches(1)[0], loss, optimizer)
    checkpoints.save()
    messages = []
    other = pnn.runtime.distribute(network(2))
    local = torch.optim.SGD(other.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for attempt in (
        lambda: pnn.runtime.Checkpoints(folder, other, local).resume(),
        lambda: pnn.runtime.Checkpoints(folder, module, optimizer, {"rate": schedule}).resume(),
        lambda: pnn.runtime.Checkpoints(folder, module, local),
        lambda: pnn.runtime.Checkpoints(folder, module, optimizer, keep=0),
    ):
        with pytest.raises(pnn.RuntimeFault) as caught:
            attempt()
        messages.append(str(caught.value))
    dist.barrier()
    if rank == 0:
        (Path(folder) / "step-00000001" / ".metadata").write_bytes(b"damaged")
    dist.barrier()
    with pytest.raises(pnn.RuntimeFault) as caught:
        checkpoints.resume()
    return [*messages, str(caught.value)]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for messages in start(_misfits, 2, tmp_path, str(tmp_path / "run")):
        plan, part, optimizer, keep, damaged = messages
        assert "another plan" in plan
        assert "lacks parts.rate" in part
        assert "not of this rank" in optimizer
        assert "keep is 0" in keep
        assert "step-00000001 cannot be resumed" in damaged


def _replicas(rank: int, folder: str) -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "stage"))
    module = pnn.runtime.distribute(network(2), mesh=mesh, placement=[0, 0]).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer)
    module.train_step(batches(1)[0] * (1 + rank), loss, optimizer)
    first = [buffer.clone() for buffer in module.buffers()]
    for buffer in first:
        dist.broadcast(buffer, 0)
    checkpoints.save()
    checkpoints.resume()
    return all(torch.equal(a, b) for a, b in zip(module.buffers(), first, strict=True))


def test_the_statistics_of_the_first_replica_are_saved(tmp_path: Path) -> None:
    assert start(_replicas, 2, tmp_path, str(tmp_path / "run")) == [True, True]


def _save(rank: int, folder: str, resume: bool, times: int = 1) -> str:
    module = pnn.runtime.distribute(network(2))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer, keep=1)
    if resume:
        return str(checkpoints.resume())
    module.train_step(batches(1)[0], loss, optimizer)
    try:
        for _ in range(times):
            checkpoints.save()
    except pnn.RuntimeFault as error:
        return str(error)
    return ""


def test_a_folder_with_later_steps_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "step-00000007").mkdir(parents=True)
    for message in start(_save, 2, tmp_path, str(folder), False):
        assert "step 7, and this run has taken 1: resume() from it" in message
    assert os.listdir(folder) == ["step-00000007"]


def test_a_step_is_saved_again_and_drafts_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / ".step-00000003.1a2b3c4d.new").mkdir(parents=True)
    assert start(_save, 2, tmp_path, str(folder), False, 2) == ["", ""]
    assert os.listdir(folder) == ["step-00000001"]


def test_a_replacement_that_was_cut_off_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(_save, 2, tmp_path, str(folder), False)
    (folder / "step-00000001").rename(folder / ".step-00000001.1a2b3c4d.old")
    assert start(_save, 2, tmp_path, str(folder), True) == ["1", "1"]


class Hostile:
    """Unpickles to a call of the system."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def _metadata(folder: Path, flag: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(flag)))


def _value(folder: Path, flag: Path) -> None:
    """Put an object where the number of steps is stored."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = [i for index, i in metadata.storage_data.items() if index.fqn == "run"]
    file = io.BytesIO()
    torch.save(Hostile(flag), file)
    info.relative_path, info.offset, info.length = "other.distcp", 0, len(file.getvalue())
    (folder / "other.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _outside(folder: Path, flag: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{folder.name}/{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _larger(folder: Path, flag: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    record = next(r for r in metadata.state_dict_metadata.values() if hasattr(r, "size"))
    record.size = torch.Size([10**6, 10**6])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class _Attribute:
    """Is written as Python before 3.11.4 writes members of an Enum: as getattr(kind, name)."""

    def __init__(self, kind: object, name: str) -> None:
        self._pair = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._pair


def test_members_of_an_enum_are_read_in_either_form_and_no_other_attribute() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as KIND

    member = next(iter(KIND))
    for written in (member, _Attribute(KIND, member.name)):
        assert _Unpickler(io.BytesIO(pickle.dumps(written))).load() is member
    for kind, name in ((KIND, "__subclasses__"), (torch.Size, "count")):
        with pytest.raises(pickle.UnpicklingError, match="no record of a checkpoint"):
            _Unpickler(io.BytesIO(pickle.dumps(_Attribute(kind, name)))).load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_metadata, "is no record of a checkpoint"),
        (_value, "weights_only"),
        (_outside, "it names the file"),
        (_larger, "more than its files hold"),
    ],
)
def test_a_checkpoint_runs_nothing(
    change: Callable[[Path, Path], None], reason: str, tmp_path: Path
) -> None:
    flag, folder = tmp_path / "was here", tmp_path / "run"
    start(_save, 1, tmp_path, str(folder), False)
    change(folder / "step-00000001", flag)
    (message,) = start(_resume_error, 1, tmp_path, str(folder))
    assert "step-00000001 cannot be resumed" in message
    assert reason in message
    assert not flag.exists()


def _resume_error(rank: int, folder: str) -> str:
    with pytest.raises(pnn.RuntimeFault) as caught:
        _save(rank, folder, True)
    return str(caught.value)


class _WithObjects:
    def state_dict(self) -> Any:
        return {"begun": Path("here")}

    def load_state_dict(self, state_dict: Any, /) -> None:
        raise AssertionError


def _save_objects(rank: int, folder: str) -> str:
    module = pnn.runtime.distribute(network(2))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer, {"clock": _WithObjects()})
    with pytest.raises(pnn.RuntimeFault) as caught:
        checkpoints.save()
    return str(caught.value)


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    (message,) = start(_save_objects, 1, tmp_path, str(tmp_path / "run"))
    assert "parts.clock holds objects" in message
    assert not (tmp_path / "run").exists()
