# SPDX-License-Identifier: Apache-2.0
"""The ``kdci`` command.

Nothing heavy is imported before it is clear that it is needed: ``kdci --help`` and mistyped
commands answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from python_models.config import (
    Arguments,
    DistillConfig,
    EvaluateConfig,
    ReportConfig,
    StudyConfig,
    TrainTeacherConfig,
    distill_defaults,
    override,
    preset_paths,
    read_arguments,
    read_settings,
    read_yaml,
    study_paths,
)
from python_models.errors import (
    DivergenceError,
    Interrupted,
    PeerError,
    StudyError,
    UserError,
    unknown_name,
)

if TYPE_CHECKING:
    from python_models.methods.base import Method

SettingsT = TypeVar("SettingsT")
ConfigT = TypeVar("ConfigT")

OPTIONAL_PACKAGES = frozenset(
    {"tyro", "yaml", "safetensors", "tqdm", "matplotlib", "PIL", "scipy", "sklearn", "torchvision"}
)

USAGE = """\
usage: kdci COMMAND [options]      (kdci COMMAND --help lists the options)

Data-free knowledge distillation with KDCI.

commands:
  train-teacher   train a teacher on labelled data
  distill         distil a teacher into a student, without the teacher's data
  evaluate        measure the accuracy of a trained network
  report          make a page about runs, those with and without KDCI beside each other
  study           run many pairs, with KDCI and without, and compare them over seeds
  list            show methods, networks, generators, datasets, presets and studies
  demo            see it work in a few minutes on a CPU
  bench           measure the operators beside other libraries (in a clone)

With KDCI_DEBUG=1 in the environment, errors show where they come from.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after ``kdci``; by default those of the process.

    Returns:
        Exit code: 0 done, 1 a training failed or a study missed a floor, 2 the user's mistake,
        130 stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except Interrupted as stop:
        if str(stop):  # of several processes one speaks
            print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `kdci list | head`
        sys.stderr.close()
        return 0
    except (DivergenceError, StudyError) as error:
        return _fail(error, 1)
    except PeerError as error:
        return _fail(error, 1) if error.is_unexplained else 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in OPTIONAL_PACKAGES:
            raise
        message = f'the package {error.name} is needed: pip install "kdci_ext[zoo]"'
        return _fail(error, 2, message)
    # Data, networks and registries raise these with messages made for users.
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)


def _fail(error: Exception, code: int, message: str | None = None) -> int:
    if os.environ.get("KDCI_DEBUG"):
        raise error
    print(f"error: {message or error}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("kdci_ext"))
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {
        "train-teacher": _train_teacher,
        "distill": _distill,
        "evaluate": _evaluate,
        "report": _report,
        "study": _study,
        "list": _list,
        "demo": _demo,
        "bench": _bench,
    }
    if words[0] not in commands:
        raise unknown_name("command", words[0], commands)
    commands[words[0]](words[1:])
    return 0


# --- arguments ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Sources:
    """Where values come from that no flag gives."""

    config: Path | None = None
    """YAML file of settings."""
    preset: str | None = None
    """Settings that come with the package (see: kdci list presets). Those of released code train
    without KDCI, unless --kdci is given."""


@dataclass(kw_only=True)
class DistillArguments(Generic[SettingsT]):
    """Distil a teacher into a student, without the teacher's data.

    The options of the chosen method are listed last.
    """

    sources: Sources
    run: DistillConfig[SettingsT]


@dataclass(kw_only=True)
class FromFile(Generic[ConfigT]):
    """A command's arguments, where a YAML file may give them."""

    config: Path | None = None
    """YAML file of settings."""
    run: ConfigT


def _parse(kind: Any, words: list[str], command: str, default: Any, description: str) -> Any:
    """Parse a (nested) dataclass with flat flags."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def network_arguments(info: Any) -> PrimitiveConstructorSpec[Arguments] | None:
        if info.type != Arguments:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME=VALUE ...]",
            instance_from_str=read_arguments,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda values: [f"{k}={json.dumps(v)}" for k, v in values.items()],
        )

    return tyro.cli(
        kind,
        args=words,
        prog=f"kdci {command}",
        default=default,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )


def _make_working_directory_importable() -> None:
    """Let networks be named that lie in the working directory, as ``python -m`` does.

    Called when the package's own imports are done, which it cannot divert any more.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _peek(words: list[str]) -> argparse.Namespace:
    """Read the flags that decide which others there are, and what their defaults are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--config", "--out-dir", "--out_dir"):
        parser.add_argument(flag, type=Path)
    for flag in ("--preset", "--method"):
        parser.add_argument(flag)
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def _distill(words: list[str]) -> None:
    first = _peek(words)
    out_dir = first.out_dir
    if first.resume and out_dir is not None and (out_dir / "config.yaml").is_file():
        # The run's own settings, so that its flags need not be repeated.
        defaults = distill_defaults(None, out_dir / "config.yaml", first.method)
    else:
        defaults = distill_defaults(first.preset, first.config, first.method)
    arguments = _parse(
        DistillArguments[type(defaults.settings)],  # type: ignore[misc]
        words,
        "distill",
        DistillArguments(sources=Sources(), run=defaults),
        "Distil a teacher into a student, without the teacher's data.",
    )
    from python_models.distill import describe, distill
    from python_models.distributed import is_first_process

    _make_working_directory_importable()
    result = distill(arguments.run)
    if is_first_process():
        print(describe(result))


def _single(words: list[str], command: str, default: ConfigT, description: str) -> ConfigT:
    """Parse a flat command whose values a YAML file may give."""
    file = _peek(words).config
    if file is not None:
        default = override(default, read_settings(file), str(file))
    parsed = _parse(
        FromFile[type(default)],  # type: ignore[misc]
        words,
        command,
        FromFile(run=default),
        description,
    )
    config: ConfigT = parsed.run
    return config


def _train_teacher(words: list[str]) -> None:
    config = _single(
        words, "train-teacher", TrainTeacherConfig(), "Train a teacher on labelled data."
    )
    from python_models.teacher import train_teacher

    _make_working_directory_importable()
    summary = train_teacher(config)
    print(f"teacher: {summary['accuracy']:.2f} % (last epoch), {summary['weights']}")


def _evaluate(words: list[str]) -> None:
    config = _single(words, "evaluate", EvaluateConfig(), "Measure a trained network's accuracy.")
    from python_models.evaluate import evaluate

    _make_working_directory_importable()
    print(f"accuracy: {evaluate(config):.2f} %")


def _report(words: list[str]) -> None:
    import tyro

    config = tyro.cli(
        ReportConfig,
        args=words,
        prog="kdci report",
        description="Make a page about distillation runs of one task, and its figures.",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    from python_models.report import report

    result = report(config)
    for line in result.left_out:
        print(f"left out: {line}")
    print(f"report: {result.page}")


def _study(words: list[str]) -> None:
    import tyro

    config = tyro.cli(
        StudyConfig,
        args=words,
        prog="kdci study",
        description="Run a study: methods x variants x seeds; see kdci list studies.",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    from python_models.study import run_study

    _make_working_directory_importable()
    result = run_study(config)
    print(f"\n{result.text}\nfiles: {result.folder}")
    if result.problems:
        raise StudyError("\n  ".join(["this study is not as it should be:", *result.problems]))


def _list(words: list[str]) -> None:
    kinds = (
        "methods",
        "networks",
        "generators",
        "discriminators",
        "datasets",
        "presets",
        "studies",
    )
    parser = argparse.ArgumentParser("kdci list", description="Show what there is by name.")
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(kinds)}; all, if left out")
    kind = parser.parse_args(words).kind
    if kind is not None and kind not in kinds:
        raise unknown_name("kind", kind, kinds)
    shown = kinds if kind is None else (kind,)
    for name in shown:
        if kind is None:
            print(f"{name}:")
        lines = _entries(name)
        width = max((len(entry) for entry, _ in lines), default=0)
        for entry, text in lines:
            print(f"  {entry:{width}}  {text}".rstrip())


def _entries(kind: str) -> list[tuple[str, str]]:
    """Return the names of a kind, each with one line about it."""
    if kind in ("presets", "studies"):
        paths = preset_paths() if kind == "presets" else study_paths()
        about = {name: read_yaml(path) for name, path in paths.items()}
        return [
            (name, f"{v.get('about', '')} [{v.get('source', '')}]") for name, v in about.items()
        ]
    if kind == "methods":
        from python_models.methods import METHODS

        methods = [(name, METHODS.get(name)) for name in METHODS.names()]
        return [(name, f"{method.summary}{_needs(method)}") for name, method in methods]
    if kind == "datasets":
        from python_models.data import DATASETS

        specs = [DATASETS.get(name) for name in DATASETS.names()]
        return [
            *(
                (s.name, f"{s.num_classes} classes, {s.channels}x{s.image_size}x{s.image_size}")
                for s in specs
            ),
            ("FOLDER", "any images in train/CLASS/ and test/CLASS/ (or val/CLASS/)"),
            ("NAME.npz", "NAME_train.npz and NAME_test.npz: images [n, h, w(, c)] uint8, labels"),
        ]
    from python_models.networks import DISCRIMINATORS, GENERATORS, NETWORKS

    registries: dict[str, Any] = {
        "networks": NETWORKS,
        "generators": GENERATORS,
        "discriminators": DISCRIMINATORS,
    }
    registry = registries[kind]
    return [(name, _first_line(registry.get(name))) for name in registry.names()]


def _needs(method: type[Method[Any]]) -> str:
    """Return what a method needs beside the networks' logits."""
    needs = []
    if method.needs_batch_norm:
        needs.append("BatchNorm in the teacher")
    if method.needs_features:
        networks = " and ".join(method.needs_features)
        needs.append(f"the vector before the last layer of the {networks}")
    if method.needs_unlabelled:
        needs.append("unlabelled images")
    if method.needs_labels:
        needs.append("labelled images")
    return f" [needs {', '.join(needs)}]" if needs else ""


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def _demo(words: list[str]) -> None:
    from python_models.demo import DemoConfig, demo

    demo(_single(words, "demo", DemoConfig(), "See data-free distillation work on a CPU."))


def _bench(words: list[str]) -> None:
    # Not installed: benchmarks write result files and the README, and name the commit measured.
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "cli.py").is_file():
        raise UserError(
            "kdci bench needs a clone of the repository, which this installation is none of: in a "
            'clone, pip install -e ".[zoo,bench]", or run python -m benchmarks there'
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks.cli import main as bench

    bench(words)
