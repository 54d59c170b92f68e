# SPDX-License-Identifier: Apache-2.0
"""`kdci report`: the page says what the runs say, needs nothing else, and names what it lacks."""

import base64
import csv
import html.parser
import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_task import CLASSES, METHOD_SETTINGS, make_task, tiny_config

from python_models.checkpoint import load_checkpoint
from python_models.cli import main
from python_models.config import ReportConfig, distill_config
from python_models.data import LabelledImages, load_labelled, to_float
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.report import ReportResult, figures, frechet_distance, report
from python_models.report.collect import common_task, compare, read_runs
from python_models.report.measure import by_class, spread
from python_models.reporting import METRICS
from python_models.teacher import load_network

HEALTH = (
    *("dictionary_entropy", "compensation_ratio"),
    *("attention_prototypes", "compensation_shift"),
)
ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(html.parser.HTMLParser):
    """What a page holds: tables by caption, pictures, ids, links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.scopes: list[str | None] = []
        self.warnings: list[str] = []
        self._open: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        if tag in ("meta", "img"):
            if tag == "img":
                self.images.append(found)
            return
        self._open.append((tag, found.get("class") or ""))
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found[name]) for name in ("href", "src") if name in found]
        if tag == "th":
            self.scopes.append(found.get("scope"))
        if tag == "table":
            self.tables.append(("", []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("th", "td"):
            self.tables[-1][1][-1].append("")
        if tag == "p" and found.get("class") == "warning":
            self.warnings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        inside = {tag for tag, _ in self._open}
        if "style" in inside:
            return
        self._texts.append(data)
        if "caption" in inside:
            self.tables[-1] = (self.tables[-1][0] + data, self.tables[-1][1])
        if inside & {"th", "td"}:
            self.tables[-1][1][-1][-1] += data
        if ("p", "warning") in self._open:
            self.warnings[-1] += data

    def row(self, caption: str, name: str) -> dict[str, str]:
        """Return a row of the tables whose captions begin so, by column."""
        return next(
            dict(zip(header, row, strict=True))
            for found, (header, *rows) in self.tables
            if found.startswith(caption)
            for row in rows
            if row[0] == name
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task in it, and with the runs of a pair: `kdci` and `vanilla`."""
    folder = tmp_path_factory.mktemp("report")
    task = make_task(folder)
    for name in ("kdci", "vanilla"):
        distill(tiny_config(task, "fast", kdci=name == "kdci", out_dir=folder / name))
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> ReportResult:
    """The report of the pair, with all its figures."""
    before = torch.get_rng_state()
    result = report(
        ReportConfig(runs=(folder / "vanilla", folder / "kdci"), out_dir=folder / "out")
    )
    assert torch.equal(torch.get_rng_state(), before)
    return result


@pytest.fixture(scope="module")
def page(made: ReportResult) -> Page:
    return Page(made.page)


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    """A copy of the runs that a test may spoil."""
    for name in ("kdci", "vanilla"):
        shutil.copytree(folder / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which takes the most time; the figures of `made` are drawn."""
    for name in (
        *("accuracy_curves", "curves", "class_proportions", "image_grids"),
        *("embeddings", "cases", "dictionary"),
    ):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(figures, "to_png", lambda _: ONE_PIXEL)


@pytest.fixture
def unembedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out t-SNE likewise."""
    monkeypatch.setattr("python_models.report.measure.embed", lambda features: features[:, :2])


def quick(runs: Path, *names: str, **values: Any) -> tuple[ReportResult, Page]:
    """Return the report of these runs, a pair by default."""
    paths = tuple(runs / name for name in names or ("vanilla", "kdci"))
    result = report(ReportConfig(runs=paths, out_dir=runs / "out", device="cpu", **values))
    return result, Page(result.page)


def summary_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return values


def metrics_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text())))


# --- the numbers ----------------------------------------------------------------------------------


def test_the_page_begins_with_accuracies_the_difference_and_the_weights(
    folder: Path, page: Page
) -> None:
    results = {name: summary_of(folder / name) for name in ("vanilla", "kdci")}
    for name, result in results.items():
        row = page.row("Students", name)
        assert row["Accuracy"] == f"{result['accuracy']:.2f} %"
        assert row["Teacher's"] == f"{result['teacher_accuracy']:.2f} %"
        assert row["Steps"] == str(result["steps"])
        assert Path(row["Weights"]).samefile(result["student"])
    difference = results["kdci"]["accuracy"] - results["vanilla"]["accuracy"]
    row = page.row("Paired difference", "fast, seed 0 (vanilla and kdci)")
    assert row["KDCI minus vanilla"] == f"{difference:+.2f} points"
    assert [caption.split(":")[0] for caption, _ in page.tables[:2]] == [
        "Students",
        "Paired difference",
    ]
    assert page.text.index(row["KDCI minus vanilla"]) < page.text.index("Settings that differ")


def test_the_loss_parts_are_those_of_the_last_epoch(folder: Path, page: Page) -> None:
    last = {"vanilla": metrics_of(folder / "vanilla")[-1], "KDCI": metrics_of(folder / "kdci")[-1]}
    terms = [name for name in last["KDCI"] if name not in METRICS]
    assert {"kd", "generator_bn", "generator_oh", "generator_adv"} == set(terms)
    for term in terms:
        row = page.row("Loss terms", term)
        for label, values in last.items():
            assert float(row[label].replace(",", "")) == pytest.approx(
                float(values[term]), rel=1e-3
            )


def test_accuracy_by_epoch_is_that_of_the_run_folders(folder: Path, page: Page) -> None:
    for name in ("vanilla", "kdci"):
        for line in metrics_of(folder / name):
            shown = page.row("Accuracy by epoch", line["epoch"])[name]
            assert shown == f"{float(line['accuracy']):.2f} %"


def test_class_proportions_are_the_counts_of_the_teachers_classes(folder: Path, page: Page) -> None:
    """The original is even here: ten test images of each of the four classes."""
    for name, label in (("vanilla", "vanilla"), ("kdci", "KDCI")):
        counts = load_checkpoint(folder / name / "checkpoints" / "last.pt")["run"]["class_counts"]
        assert counts.sum() == 8 * 12  # steps by batch size
        shares = counts.double() / counts.sum()
        for index in range(CLASSES):
            row = page.row("Share of each class", str(index))
            assert row["original"] == "25.00 %"
            assert row[label] == f"{100 * shares[index]:.2f} %"
        distance = 50 * (shares - 1 / CLASSES).abs().sum()
        assert page.row("Distance from the original", label)["Distance"] == f"{distance:.2f} %"


def test_corrected_cases_are_those_of_the_deployed_students(folder: Path, page: Page) -> None:
    """Their counts add up, and their difference is that of the accuracies."""
    test = load_labelled("tiny.npz", "test", folder / "data")
    right = {}
    for name in ("vanilla", "kdci"):
        student = load_network(str(folder / name), None, None).classifier
        right[name] = student(to_float(test.images)).argmax(1) == test.labels
    caption = "Test images by which"
    expected = {
        ("vanilla right", "KDCI right"): right["vanilla"] & right["kdci"],
        ("vanilla right", "KDCI wrong"): right["vanilla"] & ~right["kdci"],
        ("vanilla wrong", "KDCI right"): ~right["vanilla"] & right["kdci"],
        ("vanilla wrong", "KDCI wrong"): ~right["vanilla"] & ~right["kdci"],
    }
    shown = {key: int(page.row(caption, key[0])[key[1]]) for key in expected}
    assert shown == {key: int(mask.sum()) for key, mask in expected.items()}
    assert sum(shown.values()) == len(test)
    gained, lost = shown["vanilla wrong", "KDCI right"], shown["vanilla right", "KDCI wrong"]
    difference = (
        summary_of(folder / "kdci")["accuracy"] - summary_of(folder / "vanilla")["accuracy"]
    )
    assert 100 * (gained - lost) / len(test) == pytest.approx(difference)
    assert f"KDCI corrected {gained} images and spoilt {lost} of 40" in page.text


def test_the_frechet_distance_is_that_of_the_pools_images(folder: Path, page: Page) -> None:
    """The pool holds 25 different images, so 25 test images are compared with, and no more."""
    teacher = load_network(str(folder / "teacher.safetensors"), None, None).classifier
    state = load_checkpoint(folder / "kdci" / "checkpoints" / "last.pt")["run"]
    pool = to_float(state["method"]["pool"]["images"])
    test = load_labelled("tiny.npz", "test", folder / "data")
    real = to_float(test.images[spread(40, 25)])
    expected = frechet_distance(teacher.features(pool), teacher.features(real))
    row = page.row("Fréchet distance", "kdci")
    assert row["Images of each kind"] == "25"
    # The images come in another order; four places are shown.
    assert float(row["Distance"].replace(",", "")) == pytest.approx(expected, abs=6e-5)


def test_time_and_memory_with_and_without_kdci(folder: Path, page: Page) -> None:
    found = {
        name: (float(metrics_of(folder / name)[-1]["seconds"]), summary["peak_memory_mb"])
        for name in ("vanilla", "kdci")
        if (summary := summary_of(folder / name))
    }
    for index, quantity in enumerate(("Time (s)", "Peak memory (MB)")):
        row = page.row("Time and memory", quantity)
        vanilla, kdci = (found[name][index] for name in ("vanilla", "kdci"))
        assert vanilla > 0
        assert float(row["vanilla"].replace(",", "")) == pytest.approx(vanilla, rel=1e-4)
        assert float(row["KDCI"].replace(",", "")) == pytest.approx(kdci, rel=1e-4)
        change = float(row["Change with KDCI"].removesuffix(" %"))
        assert change == pytest.approx(100 * (kdci / vanilla - 1), abs=0.006)


def test_signs_of_health_are_those_of_the_last_epoch(folder: Path, page: Page) -> None:
    last = metrics_of(folder / "kdci")[-1]
    for name, column in (
        ("Entropy of the dictionary (nats)", "dictionary_entropy"),
        ("Compensation by logits", "compensation_ratio"),
    ):
        shown = page.row("Signs of health", name)["Value"]
        assert float(shown) == pytest.approx(float(last[column]), rel=1e-3)


def test_the_settings_of_a_pair_differ_in_kdci_alone(page: Page) -> None:
    assert not page.warnings
    tables = [rows for caption, rows in page.tables if caption.startswith("Settings:")]
    assert tables == [[["Setting", "Vanilla", "KDCI"], ["kdci", "False", "True"]]]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    assert "://" not in page.source
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert "default-src 'none'" in page.source
    assert not [
        part for part in page.source.split("<style>")[1].split("</style>") if "url(" in part
    ]


def test_pictures_are_not_blank_and_are_the_files_beside_the_page(
    made: ReportResult, page: Page
) -> None:
    from matplotlib.image import imread

    embedded = [base64.b64decode(str(image["src"]).split(",")[1]) for image in page.images]
    assert [file.read_bytes() for file in made.figures] == embedded
    names = {file.stem for file in made.figures}
    # Of so few test images none may be spoilt, or corrected.
    assert names - {"cases-1-corrected", "cases-1-spoilt"} == {
        *("accuracy", "losses-1", "proportions-1", "images-1", "features-1"),
        *("dictionary-1", "health-1"),
    }
    gained = int(page.row("Test images by which", "vanilla wrong")["KDCI right"])
    assert ("cases-1-corrected" in names) == (gained > 0)
    for image, png in zip(page.images, embedded, strict=True):
        pixels = imread(io.BytesIO(png))
        assert pixels.shape[:2] == (int(str(image["height"])), int(str(image["width"])))
        assert pixels[..., :3].std() > 0.01, image["alt"]
        assert len(str(image["alt"])) > 20


def test_headings_links_and_table_headers_serve_those_who_cannot_see(page: Page) -> None:
    assert page.tags.count("h1") == 1
    assert 'lang="en"' in page.source
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)
    assert set(page.scopes) == {"col", "row"}
    assert all(caption for caption, _ in page.tables)
    assert all(image["alt"] for image in page.images)


def test_nothing_is_left_out_where_everything_is_there(made: ReportResult) -> None:
    assert made.left_out == ()


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_names_are_text_and_neither_markup_nor_formulas(runs: Path) -> None:
    hostile = "<script>alert('$x_{')</script>&"
    name = hostile.replace("/", "")
    (runs / "kdci").rename(runs / name)
    settings = yaml.safe_load((runs / name / "config.yaml").read_text())
    settings["generator"] = hostile
    (runs / name / "config.yaml").write_text(yaml.safe_dump(settings))
    _, page = quick(runs, "vanilla", name)
    assert "script" not in page.tags
    assert page.row("Students", name)["Accuracy"]
    assert page.row("Settings:", "generator (not of KDCI)")["KDCI"] == hostile


def test_a_formula_in_a_class_name_is_drawn_as_it_is() -> None:
    with figures.style():
        figure = figures.class_proportions(
            torch.ones(2) / 2, {"KDCI": torch.ones(2)}, ("$x_{", "<b>"), "even"
        )
        assert figures.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_test_images_that_no_memory_holds_are_named(
    folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder of more than 2 GiB, images are decoded as they are needed: none are held."""
    test = load_labelled("tiny.npz", "test", folder / "data")

    class OnDisk(LabelledImages):
        labels, num_classes, class_names = test.labels, test.num_classes, test.class_names
        image_shape = test.image_shape

        def select(self, parts: Any) -> Any:
            raise AssertionError("read")

    monkeypatch.setattr("python_models.report.measure.load_labelled", lambda *_: OnDisk())
    result, _ = quick(runs)
    assert any("tiny.npz are too many to be kept in memory: 40" in x for x in result.left_out)


# --- pairs ----------------------------------------------------------------------------------------


def edit_settings(run: Path, **values: Any) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, **values}))


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_a_pair_that_differs_in_more_than_kdci_is_warned_of(runs: Path) -> None:
    edit_settings(runs / "vanilla", lr=0.5)
    _, page = quick(runs)
    assert len(page.warnings) == 1
    assert "differ in more than KDCI (lr)" in page.warnings[0]
    row = page.row("Settings:", "lr (not of KDCI)")
    assert (row["Vanilla"], row["KDCI"]) == ("0.5", "0.05")


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_runs_of_other_seeds_are_not_paired(runs: Path) -> None:
    edit_settings(runs / "vanilla", seed=7)
    _, page = quick(runs)
    assert "No two runs differ in KDCI alone" in page.text
    assert page.row("Students", "kdci")["Accuracy"]
    assert not [caption for caption, _ in page.tables if caption.startswith("Paired")]


def test_the_partner_is_the_vanilla_run_with_the_fewest_other_settings(runs: Path) -> None:
    shutil.copytree(runs / "vanilla", runs / "other")
    edit_settings(runs / "other", lr=0.5)
    found, _ = read_runs([runs / name for name in ("other", "kdci", "vanilla")])
    pair, alone = compare(found)
    assert (pair.vanilla, pair.kdci) == (found[2], found[1])
    assert alone.runs == [found[0]]


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_several_seeds_are_averaged(runs: Path) -> None:
    """Two more runs, whose accuracies are made up: differences of 2 and -1 points, mean 0.5."""
    names = []
    for seed, (vanilla, kdci) in enumerate(((50.0, 52.0), (60.0, 59.0))):
        for kind, accuracy in (("vanilla", vanilla), ("kdci", kdci)):
            names.append(f"{kind}-{seed}")
            shutil.copytree(runs / kind, runs / names[-1])
            edit_settings(runs / names[-1], seed=seed)
            summary = {**summary_of(runs / kind), "accuracy": accuracy}
            (runs / names[-1] / "summary.json").write_text(json.dumps(summary))
    _, page = quick(runs, *names)
    assert "+0.50 points on average over 2 pairs of the same seed" in page.text
    # What was made up does not match the students, and the report says so.
    assert sum("its accuracy was" in text for text in page.warnings) == 4


@pytest.mark.usefixtures("undrawn", "unembedded")
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_every_method_can_be_reported_on(method: str, tmp_path: Path) -> None:
    """Its images are had from the checkpoint alone: as many as it has, up to those asked for."""
    epochs = METHOD_SETTINGS[method].get("epochs", 1)
    task = make_task(tmp_path)
    distill(tiny_config(task, method, epochs=epochs, kdci=True, out_dir=tmp_path / "run"))
    result, page = quick(tmp_path, "run", images=100)
    assert [what for what in result.left_out if "Images" in what] == []
    assert page.row("Students", "run")["Method"] == f"{method}, KDCI"
    images = page.row("Fréchet distance", "run")["Images of each kind"]
    assert 10 <= int(images) <= 100


def test_runs_of_one_name_are_told_apart_by_their_parents(runs: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(runs / "kdci", runs / parent / "run")
    found, _ = read_runs([runs / "a" / "run", runs / "b" / "run", runs / "a" / ".." / "a" / "run"])
    assert [run.name for run in found] == ["a/run", "b/run"]


# --- what is missing or broken --------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_without_test_images_the_report_says_what_it_leaves_out(runs: Path) -> None:
    result, page = quick(runs, data_root=runs / "nowhere")
    left_out = " ".join(result.left_out)
    for part in ("class proportions", "Fréchet", "t-SNE", "Corrected"):
        assert part in left_out
    assert "even proportions are shown in their place" in page.text
    assert "nowhere" in page.text
    assert page.row("Share of each class", "0")["even"] == "25.00 %"
    assert page.row("Students", "kdci")["Accuracy"].endswith("%")
    assert "images-1" in {file.stem for file in result.figures}


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_runs_without_evaluation_do_not_open_the_test_images(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kdci", "vanilla"):
        edit_settings(runs / name, evaluate=False)
    monkeypatch.delattr("python_models.report.measure.load_labelled")
    result, _ = quick(runs)
    assert "--no-evaluate" in " ".join(result.left_out)


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_without_the_teacher_the_saved_images_are_shown(runs: Path) -> None:
    for name in ("kdci", "vanilla"):
        edit_settings(runs / name, teacher="gone.safetensors")
    result, page = quick(runs)
    assert "no weights at gone.safetensors" in " ".join(result.left_out)
    saved = base64.b64encode((runs / "kdci" / "images.png").read_bytes()).decode()
    assert saved in page.source
    assert page.row("Test images by which", "vanilla right")
    # The same teacher elsewhere is as good; another one is none.
    teacher = load_network(str(runs / "kdci"), None, None)
    assert teacher.info.dataset == "tiny.npz"
    result, _ = quick(runs, teacher=str(runs / "vanilla"))
    assert "has other weights than the run's teacher had" in " ".join(result.left_out)


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_the_teacher_may_have_moved(folder: Path, runs: Path) -> None:
    edit_settings(runs / "kdci", teacher="gone")
    edit_settings(runs / "vanilla", teacher="gone")
    result, _ = quick(runs, teacher=str(folder / "teacher.safetensors"))
    assert result.left_out == ()


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_damaged_parts_of_a_run_cost_no_more_than_themselves(runs: Path) -> None:
    (runs / "kdci" / "checkpoints" / "last.pt").write_bytes(b"half a check")
    (runs / "vanilla" / "images.png").write_bytes(b"nonsense")
    result, page = quick(runs)
    left_out = " ".join(result.left_out)
    assert "is damaged or no checkpoint" in left_out
    assert "Class proportions: kdci" in left_out
    assert "Confounder dictionary: kdci" in left_out
    assert "vanilla" in str(page.row("Share of each class", "0"))
    (runs / "kdci" / "checkpoints" / "last.pt").unlink()
    (runs / "vanilla" / "checkpoints" / "last.pt").unlink()
    result, _ = quick(runs)
    assert "images.png of vanilla: it is damaged" in result.left_out
    (proportions,) = (text for text in result.left_out if text.startswith("Class proportions"))
    assert proportions.count("no checkpoint at") == 2


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_an_unfinished_run_shows_what_it_has_so_far(runs: Path) -> None:
    for name in ("student.safetensors", "summary.json", "images.png"):
        (runs / "kdci" / name).unlink()
    result, page = quick(runs, "kdci")
    row = page.row("Students", "kdci")
    assert row["Accuracy"] == f"{float(metrics_of(runs / 'kdci')[-1]['accuracy']):.2f} %"
    assert row["Steps"] == "8, not finished"
    assert row["Weights"] == "none yet"
    assert "the run has not finished" in " ".join(result.left_out)


@pytest.mark.usefixtures("undrawn")
def test_without_scikit_learn_the_report_says_so(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    result, _ = quick(runs)
    assert result.left_out == (
        "t-SNE of the features: vanilla, kdci: scikit-learn is not installed: pip install "
        "scikit-learn",
    )


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_runs_from_before_memory_and_health_were_recorded(runs: Path) -> None:
    for name in ("kdci", "vanilla"):
        summary = summary_of(runs / name)
        del summary["peak_memory_mb"]
        (runs / name / "summary.json").write_text(json.dumps(summary))
    rows = metrics_of(runs / "kdci")
    kept = [key for key in rows[0] if key not in HEALTH]
    lines = [",".join(kept), *(",".join(row[key] for key in kept) for row in rows)]
    (runs / "kdci" / "metrics.csv").write_text("\n".join(lines) + "\n")
    result, _ = quick(runs)
    assert result.left_out == (
        "Signs of health: kdci: its metrics.csv does not hold them",
        "Peak memory: vanilla, kdci: not recorded",
    )


def spoil(run: Path, case: str) -> None:
    """Damage a run folder in one way."""
    if case == "gone":
        shutil.rmtree(run)
    elif case == "a file":
        shutil.rmtree(run)
        run.write_text("")
    elif case == "empty":
        shutil.rmtree(run)
        run.mkdir()
    else:
        name, content = {
            "no YAML": ("config.yaml", "a: [1"),
            "no settings": ("config.yaml", "lr: 1"),
            "no epoch": ("metrics.csv", "epoch,step\n"),
            "no number": ("metrics.csv", "epoch,step\n1,many\n"),
            "short line": ("metrics.csv", "epoch,step\n1\n"),
            "no epoch column": ("metrics.csv", "step\n1\n"),
            "no metrics": ("metrics.csv", None),
            "no JSON": ("summary.json", "{"),
            "no results": ("summary.json", "[]"),
            "wrong result": ("summary.json", '{"accuracy": "high"}'),
        }[case]
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_text(content)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gone", "kdci is not there: give the folder of a run"),
        ("a file", "kdci is a file: give the folder of a run"),
        ("empty", r"holds no run \(no config.yaml\)"),
        ("no YAML", "config.yaml is not a YAML file"),
        ("no settings", "config.yaml names no method"),
        ("no epoch", "metrics.csv is damaged: it holds no epoch"),
        ("no number", "metrics.csv is damaged: line 2, column step holds 'many', no number"),
        ("short line", "metrics.csv is damaged: line 2 has another length"),
        ("no epoch column", "metrics.csv is damaged: line 2 has no epoch"),
        ("no metrics", "has no metrics.csv: its run has not finished an epoch yet"),
        ("no JSON", "summary.json is damaged"),
        ("no results", "summary.json is damaged: it holds no results"),
        ("wrong result", "summary.json is damaged: accuracy is 'high', no number"),
    ],
)
def test_broken_run_folders_are_named(case: str, message: str, runs: Path) -> None:
    spoil(runs / "kdci", case)
    with pytest.raises(UserError, match=message):
        quick(runs)
    assert not (runs / "out").exists()


def test_a_folder_of_runs_names_the_runs_in_it(runs: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*kdci .*vanilla\?"):
        quick(runs.parent, runs.name)


def test_a_teachers_folder_is_passed_over(runs: Path) -> None:
    (runs / "teacher").mkdir()
    (runs / "teacher" / "config.yaml").write_text("network: lenet5\ndataset: mnist\n")
    found, notes = read_runs([runs / "teacher", runs / "kdci"])
    assert [run.name for run in found] == ["kdci"]
    assert "holds a teacher's training" in notes[0]
    with pytest.raises(UserError, match=r"no run of kdci distill was given: .*teacher's training"):
        quick(runs, "teacher")
    with pytest.raises(UserError, match="runs is required"):
        report(ReportConfig(runs=()))


def test_runs_of_different_tasks_are_refused(runs: Path) -> None:
    edit_settings(runs / "kdci", dataset="mnist")
    found, _ = read_runs([runs / "kdci", runs / "vanilla"])
    with pytest.raises(UserError, match=r"dataset is mnist in kdci and tiny\.npz in vanilla"):
        common_task(found)
    with pytest.raises(UserError, match="different tasks"):
        quick(runs)


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_a_dataset_of_other_classes_is_not_used(runs: Path) -> None:
    for name in ("kdci", "vanilla"):
        edit_settings(runs / name, dataset="digits")
    result, page = quick(runs)
    assert "digits has 10 classes, the students 4" in " ".join(result.left_out)
    assert page.row("Share of each class", "3")


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_a_new_report_replaces_the_old_one_and_nothing_else(runs: Path) -> None:
    result, _ = quick(runs)
    old = runs / "out" / "figures" / "old.png"
    old.write_bytes(ONE_PIXEL)
    (runs / "out" / "notes.txt").write_text("mine")
    again, _ = quick(runs, "vanilla")
    assert set((runs / "out" / "figures").iterdir()) == set(again.figures)
    assert set(again.figures) != set(result.figures)
    assert (runs / "out" / "notes.txt").read_text() == "mine"
    (runs / "out" / "report.html").write_text("my own page")
    with pytest.raises(UserError, match="is not by kdci report"):
        quick(runs)
    (runs / "out" / "report.html").unlink()
    with pytest.raises(UserError, match="figures is there, but not from a report"):
        quick(runs)
    assert (runs / "out" / "figures").is_dir()
    shutil.rmtree(runs / "out")
    (runs / "out").write_text("a file")
    with pytest.raises(UserError, match="is a file: give a folder"):
        quick(runs)


@pytest.mark.usefixtures("undrawn", "unembedded")
def test_the_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs / "vanilla"), str(runs / "kdci"), "--out-dir", str(runs / "out")]
    assert main(["report", *words, "--data-root", str(runs)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"report: {runs / 'out' / 'report.html'}\n")
    assert "left out: Corrected cases: vanilla, kdci: the test images of tiny.npz" in out
    for wrong, message in (
        ([str(runs / "nowhere")], "nowhere is not there"),
        ([], "runs is required"),
        ([*words, "--images", "1"], "images=1 must be >= 2"),
        ([*words, "--device", "warp"], "device=warp cannot be used"),
    ):
        assert main(["report", *wrong]) == 2
        assert message in capsys.readouterr().err


# --- what is measured -----------------------------------------------------------------------------


def normal(random: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    mixed = random.normal(size=(rows, columns)) @ random.normal(size=(columns, columns))
    return torch.from_numpy(mixed + random.normal(size=columns))


def test_the_frechet_distance_of_normals_along_the_axes_has_a_closed_form() -> None:
    """With covariances of the same axes it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    basis = corners * math.sqrt(3 / 4)
    assert torch.allclose(basis.T.cov(), torch.eye(2, dtype=torch.float64))
    first, second = basis * torch.tensor([2.0, 5.0]), basis * torch.tensor([1.0, 9.0]) + 3
    expected = 2 * 3.0**2 + (2 - 1) ** 2 + (5 - 9) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(50, 1), (50, 7), (200, 60)])
def test_the_frechet_distance_is_that_of_the_matrix_square_root(rows: int, columns: int) -> None:
    from scipy.linalg import sqrtm

    random = np.random.default_rng(rows + columns)
    first, second = normal(random, rows, columns), normal(random, 2 * rows, columns)
    a, b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (first, second))
    shift = np.square(first.numpy().mean(0) - second.numpy().mean(0)).sum()
    expected = shift + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_is_symmetric_and_keeps_under_rotation() -> None:
    random = np.random.default_rng(3)
    first, second = normal(random, 40, 6), normal(random, 30, 6)
    rotation = torch.linalg.qr(normal(random, 6, 6)).Q
    expected = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first @ rotation + 1, second @ rotation + 1) == pytest.approx(
        expected, rel=1e-10
    )
    assert 0 <= frechet_distance(first, first) < 1e-9


def test_the_frechet_distance_of_fewer_rows_than_columns_is_finite() -> None:
    """The covariances are singular; scaled features scale the distance by the square."""
    random = np.random.default_rng(4)
    first, second = normal(random, 5, 40).float(), normal(random, 6, 40).float()
    found = frechet_distance(first, second)
    assert found > 0
    assert frechet_distance(8 * first, 8 * second) == pytest.approx(64 * found, rel=1e-6)
    for wrong, message in (
        ((first[:1], second), "first must be"),
        ((first, second[:, :3]), "as many columns, got 40 and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*wrong)


def test_images_by_class_are_the_first_of_each_and_white_where_there_are_none() -> None:
    labels = torch.tensor([1, 0, 1, 3])
    images = torch.arange(4.0).div(10)[:, None, None, None].expand(4, 1, 2, 2)
    grid = by_class(images, labels, 4)[:, 0, 0, 0].view(4, -1)
    assert (
        grid[:, :3].tolist()
        == torch.tensor([[0.1, 1, 1], [0.0, 0.2, 1], [1, 1, 1], [0.3, 1, 1]]).tolist()
    )
    assert len(by_class(images, labels, 1000)) == 10 * 8


@pytest.mark.parametrize(("total", "count"), [(10, 3), (3, 10), (7, 7), (0, 5), (10000, 1000)])
def test_chosen_positions_are_distinct_and_spread_evenly(total: int, count: int) -> None:
    chosen = spread(total, count)
    assert len(chosen) == min(total, count)
    gaps = chosen.diff()
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


# --- what a run records ---------------------------------------------------------------------------


@pytest.fixture
def started(folder: Path) -> Distillation:
    """A run with KDCI after four steps, whose attention draws at random."""
    config = tiny_config(make_task(folder), "dafl", kdci_attention="random")
    teacher = load_network(str(folder / "teacher.safetensors"), None, None)
    run = Distillation(config, teacher, torch.device("cpu"))
    assert run.compensation is not None
    assert run.compensation.health() == {}
    while run.step < 4:
        run.advance()
    return run


def test_signs_of_health_are_what_they_say_and_disturb_nothing(started: Distillation) -> None:
    assert started.compensation is not None
    before = torch.get_rng_state()
    found = started.compensation.health()
    assert torch.equal(torch.get_rng_state(), before)
    kdci, logits = started.compensation.kdci, started.compensation._logits
    assert logits is not None
    assert logits.shape == (12, CLASSES)
    with torch.random.fork_rng():
        size = (kdci(logits) - logits).abs().mean() / logits.abs().mean()
    assert found["compensation_ratio"] == pytest.approx(size.item(), rel=1e-5)
    shares = kdci.proportions.double()
    entropy = -(shares * shares.log()).nansum()
    assert found["dictionary_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert 0 <= found["dictionary_entropy"] <= math.log(3) + 1e-6
    # The ablation without proportions holds ones, which are shares of a third each.
    kdci.proportions.fill_(1)
    assert started.compensation.health()["dictionary_entropy"] == pytest.approx(math.log(3))


def test_runs_record_health_with_kdci_alone_and_memory_always(folder: Path) -> None:
    kdci, vanilla = metrics_of(folder / "kdci"), metrics_of(folder / "vanilla")
    assert set(kdci[0]) - set(vanilla[0]) == {
        *HEALTH,
        "accuracy_compensated",
    }
    assert {name for name in kdci[0] if name in METRICS} == set(METRICS)
    for name in ("kdci", "vanilla"):
        assert summary_of(folder / name)["peak_memory_mb"] > 1


def test_the_peak_of_memory_outlives_a_resume(runs: Path) -> None:
    state = load_checkpoint(runs / "kdci" / "checkpoints" / "last.pt")
    state["peak_memory_mb"] = 1e6
    torch.save(state, runs / "kdci" / "checkpoints" / "last.pt")
    settings = yaml.safe_load((runs / "kdci" / "config.yaml").read_text())
    distill(distill_config(**settings, out_dir=runs / "kdci", resume=True))
    assert summary_of(runs / "kdci")["peak_memory_mb"] == 1e6
