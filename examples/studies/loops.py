"""Loops in time: how many iterations trained samplers, an ODE and a recurrent depth need.

python -m examples.digits_sampler                        # trains the samplers, once
python -m examples.studies.loops samples --kind ddim --steps 64 --stages 4,8,16
python -m examples.studies.loops samples --kind ddim --steps 256 --stages 4,8,16
python -m examples.studies.loops ode                     # a neural ODE classifier
python -m examples.studies.loops recurrent               # one transformer block, 24 times
python -m examples.studies.loops estimates --stages 4,8  # estimated against true errors
python -m examples.studies.loops batched --stages 8      # all stages of one device as one batch
python -m examples.studies.loops picture                 # docs/loops.png

Every command prints Markdown tables; `loops.md` holds those of one run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from examples.digits_sampler import DDIM, SAMPLERS, WEIGHTS, Euler, build_model, digits
from passes.analysis.analysis import Analysis
from passes.capture.ladder import capture
from passes.options import Options
from passes.pipeline import COMPILE, Compilation, run_passes
from passes.transform.executor import Executor
from pnn_compile.compiled import Compiled, gather
from pnn_compile.evaluate.error_estimate import ErrorEstimate, estimated_errors
from pnn_compile.evaluate.iterate import last_states, pipelined_speedup
from pnn_compile.inputs import named_batch

PICTURE = Path(__file__).parents[2] / "docs" / "loops.png"
SAMPLES = 256
CHUNK = 64
STUDIES = ("samples", "estimates", "ode", "recurrent", "batched", "picture")


class Networks:
    """Networks of one model for several numbers of stages; captured and analyzed once."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        start = time.process_time()
        self.program = capture(model, (example,))
        self.analysis: Analysis | None = None
        self.seconds = time.process_time() - start

    def compiled(self, stages: int, **options: object) -> Compiled:
        """Compile for a number of stages; `seconds` is the processor time of that alone."""
        start = time.process_time()
        chosen = Options.of(None, {"stages": stages, **options})
        state = Compilation(program=self.program, options=chosen, analysis=self.analysis)
        passes = COMPILE if self.analysis is None else COMPILE[1:]
        if self.analysis is not None:
            self.analysis.measured.clear()
        state, results = run_passes(state, passes)
        self.analysis = state.analysis
        self.seconds = time.process_time() - start
        return gather(state, results)


def chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Divide samples into batches."""
    return tensor.split(CHUNK)


def iterates(compiled: Compiled, noise: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Return the outputs after 0 to `most` iterations, where 0 is the guess alone."""
    parts: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for part in chunks(noise):
            executor = Executor(compiled, lockstep=compiled.lockstep)
            batch = named_batch(compiled, part)
            states = last_states(executor, batch, most)
            parts.append([executor.head(state, batch) for state in states])
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def errors(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the relative error of every sample."""
    return (result - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)


def classifier(seconds: float = 6.0) -> nn.Module:
    """Train a classifier of digits, which stands for what a person sees."""
    torch.manual_seed(1)
    images, labels = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, start = torch.optim.AdamW(net.parameters(), 2e-3), time.process_time()
    while time.process_time() - start < seconds:
        rows = torch.randint(len(images), (128,))
        noisy = images[rows] + 0.1 * torch.randn(128, 1, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(net(noisy), labels[rows]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def picard(
    sampler: DDIM | Euler, noise: torch.Tensor, window: int, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Sample by Picard iteration over a sliding window (ParaDiGMS; Shih et al., NeurIPS 2023).

    All steps of the window are evaluated at once, and their increments are summed; the window
    moves past the states whose mean squared change is below the tolerance.

    Returns:
        The samples, and the number of iterations: evaluations one after another on `window`
        devices.
    """
    steps, states, begin, count = sampler.steps, [noise] * (sampler.steps + 1), 0, 0
    while begin < steps:
        stop = min(begin + window, steps)
        moves = [sampler.step(states[i], i, i + 1) - states[i] for i in range(begin, stop)]
        count += 1
        x, moved = states[begin], begin + 1
        settled = True
        for i in range(begin, stop):
            x = x + moves[i - begin]
            change = (x - states[i + 1]).square().flatten(1).mean(1).max().item()
            settled = settled and (i == begin or change < tolerance**2)
            moved = i + 1 if settled else moved
            states[i + 1] = x
        states[stop + 1 :] = [x] * (steps - stop)
        begin = moved
    return states[-1], count


def samples(kind: str, steps: int, counts: Sequence[int], most: int) -> None:
    """Print the tables of a sampler: iterations, and the controls at equal latency."""
    sampler = build_model(kind, steps)
    assert isinstance(sampler, DDIM | Euler)
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    judge, networks = classifier(), Networks(sampler, noise[:2])
    print(f"{kind}, {steps} steps; captured in {networks.seconds:.0f} s\n", flush=True)
    with torch.no_grad():
        target = torch.cat([sampler(part) for part in chunks(noise)])
    labels = judge(target).argmax(1)

    def row(name: str, result: torch.Tensor, *speeds: str) -> None:
        error = errors(result, target)
        agreement = (judge(result).argmax(1) == labels).float().mean().item()
        cells = (name, f"{error.mean():.2%}", f"{error.quantile(0.95):.2%}", f"{error.max():.2%}",
                 f"{agreement:.1%}", *speeds)  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)

    head = ("network", "error, mean", "95 %", "largest", "agreement", "speed-up", "pipelined")
    print(f"| {' | '.join(head)} |\n|---|" + "---|" * (len(head) - 1))
    latencies: set[int] = set()
    for count in counts:
        compiled = networks.compiled(count)
        rows = iterates(compiled, noise, most)
        forecasts = compiled.plan.forecasts(most)
        for number, result in enumerate(rows):
            if not number:
                row(f"N = {count}, guess", result)
                continue
            fast = pipelined_speedup(compiled.plan, number) or 0.0
            row(f"N = {count}, K = {number}", result, f"{forecasts[number - 1].speedup:.2f}",
                f"{fast:.2f}")  # fmt: skip
            latencies.add(round(steps / fast))
        note = next(n for n in compiled.plan.notes if n.startswith("a loop"))
        print(f"<!-- N = {count}: compiled in {networks.seconds:.0f} s; {note} -->")
    with torch.no_grad():
        for fewer in sorted(latencies):
            short = SAMPLERS[kind](sampler.net, fewer)
            row(f"{fewer} steps", torch.cat([short(part) for part in chunks(noise)]), "",
                f"{steps / fewer:.2f}")  # fmt: skip
        for count, tolerance in itertools.product(counts, (0.1, 0.02)):
            pairs = [picard(sampler, part, count, tolerance) for part in noise.split(16)]
            taken = sum(number for _, number in pairs) / len(pairs)
            result = torch.cat([part for part, _ in pairs])
            row(f"Picard, N = {count}, {tolerance:g}", result, "", f"{steps / taken:.2f}")


def estimates(kind: str, steps: int, counts: Sequence[int], most: int) -> None:
    """Print estimated over true errors, and the iterations that tolerances take of every sample.

    "changes alone" is the estimate that knows nothing of coarse steps.
    """
    sampler = build_model(kind, steps)
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    networks = Networks(sampler, noise[:2])
    print("| network | estimate / error: 5 %, 50 %, 95 % | changes alone |\n|---|---|---|")
    tolerances: list[str] = []
    for count in counts:
        compiled, rows = networks.compiled(count), min(most, count - 1)
        parts = [_estimates(compiled, part, sampler(part), rows) for part in chunks(noise)]
        true, new, old = (torch.cat(one, 1) for one in zip(*parts, strict=True))
        for k in range(rows):
            shown = (_quantiles(one[k] / true[k]) for one in (new, old))
            print(f"| N = {count}, K = {k + 1} | {' | '.join(shown)} |", flush=True)
        for tolerance, one in itertools.product((0.03, 0.01, 0.001), (new, old)):
            done = torch.cat([one < tolerance, torch.ones(1, SAMPLES, dtype=torch.bool)])
            taken = done.int().argmax(0)
            left = torch.cat([true, torch.zeros(1, SAMPLES)]).gather(0, taken[None])
            cells = (
                f"N = {count}, {tolerance:.1%}" + (", changes alone" if one is old else ""),
                ", ".join(f"{n + 1} of {(taken == n).float().mean():.0%}" for n in taken.unique()),
                f"{(left < tolerance).float().mean():.1%}", f"{left.max() / tolerance:.2f}",
            )  # fmt: skip
            tolerances.append(f"| {' | '.join(cells)} |")
    print("\n| tolerance | K, share of the samples | samples below | largest error / tolerance |")
    print("|---|---|---|---|", *tolerances, sep="\n")


def _estimates(
    compiled: Compiled, noise: torch.Tensor, target: torch.Tensor, most: int
) -> tuple[torch.Tensor, ...]:
    """Return true errors, their estimates, and those by changes alone, `[K, B]`."""
    executor = Executor(compiled, lockstep=compiled.lockstep)
    batch, true, estimate = named_batch(compiled, noise), [], ErrorEstimate(compiled.plan, CHUNK)
    with torch.no_grad():
        for state in last_states(executor, batch, most, estimate.watch):
            new = estimate.add(state)
            true.append(errors(executor.head(state, batch), target))
    old = estimated_errors(estimate.increments, len(compiled.plan.stages))
    return torch.stack(true[1:]), new, old


def _quantiles(ratios: torch.Tensor) -> str:
    points = torch.tensor([0.05, 0.5, 0.95], dtype=ratios.dtype)
    return ", ".join(f"{ratio:.1f}" for ratio in ratios.quantile(points))


class NeuralODE(nn.Module):
    """A classifier of digits: a layer, Euler steps of an autonomous field, a layer."""

    def __init__(self, steps: int = 32, width: int = 48) -> None:
        super().__init__()
        self.enter, self.leave, self.steps = nn.Linear(64, width), nn.Linear(width, 10), steps
        self.field = nn.Sequential(nn.Linear(width, 96), nn.Tanh(), nn.Linear(96, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for _ in range(self.steps):
            h = h + 4 / self.steps * self.field(h)
        return self.leave(h)


class Recurrent(nn.Module):
    """A classifier of digits: their rows as tokens, and one transformer block many times."""

    def __init__(self, steps: int = 24, width: int = 32) -> None:
        super().__init__()
        self.enter, self.leave, self.steps = nn.Linear(8, width), nn.Linear(width, 10), steps
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mix = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x) + self.position
        for _ in range(self.steps):
            n = self.norm1(h)
            h = h + self.attention(n, n, n, need_weights=False)[0]
            h = h + self.mix(self.norm2(h))
        return self.leave(h.mean(1))


def _trained(model: nn.Module, shape: tuple[int, ...], seconds: float) -> tuple[torch.Tensor, ...]:
    """Train a classifier on four of five digits; return the others and their labels."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].reshape(-1, *shape), labels[order]
    cut, start = 4 * len(images) // 5, time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    while time.process_time() - start < seconds:
        rows = torch.randint(cut, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().requires_grad_(False)
    return images[cut:], labels[cut:]


def classifiers(
    model: nn.Module, shape: tuple[int, ...], counts: Sequence[int], seconds: float
) -> None:
    """Print error and accuracy of a classifier against the number of iterations."""
    images, labels = _trained(model, shape, seconds)
    target = model(images)
    networks = Networks(model, images[:4])
    kept = (target.argmax(1) == labels).float().mean().item()
    print(f"accuracy of the original on {len(images)} digits: {kept:.2%}\n")
    print("| network | error | agreement | accuracy | speed-up | pipelined |\n|---|" + "---|" * 5)
    for count in counts:
        automatic = networks.compiled(count)
        note = next(n for n in automatic.plan.notes if n.startswith("a loop"))
        compiled = automatic
        if not automatic.plan.predicts:
            compiled = networks.compiled(count, coarse="time_step")
        most = min(count, 6)
        forecasts = compiled.plan.forecasts(most)
        for number, result in enumerate(iterates(compiled, images, most)):
            error = errors(result, target).mean().item()
            same = (result.argmax(1) == target.argmax(1)).float().mean().item()
            right = (result.argmax(1) == labels).float().mean().item()
            speeds = ("", "")
            if number:
                fast = pipelined_speedup(compiled.plan, number) or 0.0
                speeds = (f"{forecasts[number - 1].speedup:.2f}", f"{fast:.2f}")
            name = f"N = {count}, " + (f"K = {number}" if number else "guess")
            cells = (name, f"{error:.2%}", f"{same:.1%}", f"{right:.2%}", *speeds)
            print(f"| {' | '.join(cells)} |", flush=True)
        adaptive = replace(compiled, plan=replace(compiled.plan, tolerance=0.01))
        runs = [adaptive.iterate(part, tolerance=0.01) for part in chunks(images)]
        result = torch.cat([run.outputs for run in runs])
        right = (result.argmax(1) == labels).float().mean().item()
        taken = sorted({run.iterations for run in runs})
        print(f"<!-- N = {count}: {note} -->")
        print(f"| N = {count}, tolerance 0.01: K = {', '.join(map(str, taken))} | "
              f"{errors(result, target).mean():.2%} | "
              f"{(result.argmax(1) == target.argmax(1)).float().mean():.1%} | {right:.2%} | | |",
              flush=True)  # fmt: skip


def picture(kind: str, steps: int, count: int, columns: int = 16) -> None:
    """Draw samples in docs/loops.png: sequential, guess, one and two iterations, fewer steps."""
    from PIL import Image

    sampler = build_model(kind, steps)
    assert isinstance(sampler, DDIM | Euler)
    noise = torch.randn(columns, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    compiled = Networks(sampler, noise[:2]).compiled(count)
    with torch.no_grad():
        rows = [sampler(noise), *iterates(compiled, noise, 2)]
    grid = torch.cat([torch.cat([*F.pad(row, (0, 1, 0, 1), value=1)], 2) for row in rows], 1)[0]
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).byte()
    image = Image.fromarray(pixels.numpy())
    image.resize((5 * image.width, 5 * image.height), Image.Resampling.NEAREST).save(PICTURE)
    print(f"wrote {PICTURE}; rows: original, guess, K = 1, K = 2")


def batched(kind: str, steps: int, counts: Sequence[int], device: str, rounds: int = 7) -> None:
    """Time one iteration with the stages one by one and as one batch, in turns, on one device.

    On a CPU these are seconds of processor time of one thread.
    """
    torch.set_num_threads(1)
    cuda = device != "cpu"

    def seconds(call: Callable[[], object]) -> float:
        clock = time.perf_counter if cuda else time.process_time
        start = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    sampler = build_model(kind, steps)
    networks = Networks(sampler, torch.randn(2, 1, 8, 8))
    print("| network | batch | original | stages one by one | one batch | batched / unbatched | "
          "batched / original |\n|---|" + "---|" * 6)  # fmt: skip
    for count in counts:
        compiled = networks.compiled(count).to(device)
        sampler.to(device)
        for batch in (1, 4, 16, 64):
            noise = torch.randn(batch, 1, 8, 8, device=device)
            calls: list[Callable[[], object]] = [
                partial(sampler, noise),
                partial(compiled.iterate, noise, iterations=1),
                partial(compiled.iterate, noise, iterations=1, batched=True),
            ]
            for call in calls:
                call()
            times = [[seconds(call) for call in calls] for _ in range(rounds)]
            original, apart, together = (statistics.median(t) for t in zip(*times, strict=True))
            ratios = statistics.median(t[2] / t[1] for t in times), together / original
            print(f"| N = {count}, K = 1 | {batch} | {1e3 * original:.0f} ms | {1e3 * apart:.0f} ms"
                  f" | {1e3 * together:.0f} ms | {ratios[0]:.2f} | {ratios[1]:.2f} |",
                  flush=True)  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--kind", choices=[*SAMPLERS], default="ddim")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--stages", type=_numbers, default=[4, 8, 16])
    parser.add_argument("--most", type=int, default=3, help="largest K")
    parser.add_argument("--seconds", type=float, default=30.0, help="to train a classifier")
    parser.add_argument("--device", default="cpu", help="of the batched stages")
    arguments = parser.parse_args()
    trained = WEIGHTS / f"{arguments.kind}.pt"
    if arguments.study not in ("ode", "recurrent") and not trained.exists():
        parser.error(f"no {trained}: train the samplers first (python -m examples.digits_sampler)")
    torch.manual_seed(0)
    if arguments.study == "samples":
        samples(arguments.kind, arguments.steps, arguments.stages, arguments.most)
    elif arguments.study == "ode":
        classifiers(NeuralODE(), (64,), arguments.stages, arguments.seconds)
    elif arguments.study == "recurrent":
        classifiers(Recurrent(), (8, 8), arguments.stages, arguments.seconds)
    elif arguments.study == "estimates":
        estimates(arguments.kind, arguments.steps, arguments.stages, arguments.most)
    elif arguments.study == "batched":
        batched(arguments.kind, arguments.steps, arguments.stages, arguments.device)
    else:
        picture(arguments.kind, arguments.steps, arguments.stages[0])


if __name__ == "__main__":
    main()
