"""Turns the guards of batchverify off, one by one, in a copy of the repository, and runs the tests named for each.

    python tests/support/guards.py            # all, some minutes
    python tests/support/guards.py rename fence    # those whose names hold one of these words

A guard that nobody tests is soon gone: each must turn some test red. Printed is a table. The exit code is 1 if a
guard can be turned off unnoticed, or if a test fails with all guards in place. `tests/test_guards.py` holds that
every edit below still fits the source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repository import REPOSITORY

# What is not copied; compiled loops of numba are.
_LEFT_OUT = (".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build", "*.egg-info")
_TIMEOUT = 200
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Guard:
    """A guard, and how it is turned off: `old`, which is once in `file`, becomes `new`. tests: what must go red."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def turned_off(self, source: str) -> str:
        """The source without the guard. Raises `ValueError` if it does not hold `old` exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} holds {count} times: {self.old!r}")
        return source.replace(self.old, self.new)


def _guard(name: str, file: str, old: str, new: str, *tests: str) -> Guard:
    return Guard(name, f"batchverify/{file}", old, new, tuple(f"tests/{test}" for test in tests))


GUARDS = (
    # Whole files or none.
    _guard(
        "atomic rename of an output",
        "scoring/parquet.py",
        "publish(self._temporary, Path(self._target.path))",
        "Path(self._target.path).write_bytes(self._temporary.read_bytes())",
        "scoring/test_real_faults.py::test_a_disk_that_fills_up_at_any_page",
    ),
    _guard(
        "atomic rename of a cache segment and of job.json",
        "storage/location.py",
        "            publish(temporary, Path(self.path))",
        "            Path(self.path).write_bytes(temporary.read_bytes())",
        "storage/test_location.py::test_a_full_disk_leaves_the_old_file_and_no_other",
        "scoring/test_real_faults.py::test_a_disk_that_fills_up_at_any_page",
    ),
    _guard(
        "fsync before the rename",
        "scoring/parquet.py",
        "                os.fsync(file.fileno())\n",
        "                pass\n",
        "scoring/test_real_faults.py::test_files_are_on_the_disk_before_they_have_their_names",
    ),
    # Nothing outside the image root.
    _guard(
        "path fence, cell by cell",
        "manifest/paths.py",
        "return same_store and location.path.startswith(fence)",
        "return same_store",
        "manifest/test_paths.py::test_paths_outside_a_fence",
    ),
    _guard(
        "path fence, whole batches",
        "manifest/paths.py",
        "    if not root.fenced:\n        return np.ones",
        "    if True:\n        return np.ones",
        "manifest/test_paths.py::test_batches_of_cells_resolve_as_single_cells_do",
    ),
    _guard(
        "path fence, symbolic links",
        "storage/fence.py",
        "return self._is_inside(real, self._real) or self._is_inside(real, self._look())",
        "return True",
        "storage/test_fence.py::test_links_that_lead_out_are_refused_whatever_lies_there",
    ),
    _guard(
        "a cell names no server",
        "manifest/paths.py",
        'if location.query not in ("", self.root.query) and not own_account:',
        "if False:",
        "manifest/test_paths.py::test_a_cell_names_no_server_and_no_account",
    ),
    # Memory and time.
    _guard(
        "bomb limit: bytes of a file",
        "faces/images.py",
        "if status.st_size > limits.bytes:",
        "if False:",
        "manifest/test_paths.py::test_the_limit_itself_is_allowed",
    ),
    _guard(
        "bomb limit: pixels",
        "faces/images.py",
        "if original[0] * original[1] > limits.pixels:",
        "if False:",
        "faces/test_damaged_images.py::test_the_limit_itself_is_allowed",
        "faces/test_damaged_images.py::test_huge_pictures_are_refused_unread_and_want_of_memory_is_no_fault_of_the_image",
    ),
    _guard(
        "bomb limit: scans of a JPEG",
        "faces/images.py",
        "if scan_count > MOST_SCANS:",
        "if False:",
        "faces/test_metadata.py::test_a_jpeg_of_thousands_of_scans_is_too_large",
    ),
    _guard(
        "bomb limit: slow decoders and huge tiles",
        "faces/images.py",
        "if _is_slow(image, len(data), limits) or scan_count * original[0] * original[1] > MOST_SCANNED:",
        "if False:",
        "faces/test_metadata.py::test_a_jpeg_of_thousands_of_segments_and_a_tiff_of_huge_tiles_are_too_large",
        "faces/test_damaged_images.py::test_forms_that_are_slow_to_decode_have_smaller_limits",
    ),
    _guard(
        "bomb limit: the header of a PNM",
        "faces/images.py",
        "if lacks_header(data):",
        "if False:",
        "faces/test_damaged_images.py::test_a_header_of_a_pnm_ends",
    ),
    _guard(
        "bomb limit: row groups of a segment",
        "cache/segment.py",
        "if max(_group_sizes(footer), default=0) > MOST_GROUP:",
        "if False:",
        "cache/test_damage.py::test_a_row_group_without_end_is_not_read",
    ),
    _guard(
        "bomb limit: bytes of a head",
        "heads/head.py",
        "data = location.read_bytes(MOST_BYTES)",
        "data = location.read_bytes()",
        "heads/test_head.py::test_a_file_larger_than_any_head_is_not_read",
    ),
    _guard(
        "JSON depth",
        "documents.py",
        "    _check_depth(value)\n    return value",
        "    return value",
        "test_documents.py::test_what_is_refused",
    ),
    _guard(
        "JSON names that are given twice",
        "documents.py",
        "if len(document) < len(pairs):",
        "if False:",
        "test_documents.py::test_what_is_refused",
    ),
    # What belongs together.
    _guard(
        "fingerprint of a cache segment",
        "cache/segment.py",
        'if metadata.get("fingerprint") != fingerprint:',
        "if False:",
        "cache/test_segment.py::test_a_segment_of_another_fingerprint_is_refused",
    ),
    _guard(
        "fingerprint of a cache folder",
        "cache/embedding_cache.py",
        'elif document.read_bytes(MOST_METADATA).decode(errors="replace") != self.fingerprint.canonical:',
        "elif False:",
        "cache/test_embedding_cache.py::test_another_fingerprint_in_the_folder_is_refused",
    ),
    _guard(
        "fingerprint of a head against the backbone's",
        "heads/head.py",
        "        if self.embedding.id == embedding.id:\n",
        "        if True:\n",
        "heads/test_head.py::test_other_embeddings_are_refused_with_what_differs",
    ),
    _guard(
        "document of a resumed job",
        "scoring/output.py",
        'if state is not None and state["job"] == document:',
        "if state is not None:",
        "scoring/test_resume.py::test_another_job_is_refused_with_the_difference",
        "scoring/test_resume.py::test_other_options_than_those_of_the_compute_path_are_refused",
        "scoring/test_resume.py::test_another_manifest_is_refused_and_overwrite_starts_anew",
    ),
    _guard(
        "document of a finished job",
        "scoring/output.py",
        'if record is not None and record.get("job") == document:\n            return record if',
        "if record is not None:\n            return record if",
        "scoring/test_resume.py::test_another_job_is_refused_with_the_difference",
        "scoring/test_resume.py::test_another_manifest_is_refused_and_overwrite_starts_anew",
    ),
    _guard(
        "fingerprint of a fine-tuning's checkpoint",
        "training/finetuning/checkpoint.py",
        "if identity is not None and stored_identity != identity:",
        "if False:",
        "training/finetuning/test_checkpoint.py::test_what_decides_the_end_is_part_of_the_checkpoint",
    ),
    _guard(
        "shapes in a fine-tuning's checkpoint",
        "training/finetuning/checkpoint.py",
        "    if shapes != wanted:",
        "    if False:",
        "training/finetuning/test_checkpoint.py::test_a_checkpoint_that_was_made_up_is_damaged",
    ),
    # One image ends no run.
    _guard(
        "row isolation: an image that cannot be decoded",
        "faces/images.py",
        "except Exception as exc:  # noqa: BLE001  damaged files make Pillow raise some twenty types",
        "except OSError as exc:",
        "faces/test_damaged_images.py",
    ),
    _guard(
        "row isolation: an image that cannot be read",
        "faces/images.py",
        "except (OSError, ValueError, pa.ArrowException, UsageError) as exc:  # ValueError: NUL, lone surrogates",
        "except pa.ArrowException as exc:",
        "manifest/test_paths.py::test_names_that_no_file_can_have",
        "manifest/test_paths.py::test_files_without_permission_are_unreadable",
    ),
    _guard(
        "row isolation: an image that kills its worker",
        "engine/scheduler.py",
        "        except WorkerLostError as exc:\n            for key in request.keys:",
        "        except MemoryError as exc:\n            for key in request.keys:",
        "engine/test_simulated_schedules.py",
    ),
    # One run at a time.
    _guard(
        "lock on an output",
        "scoring/job_folder.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "scoring/test_resume.py::test_two_runs_at_once_on_one_output",
    ),
    _guard(
        "lock on a cache that is rewritten",
        "cache/rewriting.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "cache/test_rewriting.py::test_one_process_at_a_time_rewrites",
    ),
    _guard(
        "claim in an object store: a live holder",
        "storage/claim.py",
        "alive = _is_alive(seen)",
        "alive = False",
        "storage/test_claim.py::test_a_folder_is_taken_once_and_released_without_a_trace",
    ),
    _guard(
        "claim in an object store: two that start together",
        "storage/claim.py",
        "            if self._own in claims and all(is_dead):\n                for other in others:",
        "            if self._own in claims:\n                for other in []:",
        "storage/test_claim.py::test_threads_that_take_turns_are_never_two",
    ),
    _guard(
        "claim in an object store: one that a released folder took along",
        "storage/claim.py",
        "                if self._own in self._claims():\n                    self._renewed",
        "                if True:\n                    self._renewed",
        "storage/test_claim.py::test_a_claim_that_a_released_folder_took_along_is_made_again",
    ),
    _guard(
        "claim in an object store: a holder that comes back late",
        "storage/claim.py",
        "        if self._lost:\n            raise BatchverifyError(",
        "        if False:\n            raise BatchverifyError(",
        "storage/test_claim.py::test_a_holder_that_was_suspended_gives_up_if_another_took_over",
    ),
    # A row speaks of the picture on disk.
    _guard(
        "faithful decode: what samples mean (TIFF, BMP, JPEG 2000)",
        "faces/images.py",
        "        check_meaning(image, data)\n",
        "",
        "faces/test_samples.py::test_tiffs_that_would_be_another_image_are_refused_with_the_reason",
    ),
    _guard(
        "faithful decode: rows of a PNG",
        "faces/images.py",
        'if image.format == "PNG" and _ends_black(image) and lacks_rows(data):',
        "if False:",
        "faces/test_metadata.py::test_a_png_that_ends_early_is_refused_and_a_black_one_is_read",
    ),
    _guard(
        "faithful decode: the end of a JPEG",
        "faces/images.py",
        'return "a JPEG without its end" if lacks_end(data) else ""',
        'return ""',
        "faces/test_damaged_images.py::test_a_jpeg_without_its_end_is_undecodable",
    ),
    _guard(
        "faithful decode: tiles of a JPEG 2000",
        "faces/samples.py",
        "    if _lacks_tiles(data, start):",
        "    if False:",
        "faces/test_damaged_images.py::test_a_jpeg_2000_without_one_of_its_tiles_is_undecodable",
    ),
    _guard(
        "faithful decode: critical chunks of a PNG",
        "faces/metadata.py",
        "if kind not in _CRITICAL:",
        "if False:",
        "faces/test_metadata.py::test_critical_chunks_that_are_unknown_or_damaged_are_refused",
    ),
    _guard(
        "an image that changes while it is read",
        "faces/images.py",
        "same = (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)",
        "same = True",
        "scoring/test_real_faults.py::test_a_row_never_speaks_of_an_image_that_was_never_on_disk",
    ),
    _guard(
        "checksums of cached vectors",
        "cache/segment.py",
        "page_checksum_verification=True",
        "page_checksum_verification=False",
        "cache/test_segment.py::test_a_flipped_bit_in_any_page_is_noticed",
    ),
    _guard(
        "length of cached vectors",
        "cache/embedding_cache.py",
        "            check_entries(entries)\n",
        "",
        "cache/test_damage.py::test_an_index_with_wrong_rows_gives_no_wrong_vectors",
        "cache/test_damage.py",
    ),
    _guard(
        "scores that could overflow",
        "heads/head.py",
        "if not all(scorer.bound * abs(calibration[0]) + abs(calibration[1]) < LARGEST for scorer in scorers):",
        "if False:",
        "heads/test_head.py::test_a_damaged_artifact_is_refused_in_one_line",
    ),
    # Exactly once.
    _guard(
        "exactly once: parts of another attempt",
        "scoring/output.py",
        'if metadata.get("token") == self.token and self.file(int(metadata["part"])).name == file.name:',
        'if "part" in metadata and self.file(int(metadata["part"])).name == file.name:',
        "scoring/test_resume.py::test_another_manifest_is_refused_and_overwrite_starts_anew",
        "scoring/test_output.py",
    ),
    _guard(
        "exactly once: parts with too few rows",
        "scoring/output.py",
        "if counts.rows == count == self._rows_in(number, rows):",
        "if True:",
        "scoring/test_output.py::test_a_part_with_another_number_of_rows_than_its_footer_states_is_not_done",
    ),
    _guard(
        "exactly once: entries that were committed",
        "cache/embedding_cache.py",
        " and entry.key not in self._recent\n",
        "\n",
        "cache/test_embedding_cache.py::test_entries_appended_twice_are_stored_once",
    ),
    _guard(
        "exactly once: _SUCCESS goes before a part is replaced",
        "scoring/output.py",
        '            if not self.single and success.kind() == "file":',
        "            if False:",
        "scoring/test_real_faults.py::test_a_folder_is_unfinished_before_its_first_part_is_replaced",
    ),
    _guard(
        "a manifest that changes between its two readings",
        "manifest/manifest.py",
        "if count != expected:",
        "if False:",
        "manifest/test_manifest_errors.py::test_a_file_that_changes_after_the_first_reading",
    ),
    # Nothing is run, and nothing is told.
    _guard(
        "pickles in weights",
        "embedding/backbone.py",
        "weights_only=True",
        "weights_only=False",
        "embedding/test_backbone.py::test_a_pickle_is_refused_and_nothing_of_it_runs",
    ),
    _guard(
        "SHA-256 of published weights",
        "embedding/download.py",
        "        _check_digest(part, sha256)\n",
        "",
        "embedding/test_download.py::test_other_bytes_than_the_published_ones_are_refused",
    ),
    _guard(
        "formulas in CSV files",
        "manifest/spreadsheet.py",
        'FORMULA = ("=", "+", "-", "@", "\\t", "\\r", "\\n")',
        "FORMULA = ()",
        "manifest/test_spreadsheet.py",
    ),
    _guard(
        "control characters on a terminal",
        "cli/output.py",
        "return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)",
        "return text",
        "cli/test_output.py",
    ),
    _guard(
        "secrets in messages",
        "errors.py",
        '    if "://" not in uri:',
        "    if True:",
        "manifest/test_paths.py::test_a_refused_cell_is_shown_without_its_secret",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What the tests of a guard said without it. red: those that failed. problem: why that says nothing."""

    guard: Guard
    red: tuple[str, ...]
    seconds: float
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the guard's absence was noticed."""
        return bool(self.red) and not self.problem

    def line(self) -> str:
        """A row of the table."""
        said = self.problem or ", ".join(f"`{test}`" for test in self.red) or "**none**"
        return f"| {self.guard.name} | {self.guard.file} | {said} | {self.seconds:.0f} |"


def try_guard(guard: Guard, copy: Path) -> Verdict:
    """Run the guard's tests in a copy of the repository, up to the first failure, without the guard."""
    file, started = copy / guard.file, time.monotonic()
    source = file.read_text()
    try:
        file.write_text(guard.turned_off(source))
        red, problem = _run(copy, guard.tests, "-x")
    except ValueError as exc:
        red, problem = (), str(exc)
    finally:
        file.write_text(source)
    return Verdict(guard, red, time.monotonic() - started, problem)


def _run(copy: Path, tests: Sequence[str], *options: str) -> tuple[tuple[str, ...], str]:
    """The tests that fail, and what kept pytest from running them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--timeout",
        str(_TIMEOUT),
    ]
    # Compiled files are told from others by the second in which the source was written: too coarse for edits.
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    marks = ["-m", "not ray and not weights"]
    done = subprocess.run(
        [*command, *marks, *options, *tests], cwd=copy, env=environment, capture_output=True, text=True
    )
    red = tuple(test.partition("/")[2] for test in _FAILED.findall(done.stdout))
    if done.returncode == 1 and not red:
        return red, f"pytest failed without a name: {(done.stdout + done.stderr)[-300:]!r}"
    if done.returncode in (0, 1):
        return red, ""
    return red, f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]!r}"


def main(words: Sequence[str]) -> int:
    """Try the guards whose names hold one of the words, all without any; returns the exit code."""
    chosen = [guard for guard in GUARDS if not words or any(word in guard.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        copy = Path(folder) / "batchverify"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        started = time.monotonic()
        tests = sorted({test for guard in chosen for test in guard.tests})
        red, problem = _run(copy, tests)
        seconds = time.monotonic() - started
        print(f"All guards in place: {len(red)} failed, {seconds:.0f} s {problem}", *red)
        print("\n| guard | file | red without it | seconds |\n| --- | --- | --- | ---: |", flush=True)
        verdicts = []
        for guard in chosen:
            verdicts.append(try_guard(guard, copy))
            print(verdicts[-1].line(), flush=True)
    unnoticed = [verdict.guard.name for verdict in verdicts if not verdict.is_good]
    print(f"\n{len(verdicts) - len(unnoticed)} of {len(verdicts)} were noticed.", *unnoticed, sep="\n")
    return 1 if red or problem or unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
