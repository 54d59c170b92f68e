"""The examples in docstrings, the README and the documentation run as they are printed."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import operator
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

import kdci_ext
from python_models.cli import main
from python_models.config import leaves, preset_paths, study_paths
from python_models.data import DATASETS
from python_models.methods import METHODS
from python_models.networks import NETWORKS

MODULES = [
    *("", "._load", ".dictionary", ".distributed", ".functional", ".modules", ".reference"),
    *(".streaming", ".sums"),
]
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


def public_members(cls: type) -> dict[str, Any]:
    """Methods and properties that a class defines; extra_repr is PyTorch's hook for repr()."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and name != "extra_repr"
        and isinstance(value, FunctionType | property)
    }


def public_objects(module: ModuleType) -> dict[str, Any]:
    """Functions and classes that a module defines, and their members as CLASS.NAME."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and is_own and isinstance(value, FunctionType | type):
            found[name] = value
            if isinstance(value, type):
                members = public_members(value).items()
                found.update({f"{name}.{member}": each for member, each in members})
    return found


def exported_names() -> set[str]:
    modules = [importlib.import_module(f"kdci_ext{module}") for module in MODULES]
    return {name for module in modules for name in getattr(module, "__all__", ())}


OBJECTS = {
    f"{module}.{name}": value
    for module in MODULES
    for name, value in public_objects(importlib.import_module(f"kdci_ext{module}")).items()
    if not module.startswith("._") or name in kdci_ext.__all__
}


def sections_of(value: Any) -> dict[str, str]:
    """Return the text of each section of a docstring by its heading."""
    parts = re.split(
        r"^(Args|Attributes|Returns|Raises|Example):$", inspect.getdoc(value), flags=re.M
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def may_raise(function: Callable[..., Any], seen: frozenset[Any] = frozenset()) -> bool:
    """Whether there is a ``raise`` in a function, or in one of kdci_ext that it calls by a name:
    of its module, of another one, or of ``self``. What it calls on other objects is not followed.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen:
        return False
    if not function.__module__.startswith("kdci_ext"):
        return False
    known = dict(function.__globals__)
    if "." in function.__qualname__:
        known["self"] = known.get(function.__qualname__.split(".")[0])
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            try:
                called = operator.attrgetter(".".join(rest))(known[first]) if rest else known[first]
            except (AttributeError, KeyError):
                continue
            if isinstance(called, type):  # whose constructor a dataclass has made for it
                called = None if is_dataclass(called) else called.__init__
            if called is not None and may_raise(called, seen | {function}):
                return True
    return False


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    """Of the module, and of everything public in it, whatever decorates it."""
    source = importlib.import_module(f"kdci_ext{module}")
    names = {name: getattr(kdci_ext.functional, name) for name in kdci_ext.functional.__all__}
    names = {**vars(source), "torch": torch, **names, **vars(kdci_ext)}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name, value in {"module": source, **public_objects(source)}.items():
        examples = [each for each in finder.find(value, name, globs=dict(names)) if each.examples]
        assert bool(examples) == (">>> " in (value.__doc__ or "")), name
        for example in examples:
            runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0


def test_what_raises_is_found() -> None:
    """Directly, by a check of another module, by a method of its own, and by a constructor."""
    assert may_raise(kdci_ext.functional.compensate)
    assert may_raise(kdci_ext.sums.column_moments)
    assert may_raise(kdci_ext.KDCI.forward)
    assert may_raise(kdci_ext.stream_confounder_dictionary)
    assert not may_raise(kdci_ext.sums.PrincipalSubspace.project)
    assert not may_raise(kdci_ext.reference.compensate)


@pytest.mark.parametrize("name", OBJECTS)
def test_docstrings_have_their_sections(name: str) -> None:
    """Args names every parameter, Attributes every field, Returns and Raises are there where
    something is returned or raised, and what is exported has an Example.
    """
    value = OBJECTS[name]
    assert value.__doc__
    if isinstance(value, property):
        return
    sections = sections_of(value)
    if value.__qualname__.split(".")[0] in exported_names() or name == "._load.build_info":
        assert ">>> " in sections["Example"]
    if is_dataclass(value):
        for field in fields(value):
            assert re.search(rf"^    {field.name}: ", sections["Attributes"], re.M), field.name
        return
    function = value.__init__ if isinstance(value, type) else value
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name != "self":
            stars = r"\*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            assert re.search(rf"^    {stars}{parameter.name}: ", sections["Args"], re.M), parameter
    if signature.return_annotation not in (None, "None"):
        assert sections["Returns"].strip()
    if may_raise(function):
        assert re.search(r"^    \w+(Error|Exception): ", sections["Raises"], re.M)


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
    modules = ("distributed", "functional", "reference", "streaming", "sums")
    names = [name for name in kdci_ext.__all__ if name not in modules]
    for module in ("distributed", "sums"):
        public = getattr(kdci_ext, module).__all__
        names += [f"{module}.{name}" for name in public if name not in names]
    for name in names:
        assert f":: kdci_ext.{name}\n" in page, name
        value = operator.attrgetter(name)(kdci_ext)
        members = public_members(value) if isinstance(value, type) else {}
        if members:
            _, _, rest = page.partition(f":: kdci_ext.{name}\n   :members: ")
            assert set(rest.partition("\n")[0].split(", ")) == set(members), name


def test_benchmark_tables_are_those_of_the_readme(tables: ModuleType) -> None:
    """Both are made of the result files, by the same functions."""
    for result in ("dictionary-1-thread", "compensation-1-thread"):
        assert tables.benchmark(result) in README


def test_every_operator_and_its_files_are_in_the_table_of_kernels() -> None:
    """Each schema has a row, each row names files and a reference that exist, and no source of
    kernels is left out.
    """
    page = (DOCS / "kernels.md").read_text()
    sources = ROOT / "csrc"
    operators = re.findall(r'm\.def\(\s*"(\w+)\(', (sources / "registration.cpp").read_text())
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M))
    assert list(rows) == operators
    for operator_name, row in rows.items():
        *columns, reference = (re.findall(r"`([\w.]+)`", cell) for cell in row.split("|"))
        for folder, files in zip(("cpu", "cpu/simd", "cuda"), columns, strict=True):
            for file in files:
                assert (sources / folder / file).exists(), file
        registered = columns[0][0]
        assert f'm.impl("{operator_name}"' in (sources / "cpu" / registered).read_text()
        assert all(hasattr(kdci_ext.reference, name) for name in reference)
    for source in (*sources.glob("cpu/**/*.cpp"), *sources.glob("cuda/*.cu")):
        assert f"`{source.name}`" in page or f"/{source.name}`" in page, source


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
