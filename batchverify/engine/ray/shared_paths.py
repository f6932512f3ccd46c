"""Checks, before any work, that all nodes of a cluster see the same cache, output folder and images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchverify.engine.ray.cluster import Node, on_node
from batchverify.errors import BatchverifyError, UsageError
from batchverify.records import Skipped
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.temporary import drop, hold, sweep, temporary_name

# How many images every node looks for.
SAMPLE = 32
LOOK_SECONDS = 60.0
MARKER = "batchverify-marker"
ADVICE = "give a folder that all nodes mount, or an object store (s3://…)"


def look(paths: Sequence[str]) -> list[bool]:
    """The body of a task: which of these files exist on its node."""
    return [os.path.exists(path) for path in paths]  # noqa: PTH110  False for invalid names


@dataclass(frozen=True)
class SharedPaths:
    """The cache of a run and a marker file in it. Workers get it, so that a node that joins late can check too.

    marker: path of a file that the driver wrote into the cache's folder; empty without a local cache.
    """

    cache: str | None
    marker: str = ""

    @classmethod
    def mark(cls, cache: str | None) -> SharedPaths:
        """Put a marker into the cache's folder if that is local."""
        if cache is None or scheme_of(cache):
            return cls(cache)
        return cls(cache, put_marker(Location.parse(cache)))

    def problem_here(self) -> str:
        """What is wrong on this node; empty if nothing is."""
        unseen = self.marker and not os.path.exists(self.marker)  # noqa: PTH110
        return f"it does not see the cache {self.cache}" if unseen else ""

    def require(
        self,
        nodes: Iterable[Node],
        working: set[str],
        output: str | None,
        image_paths: Sequence[str | Skipped],
    ) -> None:
        """Raise `UsageError` if a node does not see the cache or the output's folder as the driver does, or if some
        images exist on one node and not on another.

        nodes: all nodes. working: ids of those that have workers; only they need the images.
        """
        import ray

        here = ray.get_runtime_context().get_node_id()
        involved = [node for node in nodes if node.id in working or node.id == here]
        if len(involved) < 2:
            return
        folder = Location.parse(output).parent if output is not None else None
        marker = put_marker(folder) if folder is not None and folder.is_local else ""
        images = sample(image_paths)
        try:
            seen = _look_on(involved, [self.marker, marker, *images])
        finally:
            remove(marker)
        for node, (sees_cache, sees_output, *_) in seen.items():
            if self.marker and not sees_cache:
                raise UsageError(
                    f"--cache {self.cache}: node {node} does not see this folder as the driver does; "
                    f"{ADVICE}, or --no-cache"
                )
            if marker and not sees_output:
                raise UsageError(f"{output}: node {node} does not see this folder as the driver does; {ADVICE}")
        require_alike({node: files[2:] for node, files in seen.items() if node.id in working}, images)

    def close(self) -> None:
        """Remove the marker."""
        remove(self.marker)


def put_marker(folder: Location) -> str:
    """Create an empty file with a unique name in a folder, and the folder if needed; returns its path.

    Markers of killed runs are removed.
    """
    path = Path(folder.path) / temporary_name(MARKER)
    try:
        folder.make_folder()
        sweep(path.parent, MARKER)
        hold(path)
    except OSError as exc:
        raise UsageError(f"{folder}: cannot be written to: {exc.strerror}") from exc
    return str(path)


def remove(marker: str) -> None:
    """Remove a marker file if there is one."""
    if marker:
        with suppress(OSError):
            drop(Path(marker))


def sample(image_paths: Sequence[str | Skipped]) -> list[str]:
    """Some local images of a run, evenly spread."""
    chosen = image_paths[:: max(1, len(image_paths) // SAMPLE)]
    return [path for path in chosen if isinstance(path, str) and not scheme_of(path)]


def _look_on(nodes: Sequence[Node], paths: Sequence[str]) -> dict[Node, list[bool]]:
    """Which paths exist on each node. A node that dies meanwhile is left out."""
    import ray

    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    refs = {node: task.options(scheduling_strategy=on_node(node, soft=False)).remote(paths) for node in nodes}
    seen = {}
    for node, ref in refs.items():
        try:
            seen[node] = ray.get(ref, timeout=LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError as exc:
            raise BatchverifyError(f"node {node} did not answer within {LOOK_SECONDS:g} seconds") from exc
        except ray.exceptions.RayError:
            continue
    return seen


def require_alike(seen: dict[Node, list[bool]], images: Sequence[str]) -> None:
    """Raise `UsageError` for an image that only some nodes have."""
    for index, image in enumerate(images):
        have = [node for node, files in seen.items() if files[index]]
        lack = [node for node, files in seen.items() if not files[index]]
        if have and lack:
            raise UsageError(
                f"{image}: node {have[0]} has this image, node {lack[0]} does not; put the images into a folder that "
                "all nodes mount, or into an object store (--image-root s3://…)"
            )
