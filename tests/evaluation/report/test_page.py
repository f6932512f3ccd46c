"""The report in a real browser: silent console, no requests, figures that follow the slider, faces, keys."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from markupsafe import escape
from pages import Opened
from repository import REPOSITORY
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.evaluation.figures import NAMES
from batchverify.evaluation.report.page import MEANINGS, embedded_json, shown_threshold

FACES = REPOSITORY / "sample_manifests" / "faces.csv"
EVIL = '"><script>document.title = "broken"</script><img src=x onerror=alert(1)>.jpg'


@pytest.fixture(scope="module")
def report(cache, tmp_path_factory):
    """The report of the sample faces beside another run, with slices, and its figures."""
    folder = tmp_path_factory.mktemp("report")
    settings: dict[str, Any] = {"cache": cache, "quiet": True}
    batchverify.score(FACES, folder / "new.parquet", **settings)
    batchverify.score(FACES, folder / "old.parquet", threshold=0.9, **settings)
    batchverify.evaluate(folder / "new.parquet", folder / "out", folder / "old.parquet", by="person_a")
    return folder / "out" / "report.html", json.loads((folder / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_silence_and_fits(browser, report, scheme, width):
    with Opened(browser, report[0], scheme=scheme, width=width) as opened:
        assert opened.said == []
        outside = [url for url in opened.requested if not url.startswith(("data:", "blob:"))]
        assert outside == [report[0].as_uri()]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        everything = {"probability", "similarity", "roc", "det", "calibration", "drift", "scatter"}
        assert opened.drawn() == everything
        paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(each) for each in re.findall(r"\d+", paper)[:3])
        assert (brightness > 600) if scheme == "light" else (brightness < 150)


def test_the_explorer_starts_at_the_run_and_follows_mouse_and_keys(browser, report):
    path, figures = report
    with Opened(browser, path) as opened:
        slider = opened.page.locator("#threshold")
        assert opened.number("false-accepts") == str(figures["counts"]["false_accepts"])
        assert float(opened.number("f1")) == pytest.approx(figures["metrics"]["f1"], abs=1e-5)
        assert float(opened.number("accuracy")) == pytest.approx(figures["metrics"]["accuracy"], abs=1e-5)
        start = opened.page.locator("#threshold-value").inner_text()
        slider.focus()
        opened.page.keyboard.press("End")
        # At 1 nearly everything is accepted.
        assert opened.number("far") == "1.00000"
        assert opened.number("frr") == "0.00000"
        opened.page.keyboard.press("Home")
        assert (opened.number("far"), opened.number("frr")) == ("0.00000", "1.00000")
        assert opened.number("called-same") == "0"
        opened.page.keyboard.press("ArrowRight")
        assert opened.page.locator("#threshold-value").inner_text() != "0"
        box = slider.bounding_box()
        opened.page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
        assert 0.5 < float(opened.page.locator("#threshold-value").inner_text()) < 0.9
        opened.page.locator("#threshold-reset").click()
        assert opened.page.locator("#threshold-value").inner_text() == start


def test_every_figure_of_a_slice_is_there(browser, report):
    path, figures = report
    with Opened(browser, path) as opened:
        slices = figures["slices"]["person_a"]
        at, first = next((at, each) for at, each in enumerate(slices) if "far" in each["intervals"])
        opened.page.locator("#slices-1 summary").click()
        tables = opened.page.locator("#slices-1 table")
        titles = " ".join(tables.nth(each).locator("thead").inner_text() for each in (0, 1)).lower()
        for name in NAMES:
            if first[name] is not None:
                assert (NAMES[name] if name != "auc" else "auc").lower() in titles
        row = tables.nth(1).locator("tbody tr").nth(at).inner_text()
        assert f"{first['recall']:.5f}" in row
        low, high = first["intervals"]["far"]
        assert f"{low:.5f} to {high:.5f}*" in tables.nth(0).locator("tbody tr").nth(at).inner_text()


def test_a_threshold_copied_from_the_explorer_makes_the_same_verdicts(browser, report):
    path, figures = report
    with Opened(browser, path) as opened:
        shown = opened.page.locator("#threshold-value").inner_text()
        assert np.float32(float(shown)) == np.float32(figures["threshold"])
        assert f"at threshold {shown}." in opened.page.locator("header").inner_text()
        slider = opened.page.locator("#threshold")
        grid = np.array(json.loads(opened.page.locator("#data").text_content())["plots"]["explorer"]["grid"])
        for place in (1, 30, 499, len(grid) - 2):
            slider.fill(str(place))
            shown = opened.page.locator("#threshold-value").inner_text()
            assert np.float32(float(shown)) == np.float32(grid[place])
            called = batchverify.evaluate(path.parents[1] / "new.parquet", threshold=float(shown), draws=0)
            assert opened.number("called-different") == str(called.document["called_different"])


def test_the_gallery_shows_faces_and_takes_the_keys(browser, report):
    with Opened(browser, report[0]) as opened:
        cards = opened.page.locator("#nearest li")
        assert cards.count() == 12
        sizes = opened.page.eval_on_selector_all("#nearest img", "all => all.map(each => each.naturalWidth)")
        assert sizes == [128] * 24
        opened.page.locator("#nearest").scroll_into_view_if_needed()
        cards.nth(0).focus()
        opened.page.keyboard.press("ArrowRight")
        assert cards.nth(1).evaluate("each => each === document.activeElement")
        assert opened.page.locator("#nearest img").nth(0).get_attribute("alt").startswith("Image A of row ")


def test_tab_enters_a_gallery_once_where_it_was_left(browser, report):
    with Opened(browser, report[0]) as opened:
        cards = opened.page.locator("#nearest li")

        def stops():
            return opened.page.eval_on_selector_all("#nearest li", "all => all.map(each => each.tabIndex)")

        assert stops() == [0] + [-1] * 11
        cards.nth(0).focus()
        opened.page.keyboard.press("ArrowRight")
        assert stops() == [-1, 0] + [-1] * 10
        opened.page.keyboard.press("Tab")
        assert not cards.nth(2).evaluate("each => each === document.activeElement")
        opened.page.keyboard.press("Shift+Tab")
        assert cards.nth(1).evaluate("each => each === document.activeElement")


def test_the_slider_moves_a_line_and_two_points(browser, report):
    places = """() => ({
      line: document.getElementById("plot-probability").layout.shapes[0].x0,
      roc: ["x", "y"].map(axis => document.getElementById("plot-roc").data[2][axis][0]),
      det: ["x", "y"].map(axis => document.getElementById("plot-det").data[2][axis][0]),
    })"""
    path, figures = report
    with Opened(browser, path) as opened:
        start = opened.page.evaluate(places)
        assert start["line"] == pytest.approx(figures["threshold"])
        assert start["roc"][1] == pytest.approx(1 - figures["metrics"]["frr"])
        opened.page.locator("#threshold").fill("930")
        shown = float(opened.page.locator("#threshold-value").inner_text())
        moved = opened.until(places, lambda found: found["line"] == shown)
        far = float(opened.number("far"))
        assert far > 0
        assert moved["roc"] == [pytest.approx(far, abs=1e-5), pytest.approx(1)]
        assert moved["det"][0] == pytest.approx(far, abs=1e-5)
        # It stays where it is when the page turns dark.
        opened.page.emulate_media(color_scheme="dark")
        assert opened.until(places, lambda found: found == moved) == moved
        assert opened.said == []


def test_a_reader_of_screens_hears_the_two_error_rates_alone(report):
    live = re.findall(r'<(\w+) id="([\w-]+)" aria-live="polite">', report[0].read_text())
    assert live == [("dd", "explore-far"), ("dd", "explore-frr")]


def test_verdicts_have_colours_of_their_own(browser, report):
    names = ("right", "wrong", "same", "different", "run", "slider")
    script = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name)"
    for scheme in ("light", "dark"):
        with Opened(browser, report[0], scheme=scheme) as opened:
            colours = [opened.page.evaluate(script, name) for name in names]
            assert len(set(colours)) == len(names)
            card = opened.page.locator("#nearest li").first
            # The word says it, too; what the reference said has a line of its own.
            assert card.locator(".verdict").inner_text() in ("right", "wrong")
            assert card.locator(".before").inner_text().startswith("In the reference: ")


def test_first_columns_stay_in_sight_on_a_phone(browser, report):
    with Opened(browser, report[0], width=390) as opened:
        table = opened.page.locator("#slices-1 .scroll").first
        head = table.locator("tbody th").first
        before = head.bounding_box()["x"]
        assert table.evaluate("each => { each.scrollLeft = 1000; return each.scrollLeft; }") > 100
        assert head.bounding_box()["x"] == before


def test_the_record_leads_with_what_matters(browser, report):
    path, figures = report
    with Opened(browser, path) as opened:
        lead = opened.page.locator("#record .lead").inner_text()
        record = figures["record"]
        assert f"vggface2, {record['backbone_fingerprint'][:12]}" in lead
        assert "detect, margin 44" in lead
        assert record["head"][:12] in lead
        assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", lead)
        assert not opened.page.locator("#record table").is_visible()
        opened.page.locator("#record summary").click()
        assert opened.page.locator("#record table").is_visible()
        # What made the two runs differ: the threshold.
        made = opened.page.locator("#comparison table.record").inner_text()
        assert "0.9" in made and "threshold" in made


@pytest.mark.parametrize("folder", ["/data/of/all/the/images/", "a/"])
def test_long_folders_that_all_paths_share_are_printed_once(tmp_path, folder):
    cells = [f"{folder}{each}/{each}.jpg" for each in range(60)]
    path = write_scores(tmp_path / "s.parquet", draw_columns(60, image_a=cells, image_b=cells[::-1]))
    batchverify.evaluate(path, tmp_path / "out", draws=0, no_images=True)
    text = re.sub(r'title="[^"]*"', "", (tmp_path / "out" / "report.html").read_text())
    once = folder != "a/"
    assert (text.count(folder) == 1) == once
    assert ("All paths below start with" in text) == once


def test_dark_comes_and_goes_with_the_system(browser, report):
    from playwright.sync_api import expect

    with Opened(browser, report[0]) as opened:
        ink = opened.page.locator("#plot-probability .xtick text").first
        light = ink.evaluate("each => getComputedStyle(each).fill")
        for scheme in ("dark", "light"):
            opened.page.emulate_media(color_scheme=scheme)
            same = expect(ink).to_have_css if scheme == "light" else expect(ink).not_to_have_css
            same("fill", light)
        assert opened.said == []


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """The report of a manifest whose every text is an attack."""
    folder = tmp_path_factory.mktemp("evil")
    cells = [EVIL] * 60
    columns = draw_columns(60, image_a=cells, person_a=cells, camera=cells, error_a=pa.array(cells))
    columns["status"] = pa.array([EVIL if each == "no_face" else each for each in columns["status"].tolist()])
    path = write_scores(folder / "s.parquet", columns, manifest=[f"/{EVIL}"], **{EVIL: EVIL, "</script>": 1})
    batchverify.evaluate(path, folder / "out", by="camera", draws=0)
    return folder / "out" / "report.html"


class Elements(HTMLParser):
    """The names of a page's elements, and the handlers in their attributes."""

    def __init__(self, text):
        super().__init__()
        self.names, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_whatever_stands_in_the_manifest_is_text(evil):
    found = Elements(evil.read_text())
    assert found.names.count("script") == 3
    assert found.handlers == []
    assert "img" not in found.names


def test_an_attack_does_nothing_in_the_browser(browser, evil):
    with Opened(browser, evil) as opened:
        assert opened.page.title().startswith("Evaluation of")
        assert opened.said == []
        assert opened.page.locator("#slices-1 th[scope=row]").first.inner_text() == EVIL
        assert opened.page.locator("#nearest .path").nth(0).inner_text() == f"A {EVIL} {EVIL}"


def test_every_figure_and_mark_is_explained(report):
    text = re.sub(r"\s+", " ", report[0].read_text())
    assert set(MEANINGS) == set(NAMES)
    for name, meaning in MEANINGS.items():
        title = NAMES[name] if name == "d_prime" else NAMES[name][0].upper() + NAMES[name][1:]
        assert f"<dt>{escape(title)}</dt><dd>{meaning}</dd>" in text
    slices = text[text.index('id="slices-1"') :].partition("</thead>")[0]
    assert "False accept rate" in slices
    assert "The stability index compares" in text
    assert "At the left edge no different pair is accepted" in text


@pytest.mark.parametrize("value", [0.9999996423721313, 0.999998, 1e-7, 0.0, 1.0, 0.4950772622391619])
def test_a_threshold_shown_makes_the_same_verdicts(value):
    assert np.float32(float(shown_threshold(value))) == np.float32(value)
    assert len(shown_threshold(value)) <= 12


def test_embedded_data_cannot_end_their_element():
    text = embedded_json({EVIL: ["</script>", "<!--", "a & b"]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {EVIL: ["</script>", "<!--", "a & b"]}


def test_the_page_forbids_itself_every_request(report):
    text = report[0].read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert "connect-src" not in policy
    assert len(text) < 7e6
