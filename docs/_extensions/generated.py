# SPDX-License-Identifier: Apache-2.0
"""Directives for the tables that are made of code and result files, see `tables.TABLES`."""

from __future__ import annotations

from typing import Any

import tables
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Generated(SphinxDirective):
    """A table by name; the argument is what its function takes."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Make the table and parse it as Markdown."""
        try:
            text = tables.TABLES[self.name](*self.arguments)
        except (ValueError, FileNotFoundError) as error:
            raise self.error(str(error)) from error
        parsed = self.parse_text_to_nodes(text)
        for node in parsed:
            for table in node.findall(nodes.table):
                table["classes"].append(self.name)  # for site.css
        return parsed


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name in tables.TABLES:
        app.add_directive(name, Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
