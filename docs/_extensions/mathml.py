# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, which browsers show themselves: no script, no font and no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
PRIME = "\N{PRIME}"
ElementTree.register_namespace("", NAMESPACE)


def render(latex: str, display: str = "inline") -> str:
    """Return a formula as MathML."""
    root = ElementTree.fromstring(convert(latex, display=display))
    for element in list(root.iter()):
        _lower_prime(element)
        _join_words(element)
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


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
