"""Labelled pairs: collected, checked, drawn and augmented; their impostor pairs, and leaks between sets."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
from people import draw_people

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.records import Reason, Skipped
from batchverify.training.pairs import (
    MOST_IMPOSTORS,
    LabelledPairs,
    check_apart,
    count_labels,
    find_leaks,
    people_of,
    shared_people,
)

# r1 shows nobody known.
MANIFEST = """image_a,image_b,label,person_a,person_b
p1.jpg,p2.jpg,0,P,P
p1.jpg,q1.jpg,1,P,Q
q1.jpg,r1.jpg,1,Q,
r1.jpg,p3.jpg,1,,P
p3.jpg,q2.jpg,1,P,Q
"""


def collect(source, failed: dict[str, Reason] | None = None, name: str = "training") -> LabelledPairs:
    """The pairs of a manifest; the vector of each image that did not fail holds its index."""
    manifest = Manifest.open(source)
    scan = manifest.scan()
    embeddings = EmbeddingTable(len(scan.images))
    for index, image_path in enumerate(scan.images):
        reason = (failed or {}).get(str(image_path).rpartition("/")[2])
        if reason is not None:
            embeddings.fail(index, Skipped(reason))
        else:
            embeddings.put(index, np.full(512, index + 1, np.float16))
    return LabelledPairs.collect(manifest, scan, embeddings, name)


@pytest.fixture
def written(tmp_path):
    """A function that writes a manifest and returns its path."""

    def write(text: str, name: str = "pairs.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def names(pairs: LabelledPairs, side: np.ndarray) -> list[str]:
    return [pairs.image_paths[image].rpartition("/")[2] for image in side]


def test_every_row_is_a_pair_in_order(written):
    pairs = collect(written(MANIFEST))
    assert names(pairs, pairs.a) == ["p1.jpg", "p1.jpg", "q1.jpg", "r1.jpg", "p3.jpg"]
    assert names(pairs, pairs.b) == ["p2.jpg", "q1.jpg", "r1.jpg", "p3.jpg", "q2.jpg"]
    assert pairs.labels.tolist() == [0, 1, 1, 1, 1] and pairs.labels.dtype == np.int8
    assert (pairs.a.dtype, len(pairs), pairs.left_out, pairs.name) == (np.int32, 5, (), "training")
    people = {pairs.image_paths[image].rpartition("/")[2]: person for image, person in pairs.persons.items()}
    assert people == {"p1.jpg": "P", "p2.jpg": "P", "p3.jpg": "P", "q1.jpg": "Q", "q2.jpg": "Q"}


def test_pairs_left_out_are_named_with_file_row_and_reason(written, tmp_path):
    written(MANIFEST, "one.csv")
    written("image_a,image_b,label,person_a,person_b\nq2.jpg,x.jpg,0,Q,Q\np1.jpg,p2.jpg,0,P,P\n", "two.csv")
    pairs = collect(tmp_path, {"q2.jpg": Reason.NO_FACE, "x.jpg": Reason.NOT_FOUND})
    assert pairs.labels.tolist() == [0, 1, 1, 1, 0]
    assert [str(each) for each in pairs.left_out] == [
        f"{tmp_path}/one.csv: row 5: image_b no_face",
        f"{tmp_path}/two.csv: row 1: image_a no_face, image_b not_found",
    ]
    assert (pairs.left_out[1].error_a, pairs.left_out[0].error_a) == ("no_face", None)


def test_a_manifest_whose_pairs_are_all_left_out(written):
    pairs = collect(written("image_a,image_b,label\na.jpg,b.jpg,0\n"), {"a.jpg": Reason.FORBIDDEN})
    assert (len(pairs), len(pairs.left_out)) == (0, 1)
    with pytest.raises(UsageError, match="of 0 pairs, 0 are same and 0 different"):
        pairs.check()


def test_people_of_a_manifest_by_name(written):
    for text, people in ((MANIFEST, {"P", "Q"}), ("image_a,image_b,label\na,b,0\n", set())):
        manifest = Manifest.open(written(text))
        assert people_of(manifest, manifest.scan()) == people


def test_labels_are_counted_over_all_files(written, tmp_path):
    written(MANIFEST, "one.csv")
    written(MANIFEST.replace(",1,", ",0,", 2), "two.csv")
    manifest = Manifest.open(tmp_path)
    assert count_labels(manifest, manifest.scan()) == (4, 6)


@pytest.mark.parametrize(
    ("last", "text", "message"),
    [
        (None, "image_a,image_b\na,b\n", r"pairs\.csv: the manifest has no column 'label'"),
        (None, "image_a,image_b,label\na,b,0\na,c,1\na,d,\n", r"pairs\.csv: row 3: the label is blank"),
        (
            "image_a,image_b,label\na,b,1\na,c,\n",
            "image_a,image_b,label\na,b,0\n",
            r"z\.csv: row 2: the label",
        ),
    ],
)
def test_labels_that_are_missing(written, tmp_path, last, text, message):
    written(text)
    if last:
        written(last, "z.csv")
    manifest = Manifest.open(tmp_path)
    with pytest.raises(ManifestError, match=message):
        count_labels(manifest, manifest.scan())
    with pytest.raises(ManifestError, match=message):
        collect(tmp_path)


def test_a_person_may_be_the_number_zero():
    columns = {"image_a": ["a", "b"], "image_b": ["b", "c"], "label": [0, 1]}
    pairs = collect(pa.table({**columns, "person_a": [0, 0], "person_b": pa.array([0, None], pa.int64())}))
    assert pairs.persons == {0: "0", 1: "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": np.zeros(40, np.int8)},
            "training pairs need label 0 and label 1: of 40 pairs, 40 are same",
        ),
        ({"labels": np.ones(40, np.int8)}, "of 40 pairs, 0 are same and 40 different"),
        ({"labels": np.arange(40, dtype=np.int8) % 3}, "of 40 pairs, 14 are same and 13 different"),
    ],
)
def test_a_missing_label_is_refused(change, message):
    pairs = draw_people(8, 1, pairs=40)
    pairs.check(40)
    with pytest.raises(UsageError, match=message):
        replace(pairs, **change).check()


def test_too_few_pairs():
    with pytest.raises(UsageError, match="only 40 dev pairs; at least 41 are needed"):
        draw_people(8, 1, pairs=40, name="dev").check(41)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
def test_embeddings_that_are_not_finite(values):
    pairs = draw_people(8, 1, pairs=40)
    pairs.vectors[7, : len(values)] = values
    with pytest.raises(UsageError, match=r"have 1 embeddings that are not finite \(first: training/7.jpg\)"):
        pairs.check()


def test_blocks_come_in_order_and_hold_each_pair_once():
    pairs = draw_people(20, 1, pairs=100, dimension=8)
    blocks = list(pairs.blocks(32))
    assert [len(labels) for _, _, labels in blocks] == [32, 32, 32, 4]
    assert np.array_equal(np.concatenate([a for a, _, _ in blocks]), pairs.vectors[pairs.a].astype(np.float32))
    assert np.array_equal(np.concatenate([b for _, b, _ in blocks]), pairs.vectors[pairs.b].astype(np.float32))
    assert np.array_equal(np.concatenate([labels for _, _, labels in blocks]), pairs.labels)
    assert list(pairs.subset(np.zeros(100, bool)).blocks()) == []


def test_draw_limits_the_pairs_of_each_label():
    pairs = draw_people(20, 1, pairs=100).subset(np.arange(100))
    few = replace(pairs, labels=(np.arange(100) < 10).astype(np.int8)).draw(30, 0)
    assert np.bincount(few.labels).tolist() == [30, 10]
    assert pairs.draw(1000, 0).a.tolist() == pairs.a.tolist()
    assert pairs.draw(30, 0).a.tolist() != pairs.draw(30, 1).a.tolist()


def test_impostor_pairs_are_all_pairs_of_two_known_people_with_vectors(written):
    pairs = collect(written(MANIFEST), {"q2.jpg": Reason.NO_FACE})
    impostor_pairs = pairs.impostor_pairs()
    # P's three images against Q's one; r1 shows nobody known, q2 has no vector.
    found = [set(each) for each in zip(names(pairs, impostor_pairs.a), names(pairs, impostor_pairs.b), strict=True)]
    assert sorted(map(sorted, found)) == [["p1.jpg", "q1.jpg"], ["p2.jpg", "q1.jpg"], ["p3.jpg", "q1.jpg"]]
    assert impostor_pairs.labels.tolist() == [1, 1, 1]


def test_without_persons_the_labelled_different_pairs_are_the_impostor_pairs(written):
    pairs = collect(written("image_a,image_b,label\na.jpg,b.jpg,0\na.jpg,c.jpg,1\nb.jpg,c.jpg,0\n"))
    impostor_pairs = pairs.impostor_pairs()
    assert (names(pairs, impostor_pairs.a), names(pairs, impostor_pairs.b)) == (["a.jpg"], ["c.jpg"])


def test_impostor_pairs_of_many_images_are_a_fixed_draw():
    many = draw_people(2 * MOST_IMPOSTORS, 1, pairs=20, images=1, dimension=2, known=False)
    many = replace(many, persons={image: str(image) for image in range(len(many.vectors))})
    impostor_pairs = many.impostor_pairs()
    assert len(impostor_pairs) == MOST_IMPOSTORS * (MOST_IMPOSTORS - 1) / 2
    assert len(np.unique([impostor_pairs.a, impostor_pairs.b])) == MOST_IMPOSTORS
    assert np.array_equal(many.impostor_pairs().b, impostor_pairs.b)


def test_groups_are_people_or_single_images():
    pairs = replace(draw_people(2, 1, images=3, dimension=4), persons={0: "P", 2: "P", 3: "Q"})
    groups = pairs.groups()
    assert groups[0] == groups[2] != groups[3]
    assert len(np.unique(groups)) == 5


def test_views_repeat_every_pair_with_images_from_any_view():
    pairs = draw_people(6, 1, pairs=60, images=4, dimension=4)
    views = [pairs.vectors + np.float16(offset) for offset in (10, 20)]
    views[1][5] = 0  # no face in this view
    augmented = pairs.with_views(views, seed=3)
    plain = len(pairs)
    assert (len(augmented), augmented.originals, len(augmented.vectors)) == (
        3 * plain,
        plain,
        3 * len(pairs.vectors),
    )
    assert np.array_equal(augmented.a[:plain], pairs.a) and np.array_equal(augmented.labels, np.tile(pairs.labels, 3))
    assert np.array_equal(augmented.a % 24, np.tile(pairs.a, 3)) and np.array_equal(
        augmented.b % 24, np.tile(pairs.b, 3)
    )
    assert set((augmented.a[plain:] // 24).tolist()) == {0, 1, 2}
    assert np.array_equal(augmented.vectors[24 + 5], views[0][5])
    assert np.array_equal(augmented.vectors[48 + 5], pairs.vectors[5])
    assert np.array_equal(augmented.groups().reshape(3, 24), np.tile(pairs.groups(), (3, 1)))
    unknown = replace(pairs, persons={}).with_views(views, seed=3).groups().reshape(3, 24)
    assert np.array_equal(unknown, np.tile(unknown[0], (3, 1))) and len(np.unique(unknown)) == 24
    assert not np.array_equal(pairs.with_views(views, seed=4).a, augmented.a)


def test_people_by_number_are_the_same_with_and_without_blanks():
    """A blank turns a pandas column of whole numbers into floats: 1 and 1.0 are one person."""
    table = pa.table(
        {
            "image_a": ["a1.jpg", "b1.jpg", "c1.jpg"],
            "image_b": ["a2.jpg", "c2.jpg", "d1.jpg"],
            "label": [0, 1, 1],
            "person_a": pa.array([1, 2, 3], pa.int64()),
            "person_b": pa.array([1.0, 3.0, None], pa.float64()),
        }
    )
    pairs = collect(table)
    assert sorted(pairs.persons.values()) == ["1", "1", "2", "3", "3"]
    assert (pairs.all_pairs().labels == 0).sum() == 2


def test_labelled_different_pairs_serve_if_few_people_are_named(written):
    rows = "".join(f"x{n}.jpg,y{n}.jpg,1,,\n" for n in range(5))
    text = f"image_a,image_b,label,person_a,person_b\np1.jpg,q1.jpg,1,P,Q\np1.jpg,p2.jpg,0,P,P\n{rows}"
    pairs = collect(written(text))
    assert len(pairs.all_pairs()) == 3
    assert len(pairs.impostor_pairs()) == 6 and pairs.impostor_pairs().labels.all()


def share(train, dev, images: dict[int, int]):
    """dev with some of its images replaced by training images; images: from index in dev to index in train."""
    vectors = dev.vectors.copy()
    for target, source in images.items():
        vectors[target] = train.vectors[source]
    return replace(dev, vectors=vectors)


@pytest.fixture
def train():
    return draw_people(10, 1)


@pytest.fixture
def dev():
    return draw_people(6, 2, name="dev")


def test_sets_that_share_nothing(train, dev):
    assert find_leaks([train, dev, draw_people(5, 3, name="test")]) == []
    assert find_leaks([replace(train, persons={}), replace(dev, persons={})]) == []


def test_shared_people_are_counted_and_listed_by_name(train, dev):
    persons = {**dev.persons, 0: "training 3", 1: "training 3", 9: "training 1"}
    (leak,) = find_leaks([train, replace(dev, persons=persons)])
    assert (leak.first, leak.second, leak.images) == ("training", "dev", ())
    assert leak.people == ("training 1", "training 3")
    assert str(leak) == "training and dev share 2 people (training 1, training 3)"


def test_people_are_compared_by_name_before_images_are_embedded():
    leaks = shared_people({"training": {"P", "Q", "R"}, "dev": {"R", "P"}, "test": {"S"}})
    assert [str(each) for each in leaks] == ["training and dev share 2 people (P, R)"]
    assert shared_people({"training": set(), "dev": set()}) == []


def test_the_same_image_under_two_names(train, dev):
    (leak,) = find_leaks([train, share(train, dev, {4: 7})])
    assert (leak.people, leak.images) == ((), (("training/7.jpg", "dev/4.jpg"),))
    assert str(leak) == "training and dev share 1 identical image (training/7.jpg)"


def test_people_and_images_that_no_pair_uses_are_no_leak(train, dev):
    used = (dev.a != 0) & (dev.b != 0)
    shared = replace(share(train, dev, {0: 7}), persons={**dev.persons, 0: "training 1"})
    assert len(find_leaks([train, shared])) == 1
    assert find_leaks([train, shared.subset(used)]) == []


def test_all_sets_are_compared_and_long_lists_are_cut(train, dev):
    test = replace(share(train, replace(dev, name="test"), {0: 1}), persons=dict(train.persons))
    leaks = find_leaks([train, dev, test])
    assert [(each.first, each.second) for each in leaks] == [("training", "test"), ("dev", "test")]
    assert len(leaks[0].people) == 6 and len(leaks[1].images) == 23
    listed = ", ".join(f"training {number}" for number in range(5))
    assert str(leaks[0]) == (f"training and test share 6 people ({listed}, …) and 1 identical image (training/1.jpg)")
    assert len(json.loads(json.dumps(asdict(leaks[1])))["images"]) == 23


def test_without_image_paths_images_are_named_by_number(train, dev):
    (leak,) = find_leaks([replace(train, image_paths=()), share(train, dev, {4: 7})])
    assert leak.images == (("image 7", "dev/4.jpg"),)


def swapped(pairs):
    return replace(pairs, a=pairs.b, b=pairs.a)


def shuffled(pairs):
    return pairs.subset(np.random.default_rng(0).permutation(len(pairs)))


def renumbered(pairs):
    """The same pairs of the same images, from a manifest that names them in another order."""
    order = np.random.default_rng(1).permutation(len(pairs.vectors))
    index = np.argsort(order).astype(np.int32)
    return replace(pairs, vectors=pairs.vectors[order], a=index[pairs.a], b=index[pairs.b], persons={})


@pytest.mark.parametrize("change", [lambda pairs: pairs, swapped, shuffled, renumbered])
def test_dev_equal_to_train_is_refused_whatever_its_order(train, change):
    with pytest.raises(UsageError, match="every dev pair is among the training pairs"):
        check_apart(train, replace(change(train), name="dev"))


def test_dev_within_the_training_pairs_is_refused_and_one_new_pair_is_enough(train):
    with pytest.raises(UsageError, match="every dev pair"):
        check_apart(train, train.subset(np.arange(30)))
    check_apart(train.subset(np.arange(1, len(train))), train)


def test_other_pairs_of_the_same_images_are_accepted(train):
    check_apart(train, replace(train, a=np.roll(train.a, 1)))
