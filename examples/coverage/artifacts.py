"""Whole artifacts: compile, save, load without the model's library, verify, run on two ranks.

    nice python -m examples.coverage.artifacts --count 100

Every chunk of models goes through three kinds of processes: one that builds and saves with default
settings, one that loads and verifies and may not import the library of the model, and two ranks.
Rows are written as they come; a second start skips the models that have one, but for those with a
problem under `--again`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from examples.coverage.catalog import Specification, specifications
from pnn_compile.runtime.local_ranks import run_on_ranks

RESULTS = Path(__file__).parent / "results" / "artifacts.jsonl"
LIBRARIES = ("transformers", "timm", "torchvision")
_PATIENCE = 900.0  # seconds for a chunk


def sums(output: Any) -> float:
    """Return one number of an output, the same wherever it is computed."""
    values = [*output.values()] if hasattr(output, "keys") else output
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.detach().double().nan_to_num().abs().sum().item() for leaf in leaves)


def save_models(chunk: Sequence[Specification], folder: str) -> dict[str, Any]:
    """Compile and save every model; return by its text the sum of outputs, or the error."""
    import pnn_compile as pnn
    from examples.coverage.operators import declare
    from pnn_compile.sources import load_source

    declare()
    found: dict[str, Any] = {}
    for number, specification in enumerate(chunk):
        try:
            source = load_source(
                specification.source, specification.inputs, specification.arguments
            )
            compiled = pnn.compile(
                source.model, args=source.args, kwargs=source.kwargs, stages=2, cache=False
            )
            compiled.save(f"{folder}/{number}")
            network = compiled.module.eval()
            with torch.no_grad():
                found[specification.text] = sums(network(**compiled.program.args))
        except Exception as error:
            found[specification.text] = f"compile or save: {_first(error)}"
    return found


def load_artifacts(folders: Sequence[str]) -> dict[str, Any]:
    """Load and verify every artifact where no library of models can be imported."""
    import pnn_compile as pnn

    found: dict[str, Any] = {}
    for name in LIBRARIES:
        sys.modules[name] = None  # type: ignore[assignment]
    for folder in folders:
        try:
            compiled = pnn.load(folder)
            report = compiled.verify()
            with torch.no_grad():
                found[folder] = sums(compiled.module.eval()(**compiled.program.args))
            if not report.ok:
                failed = [f"{c.name}: {c.reason}" for c in report.checks if not c.passed]
                found[folder] = f"verify: {'; '.join(failed)}"
        except Exception as error:
            found[folder] = f"load: {_first(error)}"
    return found


def run_artifacts(device: torch.device, folders: Sequence[str]) -> dict[str, Any]:
    """Run every artifact on this rank; the last one has the outputs."""
    import pnn_compile as pnn

    found: dict[str, Any] = {}
    for folder in folders:
        try:
            module = pnn.runtime.distribute(folder).eval()
            with torch.no_grad():
                found[folder] = sums(module(**module.whole.program.args))
        except Exception as error:
            found[folder] = f"two ranks: {_first(error)}"
            break  # ranks take no step after one that failed
    return found


def check_chunk(chunk: Sequence[Specification]) -> list[dict[str, Any]]:
    """Return a row for every model of a chunk; models whose process breaks are tried singly."""
    try:
        return _check_together(chunk)
    except Exception as error:
        if len(chunk) > 1:
            return [row for specification in chunk for row in check_chunk([specification])]
        (specification,) = chunk
        problem = f"crash: {_first(error)}"
        return [{"model": specification.text, "group": specification.group, "problem": problem}]


def _check_together(chunk: Sequence[Specification]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        saved = _apart(save_models, chunk, folder)
        paths = {s.text: f"{folder}/{number}" for number, s in enumerate(chunk)}
        whole = [path for text, path in paths.items() if isinstance(saved[text], float)]
        loaded = _apart(load_artifacts, whole)
        good = [path for path in whole if isinstance(loaded[path], float)]
        ran = run_on_ranks(run_artifacts, 2, good)[-1] if good else {}
    rows = []
    for specification in chunk:
        path, expected = paths[specification.text], saved[specification.text]
        problem = expected if isinstance(expected, str) else ""
        for step, results in (("load", loaded), ("two ranks", ran)):
            value = 0.0 if problem else results[path]
            if not problem and isinstance(value, str):
                problem = value
            elif not problem and abs(value - expected) > 1e-4 * max(1.0, abs(expected)):
                problem = f"{step}: {value} instead of {expected}"
        rows.append({"model": specification.text, "group": specification.group, "problem": problem})
    return rows


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *arguments).result(_PATIENCE)


def _first(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _spread(items: Sequence[Specification], count: int) -> Iterable[Specification]:
    """Take so many items, evenly over the list."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="models, spread over the list")
    parser.add_argument("--chunk", type=int, default=8, help="models that share their processes")
    parser.add_argument("--again", action="store_true", help="forget the rows with a problem first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    done = []
    if words.results.exists():
        done = [json.loads(line) for line in words.results.read_text().splitlines()]
    if words.again:
        done = [row for row in done if not row["problem"]]
        words.results.write_text("".join(json.dumps(row) + "\n" for row in done))
    checked = {row["model"] for row in done}
    left_out = ("zoo:", "hf:dbrx")  # in the test suite; transformers does not build it
    listed = [s for s in specifications() if not s.text.startswith(left_out)]
    todo = [s for s in _spread(listed, words.count) if s.text not in checked]
    for start in range(0, len(todo), words.chunk):
        rows = check_chunk(todo[start : start + words.chunk])
        done += rows
        with words.results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            print(f"{row['model']}: {row['problem'] or 'ok'}", flush=True)
    problems = Counter(row["problem"].partition(":")[0] or "ok" for row in done)
    print(f"\n{len(done)} models: {dict(problems)}")


if __name__ == "__main__":
    main()
