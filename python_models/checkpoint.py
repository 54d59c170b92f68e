# SPDX-License-Identifier: Apache-2.0
"""Files that outlive a run: checkpoints to resume from, and networks to deploy."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import secrets
import signal
import struct
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from python_models.errors import UserError


def write_atomically(
    path: Path, write: Callable[[Path], object], *, keep_as: Path | None = None
) -> None:
    """Write a file so that it is at every instant either the old one or the new one, complete.

    Args:
        path: The file.
        write: Writes the contents to the path it is given.
        keep_as: Where the old file goes. For an instant, when the new one is on the disk as a
            whole, there is then none at `path`.

    Raises:
        UserError: If the disk is full or the folder cannot be written; the old file is kept.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    # torch reports a full disk as a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = "; the previous one is kept" if path.exists() else ""
        reason = _system_error(error) or error
        raise UserError(f"cannot write {path}: {reason}{kept}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _system_error(error: BaseException | None) -> str | None:
    """Return what the system said first, which torch's own error on a full disk leaves out."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror is not None:
            return error.strerror
        error = error.__context__
    return None


def remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed while they wrote a file atomically left of it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def previous_checkpoint(path: Path) -> Path:
    """Return where the checkpoint before the one at `path` is."""
    return path.with_name(f"previous{path.suffix}")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Save a training state of tensors and plain values, atomically.

    The checkpoint before it is kept as `previous_checkpoint`, older ones are not.

    Raises:
        UserError: If the disk is full or the folder cannot be written; no checkpoint is lost.
    """

    def write(temporary: Path) -> None:
        # To a file of Python's, whose error says why nothing more can be written.
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)

    write_atomically(path, write, keep_as=previous_checkpoint(path))


def resume_checkpoint(path: Path) -> dict[str, Any] | None:
    """Load the last checkpoint that is whole, which stands at `path` thereafter.

    One that is damaged is set aside as ``damaged.pt``, with a warning, if the one before it is
    whole.

    Args:
        path: Where `save_checkpoint` saved.

    Returns:
        The state, or None if there is no checkpoint yet.

    Raises:
        UserError: If there are checkpoints, but none that is whole.
    """
    previous = previous_checkpoint(path)
    if not path.exists():  # not yet, or the process was killed between two renames
        return _load_whole(previous) if previous.exists() else None
    try:
        return _load_whole(path)
    except UserError as error:
        if not previous.exists():
            raise UserError(
                f"{error}; there is no checkpoint before it: begin anew with --overwrite"
            ) from error
        state = _load_whole(previous)
        # In this order the whole one has a name that is looked for at every instant.
        os.replace(path, path.with_name(f"damaged{path.suffix}"))
        os.replace(previous, path)
        warnings.warn(f"{error}; going on from the checkpoint before it", stacklevel=2)
        return state


def _load_whole(path: Path) -> dict[str, Any]:
    """Load a checkpoint, and compare its contents with their checksums, as torch does not."""
    state = load_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or no checkpoint: {error}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not fit its checksum")
    return state


def load_checkpoint(path: Path, contents: bytes | None = None) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, on the CPU, without running any code in it.

    Args:
        path: The file.
        contents: What is in it, where another process read it; the path is for errors then.

    Raises:
        UserError: If the file cannot be read or is damaged.
    """
    return _torch_load(path, "checkpoint", contents)


_OF_OTHER_BYTES = (RuntimeError, LookupError, ValueError, TypeError, AttributeError)
"""What the unpickler raises where it takes other bytes for its instructions."""


def _torch_load(path: Path, kind: str, contents: bytes | None = None) -> dict[str, Any]:
    source = path if contents is None else io.BytesIO(contents)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no {kind} at {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and cannot be loaded safely as a {kind}: save its "
            "`state_dict()` instead"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, struct.error, *_OF_OTHER_BYTES) as error:
        raise UserError(f"{path} is damaged or no {kind}: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a dict, got {type(state).__name__}")
    return state


# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkInfo:
    """What must be known to use a network's weights; stored in the file's metadata."""

    network: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def export_network(path: Path, network: nn.Module, info: NetworkInfo) -> None:
    """Save weights as safetensors that describe themselves."""
    from safetensors.torch import save

    # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    # One key alone: safetensors writes several in an order that changes from file to file.
    metadata = {"kdci": json.dumps(asdict(info))}
    contents = save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(contents))


def read_info(path: Path) -> NetworkInfo | None:
    """Return the description in a .safetensors file, or None if it has none.

    Raises:
        UserError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    if "kdci" not in metadata:
        return None
    values = json.loads(metadata["kdci"])
    for name in ("image_shape", "mean", "std"):
        values[name] = tuple(values[name])
    return NetworkInfo(**values)


WRAPPERS = ("state_dict", "model", "net")
"""Keys under which training scripts save a state dict among other things."""

_PARALLEL_PREFIX = "module."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a file of `torch.save`, running no code.

    It may lie under one of the keys `WRAPPERS`, and its names may begin with the ``module.`` of
    DataParallel.

    Raises:
        UserError: If the file is missing, damaged or holds no state dict.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _without_parallel_prefix(load_file(path))
        except FileNotFoundError as error:
            raise UserError(f"no weights at {path}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    state: Any = _torch_load(path, "weights file")
    while inner := [key for key in WRAPPERS if isinstance(state.get(key), Mapping)]:
        state = state[inner[0]]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} must hold a state dict, that is, tensors by name")
    return _without_parallel_prefix(state)


def _without_parallel_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith(_PARALLEL_PREFIX) for name in state):
        return dict(state)
    return {name.removeprefix(_PARALLEL_PREFIX): value for name, value in state.items()}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Load a state dict that must fit exactly.

    BatchNorm's counts of batches may be missing, as in old files: trained networks do not use them.

    Args:
        network: Where the weights go.
        weights: State dict.
        name: The network's name, for the error.
        path: Where the weights come from, for the error.

    Raises:
        UserError: If a tensor is missing, unexpected or of another shape; the first ones are named.
    """
    expected = network.state_dict()
    weights = {
        **{key: value for key, value in expected.items() if key.endswith("num_batches_tracked")},
        **weights,
    }
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is unexpected" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {list(weights[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights in {path} do not fit {name} "
            f"({', '.join(problems[:3])}{more}): give the network they were trained with"
        )
    network.load_state_dict(weights)


def fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's weights, to tell whether a teacher is still the same."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """Return the name of the first floating tensor that holds NaN or Inf, or None.

    Args:
        state: Nested mappings and sequences of tensors and plain values.
    """
    tensors = list(_floating_tensors("", state))
    if not tensors:
        return None
    # One transfer from the device, however many tensors there are.
    finite = torch.stack([torch.isfinite(value).all() for _, value in tensors]).tolist()
    return next((name for (name, _), good in zip(tensors, finite, strict=True) if not good), None)


def _floating_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.device.type != "meta":
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floating_tensors(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _floating_tensors(f"{name}.{index}", item)


# --- interruption ---------------------------------------------------------------------------------


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) within a block into a request that the loop honours.

    The second one interrupts at once. Outside the main thread, where Python allows no signal
    handlers, the block changes nothing.

    Args:
        is_announced: Whether to say so when it comes: of several processes one does.

    Example:
        >>> with StopRequest() as stop:
        ...     while not stop.requested:
        ...         break
    """

    def __init__(self, *, is_announced: bool = True) -> None:
        self.requested = False
        self._is_announced = is_announced
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._is_announced:
            text = "\nstopping after this step (again to stop at once)"
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
