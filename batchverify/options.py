"""Options of the commands and their defaults, for the Python API and the command line alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchverify.errors import UsageError
from batchverify.fingerprint import CHOSEN, BackboneSpec, EmbeddingSettings
from batchverify.records import Limits

CACHE_VARIABLE = "BATCHVERIFY_CACHE"
ENGINES = ("auto", "local", "ray")
RUNTIMES = ("auto", "openvino", "torch")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
ALGORITHMS = ("distance", "logistic", "weighted-chi2", "network")
DEFAULT_ALGORITHM = "distance"
MONITORS = ("loss", "f1", "auc")
CALIBRATIONS = ("platt", "temperature", "none")
PATHS = ("image_root", "backbone", "weights", "cache", "head", "test", "tensorboard", "teacher")
# What `finetune` can minimise; those that take a margin, and those that a batch of people serves, not one of pairs.
LOSSES = ("pair", "contrastive", "triplet", "supcon", "arcface", "distillation")
MARGINS = {"contrastive": 1.0, "triplet": 0.2, "supcon": 0.1, "arcface": 0.5}
FINETUNE_DTYPES = ("auto", "float32", "bfloat16")
FEWEST_BATCH_IMAGES = 8
LARGEST = 1e9
# Seeds below this are taken by every random generator in use.
SEEDS = 2**32
MOST_WIDTH = 65_536
# Fewer bootstrap draws give no interval.
FEWEST_DRAWS = 40
MOST_DRAWS = 10_000
MOST_EXAMPLES = 100
# The value of `--prior` that asks for an estimate.
ESTIMATE = "estimate"


@dataclass(frozen=True)
class EmbedOptions:
    """How images are found, embedded and cached; the command line's options have the same names."""

    column_a: str = "image_a"
    column_b: str = "image_b"
    image_root: str | None = None
    follow_symlinks: bool = False
    backbone: str = "vggface2"
    weights: str | None = None
    crop: str | None = None
    margin: int | None = None
    tta: str = "none"
    face: str = "center"
    min_face: int | None = None
    detector: str | None = None
    cache: str | None = None
    no_cache: bool = False
    retry_failed: bool = False
    details: bool = False
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
            if (value := getattr(self, name, None)) is not None:
                text = os.fspath(value) if isinstance(value, os.PathLike) else value
                if not isinstance(text, str):
                    raise UsageError(f"{name} must be a string or a Path, got {type(value).__name__}")
                object.__setattr__(self, name, text)
                _require(self, name, lambda path: path != "", "must not be empty")
        for name in ("max_megapixels", "max_megabytes"):
            _require(self, name, lambda size: 0 < size < LARGEST, "must be a positive number")
        for name, choices in (("engine", ENGINES), ("runtime", RUNTIMES), ("dtype", DTYPES)):
            _require_choice(self, name, choices)
        for name in ("batch_size", "num_cpus", "limit"):
            _require(self, name, lambda count: count >= 1, "must be at least 1")
        _require(self, "max_failed", lambda share: 0 <= share <= 1, "must lie between 0 and 1")
        if self.address is not None and self.num_cpus is not None:
            raise UsageError("--num-cpus is for a local Ray; the cluster at --address has its own number of CPUs")
        if self.address is not None and self.engine == "local":
            raise UsageError("--address names a Ray cluster, but --engine local uses none: omit one of them")
        if self.cache is not None and self.no_cache:
            raise UsageError("--cache and --no-cache exclude each other")

    def settings(self, backbone: BackboneSpec) -> EmbeddingSettings:
        """The options that affect vectors; those that are not given are the backbone's own."""
        return backbone.settings(**{name: getattr(self, name) for name in CHOSEN})

    @property
    def limits(self) -> Limits:
        """The largest image that is read and decoded."""
        return Limits(round(self.max_megabytes * 1e6), round(self.max_megapixels * 1e6))

    @property
    def cache_root(self) -> str | None:
        """The cache's path or URI; None with `no_cache`."""
        return None if self.no_cache else self.cache or default_cache_root()

    def as_record(self) -> dict[str, Any]:
        """The options of the run record: those that differ from their defaults."""
        defaults = vars(type(self)())
        return {name: value for name, value in vars(self).items() if value != defaults[name]}


@dataclass(frozen=True)
class ScoreOptions(EmbedOptions):
    """Options of `score`: those of embedding, the head with its threshold, and how the output is written.

    review: the wanted false accept and false reject rates of the column `verdict`; None for no such column.
    part_rows: rows of a part, which a kill costs at most; None for 1,000,000 in a folder and 50,000 in a file.
    prior: the share of same pairs that probabilities are for, a number or `estimate`; None for that of the head.
    """

    head: str | None = None
    threshold: float | None = None
    at_far: float | None = None
    confidence: float | None = None
    review: tuple[float, float] | None = None
    overwrite: bool = False
    part_rows: int | None = None
    prior: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_confidence(self)
        if self.review is not None:
            _check_review(self)
        object.__setattr__(self, "prior", _prior(self.prior))
        _require(self, "part_rows", lambda count: count >= 1, "must be at least 1")


@dataclass(frozen=True)
class TrainOptions(EmbedOptions):
    """Options of `train`: those of embedding, the kind of head and how it is fitted.

    test: path or URI of a manifest. algorithms: `NAME` or `NAME:FEATURES`, several for an ensemble, none for
    distance. widths: neurons of a network's hidden layers. shrinkage: of linear heads, in pairs. folds: None
    for 5 if dev is small, 0 for dev alone. centred: take the mean of the training images off every vector. tune:
    trials of a search before training, 0 for none. augment: augmented views of each training image.
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
    centred: bool = True
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
            # Python callers may give one algorithm or width by itself.
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        if not self.widths or not all(isinstance(width, int) and 0 < width <= MOST_WIDTH for width in self.widths):
            shown = "-".join(map(str, self.widths))
            raise UsageError(f"--widths must be numbers of neurons from 1 to {MOST_WIDTH:,}, got '{shown}'")
        if not 0 <= self.seed < SEEDS - max(self.repeats, 1) + 1:
            raise UsageError(f"--seed and those of --repeats must lie between 0 and {SEEDS - 1}, got {self.seed}")
        for name, choices in (("monitor", MONITORS), ("calibration", CALIBRATIONS)):
            _require_choice(self, name, choices)
        _require(self, "dropout", lambda share: 0 <= share < 1, "must be a share from 0 to below 1")
        for name in ("weight_decay", "shrinkage"):
            _require(self, name, lambda value: 0 <= value < LARGEST, "must not be negative")
        _require(self, "max_lr", lambda rate: 0 < rate < LARGEST, "must be positive")
        for name in ("epochs", "patience", "snapshots", "repeats", "batch_pairs"):
            _require(self, name, lambda count: count >= 1, "must be at least 1")
        for name in ("tune", "augment"):
            _require(self, name, lambda count: count >= 0, "must be at least 0")
        _require(self, "folds", lambda count: count == 0 or count >= 2, "must be 0 (none) or at least 2")


@dataclass(frozen=True)
class FinetuneOptions(EmbedOptions):
    """Options of `finetune`: those of embedding, what is trained, with which loss, and how.

    unfreeze: the block from which on the network learns, None for the last layer. loss: one of `LOSSES`. teacher:
    a backbone, or several joined by `+`, whose vectors are learnt, too, with the weight `teacher_weight`; alone with
    the loss `distillation`. max_lr: None for the pick of a range test. lr_decay: what the rate is multiplied by for
    each block further from the output. batch_images: images of a pass, two a pair. accumulate: passes of a step, of
    each worker. augment: augmented views of each training image. train_statistics: renew the statistics of batch
    norms. workers: processes that train together. margin_loss: the margin of the loss, None for its own of
    `MARGINS`. checkpoint_steps: steps that a kill costs at most. test: a manifest that is only measured. overwrite:
    start anew where another fine-tuning is half done.
    """

    unfreeze: str | None = None
    loss: str = "supcon"
    teacher: str | None = None
    teacher_weight: float = 1.0
    epochs: int = 10
    patience: int = 3
    max_lr: float | None = None
    lr_decay: float = 0.5
    weight_decay: float = 0.05
    dropout: float = 0.0
    batch_images: int = 128
    accumulate: int = 1
    augment: int = 2
    train_statistics: bool = False
    seed: int = 0
    workers: int = 1
    margin_loss: float | None = None
    checkpoint_steps: int = 100
    test: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice(self, "loss", LOSSES)
        _require_choice(self, "dtype", FINETUNE_DTYPES)
        _require(self, "seed", lambda seed: 0 <= seed < SEEDS, f"must lie between 0 and {SEEDS - 1}")
        _require(self, "dropout", lambda share: 0 <= share < 1, "must be a share from 0 to below 1")
        _require(self, "lr_decay", lambda share: 0 < share <= 1, "must be above 0 and at most 1")
        for name in ("weight_decay", "teacher_weight"):
            _require(self, name, lambda value: 0 <= value < LARGEST, "must not be negative")
        for name in ("max_lr", "margin_loss"):
            _require(self, name, lambda value: 0 < value < LARGEST, "must be positive")
        for name in ("epochs", "patience", "accumulate", "workers", "checkpoint_steps"):
            _require(self, name, lambda count: count >= 1, "must be at least 1")
        _require(self, "augment", lambda count: count >= 0, "must be at least 0")
        least = FEWEST_BATCH_IMAGES
        _require(self, "batch_images", lambda count: count >= least, f"must be at least {least}")
        if self.margin_loss is not None and self.loss not in MARGINS:
            raise UsageError(f"--margin-loss is for the losses {', '.join(MARGINS)}, not for {self.loss}")
        if self.loss == "distillation" and self.teacher is None:
            raise UsageError("--loss distillation learns the vectors of a --teacher: name a backbone")


@dataclass(frozen=True)
class CalibrateOptions(EmbedOptions):
    """Options of `calibrate`: those of embedding and how scores become probabilities.

    apart_from: manifests with whose people and images the labelled pairs may share nothing.
    """

    calibration: str = "platt"
    apart_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.apart_from
        object.__setattr__(self, "apart_from", (given,) if isinstance(given, str) else tuple(given))
        _require_choice(self, "calibration", CALIBRATIONS)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    truth: a manifest with labels. by: columns to slice by. draws: of the bootstrap, 0 for no intervals. examples:
    pairs of each kind in the report. export_worst, suspects: number of pairs and the file to write. group_a,
    group_b: columns with the group of each side's person; or group: such a column of people, a table of people.
    quality: columns to discard pairs by, with `-` before them if high values are bad. wanted_fnmr: rates to
    reach. tables: also write the figures as CSV and LaTeX. plots: also each plot as SVG and PNG. pdf: also the
    report as PDF; these two need a browser (`evaluation/report/browser.py`). score: a column of scores of another
    system, of which `higher_is` says what a high one means; `threshold` is then in its units.
    """

    truth: str | None = None
    by: tuple[str, ...] = ()
    threshold: float | None = None
    at_far: float | None = None
    confidence: float | None = None
    head: str | None = None
    draws: int = 200
    seed: int = 0
    examples: int = 12
    image_root: str | None = None
    follow_symlinks: bool = False
    cache: str | None = None
    no_images: bool = False
    export_worst: tuple[int, str] | None = None
    group_a: str | None = None
    group_b: str | None = None
    people: str | None = None
    group: str | None = None
    quality: tuple[str, ...] = ()
    wanted_fnmr: tuple[float, ...] = ()
    suspects: tuple[int, str] | None = None
    tables: bool = False
    plots: bool = False
    pdf: bool = False
    score: str | None = None
    higher_is: str = "same"

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", (self.by,) if isinstance(self.by, str) else tuple(self.by))
        self._check_groups()
        self._check_quality()
        _require_confidence(self)
        if self.threshold is not None and self.at_far is not None:
            raise UsageError("--threshold and --at-far exclude each other")
        if self.score is None:
            _require(self, "threshold", lambda value: 0 <= value <= 1, "must lie between 0 and 1")
        _require_choice(self, "higher_is", ("same", "different"))
        _require(self, "draws", lambda count: 0 <= count <= MOST_DRAWS, f"must lie between 0 and {MOST_DRAWS:,}")
        if 0 < self.draws < FEWEST_DRAWS:
            raise UsageError(f"--draws must be 0 (no intervals) or at least {FEWEST_DRAWS}, got {self.draws}")
        rule = f"must lie between 0 and {MOST_EXAMPLES}"
        _require(self, "examples", lambda count: 0 <= count <= MOST_EXAMPLES, rule)
        if self.export_worst is not None and self.export_worst[0] < 1:
            raise UsageError(f"--export-worst must name at least 1 pair, got {self.export_worst[0]}")
        if self.suspects is not None and self.suspects[0] < 1:
            raise UsageError(f"--suspects must name at least 1 pair, got {self.suspects[0]}")

    def _check_groups(self) -> None:
        for one, other in (("group_a", "group_b"), ("people", "group")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                first, second = (f"--{name.replace('_', '-')}" for name in (one, other))
                raise UsageError(f"{first} and {second} belong together; only one is given")
        if self.people is not None:
            object.__setattr__(self, "people", os.fspath(self.people))
        if self.people is not None and self.group_a is not None:
            raise UsageError("groups come from --group-a and --group-b or from --people, not from both")

    def _check_quality(self) -> None:
        quality = (self.quality,) if isinstance(self.quality, str) else tuple(dict.fromkeys(self.quality))
        object.__setattr__(self, "quality", quality)
        wanted = self.wanted_fnmr if isinstance(self.wanted_fnmr, Sequence) else (self.wanted_fnmr,)
        object.__setattr__(self, "wanted_fnmr", tuple(wanted))
        for rate in self.wanted_fnmr:
            if not 0 < rate < 1:
                raise UsageError(f"--wanted-fnmr must lie between 0 and 1, got {rate!r}")
        if self.wanted_fnmr and not quality:
            raise UsageError("--wanted-fnmr needs --quality, the column to discard pairs by")


def default_cache_root() -> str:
    """`$BATCHVERIFY_CACHE`, else the user's cache folder. Raises `UsageError` if the user has no home folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return given
    from platformdirs import user_cache_dir

    try:
        folder = user_cache_dir("batchverify")
    except RuntimeError:
        folder = ""
    # Older versions of platformdirs give a path that starts with `~`.
    if not os.path.isabs(folder):  # noqa: PTH117
        raise UsageError(
            f"user id {os.getuid()} has no home folder (HOME is not set), so there is no place for the cache: name "
            f"one with --cache or ${CACHE_VARIABLE}, or use --no-cache"
        )
    return folder


def _prior(value: Any) -> float | str | None:
    """A value of `--prior`: a number as a float. Raises `UsageError`."""
    if value is None or value == ESTIMATE:
        return None if value is None else ESTIMATE
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--prior must be a share of same pairs above 0 and below 1, or {ESTIMATE}, got {value!r}")
    return share


def _require(options: Any, name: str, is_valid: Callable[[Any], bool], rule: str) -> None:
    """Raise `UsageError` if an option is given and not valid. rule: what it must be, for the message."""
    value = getattr(options, name)
    if value is not None and not is_valid(value):
        raise UsageError(f"--{name.replace('_', '-')} {rule}, got {value!r}")


def _require_confidence(options: Any) -> None:
    rule = "must be a share from 0.5 to below 1"
    _require(options, "confidence", lambda share: 0.5 <= share < 1, rule)
    if options.confidence is None:
        return
    if options.at_far is None:
        raise UsageError("--confidence says how sure the rate of --at-far must be: give both")
    _require(options, "at_far", lambda rate: 0 < rate < 1, "must lie between 0 and 1 with --confidence")


def _check_review(options: Any) -> None:
    """Raise `UsageError` unless `review` is two rates; they become a tuple of floats."""
    rates = options.review
    if not isinstance(rates, list | tuple) or len(rates) != len(("FAR", "FRR")):
        raise UsageError(f"--review takes two rates, FAR and FRR, got {rates!r}")
    for rate in rates:
        if not isinstance(rate, int | float) or not 0 < rate < 1:
            raise UsageError(f"--review: rates must lie between 0 and 1, got {rate!r}")
    object.__setattr__(options, "review", (float(rates[0]), float(rates[1])))


def _require_choice(options: Any, name: str, choices: Sequence[str]) -> None:
    if getattr(options, name) not in choices:
        raise UsageError(f"--{name} must be one of {', '.join(choices)}, got '{getattr(options, name)}'")
