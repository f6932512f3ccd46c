"""The command line's options, each with the default that `batchverify.options` gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import click

from batchverify.fingerprint import CROPS, DETECTORS, FACES, TTA
from batchverify.options import (
    ALGORITHMS,
    CALIBRATIONS,
    DEFAULT_ALGORITHM,
    DTYPES,
    ENGINES,
    LOSSES,
    MONITORS,
    RUNTIMES,
    EvaluateOptions,
    FinetuneOptions,
    ScoreOptions,
    TrainOptions,
)

Command = TypeVar("Command", bound=Callable[..., Any])
_DEFAULTS = {
    field.name: field.default
    for options in (ScoreOptions, TrainOptions, EvaluateOptions)
    for field in fields(options)
}


# Types of numeric values, by the placeholder in the help text. Other values are strings.
_TYPES = {"N": int, "PIXELS": int, "X": float, "SHARE": float, "PAIRS": float}


def option(
    name: str,
    help_text: str,
    metavar: str | None = None,
    *,
    former_name: str | None = None,
    defaults: Mapping[str, Any] = _DEFAULTS,
    **kwargs: Any,
) -> Callable[[Command], Command]:
    """A click option with the default of the field of the same name. former_name: an alias."""
    field = name.lstrip("-").replace("-", "_")
    names = [name, former_name, field] if former_name else [name]
    kwargs = {"type": _TYPES.get(metavar or ""), **kwargs}
    return click.option(*names, default=defaults[field], show_default=True, help=help_text, metavar=metavar, **kwargs)


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator; `--help` lists them in this order."""

    def decorate(command: Command) -> Command:
        for add_option in reversed(options):
            command = add_option(command)
        return command

    return decorate


def output_option(metavar: str, help_text: str) -> Callable[[Command], Command]:
    """`-o`, which must be given."""
    return click.option("-o", "--output", required=True, metavar=metavar, help=help_text)


follow_symlinks_option = option(
    "--follow-symlinks",
    "Also read images that symbolic links inside --image-root lead to outside of it.",
    is_flag=True,
)
column_options = together(
    option("--column-a", "Column with the first image of a pair.", "NAME"),
    option("--column-b", "Column with the second image of a pair.", "NAME"),
)
manifest_options = together(
    option(
        "--image-root",
        "Folder or URI that relative image paths start from; if given, no image outside it is read. Default: the "
        "manifest's folder.",
        "DIR",
    ),
    follow_symlinks_option,
    column_options,
    option("--limit", "Read only the first N rows.", "N"),
)
backbone_options = together(
    option(
        "--backbone",
        "vggface2 and compact (part of the package), vggface2-float, casia-webface, a file with weights, an ONNX "
        "file with a description beside it, or the name of a plug-in. Several joined by + score every pair together: "
        "vggface2+compact.",
        "NAME|PATH",
    ),
    option("--weights", "File or folder with the published weights of a float backbone.", "PATH"),
    option(
        "--crop",
        "How the face is cut out: detect, by the detector's box with a margin; align, turned and scaled so that "
        "eyes, nose and mouth lie where the backbone expects them (needs --detector retinaface); center, a fixed "
        "part of the image; none, the whole image. Default: the backbone's own, detect for vggface2, align for "
        "compact.",
        type=click.Choice(CROPS),
    ),
    option(
        "--detector",
        "What finds faces, for --crop detect and align. retinaface is several times as fast as mtcnn, finds five "
        "landmarks and tries sideways images turned; vggface2's shipped heads are for mtcnn. Default: the backbone's "
        "own, mtcnn for vggface2, retinaface for compact.",
        type=click.Choice(DETECTORS),
    ),
    option(
        "--margin",
        "Margin around a detected face, in pixels of a crop of 160 pixels. Other margins need a head of their own. "
        "Default: 44, or what a backbone's description says.",
        "PIXELS",
    ),
    option(
        "--face",
        "Which of several faces to take: large and near the centre, the largest, or the most probable. Heads fit, "
        "whichever choice they were trained with.",
        type=click.Choice(tuple(FACES)),
    ),
    option(
        "--min-face",
        "Smallest face to detect, in pixels of an image reduced to 2,048. Default: 20, or a 24th of the shorter side "
        "if that is larger. Heads fit, as with --face.",
        "PIXELS",
    ),
    option(
        "--tta",
        "Test-time augmentation. flip: average the embeddings of the crop and its mirror image (twice the work).",
        type=click.Choice(TTA),
    ),
)
device_options = together(
    option("--device", "auto, cpu, cuda or cuda:N. A GPU that is named but absent is an error.", "DEVICE"),
    option(
        "--runtime",
        "Library that runs the networks. auto: on a CPU what $BATCHVERIFY_RUNTIME names, else OpenVINO if it can be "
        "loaded; otherwise torch.",
        type=click.Choice(RUNTIMES),
    ),
    option(
        "--dtype",
        "Data type that the backbone computes in. auto: the fastest that the device has and the weights allow. int8 "
        "needs OpenVINO, float16 needs torch.",
        type=click.Choice(DTYPES),
        former_name="--numbers",
    ),
)
cache_option = option(
    "--cache",
    "Folder or URI of the embedding cache. Default: $BATCHVERIFY_CACHE, or else the user's cache folder.",
    "URI",
)
overwrite_option = option(
    "--overwrite",
    "Start anew, even if OUT holds rows of another job. Without this option such rows are an error.",
    is_flag=True,
)
part_rows_option = option(
    "--part-rows",
    "Rows of a part, which is what a kill costs at most; in a folder a part is a file. Default: 1,000,000 in a "
    "folder, 50,000 in a single file. A job that is resumed keeps its own.",
    "N",
)
details_option = option(
    "--details",
    "Also say of each image: the face's box, size and landmarks, the detector's confidence, the number of faces, the "
    "rotation and the sharpness. Images that an older version put into the cache are embedded again.",
    is_flag=True,
)
no_cache_option = option("--no-cache", "Neither read nor write a cache.", is_flag=True)
run_options = together(
    option("--retry-failed", "Try images again whose failure is cached.", is_flag=True),
    device_options,
    option(
        "--batch-size",
        "Faces per forward pass. Default: on a CPU 4 for compact and ONNX files, else 32; on a GPU the fastest of a "
        "few trials.",
        "N",
    ),
    option(
        "--engine",
        "local: threads of this process. ray: Ray, here or on a cluster. auto: ray on a cluster or for many new "
        "images, otherwise local.",
        type=click.Choice(ENGINES),
    ),
    option("--address", "Ray cluster to run on: auto or HOST:PORT. Default: $RAY_ADDRESS.", "ADDR"),
    option(
        "--num-cpus",
        "Number of CPUs to use, not on a cluster. Default: all that this process may use.",
        "N",
    ),
    option("--max-megapixels", "Do not decode larger images.", "X"),
    option("--max-megabytes", "Do not read larger files.", "X"),
    option("--max-failed", "Exit with code 3 if a larger share of the rows could not be scored.", "SHARE"),
)
confidence_option = option(
    "--confidence",
    "With --at-far X: the highest threshold whose false accept rate is at most X with this confidence, whatever the "
    "people are like; 0.95 for 95 %.",
    "SHARE",
)
prior_option = option(
    "--prior",
    "Share of same pairs expected, above 0 and below 1: probabilities are shifted to it by Bayes' rule. estimate: "
    "from the scores (not in predict). Thresholds of the head move along, so that verdicts stay; --threshold does "
    "not. Default: the share for which the head was calibrated, for shipped heads about 0.5.",
    "P|estimate",
)
threshold_options = together(
    option(
        "--head",
        "Head file. Default: the head shipped for these settings. There is one for vggface2 and vggface2-float with "
        "--crop detect, center and none, the default --margin and --detector, and --tta flip with --crop detect. "
        "There is one for compact and one for vggface2+compact, also with --tta flip. Other settings need one from "
        "`train`.",
        "PATH",
    ),
    option(
        "--threshold",
        "Label a pair 1 (different) at or above this probability. Default: the head's threshold of best expected F1.",
        "X",
    ),
    option("--at-far", "Use the head's threshold for this false accept rate.", "X"),
    confidence_option,
    option(
        "--review",
        "Add a column of three verdicts, same, different and review, such that other people's different pairs are "
        "called same at rate FAR at most, and same pairs different at rate FRR at most.",
        "FAR FRR",
        type=(float, float),
    ),
    prior_option,
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a machine-readable summary to stdout.")
talk_options = together(
    json_option,
    click.option("-q", "--quiet", is_flag=True, help="Show no progress and no summary."),
    click.option("-v", "--verbose", is_flag=True, help="Log more, Ray's own messages included."),
)
# What commands that learn from manifests have in common.
learning_options = together(
    manifest_options, backbone_options, cache_option, no_cache_option, run_options, talk_options
)
seed_option = option("--seed", "Seed of all random draws.", "N")
calibration_option = option("--calibration", "How scores become probabilities.", type=click.Choice(CALIBRATIONS))
train_options = together(
    option("--test", "Manifest of pairs to measure the finished head on; not used for training.", "TEST"),
    click.option(
        "--algorithm",
        "algorithms",
        multiple=True,
        metavar="NAME[:FEATURES]",
        help=f"{', '.join(ALGORITHMS)}. Repeat for an ensemble.  [default: {DEFAULT_ALGORITHM}]",
    ),
    option(
        "--features",
        "Pair features of algorithms that name none, joined by +: concat, absdiff, sqdiff, product, chi2, chi2raw, "
        "cosine, euclidean, chi2sum. Default: chi2sum (distance), chi2 (logistic, weighted-chi2), absdiff (network).",
        "NAMES",
    ),
    click.option(
        "--centred/--not-centred",
        default=TrainOptions().centred,
        show_default=True,
        help="Take the mean of the training images' embeddings off every embedding.",
    ),
    option(
        "--shrinkage",
        "Pull of a linear head's weights towards equal ones: the number of pairs that weigh as much.",
        "PAIRS",
    ),
    click.option(
        "--widths",
        default="-".join(map(str, TrainOptions().widths)),
        show_default=True,
        metavar="N-N-…",
        help="Neurons in a network's hidden layers.",
    ),
    option("--dropout", "Dropout in a network's hidden layers.", "SHARE"),
    option("--weight-decay", "Weight decay of a network.", "X"),
    option("--epochs", "Maximum epochs of a network.", "N"),
    option("--patience", "Stop a network after N epochs without a better result on dev.", "N"),
    option("--max-lr", "Highest learning rate of a network. Default: found by a range test.", "X"),
    option("--batch-pairs", "Pairs per training step. Default: a sixteenth of the pairs, 16 to 1,024.", "N"),
    option("--monitor", "Figure on dev that decides which epoch is best.", type=click.Choice(MONITORS)),
    option("--snapshots", "Make an ensemble of a network's N best epochs.", "N"),
    option(
        "--folds",
        "Folds in which training pairs are scored for calibration and thresholds; 0: use dev alone. Default: 5, or 0 "
        "from 5,000 dev pairs on.",
        "N",
    ),
    calibration_option,
    option("--augment", "Also learn from N augmented views of each training image.", "N"),
    option("--tune", "Search for the best settings on dev in N trials with Ray Tune; 0: no search.", "N"),
    seed_option,
    option("--repeats", "Train N times, with consecutive seeds, and keep the head of the first.", "N"),
    option(
        "--strict-identities",
        "Refuse sets that share people (columns person_a, person_b) or identical images.",
        is_flag=True,
    ),
    option("--tensorboard", "Folder for TensorBoard event files.", "DIR"),
)
_option = partial(option, defaults={field.name: field.default for field in fields(FinetuneOptions)})
finetune_options = together(
    _option("--test", "Manifest of pairs to measure both backbones on; not used for training.", "TEST"),
    _option(
        "--unfreeze",
        "First block that is trained, with all that follow it. vggface2: last_linear, block8, repeat_3, mixed_7a, "
        "repeat_2, mixed_6a, repeat_1. compact: embedding, head_depthwise, head, stage2, stage1, stage0. Both: all. "
        "Default: the last layer.",
        "BLOCK",
    ),
    _option(
        "--loss",
        "What is minimised. pair and contrastive need labelled pairs. triplet and supcon need people: the columns "
        "person_a and person_b, or those that same pairs imply. arcface needs the columns, distillation a --teacher.",
        type=click.Choice(LOSSES),
    ),
    _option(
        "--margin-loss",
        "Margin of the loss. Default: contrastive 1, triplet 0.2, supcon 0.1, arcface 0.5.",
        "X",
    ),
    _option(
        "--teacher",
        "Backbone, or several joined by +, whose embeddings the network also learns to reproduce.",
        "NAME|PATH",
    ),
    _option("--teacher-weight", "Weight of --teacher beside another loss.", "X"),
    _option("--epochs", "Maximum epochs.", "N"),
    _option("--patience", "Stop after N epochs without a better result on DEV.", "N"),
    _option("--max-lr", "Highest learning rate of the last block. Default: found by a range test.", "X"),
    _option("--lr-decay", "Factor of the learning rate for each block further from the output.", "X"),
    _option("--weight-decay", "Weight decay.", "X"),
    _option("--dropout", "Dropout before the last layer.", "SHARE"),
    _option("--train-statistics", "Train the statistics of batch normalisation, too.", is_flag=True),
    _option("--batch-images", "Images of a forward pass.", "N"),
    _option("--accumulate", "Forward passes of a training step.", "N"),
    _option("--augment", "Augmented views of each training image.", "N"),
    _option("--workers", "Processes that train together, with Ray Train.", "N"),
    _option("--checkpoint-steps", "Steps between two checkpoints; a kill costs no more than these.", "N"),
    _option("--seed", "Seed of all random draws.", "N"),
    _option(
        "--overwrite",
        "Start anew, even if BACKBONE.job holds another fine-tuning half done. Without this option that is an error.",
        is_flag=True,
    ),
)
