"""Hooks of the site: pages that lie elsewhere, links into the source, formulas, command help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "examples" / "studies"
CODE = re.compile(r"(```.*?```|`[^`]*`)", re.DOTALL)
SYMBOL = re.compile(
    r"(?<![\w}])(?P<letter>[A-Za-zΣ]\u0303?)(?:\^(?P<up>\{[^}]*\}|\w))?_(?P<down>\{[^}]*\}|\w(?!\w))"
)
"""A symbol with an index, such as u_j, u_{j-1} or U^{k+1}_j."""
STYLE = "td:first-child code { white-space: nowrap }\ndd { margin-top: 0 !important }\n"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+\.\w+|[^)#\s]+/)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the studies, which lie beside their code, and the style."""
    del kwargs
    for page in sorted(STUDIES.glob("*.md")):
        files.append(File.generated(config, f"studies/{page.name}", abs_src_path=str(page)))
    files.append(File.generated(config, "site.css", content=STYLE))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Point links at pages of the site; of files that are none, keep the text.

    Links that lead nowhere stay, so that `mkdocs build --strict` reports them.
    """
    del kwargs
    folder = STUDIES if page.file.src_uri.startswith("studies/") else ROOT / "docs"

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if target.startswith("http") or not path.exists():
            return match[0]
        site = "../" if folder == STUDIES else ""
        if path.parent == STUDIES and path.suffix == ".md":
            return f"[{text}]({site}studies/{path.name}{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"[{text}]({site}{path.relative_to(ROOT / 'docs')}{anchor})"
        name = f"`{path.relative_to(ROOT)}`"
        return name if text.strip("`") == name.strip("`") else f"{text} ({name})"

    markdown = LINK.sub(rewrite, markdown).replace("../../docs/", "../")
    parts = CODE.split(markdown)
    parts[::2] = [SYMBOL.sub(_typeset, part) for part in parts[::2]]
    return "".join(parts)


def _typeset(match: re.Match[str]) -> str:
    """Return a symbol with its indices below and above the line."""
    up = f"<sup>{match['up'].strip('{}')}</sup>" if match["up"] else ""
    return f"{match['letter']}{up}<sub>{match['down'].strip('{}')}</sub>"


def on_page_content(html: str, page: Page, **kwargs: Any) -> str:
    """Keep the lines of the help texts, and leave out defaults that there are not."""
    del kwargs
    if page.file.src_uri != "command_line.md":
        return html

    def keep(match: re.Match[str]) -> str:
        listed = re.search(r"^(  |pnn-compile )", match[1], re.MULTILINE)
        return f"<pre><code>{match[1]}</code></pre>" if listed else match[0]

    html = html.replace("<code>Sentinel.UNSET</code>", "")
    return re.sub(r"<p>(?!<)([^<]*\n[^<]*)</p>", keep, html)
