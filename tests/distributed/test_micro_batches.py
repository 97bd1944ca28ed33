"""Micro-batches: a step over several of them is the step over the whole batch, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import pnn_compile as pnn
from pnn_compile.inputs import by_argument, call_arguments
from tests.distributed.ranks import start

TOKENS = 11


class _Tagger(nn.Module):
    """Classifies every token by itself, or after what `mix` makes of all samples."""

    def __init__(self, mix: str = "") -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.top = nn.Linear(8, TOKENS)
        self.mix = mix
        self.drop = nn.Dropout(0.5 if mix == "statistics by hand" else 0.0)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4, 8))

    def forward(self, tokens: Tensor) -> Any:
        x = self.table(tokens)
        for block in self.blocks:
            x = self.drop(x + torch.tanh(block(x)))
        if self.mix == "normalized":
            x = self.norm(x)
        elif self.mix == "statistics by hand" and self.training:
            x = x - x.mean(0)
        elif self.mix == "statistics by hand":
            x = x - self.mean
        elif self.mix == "mean":
            x = x - x.mean(0)
        elif self.mix == "softmax":
            x = x.softmax(0)
        elif self.mix == "pairs":
            vectors = x.mean(1)
            labels = torch.arange(vectors.shape[0])
            return self.top(x), F.cross_entropy(vectors @ vectors.T, labels)
        elif self.mix == "average":
            return self.top(x), x.square().mean()
        elif self.mix == "noise":
            x = x + torch.randn_like(x)
        elif self.mix == "sequence first":
            return self.top(x.cumsum(0))
        return self.top(x)


def _network(mix: str = "") -> pnn.Compiled:
    torch.manual_seed(0)
    return pnn.compile(_Tagger(mix), torch.randint(TOKENS, (3, 4)), stages=2, coarse_budget=1.0)


def _batch() -> tuple[Tensor, Tensor]:
    """Sentences and labels, most of which count nothing; the first two have none that does."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(TOKENS, (5, 4), generator=generator) for _ in range(2))
    labels[:2], labels[2, 1:] = -100, -100
    return tokens, labels


def _token_mean(outputs: Any, batch: Any) -> Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def _contrast(outputs: Any, batch: Any) -> Tensor:
    vectors = outputs.mean(1)
    return F.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors)))


def _token_sum(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    labels = batch[1].flatten()
    total = F.cross_entropy(outputs.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def _steps(
    rank: int, loss: Callable[[Any, Any], Any], mix: str, counts: tuple[int, ...] = (1, 2, 3, 5)
) -> list[Any]:
    compiled, results = _network(mix), []
    for count in counts:
        module = pnn.runtime.distribute(compiled, batches=count).train()
        module.zero_grad()
        value = module.forward_backward(_batch(), loss)
        results.append((value, _gradients(module)))
    return results


@pytest.mark.parametrize(
    ("loss", "mix"),
    [(_token_mean, ""), (_contrast, ""), (_token_sum, ""), (_token_mean, "average")],
)
def test_micro_batches_take_the_step_of_one_batch(
    loss: Callable[[Any, Any], Any], mix: str, tmp_path: Path
) -> None:
    for (value, gradients), *others in start(_steps, 2, tmp_path, loss, mix):
        assert value > 0
        for other, other_gradients in others:
            torch.testing.assert_close(other, value)
            assert other_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(other_gradients[name], gradient, msg=name)


def _replicas(rank: int) -> tuple[Any, Any]:
    tokens, labels = _batch()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    module = pnn.runtime.distribute(_network(), mesh=mesh).train()
    share = slice(0, 3) if module.groups.replica == 0 else slice(3, 5)
    value = module.forward_backward((tokens[share], labels[share]), _token_sum)
    return value, _gradients(module)


def test_replicas_weigh_their_tokens(tmp_path: Path) -> None:
    alone = [steps[0] for steps in start(_steps, 2, tmp_path, _token_mean, "", (1,))]
    for rank, (value, gradients) in enumerate(start(_replicas, 4, tmp_path)):
        expected, expected_gradients = alone[rank % 2]
        torch.testing.assert_close(value, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


MIXES = ("mean", "softmax", "pairs", "sequence first", "statistics by hand")


def _mixed(rank: int, mix: str) -> tuple[str, bool]:
    module = pnn.runtime.distribute(_network(mix), batches=2).train()
    try:
        module.forward_backward(_batch(), _token_mean)
    except pnn.RuntimeFault as error:
        return str(error), bool(_gradients(module))
    return "", all(child.training for child in module.modules())


def _all_mixed(rank: int) -> list[tuple[str, bool]]:
    return [_mixed(rank, mix) for mix in (*MIXES, "noise", "normalized")]


def test_a_model_that_mixes_samples_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for *refused, random, normalized in start(_all_mixed, 2, tmp_path):
        for mix, (message, has_gradients) in zip(MIXES, refused, strict=True):
            mode = "training" if mix == "statistics by hand" else "evaluation"
            assert message.startswith(f"in {mode} mode, output"), mix
            assert "of two micro-batches is not that of both in one batch" in message, mix
            assert "pass distribute(batches=1)" in message, mix
            assert not has_gradients, mix
        assert random == ("", True)  # compared by shapes
        assert normalized == ("", True)  # BatchNorm mixes samples of a micro-batch by design


class _Switches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(
        self, x: Tensor, skip: bool = False, more: Any = None, scale: float = 1.0, loud: bool = True
    ) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * scale
        return x if skip else x + more["bias"] * more["times"]


def test_constants_are_those_of_the_example() -> None:
    x, bias, labels = torch.randn(4, 8), torch.randn(4, 8), torch.arange(4)
    more = {"bias": bias, "times": 2}
    program = pnn.compile(_Switches(), (x, False, more, 0.5), stages=2).program
    assert program.fixed == {"skip": False, "scale": 0.5, "loud": True}
    expected = {"x": x, "more": more}
    for batch in (
        (x, more),
        (x, more, labels),
        (x, more, labels, 3.0, "weights"),
        (x, False, more, 0.5, labels),
        (x, False, more, 0.5, True, labels),
        {"x": x, "more": more, "labels": labels, "skip": False},
    ):
        named = by_argument(program, batch)
        assert named.keys() == expected.keys()
        assert all(named[name] is value for name, value in expected.items())
    for wrong, message in (
        ((x, True, more), "skip is True, but _Switches was compiled with False"),
        ((x, 0, more), "skip is 0, but"),
        ((x, False, more, 2.0, labels), r"scale is 2\.0, but _Switches was compiled with 0\.5"),
        ({"x": x, "more": more, "loud": False}, "loud is False"),
        ({"x": x, "more": more, "scale": labels}, "scale is a tensor"),
        ((x, {"bias": bias, "times": 3}), r"more\['times'\] is 3"),
        ((x, {"bias": bias}), r"more\['times'\] is not in the batch"),
        (
            {"x": x, "more": {"bias": 1.0, "times": 2}},
            r"more\['bias'\] is 1\.0, but .* takes a tensor there",
        ),
    ):
        with pytest.raises(pnn.OptionError, match=message):
            by_argument(program, wrong)
    assert call_arguments(program, (x, False), {"more": more}).keys() == {"x", "skip", "more"}
    with pytest.raises(pnn.OptionError, match="compiled without argument 2"):
        call_arguments(program, (x, more, labels), {})
    with pytest.raises(pnn.OptionError, match="compiled without argument label"):
        call_arguments(program, (x, more), {"label": labels})


class _FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x.view(4, 8)


def _fixed(rank: int) -> str:
    compiled = pnn.compile(_FixedBatch(), torch.randn(4, 8), stages=2)
    module = pnn.runtime.distribute(compiled, batches=2).train()
    with pytest.raises(pnn.RuntimeFault) as caught:
        module.forward_backward(torch.randn(8, 8), lambda outputs, _: outputs.mean())
    return str(caught.value)


def test_a_fixed_batch_size_has_no_micro_batches(tmp_path: Path) -> None:
    for message in start(_fixed, 2, tmp_path):
        assert "compiled for batches of 4 only" in message
