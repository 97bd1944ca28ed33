"""Loops in time: samplers, solvers and a recurrent depth, each unrolled by its forward."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn


class Denoiser(nn.Module):
    """A small network of a state and a time."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.time = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))
        self.outer = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.Tanh())
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict noise or velocity `[B, 8]` at times `[B]`."""
        angles = t[:, None] * torch.tensor([1.0, 3.0], device=x.device)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.last(self.outer(self.inner(x) + time))


class _Loop(nn.Module):
    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.net, self.steps = Denoiser(), steps


class Euler(_Loop):
    """Numbers in the arguments of nodes: t, and h, which every step shares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = 1 / self.steps
        for i in range(self.steps):
            x = x + h * self.net(x, torch.full((x.shape[0],), i * h, device=x.device))
        return x


class Heun(_Loop):
    """Two evaluations a step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = 1 / self.steps
        for i in range(self.steps):
            t = x.new_full((x.shape[0],), i * h)
            k = self.net(x, t)
            x = x + h / 2 * (k + self.net(x + h * k, t + h))
        return x


class DDIM(_Loop):
    """Look-ups in tables at the ends of every step."""

    alphas: torch.Tensor
    times: torch.Tensor

    def __init__(self, steps: int = 12) -> None:
        super().__init__(steps)
        self.register_buffer("alphas", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        self.register_buffer("times", torch.linspace(999, 0, steps + 1).long())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.steps):
            t = self.times[i]
            a, b = self.alphas[t], self.alphas[self.times[i + 1]]
            noise = self.net(x, t.expand(x.shape[0]) / 1000)
            x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
        return x


class DDIMNumbers(_Loop):
    """Coefficients of both ends of a step, as plain numbers: no larger step follows from them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        times = torch.linspace(999, 0, self.steps + 1).long().tolist()
        for t, s in pairwise(times):
            a, b = float(alphas[t]), float(alphas[s])
            noise = self.net(x, torch.full((x.shape[0],), t / 1000))
            x = math.sqrt(b / a) * x + (math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)) * noise
        return x


class Guided(_Loop):
    """A class that conditions, and guidance with two evaluations a step."""

    times: torch.Tensor

    def __init__(self, steps: int = 12) -> None:
        super().__init__(steps)
        self.classes = nn.Embedding(10, 8)
        self.register_buffer("times", torch.linspace(1, 0, steps + 1))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        condition = self.classes(label)
        for i in range(self.steps):
            t = self.times[i].expand(x.shape[0])
            plain, guided = self.net(x, t), self.net(x + condition, t)
            x = x + (self.times[i + 1] - self.times[i]) * (plain + 2.0 * (guided - plain))
        return x


class Ancestral(_Loop):
    """A stochastic sampler whose noise is an input."""

    kept: torch.Tensor
    total: torch.Tensor

    def __init__(self, steps: int = 12) -> None:
        super().__init__(steps)
        beta = torch.linspace(1e-3, 0.1, steps)
        self.register_buffer("kept", 1 - beta)
        self.register_buffer("total", torch.cumprod(1 - beta, 0))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        for i in reversed(range(self.steps)):
            e = self.net(x, torch.full((x.shape[0],), i / self.steps))
            x = (x - (1 - self.kept[i]) / (1 - self.total[i]).sqrt() * e) / self.kept[i].sqrt()
            x = x + (1 - self.kept[i]).sqrt() * noise[:, i]
        return x


class Multistep(_Loop):
    """Adams-Bashforth: the state is x and the last evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = 1 / self.steps
        before = self.net(x, torch.full((x.shape[0],), 0.0))
        x = x + h * before
        for i in range(1, self.steps):
            now = self.net(x, torch.full((x.shape[0],), i * h))
            x, before = x + h * (1.5 * now - 0.5 * before), now
        return x


class Multistep3(_Loop):
    """Adams-Bashforth of third order; two evaluations precede the first step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = 1 / self.steps
        first, second = (self.net(x, torch.full((x.shape[0],), -i * h)) for i in (2, 1))
        for i in range(self.steps):
            now = self.net(x, torch.full((x.shape[0],), i * h))
            x = x + h * (23 * now - 16 * second + 5 * first) / 12
            first, second = second, now
        return x


class Nested(nn.Module):
    """An encoder, a neural ODE, and a decoder."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16))
        self.field = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        for _ in range(self.steps):
            h = h + self.field(h) / self.steps
        return self.decoder(h)


class Recurrent(nn.Module):
    """One transformer block, many times: a loop that is not a smooth path where it is untrained."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=True, norm_first=True, dropout=0.0
        )
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for _ in range(self.steps):
            x = self.block(x)
        return x


def inputs(model: type[nn.Module], batch: int = 4) -> tuple[torch.Tensor, ...]:
    """Return example inputs of a loop."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[type[nn.Module], list[tuple[int, ...]]] = {
        Ancestral: [(8,), (12, 8)], Nested: [(20,)], Recurrent: [(5, 8)],
    }  # fmt: skip
    tensors = [
        torch.randn(batch, *shape, generator=generator) for shape in shapes.get(model, [(8,)])
    ]
    if model is Guided:
        tensors.append(torch.arange(batch) % 10)
    return tuple(tensors)
