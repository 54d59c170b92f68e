# SPDX-License-Identifier: Apache-2.0
"""Unlabelled images from folders of any size and in any state, arrays and datasets."""

import csv
import os
import re
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import random_images, save_image, write_idx_split, write_npz
from tiny_task import make_task, tiny_config, write_config

from python_models.cli import main
from python_models.data import (
    CorruptDataError,
    MissingDataError,
    decode,
    load_unlabelled,
    open_unlabelled,
)
from python_models.data.decode import (
    BATCHES_AHEAD,
    SkippedFiles,
    Target,
    decode_batches,
    image_files,
    read_image,
)
from python_models.data.unlabelled import ImageTree, long_tailed
from python_models.distill import distill
from python_models.errors import UserError

GREY = random_images(6, 28, 28)
GREY_LABELS = np.array([0, 9, 3, 3, 1, 2], dtype=np.uint8)
COLOUR = random_images(2, 8, 8, 3)


def pixel(path: Path, channels: int = 3, size: int = 4) -> list[int]:
    """The first pixel of a decoded file."""
    return read_image(path, Target(channels, size))[:, 0, 0].tolist()


def test_folder_of_images(tmp_path: Path) -> None:
    grey = np.full((10, 20), 100, dtype=np.uint8)
    red = np.zeros((20, 10, 3), dtype=np.uint8)
    red[..., 0] = 255
    save_image(tmp_path / "photos/b/grey.png", grey)
    save_image(tmp_path / "photos/a/deep/er/RED.BMP", red)
    save_image(tmp_path / "photos/c/wide.jpg", np.full((64, 200, 3), 50, dtype=np.uint8))
    save_image(tmp_path / "photos/.cache/hidden.png", grey)
    (tmp_path / "photos/notes.txt").write_text("not an image")
    images = load_unlabelled("photos", tmp_path, 8, 3)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 8, 8))
    assert images[0, :, 4, 4].tolist() == [255, 0, 0]
    assert (images[1] == 100).all()
    assert (images[2].int() - 50).abs().max() <= 1
    as_grey = load_unlabelled(tmp_path / "photos", "/nowhere", 8, 1)
    assert as_grey.shape == (3, 1, 8, 8)
    assert as_grey[:, 0, 4, 4].tolist()[:2] == [76, 100]  # the luma of red
    assert load_unlabelled("photos", tmp_path, 8, 3, limit=2).shape == (2, 3, 8, 8)


def test_folder_images_are_cut_at_the_centre(tmp_path: Path) -> None:
    array = np.zeros((8, 24), dtype=np.uint8)
    array[:, 8:16] = 200
    save_image(tmp_path / "image.png", array)
    assert (load_unlabelled(tmp_path, "", 8, 1) == 200).all()


def test_folder_links_are_followed_once(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere/image.png", GREY[0])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "photos")
    assert len(load_unlabelled("photos", tmp_path, 8, 1)) == 1


def test_broken_images_are_left_out_with_one_warning(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", GREY[i])
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.warns(
        UserWarning, match=r"left out 2 of 5 images .*cut\.png \(.*page\.jpg \("
    ) as caught:
        images = load_unlabelled(tmp_path, "", 28, 1)
    assert len(caught) == 1
    assert torch.equal(images[:, 0], torch.from_numpy(GREY[:3]))


def test_a_folder_without_pillow_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        load_unlabelled(tmp_path, "", 8, 3)


def test_sources_without_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match=r"empty: holds no images \(\.png, "):
        load_unlabelled("empty", tmp_path, 8, 3)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_text("no")
    with pytest.raises(CorruptDataError, match=r"none of the 1 images can be read.*a\.png"):
        load_unlabelled("broken", tmp_path, 8, 3)
    with pytest.raises(MissingDataError, match=r"'nothing' is neither a dataset \(cifar10, "):
        load_unlabelled("nothing", tmp_path, 8, 3)


def test_unlabelled_npz(tmp_path: Path) -> None:
    write_npz(tmp_path / "bare.npz", COLOUR)  # no labels
    write_npz(tmp_path / "toy_train.npz", GREY, ["labels", "may", "be", "what", "they", "like"])
    images = load_unlabelled("bare.npz", tmp_path, 8, 3)
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(COLOUR))
    images = load_unlabelled("toy", tmp_path, 28, 3)
    assert torch.equal(images, torch.from_numpy(GREY)[:, None].expand(-1, 3, -1, -1))


def test_unlabelled_dataset_is_its_train_split(tmp_path: Path) -> None:
    write_idx_split(tmp_path / "MNIST/raw", "train", GREY, GREY_LABELS)
    images = load_unlabelled("mnist", tmp_path, 32, 3, limit=3)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[:, 0, 2:-2, 2:-2], torch.from_numpy(GREY[[0, 2, 4]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, None), "image_size=0 must be at least 1"),
        ((8, 2, None), "channels=2 must be 1"),
        ((8, 3, 0), "limit=0 must be at least 1"),
    ],
)
def test_unlabelled_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_unlabelled("digits", "", *arguments)


# --- what a file may hold ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 90, "png", (90, 90, 90)),
        ("LA", (90, 255), "png", (90, 90, 90)),
        ("LA", (90, 0), "png", (255, 255, 255)),
        ("P", 7, "png", (10, 20, 30)),
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGB", (10, 20, 30), "ppm", (10, 20, 30)),
        ("RGB", (10, 20, 30), "tif", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), "webp", (10, 20, 30)),
        ("RGBA", (0, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("I;16", 0x5AFF, "png", (90, 90, 90)),
        ("I;16", 0x5AFF, "tif", (90, 90, 90)),
        ("I", 0x5AFF, "tif", (90, 90, 90)),
        ("CMYK", (245, 235, 225, 0), "jpg", (10, 20, 30)),
    ],
)
def test_every_kind_of_pixel_becomes_eight_bits(
    tmp_path: Path, mode: str, colour: Any, suffix: str, expected: tuple[int, ...]
) -> None:
    """Grey is repeated, 16 bits lose the lower 8, what is transparent lies on white."""
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([0] * 21 + [10, 20, 30])
    path = tmp_path / f"image.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    tolerance = 3 if suffix == "jpg" else 0
    found = pixel(path)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance, found
    luma = round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2])
    assert abs(pixel(path, channels=1)[0] - luma) <= tolerance + 1


def test_transparent_entries_of_a_palette_lie_on_white(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=b"\xff\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns where such an image is converted to colour
        assert pixel(tmp_path / "a.png") == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_upright(tmp_path: Path, orientation: int) -> None:
    """What a file of any orientation shows is what Pillow's own transposition of it shows."""
    pillow = pytest.importorskip("PIL.Image")
    operations = pytest.importorskip("PIL.ImageOps")
    corners = np.zeros((16, 16, 3), dtype=np.uint8)
    corners[:8, :8], corners[:8, 8:], corners[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    image = pillow.fromarray(corners)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    image.save(path, exif=exif)
    expected = np.asarray(operations.exif_transpose(pillow.open(path)))
    assert np.array_equal(read_image(path, Target(3, 16)).transpose(1, 2, 0), expected)


def test_damaged_exif_does_no_harm(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("L", (8, 8), 90).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert pixel(tmp_path / "a.jpg") == [90, 90, 90]


def png_header(width: int, height: int) -> bytes:
    """A colour PNG of any size that holds no pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_large_jpegs_are_decoded_small_and_other_large_files_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is on the pixels that decoding makes, which for a JPEG can be 64 times fewer."""
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    array = np.full((200, 200), 90, dtype=np.uint8)
    save_image(tmp_path / "a.jpg", array)
    save_image(tmp_path / "a.png", array)
    assert pixel(tmp_path / "a.jpg") == [90, 90, 90]
    with pytest.raises(ValueError, match="200x200 pixels are more than 1,000"):
        pixel(tmp_path / "a.png")


# --- folders in a bad state --------------------------------------------------------------------

USABLE = ("grey.png", "tiny.png", "wide.jpg")


def make_bad_folder(folder: Path) -> dict[str, str]:
    """Write three images that can be used, of other kinds each, among many that cannot.

    Returns:
        A part of the reason why, by the name of each unusable file.
    """
    pillow = pytest.importorskip("PIL.Image")
    save_image(folder / "grey.png", GREY[0])
    save_image(folder / "wide.jpg", random_images(32, 90, 3))
    save_image(folder / "z" / "tiny.png", random_images(1, 1, 4))
    save_image(folder / "cut.png", random_images(40, 40, 3))
    for name in ("cut.png", "cut.jpg"):
        save_image(folder / name, random_images(40, 40, 3))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "huge.png").write_bytes(png_header(9000, 8000))
    (folder / "bomb.png").write_bytes(png_header(60000, 60000))
    pillow.new("F", (8, 8), 0.5).save(folder / "float.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")  # whoever opens it waits for ever
    (folder / "folder.png").mkdir()
    (folder / "notes.txt").write_text("not an image")
    return {
        "bomb.png": "exceeds limit",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "empty.png": "not an image",
        "float.tif": "floating-point",
        "gone.png": "No such file",
        "huge.png": "9000x8000 pixels are more than 67,108,864",
        "loop.png": "symbolic links",
        "page.jpg": "not an image",
    }


def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path) -> None:
    unusable = make_bad_folder(tmp_path)
    source = open_unlabelled(tmp_path, "", 8, 3)
    total = len(USABLE) + len(unusable)
    assert len(source) == total
    message = rf"left out 9 of {total} images .*bomb\.png \(.*, and 6 more$"
    with pytest.warns(UserWarning, match=message) as caught:
        batches = list(source.batches())
    assert [w.category for w in caught].count(UserWarning) == 1
    assert sum(len(images) for _, images in batches) == len(USABLE)
    assert source.skipped.count == len(unusable)
    reasons = {Path(path).name: reason for path, reason in source.skipped.entries}
    assert list(reasons) == sorted(unusable)
    for name, part in unusable.items():
        assert part in reasons[name], name
        assert "\n" not in reasons[name]


def test_a_run_on_a_bad_folder_finishes_and_names_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DFND on broken, truncated, huge and grey images among good ones; resuming looks at the kept
    ones alone, so it neither warns nor forgets what was skipped.
    """
    task = make_task(tmp_path)
    unusable = make_bad_folder(tmp_path / "wild")
    for i in range(20):
        save_image(tmp_path / "wild" / "good" / f"{i:02}.png", random_images(32, 32, 3, seed=i))
    settings = {"unlabelled": str(tmp_path / "wild"), "select": 15, "epochs": 2}
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="left out 9 of 32"):
        result = distill(tiny_config(task, "dfnd", **settings, out_dir=out))
    assert result.accuracy is not None
    assert Path(result.student).is_file()
    with (out / "skipped.txt").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert {Path(name).name for name, _ in rows} == set(unusable)
    assert all(Path(name).parent == tmp_path / "wild" for name, _ in rows)
    read: list[str] = []
    original = decode.read_image

    def watched(path: str, target: Target) -> Any:
        read.append(path)
        return original(path, target)

    monkeypatch.setattr(decode, "read_image", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(tiny_config(task, "dfnd", **settings, out_dir=out, resume=True))
    assert len(read) == len(set(read)) == 15
    assert len((out / "skipped.txt").read_text().splitlines()) == len(unusable)
    (tmp_path / "wild" / "good" / "20.png").write_bytes(b"")
    with pytest.raises(UserError, match="unlabelled holds 33 images, but 32"):
        distill(tiny_config(task, "dfnd", **settings, out_dir=out, resume=True))
    (tmp_path / "wild" / "good" / "20.png").unlink()
    Path(read[0]).write_bytes(b"")
    with pytest.raises(CorruptDataError, match="can no longer be read"):
        distill(tiny_config(task, "dfnd", **settings, out_dir=out, resume=True))
    distill(tiny_config(task, "dfnd", **{**settings, "unlabelled": "wild.npz"}, out_dir=out,
                        overwrite=True))  # fmt: skip
    assert not (out / "skipped.txt").exists()


@pytest.mark.parametrize("method", ["dfnd", "kd3", "mosaickd"])
def test_the_command_finishes_on_a_bad_folder_with_every_sampling_method(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the teacher to the exported student, once more with --resume; and where nothing is left
    to learn from, one line that says so.
    """
    task = make_task(tmp_path)
    unusable = make_bad_folder(tmp_path / "wild")
    save_image(tmp_path / "wild" / "large.jpg", random_images(3000, 4000))
    for i in range(20):
        save_image(tmp_path / "wild" / f"{i:02}.png", random_images(32, 32, 3, seed=i))
    config = write_config(tmp_path, task, method, unlabelled="wild", data_root=tmp_path)
    out = tmp_path / "run"
    words = ["distill", "--no-evaluate", "--config", str(config), "--out-dir", str(out)]
    with pytest.warns(UserWarning, match="left out 9 of 33 images"):
        assert main(words) == 0
    student = (out / "student.safetensors").read_bytes()
    with (out / "skipped.txt").open(newline="") as file:
        reasons = {Path(name).name: why for name, why in csv.reader(file, delimiter="\t")}
    assert reasons.keys() == unusable.keys()
    for name, part in unusable.items():
        assert part in reasons[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["distill", "--resume", "--out-dir", str(out)]) == 0
    assert (out / "student.safetensors").read_bytes() == student
    for path in (tmp_path / "wild").rglob("*"):
        if path.is_file() and path.name not in unusable:
            path.unlink()
    capsys.readouterr()
    assert main([*words, "--overwrite"]) == 2
    assert re.fullmatch(r"error: .*wild.* none of the 9 images can be read.*\n",
                        capsys.readouterr().err)  # fmt: skip


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subfolder is skipped and named; the folder itself is an error."""
    save_image(tmp_path / "good" / "a.png", GREY[0])
    save_image(tmp_path / "locked" / "b.png", GREY[1])
    original = os.scandir

    def refuse(folder: Any) -> Any:
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", folder)
        return original(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_unlabelled(tmp_path, "", 8, 1)
    with pytest.warns(UserWarning, match=r"locked/ \(Permission denied\)"):
        assert len(source.load()) == 1
    with pytest.raises(MissingDataError, match=r"locked: cannot be read \(Permission denied\)"):
        open_unlabelled(tmp_path / "locked", "", 8, 1)


def test_the_names_of_what_is_skipped_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SkippedFiles, "KEEP", 2)
    skipped = SkippedFiles()
    for i in range(5):
        skipped.add(f"{i}\udcff.png", ValueError("bad\nfile"))
    assert str(skipped) == "0\udcff.png (bad file), 1\udcff.png (bad file), and 3 more"
    skipped.write(tmp_path / "skipped.txt")
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert lines == ["0\\udcff.png\tbad file", "1\\udcff.png\tbad file", "and 3 more"]


# --- streams -----------------------------------------------------------------------------------


def numbered_tree(folder: Path, files: int) -> ImageTree:
    """Images that are filled with their position, in three folders."""
    for i in range(files):
        array = np.full((8, 8), i, dtype=np.uint8)
        save_image(folder / "abc"[3 * i // files] / f"{i:03}.png", array)
    tree = ImageTree(folder, Target(1, 8))
    assert len(tree) == files
    return tree


def test_a_tree_is_listed_in_one_order_a_folder_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files before folders, each by name, however the file system lists them; and a folder is not
    opened before the files of the one before it are used up.
    """
    names = ["a.png", "b/x.png", "b/c/y.png", "b.png", "d/z.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    opened: list[str] = []
    original = decode._list

    def watched(directory: str) -> Any:
        opened.append(os.path.relpath(directory, tmp_path))
        files, folders = original(directory)
        return files, folders

    monkeypatch.setattr(decode, "_list", watched)
    found = []
    for path in image_files(tmp_path):
        found.append((os.path.relpath(path, tmp_path), len(opened)))
    assert found == [
        ("a.png", 1), ("b.png", 1), ("b/x.png", 2), ("b/c/y.png", 3), ("d/z.png", 4),
    ]  # fmt: skip
    assert opened == [".", "b", "b/c", "d"]


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches_hold_every_image_once_at_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Positions count files that cannot be read, and an array's stream is that of its files."""
    monkeypatch.setattr("python_models.data.unlabelled.READ_SIZE", batch)
    tree = numbered_tree(tmp_path / "tree", 11)
    (tmp_path / "tree/a/002.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="left out 1 of 11"):
        batches = list(tree.batches())
    assert max(len(images) for _, images in batches) <= batch
    positions = torch.cat([positions for positions, _ in batches])
    images = torch.cat([images for _, images in batches])
    assert positions.tolist() == [0, 1, *range(3, 11)]
    assert images[:, 0, 0, 0].tolist() == positions.tolist()
    with pytest.warns(UserWarning, match="left out 1 of 11"):
        assert torch.equal(tree.load(), images)
    write_npz(tmp_path / "array.npz", images[:, 0].numpy())
    array = open_unlabelled("array.npz", tmp_path, 8, 1)
    for i, (its_positions, its_images) in enumerate(array.batches()):
        assert its_positions.tolist() == list(range(i * batch, min(i * batch + batch, 10)))
        assert torch.equal(its_images, images[its_positions])
    assert torch.equal(array.load(), images)


def test_images_are_taken_by_position_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("python_models.data.unlabelled.READ_SIZE", 2)
    tree = numbered_tree(tmp_path / "tree", 9)
    write_npz(tmp_path / "array.npz", tree.load()[:, 0].numpy())
    (tmp_path / "tree/a/001.png").write_bytes(b"broken")
    wanted = torch.tensor([8, 0, 5, 4, 2])
    for source in (tree, open_unlabelled("array.npz", tmp_path, 8, 1)):
        assert source.take(wanted)[:, 0, 0, 0].tolist() == wanted.tolist()
        with pytest.raises(CorruptDataError, match="image 9 is wanted, but there are 9"):
            source.take(torch.tensor([9, 0]))
    with pytest.raises(CorruptDataError, match=r"can no longer be read: .*001\.png"):
        tree.take(torch.tensor([1, 0]))


def test_a_folder_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Else positions would stand for other images than those that were looked at."""
    tree = numbered_tree(tmp_path, 6)
    (tmp_path / "a/000.png").unlink()
    for read in (lambda: list(tree.batches()), lambda: tree.take(torch.tensor([0])), tree.load):
        with pytest.raises(CorruptDataError, match="held 6 images at first and 5 when it was read"):
            read()


def test_decoding_runs_a_few_batches_ahead_and_ends_with_its_reader(tmp_path: Path) -> None:
    """However long the stream is, a few batches are in memory, and no thread is left behind."""
    save_image(tmp_path / "a.png", GREY[0])
    begun = 0

    def endless() -> Any:
        nonlocal begun
        while True:
            begun += 1
            yield begun, [str(tmp_path / "a.png")] * 3

    before = threading.active_count()
    stream = decode_batches(endless(), Target(1, 8), SkippedFiles())
    for number in range(1, 6):
        tag, images, rows = next(stream)
        assert (tag, len(images), rows.tolist()) == (number, 3, [0, 1, 2])
        assert begun == number + BATCHES_AHEAD
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_large_images_come_in_smaller_batches() -> None:
    def tree(size: int) -> ImageTree:
        source = ImageTree.__new__(ImageTree)
        source.target = Target(3, size)
        return source

    assert tree(32).batch_size == 1024
    assert tree(224).batch_size * 3 * 224**2 <= 2**24
    assert tree(5000).batch_size == 1


def test_a_folder_dataset_without_its_labels_is_its_train_split(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 1), ("test", 2)):
        for i in range(count):
            array = random_images(32, 32, 3, seed=i)
            save_image(tmp_path / "CINIC-10" / split / "cat" / f"{i}.png", array)
    images = open_unlabelled("cinic10", tmp_path, 16, 1).load()
    assert images.shape == (3, 1, 16, 16)
    with pytest.raises(MissingDataError, match="imagenet: the train split was not found"):
        open_unlabelled("imagenet", tmp_path, 16, 1)


def test_a_long_tailed_source_keeps_fewer_images_of_each_class_than_of_the_one_before(
    tmp_path: Path,
) -> None:
    """Of class c are n r^(-c / (C - 1)) kept, the first ones, whatever order they come in."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 27)
    random.shuffle(labels)
    images = np.broadcast_to(labels[:, None, None], (108, 4, 4)).astype(np.uint8).copy()
    images[:, 0, 0] = np.arange(108)
    np.savez(tmp_path / "array.npz", images=images, labels=labels)
    got = open_unlabelled("array.npz", tmp_path, 4, 1, imbalance=27.0).load()
    classes = got[:, 0, 1, 1]
    assert classes.bincount().tolist() == [27, 9, 3, 1]
    positions = got[:, 0, 0, 0]
    assert (positions.diff() > 0).all()
    for label in range(4):
        own = np.flatnonzero(labels == label)
        kept = positions[classes == label].tolist()
        assert kept == own[: len(kept)].tolist()
    whole = open_unlabelled("array.npz", tmp_path, 4, 1, imbalance=1.0).load()
    assert len(whole) == 108


def test_a_long_tail_needs_labels_of_two_classes(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    save_image(tmp_path / "tree" / "a.png", GREY[0])
    with pytest.raises(UserError, match="unlabelled_imbalance=2 needs labels, but"):
        open_unlabelled(tmp_path / "tree", "", 4, 1, imbalance=2.0)
    zeros = np.zeros((3, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=zeros, labels=np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="of at least 2 classes; there are 1"):
        open_unlabelled("one.npz", tmp_path, 4, 1, imbalance=2.0)
    with pytest.raises(UserError, match=r"unlabelled_imbalance=0\.5 must be >= 1"):
        long_tailed(torch.tensor([0, 1]), 0.5)
