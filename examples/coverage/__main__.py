"""`python -m examples.coverage run` fills the results; `table` prints them as Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from examples.coverage.apart import check_apart
from examples.coverage.catalog import specifications
from examples.coverage.table import table

RESULTS = Path(__file__).parent / "results" / "rows.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.coverage", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="check the models that have no result yet")
    run.add_argument("--only", default="", metavar="TEXT", help="models whose line holds TEXT")
    run.add_argument("--again", action="store_true", help="forget the failures among them first")
    run.add_argument("--jobs", type=int, default=1, help="processes side by side")
    run.add_argument("--limit", type=float, default=120.0, help="processor seconds per model")
    run.add_argument("--results", type=Path, default=RESULTS)
    show = commands.add_parser("table", help="print the results as Markdown")
    show.add_argument("--results", type=Path, default=RESULTS)
    one = commands.add_parser("one", help="check one model in this process")
    one.add_argument("model")
    words = parser.parse_args()
    if words.command == "one":
        _one(words.model)
    elif words.command == "table":
        rows = _read(words.results)
        print(f"{len(rows)} of {len(specifications())} models checked.\n\n{table(rows)}")
    else:
        _run(words)


def _one(text: str) -> None:
    from examples.coverage.check import check

    specification = next(each for each in specifications() if each.text == text)
    print(json.dumps(check(specification)))


def _run(words: argparse.Namespace) -> None:
    known = {each.text: number for number, each in enumerate(specifications())}
    rows = [row for row in _read(words.results) if row["model"] in known]
    if words.again:
        rows = [row for row in rows if row["ok"] or words.only not in row["model"]]
    done = {row["model"] for row in rows}
    todo = [s for s in specifications() if words.only in s.text and s.text not in done]
    with ThreadPoolExecutor(words.jobs) as pool:
        running = [pool.submit(check_apart, specification, words.limit) for specification in todo]
        for number, future in enumerate(as_completed(running), 1):
            row = future.result()
            rows.append(row)
            _write(words.results, sorted(rows, key=lambda r: known[r["model"]]))
            verdict = "ok" if row["ok"] else f"{row.get('phase')}: {row['cause']}"
            print(
                f"{number}/{len(todo)} {row['seconds']:5.1f} s  {row['model']}  {verdict}",
                flush=True,
            )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
