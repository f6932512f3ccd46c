"""Markers, images that only some nodes have, and the check that a worker makes itself."""

from pathlib import Path

import pytest

from batchverify.engine.ray.cluster import Node
from batchverify.engine.ray.shared_paths import (
    MARKER,
    SAMPLE,
    SharedPaths,
    look,
    put_marker,
    remove,
    require_alike,
    sample,
)
from batchverify.errors import UsageError
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location
from batchverify.storage.temporary import temporary_name

ONE, TWO = Node("a" * 56, "10.0.0.1", 1, 1, 0), Node("b" * 56, "10.0.0.2", 1, 1, 0)


def test_images_that_one_node_lacks_are_named_with_both_nodes():
    message = r"/p/2.jpg: node 10.0.0.1 \(aaaaaaaa\) has this image, node 10.0.0.2 \(bbbbbbbb\) does not"
    with pytest.raises(UsageError, match=message):
        require_alike({ONE: [False, True], TWO: [False, False]}, ["/p/1.jpg", "/p/2.jpg"])
    # An image that no node has is `not_found` in its rows, not an error of sharing.
    require_alike({ONE: [False, True], TWO: [False, True]}, ["/p/1.jpg", "/p/2.jpg"])


def test_the_sample_is_spread_and_of_local_images():
    image_paths = [f"/p/{number}.jpg" for number in range(1000)]
    chosen = sample([*image_paths, "s3://b/k.jpg", Skipped(Reason.NOT_FOUND)])
    assert SAMPLE <= len(chosen) <= SAMPLE + 2
    assert chosen[0] == "/p/0.jpg"
    assert int(Path(chosen[-1]).stem) > 950
    assert sample(["s3://b/k.jpg", Skipped(Reason.NOT_FOUND)]) == []


def test_a_marker_lasts_as_long_as_its_run(tmp_path):
    paths = SharedPaths.mark(str(tmp_path / "cache"))
    assert look([paths.marker, "/absent", ""]) == [True, False, False]
    assert paths.problem_here() == ""
    paths.close()
    assert paths.problem_here() == f"it does not see the cache {tmp_path / 'cache'}"
    assert list((tmp_path / "cache").iterdir()) == []
    paths.close()


def test_markers_of_runs_that_were_killed_are_removed_by_the_next_one(tmp_path):
    (tmp_path / temporary_name(MARKER)).touch()
    other = SharedPaths.mark(str(tmp_path))
    paths = SharedPaths.mark(str(tmp_path))
    assert {str(path) for path in tmp_path.iterdir()} == {other.marker, paths.marker}
    other.close()
    paths.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", [None, "s3://bucket/cache"])
def test_no_marker_where_none_is_needed(cache):
    paths = SharedPaths.mark(cache)
    assert (paths.marker, paths.problem_here()) == ("", "")
    paths.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{tmp_path / 'file'}: cannot be written to"):
        put_marker(Location.parse(str(tmp_path / "file")))
    remove("")
