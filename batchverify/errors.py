"""The error tree. Bad images are not errors: they are `records.Skipped` values.

    BatchverifyError            exit code 1: the job failed
    ├── TrainingError           training gave no usable head
    ├── HungError               a thread hangs and cannot be ended, so the process must end at once
    ├── UsageError              exit code 2: an invalid option or argument
    │   ├── ManifestError       a manifest that cannot be read
    │   └── ArtifactError       weights, a head or a cache that does not fit
    │       └── DownloadError   weights that could not be downloaded
    └── NothingScoredError      exit code 3: no row, or too few rows, could be scored

Errors of other libraries are converted to these in one place per library, with `raise … from exc`.
"""

from __future__ import annotations

import re
from typing import Any

# User and password of a URI, and the values of its options.
_USER = re.compile(r"(?<=://)[^/?#]*@")
_VALUES = re.compile(r"([?&#][^=&?#\s/]{1,64}=)[^&\s]+")
# Schemes whose URIs may name a user or a key; those of Azure have an "@" of their own.
_OPEN = re.compile(r"\b(?:abfss?|az)://", re.IGNORECASE)


class BatchverifyError(Exception):
    """Root of the tree; the command line shows its message as one line and exits with `exit_code`."""

    exit_code = 1


class TrainingError(BatchverifyError):
    """Training gave no usable head; the message says why and what to look at."""


class HungError(BatchverifyError):
    """A thread of this process hangs: an ordinary exit would wait for it."""


class UsageError(BatchverifyError):
    """An invalid option, argument or environment variable."""

    exit_code = 2


class ManifestError(UsageError):
    """A manifest that cannot be read; the message names the file, row, column and value."""


class ArtifactError(UsageError):
    """Weights, a head or a cache that cannot be read or does not fit the other settings."""


class DownloadError(ArtifactError):
    """Weights that could not be downloaded; the message says how to supply them by hand."""


class NothingScoredError(BatchverifyError):
    """No row could be scored, or more rows failed than `--max-failed` allows; `summary` is the run's."""

    exit_code = 3

    def __init__(self, message: str, summary: Any = None) -> None:
        super().__init__(message)
        self.summary = summary


def redacted(uri: str) -> str:
    """A URI as a message may show it: without user name and password, and without the values of its options."""
    if "://" not in uri:
        return uri
    return _VALUES.sub(r"\1…", uri if _OPEN.match(uri) else _USER.sub("…@", uri))


def shortened(value: Any, most: int) -> str:
    """A text, or a value as one, that is not too long for a message."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def first_line(exc: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if the message is empty."""
    return (str(exc) or type(exc).__name__).splitlines()[0]
