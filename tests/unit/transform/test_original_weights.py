"""A network takes every checkpoint that its model takes, and returns the model's own keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from tests.distributed.ranks import start
from tests.models.builders import linear_chain, residual_chain

X = torch.linspace(-1, 1, 12).view(3, 4)


class Fused(nn.Module):
    """Loads the two weights of older checkpoints into one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(4, 8)
        self.register_load_state_dict_pre_hook(self.fuse)

    @staticmethod
    def fuse(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for kind in ("weight", "bias"):
            if f"{prefix}gate.{kind}" in state:
                parts = [state.pop(f"{prefix}{name}.{kind}") for name in ("gate", "value")]
                state[f"{prefix}both.{kind}"] = torch.cat(parts)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return x + torch.sigmoid(gate) * value


def old_checkpoint(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.replace("both", name): part
        for key, value in model.state_dict().items()
        for name, part in zip(("gate", "value"), value.chunk(2), strict=True)
    }


class Prefixed(nn.Module):
    """Saves and loads under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_chain(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"net.{k}": v for k, v in self.body.state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
        return self.body.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})


class Scaled(nn.Linear):
    """Saves a number that forward depends on."""

    scale = 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) * self.scale)


def norms() -> nn.Module:
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4))))


def without_counters(model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of a release of torch in which BatchNorm did not count."""
    return {k: v for k, v in model.state_dict().items() if "num_batches" not in k}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "load hook": (lambda: nn.Sequential(*(Fused() for _ in range(4))), old_checkpoint),
    "overridden methods": (Prefixed, lambda model: model.state_dict()),
    "extra state": (
        lambda: nn.Sequential(*(Scaled(4, 4) for _ in range(4))),
        lambda model: model.state_dict(),
    ),
    "old version": (norms, without_counters),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_of_the_model_is_a_checkpoint_of_the_network(kind: str) -> None:
    build, save = KINDS[kind]
    model, trained = build(), build()
    compiled = pnn.compile(model, X, stages=2)
    assert compiled.original_state_dict().keys() == model.state_dict().keys()
    before = copy.deepcopy(dict(model.named_parameters()))

    compiled.load_original_state_dict(save(trained))
    torch.testing.assert_close(compiled.sequential.eval()(X), trained.eval()(X))
    state = compiled.original_state_dict()
    for key, value in trained.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(state[key], value), key
    torch.testing.assert_close(dict(model.named_parameters()), before)
    assert compiled.verify().ok


def _on_a_rank(rank: int, kind: str) -> list[Tensor]:
    build, save = KINDS[kind]
    trained = build()
    network = pnn.compile(build(), X, stages=2).distribute().eval()
    before = network(X)
    network.load_original_state_dict(save(trained))
    state = network.original_state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    return [before, network(X)]


@pytest.mark.parametrize("kind", ["load hook", "overridden methods"])
def test_ranks_load_every_checkpoint_of_the_model(kind: str, tmp_path: Path) -> None:
    ((before, after),) = start(_on_a_rank, 1, tmp_path, kind)
    assert not torch.equal(before, after)


def test_a_checkpoint_that_the_model_refuses_changes_nothing() -> None:
    model = nn.Sequential(*(Fused() for _ in range(4)))
    compiled = pnn.compile(model, X, stages=2)
    state = {**model.state_dict(), "0.both.weight": torch.full((8, 4), 3.0)}
    del state["1.both.weight"]
    with pytest.raises(pnn.PnnError, match=r"refuses the checkpoint: .*1\.both\.weight"):
        compiled.load_original_state_dict(state)
    torch.testing.assert_close(compiled.original_state_dict(), dict(model.state_dict()))
    compiled.load_original_state_dict(state, strict=False)
    assert (compiled.original_state_dict()["0.both.weight"] == 3.0).all()


def test_extra_state_that_differs_is_refused() -> None:
    model: Any = nn.Sequential(*(Scaled(4, 4) for _ in range(4)))
    compiled = pnn.compile(model, X, stages=2)
    model[1].scale = 2.0
    with pytest.raises(pnn.PnnError, match="the extra state of 1 is not a tensor and differs"):
        compiled.load_original_state_dict(model.state_dict())


def test_an_artifact_holds_the_tensors_and_a_note_names_the_code(tmp_path: Path) -> None:
    model = nn.Sequential(*(Scaled(4, 4) for _ in range(4)))
    compiled = pnn.compile(model, X, stages=2)
    (note,) = compiled.program.capture.notes
    assert note.startswith("code of 0, 1, 2 and 1 more takes part in saving")
    loaded = pnn.load(compiled.save(tmp_path / "a"))
    torch.testing.assert_close(loaded.sequential(X), model(X))


def test_a_network_compiled_by_shapes_loads_no_weights() -> None:
    trained = linear_chain(4, 4)
    with torch.device("meta"):
        model = linear_chain(4, 4)
    compiled = pnn.compile(model, X.to("meta"), stages=2)
    assert compiled.verify().ok  # its shapes
    for _ in range(2):  # its operators have no values with memory either
        with pytest.raises(pnn.PnnError, match="was compiled on the meta device, by shapes"):
            compiled.load_original_state_dict(trained.state_dict())
        compiled.module.to_empty(device="cpu")


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t + 1j,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of quantized tensors
@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_of_other_tensors_loads_nothing(kind: str) -> None:
    compiled = pnn.compile(linear_chain(4, 8), torch.randn(3, 8), stages=2)
    before = copy.deepcopy(compiled.original_state_dict())
    state = copy.deepcopy(linear_chain(4, 8).state_dict())
    state["3.weight"] = ODD[kind](state["3.weight"])
    with pytest.raises(pnn.OptionError, match=rf"3\.weight is .*{kind}"):
        compiled.load_original_state_dict(state)
    for other in (None, [state], {3: torch.zeros(1)}):
        with pytest.raises(pnn.OptionError, match="a dict of tensors by name"):
            compiled.load_original_state_dict(other)  # type: ignore[arg-type]
    for name, tensor in compiled.original_state_dict().items():
        assert torch.equal(tensor, before[name])
