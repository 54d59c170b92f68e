# SPDX-License-Identifier: Apache-2.0
"""Sections about what was measured for the report: images, features, predictions, dictionaries."""

from __future__ import annotations

import torch
from torch import Tensor

from python_models.data import to_float
from python_models.report import figures
from python_models.report.collect import Run
from python_models.report.content import Report, percent
from python_models.report.measure import EMBEDDED_CLASSES, GRID_CLASSES, by_class, spread
from python_models.report.page import NOT_KNOWN, Markup, details, heading, paragraph, table

CASES = 12
"""Test images in a grid of corrected cases."""
PNG = b"\x89PNG\r\n\x1a\n"


def proportions(report: Report) -> list[Markup]:
    """Return how often the teacher saw each class, beside the original."""
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
        lines = [
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
            details("By class", table("Share of each class", ["Class", source, *shares], lines)),
        ]
    reasons = report.reasons("class_counts", report.runs)
    if reasons:
        body.append(report.leave_out("Class proportions", reasons))
    return body


def images(report: Report) -> list[Markup]:
    """Return grids of the runs' images beside test images."""
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


def frechet(report: Report) -> list[Markup]:
    """Return the Frechet distances from the test images."""
    rows = []
    for run in report.runs:
        found = report.findings[run.name]
        if found.frechet is not None:
            counted = f"{found.frechet_images:,}"
            distances = [_places(found.frechet), _places(found.frechet_floor)]
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


def _places(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:,.4f}"


def features(report: Report) -> list[Markup]:
    """Return the embeddings of the students' features."""
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


def cases(report: Report) -> list[Markup]:
    """Return the test images that one student of a pair classifies rightly and the other not."""
    test, names = report.original.test, report.original.class_names
    body = []
    for index, (comparison, vanilla, kdci) in enumerate(report.pairs, 1):
        before, after = (report.findings[run.name].predictions for run in (vanilla, kdci))
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
                ["Students", "KDCI right", "KDCI wrong"],
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
        gains, losses = (
            torch.bincount(test.labels[mask], minlength=len(names)).tolist()
            for mask in (corrected, spoilt)
        )
        lines = [
            [name, f"{gain:,}", f"{loss:,}", f"{gain - loss:+,}"]
            for name, gain, loss in zip(names, gains, losses, strict=True)
        ]
        header = ["Class", "Corrected", "Spoilt", "Net"]
        body.append(details("By class", table("Test images by class", header, lines)))
    paired = {run.name: run for _, v, k in report.pairs for run in (v, k)}
    reasons = report.reasons("predictions", list(paired.values()))
    if reasons:
        body.append(report.leave_out("Corrected cases", reasons))
    return body


def dictionary(report: Report) -> list[Markup]:
    """Return the last confounder dictionary of each run."""
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
