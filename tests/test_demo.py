# SPDX-License-Identifier: Apache-2.0
"""The demo, on its smallest budget, ends with its table."""

from pathlib import Path
from typing import Any

import pytest

from python_models import demo
from python_models.config import check, distill_config
from python_models.data import MissingDataError


def test_quick_demo_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"epochs": 1, "ep_steps": 5, "warmup": 1, "synthesis_batch_size": 16, "batch_size": 16}
    budget = demo.Budget({"epochs": 1, "batch_size": 128}, "demo-digits", tiny, {"epochs": 1})
    monkeypatch.setitem(demo.BUDGETS, "quick", budget)
    rows = demo.demo(demo.DemoConfig(quick=True, out_dir=tmp_path))
    models = [row["model"] for row in rows]
    assert models == [
        "teacher (lenet5_bn)",
        "student, vanilla",
        "student, KDCI",
        "student, uniform noise",
    ]
    text = capsys.readouterr().out
    assert "data: digits" in text
    assert all(model in text for model in models)
    assert "KDCI minus vanilla, same seed:" in text
    for name in ("teacher", "vanilla", "kdci", "noise"):
        assert (tmp_path / name / "config.yaml").is_file()


@pytest.mark.parametrize("name", demo.BUDGETS)
def test_the_students_of_a_budget_differ_in_kdci_alone(name: str, tmp_path: Path) -> None:
    config = demo.DemoConfig(out_dir=tmp_path)
    runs = demo._student_settings(config, demo.BUDGETS[name], "digits", tmp_path)
    vanilla, kdci = runs["student, vanilla"], runs["student, KDCI"]
    assert {key for key in vanilla if vanilla[key] != kdci[key]} == {"kdci", "out_dir"}
    for settings in runs.values():
        check(distill_config(**settings))


def test_without_fashion_mnist_the_demo_takes_the_digits_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingDataError("put it there")

    monkeypatch.setattr("python_models.data.load_labelled", missing)
    assert demo._find_data(demo.DemoConfig()) == "digits"
    assert "using scikit-learn's digits instead" in capsys.readouterr().out
    with pytest.raises(MissingDataError):
        demo._find_data(demo.DemoConfig(dataset="fashion-mnist"))
