# SPDX-License-Identifier: Apache-2.0
"""Networks of the user's own, named as `package.module:callable`."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from python_models.errors import UserError

Factory = Callable[..., Any]

_named_by: ContextVar[str | None] = ContextVar("_named_by", default=None)


def is_spec(name: str) -> bool:
    """Tells whether a network's name has the form `package.module:callable`."""
    return ":" in name


def short_name(name: str) -> str:
    """Returns a network's name for titles and files: of `package.module:callable` the last part.

    Example:
        >>> short_name("mine.networks:TinyNet"), short_name("resnet18")
        ('TinyNet', 'resnet18')
    """
    return name.rpartition(":")[2]


@contextmanager
def names_from(file: object) -> Iterator[None]:
    """Within the block, names of networks come from a file, not from the user.

    A file of weights must not be able to call whatever function it likes. So within the block
    `import_factory` gives nothing but classes of modules and functions that say, by the annotation
    of their result, that they make one.
    """
    token = _named_by.set(str(file))
    try:
        yield
    finally:
        _named_by.reset(token)


def import_factory(spec: str) -> Factory:
    """Imports the class or function that `package.module:callable` names.

    Raises:
        UserError: if it cannot be imported or called, or may not be within `names_from`.
    """
    module_name, _, attribute = spec.partition(":")
    parts = (*module_name.split("."), *attribute.split("."))
    if not all(part.isidentifier() for part in parts) or module_name.endswith(".py"):
        raise UserError(
            f"network {spec!r} must be package.module:callable, as Python would import it: for "
            "Net in folder/file.py, change to that folder and write file:Net"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise UserError(
            f"network {spec!r}: importing {module_name} failed with {type(error).__name__}: "
            f"{error}. Modules are looked for in the working directory and on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"network {spec!r}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"network {spec!r} must be a class or a function, got {found!r}")
    file = _named_by.get()
    if file is not None and not _declares_module(found):
        raise UserError(
            f"{file} names {spec}, which is neither a torch.nn.Module nor annotated to return one, "
            "and a file's word is not enough to call it: annotate it, or name it yourself with "
            f"{file} as its weights"
        )
    factory: Factory = found
    return factory


def _declares_module(factory: Factory) -> bool:
    result: Any = factory
    if not inspect.isclass(factory):
        try:
            result = typing.get_type_hints(factory).get("return")
        except Exception:  # annotations are the user's, too
            return False
    return inspect.isclass(result) and issubclass(result, nn.Module)


def call_factory(
    factory: Factory, name: str, counts: Mapping[str, int], arguments: Mapping[str, Any]
) -> nn.Module:
    """Calls a network's class or function.

    Args:
        factory: what to call.
        name: its name, for errors.
        counts: `num_classes` and `in_channels`. Each is passed where the signature has a parameter
            of this name, `num_classes` also where it takes any keyword, as torchvision's do.
        arguments: passed in any case.

    Raises:
        UserError: if the arguments do not fit, or a user's callable fails or makes no module.
    """
    signature = inspect.signature(factory)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    wanted = set(signature.parameters)
    if inspect.Parameter.VAR_KEYWORD in kinds:
        wanted.add("num_classes")
    given = {key: value for key, value in counts.items() if key in wanted} | dict(arguments)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(
            f"network {name}: {error}; it is called as {short_name(name)}{signature} and was given "
            + (", ".join(f"{key}={value!r}" for key, value in given.items()) or "nothing")
        ) from error
    if not is_spec(name):
        network: nn.Module = factory(**given)
        return network
    try:
        made = factory(**given)
    except Exception as error:  # a callable of the user's may raise anything
        raise UserError(
            f"network {name} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise UserError(f"network {name} must make a torch.nn.Module, got {type(made).__name__}")
    return made
