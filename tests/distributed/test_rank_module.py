"""Ranks in separate processes compute what one process computes."""

from __future__ import annotations

import gc
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110
from pnn_compile.inputs import named_batch
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import RankPieces
from tests.distributed.ranks import start
from tests.models.builders import mlp

STEPS, SEED, RATE = 3, 7, 0.05


def _compiled(
    name: str, stages: int, options: dict[str, Any] | None = None
) -> tuple[pnn.Compiled, list[Tensor]]:
    torch.manual_seed(0)
    if name == "decoder":
        model: torch.nn.Module = decoder.build_model(layers=6, width=16, context=16)
        batches = [torch.randint(256, (4, 16)) for _ in range(STEPS)]
    else:
        model = resnet110.build_model(units_per_group=3, width=4)
        batches = [torch.randn(4, 3, 16, 16) for _ in range(STEPS)]
    compiled = pnn.compile(model, batches[0], stages=stages, coarse_budget=1.0, **(options or {}))
    return compiled, batches


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, torch.ones_like(outputs))


def _train(
    rank: int, name: str, stages: int, micro: int, options: dict[str, Any]
) -> dict[str, Any]:
    compiled, batches = _compiled(name, stages, options)
    torch.manual_seed(SEED)
    module = pnn.runtime.distribute(compiled, batches=micro).train()
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    losses = [module.train_step(batch, _loss, optimizer, clip_norm=0.5).item() for batch in batches]
    outputs = module.eval()(batches[0])
    return {"losses": losses, "state": module.state_dict(), "outputs": outputs}


def _train_in_one_process(
    name: str, stages: int, micro: int, options: dict[str, Any]
) -> dict[str, Any]:
    compiled, batches = _compiled(name, stages, options)
    module = compiled.module.train()
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    placement, losses = tuple(range(stages)), []
    for number, batch in enumerate(batches):
        named = [named_batch(compiled, piece) for piece in batch.chunk(micro)]
        ranks = [RankPieces(compiled, placement, rank).train() for rank in placement]
        optimizer.zero_grad()
        engines = run_in_one_process(
            compiled,
            ranks,
            named,
            lambda outputs: _loss(torch.cat(outputs), None),
            seed=SEED + number,
        )
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        losses.append(engines[-1].loss_value.item())
    with torch.no_grad():
        return {
            "losses": losses, "state": module.state_dict(), "outputs": module.eval()(batches[0]),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stages", "micro", "options"),
    [
        pytest.param("decoder", 2, 2, {}, marks=pytest.mark.slow),
        pytest.param("decoder", 3, 1, {}, marks=pytest.mark.slow),
        ("resnet", 2, 1, {}),
        ("decoder", 3, 2, {"sweep": "collapsed"}),
        ("decoder", 2, 2, {"sweep": "collapsed", "coarse": "units", "coarse_width": 0.5}),
        ("resnet", 3, 1, {"sweep": "collapsed", "coarse": "units"}),
        ("decoder", 3, 1, {"iterations": 2}),
    ],
)
def test_training_on_ranks_equals_training_in_one_process(
    name: str, stages: int, micro: int, options: dict[str, Any], tmp_path: Path
) -> None:
    result = start(_train, stages, tmp_path, name, stages, micro, options)
    reference = _train_in_one_process(name, stages, micro, options)
    for rank, each in enumerate(result):
        assert each["losses"] == pytest.approx(reference["losses"], rel=1e-4), rank
        for key, value in each["state"].items():
            expected = reference["state"][key.removeprefix("network.")]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)
    *others, last = result
    assert all(each["outputs"] is None for each in others)
    torch.testing.assert_close(last["outputs"], reference["outputs"], rtol=1e-4, atol=1e-5)


def _several_stages(rank: int) -> Any:
    compiled, batches = _compiled("resnet", 4)
    module = pnn.runtime.distribute(compiled).eval()
    result = module(batches[0])
    with torch.no_grad():
        expected = compiled.module.eval()(batches[0])
    return module.network.stages, result, expected


def test_ranks_may_hold_several_stages(tmp_path: Path) -> None:
    (first, nothing, _), (second, result, expected) = start(_several_stages, 2, tmp_path)
    assert (first, second) == ([0, 1], [2, 3])
    assert nothing is None
    torch.testing.assert_close(result, expected)


def _holders(group: torch.distributed.ProcessGroup) -> list[str]:
    """Return the types of our own objects that refer to a group, in containers too."""
    found = []
    for own in gc.get_objects():
        if str(type(own).__module__).partition(".")[0] in {"pnn_compile", "passes"}:
            seen, held = set(), gc.get_referents(own)
            while held:
                each = held.pop()
                if each is group:
                    found.append(type(own).__name__)
                elif isinstance(each, dict | list | tuple | set) and id(each) not in seen:
                    seen.add(id(each))
                    held += gc.get_referents(each)
    return found


def _destroyed(rank: int, folder: Path, again: bool) -> tuple[list[str], str]:
    compiled, batches = _compiled("resnet", 2)
    module = pnn.runtime.distribute(compiled, inputs="rank 0")
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    checkpoints = pnn.runtime.Checkpoints(folder / "run", module, optimizer)
    module.train_step(batches[0], _loss, optimizer)
    checkpoints.save()
    kept = torch.distributed.group.WORLD
    assert kept is not None
    holders = _holders(kept)
    torch.distributed.destroy_process_group()
    if again:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", store, world_size=2, rank=rank)
    with pytest.raises(pnn.RuntimeFault) as caught:
        module.train_step(batches[0], _loss, optimizer)
    return holders, str(caught.value)


@pytest.mark.parametrize("again", [False, True])
def test_a_network_lets_go_of_a_destroyed_group(tmp_path: Path, again: bool) -> None:
    # Its threads would live on, and abort the process where the interpreter ends.
    for holders, message in start(_destroyed, 2, tmp_path, tmp_path, again):
        assert not holders
        assert "call dist.destroy_process_group() after the last step" in message


def _different(rank: int) -> str:
    torch.manual_seed(0)
    model = resnet110.build_model(units_per_group=3, width=4)
    compiled = pnn.compile(model, torch.randn(2, 3, 16, 16), stages=2, seed=rank)
    with pytest.raises(pnn.RuntimeFault) as caught:
        pnn.runtime.distribute(compiled)
    return str(caught.value)


def test_ranks_with_different_networks_are_refused(tmp_path: Path) -> None:
    for message in start(_different, 2, tmp_path):
        assert "ranks [1] have another plan than rank 0" in message


def _out_of_memory(*_: object) -> None:
    raise MemoryError("no room for 3 GB")


def _failing(rank: int) -> str:
    compiled, _ = _compiled("resnet", 2)
    module = pnn.runtime.distribute(compiled).eval()
    compiled.stages.fine[rank].register_forward_pre_hook(_out_of_memory)
    with pytest.raises(pnn.RuntimeFault) as caught:
        module(torch.randn(2, 3, 16, 16))
    return str(caught.value)


def test_a_failure_names_rank_stage_modules_and_shapes(tmp_path: Path) -> None:
    first, second = start(_failing, 2, tmp_path)
    assert "rank 0 failed at fine (stage 0, micro-batch 0), modules stem" in first
    assert "[2, 3, 16, 16]" in first
    assert "MemoryError: no room for 3 GB; out of memory: distribute() with more" in first
    assert "rank 1 failed at fine (stage 1, micro-batch 0), modules trunk" in second


class _Fields(NamedTuple):
    logits: Tensor
    more: dict[str, Tensor]


class _Outputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 8)

    def forward(self, x: Tensor) -> _Fields:
        y = self.body(x)
        return _Fields(y, OrderedDict(mean=y.mean(1)))


def _step_with_fields(rank: int) -> list[str]:
    torch.manual_seed(0)
    compiled = pnn.compile(_Outputs(), torch.randn(4, 8), stages=2)
    module = pnn.runtime.distribute(compiled, batches=2).train()
    module.train_step(torch.randn(4, 8), lambda out, _: out.more["mean"].sum(), None)
    outputs = module.eval()(torch.randn(4, 8))
    return [type(outputs).__name__, type(getattr(outputs, "more", None)).__name__]


def test_outputs_have_the_types_of_the_models(tmp_path: Path) -> None:
    results = start(_step_with_fields, 2, tmp_path)
    assert results == [["NoneType", "NoneType"], ["_Fields", "OrderedDict"]]
