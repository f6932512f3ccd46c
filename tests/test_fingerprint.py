"""Settings and their fingerprint: stable, complete, and explained in a sentence when two differ."""

import json
import pickle
import random
import subprocess
import sys
from typing import Any

import pytest

from batchverify.errors import UsageError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings

BACKBONE = "b" * 64


def of(backbone: str = BACKBONE, **settings: object) -> EmbeddingFingerprint:
    return EmbeddingFingerprint.of(backbone, EmbeddingSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "c7e9eb2ff5449b2a2f132c3d3fbc1186"),
        ({"crop": "center"}, "93c140d1b33d6f4958aca7dc26e493a7"),
        ({"crop": "none", "tta": "flip"}, "37e191fd66a9b73b2326881d6ac9c174"),
    ],
)
def test_ids_are_pinned(settings: dict, expected: str) -> None:
    # A new id makes every cache and head of the users useless: change it only together with PIPELINE or with a
    # setting that affects vectors.
    assert of(**settings).id == expected


def test_the_canonical_form_ignores_order_and_survives_json() -> None:
    names = list(of().document)
    random.Random(1).shuffle(names)
    shuffled = EmbeddingFingerprint({name: of().document[name] for name in names})
    assert list(shuffled.document) != list(of().document)
    assert shuffled.canonical == of().canonical
    assert EmbeddingFingerprint(json.loads(of().canonical)).id == of().id
    assert pickle.loads(pickle.dumps(of())) == of()


def test_another_process_computes_the_same_id() -> None:
    code = (
        "from batchverify.fingerprint import *; import sys;"
        f"print(EmbeddingFingerprint.of({BACKBONE!r}, EmbeddingSettings()).id, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [of().id, "False"]


@pytest.mark.parametrize("crop", ["center", "none"])
def test_the_margin_matters_only_with_the_detector(crop: str) -> None:
    assert of(crop=crop, margin=14).id == of(crop=crop).id
    assert of(margin=14).id != of().id


def test_every_setting_that_affects_vectors_changes_the_id() -> None:
    different = [of(), of("c" * 64), of(crop="center"), of(crop="none"), of(margin=0), of(tta="flip")]
    assert len({each.id for each in different}) == len(different)


def test_the_detector_changes_the_id_only_where_there_is_one() -> None:
    align: dict[str, Any] = {"crop": "align", "detector": "retinaface"}
    different = [of(), of(detector="retinaface"), of(**align), of(**align, template="arcface")]
    different += [of(**align, face="largest"), of(detector="retinaface", margin=14)]
    assert len({each.id for each in different}) == len(different)
    assert of(detector="mtcnn").id == of().id
    assert of(crop="none", detector="retinaface").id == of(crop="none").id
    assert of(**align, margin=14).id == of(**align).id
    assert of(detector="retinaface", template="arcface").id == of(detector="retinaface").id
    assert of(**align, min_face=40).with_default_choice().id == of(**align).id
    assert of().difference(of(detector="retinaface")) == "crop.detector nothing against retinaface"


def test_difference_is_a_sentence_in_both_directions() -> None:
    assert of().difference(of(margin=14, tta="flip")) == "crop.margin 44 against 14; tta none against flip"
    assert of(margin=14).difference(of()) == "crop.margin 14 against 44"
    assert of().difference(of("c" * 64)) == "backbone bbbbbbbbbbbb… against cccccccccccc…"
    assert "crop.margin 44 against nothing; crop.mode detect against none" in of().difference(of(crop="none"))
    assert of().difference(of()) == ""


@pytest.mark.parametrize("document", [{}, {"crop": {"mode": "none"}}, {"crop": [1]}, {"a": {}}])
def test_a_difference_is_never_empty_for_different_documents(document: dict) -> None:
    assert EmbeddingFingerprint(document).difference(EmbeddingFingerprint({"crop": {}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "face"}, "crop must be one of detect, align, center, none, got 'face'"),
        ({"detector": "yunet"}, "detector must be one of mtcnn, retinaface, got 'yunet'"),
        (
            {"crop": "align"},
            "--crop align needs --detector retinaface: the landmarks of mtcnn are wrong where a face touches the "
            "edge of the image",
        ),
        ({"tta": "ten"}, "tta must be one of none, flip, got 'ten'"),
        ({"margin": -1}, "margin must be a whole number between 0 and 120 of 160 pixels, got -1"),
        ({"margin": 121}, "margin must be a whole number between 0 and 120 of 160 pixels, got 121"),
        ({"margin": 44.0}, "margin must be a whole number between 0 and 120 of 160 pixels, got 44.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        EmbeddingSettings(**settings)
    assert str(caught.value) == message


def test_face_choice_and_smallest_face_change_the_id_only_with_the_detector() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"face": "largest"},
        {"face": "probable"},
        {"min_face": 20},
        {"min_face": 40},
        {"view": 1},
    ]
    assert len({of(**each).id for each in settings}) == len(settings)
    assert of(face="center").id == of().id
    assert of(crop="none", face="largest").id == of(crop="none").id
    assert "crop.smallest 20 or side/24 against 40" in of().difference(of(min_face=40))
    for wrong in ({"face": "left"}, {"min_face": 11}, {"min_face": 1001}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            EmbeddingSettings(**wrong)
