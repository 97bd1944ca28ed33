"""Pages of the documentation: their Python runs, and their links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "examples" / "studies", ROOT / "tests" / "fuzz")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
RUN = ("loops_in_time.md", "write_a_pass.md")
"""Pages whose blocks of Python are one program, from top to bottom."""


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
