"""Make Great Expectations' Data Docs readable without a network, equal for equal input, with a front page of ours.

As generated they load 18 files from content networks and a logo that carries an identifier; without them status
icons are invisible (mlflow_gx_mds_s3.md 2.3).
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

Table = tuple[str, Sequence[str], Iterable[Sequence[object]]]
_ICONS = {"fa-check": "✔", "fa-times": "✖", "fa-exclamation": "⚠", "fa-question": "?", "fa-comment": "💬"}
_REMOTE = (
    r"<script\b.*?</script>",
    r"<link\b[^>]*>",
    r"<img\b[^>]*>",
    r"<footer\b.*?</footer>",
    r"url\('https?://[^']*'\)[^;]*;",
)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LOAD_TIME = re.compile(r"\d{8}T\d{6}\.\d+Z(?=</span>)")
_STYLE = """<style>
body { font-family: sans-serif; margin: 1rem 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
.alert { background: #eef2f5; padding: .5rem 1rem; margin: .5rem 0; }
.modal, .ge-walkthrough-modal, #ge-cta-footer, .btn-group, .cooltip .top { display: none; }
.text-success { color: #18753c; } .text-danger { color: #b3261e; } .text-warning { color: #9a6700; }
i { font-style: normal; font-weight: bold; }
</style>"""


def make_readable_offline(folder: Path) -> None:
    """Rewrite every page below `folder`: nothing remote is loaded or linked, icons are characters, ids are stable."""
    for page in folder.rglob("*.html"):
        page.write_text(_offline(page.read_text()))
    shutil.rmtree(folder / "static", ignore_errors=True)


def write_front_page(folder: Path, *, title: str, tables: Sequence[Table]) -> None:
    """Replace `index.html`, whose contents the generated page builds with scripts from the network.

    Args:
        folder: Data Docs.
        title: heading above all tables.
        tables: (heading, column names, rows) each.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, columns, rows in tables:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>\n" for row in rows)
        parts.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>\n{body}</table>")
    pages = sorted(page.relative_to(folder) for page in folder.rglob("*.html") if page.name != "index.html")
    links = "".join(f'<li><a href="{page}">{html.escape(page.parts[0])}</a></li>' for page in pages)
    parts.append(f"<h2>Pages of Great Expectations</h2><ul>{links}</ul>")
    head = f'<meta charset="UTF-8"><title>Data Docs</title>{_STYLE}'
    content = "\n".join(["<!DOCTYPE html>", f"<html><head>{head}</head><body>", *parts, "</body></html>\n"])
    (folder / "index.html").write_text(content)


def _offline(text: str) -> str:
    for pattern in _REMOTE:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r'<a\b[^>]*href="https?://[^>]*>(.*?)</a>', r"\1", text, flags=re.DOTALL)
    text = re.sub(r"<i\b([^>]*)>", lambda tag: tag[0] + _icon(tag[1]), text)
    numbers: dict[str, str] = {}
    text = _UUID.sub(lambda found: numbers.setdefault(found[0], f"part-{len(numbers)}"), text)
    text = _LOAD_TIME.sub("", text)
    return text.replace("</head>", f"{_STYLE}</head>", 1)


def _icon(attributes: str) -> str:
    return next((character for name, character in _ICONS.items() if name in attributes), "")
