# SPDX-License-Identifier: Apache-2.0
"""The page's HTML: escaped, with nothing that is loaded from elsewhere and no scripts."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

GENERATOR = "kdci report"
"""Name in the page's head, by which a later report knows that it may replace it."""

NOT_KNOWN = "\N{EN DASH}"
"""In place of a number."""

LARGE = 600
"""Width of a picture, in pixels, above which it may not shrink to a phone's."""

_NUMBER = re.compile(rf"[+-]?[\d,.]+( (%|points))?|{NOT_KNOWN}")


class Markup(str):
    """HTML that is ready: everything else is text and gets escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its id.
        title: Its heading.
        body: What it holds, in order.
    """

    anchor: str
    title: str
    body: Sequence[Markup]


def escape(text: str) -> Markup:
    """Return text as HTML; `Markup` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def paragraph(text: str, kind: str = "") -> Markup:
    """Return a paragraph, of a CSS class if wanted."""
    attribute = f' class="{kind}"' if kind else ""
    return Markup(f"<p{attribute}>{escape(text)}</p>")


def code(text: str) -> Markup:
    """Return text as code, which may be broken anywhere."""
    return Markup(f"<code>{escape(text)}</code>")


def heading(text: str) -> Markup:
    """Return a heading within a section."""
    return Markup(f"<h3>{escape(text)}</h3>")


def warning(text: str) -> Markup:
    """Return a box that says what is wrong."""
    return Markup(f'<p class="warning"><strong>Warning:</strong> {escape(text)}</p>')


def details(summary: str, body: Markup) -> Markup:
    """Return something that the reader may open."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{body}</details>")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return a table whose first column names the rows; wide ones scroll sideways."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    head = "".join(
        f'<th scope="col"{_alignment(*cells)}>{escape(name)}</th>'
        for name, cells in zip(header, columns, strict=True)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_alignment(cell)}>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    label = html.escape(caption)
    return Markup(
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _alignment(*cells: str) -> str:
    return ' class="number"' if all(map(_NUMBER.fullmatch, cells)) else ""


def picture(png: bytes, alt: str, caption: str) -> Markup:
    """Return an embedded PNG picture.

    Args:
        png: The file.
        alt: What it shows, for those who cannot see it.
        caption: Text below it.
    """
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    # Only what would become illegible on a phone scrolls there.
    kind = ' large" tabindex="0"' if width > LARGE else '"'
    return Markup(
        f'<figure><div class="paper{kind}><img src="data:image/png;base64,{data}" '
        f'width="{width}" height="{height}" alt="{html.escape(alt)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def document(title: str, lead: Sequence[Markup], sections: Sequence[Section]) -> str:
    """Return the whole page.

    Args:
        title: Of the page.
        lead: What comes before all sections.
        sections: The rest.
    """
    style = (resources.files("python_models.report") / "style.css").read_text(encoding="utf-8")
    links = "".join(
        f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections
    )
    parts = "".join(
        f'<section aria-labelledby="{section.anchor}"><h2 id="{section.anchor}">'
        f"{escape(section.title)}</h2>{''.join(section.body)}</section>\n"
        for section in sections
    )
    # The policy lets nothing be loaded that is not in the page, whatever a name in it holds.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{"".join(lead)}</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{parts}</main>
</body>
</html>
"""
