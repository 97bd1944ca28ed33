"""What guesses read: integers through their first values, and nothing later in a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from tests.models.builders import block_chain, linear_chain
from tests.support.parameters import grid


class OneHot(nn.Module):
    """Takes integers that no table is looked up by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linear_chain(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(nn.functional.one_hot(ids, 4).float())


class LargeVocabulary(nn.Module):
    """Looks up more than the trunk computes."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 32)
        self.narrow = nn.Linear(32, 4)
        self.layers = block_chain(9, 4)
        self.pooled = pooled

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(self.embedding(ids))
        return self.layers(x.mean(1) if self.pooled else x)


class IntegerImage(nn.Module):
    """Takes the bytes of an image."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.float() / 255)


INTEGERS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (OneHot, torch.tensor([0, 1, 2])),
    (LargeVocabulary, torch.randint(0, 5000, (2, 6))),
    (lambda: LargeVocabulary(pooled=True), torch.randint(0, 5000, (2, 6))),
    (IntegerImage, torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)),
]


@pytest.mark.parametrize(("build", "example", "stages"), grid(INTEGERS, (2, 3, 8)))
def test_integers_alone_can_be_guessed_from(
    build: Callable[[], nn.Module], example: Tensor, stages: int
) -> None:
    model = build().eval()
    compiled = pnn.compile(model, example, stages=stages)

    compiled.verify(strict=True)
    torch.testing.assert_close(compiled.sequential(example), model(example))
    compiled.module(example).sum().backward()


# --- sequences ------------------------------------------------------------------------------------

LENGTH, VOCABULARY = 7, 11


class CausalConvolution(nn.Module):
    """Convolves over earlier positions alone (van den Oord et al., 2016), in `[B, C, T]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.convolution(F.pad(x, (2, 0))))


class CausalAttention(nn.Module):
    """Attends to earlier positions alone, in `[B, T, C]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inlet(x)[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.outlet(mixed[:, 0])


class LongConvolution(nn.Module):
    """A causal convolution as long as the sequence, by Fourier transforms, in `[B, C, T]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, LENGTH))
        self.convolution = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel, sequence = (torch.fft.rfft(y, 2 * LENGTH) for y in (self.kernel, x))
        return x + self.convolution(torch.fft.irfft(kernel * sequence, 2 * LENGTH)[..., :LENGTH])


class Decoder(nn.Module):
    """A causal language model over tokens, or a causal filter over a signal `[B, C, T]`."""

    def __init__(self, block: Callable[[int], nn.Module], *, tokens: bool) -> None:
        super().__init__()
        self.inlet = nn.Embedding(VOCABULARY, 16) if tokens else nn.Conv1d(3, 16, 1)
        self.blocks = nn.Sequential(*(block(16) for _ in range(6)))
        self.turn = tokens and block is not CausalAttention

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        return self.blocks(x.mT).mT if self.turn else self.blocks(x)


class HalfRate(nn.Module):
    """A causal filter of a signal whose blocks run at half its length (Clockwork RNN, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.down = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 2, stride=2)
        self.slow = nn.Sequential(*(CausalConvolution(16) for _ in range(6)))
        self.fast = nn.Sequential(*(CausalConvolution(16) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        slow = self.slow(self.down(F.pad(x, (1, -1))))
        return self.fast(x + slow.repeat_interleave(2, -1))


def _leak(network: nn.Module, x: Tensor, axis: int) -> float:
    """Return by how much an output moves with the inputs after it."""
    moved = 0.0
    with torch.no_grad():
        expected = network(x)
        for position in range(1, x.shape[-1]):
            other = x.clone()
            later = other.narrow(-1, position, x.shape[-1] - position)
            later.copy_(later + 1 if x.is_floating_point() else (later + 3) % VOCABULARY)
            change = (network(other) - expected).narrow(axis, 0, position)
            moved = max(moved, change.abs().max().item())
    return moved


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"coarse": "units"}, {"coarse": "lowrank"}, {"coarse": "convolution"},
    {"preprocess": "lowrank"}, {"preprocess": "thinned"}, {"sweep": "collapsed"},
    {"correction": "difference", "iterations": 2}, {"prologue": 0.3},
)  # fmt: skip
BLOCKS = (
    (CausalConvolution, False), (CausalConvolution, True), (CausalAttention, True),
    (LongConvolution, False), (LongConvolution, True),
)  # fmt: skip


@pytest.mark.parametrize(("block", "tokens", "options"), grid(BLOCKS, OPTIONS))
def test_nothing_reads_what_is_later_in_a_sequence(
    block: Callable[[int], nn.Module], tokens: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = Decoder(block, tokens=tokens).eval()
    x = torch.randint(0, VOCABULARY, (2, LENGTH)) if tokens else torch.randn(2, 3, LENGTH)
    axis, rounding = 1 if tokens else 2, 1e-4 if block is LongConvolution else 1e-5
    assert _leak(model, x, axis) < rounding
    try:
        network = pnn.compile(model, x, stages=3, **options).module.eval()
    except pnn.PnnError:  # a family that does not fit
        return
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert _leak(network, x, axis) < rounding


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long),
        torch.tensor([[3, 1, 2]]), torch.zeros(2, 3, 8), torch.full((2, 3, 8), 0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("coarse", ["auto", "lowrank"])
def test_an_example_without_content_tells_a_sequence(example: Tensor, coarse: str) -> None:
    torch.manual_seed(0)
    tokens = not example.is_floating_point()
    model = Decoder(CausalConvolution, tokens=tokens).eval()
    network = pnn.compile(model, example, stages=3, coarse=coarse, preprocess="lowrank").module
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    x = torch.randint(0, VOCABULARY, example.shape) if tokens else torch.randn(example.shape)
    assert _leak(network.eval(), x, 1 if tokens else 2) < 1e-5


def test_calibration_chooses_among_what_reads_nothing_later() -> None:
    torch.manual_seed(0)
    model, batches = Decoder(CausalConvolution, tokens=False).eval(), torch.randn(20, 2, 3, LENGTH)
    compiled = pnn.compile(model, batches[0], stages=3, calibration=list(batches))
    assert _leak(compiled.module.eval(), batches[0], 2) < 1e-5


@pytest.mark.parametrize("build", [HalfRate, lambda: Decoder(CausalConvolution, tokens=False)])
@pytest.mark.parametrize("coarse", ["units", "linear", "layers"])
def test_no_cut_rearranges_a_sequence(build: Callable[[], nn.Module], coarse: str) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 8)
    assert _leak(model, x, 2) == 0
    legal = 0
    for name in [name for name, _ in model.named_modules() if name]:
        try:
            network = pnn.compile(model, x, stages=2, cuts=[name], coarse=coarse).module.eval()
        except pnn.PnnError:  # not a legal cut, or a family that does not fit
            continue
        legal += 1
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        assert _leak(network, x, 2) < 1e-5, name
    assert legal >= 4


def test_a_cut_that_would_rearrange_a_sequence_says_why() -> None:
    with pytest.raises(pnn.PnnError, match="a causal sequence crosses with its positions padded"):
        pnn.compile(HalfRate(), torch.randn(2, 3, 8), stages=40)


class Chomp(nn.Module):
    """A causal convolution that pads both sides and drops what is too much (Bai et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(16, 16, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolution(x)[..., :-2])


class Prefix(nn.Module):
    """A language model whose sequence begins with a learned position that is dropped at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(*(CausalAttention(16) for _ in range(8)))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(ids.shape[0], -1, -1), self.embedding(ids)], 1)
        return self.blocks(x)[:, 1:]


@pytest.mark.parametrize("coarse", ["auto", "linear", "layers"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_longer_sequence_stays_causal(tokens: bool, coarse: str) -> None:
    torch.manual_seed(0)
    stem = nn.Conv1d(3, 16, 1)
    model = Prefix() if tokens else nn.Sequential(stem, *(Chomp() for _ in range(8)))
    x = torch.randint(0, VOCABULARY, (2, 7)) if tokens else torch.randn(2, 3, 9)
    axis = 1 if tokens else 2
    model.eval()
    assert _leak(model, x, axis) == 0
    compiled = pnn.compile(model, x, stages=3, coarse=coarse)
    assert compiled.plan.forecast.speedup > 1.3
    network = compiled.module.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert _leak(network, x, axis) < 1e-5


class Heads(nn.Module):
    """A block of a language model, whose heads of attention lie in front of the positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wider, self.narrower = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inlet(x).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outlet(mixed.transpose(1, 2).flatten(2))
        return x + self.narrower(F.gelu(self.wider(x)))


class Language(nn.Module):
    """A language model of six blocks of two heads; outputs `[B, T, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.Sequential(*(Heads(16) for _ in range(6)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.embedding(ids))


@pytest.mark.parametrize(
    "options",
    [
        {"preprocess": "thinned"},
        {"cut_inside_blocks": True},
        {"preprocess": "lowrank", "coarse": "lowrank", "cut_inside_blocks": True},
    ],
)
@pytest.mark.parametrize("stages", [4, 5])
def test_heads_of_attention_do_not_mix_positions(options: dict[str, Any], stages: int) -> None:
    torch.manual_seed(0)
    model, x = Language().eval(), torch.randint(0, VOCABULARY, (2, 8))
    assert _leak(model, x, 1) == 0
    network = pnn.compile(model, x, stages=stages, **options).module.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert _leak(network, x, 1) < 1e-5
