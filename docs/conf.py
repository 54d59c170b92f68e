# SPDX-License-Identifier: Apache-2.0
"""The documentation site: ``sphinx-build -W docs build/docs``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
# The benchmarks, whose tables are shown, are not installed.
sys.path += [str(HERE.parent), str(HERE / "_extensions")]

project = "kdci_ext"
author = "The kdci_ext authors"
copyright = f"{author}. Apache-2.0"
exclude_patterns = ["_extensions"]

extensions = [
    "myst_parser",  # pages in Markdown
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    # Those of this site, in _extensions.
    "mathml",
    "generated",
    "links",
]
myst_enable_extensions = ["dollarmath", "attrs_block"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes, but quotes as they are typed

default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 72
napoleon_use_ivar = True  # attributes are listed once

html_theme = "furo"
html_title = "kdci_ext"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
