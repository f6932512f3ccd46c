"""The report as PDF and its plots as files, by the browser of this machine; clear errors where there is none."""

import io
import re
import stat
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pages import BROWSER, NO_BROWSER
from PIL import Image
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.cli.app import main
from batchverify.errors import BatchverifyError, UsageError
from batchverify.evaluation.report.browser import VARIABLE, Browser, find_browser
from batchverify.options import EvaluateOptions

PLOTS = ("probability", "similarity", "roc", "det", "calibration")
EVALUATED = {"metrics.json", "report.html"}
needs_browser = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> str:
    return write_scores(tmp_path_factory.mktemp("scores") / "scores.parquet", draw_columns(400))


@pytest.fixture(scope="module")
def folder(scores) -> Path:
    folder = Path(scores).with_name("report")
    options = EvaluateOptions(by=("camera",), group_a="camera", group_b="camera", draws=40, no_images=True)
    batchverify.evaluate(scores, folder, options=options, plots=True, pdf=True)
    return folder


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "browser"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_browser
def test_every_plot_is_a_drawing_and_a_picture(folder):
    expected = {f"plot-{name}.{kind}" for name in PLOTS for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == EVALUATED | expected | {"report.pdf"}
    for name in PLOTS:
        drawing = ET.parse(folder / f"plot-{name}.svg").getroot()  # noqa: S314  our own
        assert drawing.tag.endswith("svg") and (drawing.get("width"), drawing.get("height")) == ("720", "440")
        texts = {each.text for each in drawing.iter() if each.tag.endswith("text") and each.text}
        assert "slider" not in texts
        picture = Image.open(io.BytesIO((folder / f"plot-{name}.png").read_bytes())).convert("RGB")
        assert picture.size == (1440, 880)
        # White paper, and ink on it.
        pixels = np.asarray(picture)
        assert tuple(pixels[0, 0]) == (255, 255, 255) and (pixels.min(axis=2) < 128).mean() > 0.002
    assert "false reject rate" in (folder / "plot-det.svg").read_text()


@needs_browser
def test_the_printed_report_has_pages_of_ink(folder):
    content = (folder / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
    assert b"Evaluation of" in content


@needs_browser
def test_print_has_no_slider_and_nothing_closed(browser, folder):
    browser.set_viewport_size({"width": 1280, "height": 800})
    browser.emulate_media(media="print")
    try:
        browser.goto((folder / "report.html").as_uri() + "#print")
        browser.wait_for_selector("html.print[data-ready=yes]")
        assert not browser.locator("#explorer").is_visible()
        assert "slider" not in browser.locator("main").inner_text()
        # A table of every figure is wider than paper.
        assert browser.locator("details[open]").count() >= 2
        closed = browser.locator("details:not([open]) summary").all_inner_texts()
        assert closed == ["Other figures by camera"]
        # Nothing else is cut.
        widths = browser.eval_on_selector_all(
            ":not(details) > .scroll > table, details[open] table, .plot",
            "all => all.map(each => each.scrollWidth)",
        )
        assert max(widths) <= browser.evaluate("document.body.clientWidth")
    finally:
        browser.emulate_media(media="screen")
        browser.goto("about:blank")


def test_no_browser_is_said_before_anything_is_measured(scores, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    out = tmp_path / "out"
    for option in ("--plots", "--pdf"):
        result = CliRunner().invoke(main, ["evaluate", scores, "-o", str(out), option])
        assert result.exit_code == 2 and f"{option} needs Chromium, Chrome or Edge" in result.output
        assert not out.exists()


def test_a_browser_can_be_named(tmp_path, monkeypatch):
    path = program(tmp_path, "")
    monkeypatch.setenv(VARIABLE, path)
    assert find_browser("--pdf") == Browser(path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UsageError, match=f"no program '{tmp_path}/none', which .{VARIABLE} names"):
        find_browser("--pdf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit('no display')", "ended with 1: no display"),
        ("", "drew no plots"),
        ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
    ],
)
def test_a_browser_that_fails_costs_no_figures(scores, tmp_path, monkeypatch, text, message):
    monkeypatch.setenv(VARIABLE, program(tmp_path, text))
    with pytest.raises(BatchverifyError, match=message):
        batchverify.evaluate(scores, tmp_path / "out", plots=True, no_images=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == EVALUATED


def test_a_browser_that_prints_nothing_is_said(scores, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, program(tmp_path, "print('busy')"))
    with pytest.raises(BatchverifyError, match="printed no PDF: busy"):
        batchverify.evaluate(scores, tmp_path / "out", pdf=True, no_images=True)
