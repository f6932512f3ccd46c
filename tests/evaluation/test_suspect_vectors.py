"""Suspects by vectors and by a second run: people whose images are known, and scores that say little."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cache_samples import FINGERPRINT, write
from score_tables import write_scores

import batchverify
from batchverify.cache.image_keys import content_key
from batchverify.cache.segment import Entry
from batchverify.evaluation.evidence import Evidence, SecondOpinion
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import ScoreFile, read_scores

PEOPLE, SHOTS, PAIRS, WRONG = 60, 5, 800, 24


class Drawn:
    """Images of people with their vectors in a cache, pairs of them, scores, and labels of which some are wrong."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.folder = folder
        who = np.repeat(np.arange(PEOPLE), SHOTS)
        vectors = rng.normal(size=(PEOPLE, 64))[who] + rng.normal(0, 1.1, (len(who), 64))
        vectors = np.pad(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), ((0, 0), (0, 448)))
        self.cells = [f"{number}.png" for number in range(len(who))]
        entries = []
        for cell, vector in zip(self.cells, vectors, strict=True):
            (folder / cell).write_bytes(cell.encode())
            entries.append(Entry(content_key(cell.encode()), vector.astype(np.float16), (0, 0, 9, 9), 0.9, 1))
        write(folder / "cache", entries)
        a, b = np.triu_indices(len(who), 1)
        kinds = [rng.permutation(np.flatnonzero((who[a] != who[b]) == label))[: PAIRS // 2] for label in (0, 1)]
        rows = np.concatenate(kinds)
        self.a, self.b, truth = a[rows], b[rows], np.repeat([0, 1], PAIRS // 2)
        self.wrong = rng.choice(PAIRS, WRONG, replace=False)
        self.images = len(np.unique([self.a, self.b]))
        self.labels = truth.copy()
        self.labels[self.wrong] = 1 - truth[self.wrong]
        self.odds = rng.normal(4.0 * truth - 2.0, 2.0)
        self.better = rng.normal(8.0 * truth - 4.0, 1.5)

    def scores(self, name: str, odds: np.ndarray) -> str:
        columns = {
            "image_a": [self.cells[each] for each in self.a],
            "image_b": [self.cells[each] for each in self.b],
            "true_label": pa.array(self.labels, pa.int8()),
            "probability": pa.array((1 / (1 + np.exp(-odds))).astype(np.float32)),
        }
        about = {"cache": str(self.folder / "cache"), "image_root": str(self.folder)}
        return write_scores(self.folder / f"{name}.parquet", columns, embedding=dict(FINGERPRINT.document), **about)

    def precision(self, evidence: Evidence) -> float:
        return float(np.isin(evidence.rows[evidence.ranked()[:WRONG]], self.wrong).mean())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    return Drawn(tmp_path_factory.mktemp("drawn"))


def evidence_of(path: str, second: SecondOpinion | None = None, *, vectors: bool) -> Evidence:
    scores = read_scores(ScoreFile.open(path))
    source = ImageSource.of(scores.file.record, None, None) if vectors else None
    return Evidence.of(scores, source, second)


def test_vectors_find_what_scores_do_not(drawn):
    path = drawn.scores("plain", drawn.odds)
    alone, compared = (evidence_of(path, vectors=each) for each in (False, True))
    assert alone.around is None and alone.without_vectors == "images are not read"
    assert compared.around is not None and compared.without_vectors == ""
    assert drawn.precision(compared) > max(0.85, drawn.precision(alone) + 0.1)


def test_a_second_run_is_listened_to(drawn):
    second = SecondOpinion(read_scores(ScoreFile.open(drawn.scores("better", drawn.better))), None)
    path = drawn.scores("plain", drawn.odds)
    assert drawn.precision(evidence_of(path, second, vectors=False)) > 0.8


def test_a_second_run_that_failed_says_nothing(drawn):
    path = drawn.scores("plain", drawn.odds)
    lost = SecondOpinion(read_scores(ScoreFile.open(drawn.scores("lost", np.full(PAIRS, np.nan)))), None)
    found, alone = (evidence_of(path, each, vectors=False) for each in (lost, None))
    assert drawn.precision(found) == pytest.approx(drawn.precision(alone), abs=0.1)


def test_the_command_says_what_judged(drawn, tmp_path):
    plain, better = drawn.scores("plain", drawn.odds), drawn.scores("better", drawn.better)
    done = batchverify.evaluate(plain, tmp_path / "out", better, draws=0, suspects=(5, str(tmp_path / "s.csv")))
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["suspects"]
    assert (told["vectors"], told["without_vectors"], told["second_opinion"]) == (drawn.images, None, True)
    lines = [text for _, text in done.lines()]
    assert f"judged by the scores and the vectors of {drawn.images:,} images, and by the reference run" in lines
    assert "couples of images from both sides together" in (tmp_path / "s.csv").read_text()
    done = batchverify.evaluate(plain, draws=0, no_images=True, suspects=(5, str(tmp_path / "t.csv")))
    assert "judged by the scores, without vectors: images are not read" in [text for _, text in done.lines()]
