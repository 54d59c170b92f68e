# SPDX-License-Identifier: Apache-2.0
"""YAML files of settings: a user's, a run's, and the presets and studies of the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from python_models.config.flat import flatten
from python_models.errors import UserError, unknown_name

_ABOUT = ("about", "source")
_NOT_SAVED = ("out_dir", "resume", "overwrite")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML file of settings.

    Raises:
        UserError: If it is missing, is no YAML, is no mapping or gives a name twice.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Refuses a name that is given twice, of which YAML would take the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                line = f"{path}: line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{line}: a name must be text, not a list or a mapping")
                if key.value in seen:
                    raise UserError(f"{line}: {key.value!r} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that there is not, too
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a YAML file: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} must hold lines of the form `name: value`")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file without the keys that describe it (``about``, ``source``)."""
    return {name: value for name, value in read_yaml(path).items() if name not in _ABOUT}


def write_yaml(path: Path, config: object) -> None:
    """Write a config as a flat YAML file, without what concerns the one run folder."""
    import yaml

    from python_models.checkpoint import write_atomically

    values = {name: value for name, value in flatten(config).items() if name not in _NOT_SAVED}
    text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def preset_paths() -> dict[str, Path]:
    """Return the presets that come with the package: name to YAML file."""
    return _shipped("presets")


def study_paths() -> dict[str, Path]:
    """Return the studies that come with the package: name to YAML file."""
    return _shipped("studies")


def _shipped(kind: str) -> dict[str, Path]:
    folder = Path(str(resources.files("python_models"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_path(name: str) -> Path:
    """Return a preset's file.

    Raises:
        UserError: If there is none of this name.
    """
    paths = preset_paths()
    if name not in paths:
        raise unknown_name("preset", name, paths)
    return paths[name]
