"""A rank that reads an artifact stores the weights of its stages, and no others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from examples import decoder, resnet110
from tests.distributed.ranks import start
from tests.models.distributed_models import Blocks, batches, loss, network


def _held(module: nn.Module) -> set[Tensor]:
    """The tensors that have data."""
    return {t for t in itertools.chain(module.parameters(), module.buffers()) if not t.is_meta}


def _train(rank: int, path: str, whole: bool) -> dict[str, Any]:
    torch.manual_seed(4)
    module = pnn.runtime.distribute(pnn.load(path) if whole else path).train()
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    losses = [module.train_step(batch, loss, optimizer).item() for batch in batches(2)]
    return {
        "losses": losses,
        "state": module.network.state_dict(),
        "outputs": module.eval()(batches(1)[0]),
        "original": module.original_state_dict(),
        "alone": _held(module.whole.module) == _held(module.network),
    }


@pytest.mark.parametrize("kind", ["blocks", "tied"])
def test_ranks_that_hold_their_own_stages_train_alike(kind: str, tmp_path: Path) -> None:
    compiled = network(3, kind)
    path = str(compiled.save(tmp_path / "artifact"))
    reference = start(_train, 3, tmp_path, path, True)
    result = start(_train, 3, tmp_path, path, False)
    for rank, (actual, expected) in enumerate(zip(result, reference, strict=True)):
        assert actual["losses"] == expected["losses"]
        assert actual["state"].keys() == expected["state"].keys()
        for key, value in actual["state"].items():
            assert torch.equal(value, expected["state"][key]), key
        assert (actual["alone"], expected["alone"]) == (True, False), rank
    assert torch.equal(result[2]["outputs"], reference[2]["outputs"])
    assert result[0]["original"].keys() == compiled.original_state_dict().keys()


def _load_weights(rank: int, path: str) -> tuple[bool, str]:
    module = pnn.runtime.distribute(path)
    weights = {key: tensor + 1 for key, tensor in pnn.load(path).original_state_dict().items()}
    module.load_original_state_dict(weights)
    loaded = module.original_state_dict()
    with pytest.raises(pnn.OptionError) as caught:
        module.load_original_state_dict({key: tensor.to("meta") for key, tensor in weights.items()})
    return all(torch.equal(loaded[key], weights[key]) for key in loaded), str(caught.value)


def test_a_rank_loads_the_weights_that_it_has(tmp_path: Path) -> None:
    path = str(network(3).save(tmp_path / "artifact"))
    for equal, message in start(_load_weights, 3, tmp_path, path):
        assert equal
        assert "has no data in the checkpoint" in message


def _on_meta(rank: int) -> list[str]:
    model = Blocks()
    compiled = pnn.compile(model.to("meta"), torch.randn(4, 8, device="meta"), stages=2)
    with pytest.raises(pnn.RuntimeFault) as caught:
        pnn.runtime.distribute(compiled, device="cpu")
    messages = [str(caught.value)]
    for _ in range(2):
        with pytest.raises(pnn.OptionError) as refused:
            compiled.load_original_state_dict(Blocks().state_dict())
        messages.append(str(refused.value))
        compiled.module.to_empty(device="cpu")
    return messages


def test_a_network_without_data_is_refused(tmp_path: Path) -> None:
    distributing, *loading = start(_on_meta, 1, tmp_path)[0]
    assert "has weights on the meta device" in distributing
    for message in loading:
        assert "was compiled on the meta device, by shapes" in message
        assert "compile it again" in message


@pytest.mark.parametrize(
    ("build", "inputs", "options"),
    [
        (lambda: decoder.build_model(layers=6, width=16, context=16), "tokens", {}),
        (lambda: decoder.build_model(layers=6, width=16, context=16), "tokens",
         {"coarse": "thinned", "correction": "difference"}),
        (lambda: resnet110.build_model(units_per_group=3, width=4), "images", {"coarse": "conv"}),
        (lambda: nn.Sequential(*[nn.LSTM(8, 8), _First(), nn.LSTM(8, 8), _First()]), "series", {}),
    ],
)  # fmt: skip
def test_every_piece_runs_on_what_its_rank_holds(
    build: Any, inputs: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from pnn_compile.artifact.directory import load
    from pnn_compile.runtime.distribute import load_part
    from pnn_compile.runtime.rank_pieces import RankPieces

    torch.manual_seed(0)
    example = {
        "tokens": torch.randint(256, (2, 16)), "images": torch.randn(2, 3, 16, 16),
        "series": torch.randn(3, 2, 8),
    }[inputs]  # fmt: skip
    compiled = pnn.compile(build(), example, stages=2, coarse_budget=1.0, **options)
    path = compiled.save(tmp_path / "artifact")
    reference = pnn.load(path)
    for rank in range(2):
        stored = load_part(load(path, without_data=True), (0, 1), rank, path)
        actual, expected = (RankPieces(each, (0, 1), rank).eval() for each in (stored, reference))
        assert actual.state_dict().keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[key], value), key
        passed = stored.program.args
        fine = actual.executor.fine(rank, _ones(stored, rank), passed)
        for key, value in expected.executor.fine(rank, _ones(stored, rank), passed).items():
            torch.testing.assert_close(fine[key], value)
    with pytest.raises(pnn.ArtifactError, match="does not exist"):
        load(tmp_path / "nothing", without_data=True)


def _ones(compiled: Any, stage: int) -> dict[str, Tensor]:
    if not stage:
        return {}
    state = compiled.plan.interfaces[stage - 1].state
    return {value.name: torch.ones(value.spec.shape) for value in state}


class _First(nn.Module):
    def forward(self, both: tuple[Tensor, Any]) -> Tensor:
        return both[0]
