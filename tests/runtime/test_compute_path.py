"""Compute paths: what run records hold of them, and which give one vector."""

import pytest

from batchverify.runtime.compute_path import (
    ComputePath,
    members_from_text,
    members_to_text,
    paths_from_text,
    paths_to_text,
    shown_members,
)

TEXTS = (
    "cpu int8_bfloat16 openvino, batches of 32",
    "cpu float32 torch, batches of 1",
    "cuda:1 bfloat16 torch, batches of 512",
    "cpu fp32 64",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back(text):
    assert str(ComputePath.parse(text)) == text
    assert paths_to_text(paths_from_text(text)) == text


def test_several_paths_are_one_text_each_once_in_order():
    text = " + ".join(sorted(TEXTS))
    assert paths_to_text([*map(ComputePath.parse, TEXTS), ComputePath.parse(TEXTS[0])]) == text
    assert [str(path) for path in paths_from_text(text)] == sorted(TEXTS)
    assert paths_from_text("") == []
    assert paths_to_text([]) == ""


def test_the_number_of_a_gpu_and_the_batch_do_not_change_vectors():
    path = ComputePath("cuda:0", "bfloat16", "torch", 512)
    assert path.same_vectors(ComputePath("cuda:1", "bfloat16", "torch", 256))
    for other in (
        ("cpu", "bfloat16", "torch"),
        ("cuda:0", "float16", "torch"),
        ("cuda:0", "bfloat16", "openvino"),
    ):
        assert not path.same_vectors(ComputePath(*other, 512))
    assert ComputePath.parse("of old").same_vectors(ComputePath("of old"))
    assert not ComputePath.parse("of old").same_vectors(path)


def test_reasons():
    assert ComputePath("cuda", "bfloat16", "torch", 512).reason == (
        "this hardware multiplies it, and it has the range of float32; torch, recorded as a CUDA graph"
    )
    assert ComputePath("cpu", "int8_bfloat16", "openvino", 32).reason == (
        "8-bit integers in the layers for which the weights state ranges, bfloat16 in the others; OpenVINO"
    )
    assert ComputePath("toy").reason == ""


def test_the_paths_of_several_backbones_are_one_text():
    one, other = (
        "cpu int8_float32 openvino, batches of 32",
        "cpu float32 openvino, batches of 32 + cuda x y, batches of 8",
    )
    for texts in ([one, other], ["", other], [one, ""], ["", "", one]):
        assert members_from_text(members_to_text(texts), len(texts)) == texts
    assert members_to_text(["", ""]) == "" and members_from_text("", 2) == ["", ""]
    assert members_to_text([one]) == one and members_from_text(other, 1) == [other]


def test_backbones_that_computed_nothing_and_equal_paths_are_not_shown():
    assert shown_members(members_to_text(["", "cpu float32 openvino, batches of 4"])) == (
        "cpu float32 openvino, batches of 4"
    )
    assert shown_members(members_to_text(["a", "b", "a"])) == "a | b"
    assert shown_members("") == ""
