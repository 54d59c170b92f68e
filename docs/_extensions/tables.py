# SPDX-License-Identifier: Apache-2.0
"""Tables made of the code, the presets and the result files, as Markdown."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from benchmarks import compensation, dictionary, report, selection, step
from benchmarks.harness import RESULTS, load
from python_models import cli
from python_models.config import (
    DistillConfig,
    EvaluateConfig,
    ReportConfig,
    StudyConfig,
    TrainTeacherConfig,
    preset_paths,
    read_settings,
    read_yaml,
)
from python_models.demo import DemoConfig
from python_models.methods import METHODS

COMMANDS: dict[str, type] = {
    "train-teacher": TrainTeacherConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "study": StudyConfig,
    "demo": DemoConfig,
}
"""Commands whose flags are the fields of a dataclass; the others are shown by their ``--help``."""

PLACES = {"noise": "#noise-the-baseline"}
"""Where a method is described that has no page of its own, from the page of all methods."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def prose(text: str) -> str:
    """Return plain text as Markdown that shows it as it is, with flags as code."""
    text = re.sub(r"([\\`*_<>|\[\]{}$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", lambda flag: f"`{flag[0]}`", text)


def code(text: object) -> str:
    """Return text as code in a table's cell."""
    return f"`{text}`".replace("|", r"\|")


def field_docs(kind: type) -> dict[str, str]:
    """Return the string below each field of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not is_dataclass(each):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = str(ast.literal_eval(doc.value))
    return docs


def shown_type(hint: Any) -> str:
    """Return what a field's values are, in words."""
    if isinstance(hint, type) and get_origin(hint) is None:
        names = {str: "text", float: "a number", int: "a whole number", Path: "a path"}
        return names.get(hint, hint.__name__)
    arguments = getattr(hint, "__args__", ())
    if get_origin(hint) is tuple:
        return "several values" if Ellipsis in arguments else f"{len(arguments)} values"
    if type(None) in arguments:
        return ", ".join(shown_type(each) for each in arguments if each is not type(None))
    return f"one of {', '.join(map(code, arguments))}"  # a Literal


def shown_value(value: object) -> str:
    """Return a default as it is written on the command line; a dash for none."""
    if value is None or value is MISSING or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return code(" ".join(map(str, value)))
    return code(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _field_rows(kind: type, only: str | None = None) -> list[list[str]]:
    docs, hints = field_docs(kind), get_type_hints(kind)
    rows = []
    for field in fields(kind):
        if only not in (None, field.name) or field.name not in docs:
            continue
        hint, default = hints[field.name], field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        name, meaning = code(_flag(field.name)), prose(docs[field.name])
        if default is MISSING:
            name = code(field.name.upper() + " ..." * (get_origin(hint) is tuple))
        elif hint is bool:
            name += f", {code(_flag(f'no_{field.name}'))}"
        elif default is None or get_origin(hint) is Literal:
            meaning += f" ({shown_type(hint)})"
        rows.append([name, shown_value(default), meaning])
    return rows


FLAGS = ("flag", "default", "meaning")


def settings(method: str) -> str:
    """Return a method's own settings, and what it changes in the shared ones."""
    found = METHODS.get(method)
    rows = _field_rows(found.Settings)
    own = table(FLAGS, rows) if rows else "This method has no settings of its own."
    changed = [_written(name, value) for name, value in found.defaults.items()]
    changed.append(_written("kdci_prototypes", found.num_prototypes))
    return (
        f"{own}\n\nDefaults of the [shared settings](../reference/command-line.md#kdci-distill) "
        f"that this method changes: {', '.join(map(code, changed))}."
    )


def _written(name: str, value: object) -> str:
    """Return a setting as it is given on the command line."""
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([_flag(name), *map(str, values)])


def presets(method: str) -> str:
    """Return a method's presets: what they are for, their sources and their settings."""
    found = {}
    for name, path in preset_paths().items():
        if read_yaml(path).get("method") == method:
            found[name] = (read_yaml(path), read_settings(path))
    if not found:
        return "There is no preset of this method."
    about = [
        [code(name), prose(values["about"]), prose(values["source"])]
        for name, (values, _) in found.items()
    ]
    names = dict.fromkeys(key for _, values in found.values() for key in values if key != "method")
    rows = [
        [
            code(key),
            *(shown_value(values[key]) if key in values else "" for _, values in found.values()),
        ]
        for key in names
    ]
    return (
        table(("preset", "for", "source"), about)
        + "\n\nTheir settings, as YAML keys; an empty cell is the method's default:\n\n"
        + table(("setting", *map(code, found)), rows)
    )


def needs() -> str:
    """Return what each method asks for."""
    rows = []
    for name in METHODS.names():
        found = METHODS.get(name)
        images = "makes its own"
        if found.needs_unlabelled:
            images = "unlabelled images"
        if found.needs_labels:
            images = "**labelled training images**"
        rows.append(
            [
                f"[{name}]({PLACES.get(name, f'{name}.md')})",
                images,
                "BatchNorm" if found.needs_batch_norm else "",
                ", ".join(found.needs_features),
                str(found.num_prototypes),
                prose(found.summary),
            ]
        )
    head = ("method", "images", "teacher needs", "features of", "K", "in a line")
    return table(head, rows)


def command(name: str) -> str:
    """Return a command's flags, of every group of settings, or its ``--help``."""
    kind = COMMANDS.get(name)
    if kind is None:
        return f"```text\n{help_text(name)}```"
    rows, groups = [], []
    if kind is DistillConfig:
        rows += _field_rows(cli.Sources)
    elif kind not in (ReportConfig, StudyConfig):
        rows += [row for row in _field_rows(cli.FromFile) if row[0] == code("--config")]
    for field in fields(kind):
        if field.name == "settings":
            continue  # those of the method, on its page
        hint = get_type_hints(kind)[field.name]
        if is_dataclass(hint):
            title = prose((hint.__doc__ or "").split("\n")[0].rstrip("."))
            groups.append(f"{title}:\n\n{table(FLAGS, _field_rows(hint))}")
        else:
            rows += _field_rows(kind, only=field.name)
    return "\n\n".join([table(FLAGS, rows), *groups])


def help_text(name: str) -> str:
    """Return what ``kdci NAME --help`` prints; of a command with subcommands, theirs too."""

    def ask(words: list[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
        return printed.getvalue()

    text = ask([name])
    if name != "bench":
        return text
    subcommands = re.findall(r"^    (\w+) ", text, re.M)
    return "\n".join([text, *(ask([name, each]) for each in subcommands)])


def commands() -> dict[str, str]:
    """Return the commands of ``kdci --help`` and what it says of each."""
    listed = cli.USAGE.partition("commands:\n")[2]
    return dict(re.findall(r"^  ([\w-]+) +(\S.*)$", listed, re.M))


def names(kind: str) -> str:
    """Return what ``kdci list KIND`` shows."""
    return table((kind, ""), [[code(name), prose(text)] for name, text in cli._entries(kind)])


def benchmark(result: str) -> str:
    """Return the table of a result file, ``benchmarks/results/RESULT.csv``."""
    path = RESULTS / f"{result}.csv"
    if result.startswith("dictionary"):
        return report.dictionary_table(*load(path, dictionary.Row))
    if result.startswith("compensation"):
        return report.compensation_table(*load(path, compensation.Row))
    if result.startswith("step"):
        return report.step_table(*load(path, step.Row))
    about, rows = load(path, selection.Row)
    cells = [
        [
            f"{row.files:,}, {row.classes:,} classes",
            f"{row.select:,}",
            f"{row.kept_mb:.1f} MB",
            f"{row.growth_mb:.1f} MB",
            f"{row.files_per_s:,.0f} images/s",
        ]
        for row in rows
    ]
    head = ("images", "selected", "kept of these", "growth of the process", "speed")
    return f"{table(head, cells)}\n\n{about['machine']}; commit {about['commit']}; {about['date']}."


def peers(result: str) -> str:
    """Return every peer's figures in a result file of the dictionary."""
    _, rows = load(RESULTS / f"{result}.csv", dictionary.Row)
    cells = [
        [
            row.shape,
            row.peer,
            *(
                (
                    f"{row.median_ms:.4g}",
                    f"{row.p20_ms:.4g} - {row.p80_ms:.4g}",
                    f"{row.x_native:.2f}",
                    f"{row.inertia:.5g}",
                    f"{row.captured:.4f}",
                )
                if row.rounds > 0
                else ("", "", "", "", "")
            ),
            prose(row.note),
        ]
        for row in rows
    ]
    head = ("n x d x K", "peer", "median ms", "20 - 80 %", "by ours", "inertia", "captured", "note")
    return table(head, cells)


def study() -> str:
    """Return the tables of the studies whose results are in ``benchmarks/results``."""
    found = sorted(RESULTS.glob("study-*.md"))
    if not found:
        return "The clone that this site was built from holds no study's results."
    return "\n\n".join(
        f"From `benchmarks/results/{path.name}`:\n\n{_embedded(path)}" for path in found
    )


def _embedded(path: Path) -> str:
    """Return a Markdown file as part of a page that has headings and a place of its own."""
    lines, is_code = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        if not is_code:
            line = re.sub(r"^#+ +(.*)$", r"**\1**", line)
            line = re.sub(r"\]\((?![a-z]+:|#|/)", "](../benchmarks/results/", line)
        lines.append(line)
    return "\n".join(lines)


TABLES: dict[str, Callable[..., str]] = {
    "settings": settings,
    "presets": presets,
    "needs": needs,
    "command": command,
    "names": names,
    "benchmark": benchmark,
    "peers": peers,
    "study": study,
}
"""What the pages ask for by ````{NAME} ARGUMENT````."""
