"""Options of the commands with their defaults, in one place for the Python API and the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from batchverify.errors import UsageError
from batchverify.fingerprint import DEFAULT_MARGIN, EmbeddingSettings
from batchverify.records import Limits

CACHE_VARIABLE = "BATCHVERIFY_CACHE"
ENGINES = ("auto", "local", "ray")
RUNTIMES = ("auto", "openvino", "torch")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
ALGORITHMS = ("distance", "logistic", "weighted-chi2", "network")
DEFAULT_ALGORITHM = "distance"
MONITORS = ("loss", "f1", "auc")
CALIBRATIONS = ("platt", "temperature", "none")
PATHS = ("image_root", "backbone", "weights", "cache", "head", "test", "tensorboard")
LARGEST = 1e9
# What every generator of random numbers takes.
SEEDS = 2**32
MOST_WIDTH = 65_536
# Bootstrap draws behind an interval: fewer give none.
FEWEST_DRAWS = 40
MOST_DRAWS = 10_000
MOST_EXAMPLES = 100


@dataclass(frozen=True)
class EmbedOptions:
    """How images are found, embedded and kept; the command line's options of the same names."""

    column_a: str = "image_a"
    column_b: str = "image_b"
    image_root: str | None = None
    backbone: str = "vggface2"
    weights: str | None = None
    crop: str = "detect"
    margin: int = DEFAULT_MARGIN
    tta: str = "none"
    face: str = "center"
    min_face: int | None = None
    cache: str | None = None
    no_cache: bool = False
    retry_failed: bool = False
    device: str = "auto"
    runtime: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    engine: str = "auto"
    address: str | None = None
    num_cpus: int | None = None
    limit: int | None = None
    max_megapixels: float = 100.0
    max_megabytes: float = 64.0
    max_failed: float = 1.0
    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in PATHS:
            value = getattr(self, name, None)
            if value is not None:
                object.__setattr__(self, name, os.fspath(value))
                if not getattr(self, name):
                    raise UsageError(f"--{name.replace('_', '-')} is empty")
        for name in ("max_megapixels", "max_megabytes"):
            if not 0 < getattr(self, name) < LARGEST:
                raise UsageError(
                    f"--{name.replace('_', '-')} must be a positive number, got {getattr(self, name)}"
                )
        if self.address is not None and self.num_cpus is not None:
            raise UsageError(
                "--num-cpus is for a Ray started here; a cluster at --address has its own number"
            )
        if self.engine not in ENGINES:
            raise UsageError(f"engine must be one of {', '.join(ENGINES)}, got '{self.engine}'")
        for name, choices in (("runtime", RUNTIMES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        if self.address is not None and self.engine == "local":
            raise UsageError("--address names a Ray cluster, --engine local uses none: drop one of them")
        if self.cache is not None and self.no_cache:
            raise UsageError("--cache and --no-cache exclude each other")
        if not 0 <= self.max_failed <= 1:
            raise UsageError(f"--max-failed is a share between 0 and 1, got {self.max_failed}")
        for name in ("batch_size", "num_cpus", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    @property
    def settings(self) -> EmbeddingSettings:
        """The options that move a vector."""
        return EmbeddingSettings(self.crop, self.margin, self.tta, face=self.face, min_face=self.min_face)

    @property
    def limits(self) -> Limits:
        """The largest image that is read and decoded."""
        return Limits(round(self.max_megabytes * 1e6), round(self.max_megapixels * 1e6))

    @property
    def cache_root(self) -> str | None:
        """Where the cache lies; None with `no_cache`."""
        return None if self.no_cache else self.cache or default_cache_root()

    def as_record(self) -> dict[str, Any]:
        """The options as they stand in the run record: those that differ from their defaults."""
        plain = type(self)()
        return {name: value for name, value in vars(self).items() if value != getattr(plain, name)}


@dataclass(frozen=True)
class ScoreOptions(EmbedOptions):
    """Options of `score`: those of embedding, the head and its threshold, what becomes of an earlier output."""

    head: str | None = None
    threshold: float | None = None
    at_far: float | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TrainOptions(EmbedOptions):
    """Options of `train`: those of embedding, the head's kind and how it is fitted.

    test: a manifest's path or URI. algorithms: `NAME` or `NAME:FEATURES`, several for an ensemble, none for
    distance. widths: of a network's hidden layers.
    shrinkage: of linear heads, in pairs. folds: None for 5 where dev is small, 0 for dev alone. tune: trials
    of a search before training, 0 for none. augment: changed views of the training images.
    """

    test: str | None = None
    algorithms: tuple[str, ...] = ()
    features: str | None = None
    widths: tuple[int, ...] = (640, 64)
    dropout: float = 0.5
    weight_decay: float = 0.1
    epochs: int = 20
    patience: int = 8
    max_lr: float | None = None
    batch_pairs: int | None = None
    monitor: str = "loss"
    snapshots: int = 1
    shrinkage: float = 2000.0
    folds: int | None = None
    calibration: str = "platt"
    seed: int = 0
    repeats: int = 1
    tune: int = 0
    augment: int = 0
    strict_identities: bool = False
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("algorithms", "widths"):
            value = getattr(self, name)
            # One algorithm or width alone, as Python callers write it.
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        if not self.widths or not all(
            isinstance(each, int) and 0 < each <= MOST_WIDTH for each in self.widths
        ):
            shown = "-".join(str(each) for each in self.widths)
            raise UsageError(f"--widths are numbers of neurons from 1 to {MOST_WIDTH:,}, got '{shown}'")
        if not 0 <= self.seed < SEEDS - max(self.repeats, 1) + 1:
            raise UsageError(f"--seed and those of --repeats lie between 0 and {SEEDS - 1}, got {self.seed}")
        for name, choices in (("monitor", MONITORS), ("calibration", CALIBRATIONS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is a share from 0 to below 1, got {self.dropout}")
        for name in ("weight_decay", "shrinkage"):
            if not 0 <= getattr(self, name) < LARGEST:
                raise UsageError(
                    f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}"
                )
        if self.max_lr is not None and not 0 < self.max_lr < LARGEST:
            raise UsageError(f"--max-lr must be positive, got {self.max_lr}")
        lowest = {
            "epochs": 1,
            "patience": 1,
            "snapshots": 1,
            "repeats": 1,
            "batch_pairs": 1,
            "tune": 0,
            "augment": 0,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.folds is not None and (self.folds < 0 or self.folds == 1):
            raise UsageError(f"--folds must be 0 (none) or at least 2, got {self.folds}")


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`: how scores are judged.

    truth: a manifest with labels. by: columns to slice by. draws: of the bootstrap, 0 for no intervals.
    examples: pairs shown of each kind. export_worst: how many pairs, and the file.
    """

    truth: str | None = None
    by: tuple[str, ...] = ()
    threshold: float | None = None
    draws: int = 200
    seed: int = 0
    examples: int = 12
    image_root: str | None = None
    cache: str | None = None
    no_images: bool = False
    export_worst: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", (self.by,) if isinstance(self.by, str) else tuple(self.by))
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold lies between 0 and 1, got {self.threshold}")
        for name, most in (("draws", MOST_DRAWS), ("examples", MOST_EXAMPLES)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"--{name} lies between 0 and {most:,}, got {getattr(self, name)}")
        if 0 < self.draws < FEWEST_DRAWS:
            raise UsageError(f"--draws is 0, for no intervals, or at least {FEWEST_DRAWS}, got {self.draws}")
        if self.export_worst is not None and self.export_worst[0] < 1:
            raise UsageError(f"--export-worst takes at least 1 pair, got {self.export_worst[0]}")


def default_cache_root() -> str:
    """`$BATCHVERIFY_CACHE`, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return os.environ.get(CACHE_VARIABLE) or user_cache_dir("batchverify")
