"""The error tree. Bad images are not errors: they are `records.Skipped` values.

    BatchverifyError            exit code 1: the job failed
    ├── TrainingError           training came to nothing: the message says what that means
    ├── HungError               a thread hangs and cannot be ended: the process must be
    ├── UsageError              exit code 2: an option or argument that makes no sense
    │   ├── ManifestError       a manifest that cannot be read as one
    │   └── ArtifactError       weights, a head or a cache that does not fit
    │       └── DownloadError   weights that could not be fetched
    └── NothingScoredError      exit code 3: no row, or too few rows, could be scored

Errors of other libraries become one of these at one seam per library, with `raise … from exc`.
"""

from __future__ import annotations

from typing import Any


class BatchverifyError(Exception):
    """Root of the tree; the command line shows its message as one line and exits with `exit_code`."""

    exit_code = 1


class TrainingError(BatchverifyError):
    """Training that came to nothing; the message says what that means and what to look at."""


class HungError(BatchverifyError):
    """A thread of this process hangs: an ordinary exit would wait for it."""


class UsageError(BatchverifyError):
    """An option, argument or environment variable that makes no sense."""

    exit_code = 2


class ManifestError(UsageError):
    """A manifest that cannot be read as one; the message names file, row, column and what was found."""


class ArtifactError(UsageError):
    """Weights, a head or a cache that cannot be read or does not fit the other settings."""


class DownloadError(ArtifactError):
    """Weights that could not be fetched; the message says how to supply them by hand."""


class NothingScoredError(BatchverifyError):
    """No row could be scored, or more rows failed than `--max-failed` allows; `summary` is the run's."""

    exit_code = 3

    def __init__(self, message: str, summary: Any = None) -> None:
        super().__init__(message)
        self.summary = summary


def first_line(exc: BaseException) -> str:
    """The first line of an exception's message, for messages of one line; its type where it has none."""
    return (str(exc) or type(exc).__name__).splitlines()[0]
