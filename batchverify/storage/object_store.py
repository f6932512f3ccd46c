"""Object stores: schemes and options, one file system per bucket and process, and retries."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import pyarrow as pa
from pyarrow import fs

from batchverify.errors import UsageError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az")
AZURE_SCHEMES = ("abfs", "abfss", "az")
# Keys may hold question marks (`photo.php?id=7.jpg`): only these names start the options of a URI.
OPTIONS = (
    "region|scheme|endpoint_override|allow_delayed_open|allow_bucket_creation|allow_bucket_deletion|"
    "tls_ca_file_path|tls_ca_dir_path|tls_verify_certificates|smart_defaults|retry_limit_seconds|project_id|"
    "account|enable_tls"
)
ACCOUNT = "?account="
AZURE_HOST = ".dfs.core.windows.net"
# Timeout of a connection; after it the SDK retries.
CONNECT_SECONDS = 5.0
GOOGLE_SECONDS = 60
# Environment variables that a file system reads when it is made: other values need another file system.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_FLAGS = ("allow_delayed_open", "allow_bucket_creation", "allow_bucket_deletion")
# Errors of the three SDKs: those worth a retry, and those for want of permission.
_TRANSIENT = re.compile(
    r"HTTP status (5\d\d|429)|NETWORK_CONNECTION|SLOW_DOWN|SlowDown|THROTTLING|INTERNAL_FAILURE|InternalError|"
    r"SERVICE_UNAVAILABLE|ServiceUnavailable|REQUEST_TIMEOUT|RequestTimeout|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"ServerBusy|OperationTimedOut|[Cc]onnection (reset|refused)"
)
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|Access Denied|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]|"
    r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|ExpiredToken|"
    r"Authorization(Failure|PermissionMismatch)|AuthenticationFailed"
)
_ABSENT = re.compile(r"NO_SUCH_KEY|NoSuchKey|RESOURCE_NOT_FOUND|HTTP status 404|BlobNotFound|No such object")
_lock = threading.Lock()
_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """How long stores are waited for.

    request_seconds: timeout of one request, after which the SDK retries. attempts: of a request; the SDK's pauses
    double, from 25 ms to 1.6 s. pauses: before a whole operation is repeated after the SDK gave up, in seconds.
    """

    request_seconds: float = 10.0
    attempts: int = 7
    pauses: Sequence[float] = (2.0,)


_patience = Patience()


def set_patience(patience: Patience) -> None:
    """Wait so long in this process from now on, with new connections."""
    global _patience
    with _lock:
        _patience = patience
        _file_system.cache_clear()


def is_own_account(query: str) -> bool:
    """Whether the options of a URI only name the account that `$AZURE_STORAGE_ACCOUNT` names too."""
    own = os.environ.get("AZURE_STORAGE_ACCOUNT")
    return bool(own) and query in (f"{ACCOUNT}{own}", f"{ACCOUNT}{own}{AZURE_HOST}")


def file_system(scheme: str, bucket: str, query: str) -> Any:
    """The pyarrow file system of a bucket: one per process, whose users share its connections.

    Raises `UsageError` for invalid options and for schemes that pyarrow was built without.
    """
    values = tuple(os.environ.get(name) for name in _ENVIRONMENT)
    with _lock:
        return _file_system(scheme, bucket, query, values)


@lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, query: str, values: tuple[str | None, ...]) -> Any:
    environment = dict(zip(_ENVIRONMENT, values, strict=True))
    try:
        if scheme in AZURE_SCHEMES:
            return _azure(environment, query)
        if scheme in ("gs", "gcs"):
            if "retry_limit_seconds" not in query:
                query += f"{'&' if query else '?'}retry_limit_seconds={GOOGLE_SECONDS}"
            return fs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")[0]
        return _s3(f"{scheme}://{bucket}{query}", dict(parse_qsl(query[1:])), environment)
    except (pa.ArrowException, OSError, ValueError, AttributeError, ImportError) as exc:
        raise UsageError(f"{scheme}://{bucket}{query}: cannot be opened: {_reason(scheme, exc)}") from exc


def _s3(uri: str, options: dict[str, str], environment: dict[str, str | None]) -> Any:
    # This checks the options and, if none is given, looks up the bucket's region.
    plain = fs.FileSystem.from_uri(uri)[0]
    if not options.keys() <= {*_S3_TEXTS, *_S3_FLAGS}:
        return plain
    endpoint = environment["AWS_ENDPOINT_URL_S3"] or environment["AWS_ENDPOINT_URL"] or ""
    if endpoint and "endpoint_override" not in options:
        # pyarrow reads these variables for URIs only.
        scheme, _, host = endpoint.rpartition("://")
        options = {**options, "endpoint_override": host.rstrip("/")} | ({"scheme": scheme} if scheme else {})
    arguments: dict[str, Any] = {name: options[name] for name in _S3_TEXTS if name in options}
    arguments |= {name: options[name].lower() in ("true", "1") for name in _S3_FLAGS if name in options}
    arguments |= {
        "region": plain.region,
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": _patience.request_seconds,
        # Not the standard strategy: it allows a budget of 100 repeats, which pyarrow never gives back.
        "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=_patience.attempts),
    }
    try:
        # Objects below 5 MB are one request. Of three a kill may leave an upload that was begun, which S3 keeps.
        return fs.S3FileSystem(**arguments, allow_delayed_open=True)
    except TypeError:  # pyarrow 18
        return fs.S3FileSystem(**arguments)


def _azure(environment: dict[str, str | None], query: str) -> Any:
    options = dict(parse_qsl(query[1:]))
    host = options.get("account") or environment["AZURE_STORAGE_ACCOUNT"]
    if not host:
        raise ValueError(
            "no account: write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, or set AZURE_STORAGE_ACCOUNT"
        )
    account, _, domain = host.partition(".")
    arguments = {}
    for service in ("blob", "dfs"):
        if "endpoint_override" in options:
            arguments[f"{service}_storage_authority"] = options["endpoint_override"]
        elif domain:
            arguments[f"{service}_storage_authority"] = f".{service}.{domain.partition('.')[2]}"
        if options.get("enable_tls") == "false":
            arguments[f"{service}_storage_scheme"] = "http"
    # Without either, the Azure SDK looks for credentials (managed identity, AZURE_CLIENT_ID, `az login` …).
    key, token = environment["AZURE_STORAGE_KEY"], environment["AZURE_STORAGE_SAS_TOKEN"]
    secret = {"account_key": key} if key else {"sas_token": token} if token else {}
    return fs.AzureFileSystem(account, **arguments, **secret)


def _reason(scheme: str, exc: Exception) -> str:
    if isinstance(exc, AttributeError | ImportError) or "without" in str(exc):
        return f"this pyarrow was built without {scheme}://; PyPI's wheels for Linux have it"
    return str(exc)


def is_transient(exc: Exception) -> bool:
    """Whether a store's error is worth a retry; an unknown host is not."""
    return _matches(exc, _TRANSIENT) and "resolve host" not in str(exc)


def is_denied(exc: Exception) -> bool:
    """Whether a store's error says that the credentials are invalid or lack permission."""
    return _matches(exc, _DENIED)


def is_absent(exc: Exception) -> bool:
    """Whether a store's error says that an object is gone, as when it is deleted while it is read."""
    return _matches(exc, _ABSENT)


def _matches(exc: Exception, pattern: re.Pattern[str]) -> bool:
    """Whether the error came from a store, not from the operating system, and its text matches."""
    return isinstance(exc, OSError) and exc.errno is None and bool(pattern.search(str(exc)))


def retry(operation: Callable[[], _T]) -> _T:
    """Run an idempotent operation; repeat it after a pause where a store fails with a transient error."""
    for pause in _patience.pauses:
        try:
            return operation()
        except OSError as exc:
            if not is_transient(exc):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return operation()
