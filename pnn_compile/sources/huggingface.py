"""`hf:NAME`: an architecture of transformers with random weights; nothing is downloaded.

NAME is a folder with a config.json, or, at a small configuration that `--arg` overrides, a model
type (`llama`), a class of configurations (`LlamaConfig`) or of models (`LlamaForCausalLM`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from passes.errors import SourceError
from pnn_compile.sources.errors import advise, blame
from pnn_compile.sources.libraries import require
from pnn_compile.sources.source import Inputs, Source

__all__ = ["SMALL", "load"]

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
"""What a configuration is made with where it has a number of this name."""

_BATCH, _TOKENS, _SAMPLES, _FRAMES = 2, 16, 8000, 64
_SUBCONFIGS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")


def _tokens(config: Any) -> torch.Tensor:
    bound = _size(config, "vocab_size", 256)
    reserved = min(4, bound - 1)  # padding, begin, end and the like
    return torch.randint(reserved, bound, (_BATCH, _TOKENS), generator=_generator())


def _images(config: Any) -> torch.Tensor:
    side = _size(config, "image_size", 64)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    frames = [count] if (count := _size(config, "num_frames", 0)) else []  # of a video
    return _floats(_BATCH, *frames, _size(config, "num_channels", 3), height, width)


def _sound(config: Any) -> torch.Tensor:
    channels = [count] if (count := _size(config, "audio_channels", 0)) else []
    return _floats(_BATCH, *channels, _SAMPLES)


def _spectrogram(config: Any) -> torch.Tensor:
    """Mel bins over time; the encoder of Whisper halves the time and takes no other length."""
    bins = _size(config, "num_mel_bins", _size(config, "feature_size", 80))
    if (positions := _size(config, "max_source_positions", 0)) and _size(config, "d_model", 0):
        return _floats(_BATCH, bins, 2 * positions)
    return _floats(_BATCH, _FRAMES, bins)


INPUTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": lambda config: torch.ones(_BATCH, _TOKENS, dtype=torch.int64),
    "pixel_values": _images,
    "input_values": _sound,
    "input_features": _spectrogram,
    "bbox": lambda config: torch.zeros(_BATCH, _TOKENS, 4, dtype=torch.int64),
}
"""Example inputs by the name of the argument, made from the configuration."""


def load(name: str, arguments: dict[str, Any], given: Inputs | None) -> Source:
    """Build a model of transformers, with inputs after its kind.

    Raises:
        SourceError: transformers is missing, does not know the name or a setting, fails to build
            the model, or the model takes inputs that are not known here and none are given.
    """
    origin = f"hf:{name}"
    transformers = require("transformers", origin)
    with blame(origin):
        if Path(name).is_dir():
            config = transformers.AutoConfig.from_pretrained(
                name, local_files_only=True, **arguments
            )
            maker = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        else:
            kind, maker = _look_up(transformers, name)
            config = _configure(kind, arguments, origin)
            config.architectures = []  # None, the default, is more than AutoModel expects
        if hasattr(config, "use_cache"):
            config.use_cache = arguments.get("use_cache", False)  # a cache is no tensor
        build = getattr(maker, "_from_config", None) or maker.from_config
        model = build(config)
    args, kwargs = given or ((), _inputs(model, origin))
    return Source(model, args, kwargs, origin)


def _look_up(transformers: ModuleType, name: str) -> tuple[type[Any], Any]:
    """Return the class of configurations and what makes the model that a name means."""
    kinds = transformers.CONFIG_MAPPING
    if name in kinds:
        return kinds[name], transformers.AutoModel
    target = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(target, type) and issubclass(target, transformers.PreTrainedConfig):
        return target, transformers.AutoModel
    if isinstance(target, type) and issubclass(target, transformers.PreTrainedModel):
        return cast(Any, target).config_class, target
    if "/" in name or "." in name:
        raise SourceError(f"there is no folder {name} with a config.json: nothing is downloaded")
    names = [*kinds, *(each for each in dir(transformers) if each.endswith("Config"))]
    raise SourceError(f"transformers has no model type or class {name!r}; {advise(name, names)}")


def _configure(kind: type[Any], arguments: Mapping[str, Any], origin: str) -> Any:
    """Make a small configuration; parts of it that are configurations are small too."""
    defaults = kind()
    parts = {
        key: _small(type(part)) | dict(arguments.get(key, {}))
        for key in _SUBCONFIGS
        if hasattr(part := getattr(defaults, key, None), "model_type")
    }
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for key in arguments:
        if key not in known:
            raise SourceError(f"{origin} has no setting {key!r}; {advise(key, sorted(known))}")
    return kind(**{**_small(kind), **parts, **arguments})


def _small(kind: type[Any]) -> dict[str, Any]:
    """The small settings of a class; ids of special tokens stay within the small vocabulary."""
    settings = kind().to_dict()
    small = {
        key: min(value, settings[key])
        for key, value in SMALL.items()
        if isinstance(settings.get(key), int)
    }
    for key, value in settings.items():
        beyond = isinstance(value, int) and value >= small.get("vocab_size", value + 1)
        if key.endswith("_token_id") and beyond:
            small[key] = 1
    return small


def _inputs(model: Any, origin: str) -> dict[str, torch.Tensor]:
    """Make the main input, what forward requires, and the decoder's tokens."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [model.main_input_name]
    names += [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    optional = {each.name for each in parameters}
    if model.config.is_encoder_decoder and "decoder_input_ids" in optional:
        names.append("decoder_input_ids")
    if {"input_ids", "pixel_values"} <= optional:  # two towers
        names += ["input_ids", "pixel_values"]
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in INPUTS]:
        raise SourceError(
            f"{origin}: no example for {', '.join(unknown)}: give every input by --input, "
            f"as in --input {unknown[0]}=2x16"
        )
    return {name: INPUTS[name](model.config) for name in names}


def _size(config: Any, name: str, default: Any) -> Any:
    """Look a number up in a configuration and its parts."""
    parts = [config, *(getattr(config, key, None) for key in _SUBCONFIGS)]
    found = (getattr(part, name, None) for part in parts)
    return next((value for value in found if value is not None), default)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator())
