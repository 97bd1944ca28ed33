"""How much a study trains: presets from seconds on a CPU to an hour on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much to train.

    Attributes:
        samples: Training samples.
        tests: Test samples.
        epochs: Epochs of training from scratch.
        units: Residual units in all.
        width: Channels of the first group of units.
        vgg_width: Channels of the first block of VGG-16.
        stages: Numbers N of stages.
        texts: Training samples of the text task, windows of 64 bytes.
        layers: Layers of the decoder.
        embedding: Width of the decoder.
        batch: Samples per step of the training from scratch.
        text_batch: The same for text, in training and fit.
        fit_batch: Samples per step of the fit of a converted network.
        rate: Peak learning rate of the training from scratch.
        fit_rate: Peak learning rate of the fit.
        calibration: Samples per batch of the calibration, 8,000 in all.
        augment: Whether colour images are shifted and mirrored at random in training.
        bfloat16: Whether training runs in mixed precision.
        compiled: Whether torch.compile compiles the networks for training from scratch.
    """

    samples: int
    tests: int
    epochs: int
    units: int
    width: int
    vgg_width: int
    stages: tuple[int, ...]
    texts: int
    layers: int
    embedding: int
    batch: int = 128
    text_batch: int = 32
    fit_batch: int = 64
    rate: float = 3e-3
    fit_rate: float = 2e-3
    calibration: int = 125
    augment: bool = False
    bfloat16: bool = False
    compiled: bool = False


PRESETS = {
    "smoke": Preset(
        samples=512, tests=256, epochs=1, units=12, width=4, vgg_width=4, stages=(3,),
        texts=256, layers=4, embedding=32,
    ),
    "cpu": Preset(
        samples=20_000, tests=6_000, epochs=3, units=24, width=8, vgg_width=8, stages=(3, 6, 12),
        texts=6_000, layers=12, embedding=32,
    ),
    "gpu-short": Preset(
        samples=50_000, tests=10_000, epochs=10, units=54, width=16, vgg_width=64,
        stages=(3, 6, 12, 18), texts=100_000, layers=24, embedding=128,
        batch=512, text_batch=256, fit_batch=128, fit_rate=1e-3, calibration=500,
        augment=True, bfloat16=True,
    ),
    "gpu": Preset(
        samples=50_000, tests=10_000, epochs=60, units=54, width=16, vgg_width=64,
        stages=(3, 6, 12, 18), texts=200_000, layers=36, embedding=256,
        batch=256, text_batch=128, fit_batch=128, fit_rate=1e-3, calibration=500,
        augment=True, bfloat16=True,
    ),
}  # fmt: skip
PRESETS["cpu-long"] = replace(
    PRESETS["cpu"], samples=50_000, tests=10_000, epochs=10, fit_rate=1e-3, augment=True,
)  # fmt: skip
PRESETS["cpu-converged"] = replace(
    PRESETS["cpu-long"], epochs=24, units=18, stages=(3, 6), compiled=True,
)  # fmt: skip
PRESETS["gpu-smoke"] = replace(
    PRESETS["gpu-short"], samples=4_096, tests=1_000, epochs=1, stages=(3, 18), texts=4_096
)
"""Presets by name; the three for a GPU use images of full size and VGG-16 at full width.

"cpu-converged" trains until the original's accuracy is nearly flat."""
