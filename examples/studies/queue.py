"""Many networks of the studies at once on one GPU: a queue of jobs, and processes that take them.

    python -m examples.studies.queue --preset gpu-short --data FOLDER --jobs 6 --minutes 8
    nice -n 19 python -m examples.studies.queue --preset cpu-converged --device cpu --tasks vgg \
        --data FOLDER --jobs 2 --minutes 180

Small networks leave a GPU waiting for the next kernel, so several share it. The most telling
comparisons come first, and every row is written as soon as it is there: what is cut off loses
little, and a queue that is started again skips the jobs whose rows are there. A job that fails
prints its traceback; the others go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from examples.studies.accuracy import FORMS, RESULTS, STUDIES, Study, append
from examples.studies.presets import PRESETS, Preset
from examples.studies.regimes import REGIMES
from examples.studies.tasks import TASKS, Task, make_task
from examples.studies.training import Originals

__all__ = ["Job", "Settings", "finished", "jobs", "main", "work"]


@dataclass(frozen=True)
class Job:
    """What one process does at a time.

    Attributes:
        task: Name of the task.
        study: Name of the study.
        seed: Seed.
        only: Networks whose name holds one of these texts; all if empty.
        stages: Numbers N of stages; the preset's if empty.
    """

    task: str
    study: str
    seed: int
    only: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What all jobs share.

    Attributes:
        preset: Name of the preset.
        data: Folder of the images.
        device: Where to train.
        results: File that rows are added to.
        originals: Folder of the trained originals.
        threads: Threads of every process.
        stop: When to stop, in seconds since the epoch.
    """

    preset: str
    data: Path
    device: str
    results: Path
    originals: Path
    threads: int
    stop: float


def jobs(seeds: Sequence[int], stages: Sequence[int]) -> list[Job]:
    """Every job: VGG-16 at three stages, the residual network at any, then the decoder.

    Args:
        seeds: Seeds; what the first one misses comes before the last one begins.
        stages: Numbers N of stages of the residual network.
    """
    original = ("original",)
    shorter = [("same latency",), ("latency of units",)]
    forms = [*shorter, *((name,) for name in FORMS)]
    converted = "parareal, auto", "early exit", "layers dropped"
    residual = "parareal, thinned", "layers in parallel"  # VGG has neither

    def scratch(task: str, seed: int, stages: Sequence[int]) -> list[Job]:
        return [Job(task, "scratch", seed, form, (n,)) for n in stages for form in forms]

    def conversion(task: str, seed: int, stages: Sequence[int]) -> list[Job]:
        names = converted if task == "vgg" else (*converted, *residual)
        return [Job(task, "conversion", seed, names, (n,)) for n in stages]

    first, *others = seeds
    found = [Job("vgg", "scratch", seed, original) for seed in seeds]
    latency, *parareal = scratch("vgg", first, (3,))
    found += [Job("cifar10", "scratch", first, original), latency]
    for seed in seeds:
        found += conversion("vgg", seed, (3,))
    found += [*parareal, *conversion("cifar10", first, stages)]
    for seed in others:  # an original well before what waits for it
        found += [Job("cifar10", "scratch", seed, original), *scratch("vgg", seed, (3,))]
    found += [Job("vgg", "attempts", seed, ("with dropout",), (3,)) for seed in seeds]
    for seed in others:
        found += conversion("cifar10", seed, stages)
    for seed in seeds:
        found += scratch("cifar10", seed, stages)
    for seed in seeds:
        found += [Job("text", "scratch", seed, original), *scratch("text", seed, stages)]
    found += [
        Job("text", "scratch", seed, (name,), (stages[0],)) for seed in seeds for name in REGIMES
    ]
    return [*found, *(Job("vgg", "attempts", seed, stages=(3,)) for seed in seeds)]


def finished(job: Job, preset: str, results: Path) -> bool:
    """Whether the results hold a row for every network that a job names."""
    if not job.only or not results.exists():
        return False
    key = {"task": job.task, "study": job.study, "preset": preset, "seed": job.seed}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows = [row for row in rows if key.items() <= row.items()]
    if job.stages:
        rows = [row for row in rows if row["stages"] in job.stages]
    return {*job.only} <= {row["network"] for row in rows}


def work(waiting: Any, settings: Settings) -> None:
    """Take jobs until none is left or the time is over.

    Args:
        waiting: A queue of jobs.
        settings: What they share.
    """
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")
    tasks: dict[str, Task] = {}
    while time.time() < settings.stop:
        try:
            job = waiting.get(timeout=1)
        except Empty:
            return
        try:
            _run(job, settings, tasks)
        except Exception:
            print(f"FAILED {job}\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def _run(job: Job, settings: Settings, tasks: dict[str, Task]) -> None:
    start = time.time()
    preset: Preset = PRESETS[settings.preset]
    if job.stages:
        preset = replace(preset, stages=job.stages)
    if job.task not in tasks:
        tasks[job.task] = make_task(job.task, settings.data, preset, settings.device)
    study = Study(tasks[job.task], preset, job.seed, job.only, Originals(settings.originals))
    for row in STUDIES[job.study](study):
        append(settings.results, {"task": job.task, "preset": settings.preset, **row})
    print(f"{time.time() - start:.1f} s: {job} in {os.getpid()}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the jobs of a preset."""
    parser = argparse.ArgumentParser(description="Many networks of the studies at once.")
    parser.add_argument("--preset", choices=list(PRESETS), default="gpu")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=6, help="processes at once")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--networks", nargs="+", help="networks to train; all if not said")
    parser.add_argument("--most", type=int, help="jobs to take at most")
    parser.add_argument("--originals", type=Path, help="folder that keeps the trained originals")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    stop = time.time() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="pnn-originals-") as folder:
        settings = Settings(
            options.preset, options.data, options.device, options.results,
            options.originals or Path(folder),
            max(1, torch.get_num_threads() // options.jobs), stop,
        )  # fmt: skip
        context = multiprocessing.get_context("spawn")
        waiting = context.Queue()
        wanted = [
            job
            for job in jobs(options.seeds, PRESETS[options.preset].stages)
            if job.task in options.tasks
            and job.study in options.studies
            and (not options.networks or {*job.only} & {*options.networks})
            and not finished(job, options.preset, options.results)
        ]
        for job in wanted[: options.most]:
            waiting.put(job)
        workers = [
            context.Process(target=work, args=(waiting, settings), daemon=True)
            for _ in range(options.jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, stop - time.time()))
        late = [worker for worker in workers if worker.is_alive()]
        for worker in late:
            worker.terminate()
        waiting.cancel_join_thread()
    print(f"stopped {len(late)} of {len(workers)} processes at the end", file=sys.stderr)


if __name__ == "__main__":
    main()
