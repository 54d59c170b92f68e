"""The examples in docstrings and in the README run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import operator
import re
from pathlib import Path

import pytest
import torch

import kdci_ext

MODULES = ["", "._load", ".distributed", ".functional", ".modules", ".streaming"]
README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    module = importlib.import_module(f"kdci_ext{module}")
    names = {name: getattr(kdci_ext.functional, name) for name in kdci_ext.functional.__all__}
    result = doctest.testmod(module, extraglobs={"torch": torch, **names, **vars(kdci_ext)})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_readme_examples(number):
    """Each Python block of the README stands alone."""
    exec(compile(PYTHON_BLOCKS[number], f"README.md, block {number}", "exec"), {})


def test_readme_has_its_examples_and_commands():
    assert len(PYTHON_BLOCKS) >= 2
    assert "```bash tests\n" in README


def test_public_names_are_documented():
    """Everything exported carries a docstring; functions say what they return."""
    for name in kdci_ext.__all__:
        assert getattr(kdci_ext, name).__doc__, name
    functions = [
        *("functional.compensate", "functional.compensated_kd_loss"),
        *("functional.confounder_dictionary", "streaming.stream_confounder_dictionary"),
        *("streaming.column_moments", "streaming.partial_sums"),
        "distributed_confounder_dictionary",
    ]
    for name in functions:
        doc = operator.attrgetter(name)(kdci_ext).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Example:"):
            assert section in doc, (name, section)
