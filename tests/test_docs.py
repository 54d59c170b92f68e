"""The examples in docstrings, the README and the documentation run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import operator
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from unittest.mock import create_autospec

import pytest
import torch

import kdci_ext
from python_models.cli import main
from python_models.config import leaves, preset_paths, study_paths
from python_models.data import DATASETS
from python_models.methods import METHODS
from python_models.networks import NETWORKS

MODULES = ["", "._load", ".distributed", ".functional", ".modules", ".streaming"]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
# What a page of the documentation does: Python, commands, and files that it shows.
STEP = re.compile(
    r"^```(?:(?P<kind>python|bash run)|\{code-block\} python\n:caption: (?P<file>\S+)\n)\n"
    r"(?P<text>.*?)^```",
    re.M | re.S,
)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if STEP.search(page.read_text())]


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
        "distill": "distill.distill",
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
        "distributed_confounder_dictionary",
    ]
    for name in functions:
        doc = operator.attrgetter(name)(kdci_ext).__doc__
        for section in ("Args:", "Returns:", "Raises:", "Example:"):
            assert section in doc, (name, section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_work_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder: files are written, commands succeed, Python blocks are one session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (METHODS, NETWORKS, DATASETS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    known = dict(sys.modules)
    session: dict[str, object] = {"__name__": "session"}
    try:
        for number, step in enumerate(STEP.finditer(page.read_text())):
            if step["file"]:
                Path(step["file"]).write_text(step["text"].lstrip("\n"))
            elif step["kind"] == "python":
                exec(compile(step["text"], f"{page.name}, step {number}", "exec"), session)
            else:
                for line in step["text"].replace("\\\n", " ").splitlines():
                    command, *words = shlex.split(line)
                    assert command == "kdci"
                    assert main(words) == 0, line
    finally:
        for name in set(sys.modules) - set(known):
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tables of the documentation."""
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return importlib.import_module("tables")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "noise"])
def test_methods_have_their_pages(name: str, tables: ModuleType) -> None:
    """A page shows every setting with its description and every preset with its source."""
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert f"```{{settings}} {name}\n" in page
    assert f"```{{presets}} {name}\n" in page
    shown = tables.settings(name)
    for field in fields(METHODS.get(name).Settings):
        line = next(
            line for line in shown.splitlines() if f"`--{field.name.replace('_', '-')}`" in line
        )
        assert len(line.split(" | ")[-1]) > 10, line


def test_every_preset_is_on_a_page(tables: ModuleType) -> None:
    shown = "".join(tables.presets(name) for name in METHODS)
    for name in preset_paths():
        assert f"| `{name}` | " in shown


def test_every_command_is_documented(tables: ModuleType) -> None:
    """The reference has each command of `kdci --help`, with all of its flags."""
    page = (DOCS / "reference" / "command-line.md").read_text()
    for name in tables.commands():
        assert f"## kdci {name}\n" in page
        assert f"```{{command}} {name}\n" in page
    for flag in ("--config", "--preset", "--method", "--lr-min", "--kdci", "--no-kdci", "--mean"):
        assert f"`{flag}`" in tables.command("distill")
    assert "RUNS ..." in tables.command("report")
    assert "--peer-limit" in tables.command("bench")


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "library.md").read_text()
    modules = ("distributed", "functional", "reference", "streaming")
    names = [name for name in kdci_ext.__all__ if name not in modules]
    for module in ("distributed", "streaming"):
        public = getattr(kdci_ext, module).__all__
        names += [f"{module}.{name}" for name in public if name not in names]
    for name in names:
        assert f":: kdci_ext.{name}\n" in page, name


def test_benchmark_tables_are_those_of_the_readme(tables: ModuleType) -> None:
    """Both are made of the result files, by the same functions."""
    for result in ("dictionary-1-thread", "compensation-1-thread"):
        assert tables.benchmark(result) in README


def test_findings_repeat_no_accuracy() -> None:
    """They are in the README and in the result files, which the page includes."""
    assert not re.findall(r"\d\d\.\d+ %", (DOCS / "findings.md").read_text())


def test_studies_and_presets_that_pages_name_exist() -> None:
    pages = [README, *(page.read_text() for page in sorted(DOCS.rglob("*.md")))]
    for page in pages:
        for study in re.findall(r"kdci study ([a-z][\w-]*)(?![\w.-])", page):
            assert study in study_paths()
        for preset in re.findall(r"--preset ([a-z][\w-]*)", page):
            assert preset in preset_paths()


def test_results_of_studies_are_shown(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headings become bold lines, code stays, and pictures are found from the page's place."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "no study" in tables.study()
    (tmp_path / "study-mini.md").write_text(
        "# Gains\n\n| dafl | +0.1 |\n\n![plot](study-mini.svg) [web](https://example.org)\n\n"
        "```bash\n# whole\nkdci study mini\n```\n"
    )
    shown = tables.study()
    assert "`benchmarks/results/study-mini.md`" in shown
    assert "**Gains**" in shown
    assert "| dafl | +0.1 |" in shown
    assert "![plot](../benchmarks/results/study-mini.svg) [web](https://example.org)" in shown
    assert "\n# whole\n" in shown


def test_links_that_lead_nowhere_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    links = importlib.import_module("links")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="sub/b.html#place">1</a><a href="#top">2</a>'
        '<a href="https://example.org/gone">3</a><a href="sub/b.html#gone">4</a>'
        '<a href="c.html">5</a><img src="d.png">'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="place"><a href="../a.html">6</a>')
    found = links.broken_links(tmp_path)
    assert found == ["a.html: sub/b.html#gone", "a.html: c.html", "a.html: d.png"]
