"""Where files really lie: links that stay inside a folder, links that leave it, and links that change meanwhile."""

import os
import pickle
import threading

import pytest

from batchverify.faces.images import read_image
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.fence import Fence

SECRET = b"outside"


@pytest.fixture
def tree(tmp_path):
    """`root` with an image, and beside it a folder that no reader of `root` may see."""
    for folder in ("root/inner", "rooted", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root" / "a.jpg").write_bytes(b"inside")
    (tmp_path / "root" / "inner" / "\u00e9.jpg").write_bytes(b"inside")
    for folder in ("rooted", "outside"):
        (tmp_path / folder / "s.jpg").write_bytes(SECRET)
    return tmp_path


def read(tree, path, root="root"):
    return read_image(str(tree / path), Limits(), Fence(str(tree / root)))


def links(tree):
    """Links below `root` by name, with what they lead to."""
    return {
        "file.jpg": tree / "outside" / "s.jpg",
        "relative.jpg": "../outside/s.jpg",
        "folder": tree / "outside",
        "inner/up": "../..",
        "twice.jpg": "file.jpg",
        "sibling.jpg": tree / "rooted" / "s.jpg",
        "absent.jpg": tree / "outside" / "nothing.jpg",
        "device.jpg": "/dev/zero",
        "process.jpg": "/proc/self/environ",
        "deep": "inner/up/outside",
    }


@pytest.mark.parametrize(
    "path",
    [
        *(
            "file.jpg",
            "relative.jpg",
            "folder/s.jpg",
            "folder/nothing.jpg",
            "folder",
            "inner/up/outside/s.jpg",
        ),
        *("twice.jpg", "sibling.jpg", "absent.jpg", "device.jpg", "process.jpg", "deep/s.jpg"),
        "inner/up/root/../outside/s.jpg",
    ],
)
def test_links_that_lead_out_are_refused_whatever_lies_there(tree, path):
    for name, target in links(tree).items():
        (tree / "root" / name).symlink_to(target)
    skipped = read(tree, f"root/{path}")
    assert isinstance(skipped, Skipped)
    assert skipped.reason is Reason.FORBIDDEN
    assert f"leads out of the image root {tree}/root; see --follow-symlinks" in skipped.message


def test_links_inside_are_followed(tree):
    (tree / "root" / "link.jpg").symlink_to("a.jpg")
    (tree / "root" / "folder").symlink_to(tree / "root" / "inner")
    (tree / "root" / "inner" / "back").symlink_to("../../root")
    for path in ("link.jpg", "folder/\u00e9.jpg", "inner/back/inner/back/a.jpg"):
        assert read(tree, f"root/{path}") == b"inside"


def test_the_root_may_be_a_link_itself(tree):
    (tree / "current").symlink_to("root")
    (tree / "root" / "full.jpg").symlink_to(tree / "root" / "a.jpg")
    fence = Fence(str(tree / "current"))
    for name in ("a.jpg", "full.jpg"):
        assert read_image(str(tree / "current" / name), Limits(), fence) == b"inside"
    # A new release under the old name, while a run goes on.
    (tree / "next").mkdir()
    (tree / "next" / "a.jpg").write_bytes(b"newer")
    (tree / "new").symlink_to("next")
    (tree / "new").rename(tree / "current")
    assert read_image(str(tree / "current" / "a.jpg"), Limits(), fence) == b"newer"


def test_the_whole_machine_holds_everything(tree):
    (tree / "root" / "file.jpg").symlink_to(tree / "outside" / "s.jpg")
    assert read_image(str(tree / "root" / "file.jpg"), Limits(), Fence("/")) == SECRET


def test_other_reasons_stay_what_they_are_inside(tree):
    (tree / "root" / "loop.jpg").symlink_to("loop.jpg")
    (tree / "root" / "dangling.jpg").symlink_to("nothing.jpg")
    reasons = {
        "none.jpg": Reason.NOT_FOUND,
        "a.jpg/b.jpg": Reason.NOT_FOUND,
        "dangling.jpg": Reason.NOT_FOUND,
    }
    reasons |= {"loop.jpg": Reason.UNREADABLE, "inner": Reason.UNREADABLE, "n" * 300: Reason.UNREADABLE}
    for path, reason in reasons.items():
        assert read(tree, f"root/{path}").reason is reason, path
    assert read_image("/a\0b", Limits(), Fence(str(tree / "root"))).reason is Reason.UNREADABLE
    assert read(tree, "root/a.jpg", root="nowhere").reason is Reason.NOT_FOUND


def test_names_are_compared_byte_by_byte(tree):
    # One letter in two spellings, and in two cases: on most file systems these are four folders.
    for name in ("caf\u00e9", "cafe\u0301", "CAF\u00c9"):
        (tree / name).mkdir(exist_ok=True)
        (tree / name / "a.jpg").write_bytes(name.encode())
    (tree / "caf\u00e9" / "other.jpg").symlink_to(tree / "cafe\u0301" / "a.jpg")
    assert read(tree, "caf\u00e9/a.jpg", root="caf\u00e9") == "caf\u00e9".encode()
    if not os.path.samefile(tree / "caf\u00e9", tree / "cafe\u0301"):  # noqa: PTH121
        assert read(tree, "caf\u00e9/other.jpg", root="caf\u00e9").reason is Reason.FORBIDDEN


def test_a_link_that_changes_all_the_time_never_shows_what_lies_outside(tree):
    link, done = tree / "root" / "link.jpg", threading.Event()
    link.symlink_to("a.jpg")

    def swap():
        count = 0
        while not done.is_set():
            count += 1
            fresh = tree / "root" / f"{count}.link"
            fresh.symlink_to("a.jpg" if count % 2 else tree / "outside" / "s.jpg")
            fresh.rename(link)

    swapper = threading.Thread(target=swap)
    swapper.start()
    fence = Fence(str(tree / "root"))
    seen, reads = set[bytes | Reason](), 0
    try:
        # On a busy machine the other thread may stand still for a while.
        while reads < 3000 or (len(seen) < 2 and reads < 100_000):
            result = read_image(str(link), Limits(), fence)
            seen.add(result if isinstance(result, bytes) else result.reason)
            reads += 1
    finally:
        done.set()
        swapper.join()
    assert seen == {b"inside", Reason.FORBIDDEN}


def test_without_proc_the_path_is_looked_up(tree, monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda *_: (_ for _ in ()).throw(OSError("no /proc")))
    monkeypatch.setattr(os.path, "realpath", real_path)
    (tree / "root" / "file.jpg").symlink_to(tree / "outside" / "s.jpg")
    (tree / "root" / "link.jpg").symlink_to("a.jpg")
    assert read(tree, "root/file.jpg").reason is Reason.FORBIDDEN
    assert read(tree, "root/link.jpg") == b"inside"


def real_path(path):
    """What `os.path.realpath` says, from another source: it uses `os.readlink`, which is out of order."""
    import subprocess

    done = subprocess.run(["realpath", "-m", path], capture_output=True, check=True)
    real = done.stdout.removesuffix(b"\n")
    return real if isinstance(path, bytes) else os.fsdecode(real)


def test_a_fence_travels_to_other_processes(tree):
    fence = pickle.loads(pickle.dumps(Fence(str(tree / "root"))))
    assert read_image(str(tree / "root" / "a.jpg"), Limits(), fence) == b"inside"
