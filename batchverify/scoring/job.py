"""A job: the manifest with its settings, the work plan for its workers, and the engine it runs on."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache, KeyIndex
from batchverify.cache.image_keys import content_key
from batchverify.embedding.backbone import find_spec, fused_names, is_file
from batchverify.embedding.download import PUBLISHED
from batchverify.engine.base import Engine, Workers, WorkPlan, visible_gpus
from batchverify.engine.ray.address import Address
from batchverify.engine.stages import LoadPlan
from batchverify.engine.threads import LocalEngine
from batchverify.errors import UsageError
from batchverify.faces.images import read_image
from batchverify.fingerprint import BackboneSpec, EmbeddingFingerprint, EmbeddingSettings
from batchverify.manifest.columns import BACKBONES
from batchverify.manifest.manifest import Columns, Manifest, Scan
from batchverify.options import RUNTIMES, EmbedOptions
from batchverify.progress import Progress, show_download
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import available_cpus
from batchverify.storage.fence import Fence
from batchverify.storage.location import Location
from batchverify.version import __version__

if TYPE_CHECKING:
    from batchverify.heads.fused_head import FusedHead
    from batchverify.heads.head import Head
    from batchverify.heads.review_band import ReviewBand

# Incremented when the same document and vectors would give other rows.
ROWS_FORMAT = 4
# Up to this many images to embed (some minutes of work) threads are faster: on two cores a local Ray takes 8 s to
# start and stop and costs a fifth of the rate. Beyond, it matters more that no image can end the run.
RAY_WORTH_IMAGES = 10_000
# Images that are looked up in the cache to estimate how many are missing.
SAMPLE = 64


@dataclass(frozen=True)
class Job:
    """A manifest and the settings of a run, both checked.

    fused: with several backbones a job for each, in their order. The fields `backbone` and `settings` are then the
    first one's, and `fingerprint` is that of all together.
    """

    options: EmbedOptions
    manifest: Manifest
    manifest_fingerprint: str
    backbone: BackboneSpec
    settings: EmbeddingSettings
    fingerprint: EmbeddingFingerprint
    run_id: str
    started: float
    fused: tuple[Job, ...] = ()

    @classmethod
    def open(cls, manifest: Any, options: EmbedOptions) -> Job:
        """Open the manifest and find the backbone. Raises `UsageError` for bad input; `scan` reads the rows."""
        started = time.monotonic()
        columns = Columns(options.column_a, options.column_b)
        opened = Manifest.open(
            manifest,
            columns=columns,
            image_root=options.image_root,
            follow_symlinks=options.follow_symlinks,
            limit=options.limit,
        )
        # Hashed now: the files may be gone when the run record is written.
        hashed = opened.fingerprint
        members = []
        for each in backbone_options(options):
            backbone = backbone_spec(each)
            settings = each.settings(backbone)
            known = EmbeddingFingerprint.of(backbone, settings)
            members.append(cls(each, opened, hashed, backbone, settings, known, uuid.uuid4().hex[:12], started))
        if len(members) == 1:
            return members[0]
        fingerprint = EmbeddingFingerprint.fused([member.fingerprint for member in members])
        return replace(members[0], options=options, fingerprint=fingerprint, fused=tuple(members))

    @property
    def members(self) -> tuple[Job, ...]:
        """A job for each backbone."""
        return self.fused or (self,)

    @property
    def names(self) -> list[str]:
        """The names of fused backbones for people and for the column `backbones`, files without their folders."""
        return backbone_names([member.options for member in self.fused])

    @property
    def scan(self) -> Scan:
        """The result of the first pass over the manifest's rows, which happens on first use."""
        return self.manifest.scanned

    def of_view(self, view: int) -> Job:
        """A job for an augmented view of the same images, cached under its own fingerprint; of one backbone."""
        settings = replace(self.settings, view=view)
        fingerprint = EmbeddingFingerprint.of(self.backbone, settings)
        run_id, started = uuid.uuid4().hex[:12], time.monotonic()
        return replace(self, settings=settings, fingerprint=fingerprint, run_id=run_id, started=started)

    def open_cache(self) -> EmbeddingCache | None:
        """The run's cache, created if it does not exist; None if the run has none."""
        root = self.options.cache_root
        if root is None:
            return None
        cache = EmbeddingCache(root, self.fingerprint, run_id=self.run_id, details=self.options.details)
        cache.create()
        cache.refresh()
        return cache

    def plan(self, earlier: Sequence[ComputePath] = ()) -> WorkPlan:
        """What workers need to know. earlier: the compute paths of an interrupted run of this job.

        A single path is used again. With several, each node chooses its own. A runtime of an older version cannot
        be used again: its vectors are refused when paths are compared.
        """
        plan = work_plan(self.options, self.settings, self.fingerprint)
        plan = replace(plan, load=replace(plan.load, fence=self.manifest.fence))
        if len(earlier) != 1 or earlier[0].runtime not in RUNTIMES:
            return plan
        path, options = earlier[0], self.options
        for name in ("dtype", "runtime", "batch_size"):
            requested, value = getattr(options, name), getattr(path, name)
            # The path's int8 also names the float type of its CPU, as in `int8_float32`.
            if requested not in (None, "auto", value, str(value).partition("_")[0]):
                raise UsageError(
                    f"--{name.replace('_', '-')} {requested}: this job was started with {value}; omit the option, or "
                    "start anew with --overwrite"
                )
        device = path.device_kind if options.device == "auto" else plan.device
        return replace(plan, device=device, dtype=path.dtype, runtime=path.runtime, batch_size=path.batch_size)

    def document(self, head: str, threshold: float, band: ReviewBand | None = None) -> dict[str, Any]:
        """Everything that affects a row: two runs with equal documents write equal rows.

        head: its digest. band: of --review. The types of the carried columns follow from the manifest's bytes.
        """
        options = self.options
        # Only where it is given, so that a document without it stays what it was.
        given = {name: True for name in ("follow_symlinks", "details") if getattr(options, name)}
        fused = {BACKBONES: self.names} if self.fused else {}
        review = {"review": dict(vars(band))} if band is not None else {}
        return {
            **given,
            **fused,
            **review,
            "format": ROWS_FORMAT,
            "manifest": self.manifest_fingerprint,
            "column_a": options.column_a,
            "column_b": options.column_b,
            "image_root": self.manifest.roots,
            "limit": options.limit,
            "max_megabytes": options.max_megabytes,
            "max_megapixels": options.max_megapixels,
            "embedding": dict(self.fingerprint.document),
            "head": head,
            "threshold": threshold,
        }

    def record(self, document: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
        """The run record: version, input and settings of the run, and the figures of its summary."""
        return {
            "version": __version__,
            "run_id": self.run_id,
            "job": document,
            "options": self.options.as_record(),
            "manifest": self.manifest.names,
            "manifest_fingerprint": self.manifest_fingerprint,
            "image_root": self.options.image_root,
            "backbone_fingerprint": "+".join(member.backbone.fingerprint for member in self.members),
            "embedding": dict(self.fingerprint.document),
            "embedding_fingerprint": self.fingerprint.id,
            **summary,
        }


@contextmanager
def engine_of(
    job: Job, progress: Progress, wanted: np.ndarray | None = None, earlier: Sequence[ComputePath] = ()
) -> Iterator[tuple[Engine, EmbeddingCache | None]]:
    """The engine that the options choose and the run's cache. At the end the engine is closed.

    wanted: indices of the images that are needed; all by default. earlier: as in `Job.plan`.
    """
    cache = job.open_cache()
    index = cache.index if cache is not None else None
    engine = _build_engine(job, index, wanted, job.plan(earlier))
    try:
        yield engine, cache
    finally:
        progress.clear()
        engine.close()


def _build_engine(job: Job, index: KeyIndex | None, wanted: np.ndarray | None, plan: WorkPlan) -> Engine:
    options = job.options
    address = Address.find(options.address)
    kind = options.engine if options.engine != "auto" else _choose_engine(job, index, wanted, address)
    if kind == "ray":
        from batchverify.engine.ray.engine import RayEngine

        return RayEngine(plan, index, address=address, num_cpus=options.num_cpus, verbose=options.verbose)
    cpus = options.num_cpus or available_cpus()
    return LocalEngine(plan, index, Workers.for_cpus(cpus, visible_gpus(plan.device)))


def _choose_engine(job: Job, index: KeyIndex | None, wanted: np.ndarray | None, address: Address | None) -> str:
    """`ray` if a cluster is named or, by a sample, many images are not in the cache; otherwise `local`."""
    if address is not None:
        return "ray"
    image_paths = job.scan.images
    count = len(image_paths) if wanted is None else len(wanted)
    if count <= RAY_WORTH_IMAGES:
        return "local"
    positions = range(0, count, max(1, count // SAMPLE))
    sample = [image_paths[n if wanted is None else int(wanted[n])] for n in positions]
    readable = [path for path in sample if isinstance(path, str)]
    missing = _missing_share(job.plan().load, index, readable) * len(readable) / len(sample)
    return "ray" if missing * count > RAY_WORTH_IMAGES else "local"


def _missing_share(plan: LoadPlan, index: KeyIndex | None, sample: Sequence[str]) -> float:
    """The share of the images that can be read but are not in the cache."""
    if index is None:
        return 1.0
    with ThreadPoolExecutor(16) as pool:
        fence = Fence(plan.fence) if plan.fence is not None else None
        contents = list(pool.map(lambda path: read_image(path, plan.limits, fence), sample))
    keys = [content_key(content) for content in contents if not isinstance(content, Skipped)]
    return float((index.find(keys) < 0).sum()) / max(len(sample), 1)


def backbone_options(options: EmbedOptions) -> list[EmbedOptions]:
    """The options of each backbone that `--backbone` names; `--weights` goes to those that are published.

    Details are those of the first: the others need none.
    """
    names = fused_names(options.backbone)
    if len(names) == 1:
        return [options]
    takers = {name for name in names if name in PUBLISHED} or set(names)
    return [
        replace(
            options,
            backbone=name,
            weights=options.weights if name in takers else None,
            details=options.details and number == 0,
        )
        for number, name in enumerate(names)
    ]


def backbone_names(members: Sequence[EmbedOptions]) -> list[str]:
    """The names of fused backbones for the column `backbones`: files without their folders if that is enough."""
    paths = [Path(member.backbone) for member in members]
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else list(map(str, paths))


def head_of(path: str | None, embeddings: Sequence[EmbeddingFingerprint]) -> Head | FusedHead:
    """The head at `path`, or the one shipped for one or several backbones.

    Raises `ArtifactError` if there is none or it does not fit.
    """
    if len(embeddings) > 1:
        from batchverify.heads.fused_head import find_fused_head

        return find_fused_head(path, embeddings)
    from batchverify.heads.head import find_head

    return find_head(path, embeddings[0])


def backbone_spec(options: EmbedOptions) -> BackboneSpec:
    """What the options' backbone takes and gives; downloaded if needed. Raises what `load_backbone` raises."""
    weights = Path(options.weights) if options.weights else None
    download = None if options.quiet else show_download
    return find_spec(options.backbone, weights, progress=download)


def work_plan(options: EmbedOptions, settings: EmbeddingSettings, fingerprint: EmbeddingFingerprint) -> WorkPlan:
    """What workers need to know to embed under `settings` and its `fingerprint`."""
    root = options.cache_root
    # Workers may run in another folder: paths are made absolute. Links stay, whose names tell what a file is.
    cache = str(Location.parse(root)) if root is not None else None
    load = LoadPlan(settings, fingerprint, options.limits, cache, options.retry_failed, details=options.details)
    backbone = str(Path(options.backbone).absolute()) if is_file(options.backbone) else options.backbone
    weights = str(Path(options.weights).resolve()) if options.weights else None
    return WorkPlan(load, backbone, weights, options.device, options.runtime, options.batch_size, options.dtype)
