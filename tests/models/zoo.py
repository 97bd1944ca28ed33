"""The topology zoo: small models, each with one shape of graph that a compiler can get wrong.

The models are in `topologies`, `sequences` and `traps`. `CASES` holds them all; `by_name` and
`with_tag` select. Every case builds the same weights and the same inputs each time and leaves the
global random state alone. Tags say what a case is good for:

front end, exactly one of
    fx              `torch.fx.symbolic_trace` gives a faithful graph with positions to cut
    export          only `torch.export.export` (non-strict) does
    uncapturable    nothing does
traps
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

from tests.models.hard_models import (
    CustomGradient,
    DataBranch,
    RunningMean,
    ShapeBranch,
    SliceAssignment,
    StepCounter,
    UnrolledLSTM,
    ViewWrite,
    repeat,
)
from tests.models.sequences import (
    LSTM,
    PADDING,
    VOCABULARY,
    EncoderDecoder,
    MaskedEncoder,
    TiedLanguageModel,
    VisionTransformer,
    container_transformer,
    mixer,
)
from tests.models.topologies import (
    WIDTH,
    DenseBlock,
    DictOutput,
    KeywordArguments,
    ManyInputsOutputs,
    ReusedModule,
    SegNet,
    UNet,
    conv1d,
    conv_inplace,
    deep_batchnorm,
    deep_linear,
    dropout,
    inception,
    mlp,
    resnet,
    tied_linear,
)

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


def enliven(model: nn.Module, gain: float) -> None:
    """Draw weights and statistics so that an error in any layer shows in the output.

    The default initialization shrinks what passes through a chain, and leaves every norm with the
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
    case("fx mutation buffer-write", "step_counter", repeat(StepCounter), VECTOR),
    case("export unused", "shape_branch", ShapeBranch, VECTOR),
    case("export recurrent", "unrolled_lstm", UnrolledLSTM, floats(6, 4)),
    case("uncapturable", "data_branch", DataBranch, VECTOR),
    case(
        "fx export-wrong custom-gradient",
        "custom_gradient",
        repeat(CustomGradient),
        VECTOR,
    ),
)

CAPTURABLE = tuple(one.name for one in CASES if "uncapturable" not in one.tags)

SIMILAR = {
    "mlp", "conv_inplace", "conv1d", "deep_batchnorm", "dense_block", "inception",
    "tied_linear", "mixer", "boolean_mask_encoder", "vision_transformer", "slice_assignment",
    "running_mean", "unrolled_lstm",
}  # fmt: skip
"""Cases every tag of which another case has too."""


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
