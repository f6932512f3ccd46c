"""The suspects in the report, in a real browser: both faces and the reason, in silence, on any screen."""

import csv
import shutil

import pandas as pd
import pytest
from pages import Opened
from repository import REPOSITORY

import batchverify

EVIL = '<img src=x onerror="document.title = 1">'


@pytest.fixture(scope="module")
def report(cache, tmp_path_factory):
    """The report of the drawn faces with two labels turned round and one name that is code."""
    folder = tmp_path_factory.mktemp("suspects")
    samples = REPOSITORY / "sample_manifests"
    shutil.copytree(samples / "faces", folder / "faces")
    rows = list(csv.DictReader((samples / "faces.csv").read_text(encoding="utf8").splitlines()))
    for row in (rows[0], rows[29]):
        row["label"] = str(1 - int(row["label"]))
    name = rows[0]["person_a"]
    for row in rows:
        row |= {side: EVIL for side in ("person_a", "person_b") if row[side] == name}
    pd.DataFrame(rows).to_csv(folder / "faces.csv", index=False)
    batchverify.score(folder / "faces.csv", folder / "scores.parquet", cache=cache, quiet=True)
    batchverify.evaluate(
        folder / "scores.parquet", folder / "out", draws=0, suspects=(2, str(folder / "suspects.csv"))
    )
    return folder / "out" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_faces_and_reasons(browser, report, scheme, width):
    with Opened(browser, report, scheme=scheme, width=width) as opened:
        assert opened.said == []
        assert [url for url in opened.requested if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.page.locator("nav a[href='#suspects']").inner_text() == "Suspect labels"
        cards = opened.page.locator("#suspects li")
        assert cards.count() == 2
        sizes = opened.page.eval_on_selector_all("#suspects img", "all => all.map(each => each.naturalWidth)")
        assert sizes == [128] * 4
        said = " ".join(cards.locator(".reason").all_inner_texts())
        assert said.count("labelled same, but the images are named ") == 2 and EVIL in said
        # The same pairs in other galleries have no reason.
        assert opened.page.locator(".reason").count() == 2


def test_a_report_without_the_option_has_no_such_section(report, tmp_path):
    batchverify.evaluate(report.parents[1] / "scores.parquet", tmp_path / "out", draws=0, no_images=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="suspects"' not in page and 'class="reason"' not in page
    assert 'id="suspects"' in report.read_text()
