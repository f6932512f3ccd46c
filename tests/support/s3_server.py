"""A real S3 API in this process, and the environment of a user who has keys for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "AKIATESTING", "AWS_SECRET_ACCESS_KEY": "hidden-hidden-hidden"}


@contextmanager
def s3_server() -> Iterator[str]:
    """HOST:PORT of an empty server; the environment holds its keys and names no other S3."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"{host}:{port}"
        server.stop()
        s3_backends.reset()


def s3_client(address: str) -> Any:
    """A client of the server that uses nothing of this project."""
    return boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")


def s3_options(address: str) -> str:
    """The options of a URI that lead to the server."""
    return f"?endpoint_override={address}&scheme=http&region=us-east-1"
