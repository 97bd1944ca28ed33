"""Guesses from a copy of all layers before an interface, at few channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pnn_compile as pnn
from examples import decoder, vgg16
from passes.coarse.narrow_guess import NarrowOptions
from passes.errors import SynthesisError
from tests.support.programs import copies


class Dense(nn.Module):
    """Layers that read all before them, so that shares of channels add up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(5 + 7 * i, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
            for i in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x.mean((2, 3))


class Grouped(nn.Module):
    """Depth-wise and grouped convolutions, group normalization and layers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.GroupNorm(4, 16), nn.GELU()
                )
                for groups in (16, 4, 16, 4)
            )
        )
        self.tokens = nn.Sequential(
            *(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.tokens(self.blocks(self.stem(x)).flatten(2).transpose(1, 2))
        return tokens.mean(1)


def _kept(layer: nn.Module) -> nn.Module:
    return layer


class Residual(nn.Module):
    """Residual convolutions with norms."""

    def __init__(
        self, norm: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module] = _kept
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(), wrap(nn.Conv1d(16, 16, 3, padding=1))) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean(2)


def _vgg(**options: Any) -> pnn.Compiled:
    torch.manual_seed(0)
    model = vgg16.build_model(width=8)
    return pnn.compile(model, torch.randn(2, 3, 32, 32), stages=3, preprocess="narrow", **options)


vgg = copies(_vgg)


def test_a_guess_is_as_deep_as_what_it_stands_for_and_takes_the_share_asked_for() -> None:
    for share, network in ((0.1, vgg()), (0.05, vgg(prologue=0.05))):
        whole = sum(stage.flops for stage in network.plan.stages) + network.plan.head.flops
        for number, stage in enumerate(network.plan.stages[1:], 1):
            spec = stage.preprocess
            assert spec is not None
            assert isinstance(spec.options, NarrowOptions)
            assert spec.flops <= 1.2 * share * whole  # and the map after the layers
            layers = network.operators.preprocess[number].prologue
            assert isinstance(layers, nn.Module)
            convolutions = [m for m in layers.modules() if isinstance(m, nn.Conv2d)]
            before = [m for fine in network.stages.fine[:number] for m in fine.modules()]
            originals = [m for m in before if isinstance(m, nn.Conv2d)]
            assert len(convolutions) == len(originals)
            assert convolutions[0].in_channels == 3
            for own, original in zip(convolutions, originals, strict=True):
                expected = round(original.out_channels * spec.options.share)
                assert own.out_channels == max(1, expected)
                assert own.weight.std().item() > 0
            owned = {id(parameter) for parameter in layers.parameters()}
            assert not owned & {id(p) for m in before for p in m.parameters()}
    assert vgg().verify().ok


@pytest.mark.parametrize("model", [Dense(), Grouped()], ids=["dense", "grouped"])
def test_every_layer_reads_as_many_channels_as_reach_it(model: nn.Module) -> None:
    channels = 5 if isinstance(model, Dense) else 3
    x = torch.randn(2, channels, 8, 8)
    network = pnn.compile(model, x, stages=3, preprocess="narrow", coarse="linear", prologue=0.3)
    assert network.verify().ok
    network.module.train()(torch.randn(4, channels, 8, 8)).sum().backward()
    for guess in network.operators.preprocess.values():
        assert all(p.grad is not None for p in guess.parameters())


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(16, affine=False),
        lambda: nn.GroupNorm(4, 16, affine=False),
        lambda: nn.InstanceNorm1d(16),
        lambda: nn.InstanceNorm1d(16, affine=True),
    ],
    ids=["statistics", "groups", "instance", "weights"],
)
def test_norms_are_as_narrow_as_what_reaches_them(norm: Callable[[], nn.Module]) -> None:
    """In the precision of the model, although some have no weights that say it."""
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    network = pnn.compile(Residual(norm).double(), x, stages=2, preprocess="narrow")
    layers = network.operators.preprocess[1].prologue
    assert isinstance(layers, nn.Module)
    tensors = [t for t in layers.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in tensors} == {torch.float64}
    widths = {getattr(m, "num_features", getattr(m, "num_channels", 0)) for m in layers.modules()}
    assert 16 not in widths
    assert widths - {0}


def test_token_norms_without_weights_are_narrow_too() -> None:
    layers = [[nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 16)] for _ in range(4)]
    model = nn.Sequential(nn.Linear(5, 16), *(layer for pair in layers for layer in pair))
    network = pnn.compile(model, torch.randn(2, 7, 5), stages=2, preprocess="narrow")
    norms = [m for m in network.operators.preprocess[1].modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert all(norm.normalized_shape[0] < 16 for norm in norms)


def test_weights_that_are_computed_have_no_narrower_copy() -> None:
    model = Residual(nn.Identity, parametrizations.weight_norm)
    with pytest.raises(SynthesisError, match=r"with parameters .*original0.* no narrower copy"):
        pnn.compile(model, torch.randn(2, 3, 12), stages=2, preprocess="narrow")


def test_look_ups_are_as_large_as_the_original_ones() -> None:
    """Weights of layers grow as their channels shrink; of an embedding nothing is summed."""
    model = decoder.build_model(layers=4, width=32, context=16)
    tokens = torch.randint(256, (2, 16))
    network = pnn.compile(model, tokens, stages=2, preprocess="narrow", prologue=0.2)
    [old] = [m for m in model.modules() if isinstance(m, nn.Embedding)][:1]
    [new] = [m for m in network.operators.preprocess[1].modules() if isinstance(m, nn.Embedding)][
        :1
    ]
    assert new.embedding_dim < old.embedding_dim
    assert new.weight.std().item() == pytest.approx(old.weight.std().item(), rel=1e-3)


def test_what_has_no_narrower_copy_says_why() -> None:
    tokens = decoder.build_model(layers=4, width=16, context=16)
    with pytest.raises(SynthesisError, match="preprocess='narrow'"):
        pnn.compile(
            tokens, torch.randint(256, (2, 16)), stages=2, preprocess="narrow", prologue=0.06
        )


def test_embeddings_and_parameters_are_narrow_too_and_a_decoder_stays_causal() -> None:
    torch.manual_seed(0)
    model = decoder.build_model(layers=4, width=32, context=16)
    tokens = torch.randint(256, (2, 16))
    network = pnn.compile(model, tokens, stages=2, preprocess="narrow", prologue=0.2)
    layers = network.operators.preprocess[1].prologue
    assert isinstance(layers, nn.Module)
    assert {p.shape[-1] for p in layers.parameters() if p.dim() > 1} <= {8, 12, 16, 32, 48, 64}
    assert network.verify().ok
    with torch.no_grad():
        network.module.eval()
        changed = torch.cat([tokens[:, :9], (tokens[:, 9:] + 1) % 256], 1)
        before, after = network.module(tokens), network.module(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_it_is_loaded_as_it_was_saved_and_learns_by_itself(tmp_path: Path) -> None:
    network = vgg()
    images = [torch.randn(8, 3, 32, 32) for _ in range(4)]
    fit = pnn.fit(network, images, interface_epochs=4, epochs=0.01)
    assert all(one.guess_last < 0.9 * one.guess_first for one in fit.interfaces)
    loaded = pnn.load(network.save(tmp_path / "out"))
    with torch.no_grad():
        expected = network.module.eval()(images[0])
        assert torch.equal(loaded.module.eval()(images[0]), expected)
