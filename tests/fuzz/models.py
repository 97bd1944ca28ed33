"""Compile random models with random options, and hold every network against its model.

    python -m tests.fuzz.models --count 5000 --jobs 2

A seed decides topology, options and inputs, so that a failure is run again by its number:
`python -m tests.fuzz.models --seed 17 --count 1`. Every outcome is one of

    equal     stages in sequence equal the model: outputs, gradients by its own parameter names and
              buffers; `verify` passes; the saved artifact loads to an equal network
    refused   one PnnError
    wrong     anything that differs from the model, or the model was changed
    foreign   another exception
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from passes.ir.example_inputs import bind
from passes.ir.run_step import compare, run_one_step
from tests.models.builders import Residual, ResidualMLP

WIDTH = 8


@dataclass(frozen=True)
class Outcome:
    """What became of one seed.

    Attributes:
        seed: The seed.
        kind: "equal", "refused", "wrong" or "foreign".
        detail: First line of the error, or what differs.
        options: Options of the compilation, for the reader.
    """

    seed: int
    kind: str
    detail: str
    options: str


# --- blocks ---------------------------------------------------------------------------------------


class NormedMLP(nn.Module):
    """LayerNorm, linear layer, GELU and dropout around a shortcut, written with functions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.linear(self.norm(x)))
        return x + nn.functional.dropout(y, 0.1, self.training)


class Gate(nn.Module):
    """Two branches of unlike depth, multiplied; the input is split and joined again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.gate = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.value(x) * torch.sigmoid(self.gate(x))).chunk(2, -1)
        return x + self.scale * torch.cat([b, a], -1)


class InPlace(nn.Module):
    """Writes into its own intermediate values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.mul_(0.5)
        y += x
        return y


class Counting(nn.Module):
    """Counts its calls in a buffer, and keeps a running mean."""

    count: Tensor
    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh(self.linear(x))
        if self.training:
            self.count += 1
            self.mean.mul_(0.9).add_(y.detach().reshape(-1, y.shape[-1]).mean(0), alpha=0.1)
        return y


class Norm(nn.Module):
    """BatchNorm over the features of any shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = self.norm(y) if y.dim() == 2 else self.norm(y.transpose(1, 2)).transpose(1, 2)
        return x + torch.relu(y)


class Attention(nn.Module):
    """Self-attention over the middle axis, by functions; the identity on plain vectors."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(width, 3 * width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if x.dim() == 2:
            return x + torch.tanh(q * k) * v
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


BLOCKS: tuple[Callable[[int, random.Random], nn.Module], ...] = (
    lambda width, rng: Residual(width, rng.choice((1.0, 0.5))),
    lambda width, rng: ResidualMLP(width, 2 * width),
    lambda width, rng: NormedMLP(width),
    lambda width, rng: Gate(width),
    lambda width, rng: InPlace(width),
    lambda width, rng: Counting(width),
    lambda width, rng: Norm(width),
    lambda width, rng: Attention(width, rng.random() < 0.5),
    lambda width, rng: nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True)),
    lambda width, rng: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Tanh()),
)


# --- models ---------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A trunk of random blocks with shortcuts, shared blocks, side inputs and several outputs.

    Args:
        rng: Decides everything.
        tokens: Whether the input is a row of token numbers.
        sequence: Whether states have an axis between batch and features.
    """

    def __init__(self, rng: random.Random, *, tokens: bool, sequence: bool) -> None:
        super().__init__()
        self.features = rng.choice((4, WIDTH))
        self.enter = nn.Embedding(20, WIDTH) if tokens else nn.Linear(self.features, WIDTH)
        self.pool = tokens and not sequence
        count = rng.randint(2, 10)
        palette = rng.sample(BLOCKS, rng.randint(1, 3))
        blocks = [rng.choice(palette)(WIDTH, rng) for _ in range(count)]
        if rng.random() < 0.15:
            blocks[rng.randrange(count)] = blocks[rng.randrange(count)]  # one block, two places
        self.blocks = nn.ModuleList(blocks)
        # Shortcuts over several blocks, which cross the cuts between.
        pairs = range(rng.choice((0, 0, 1, 2)))
        self.shortcuts = {rng.randrange(1, count + 1): rng.randrange(count) for _ in pairs}
        self.side_reader = rng.randrange(count) if rng.random() < 0.25 else None
        self.early_output = rng.randrange(count) if rng.random() < 0.25 else None
        self.head = nn.Linear(WIDTH, 20 if tokens else 3, bias=not tokens)
        if tokens and rng.random() < 0.5:
            self.head.weight = self.enter.weight
        self.output = rng.choice(("tensor", "tuple", "dict"))
        for parameter in self.parameters():
            if rng.random() < 0.05:
                parameter.requires_grad_(False)

    def forward(self, x: Tensor, side: Tensor | None = None) -> Any:
        x = self.enter(x)
        if self.pool:
            x = x.mean(1)
        states = [x]
        early = None
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index + 1 in self.shortcuts:
                x = x + states[self.shortcuts[index + 1] % len(states)]
            if side is not None and index == self.side_reader:
                x = x * side
            if index == self.early_output:
                early = x
            states.append(x)
        y = self.head(x)
        if self.output == "tensor":
            return y
        extra = early if early is not None else x
        return (y, extra) if self.output == "tuple" else {"logits": y, "state": extra}


def make_case(seed: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a model, its example inputs and the options of its compilation."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokens, sequence = rng.random() < 0.3, rng.random() < 0.4
    model = RandomNet(rng, tokens=tokens, sequence=sequence)
    model.train(rng.random() < 0.5)
    batch = rng.choice((2, 3, 4))
    if tokens:
        x = torch.randint(0, 20, (batch, 6))
    else:
        shape = (batch, 6, model.features) if sequence else (batch, model.features)
        x = torch.randn(shape)
    inputs: tuple[Any, ...] = (x,)
    if model.side_reader is not None:
        inputs += (torch.randn(batch, 6, WIDTH) if sequence else torch.randn(batch, WIDTH),)
    options: dict[str, Any] = {"stages": rng.choice((2, 2, 3, 4, 5, "auto"))}
    if rng.random() < 0.5:
        options["coarse"] = rng.choice(
            ("linear", "lowrank", "conv", "units", "thinned", "zero", "exact", "linear+lowrank")
        )
    if rng.random() < 0.3:
        options["preprocess"] = rng.choice(("linear", "lowrank", "conv", "thinned"))
    if rng.random() < 0.3:
        options["sweep"] = rng.choice(("chain", "collapsed"))
    if rng.random() < 0.25:
        options["iterations"] = rng.choice((2, 3))
    if rng.random() < 0.2:
        options["correction"] = rng.choice(("residual", "difference"))
    if rng.random() < 0.3 and not {"sweep", "iterations"} & options.keys():
        options["windows"] = rng.choice((2, 3))
    return model, inputs, options


# --- the check ------------------------------------------------------------------------------------


def check(seed: int) -> Outcome:
    """Compile the model of a seed, and judge the network."""
    warnings.filterwarnings("ignore")
    model, inputs, options = make_case(seed)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    try:
        detail = _compiled_differs(model, inputs, options)
        kind = "wrong" if detail else "equal"
    except pnn.PnnError as error:
        kind, detail = "refused", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    except Exception as error:
        kind, detail = "foreign", f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    after = model.state_dict()
    changed = any(not torch.equal(value, after[key]) for key, value in before.items())
    if changed or modes != [m.training for m in model.modules()]:
        kind, detail = "wrong", f"the model was changed ({detail})"
    return Outcome(seed, kind, detail, str(options))


def _compiled_differs(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> str:
    compiled = pnn.compile(model, args=inputs, cache=False, **options)
    if reason := _differs(compiled.sequential, model, inputs):
        return f"in sequence: {reason}"
    report = compiled.verify()
    if not report.ok:
        return "; ".join(f"{c.name}: {c.reason}" for c in report.checks if not c.passed)
    gradients = _gradients(compiled.module, inputs)
    if not all(torch.isfinite(g).all() for g in gradients):
        return "gradients of the parareal network are not finite"
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.save(f"{folder}/artifact")
        try:
            loaded = pnn.load(path)
        except pnn.ArtifactError as error:
            if "model=" not in str(error):
                raise
            loaded = pnn.load(path, model=model)
    for name, network in (("module", compiled.module), ("sequential", compiled.sequential)):
        a, b = (_evaluate(n, inputs) for n in (network, getattr(loaded, name)))
        if not all(torch.equal(p, q) for p, q in zip(a, b, strict=True)):
            return f"loaded: {name} differs"
    return ""


def _differs(network: nn.Module, model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Compare outputs, gradients by the model's own names, and buffers, in both modes."""
    bound = bind(model, inputs, {})
    names = {id(p): n for n, p in model.named_parameters()}
    assert names
    for train in (False, True):
        expected = run_one_step(
            model, lambda call: model(*call.args, **call.kwargs), bound, train=train, grad=True
        )
        result = run_one_step(
            network, lambda call: network(**call.tensor_arguments()), bound, train=train, grad=True
        )
        short = _with_names_of(result, model)
        if reason := compare(short, expected, slack=10):
            return f"{'training' if train else 'evaluation'} mode, {reason}"
    return ""


def _with_names_of(result: Any, model: nn.Module) -> Any:
    """Name gradients and buffers as the model does: stages hold them under their own prefix."""
    known = {
        *(n for n, _ in model.named_parameters(remove_duplicate=False)),
        *(n for n, _ in model.named_buffers(remove_duplicate=False)),
    }

    def short(name: str) -> str:
        parts = name.split(".")
        tails = (".".join(parts[i:]) for i in range(len(parts)))
        return next((tail for tail in tails if tail in known), name)

    return replace(
        result,
        gradients={short(n): g for n, g in result.gradients.items()},
        changed={short(n): v for n, v in result.changed.items()},
    )


def _gradients(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    network = copy.deepcopy(network).train()
    leaves = [o for o in pytree.tree_leaves(network(*inputs)) if o.requires_grad]
    sum((o.square().mean() for o in leaves), torch.zeros(())).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def _evaluate(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        return pytree.tree_leaves(network(*copy.deepcopy(inputs)))


# --- many -----------------------------------------------------------------------------------------


def check_many(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """Check seeds in processes of their own; yield outcomes as they come."""
    if jobs == 1:
        yield from map(check, seeds)
        return
    with multiprocessing.get_context("forkserver").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(check, seeds, chunksize=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Check seeds and print a table; return 1 if an outcome is wrong or foreign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    chosen = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for outcome in check_many(range(chosen.seed, chosen.seed + chosen.count), chosen.jobs):
        counts[outcome.kind] += 1
        if outcome.kind == "refused":
            refusals["".join(c for c in outcome.detail if not c.isdigit())[:90]] += 1
        elif outcome.kind != "equal":
            print(f"seed {outcome.seed}: {outcome.kind}: {outcome.detail} [{outcome.options}]")
            sys.stdout.flush()
    print("\n| outcome | models |\n|---|---|")
    for kind in ("equal", "refused", "wrong", "foreign"):
        print(f"| {kind} | {counts[kind]} |")
    print("\nrefusals:")
    for text, number in refusals.most_common(12):
        print(f"{number:6d}  {text}")
    return int(bool(counts["wrong"] or counts["foreign"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    sys.exit(main())
