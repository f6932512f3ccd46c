"""Groups and discards in the report: in a real browser, what stands there, and names that are attacks."""

import json
import re
from typing import Any

import numpy as np
import pytest
from group_samples import grouped_columns
from pages import Opened
from score_tables import write_scores

import batchverify
from batchverify.evaluation.report.plots import heat

STRENGTH = """() => [...document.querySelectorAll(".heat td")].map(
  each => Number(getComputedStyle(each).backgroundColor.match(/[\\d.]+(?=\\))/)[0]))"""
EVIL = '"><script>document.title = "broken"</script>'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of some groups and two qualities, and its figures."""
    folder = tmp_path_factory.mktemp("groups")
    names = [f"a rather long name of group {each}" for each in range(12)]
    columns = grouped_columns(1500, people=60, groups=names, none=np.full(1500, np.nan))
    path = write_scores(folder / "s.parquet", columns)
    options: dict[str, Any] = {
        "group_a": "group_a",
        "group_b": "group_b",
        "quality": ("none", "sharpness", "-similarity"),
    }
    batchverify.evaluate(path, folder / "out", draws=100, no_images=True, **options)
    return folder / "out" / "report.html", json.loads((folder / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_silence_and_fits(browser, report, scheme, width):
    with Opened(browser, report[0], scheme=scheme, width=width) as opened:
        assert opened.said == []
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        # The first quality has no pairs, and no plot.
        assert opened.drawn() >= {"discards-2", "discards-3"}
        assert "No labelled and scored pair has a quality." in opened.page.locator("#discards-1").inner_text()
        # Higher rates have stronger colours.
        rates = np.array(report[1]["groups"]["matrix"]["fmr"]).ravel()
        strength = np.array(opened.page.evaluate(STRENGTH))[np.argsort(rates)]
        assert len(strength) == len(rates) and strength[-1] > strength[0]
        assert (np.diff(strength) >= 0).all()


def test_the_tables_hold_what_metrics_json_holds(browser, report):
    path, figures = report
    groups = figures["groups"]
    with Opened(browser, path) as opened:
        tables = opened.page.locator("#groups table")
        for at, row in enumerate([*groups["groups"], groups["within"], groups["across"]]):
            text = tables.nth(0).locator("tbody tr").nth(at).inner_text()
            assert row["group"] in text and f"{row['fmr']:.5f}" in text
            assert ("too small" in text) == bool(row["too_small"])
            for end in row["intervals"].get("fmr", []):
                assert f"{end:.5f}" in text
        measure = groups["differentials"]["fnmr"]["all"]["measures"]["gini"]
        row = tables.nth(1).locator("tbody tr", has_text="FNMR, all groups").inner_text()
        assert f"{measure['value']:.3f}" in row
        cell = tables.nth(2).locator("tbody tr").nth(3).locator("td").nth(5)
        assert cell.inner_text() == f"{groups['matrix']['fmr'][3][5]:.2g}"
        wrong, pairs = groups["matrix"]["false_matches"][3][5], groups["matrix"]["pairs"][3][5]
        assert f"{wrong:,} of {pairs:,} pairs" in cell.get_attribute("title")
        wanted = figures["quality"][1]["wanted"]
        assert opened.page.locator("#discards-2 tbody tr").count() == len(wanted)


def test_heat_is_a_log_scale_and_tells_0_from_the_lowest_rate():
    assert heat([[0.0, 1e-4], [None, 1e-2]]) == [[0, 15], [0, 100]]
    assert heat([[1e-4, 1e-3, 1e-2]])[0][1] == pytest.approx(57.5, abs=1)
    assert heat([[0.0, None]]) == [[0, 0]]
    # Equal rates are equally hot.
    assert heat([[0.1, 0.1]]) == [[100, 100]]


def test_names_of_groups_and_columns_are_text(tmp_path):
    columns = grouped_columns(200, groups=[EVIL, "b"])
    columns = {EVIL if name == "camera" else name: each for name, each in columns.items()}
    columns[EVIL] = np.arange(200)
    path = write_scores(tmp_path / "s.parquet", columns)
    options: dict[str, Any] = {"group_a": "group_a", "group_b": "group_b", "quality": (EVIL,)}
    batchverify.evaluate(path, tmp_path / "out", draws=0, no_images=True, **options)
    text = (tmp_path / "out" / "report.html").read_text()
    assert EVIL not in text
    assert len(re.findall(r"<script\b", text.partition("</main>")[0])) == 0


def test_a_report_without_groups_has_no_such_section(tmp_path):
    path = write_scores(tmp_path / "s.parquet", grouped_columns(60))
    batchverify.evaluate(path, tmp_path / "out", draws=0, no_images=True)
    text = (tmp_path / "out" / "report.html").read_text()
    assert 'id="groups"' not in text and 'id="discards-1"' not in text
