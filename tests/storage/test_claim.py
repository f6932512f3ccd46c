"""Claims on folders of an object store: one holder at a time, whoever starts, stops, hangs or dies."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from object_store import Store, object_store

from batchverify.errors import BatchverifyError
from batchverify.storage.claim import Claim, TakenError
from batchverify.storage.location import Location

BEAT = 0.3
HOLDER = """
import sys
from batchverify.storage.claim import Claim, TakenError
from batchverify.storage.location import Location
claim = Claim(Location.parse({folder!r}), beat={beat})
try:
    claim.take()
    print("held", flush=True)
    for line in sys.stdin:
        claim.check()
        print("still", flush=True)
    claim.release()
except TakenError as exc:
    print("taken", exc, flush=True)
except Exception as exc:
    print("lost", exc, flush=True)
"""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with object_store() as store:
        store.client().create_bucket(Bucket="jobs")
        yield store


@pytest.fixture
def folder(store: Store, request: pytest.FixtureRequest) -> Location:
    store.weather()
    return Location.parse(f"s3://jobs/{request.node.name}/out.job{store.options()}")


def names(store: Store, folder: Location) -> list[str]:
    prefix = folder.path.partition("/")[2]
    listed = store.client().list_objects_v2(Bucket="jobs", Prefix=prefix).get("Contents", [])
    return [each["Key"] for each in listed]


def holder(folder: Location, beat: float = BEAT) -> subprocess.Popen:
    """A process that takes the folder; its first line says how that ended."""
    script = HOLDER.format(folder=str(folder), beat=beat)
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().split()[0]


def as_of_another_machine(store: Store, folder: Location) -> None:
    """Make the claim that lies there look like one from elsewhere."""
    [key] = names(store, folder)
    document = json.loads(store.client().get_object(Bucket="jobs", Key=key)["Body"].read())
    body = json.dumps({**document, "machine": "another", "host": "far-away"}).encode()
    store.client().put_object(Bucket="jobs", Key=key, Body=body)


def test_a_folder_is_taken_once_and_released_without_a_trace(store: Store, folder: Location) -> None:
    first, second = Claim(folder, beat=BEAT), Claim(folder, beat=BEAT)
    first.take()
    with pytest.raises(TakenError, match=r"process \d+ on "):
        second.take()
    first.check()
    first.release()
    assert names(store, folder) == []
    second.take()
    folder.join("part").write_bytes(b"x")
    second.release()
    assert [name for name in names(store, folder) if not name.endswith("/")] == [
        f"{folder.path.partition('/')[2]}/part"
    ]


def test_the_claim_of_a_killed_process_of_this_machine_is_taken_at_once(store: Store, folder: Location) -> None:
    process = holder(folder, beat=1000)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(store, folder)) == 1
    claim = Claim(folder, beat=1000)
    claim.take()
    claim.check()
    claim.release()
    assert names(store, folder) == []


def test_a_claim_from_elsewhere_is_watched(store: Store, folder: Location) -> None:
    alive = Claim(folder, beat=BEAT)
    alive.take()
    # Each renewal writes this machine's name again, so the candidate sees it change.
    as_of_another_machine(store, folder)
    with pytest.raises(TakenError, match="process"):
        Claim(folder, beat=BEAT).take()
    alive.release()
    dead = holder(folder, beat=1000)
    assert dead.stdout is not None and dead.stdout.readline() == "held\n"
    as_of_another_machine(store, folder)
    dead.kill()
    dead.communicate()
    claim = Claim(folder, beat=BEAT)
    claim.take()
    assert len([name for name in names(store, folder) if "claim-" in name]) == 1
    claim.release()
    assert names(store, folder) == []


def test_of_many_that_start_at_once_one_gets_it(folder: Location) -> None:
    processes = [holder(folder) for _ in range(4)]
    answers = [process.stdout.readline().split()[0] for process in processes if process.stdout]
    assert sorted(answers) == ["held", "taken", "taken", "taken"]
    for process in processes:
        process.communicate()


def test_threads_that_take_turns_are_never_two(folder: Location) -> None:
    inside, most, turns = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(6):
            claim = Claim(folder, beat=BEAT)
            try:
                claim.take()
            except TakenError:
                time.sleep(0.02)
                continue
            with guard:
                inside[0] += 1
                turns[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with guard:
                inside[0] -= 1
            claim.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and turns[0] > 1


def test_a_claim_that_a_released_folder_took_along_is_made_again(store: Store, folder: Location) -> None:
    """Whoever goes lists the folder and then deletes what it saw: here between a candidate's look and its verdict."""
    claim = Claim(folder, beat=30)
    thread = threading.Thread(target=claim.take)
    thread.start()
    while not (seen := names(store, folder)):
        time.sleep(0.01)
    store.client().delete_object(Bucket="jobs", Key=seen[0])
    thread.join()
    assert names(store, folder) == seen
    claim.release()


def test_a_holder_that_was_suspended_gives_up_if_another_took_over(store: Store, folder: Location) -> None:
    process = holder(folder)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert ask(process) == "still"
    process.send_signal(signal.SIGSTOP)
    # Of this machine it would count as alive.
    as_of_another_machine(store, folder)
    claim = Claim(folder, beat=BEAT)
    claim.take()
    process.send_signal(signal.SIGCONT)
    assert ask(process) == "lost"
    process.communicate()
    claim.check()
    claim.release()
    assert names(store, folder) == []


def test_a_holder_that_was_suspended_goes_on_if_nobody_came(folder: Location) -> None:
    process = holder(folder)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5 * BEAT)
    process.send_signal(signal.SIGCONT)
    assert ask(process) == "still"
    process.communicate()


@pytest.mark.parametrize("somebody_came", [False, True])
def test_a_claim_that_was_not_renewed_in_time_is_asked_about_before_a_write(
    store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch, somebody_came: bool
) -> None:
    # Its thread never comes to renew it; the clock alone moves.
    claim = Claim(folder, beat=600)
    claim.take()
    (written,) = names(store, folder)
    if somebody_came:
        folder.join("claim-of-another").write_bytes(b"{}")
    # In time nobody is asked: the folder is still this run's.
    claim.check()
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 5 * 600)
    if somebody_came:
        with pytest.raises(BatchverifyError, match="another run took over"):
            claim.check()
        assert written not in names(store, folder)
    else:
        claim.check()
        # Renewed by that: the store is not asked again.
        store.client().delete_object(Bucket="jobs", Key=written)
        claim.check()
    claim.release()


def is_lost(claim: Claim) -> bool:
    try:
        claim.check()
    except BatchverifyError:
        return True
    return False


def test_a_deleted_claim_is_lost(store: Store, folder: Location) -> None:
    claim = Claim(folder, beat=BEAT)
    claim.take()
    deadline = time.monotonic() + 20
    while not is_lost(claim) and time.monotonic() < deadline:
        # A renewal at the same moment brings it back once.
        for name in names(store, folder):
            store.client().delete_object(Bucket="jobs", Key=name)
        time.sleep(BEAT)
    with pytest.raises(BatchverifyError, match="another run took over"):
        claim.check()
    claim.release()
    assert names(store, folder) == []


def test_a_claim_that_this_process_could_not_delete_is_dead(folder: Location) -> None:
    first = Claim(folder, beat=BEAT)
    first.take()
    (left, _), = folder.files()  # fmt: skip
    content = left.read_bytes()
    with pytest.raises(TakenError):
        Claim(folder, beat=BEAT).take()
    first.release()
    # As after a failure of the store.
    left.write_bytes(content)
    second = Claim(folder, beat=BEAT)
    second.take()
    second.release()
    assert folder.files() == []


def test_a_claim_goes_where_the_folder_cannot_be_listed_at_the_end(
    store: Store, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("AWS Error ACCESS_DENIED")

    claim = Claim(folder, beat=BEAT)
    claim.take()
    with monkeypatch.context() as patch:
        patch.setattr(Location, "files", fail)
        claim.release()
    assert [name for name in names(store, folder) if not name.endswith("/")] == []
