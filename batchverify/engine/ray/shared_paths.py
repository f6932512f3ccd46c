"""Paths that every node of a cluster must see alike: found out with a marker file, before any work."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchverify.engine.ray.cluster import Node, on_node
from batchverify.errors import BatchverifyError, UsageError
from batchverify.records import Skipped
from batchverify.storage.location import Location, scheme_of

# So many images are looked for on every node.
SAMPLE = 32
LOOK_SECONDS = 60.0
ADVICE = "give a folder that all nodes mount, or an object store (s3://…)"


def look(paths: Sequence[str]) -> list[bool]:
    """The body of a task: which files its node has."""
    return [os.path.exists(path) for path in paths]  # noqa: PTH110  names that are no paths answer False


@dataclass(frozen=True)
class SharedPaths:
    """The cache of a run with a marker in it. Goes to workers: a node that joins late looks for itself.

    marker: a file that the driver wrote into the cache's folder; empty without a cache or with a remote one.
    """

    cache: str | None
    marker: str = ""

    @classmethod
    def mark(cls, cache: str | None) -> SharedPaths:
        """Put a marker into the cache's folder, where that is local."""
        if cache is None or scheme_of(cache):
            return cls(cache)
        return cls(cache, put_marker(Location.parse(cache)))

    def problem_here(self) -> str:
        """What is wrong on the node that asks; empty when nothing is."""
        unseen = self.marker and not os.path.exists(self.marker)  # noqa: PTH110
        return f"it does not see the cache {self.cache}" if unseen else ""

    def require(
        self,
        nodes: Iterable[Node],
        working: set[str],
        output: str | None,
        image_paths: Sequence[str | Skipped],
    ) -> None:
        """Raise `UsageError` where a node of `nodes` does not see the cache or the output's folder as the driver
        does, or where two of those with the ids `working` differ in the images that they have.
        """
        import ray

        here = ray.get_runtime_context().get_node_id()
        others = [node for node in nodes if node.id in working or node.id == here]
        if len(others) < 2:
            return
        folder = Location.parse(output).parent if output is not None else None
        marker = put_marker(folder) if folder is not None and folder.is_local else ""
        images = sample(image_paths)
        try:
            seen = _look_on(others, [self.marker, marker, *images])
        finally:
            remove(marker)
        for node, (cache, out, *_) in seen.items():
            if self.marker and not cache:
                raise UsageError(
                    f"--cache {self.cache}: node {node} does not see this folder as the driver does; "
                    f"{ADVICE}, or --no-cache"
                )
            if marker and not out:
                raise UsageError(
                    f"{output}: node {node} does not see this folder as the driver does; {ADVICE}"
                )
        require_alike({node: files[2:] for node, files in seen.items() if node.id in working}, images)

    def close(self) -> None:
        """Remove the marker."""
        remove(self.marker)


def put_marker(folder: Location) -> str:
    """An empty file with a name that never was before, in a folder that is made where it is absent."""
    path = Path(folder.path) / f".batchverify-{uuid.uuid4().hex}"
    try:
        folder.make_folder()
        path.touch(exist_ok=False)
    except OSError as exc:
        raise UsageError(f"{folder}: cannot be written to: {exc.strerror}") from exc
    return str(path)


def remove(marker: str) -> None:
    """Remove a marker, if there is one."""
    if marker:
        with suppress(OSError):
            Path(marker).unlink()


def sample(image_paths: Sequence[str | Skipped]) -> list[str]:
    """Some local images of a run, spread over it."""
    step = max(1, len(image_paths) // SAMPLE)
    chosen = [image_paths[at] for at in range(0, len(image_paths), step)]
    return [each for each in chosen if isinstance(each, str) and not scheme_of(each)]


def _look_on(nodes: Sequence[Node], paths: Sequence[str]) -> dict[Node, list[bool]]:
    """What each node has of some paths. A node that dies meanwhile is left out."""
    import ray

    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        node: task.options(scheduling_strategy=on_node(node, soft=False)).remote(paths) for node in nodes
    }
    seen = {}
    for node, ref in asked.items():
        try:
            seen[node] = ray.get(ref, timeout=LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError as exc:
            raise BatchverifyError(f"node {node} did not answer within {LOOK_SECONDS:g} seconds") from exc
        except ray.exceptions.RayError:
            continue
    return seen


def require_alike(seen: dict[Node, list[bool]], images: Sequence[str]) -> None:
    """Raise `UsageError` for an image that some nodes have and others lack."""
    for at, image in enumerate(images):
        have = [node for node, files in seen.items() if files[at]]
        lack = [node for node, files in seen.items() if not files[at]]
        if have and lack:
            raise UsageError(
                f"{image}: node {have[0]} has this image, node {lack[0]} has not; put the images in a folder that "
                "all nodes mount, or in an object store (--image-root s3://…)"
            )
