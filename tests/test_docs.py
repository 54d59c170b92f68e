"""The examples in docstrings and in the README run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import operator
import re
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

import kdci_ext
from python_models.config import leaves

MODULES = ["", "._load", ".functional", ".modules", ".streaming"]
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


def test_every_command_is_a_call_in_the_readme(monkeypatch, tmp_path):
    """Its blocks on python_models import what they name and give settings that exist; what would
    train for minutes is not called.
    """
    functions = {
        "train-teacher": "teacher.train_teacher",
        "distill": "engine.distill",
        "evaluate": "evaluate.evaluate",
        "report": "report.report",
        "study": "study.run_study",
        "demo": "demo.demo",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "fast").mkdir(parents=True)
    (tmp_path / "runs" / "fast" / "config.yaml").write_text("method: fast")
    calls = {}
    for command, name in functions.items():
        module, _, function = name.partition(".")
        module = importlib.import_module(f"python_models.{module}")
        calls[command] = create_autospec(getattr(module, function))
        monkeypatch.setattr(module, function, calls[command])
    for block in re.findall(r"^```py\n(.*?)^```", README, re.M | re.S):
        exec(compile(block, "README.md", "exec"), {})
    for command, call in calls.items():
        assert f"kdci {command}" in README
        assert call.called, command
        for arguments in call.call_args_list:
            for _, hint, value in leaves(arguments.args[0]):
                assert "Path" not in str(hint) or not isinstance(value, str)


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
    ]
    for name in functions:
        doc = operator.attrgetter(name)(kdci_ext).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Example:"):
            assert section in doc, (name, section)
