# SPDX-License-Identifier: Apache-2.0
"""The page of `kdci report` in a real browser, where Playwright and a Chromium are installed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from tiny_task import make_task, tiny_config

from python_models.config import ReportConfig
from python_models.distill import distill
from python_models.report import report

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
SIZES = {"desk": (1100, 800), "phone": (390, 800)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the system's, or that which Playwright installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as tools:
        try:
            # Without its sandbox it starts as root too, as in containers; the page is our own.
            chromium = tools.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about a pair of tiny runs."""
    folder = tmp_path_factory.mktemp("browser")
    task = make_task(folder)
    for name in ("kdci", "vanilla"):
        distill(tiny_config(task, "fast", kdci=name == "kdci", out_dir=folder / name))
    runs = (folder / "vanilla", folder / "kdci")
    return report(ReportConfig(runs=runs, out_dir=folder / "out", device="cpu")).page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_opens_whole_and_quietly(
    size: str, scheme: str, browser: Any, html: Path, tmp_path: Path
) -> None:
    """All figures are there, it asks for nothing else, and no part of it is wider than the screen.

    The text is told from the background in both schemes, by 4.5 to 1 as WCAG asks.
    """
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    messages: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(html.as_uri())
    assert messages == []
    assert [url for url in asked if not url.startswith("data:")] == [html.as_uri()]

    pictures = page.eval_on_selector_all(
        "img", "all => all.map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert len(pictures) >= 7
    for complete, natural, wide, high in pictures:
        assert complete
        assert natural > 100
        assert wide > 100
        assert high > 50
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    text, background = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    lights = sorted(map(relative_luminance, (text, background)))
    assert (lights[1] + 0.05) / (lights[0] + 0.05) > 4.5
    assert (relative_luminance(background) < 0.1) == (scheme == "dark")

    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    pixels = imread(shot)
    assert pixels.shape[1] == width
    assert pixels.shape[0] > 3 * height
    # Something is drawn in every stretch of a screen's height, but for the last one.
    for top in range(0, pixels.shape[0] - height, height):
        assert pixels[top : top + height, :, :3].std() > 0.01
    page.close()


def relative_luminance(color: str) -> float:
    """Return the relative luminance of ``rgb(r, g, b)`` as WCAG defines it."""
    values = torch.tensor([float(v) for v in color[4:-1].split(",")]) / 255
    linear = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]))


def test_what_is_folded_opens_and_links_lead_to_their_sections(browser: Any, html: Path) -> None:
    page = browser.new_page()
    page.goto(html.as_uri())
    table = page.locator("details table").first
    assert not table.is_visible()
    page.locator("details summary").first.click()
    assert table.is_visible()
    for link in page.locator("nav a").all():
        link.click()
        anchor = link.get_attribute("href")
        assert page.locator(anchor).is_visible()
        assert page.url.endswith(anchor)
    page.close()
