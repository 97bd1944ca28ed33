"""Recipes for the trainers that people use: short, and they run."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from examples.coverage.operators import declare

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NEEDS = {
    "with_accelerate": ("accelerate",),
    "with_dataloader": (),
    "with_lightning": ("lightning",),
    "with_trainer": ("transformers", "accelerate"),
}
RUN = """
import runpy, sys
from examples.coverage.operators import declare
declare()
runpy.run_path(sys.argv[1])
"""


def run(recipe: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(RECIPES / f"{recipe}.py"), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES.parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_listed_and_short() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in RECIPES.glob("*.py")}
    assert lengths.keys() == NEEDS.keys()
    assert max(lengths.values()) <= 30


def test_a_recipe_of_torch_alone_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(RECIPES / "with_dataloader.py"))


@pytest.mark.parametrize("recipe", [recipe for recipe, libraries in NEEDS.items() if libraries])
def test_a_recipe_runs(recipe: str, tmp_path: Path) -> None:
    declare()
    for library in NEEDS[recipe]:
        pytest.importorskip(library)
    output = run(recipe, tmp_path)
    if recipe == "with_trainer":  # goes on from its last checkpoint
        assert output.splitlines()[-1] == run(recipe, tmp_path, "--resume").splitlines()[-1]
