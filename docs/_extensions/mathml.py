# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, which browsers show themselves, without a script or a network.

They need a font that says how mathematics is set, which phones have not. So the characters that
occur in formulas are taken out of STIX Two Math (SIL Open Font License), 48 kB, and become a part
of the site.
"""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from docutils import nodes
from fontTools import subset
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
PRIME = "\N{PRIME}"
FONT = "stix-two-math.woff"  # as _static/site.css calls it
CHARACTERS = (
    *range(0x20, 0x7F),
    0xAF,  # the bar of a mean
    *range(0x391, 0x3CA),  # Greek
    0x2016,  # norms
    0x2026,
    0x2032,
    0x210E,  # h, which mathematical italic leaves out
    *range(0x2190, 0x2194),  # arrows
    *range(0x2200, 0x22D0),  # operators
    *range(0x1D434, 0x1D468),  # mathematical italic, Latin and Greek
    *range(0x1D6E2, 0x1D71C),
)
ElementTree.register_namespace("", NAMESPACE)


def render(latex: str, display: str = "inline") -> str:
    """Return a formula as MathML."""
    root = ElementTree.fromstring(convert(latex, display=display))
    for element in list(root.iter()):
        _lower_prime(element)
        _join_words(element)
        if element.text in ("|", "\N{DOUBLE VERTICAL LINE}"):
            element.attrib.update(stretchy="false", lspace="0", rspace="0")
        if element.text == "log":
            element.tag = f"{{{NAMESPACE}}}mo"
            element.attrib.update(form="prefix", lspace="0.17em", rspace="0.17em")
        if element.text == "~":  # \sim
            element.tag, element.text = f"{{{NAMESPACE}}}mo", "\N{TILDE OPERATOR}"
    return ElementTree.tostring(root, encoding="unicode")


def _lower_prime(element: ElementTree.Element) -> None:
    """Put a prime beside its base: the character is a superscript as it is."""
    kind = element.tag.rpartition("}")[2]
    if kind not in ("msup", "msubsup") or element[-1].text != PRIME:
        return
    base, prime = element[0], element[-1]
    prime.tag = f"{{{NAMESPACE}}}mo"
    prime.attrib.update(lspace="0", rspace="0")
    element.remove(prime)
    row = ElementTree.Element(f"{{{NAMESPACE}}}mrow")
    row.extend([base, prime])
    element[0] = row
    element.tag = f"{{{NAMESPACE}}}{'mrow' if kind == 'msup' else 'msub'}"


def _join_words(element: ElementTree.Element) -> None:
    """Make one upright name of its letters, which come one by one."""
    if len(element) > 1 and all(child.get("mathvariant") == "normal" for child in element):
        element[0].text = "".join(child.text or "" for child in element)
        for child in element[1:]:
            element.remove(child)


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{render(node.astext())}</span>')
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{render(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def _write_font(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table
    # What the names say of copyright and licence stays.
    options = subset.Options(
        flavor="woff", layout_features=[], hinting=False, name_IDs=[0, 1, 2, 13, 14]
    )
    source = resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    font = subset.load_font(str(source), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(font)
    subset.save_font(font, str(Path(app.outdir) / "_static" / FONT), options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer as ``html_math_renderer = "mathml"``."""
    app.connect("build-finished", _write_font)
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
