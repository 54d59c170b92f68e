# SPDX-License-Identifier: Apache-2.0
"""The guides in examples/ run as they are, and their own assertions hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("plain_loop", "own_generator", "lightning_module")


def run(name: str, folder: Path) -> str:
    """Run an example in an empty folder, and return what it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """Each asserts that its student, which saw no digit, is far better than chance."""
    pytest.importorskip("sklearn")
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="the package lightning is not installed")
    assert "student" in run(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_student_of_the_readme_is_built_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the parameters that the README counts, and logits of the classes asked for."""
    torch = pytest.importorskip("torch")
    from python_models.networks import build_network

    monkeypatch.syspath_prepend(ROOT / "examples")
    student = build_network("own_student:Student", 10, 3, width=16)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert f"{count:,} parameters" in (ROOT / "README.md").read_text()
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_readme_links_every_guide() -> None:
    files = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert files == {*GUIDES, "digits", "own_student"}
    readme = (ROOT / "README.md").read_text()
    for name in (*GUIDES, "own_student"):
        assert f"](examples/{name}.py)" in readme
