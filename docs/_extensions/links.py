# SPDX-License-Identifier: Apache-2.0
"""Checks that every link inside the built site leads to a file, and to a place in it.

Sphinx warns of references that it cannot resolve, but not of plain links: those of included files,
of raw HTML and of the theme.
"""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class _Page(HTMLParser):
    """Where a page leads, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.places.add(value)
            elif name == "href" or (name == "src" and tag in ("img", "script", "source")):
                self.links.append(value)


def broken_links(folder: Path) -> list[str]:
    """Return ``PAGE: LINK`` for every link between the files of a folder that leads nowhere."""
    read = cache(_Page)
    broken = []
    for path in sorted(folder.rglob("*.html")):
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            is_there = target.is_file()
            if is_there and parts.fragment and target.suffix == ".html":
                is_there = unquote(parts.fragment) in read(target).places
            if not is_there:
                broken.append(f"{path.relative_to(folder)}: {link}")
    return broken


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    from sphinx.errors import SphinxError

    broken = broken_links(Path(app.outdir))
    if broken:
        raise SphinxError("links that lead nowhere:\n  " + "\n  ".join(broken))


def setup(app: Sphinx) -> dict[str, Any]:
    """Check whenever a site is built."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
