"""Manifests from the real LFW lists and from small trees made here."""

import csv
import hashlib
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.prepare import COLUMNS, Prepared, prepare_folders, prepare_lfw


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def people(rows: list[dict[str, str]]) -> set[str]:
    return {row[column] for row in rows for column in ("person_a", "person_b")}


def images(rows: list[dict[str, str]]) -> set[str]:
    return {row[column] for row in rows for column in ("image_a", "image_b")}


def digests(prepared: Prepared) -> dict[str, str]:
    return {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in prepared.manifests.items()}


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xd8")


def grow(root: Path, sizes: dict[str, int], suffix: str = ".jpg") -> Path:
    """A tree with the given number of images per person."""
    for person, count in sizes.items():
        for number in range(count):
            touch(root / person / f"{number}{suffix}")
    return root


# Ten people in five groups: A-B, C-D, … linked by one different pair each, one same pair per first person.
SAME = [f"P{i}\t1\t2" for i in range(0, 10, 2)]
DIFFERENT = [f"P{i}\t1\tP{i + 1}\t3" for i in range(0, 10, 2)]
TRAIN = ["5", *SAME, *DIFFERENT]
TEST = ["2", "T0\t1\t2", "T1\t1\t2", "T0\t1\tT1\t1", "T0\t2\tT2\t1"]


def lfw(root: Path, folder: str = "lfw-deepfunneled", **lists: list[str]) -> Path:
    """A small LFW with every image that TRAIN and TEST name, and its lists."""
    for person in [f"P{i}" for i in range(10)] + ["T0", "T1", "T2"]:
        for number in (1, 2, 3):
            touch(root / folder / person / f"{person}_{number:04d}.jpg")
    for name, lines in ({"pairsDevTrain": TRAIN, "pairsDevTest": TEST} | lists).items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory) -> Prepared:
    return prepare_lfw(shared / "data" / "lfw", tmp_path_factory.mktemp("lfw"))


@pytest.mark.weights
def test_real_lfw_has_the_published_counts(real):
    assert real.rows == {"train": 2048, "dev": 152, "test": 1000}
    assert real.missing == () and set(real.dropped.values()) == {0}
    for split, count in {"train": 1024, "dev": 76, "test": 500}.items():
        rows = read(real.manifests[split])
        assert tuple(rows[0]) == COLUMNS
        assert Counter(row["label"] for row in rows) == {"0": count, "1": count}
        assert all((row["person_a"] == row["person_b"]) == (row["label"] == "0") for row in rows)
    assert len(images(read(real.manifests["test"]))) == 1549


@pytest.mark.weights
def test_real_lfw_dev_shares_no_person_with_train(real):
    train, dev = read(real.manifests["train"]), read(real.manifests["dev"])
    assert not people(train) & people(dev)
    assert len(people(dev)) > 100


@pytest.mark.weights
def test_real_lfw_paths_lead_from_the_manifest_to_the_image_of_the_named_person(real):
    for path in real.manifests.values():
        for row in read(path):
            for side in "ab":
                image = row[f"image_{side}"]
                assert not Path(image).is_absolute() and (path.parent / image).is_file()
                assert Path(image).parent.name == row[f"person_{side}"]


@pytest.mark.weights
def test_real_lfw_keeps_every_row_of_the_lists_in_order(real, shared):
    def key(row: dict[str, str]) -> tuple[str, str]:
        return Path(row["image_a"]).stem, Path(row["image_b"]).stem

    def listed(name: str) -> list[tuple[str, str]]:
        lines = (shared / "data" / "lfw" / name).read_text().splitlines()[1:]
        fields = [f if len(f) == 4 else [f[0], f[1], f[0], f[2]] for f in (x.split("\t") for x in lines)]
        return [(f"{a}_{int(i):04d}", f"{b}_{int(j):04d}") for a, i, b, j in fields]

    assert [key(row) for row in read(real.manifests["test"])] == listed("pairsDevTest.txt")
    whole = listed("pairsDevTrain.txt")
    split = {s: [key(row) for row in read(real.manifests[s])] for s in ("train", "dev")}
    assert sorted(split["train"] + split["dev"]) == sorted(whole)
    for rows in split.values():
        assert rows == [pair for pair in whole if pair in set(rows)]


@pytest.mark.weights
def test_real_lfw_seed_decides_the_split_to_the_byte(real, shared, tmp_path):
    root = shared / "data" / "lfw"
    before = digests(real)
    assert digests(prepare_lfw(root, real.manifests["dev"].parent)) == before
    other = prepare_lfw(root, tmp_path, seed=1)
    assert other.rows == real.rows
    assert people(read(other.manifests["dev"])) != people(read(real.manifests["dev"]))
    # The default dev set is part of every published figure: it must not drift with a Python version.
    stems = "".join(f"{Path(r['image_a']).stem} {Path(r['image_b']).stem}\n" for r in read(real.manifests["dev"]))
    assert hashlib.sha256(stems.encode()).hexdigest()[:16] == "2a829efd2c449362"


@pytest.mark.weights
def test_folders_on_real_faces_gives_the_default_counts(shared, tmp_path):
    prepared = prepare_folders(shared / "data" / "lfw" / "lfw-deepfunneled", tmp_path)
    assert prepared.rows == {"train": 2048, "dev": 152, "test": 1000}
    assert all((tmp_path / image).is_file() for image in images(read(tmp_path / "test.csv")))


def test_small_list_is_split_by_groups(tmp_path):
    prepared = prepare_lfw(lfw(tmp_path), tmp_path / "out")
    train, dev = read(tmp_path / "out" / "train.csv"), read(tmp_path / "out" / "dev.csv")
    assert prepared.rows == {"train": 8, "dev": 2, "test": 4}
    assert Counter(row["label"] for row in dev) == {"0": 1, "1": 1}
    assert not people(train) & people(dev)
    assert read(tmp_path / "out" / "test.csv")[0] == {
        "image_a": "../lfw-deepfunneled/T0/T0_0001.jpg",
        "image_b": "../lfw-deepfunneled/T0/T0_0002.jpg",
        "label": "0",
        "person_a": "T0",
        "person_b": "T0",
    }


def test_dev_grows_past_its_share_rather_than_lack_a_class(tmp_path):
    # Groups of two same and two different pairs: 7 % of six pairs is less than one, so nothing would fit.
    same = [f"P{i}\t{a}\t{b}" for i in (0, 2, 4) for a, b in ((1, 2), (2, 3))]
    different = [f"P{i}\t{n}\tP{i + 1}\t1" for i in (0, 2, 4) for n in (1, 2)]
    prepared = prepare_lfw(lfw(tmp_path, pairsDevTrain=["6", *same, *different]), tmp_path / "out")
    assert prepared.rows == {"train": 8, "dev": 4, "test": 4}


def test_a_list_in_one_group_cannot_be_split(tmp_path):
    ring = [f"P{i}\t1\tP{i + 1}\t1" for i in range(5)]
    root = lfw(tmp_path, pairsDevTrain=["5", *[f"P{i}\t1\t2" for i in range(5)], *ring])
    with pytest.raises(ManifestError, match=r"pairsDevTrain\.txt: no dev list can be split off"):
        prepare_lfw(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_view_two_gets_its_fold(tmp_path):
    fold = ["T0\t1\t2", "T1\t1\t2", "T0\t1\tT1\t1", "T1\t2\tT2\t1"]
    root = lfw(tmp_path, pairs=["10\t2", *fold * 10])
    prepared = prepare_lfw(root, tmp_path / "out")
    rows = read(prepared.manifests["pairs"])
    assert tuple(rows[0]) == (*COLUMNS, "fold")
    assert [row["fold"] for row in rows] == [str(n // 4 + 1) for n in range(40)]
    assert [row["label"] for row in rows] == ["0", "0", "1", "1"] * 10
    assert prepared.rows["pairs"] == 40


def test_missing_images_are_listed_once_and_their_rows_counted(tmp_path):
    root = lfw(tmp_path)
    before = prepare_lfw(root, tmp_path / "out")
    dev = read(before.manifests["dev"])
    (root / "lfw-deepfunneled" / "T0" / "T0_0001.jpg").unlink()
    (root / "lfw-deepfunneled" / "T2" / "T2_0001.jpg").unlink()
    after = prepare_lfw(root, tmp_path / "out")
    missing = ("../lfw-deepfunneled/T0/T0_0001.jpg", "../lfw-deepfunneled/T2/T2_0001.jpg")
    assert after.missing == missing
    assert after.dropped == {"train": 0, "dev": 0, "test": 3}
    assert after.rows == {"train": 8, "dev": 2, "test": 1}
    assert not images(read(after.manifests["test"])) & set(missing)
    assert read(after.manifests["dev"]) == dev


def test_a_missing_image_does_not_move_the_split(tmp_path):
    root = lfw(tmp_path)
    before = people(read(prepare_lfw(root, tmp_path / "out").manifests["dev"]))
    for person in before:
        (root / "lfw-deepfunneled" / person / f"{person}_0001.jpg").unlink()
    after = prepare_lfw(root, tmp_path / "out")
    assert (after.rows["dev"], after.dropped["dev"], after.rows["train"]) == (0, 2, 8)
    assert after.manifests["dev"].read_text() == ",".join(COLUMNS) + "\n"


def test_no_image_at_all_is_an_error(tmp_path):
    root = lfw(tmp_path)
    for image in root.glob("lfw*/*/*.jpg"):
        image.rename(image.with_name(f"other_{image.name}"))
    with pytest.raises(UsageError, match=r"P0_0001\.jpg: not found, and neither is any other of the 20 images"):
        prepare_lfw(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("folders", "chosen"),
    [
        (("lfw", "lfw-deepfunneled", "lfw2"), "lfw-deepfunneled"),
        (("lfw_funneled", "lfw2"), "lfw2"),
        (("lfw_funneled",), "lfw_funneled"),
    ],
)
def test_image_folder_is_chosen_as_documented(tmp_path, folders, chosen):
    for folder in folders:
        lfw(tmp_path, folder)
    (tmp_path / "lfw-a-deepfunneled" / "empty").mkdir(parents=True)
    (tmp_path / "lfw.tgz").write_bytes(b"")
    rows = read(prepare_lfw(tmp_path, tmp_path / "out").manifests["test"])
    assert {Path(image).parts[1] for image in images(rows)} == {chosen}


@pytest.mark.parametrize(
    ("name", "what"),
    [("pairsDevTrain.txt", "View 1's training list"), ("pairsDevTest.txt", "View 1's test list")],
)
def test_a_list_that_is_not_there_is_named(tmp_path, name, what):
    (lfw(tmp_path) / name).unlink()
    with pytest.raises(UsageError) as error:
        prepare_lfw(tmp_path, tmp_path / "out")
    assert str(error.value) == f"{tmp_path / name}: No such file or directory; LFW's {what} is needed here"


def test_no_image_folder_and_no_root_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no folder with LFW's images"):
        prepare_lfw(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match=r"nowhere: cannot be read as a folder: No such file"):
        prepare_lfw(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "line 1: expected the number of pairs, got ''"),
        (["five", *TEST[1:]], "line 1: expected the number of pairs, got 'five'"),
        (["10\t2", *TEST[1:]], "line 1: expected the number of pairs, got '10\\t2'"),
        (TEST[:4], "line 1: announces 4 rows, the file has 3"),
        ([*TEST, "T0\t1\tT1\t2"], "line 1: announces 4 rows, the file has 5"),
        (
            ["2", "T0 1 2", *TEST[2:]],
            "line 2: expected name, number, number with tabs between them, got 'T0 1 2'",
        ),
        (["2", TEST[1], "T1\t0\t2", *TEST[3:]], "line 3: expected name, number, number"),
        (["2", TEST[1], "T1\t1\tx", *TEST[3:]], "got 'T1\\t1\\tx'"),
        (
            ["2", TEST[1], "", *TEST[3:]],
            "line 3: expected name, number, number with tabs between them, got ''",
        ),
        (["2", TEST[1], TEST[3], *TEST[3:]], "line 3: expected name, number, number"),
        ([*TEST[:4], "T0\t1\t2"], "line 5: expected name, number, another name, number"),
        ([*TEST[:4], "T0\t1\tT0\t2"], "got 'T0\\t1\\tT0\\t2'"),
        ([*TEST[:4], "../T0\t1\tT1\t2"], "got '../T0\\t1\\tT1\\t2'"),
    ],
)
def test_a_malformed_line_is_named_with_its_value(tmp_path, lines, message):
    root = lfw(tmp_path, pairsDevTest=lines)
    with pytest.raises(ManifestError) as error:
        prepare_lfw(root, tmp_path / "out")
    assert str(error.value).startswith(f"{root / 'pairsDevTest.txt'}: line ")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folds_need_both_counts_and_lists_must_be_utf8(tmp_path):
    root = lfw(tmp_path, pairs=TEST)
    with pytest.raises(
        ManifestError, match=r"pairs\.txt: line 1: expected the numbers of folds and of pairs, got '2'"
    ):
        prepare_lfw(root, tmp_path / "out")
    (root / "pairs.txt").write_bytes(b"10\t300\nJos\xe9\t1\t2\n")
    with pytest.raises(ManifestError, match=r"pairs\.txt: byte 10: not UTF-8 text"):
        prepare_lfw(root, tmp_path / "out")


def test_lists_with_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    plain = digests(prepare_lfw(lfw(tmp_path), tmp_path / "out"))
    text = "\r\n".join(TRAIN) + "\r\n\r\n"
    (tmp_path / "pairsDevTrain.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert digests(prepare_lfw(tmp_path, tmp_path / "out")) == plain


def test_folders_split_people_disjointly_and_draw_without_repetition(tmp_path):
    root = grow(tmp_path / "tree", {f"p{n:02d}": 1 + n % 5 for n in range(40)})
    prepared = prepare_folders(root, tmp_path / "out", pairs={"train": 30, "dev": 5, "test": 12})
    assert prepared.rows == {"train": 60, "dev": 10, "test": 24}
    found = {split: read(path) for split, path in prepared.manifests.items()}
    assert not any(people(found[a]) & people(found[b]) for a, b in combinations(found, 2))
    for rows in found.values():
        assert len({frozenset((row["image_a"], row["image_b"])) for row in rows}) == len(rows)
        assert Counter(row["label"] for row in rows) == {"0": len(rows) // 2, "1": len(rows) // 2}
        for row in rows:
            assert Path(row["image_a"]).parent.name == row["person_a"]
            assert Path(row["image_b"]).parent.name == row["person_b"]
            assert row["image_a"] != row["image_b"]
            assert (row["person_a"] == row["person_b"]) == (row["label"] == "0")


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 1}, {"a": 3, "b": 3, "c": 2}, {"a": 5, "b": 1}])
def test_folders_scale_down_to_every_pair_of_the_scarcer_class(tmp_path, sizes):
    root = grow(tmp_path / "tree", sizes)
    prepared = prepare_folders(root, tmp_path / "out", pairs={"test": 500})
    rows = read(prepared.manifests["test"])
    same = sum(n * (n - 1) // 2 for n in sizes.values())
    different = sum(a * b for a, b in combinations(sizes.values(), 2))
    assert Counter(row["label"] for row in rows) == dict.fromkeys("01", min(same, different))
    assert len({frozenset((row["image_a"], row["image_b"])) for row in rows}) == len(rows)
    assert list(prepared.manifests) == ["test"] and not (tmp_path / "out" / "train.csv").exists()


def test_folders_spread_pairs_over_people(tmp_path):
    root = grow(tmp_path / "tree", {"crowd": 60} | {f"p{n}": 2 for n in range(9)})
    rows = read(prepare_folders(root, tmp_path / "out", pairs={"test": 12}).manifests["test"])
    same = Counter(row["person_a"] for row in rows if row["label"] == "0")
    assert same == {"crowd": 3} | {f"p{n}": 1 for n in range(9)}
    couples = Counter((row["person_a"], row["person_b"]) for row in rows if row["label"] == "1")
    assert set(couples.values()) == {1}


def test_folders_give_a_small_dev_more_than_two_people(tmp_path):
    root = grow(tmp_path / "tree", {f"p{n:02d}": 6 for n in range(40)})
    prepared = prepare_folders(root, tmp_path / "out")
    numbers = {split: len(people(read(path))) for split, path in prepared.manifests.items()}
    assert numbers == {"train": 20, "dev": 6, "test": 14}
    assert prepared.rows == {"train": 600, "dev": 152, "test": 420}


@pytest.mark.parametrize("order", ["fbhadgce", "abcdefgh", "hgfedcba"])
def test_folders_do_not_depend_on_the_order_of_the_directory(tmp_path, order):
    prepared = prepare_folders(grow(tmp_path / "tree", dict.fromkeys(order, 3)), tmp_path / "out")
    # Written down, because a file system may well list two trees of the same names in the same order.
    assert {split: "".join(sorted(people(read(path)))) for split, path in prepared.manifests.items()} == {
        "train": "bdg",
        "dev": "ef",
        "test": "ach",
    }
    other = prepare_folders(tmp_path / "tree", tmp_path / "other", seed=7)
    assert digests(other) != digests(prepared)


@pytest.mark.parametrize("seed", range(5))
def test_folders_give_every_split_a_person_with_two_images(tmp_path, seed):
    root = grow(tmp_path / "tree", dict.fromkeys("bdf", 2) | dict.fromkeys("aceghi", 1))
    prepared = prepare_folders(root, tmp_path / "out", seed=seed)
    assert prepared.rows == {"train": 2, "dev": 2, "test": 2}


def test_folders_sort_each_class(tmp_path):
    root = grow(tmp_path / "tree", dict.fromkeys("hcfadgbe", 4))
    for path in prepare_folders(root, tmp_path / "out").manifests.values():
        keys = [(row["label"], row["image_a"], row["image_b"]) for row in read(path)]
        assert len(keys) > 10 and keys == sorted(keys)


def test_paths_hold_through_symbolic_links(tmp_path):
    root = lfw(tmp_path / "data" / "real")
    (tmp_path / "far" / "down").mkdir(parents=True)
    (tmp_path / "root").symlink_to(root)
    (tmp_path / "out").symlink_to(tmp_path / "far" / "down")
    prepared = prepare_lfw(tmp_path / "root", tmp_path / "out")
    assert prepared.manifests["test"] == tmp_path.resolve() / "far" / "down" / "test.csv"
    assert read(prepared.manifests["test"])[0]["image_a"].startswith("../../data/real/lfw-deepfunneled/T0/")


def test_folders_with_awkward_names_come_back_from_the_csv(tmp_path):
    names = ["Zoë Müller", "Smith, John", 'The "Kid"', "李小龍", "two\nlines", "a\\b"]
    root = grow(tmp_path / "a tree", dict.fromkeys(names, 3))
    prepared = prepare_folders(root, tmp_path / "out")
    found = [row for path in prepared.manifests.values() for row in read(path)]
    assert people(found) == set(names)
    assert all((tmp_path / "out" / image).is_file() for image in images(found))
    assert all(b"\r" not in path.read_bytes() for path in prepared.manifests.values())


def test_folders_take_images_one_level_down_and_nothing_else(tmp_path):
    root = grow(tmp_path / "tree", {"a": 2, "b": 2}, ".JPG")
    for other in (
        "a/notes.txt",
        "a/.hidden.jpg",
        "a/deeper/1.jpg",
        ".cache/1.jpg",
        "loose.jpg",
        "c/readme.md",
    ):
        touch(root / other)
    for suffix in ("png", "webp", "tiff", "gif", "avif", "bmp", "jpeg", "tif"):
        touch(root / "b" / f"x.{suffix}")
    rows = read(prepare_folders(root, root / "manifests", pairs={"test": 500}).manifests["test"])
    assert people(rows) == {"a", "b"}
    assert images(rows) <= {f"../{p.relative_to(root).as_posix()}" for p in root.glob("[ab]/*.*")}
    assert not any("hidden" in image or "deeper" in image or "notes" in image for image in images(rows))
    assert len(images(rows)) == 12


def test_folders_list_links_that_lead_nowhere(tmp_path):
    root = grow(tmp_path / "tree", {"a": 2, "b": 2})
    (root / "a" / "1.jpg").unlink()
    (root / "a" / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    prepared = prepare_folders(root, tmp_path / "out", pairs={"test": 500})
    assert prepared.missing == ("../tree/a/1.jpg",)
    assert prepared.rows["test"] + prepared.dropped["test"] == 4
    assert "../tree/a/1.jpg" not in images(read(prepared.manifests["test"]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "0 folders with images, 0 of them with two or more; train, dev, test need 6 and 3"),
        ({"a": 9}, "1 folders with images, 1 of them with two or more"),
        (dict.fromkeys("abcdef", 1), "6 folders with images, 0 of them with two or more"),
        (dict.fromkeys("abcde", 2), "5 folders with images, 5 of them"),
    ],
)
def test_folders_with_too_few_people_are_named(tmp_path, sizes, message):
    root = grow(tmp_path / "tree", sizes)
    root.mkdir(exist_ok=True)
    with pytest.raises(UsageError) as error:
        prepare_folders(root, tmp_path / "out")
    assert str(error.value).startswith(f"{root}: ") and message in str(error.value)


@pytest.mark.parametrize("pairs", [{}, {"train": 0}, {"train": -1}, {"holdout": 5}])
def test_folders_refuse_pairs_that_make_no_sense(tmp_path, pairs):
    root = grow(tmp_path / "tree", dict.fromkeys("abcdefgh", 3))
    with pytest.raises(UsageError, match=r"pairs must give train, dev or test a number above 0, got \{"):
        prepare_folders(root, tmp_path / "out", pairs=pairs)


def test_an_output_that_is_a_file_is_named_and_a_name_that_is_no_utf8_leaves_nothing(tmp_path):
    root = grow(tmp_path / "tree", dict.fromkeys("abcdefgh", 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/train\.csv: cannot be written"):
        prepare_folders(root, tmp_path / "file")
    broken = grow(tmp_path / "broken", {os.fsdecode(b"Jos\xe9"): 2, "b": 2})
    with pytest.raises(UsageError, match=r"test\.csv: cannot hold .*not valid UTF-8; rename these files"):
        prepare_folders(broken, tmp_path / "out", pairs={"test": 500})
    assert not list((tmp_path / "out").iterdir())


def test_a_second_run_replaces_the_manifests_and_leaves_no_temporary_file(tmp_path):
    root = grow(tmp_path / "tree", dict.fromkeys("abcdefgh", 3))
    first = digests(prepare_folders(root, tmp_path / "deep" / "out"))
    (tmp_path / "deep" / "out" / "dev.csv").write_text("something else")
    assert digests(prepare_folders(root, tmp_path / "deep" / "out")) == first
    names = sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    assert names == ["dev.csv", "test.csv", "train.csv"]
