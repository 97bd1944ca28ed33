"""The topology zoo: small models, each with one shape of graph that a compiler can get wrong.

`CASES` holds them all; `by_name` and `with_tag` select. Every case builds the same weights and the
same inputs each time and leaves the global random state alone. Tags say what a case is good for:

front end, exactly one of
    fx              `torch.fx.symbolic_trace` gives a faithful graph with positions to cut
    export          only `torch.export.export` (non-strict) does
    uncapturable    neither does
traps
    fx-wrong        plain tracing succeeds, and its outputs or gradients are wrong
    export-wrong    torch.export succeeds, and its outputs or gradients are wrong
    fx-opaque       plain tracing is faithful, but hides nearly all layers in one node
    unused          some parameters are never used, and have no gradient
topology
    linear          the whole model is a linear map (no bias, no activation)
    skips           tensors live across several layers beside the main path
    side-value      layers all along the depth need a cheap function of the inputs
    integer-state   an integer tensor computed from activations lives across some positions
    tied            two layers share one parameter
    reused          one submodule with parameters is called at two distant places
    recurrent       the same layers are applied step after step in time
    tuple-leaf      a leaf module returns a nested tuple
inputs and outputs
    integer-input, several-inputs, keyword-input, tuple-output, dict-output
state and randomness
    batchnorm       running statistics change in training mode
    dropout         training mode draws random numbers
    mutation        a tensor or a buffer is written in place, beside in-place activations
    view-write      a tensor is changed by writing to a view of it; the write has no users
    buffer-write    a buffer changes at every call, in both modes
    custom-gradient the gradient is not the derivative of the operators
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16
VOCABULARY = 32
PADDING = 0
GAIN = 2**0.5  # of the weights: a ReLU passes half of the variance


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        name: Unique name, also the test id.
        build: Makes the model in training mode, with the same weights each time.
        args: Gives positional example inputs for a batch size, the same each time.
        kwargs: Gives keyword example inputs for a batch size, the same each time.
        tags: What the case is good for; see the module.
    """

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[int], tuple[Any, ...]]
    kwargs: Callable[[int], dict[str, Any]]
    tags: frozenset[str]


# --- chains ---------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """Chain eight linear layers."""
    hidden = [layer for _ in range(7) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 4))


def deep_linear() -> nn.Module:
    """Chain eight linear layers without bias or activation."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))


def conv_inplace() -> nn.Module:
    """Chain convolutions with in-place activations, as VGG does."""
    return nn.Sequential(
        *conv_relu(3, 8),
        *conv_relu(8, 8),
        nn.MaxPool2d(2),
        *conv_relu(8, 16),
        *conv_relu(16, 16),
        nn.MaxPool2d(2),
        *conv_relu(16, 16),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 4),
    )


def conv_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """Return a 3x3 convolution and its in-place activation."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True)


def conv1d() -> nn.Module:
    """Chain dilated convolutions over sequences `[B, C, L]`."""
    layers: list[nn.Module] = [nn.Conv1d(2, 8, 3, padding=1), nn.ReLU()]
    for dilation in (1, 2, 4, 1, 2):
        layers += [nn.Conv1d(8, 8, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))


def deep_batchnorm() -> nn.Module:
    """Chain eight convolutions, each with BatchNorm."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        channels = 8
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def dropout() -> nn.Module:
    """Chain linear layers with strong dropout between them."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


# --- residual, skip and branch topologies ---------------------------------------------------------


class BasicBlock(nn.Module):
    """The post-activation residual block of He et al. (CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


def resnet() -> nn.Module:
    """Chain six residual blocks of two resolutions."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    shapes = ((8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1), (16, 16, 1))
    blocks = [BasicBlock(*shape) for shape in shapes]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


class UNet(nn.Module):
    """A U-Net of three levels: three skips live across the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(conv_norm(*widths) for widths in ((1, 8), (8, 8), (8, 16)))
        self.middle = conv_norm(16, 16)
        self.up = nn.ModuleList(conv_norm(*widths) for widths in ((32, 8), (16, 8), (16, 8)))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = up(torch.cat((skips.pop(), x), dim=1))
        return self.head(x)


def conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseBlock(nn.Module):
    """Layers that each read all earlier outputs (Huang et al., CVPR 2017): the frontier grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + 4 * i, 4) for i in range(8))
        self.head = nn.Linear(WIDTH + 4 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.gelu(layer(torch.cat(features, dim=1))))
        return self.head(torch.cat(features, dim=1))


class InceptionBlock(nn.Module):
    """Four parallel branches that are concatenated (Szegedy et al., CVPR 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU())
        self.small = nn.Sequential(nn.Conv2d(16, 4, 1), *conv_relu(4, 4))
        self.large = nn.Sequential(nn.Conv2d(16, 4, 1), *conv_relu(4, 4), *conv_relu(4, 4))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.small(x), self.large(x), self.pooled(x)], dim=1)


def inception() -> nn.Module:
    """Chain four multi-branch blocks."""
    blocks = [InceptionBlock() for _ in range(4)]
    return nn.Sequential(
        *conv_relu(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


class SegNet(nn.Module):
    """An encoder and decoder that share the indices of a max pooling (int64), not activations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*conv_relu(1, 8), *conv_relu(8, 8), *conv_relu(8, 8))
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.middle = nn.Sequential(*conv_relu(8, 8), *conv_relu(8, 8))
        self.unpool = nn.MaxUnpool2d(2)
        self.decoder = nn.Sequential(*conv_relu(8, 8), *conv_relu(8, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.encoder(x))
        return self.decoder(self.unpool(self.middle(x), indices))


# --- shared weights -------------------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    """A language model whose first and last layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(64, WIDTH))
        self.blocks = nn.ModuleList(MixerMLP(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.size(1)]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def tied_linear() -> nn.Module:
    """Chain linear layers; the second and the sixth are two modules with one weight."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(7)]
    layers[5].weight = layers[1].weight
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


class ReusedModule(nn.Module):
    """A network that calls one layer near its beginning and again near its end."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = mlp_block(4)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = self.shared(self.middle(x))
        return self.last(x)


def mlp_block(layers: int) -> nn.Sequential:
    """Chain linear layers of equal width, each with an activation."""
    return nn.Sequential(
        *(module for _ in range(layers) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    )


# --- inputs and outputs ---------------------------------------------------------------------------


class ManyInputsOutputs(nn.Module):
    """Three inputs, one of them needed late; three outputs, one of them computed early."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(8, WIDTH)
        self.trunk1 = mlp_block(3)
        self.trunk2 = mlp_block(3)
        self.auxiliary = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH + 3, 4)

    def forward(self, x: Tensor, y: Tensor, late: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.trunk1(self.left(x) * torch.sigmoid(self.right(y)))
        features = self.trunk2(hidden)
        logits = self.head(torch.cat((features, late), dim=1))
        return logits, self.auxiliary(hidden), features.square().mean(dim=1)


class DictOutput(nn.Module):
    """A network that returns nested dicts and lists, with values of many depths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp_block(2) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        norms = {"first": hidden[0].norm(dim=1), "last": hidden[-1].norm(dim=1)}
        return {"logits": self.head(x), "hidden": hidden[1:3], "statistics": {"norms": norms}}


class KeywordArguments(nn.Module):
    """A network whose second and third input are given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = mlp_block(3)
        self.decode = mlp_block(3)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, context: Tensor, *, gain: Tensor) -> Tensor:
        x = self.encode(x) + context
        return self.head(gain * self.decode(x))


# --- sequences and attention ----------------------------------------------------------------------


class LSTM(nn.Module):
    """Three recurrent layers with linear layers between; each starts from the last one's state."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 8)
        self.lstm1 = nn.LSTM(8, 8, batch_first=True)
        self.linear1 = nn.Linear(8, 8)
        self.lstm2 = nn.LSTM(8, 8, batch_first=True)
        self.linear2 = nn.Linear(8, 8)
        self.lstm3 = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.lstm1(self.inlet(x))
        x, state = self.lstm2(torch.tanh(self.linear1(x)), state)
        x, (_, cell) = self.lstm3(torch.tanh(self.linear2(x)), state)
        summary = cell[-1].unsqueeze(1).expand_as(x)
        return self.head(torch.cat((x, summary), dim=-1))


class MixerMLP(nn.Sequential):
    """LayerNorm and a two-layer perceptron over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )


class MixerBlock(nn.Module):
    """Mix tokens, then channels (Tolstikhin et al., NeurIPS 2021)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = MixerMLP(tokens)
        self.channels = MixerMLP(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


def mixer() -> nn.Module:
    """Chain four mixer blocks over tokens `[B, 6, WIDTH]`."""
    blocks = [MixerBlock(tokens=6) for _ in range(4)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.LayerNorm(WIDTH))


class Attention(nn.Module):
    """Multi-head attention of a sequence to a memory, with an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (2, -1)).transpose(1, 2)
            for projected in (self.query(x), self.key(memory), self.value(memory))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """A pre-norm transformer layer; with a memory it also attends to that."""

    def __init__(self, *, cross: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.cross = Attention() if cross else None
        self.mlp = MixerMLP(WIDTH)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, mask)
        if self.cross is not None and memory is not None:
            x = x + self.cross(x, memory)
        return x + self.mlp(x)


class MaskedEncoder(nn.Module):
    """A transformer encoder whose layers all need the padding mask of its token ids."""

    def __init__(self, mask_dtype: torch.dtype) -> None:
        super().__init__()
        self.mask_dtype = mask_dtype
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != PADDING)[:, None, None, :]
        if self.mask_dtype.is_floating_point:
            mask = (1.0 - mask.to(self.mask_dtype)) * -1e4
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(dim=1))


class EncoderDecoder(nn.Module):
    """A translation model: every decoder layer reads the memory that the encoder left."""

    def __init__(self) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.target_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(AttentionBlock() for _ in range(3))
        self.decoder = nn.ModuleList(AttentionBlock(cross=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source_embedding(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.target_embedding(target)
        for block in self.decoder:
            x = block(x, memory=memory)
        return self.head(x)


class VisionTransformer(nn.Module):
    """Image patches with a class token; the batch size, an int, is read early and used late."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(4))
        self.head = nn.Linear(5 * WIDTH, 4)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(batch, -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.reshape(batch, -1))


def container_transformer() -> nn.Module:
    """Stack six layers in a torch container, one leaf to plain tracing."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, num_layers=6, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), encoder, nn.Linear(WIDTH, 4))


# --- writes ---------------------------------------------------------------------------------------


class ViewWrite(nn.Module):
    """A network that changes a hidden state through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.tanh(x))
            x[:, 0].add_(1.0)
        return x


class SliceAssignment(nn.Module):
    """The same with an assignment to a slice, which a tracing proxy does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.tanh(x))
            x[:, :2] = 1.0
        return x


class RunningMean(nn.Module):
    """A layer that subtracts a mean which it updates by hand at every call."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.lerp_(y.detach().mean(dim=0), 0.1)
        return torch.tanh(y - self.mean)


class StepCounter(nn.Module):
    """A layer that counts its calls and uses the count; plain tracing freezes the number."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return torch.tanh(self.linear(x) + 0.1 * self.steps)


def repeat(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder of a chain of seven such layers."""
    return lambda: nn.Sequential(*(layer() for _ in range(7)))


# --- control flow and gradients of one's own ------------------------------------------------------


class ShapeBranch(nn.Module):
    """A network whose Python code asks for a shape, which a tracing proxy does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = mlp_block(6)
        self.narrow = mlp_block(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) if x.shape[-1] > 8 else self.narrow(x)


class UnrolledLSTM(nn.Module):
    """A recurrent cell in a Python loop over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            hidden, cell = self.cell(x[:, step], (hidden, cell))
        return self.head(hidden)


class DataBranch(nn.Module):
    """A network that takes another way for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = mlp_block(6)
        self.negative = mlp_block(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.sum() > 0 else self.negative(x)


class StraightThrough(torch.autograd.Function):
    """Round to halves, and pass a clipped gradient as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.round(2.0 * x) / 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1.0)


class CustomGradient(nn.Module):
    """A quantised layer (Bengio et al., 2013): its operators alone have a zero gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.linear(x))


# --- the table ------------------------------------------------------------------------------------


def enliven(model: nn.Module, gain: float) -> None:
    """Draw weights and statistics so that an error in any layer shows in the output.

    The default initialisation shrinks what passes through a chain, and leaves every norm with the
    same weights and statistics.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.orthogonal_(module.weight, gain)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.8, 1.2)


def floats(*shape: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Return a function from a batch size to normal floats `[batch, *shape]`."""

    def make(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + batch)
        return torch.randn(batch, *shape, generator=generator)

    return make


def tokens(length: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Return a function from a batch size to token ids `[batch, length]`, padded at the end."""

    def make(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + batch)
        ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
        return ids.where(torch.arange(length) < lengths, PADDING)

    return make


def case(
    tags: str,
    name: str,
    build: Callable[[], nn.Module],
    *inputs: Callable[[int], Tensor],
    **keywords: Callable[[int], Tensor],
) -> Case:
    """Make a case from tags in one string and a function from batch size to tensor per input."""

    def seeded_build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
            enliven(model, gain=1.0 if "linear" in tags.split() else GAIN)
            return model

    def args(batch: int) -> tuple[Any, ...]:
        return tuple(make(batch) for make in inputs)

    def kwargs(batch: int) -> dict[str, Any]:
        return {key: make(batch) for key, make in keywords.items()}

    return Case(name, seeded_build, args, kwargs, frozenset(tags.split()))


VECTOR = floats(WIDTH)
IMAGE = floats(3, 8, 8)

CASES: tuple[Case, ...] = (
    case("fx", "mlp", mlp, VECTOR),
    case("fx linear", "deep_linear", deep_linear, VECTOR),
    case("fx", "conv_inplace", conv_inplace, IMAGE),
    case("fx", "conv1d", conv1d, floats(2, 24)),
    case("fx batchnorm", "deep_batchnorm", deep_batchnorm, IMAGE),
    case("fx dropout", "dropout", dropout, VECTOR),
    case("fx batchnorm mutation", "resnet", resnet, IMAGE),
    case("fx skips batchnorm", "unet", UNet, floats(1, 16, 16)),
    case("fx skips", "dense_block", DenseBlock, VECTOR),
    case("fx", "inception", inception, IMAGE),
    case("fx integer-state", "segnet", SegNet, floats(1, 8, 8)),
    case("fx tied integer-input", "tied_language_model", TiedLanguageModel, tokens(12)),
    case("fx tied", "tied_linear", tied_linear, VECTOR),
    case("fx reused", "reused_module", ReusedModule, VECTOR),
    case(
        "fx several-inputs tuple-output",
        "many_inputs_outputs",
        ManyInputsOutputs,
        VECTOR,
        floats(8, seed=1),
        floats(3, seed=2),
    ),
    case("fx dict-output", "dict_output", DictOutput, VECTOR),
    case(
        "fx several-inputs keyword-input",
        "keyword_arguments",
        KeywordArguments,
        VECTOR,
        context=floats(WIDTH, seed=1),
        gain=floats(1, seed=2),
    ),
    case("fx recurrent skips tuple-leaf", "lstm", LSTM, floats(6, 4)),
    case("fx", "mixer", mixer, floats(6, WIDTH)),
    case(
        "fx side-value integer-input",
        "boolean_mask_encoder",
        lambda: MaskedEncoder(torch.bool),
        tokens(10),
    ),
    case(
        "fx side-value integer-input",
        "float_mask_encoder",
        lambda: MaskedEncoder(torch.float32),
        tokens(10),
    ),
    case(
        "fx skips several-inputs integer-input",
        "encoder_decoder",
        EncoderDecoder,
        tokens(10),
        tokens(8, seed=1),
    ),
    case("fx side-value", "vision_transformer", VisionTransformer, IMAGE),
    case("export fx-opaque", "container_transformer", container_transformer, floats(6, WIDTH)),
    case("fx mutation view-write", "view_write", ViewWrite, VECTOR),
    case("export mutation view-write", "slice_assignment", SliceAssignment, VECTOR),
    case("fx mutation buffer-write", "running_mean", repeat(RunningMean), VECTOR),
    case("export fx-wrong mutation buffer-write", "step_counter", repeat(StepCounter), VECTOR),
    case("export unused", "shape_branch", ShapeBranch, VECTOR),
    case("export recurrent", "unrolled_lstm", UnrolledLSTM, floats(6, 4)),
    case("uncapturable", "data_branch", DataBranch, VECTOR),
    case(
        "uncapturable fx-wrong export-wrong custom-gradient",
        "custom_gradient",
        repeat(CustomGradient),
        VECTOR,
    ),
)


def by_name(name: str) -> Case:
    """Return the case of this name.

    Raises:
        KeyError: If there is none.
    """
    return {one.name: one for one in CASES}[name]


def with_tag(tag: str) -> tuple[Case, ...]:
    """Return the cases that carry this tag.

    Raises:
        KeyError: If none does; a misspelt tag would otherwise select no tests and pass.
    """
    selected = tuple(one for one in CASES if tag in one.tags)
    if not selected:
        raise KeyError(tag)
    return selected
