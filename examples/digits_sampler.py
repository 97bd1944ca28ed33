"""A small diffusion model of 8 x 8 digits, and samplers whose forward is the loop in time.

    python -m examples.digits_sampler          # trains both networks, a few minutes on a CPU
    pnn-compile examples/digits_sampler.py -n 4 --iterations auto --tolerance 1e-2

The U-Net predicts noise (for DDIM; Song, Meng, Ermon 2021) or velocity (for Euler steps of flow
matching; Lipman et al. 2023). It is trained on the digits of scikit-learn. Trained weights lie in
`build/digits`; without them, `build_model` returns a network with random weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DDIM", "Euler", "UNet", "build_model", "digits", "example_inputs"]

WEIGHTS = Path("build/digits")
"""Directory of the trained weights."""


class Block(nn.Module):
    """A residual block of two convolutions `[B, C, H, W]`, shifted by an embedding of the time."""

    def __init__(self, inner: int, outer: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inner), nn.GroupNorm(4, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shift = nn.Linear(embedding, outer)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """A U-Net of two resolutions, from an image `[B, 1, 8, 8]` and a time `[B]` to an image."""

    frequencies: torch.Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down1 = Block(width, width, 64)
        self.down2 = Block(width, 2 * width, 64)
        self.middle = Block(2 * width, 2 * width, 64)
        self.up = Block(3 * width, width, 64)
        self.norm = nn.GroupNorm(4, width)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        fine = self.down1(self.enter(x), time)
        coarse = self.middle(self.down2(F.avg_pool2d(fine, 2), time), time)
        wide = F.interpolate(coarse, scale_factor=2.0)
        return self.leave(F.silu(self.norm(self.up(torch.cat([wide, fine], 1), time))))


class DDIM(nn.Module):
    """Deterministic sampler over a table of noise levels, from noise to an image."""

    alphas: torch.Tensor

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps
        self.register_buffer("times", torch.linspace(1, 0, steps + 1))
        self.register_buffer("alphas", alpha(torch.linspace(1, 0, steps + 1)))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        x = noise
        for i in range(self.steps):
            x = self.step(x, i, i + 1)
        return x

    def step(self, x: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """Step from time `i` of the table to time `j`."""
        a, b = self.alphas[i], self.alphas[j]
        predicted = self.net(x, self.times[i].expand(x.shape[0]))  # type: ignore[index]
        image = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        return b.sqrt() * image + (1 - b).sqrt() * predicted


class Euler(nn.Module):
    """Equal Euler steps of a velocity field, from noise at time 0 to an image at time 1."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        x = noise
        for i in range(self.steps):
            x = self.step(x, i, i + 1)
        return x

    def step(self, x: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """Step from time `i / steps` to time `j / steps`."""
        t = torch.full((x.shape[0],), i / self.steps, device=x.device)
        return x + (j - i) / self.steps * self.net(x, t)


SAMPLERS: dict[str, type[DDIM] | type[Euler]] = {"ddim": DDIM, "euler": Euler}


def alpha(t: torch.Tensor) -> torch.Tensor:
    """Share of the signal's variance at a time: the cosine schedule, kept off both ends."""
    return (0.004 + 0.992 * torch.cos(0.5 * math.pi * t) ** 2).clamp(0.004, 0.9999)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 1,797 digits of scikit-learn, `[N, 1, 8, 8]` in -1 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(data.target).long()


def train(kind: str, seconds: float, width: int = 16, seed: int = 0) -> UNet:
    """Train the network of a sampler for some seconds of processor time."""
    torch.manual_seed(seed)
    images, _ = digits()
    net, start, step = UNet(width), time.process_time(), 0
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    while (used := time.process_time() - start) < seconds:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - used / seconds)
        x = images[torch.randint(len(images), (128,))]
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        level = t[:, None, None, None]
        if kind == "ddim":
            signal = alpha(level)
            mixed, target = signal.sqrt() * x + (1 - signal).sqrt() * noise, noise
        else:
            mixed, target = (1 - level) * noise + level * x, x - noise
        loss = F.mse_loss(net(mixed, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        step += 1
        if step % 200 == 0:
            print(f"{kind}: step {step}, loss {loss.item():.4f}, {used:.0f} of {seconds:.0f} s")
    net.load_state_dict(average.module.state_dict())
    return net


def build_model(kind: str = "ddim", steps: int = 64, width: int = 16) -> nn.Module:
    """Build a sampler, with the trained weights if there are any."""
    torch.manual_seed(0)
    net, path = UNet(width), WEIGHTS / f"{kind}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    return SAMPLERS[kind](net, steps).eval().requires_grad_(False)


def example_inputs() -> torch.Tensor:
    """Return noise for two samples."""
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Train the networks of both samplers, and keep their weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="of each network")
    arguments = parser.parse_args()
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    for kind in SAMPLERS:
        torch.save(train(kind, arguments.seconds).state_dict(), WEIGHTS / f"{kind}.pt")


if __name__ == "__main__":
    main()
