# SPDX-License-Identifier: Apache-2.0
"""The sections of the page, in their order."""

from __future__ import annotations

from collections.abc import Callable

from python_models.report import measured, recorded
from python_models.report.content import Report
from python_models.report.page import Markup, Section


def build(report: Report) -> tuple[list[Markup], list[Section]]:
    """Return what comes first on the page, and its sections."""
    parts: list[tuple[str, str, Callable[[Report], list[Markup]]]] = [
        ("settings", "Settings that differ", recorded.settings),
        ("curves", "Accuracy over training", recorded.curves),
        ("losses", "Loss parts", recorded.losses),
        ("proportions", "Class proportions", measured.proportions),
        ("images", "Images", measured.images),
        ("frechet", "Fréchet distance", measured.frechet),
        ("features", "Features of the students", measured.features),
        ("cases", "What KDCI corrected", measured.cases),
        ("dictionary", "Confounder dictionary", measured.dictionary),
        ("health", "Health of the compensation", recorded.health),
        ("cost", "Time and memory", recorded.cost),
        ("runs", "Runs", recorded.runs),
    ]
    lead = recorded.lead(report)
    made = [(anchor, title, make(report)) for anchor, title, make in parts]
    return lead, [Section(anchor, title, body) for anchor, title, body in made if body]
