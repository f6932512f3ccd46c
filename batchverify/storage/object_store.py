"""Object stores: their schemes and options, one file system for each in a process, and when to try again."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import pyarrow as pa
from pyarrow import fs

from batchverify.errors import UsageError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az")
AZURE_SCHEMES = ("abfs", "abfss", "az")
# Keys may hold question marks (`photo.php?id=7.jpg`): only the names of options start options.
OPTIONS = (
    "region|scheme|endpoint_override|allow_delayed_open|allow_bucket_creation|allow_bucket_deletion|"
    "tls_ca_file_path|tls_ca_dir_path|tls_verify_certificates|smart_defaults|retry_limit_seconds|project_id|"
    "account|enable_tls"
)
ACCOUNT = "?account="
# One request: a store that says nothing for so long is asked again.
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 10.0
# pyarrow's default waits 0.2 s thirty times; the SDK's own back-off doubles (1, 2, 4 s at most, drawn below it).
# After a hundred vain retries in a row the SDK tries nothing twice: an outage is over quickly.
ATTEMPTS = 4
GOOGLE_SECONDS = 60
# Pauses before whole operations are done once more after the SDK gave up. That also bridges the SDK's quota.
PAUSES = (2.0,)
# What a file system takes from the environment when it is made: another value, another file system.
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
# How the three SDKs say that it may go better another time, and that it will not for want of rights.
_PASSING = re.compile(
    r"HTTP status (5\d\d|429)|NETWORK_CONNECTION|SLOW_DOWN|SlowDown|THROTTLING|INTERNAL_FAILURE|InternalError|"
    r"SERVICE_UNAVAILABLE|ServiceUnavailable|REQUEST_TIMEOUT|RequestTimeout|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"ServerBusy|OperationTimedOut|[Cc]onnection (reset|refused)"
)
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|Access Denied|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status 40[13]|"
    r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|ExpiredToken|"
    r"Authorization(Failure|PermissionMismatch)|AuthenticationFailed"
)
_making = threading.Lock()
_Answer = TypeVar("_Answer")


def file_system(scheme: str, bucket: str, query: str) -> Any:
    """The pyarrow file system of a bucket: one a process, whose connections all its users share.

    Raises `UsageError` for options that make no sense and schemes that pyarrow was built without.
    """
    environment = tuple(os.environ.get(name) for name in _ENVIRONMENT)
    with _making:
        return _made(scheme, bucket, query, environment)


@lru_cache(maxsize=64)
def _made(scheme: str, bucket: str, query: str, environment: tuple[str | None, ...]) -> Any:
    named = dict(zip(_ENVIRONMENT, environment, strict=True))
    try:
        if scheme in AZURE_SCHEMES:
            return _azure(named, query)
        if scheme in ("gs", "gcs"):
            limit = f"retry_limit_seconds={GOOGLE_SECONDS}"
            bounded = (
                query if "retry_limit_seconds" in query else f"{query}&{limit}" if query else f"?{limit}"
            )
            return fs.FileSystem.from_uri(f"{scheme}://{bucket}{bounded}")[0]
        return _s3(f"{scheme}://{bucket}{query}", dict(parse_qsl(query[1:])), named)
    except (pa.ArrowException, OSError, ValueError, AttributeError, ImportError) as exc:
        raise UsageError(f"{scheme}://{bucket}{query}: cannot be opened: {_reason(scheme, exc)}") from exc


def _s3(uri: str, options: dict[str, str], environment: dict[str, str | None]) -> Any:
    # It checks the options, and asks for the bucket's region where none is given.
    plain = fs.FileSystem.from_uri(uri)[0]
    if not options.keys() <= {*_S3_TEXTS, *_S3_FLAGS}:
        return plain
    endpoint = environment["AWS_ENDPOINT_URL_S3"] or environment["AWS_ENDPOINT_URL"] or ""
    if endpoint and "endpoint_override" not in options:
        # Only URIs follow these variables in pyarrow.
        before, mark, after = endpoint.partition("://")
        options = {**options, "endpoint_override": (after if mark else before).rstrip("/")}
        options |= {"scheme": before} if mark else {}
    named: dict[str, Any] = {name: options[name] for name in _S3_TEXTS if name in options}
    named |= {name: options[name].lower() in ("true", "1") for name in _S3_FLAGS if name in options}
    return fs.S3FileSystem(
        **{**named, "region": plain.region},
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _azure(environment: dict[str, str | None], query: str) -> Any:
    options = dict(parse_qsl(query[1:]))
    host = options.get("account") or environment["AZURE_STORAGE_ACCOUNT"]
    if not host:
        raise ValueError(
            "no account: write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, or set AZURE_STORAGE_ACCOUNT"
        )
    account, _, domain = host.partition(".")
    named = {}
    if domain:
        service = domain.partition(".")[2]
        named = {"blob_storage_authority": f".blob.{service}", "dfs_storage_authority": f".dfs.{service}"}
    if "endpoint_override" in options:
        named = dict.fromkeys(
            ("blob_storage_authority", "dfs_storage_authority"), options["endpoint_override"]
        )
    if options.get("enable_tls") == "false":
        named |= {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
    # Without either: what the Azure SDK finds (a managed identity, AZURE_CLIENT_ID and its like, `az login`).
    key, token = environment["AZURE_STORAGE_KEY"], environment["AZURE_STORAGE_SAS_TOKEN"]
    secret = {"account_key": key} if key else {"sas_token": token} if token else {}
    return fs.AzureFileSystem(account, **named, **secret)


def _reason(scheme: str, exc: Exception) -> str:
    if isinstance(exc, AttributeError | ImportError) or "without" in str(exc):
        return f"this pyarrow was built without {scheme}://; the wheels of PyPI for Linux have it"
    return str(exc)


def is_passing(exc: Exception) -> bool:
    """Whether an error of a store says that the same may go well another time; a name without a host does not."""
    text = str(exc)
    said = bool(_PASSING.search(text)) and "resolve host" not in text
    return isinstance(exc, OSError) and exc.errno is None and said


def is_denied(exc: Exception) -> bool:
    """Whether an error of a store says that these keys may not do that, or are no keys."""
    return isinstance(exc, OSError) and exc.errno is None and bool(_DENIED.search(str(exc)))


def patiently(operation: Callable[[], _Answer]) -> _Answer:
    """Do something that may be done twice, again after a pause where a store fails in passing."""
    for pause in PAUSES:
        try:
            return operation()
        except OSError as exc:
            if not is_passing(exc):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return operation()
