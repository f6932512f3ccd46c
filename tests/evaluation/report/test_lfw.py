"""The report of real faces, LFW's View 1 test scores, in a real browser."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as reference
from lfw_cache import view_1
from pages import Opened

import batchverify

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def report(shared, tmp_path_factory):
    """(page, figures, scores)"""
    folder, _ = view_1(shared, tmp_path_factory.getbasetemp())
    out = tmp_path_factory.mktemp("report")
    batchverify.evaluate(folder / "test.parquet", out)
    figures = json.loads((out / "metrics.json").read_text())
    return out / "report.html", figures, pq.read_table(folder / "test.parquet").to_pandas()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_silence_shows_faces_and_follows_the_slider(browser, report, scheme, width):
    path, figures, scores = report
    truth, probability = scores["true_label"].to_numpy(), scores["probability"].to_numpy()
    with Opened(browser, path, scheme=scheme, width=width) as opened:
        assert [url for url in opened.requested if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
        assert opened.drawn() == {"probability", "similarity", "roc", "det", "calibration"}
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        auc = reference.roc_auc_score(truth, probability.astype(float))
        assert f"{auc:.5f}" in opened.page.locator("header .cards").inner_text()
        # Every image is a face cut by its box, and every wrong verdict has its card.
        sizes = opened.page.eval_on_selector_all(".gallery img", "all => all.map(each => each.naturalWidth)")
        assert len(sizes) >= 24
        assert set(sizes) == {128}
        notes = opened.page.eval_on_selector_all(".gallery img", "all => all.map(each => each.alt)")
        assert all(each.endswith(": face") for each in notes)
        for kind in ("false_accepts", "false_rejects"):
            cards = opened.page.locator(f"#{kind.replace('_', '-')} li")
            assert cards.count() == min(12, figures["counts"][kind])
        slider = opened.page.locator("#threshold")
        for place in (100, 300, 900):
            slider.fill(str(place))
            threshold = np.float32(opened.page.locator("#threshold-value").inner_text())
            calls = probability >= threshold
            assert float(opened.number("f1")) == pytest.approx(reference.f1_score(truth, calls), abs=1e-5)
            assert opened.number("false-accepts") == str(((truth == 1) & ~calls).sum())
            assert opened.number("false-rejects") == str(((truth == 0) & calls).sum())
        assert opened.said == []
