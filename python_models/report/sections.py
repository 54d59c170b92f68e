# SPDX-License-Identifier: Apache-2.0
"""What the page says: each section from the runs and the findings about them."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from python_models.data import to_float
from python_models.report import figures
from python_models.report.collect import Comparison, Run, Task
from python_models.report.measure import (
    EMBEDDED_CLASSES,
    GRID_CLASSES,
    Findings,
    Original,
    spread,
)
from python_models.report.page import (
    NOT_KNOWN,
    Markup,
    Section,
    code,
    details,
    heading,
    paragraph,
    picture,
    table,
    warning,
)
from python_models.reporting import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASES = 12
"""Test images in a grid of corrected cases."""
ACCURACY_TOLERANCE = 0.1
"""Points by which accuracy may differ where it is measured on another device."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(eq=False)
class Report:
    """All that the page is made from, and the figures that it leaves.

    Attributes:
        task: What was distilled.
        comparisons: Pairs first.
        original: The original data.
        findings: What was measured, by name of the run.
        notes: What was passed over.
        figures: PNG files by name, filled while the sections are made.
        left_out: What is not in the page, and why, likewise.
    """

    task: Task
    comparisons: Sequence[Comparison]
    original: Original
    findings: Mapping[str, Findings]
    notes: Sequence[str] = ()
    figures: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the comparisons."""
        return list({run.name: run for c in self.comparisons for run in c.runs}.values())

    @property
    def pairs(self) -> list[tuple[Comparison, Run, Run]]:
        """The comparisons that are pairs, with the vanilla and the KDCI run."""
        return [(c, c.vanilla, c.kdci) for c in self.comparisons if c.vanilla and c.kdci]

    @property
    def title(self) -> str:
        """Of the page."""
        methods = ", ".join(dict.fromkeys(run.method for run in self.runs))
        return f"{self.task.dataset or 'Unnamed dataset'}, distilled by {methods}"

    def draw(self, name: str, figure: Figure, alt: str, caption: str) -> Markup:
        """Keep a figure as a PNG file and return it for the page."""
        return self.embed(name, figures.to_png(figure), alt, caption)

    def embed(self, name: str, png: bytes, alt: str, caption: str) -> Markup:
        """Keep a PNG file and return it for the page."""
        self.figures[f"{name}.png"] = png
        return picture(png, alt, caption)

    def leave_out(self, what: str, reasons: Mapping[str, str] | str) -> Markup:
        """Note what is missing, and return the note for the page.

        Args:
            what: The part.
            reasons: Why; by run where runs have their own.
        """
        if not isinstance(reasons, str):
            runs_of: dict[str, list[str]] = {}
            for run, reason in reasons.items():
                runs_of.setdefault(reason, []).append(run)
            reasons = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in runs_of.items())
        text = f"{what} left out: {reasons}"
        self.left_out.append(text)
        return paragraph(f"{text}.", "left-out")

    def reasons(self, part: str, runs: Sequence[Run]) -> dict[str, str]:
        """Return why runs lack a part, for those that do."""
        found = {run.name: self.findings[run.name].left_out.get(part) for run in runs}
        return {name: reason for name, reason in found.items() if reason is not None}


def build(report: Report) -> tuple[list[Markup], list[Section]]:
    """Return what comes first on the page, and its sections."""
    parts: list[tuple[str, str, Callable[[Report], list[Markup]]]] = [
        ("settings", "Settings that differ", _settings),
        ("curves", "Accuracy over training", _curves),
        ("losses", "Loss parts", _losses),
        ("proportions", "Class proportions", _proportions),
        ("images", "Images", _images),
        ("frechet", "Fréchet distance", _frechet),
        ("features", "Features of the students", _features),
        ("cases", "What KDCI corrected", _cases),
        ("dictionary", "Confounder dictionary", _dictionary),
        ("health", "Health of the compensation", _health),
        ("cost", "Time and memory", _cost),
        ("runs", "Runs", _runs),
    ]
    lead = _lead(report)
    made = [(anchor, title, make(report)) for anchor, title, make in parts]
    return lead, [Section(anchor, title, body) for anchor, title, body in made if body]


# --- numbers --------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """Return a percentage as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.2f} %"


def points(value: float | None) -> str:
    """Return a difference of percentages as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:+.2f} points"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"


def _difference(vanilla: Run, kdci: Run) -> float | None:
    if vanilla.accuracy is None or kdci.accuracy is None:
        return None
    return kdci.accuracy - vanilla.accuracy


# --- sections -------------------------------------------------------------------------------------


def _lead(report: Report) -> list[Markup]:
    """Accuracy of the students, the paired difference, and where the weights are."""
    rows = []
    for run in report.runs:
        status = "" if run.summary is not None else ", not finished"
        rows.append(
            [
                run.name,
                percent(run.accuracy),
                percent(run.result("teacher_accuracy")),
                f"{run.method}, {run.label}",
                str(run.settings.get("student")),
                str(run.settings.get("seed")),
                f"{run.steps:,}{status}",
                code(str(run.weights)) if run.weights else "none yet",
            ]
        )
    body = [paragraph(text, "lead") for text in _headlines(report)]
    body.append(
        table(
            "Students: accuracy on the test images after the last step, without compensation",
            ["Run", "Accuracy", "Teacher's", "Method", "Student", "Seed", "Steps", "Weights"],
            rows,
        )
    )
    trained = next((run.weights for run in report.runs if run.weights), None)
    if trained is not None:
        command = f"kdci evaluate --network {shlex.quote(str(trained.parent))}"
        body.append(Markup(f'<p class="note">Measure a student anew: {code(command)}</p>'))
    body += _paired(report)
    body += [warning(text) for text in _warnings(report)]
    return body + [paragraph(note, "note") for note in report.notes]


def _headlines(report: Report) -> list[str]:
    """Return a sentence for each group of pairs that differ in their seeds alone."""
    lines = []
    for group in _groups(report):
        first = group[0][2]
        differences = [d for _, v, k in group if (d := _difference(v, k)) is not None]
        if not differences:
            continue
        if len(differences) == 1:
            _, vanilla, kdci = next(p for p in group if _difference(p[1], p[2]) is not None)
            lines.append(
                f"With KDCI {first.method} reached {percent(kdci.accuracy)}, without it "
                f"{percent(vanilla.accuracy)}, from the same seed: {points(differences[0])}. One "
                "seed does not tell which is better."
            )
        else:
            lines.append(
                f"KDCI minus vanilla, {first.method}: {points(statistics.mean(differences))} on "
                f"average over {len(differences)} pairs of the same seed (standard deviation "
                f"{statistics.stdev(differences):.2f}, {min(differences):+.2f} to "
                f"{max(differences):+.2f})."
            )
    if not report.pairs:
        lines.append("No two runs differ in KDCI alone, so none are compared.")
    return lines


def _groups(report: Report) -> list[list[tuple[Comparison, Run, Run]]]:
    groups: dict[tuple[Any, ...], list[tuple[Comparison, Run, Run]]] = {}
    for pair in report.pairs:
        groups.setdefault(pair[0].recipe, []).append(pair)
    return list(groups.values())


def _paired(report: Report) -> list[Markup]:
    if not report.pairs:
        return []
    rows = [
        [c.title, percent(v.accuracy), percent(k.accuracy), points(_difference(v, k))]
        for c, v, k in report.pairs
    ]
    header = ["Pair", "Vanilla", "KDCI", "KDCI minus vanilla"]
    return [table("Paired difference: the same seed without and with KDCI", header, rows)]


def _warnings(report: Report) -> list[str]:
    found = []
    for comparison, vanilla, kdci in report.pairs:
        other = [d.setting for d in comparison.differences if not d.is_expected]
        if other:
            found.append(
                f"{comparison.title}: the runs differ in more than KDCI ({', '.join(other)}), so "
                "their difference does not tell what KDCI does"
            )
        teachers = {report.findings[run.name].teacher for run in (vanilla, kdci)} - {None}
        if len(teachers) > 1:
            found.append(f"{comparison.title}: the teacher's weights were not the same")
        steps = {run.name: run.steps for run in (vanilla, kdci)}
        if vanilla.steps != kdci.steps:
            made = ", ".join(f"{name} {count:,}" for name, count in steps.items())
            found.append(f"{comparison.title}: the runs made different numbers of steps ({made})")
    for run in report.runs:
        measured = _measured_accuracy(report, run)
        if measured is not None and run.accuracy is not None:
            if abs(measured - run.accuracy) > ACCURACY_TOLERANCE:
                found.append(
                    f"{run.name}: its accuracy was {percent(run.accuracy)} but is "
                    f"{percent(measured)} on the test images found now: they may be others"
                )
    return found


def _measured_accuracy(report: Report, run: Run) -> float | None:
    predictions, test = report.findings[run.name].predictions, report.original.test
    if predictions is None or test is None:
        return None
    return 100.0 * (predictions == test.labels).double().mean().item()


def _settings(report: Report) -> list[Markup]:
    body = []
    for comparison, _, _ in report.pairs:
        rows = [
            [
                d.setting if d.is_expected else f"{d.setting} (not of KDCI)",
                str(d.vanilla),
                str(d.kdci),
            ]
            for d in sorted(comparison.differences, key=lambda d: d.is_expected)
        ]
        body.append(table(f"Settings: {comparison.title}", ["Setting", "Vanilla", "KDCI"], rows))
    return body


def _curves(report: Report) -> list[Markup]:
    shown = [c for c in report.comparisons if any(run.column("accuracy") for run in c.runs)]
    if not shown:
        return [report.leave_out("Accuracy curves", "accuracy was not measured in these runs")]
    teachers = {run.result("teacher_accuracy") for run in report.runs} - {None}
    teacher = teachers.pop() if len(teachers) == 1 else None
    last = ", ".join(f"{r.name} {percent(r.accuracy)}" for c in shown for r in c.runs)
    return [
        report.draw(
            "accuracy",
            figures.accuracy_curves(shown, teacher),
            f"Curves of the students' accuracy by epoch; at the end: {last}.",
            "Accuracy of the students on the test images by epoch, without compensation; a panel "
            "for each pair.",
        ),
        details("As a table", _accuracies(report.runs)),
    ]


def _accuracies(runs: Sequence[Run]) -> Markup:
    found = {run.name: dict(run.column("accuracy")) for run in runs}
    epochs = sorted({epoch for values in found.values() for epoch in values})
    rows = [[str(e), *(percent(values.get(e)) for values in found.values())] for e in epochs]
    return table("Accuracy by epoch", ["Epoch", *found], rows)


def _losses(report: Report) -> list[Markup]:
    body = []
    for index, comparison in enumerate(report.comparisons, 1):
        terms = list(dict.fromkeys(name for run in comparison.runs for name in run.losses))
        if not terms:
            continue
        rows = [
            [term, *(number(dict(r.column(term)).get(_last(r))) for r in comparison.runs)]
            for term in terms
        ]
        labels = [run.label for run in comparison.runs]
        body += [
            heading(comparison.title),
            report.draw(
                f"losses-{index}",
                figures.curves(comparison.runs, {term: term for term in terms}),
                f"Curves by epoch of the loss terms {', '.join(terms)}, of {' and '.join(labels)}.",
                "Weighted loss terms by epoch, each averaged over it; those of the generator's "
                "loss are of the last step of its phases.",
            ),
            details(
                "The last epoch as a table",
                table("Loss terms in the last epoch", ["Term", *labels], rows),
            ),
        ]
    return body


def _last(run: Run) -> int:
    return int(run.epochs[-1]["epoch"])


def _proportions(report: Report) -> list[Markup]:
    original, names = report.original.proportions, report.original.class_names
    is_known = report.original.test is not None
    source = "original" if is_known else "even"
    described = "those of the original's test labels" if is_known else "even proportions"
    body = []
    if not is_known:
        body.append(
            report.leave_out(
                "The original's class proportions",
                f"{report.original.why_not}; even proportions are shown in their place",
            )
        )
    for index, comparison in enumerate(report.comparisons, 1):
        counts = {
            run.label: found
            for run in comparison.runs
            if (found := report.findings[run.name].class_counts) is not None
            and len(found) == len(names)
        }
        if not counts:
            continue
        shares = {label: figures.shares_of(found) for label, found in counts.items()}
        distances = {
            label: 50 * (share - original).abs().sum().item() for label, share in shares.items()
        }
        rows = [
            [
                label,
                percent(distances[label]),
                f"{names[share.argmax()]} ({percent(100 * share.max().item())})",
                f"{names[share.argmin()]} ({percent(100 * share.min().item())})",
            ]
            for label, share in shares.items()
        ]
        far = ", ".join(f"{label} {percent(value)}" for label, value in distances.items())
        columns = [original, *shares.values()]
        by_class = [
            [name, *(percent(100 * share[i].item()) for share in columns)]
            for i, name in enumerate(names)
        ]
        body += [
            heading(comparison.title),
            report.draw(
                f"proportions-{index}",
                figures.class_proportions(original, counts, names, source),
                f"Share of each class in the training images, as the teacher sees them, and in "
                f"the original; distance from it: {far}.",
                "How often the teacher predicted each class in the images of all student steps, "
                f"beside {described} (the paper's Figure 1b).",
            ),
            table(
                "Distance from the original: share of images that would have to change class",
                ["Run", "Distance", "Most frequent", "Least frequent"],
                rows,
            ),
            details("By class", table("Share of each class", ["Class", source, *shares], by_class)),
        ]
    reasons = report.reasons("class_counts", report.runs)
    if reasons:
        body.append(report.leave_out("Class proportions", reasons))
    return body


def _images(report: Report) -> list[Markup]:
    from python_models.report.measure import by_class

    names, test = report.original.class_names, report.original.test
    body = []
    for index, comparison in enumerate(report.comparisons, 1):
        grids = {
            run.label: found
            for run in comparison.runs
            if (found := report.findings[run.name].images) is not None
        }
        if grids:
            if test is not None:
                real = by_class(test.images, test.labels, test.num_classes)
                grids = {"original (test images)": real, **grids}
            body += [
                heading(comparison.title),
                report.draw(
                    f"images-{index}",
                    figures.image_grids(grids, names),
                    f"Grids of images, a row for each class: {', '.join(grids)}.",
                    "Images that the student learned from, a row for each "
                    f"{'of the first ' * (len(names) > GRID_CLASSES)}class that the teacher sees "
                    "in them, the first ones of each; white where there are no more (the paper's "
                    "Figure 1a).",
                ),
            ]
        for run in comparison.runs:
            if run.label not in grids:
                body += _saved_images(report, run, index)
    reasons = report.reasons("images", report.runs)
    if reasons:
        body.append(report.leave_out("Images by class", reasons))
    return body


def _saved_images(report: Report, run: Run, index: int) -> list[Markup]:
    """Return the picture in the run's folder, where there is one."""
    try:
        png = run.folder.images.read_bytes()
    except OSError:
        return []
    if not png.startswith(PNG) or len(png) < 24:
        return [report.leave_out(f"images.png of {run.name}", "it is damaged")]
    return [
        heading(run.name),
        report.embed(
            f"images-{index}-{run.label}",
            png,
            f"Grid of images of {run.name}.",
            "Images that the student learned from, as the run saved them.",
        ),
    ]


def _frechet(report: Report) -> list[Markup]:
    rows = []
    for run in report.runs:
        found = report.findings[run.name]
        if found.frechet is not None:
            counted = f"{found.frechet_images:,}"
            distances = [number(found.frechet, 5), number(found.frechet_floor, 5)]
            rows.append([run.name, run.label, *distances, counted])
    body = []
    if rows:
        header = ["Run", "KDCI", "Distance", "Other test images", "Images of each kind"]
        body = [
            table("Fréchet distance from the test images (lower is nearer)", header, rows),
            paragraph(
                "Between normal distributions fitted to the teacher's penultimate features of the "
                "run's images and of test images; in these features, not in Inception's, so it is "
                "no FID. It depends on the number of images; the distance between these and as "
                "many other test images is what a perfect generator would come to.",
                "note",
            ),
        ]
    reasons = report.reasons("frechet", report.runs)
    if reasons:
        body.append(report.leave_out("Fréchet distance", reasons))
    return body


def _features(report: Report) -> list[Markup]:
    names = report.original.class_names
    body = []
    for index, comparison in enumerate(report.comparisons, 1):
        shown: dict[str, tuple[Tensor, Tensor]] = {}
        for run in comparison.runs:
            found = report.findings[run.name]
            if found.embedding is not None and found.embedding_labels is not None:
                shown[run.label] = (found.embedding, found.embedding_labels)
        if not shown:
            continue
        count = len(next(iter(shown.values()))[1])
        classes = f" of the first {EMBEDDED_CLASSES} classes" * (len(names) > EMBEDDED_CLASSES)
        body += [
            heading(comparison.title),
            report.draw(
                f"features-{index}",
                figures.embeddings(shown, names),
                f"t-SNE of {count} test images by the features of {' and '.join(shown)}, coloured "
                "by class.",
                f"t-SNE of the students' penultimate features of {count:,} test images{classes} "
                "(the paper's Figure 5). Distances between groups mean nothing.",
            ),
        ]
    reasons = report.reasons("embedding", report.runs)
    if reasons:
        body.append(report.leave_out("t-SNE of the features", reasons))
    return body


def _cases(report: Report) -> list[Markup]:
    test, names = report.original.test, report.original.class_names
    body = []
    for index, (comparison, vanilla, kdci) in enumerate(report.pairs, 1):
        predictions = [report.findings[run.name].predictions for run in (vanilla, kdci)]
        before, after = predictions
        if test is None or before is None or after is None:
            continue
        was_right, is_right = before == test.labels, after == test.labels
        corrected, spoilt = ~was_right & is_right, was_right & ~is_right
        counts = [int(mask.sum()) for mask in (was_right & is_right, spoilt, corrected)]
        both, lost, gained = counts
        neither = len(test) - sum(counts)
        body += [
            heading(comparison.title),
            table(
                "Test images by which of the two students is right",
                ["", "KDCI right", "KDCI wrong"],
                [
                    ["vanilla right", f"{both:,}", f"{lost:,}"],
                    ["vanilla wrong", f"{gained:,}", f"{neither:,}"],
                ],
            ),
            paragraph(
                f"KDCI corrected {gained:,} images and spoilt {lost:,} of {len(test):,}: "
                f"{100 * (gained - lost) / len(test):+.2f} points."
            ),
        ]
        for kind, mask in (("corrected", corrected), ("spoilt", spoilt)):
            rows = mask.nonzero().squeeze(1)
            rows = rows[spread(len(rows), CASES)]
            if not len(rows):
                continue
            captions = [
                f"true: {names[test.labels[i]]}\nvanilla: {names[before[i]]}\n"
                f"KDCI: {names[after[i]]}"
                for i in rows.tolist()
            ]
            listed = "; ".join(caption.replace("\n", ", ") for caption in captions)
            body.append(
                report.draw(
                    f"cases-{index}-{kind}",
                    figures.cases(to_float(test.images[rows]), captions),
                    f"Test images that KDCI {kind}: {listed}.",
                    f"Images that KDCI {kind}, taken evenly from all of them in the order of the "
                    "test set (the paper's Figure 6 shows corrected ones alone).",
                )
            )
        by_class = [
            [
                name,
                str(int(corrected[here].sum())),
                str(int(spoilt[here].sum())),
                f"{int(corrected[here].sum()) - int(spoilt[here].sum()):+d}",
            ]
            for label, name in enumerate(names)
            for here in [test.labels == label]
        ]
        header = ["Class", "Corrected", "Spoilt", "Net"]
        body.append(details("By class", table("Test images by class", header, by_class)))
    paired = {run.name: run for _, v, k in report.pairs for run in (v, k)}
    reasons = report.reasons("predictions", list(paired.values()))
    if reasons:
        body.append(report.leave_out("Corrected cases", reasons))
    return body


def _dictionary(report: Report) -> list[Markup]:
    names = report.original.class_names
    body = []
    runs = [run for run in report.runs if run.has_kdci]
    for index, run in enumerate(runs, 1):
        found = report.findings[run.name]
        if found.prototypes is None or found.proportions is None:
            continue
        if not bool(found.prototypes.isfinite().all()):
            body.append(report.leave_out(f"Dictionary of {run.name}", "none was built yet"))
            continue
        shares = figures.shares_of(found.proportions)
        top = found.prototypes[shares.argmax()]
        body += [
            heading(run.name),
            report.draw(
                f"dictionary-{index}",
                figures.dictionary(found.prototypes, found.proportions, names),
                f"Heat map of the {len(shares)} prototypes by class. The most common one "
                f"({percent(100 * shares.max().item())}) is largest for {names[top.argmax()]}.",
                "The last confounder dictionary: a row for each prototype (mean of the teacher's "
                "logits in a cluster), and the share of images in its cluster.",
            ),
        ]
    reasons = report.reasons("dictionary", runs)
    if reasons:
        body.append(report.leave_out("Confounder dictionary", reasons))
    return body


def _health(report: Report) -> list[Markup]:
    columns = {
        "dictionary_entropy": "entropy of the dictionary (nats)",
        "compensation_ratio": "compensation / logits",
    }
    body = []
    runs = [run for run in report.runs if run.has_kdci]
    recorded = [run for run in runs if any(run.column(name) for name in columns)]
    for index, run in enumerate(recorded, 1):
        values = {name: dict(run.column(name)).get(_last(run)) for name in columns}
        proportions = report.findings[run.name].proportions
        most = None if proportions is None else math.log(len(proportions))
        rows = [
            [
                "Entropy of the dictionary (nats)",
                number(values["dictionary_entropy"]),
                f"at most {number(most)}: all prototypes equally common",
            ],
            [
                "Compensation by logits",
                number(values["compensation_ratio"]),
                "mean |F| / mean |S| on the epoch's last batch",
            ],
        ]
        body += [
            heading(run.name),
            report.draw(
                f"health-{index}",
                figures.curves([run], columns),
                f"Curves by epoch of the dictionary's entropy and of the compensation's size, of "
                f"{run.name}.",
                "Whether the dictionary is spread over its prototypes, and how much the "
                "compensation moves the student's logits in training.",
            ),
            table("Signs of health in the last epoch", ["Sign", "Value", "Scale"], rows),
        ]
    missing = {
        run.name: "its metrics.csv does not hold them" for run in runs if run not in recorded
    }
    if missing:
        body.append(report.leave_out("Signs of health", missing))
    return body


def _cost(report: Report) -> list[Markup]:
    body = []
    for comparison in report.comparisons:
        values = [_costs(run) for run in comparison.runs]
        header = ["", *(run.label for run in comparison.runs)]
        if len(values) == 2:
            header.append("Change with KDCI")
        rows = []
        for name in values[0]:
            amounts = [each[name] for each in values]
            row = [name, *(number(amount, 5) for amount in amounts)]
            if len(amounts) == 2:
                first, second = amounts
                change = None if not first or second is None else 100 * (second / first - 1)
                row.append(NOT_KNOWN if change is None else f"{change:+.2f} %")
            rows.append(row)
        body.append(table(f"Time and memory: {comparison.title}", header, rows))
    body.append(
        paragraph(
            "Time is that of the whole loop: generator phases, student steps and measurements of "
            "accuracy. Peak memory is what PyTorch held on a GPU, and on a CPU that of the whole "
            "process with Python and its libraries. Runs on a machine that was busy otherwise "
            "cannot be compared (the paper's Table 2).",
            "note",
        )
    )
    unknown = {
        run.name: "not recorded" if run.summary is not None else "the run has not finished"
        for run in report.runs
        if run.result("peak_memory_mb") is None
    }
    if unknown:
        body.append(report.leave_out("Peak memory", unknown))
    return body


def _costs(run: Run) -> dict[str, float | None]:
    last = run.epochs[-1]
    seconds, steps = last.get("seconds"), last.get("step")
    return {
        "Time (s)": seconds,
        "Time of a student step (ms)": 1000 * seconds / steps if seconds and steps else None,
        "Images per second": last.get("images_per_second"),
        "Peak memory (MB)": run.result("peak_memory_mb"),
    }


def _runs(report: Report) -> list[Markup]:
    body = []
    for run in report.runs:
        rows = [[name, str(value)] for name, value in run.settings.items()]
        body.append(
            details(f"All settings of {run.name}", table(str(run.folder.path), ["", "Value"], rows))
        )
    columns = [[name, text] for name, text in METRICS.items()]
    columns.append(["all others", "loss terms with their weights, averaged over the epoch"])
    body.append(details("Columns of metrics.csv", table("metrics.csv", ["Column", ""], columns)))
    return body
