# SPDX-License-Identifier: Apache-2.0
"""Named collections: the one way to look up networks, generators, datasets and methods."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects of one kind and explains itself when a name is unknown.

    Args:
        kind: what is registered, in the singular, as error messages shall call it.

    Example:
        >>> COLOURS: Registry[int] = Registry("colour")
        >>> _ = COLOURS.register("red")(0xFF0000)
        >>> COLOURS.get("rad")
        Traceback (most recent call last):
            ...
        ValueError: unknown colour 'rad': did you mean 'red'? available: red
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that files its argument under `name` and hands it back unchanged.

        Raises:
            ValueError: if `name` is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered")

        def decorator(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return decorator

    def get(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            ValueError: if there is none; the message gives the nearest names and all names.
        """
        if name in self._entries:
            return self._entries[name]
        available = ", ".join(self.names()) or "none"
        near = difflib.get_close_matches(str(name).lower(), self._entries, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown {self.kind} {name!r}: {hint}available: {available}")

    def names(self) -> list[str]:
        """Returns all names in the order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        """Tells whether `name` is registered."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Returns the number of entries."""
        return len(self._entries)
