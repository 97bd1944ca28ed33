"""Models of libraries, with random weights and small example inputs; nothing is downloaded.

`timm:NAME` is a model of timm, `torchvision:NAME` one of torchvision.models. `hf:NAME` is one of
transformers: a folder with a config.json, or, at a small configuration that `--arg` overrides, a
model type (`llama`), a class of configurations (`LlamaConfig`) or of models (`LlamaForCausalLM`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from passes.errors import SourceError, suggest
from pnn_compile.sources.source import Inputs, Source
from pnn_compile.sources.user_code import brief, call, report_errors

SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    # videos `[B, C, T, H, W]`
    ("torchvision.models.video.mvit", (2, 3, 16, 224, 224)),
    ("torchvision.models.video.", (2, 3, 16, 112, 112)),
    # the smallest images that a classifier takes at its default strides
    ("torchvision.models.inception", (2, 3, 299, 299)),
    ("torchvision.models.", (2, 3, 224, 224)),
)
"""Prefix of the module of a torchvision factory, and the shape of its example input."""

OTHERS = ("torchvision.models.detection.", "torchvision.models.optical_flow.")
"""Models that take lists of images, or pairs."""

SMALL: dict[str, int] = {
    # width
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "emb_dim": 64,
    "dim": 64,
    "embedding_size": 64,
    "rotary_dim": 8,
    # depth
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    # heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 16,
    "d_kv": 16,
    # feed-forward layers and experts
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "ffn_dim": 128,
    "d_ff": 128,
    "n_inner": 128,
    "hidden_dim": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    # vocabulary and images
    "vocab_size": 256,
    "image_size": 64,
    "patch_size": 16,
}
"""Values of the small configuration, for the settings of these names."""

_BATCH, _TOKENS, _SAMPLES, _FRAMES = 2, 16, 8000, 64
"""Sizes of example inputs: batch, tokens, samples of sound, frames of a spectrogram."""
_SUBCONFIGS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")


def require(name: str, origin: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: The library, also its name for pip.
        origin: The source that needs it.

    Raises:
        SourceError: It is not installed, or does not fit the rest of the installation.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise SourceError(f"{origin} needs {name}: pip install {name}") from error
        raise SourceError(
            f"{origin} needs {name}, which lacks {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # whatever a library raises when it is imported
        raise SourceError(
            f"{origin} needs {name}, which cannot be imported ({type(error).__name__}: "
            f"{brief(error)}): install builds of torch and {name} that were made for each "
            "other"
        ) from error


def load_timm(name: str, arguments: dict[str, Any], inputs: Inputs | None) -> Source:
    """Build a model by `timm.create_model`, with an image batch of the size that it is made for.

    Raises:
        SourceError: timm is missing, has no such model, or fails to build it.
    """
    origin = f"timm:{name}"
    timm = require("timm", origin)
    if not timm.is_model(name):
        raise SourceError(f"timm has no model {name!r}; {suggest(name, timm.list_models())}")
    if arguments.get("pretrained"):
        raise SourceError(f"{origin}: nothing is downloaded; build pretrained models in a file.py")
    with report_errors(origin):
        model = timm.create_model(name, **arguments)
    if inputs is None:
        size = arguments.get("img_size", model.default_cfg["input_size"][1:])
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = arguments.get("in_chans", model.default_cfg["input_size"][0])
        inputs = (_random(_BATCH, channels, *size),), {}
    return Source(model, *inputs, origin)


def load_torchvision(name: str, arguments: dict[str, Any], inputs: Inputs | None) -> Source:
    """Build a model by its name in `torchvision.models`, without weights.

    Raises:
        SourceError: torchvision is missing, has no such model, or the model takes other inputs
            than one tensor of images and there are no `--input` texts.
    """
    origin = f"torchvision:{name}"
    require("torchvision", origin)
    models = require("torchvision.models", origin)
    if name not in (names := models.list_models()):
        raise SourceError(f"torchvision has no model {name!r}; {suggest(name, names)}")
    builder = models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    no_weights = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if any(arguments.get(key) for key in no_weights):
        raise SourceError(f"{origin}: nothing is downloaded; build pretrained models in a file.py")
    model = call(builder, origin, {**no_weights, **arguments})
    if inputs is None:
        if builder.__module__.startswith(OTHERS):
            raise SourceError(
                f"{origin} takes more than one tensor of images: describe its inputs by --input, "
                "or build it in a file.py beside a function example_inputs()"
            )
        shape = next(s for prefix, s in SHAPES if builder.__module__.startswith(prefix))
        inputs = (_random(*shape),), {}
    return Source(model, *inputs, origin)


def _tokens(config: Any) -> torch.Tensor:
    bound = _size(config, "vocab_size", 256)
    reserved = min(4, bound - 1)  # padding, begin, end and the like
    return torch.randint(reserved, bound, (_BATCH, _TOKENS), generator=_generator())


def _images(config: Any) -> torch.Tensor:
    side = _size(config, "image_size", 64)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    frames = [count] if (count := _size(config, "num_frames", 0)) else []  # of a video
    return _random(_BATCH, *frames, _size(config, "num_channels", 3), height, width)


def _sound(config: Any) -> torch.Tensor:
    channels = [count] if (count := _size(config, "audio_channels", 0)) else []
    return _random(_BATCH, *channels, _SAMPLES)


def _spectrogram(config: Any) -> torch.Tensor:
    """Create mel bins over time; Whisper's encoder halves the time and takes no other length."""
    bins = _size(config, "num_mel_bins", _size(config, "feature_size", 80))
    if (positions := _size(config, "max_source_positions", 0)) and _size(config, "d_model", 0):
        return _random(_BATCH, bins, 2 * positions)
    return _random(_BATCH, _FRAMES, bins)


INPUTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": lambda config: torch.ones(_BATCH, _TOKENS, dtype=torch.int64),
    "pixel_values": _images,
    "input_values": _sound,
    "input_features": _spectrogram,
    "bbox": lambda config: torch.zeros(_BATCH, _TOKENS, 4, dtype=torch.int64),
}
"""Functions from a configuration to an example input, by the name of the argument."""


def load_transformers(name: str, arguments: dict[str, Any], inputs: Inputs | None) -> Source:
    """Build a model of transformers, with example inputs by the names of its arguments.

    Raises:
        SourceError: transformers is missing, has no such model or setting, or fails to build the
            model; or an argument has no entry in `INPUTS` and there are no `--input` texts.
    """
    origin = f"hf:{name}"
    transformers = require("transformers", origin)
    with report_errors(origin):
        if Path(name).is_dir():
            config = transformers.AutoConfig.from_pretrained(
                name, local_files_only=True, **arguments
            )
            model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        else:
            config_class, model_class = _look_up(transformers, name)
            config = _configure(config_class, arguments, origin)
            config.architectures = []  # AutoModel cannot iterate over the default, None
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            # Without it the model cannot make the decoder's tokens from labels.
            config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
        build = getattr(model_class, "_from_config", None) or model_class.from_config
        model = build(config)
    args, kwargs = _completed(model, inputs, origin) if inputs else ((), _inputs(model, origin))
    return Source(model, args, kwargs, origin)


def _completed(model: Any, inputs: Inputs, origin: str) -> Inputs:
    """Add the example inputs that the model needs beside those given by name, as `labels` alone."""
    args, given = inputs
    if args or any(name.endswith("inputs_embeds") for name in given):
        return inputs
    size = next(iter(given.values())).shape[0]
    others = {
        name: value[torch.arange(size) % _BATCH]
        for name, value in _inputs(model, origin, given).items()
        if not (name == "decoder_input_ids" and "labels" in given)  # the model makes them of labels
    }
    return (), {**others, **given}


def _look_up(transformers: ModuleType, name: str) -> tuple[type[Any], Any]:
    """Return the configuration class and the model class that a name stands for."""
    configs = transformers.CONFIG_MAPPING
    if name in configs:
        return configs[name], transformers.AutoModel
    target = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(target, type) and issubclass(target, transformers.PreTrainedConfig):
        return target, transformers.AutoModel
    if isinstance(target, type) and issubclass(target, transformers.PreTrainedModel):
        return cast(Any, target).config_class, target
    if "/" in name or "." in name:
        raise SourceError(f"there is no folder {name} with a config.json: nothing is downloaded")
    names = [*configs, *(key for key in dir(transformers) if key.endswith("Config"))]
    raise SourceError(f"transformers has no model type or class {name!r}; {suggest(name, names)}")


def _configure(config_class: type[Any], arguments: Mapping[str, Any], origin: str) -> Any:
    """Create a small configuration; the configurations inside it are small too."""
    defaults = config_class()
    parts = {
        key: _small(type(part)) | dict(arguments.get(key, {}))
        for key in _SUBCONFIGS
        if hasattr(part := getattr(defaults, key, None), "model_type")
    }
    settings = {*defaults.to_dict(), *defaults.attribute_map}
    for key in arguments:
        if key not in settings:
            raise SourceError(f"{origin} has no setting {key!r}; {suggest(key, sorted(settings))}")
    return config_class(**{**_small(config_class), **parts, **arguments})


def _small(config_class: type[Any]) -> dict[str, Any]:
    """Return the small settings of a class; ids of special tokens stay within the vocabulary."""
    settings = config_class().to_dict()
    small = {
        key: min(value, settings[key])
        for key, value in SMALL.items()
        if isinstance(settings.get(key), int)
    }
    for key, value in settings.items():
        too_large = isinstance(value, int) and value >= small.get("vocab_size", value + 1)
        if key.endswith("_token_id") and too_large:
            small[key] = 1
    return small


def _inputs(model: Any, origin: str, given: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Create the main input, the required arguments of forward, and the decoder's tokens."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [model.main_input_name]
    names += [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    accepted = {parameter.name for parameter in parameters}
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    if {"input_ids", "pixel_values"} <= accepted:  # a text tower and an image tower
        names += ["input_ids", "pixel_values"]
    names = [name for name in dict.fromkeys(names) if name not in given]
    if unknown := [name for name in names if name not in INPUTS]:
        raise SourceError(
            f"{origin}: no example for {', '.join(unknown)}: describe every input by --input, "
            f"as in --input {unknown[0]}=2x16"
        )
    return {name: INPUTS[name](model.config) for name in names}


def _size(config: Any, name: str, default: Any) -> Any:
    """Look up a number in a configuration and in those inside it."""
    parts = [config, *(getattr(config, key, None) for key in _SUBCONFIGS)]
    values = (getattr(part, name, None) for part in parts)
    return next((value for value in values if value is not None), default)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator())


LIBRARIES: dict[str, Callable[[str, dict[str, Any], Inputs | None], Source]] = {
    "timm": load_timm,
    "torchvision": load_torchvision,
    "hf": load_transformers,
}
"""Prefix before the colon, and the function that loads the name after it."""
