"""The command line's options, each with the default that `options` gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from batchverify.fingerprint import CROPS, FACES, TTA
from batchverify.options import (
    ALGORITHMS,
    CALIBRATIONS,
    DTYPES,
    ENGINES,
    MONITORS,
    RUNTIMES,
    ScoreOptions,
    TrainOptions,
)

Command = TypeVar("Command", bound=Callable[..., Any])
_DEFAULTS = {each.name: each.default for each in (*fields(ScoreOptions), *fields(TrainOptions))}


def option(
    name: str, help_text: str, *, former_name: str | None = None, **kwargs: Any
) -> Callable[[Command], Command]:
    """A click option whose default is that of `ScoreOptions` or `TrainOptions`; a former name still works."""
    field = name.lstrip("-").replace("-", "_")
    names = [name, former_name, field] if former_name else [name]
    return click.option(*names, default=_DEFAULTS[field], show_default=True, help=help_text, **kwargs)


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which they are to be listed."""

    def decorate(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


manifest_options = together(
    option(
        "--image-root",
        "Folder or URI that relative image paths start from; nothing outside it is read. "
        "Default: the manifest's folder.",
        metavar="DIR",
    ),
    option("--column-a", "Column with the first image of a pair.", metavar="NAME"),
    option("--column-b", "Column with the second image of a pair.", metavar="NAME"),
    option("--limit", "Read only the first N rows.", type=int, metavar="N"),
)
backbone_options = together(
    option(
        "--backbone",
        "vggface2 (in the package), vggface2-float, casia-webface, or a file of weights.",
        metavar="NAME|PATH",
    ),
    option("--weights", "File or folder with the published weights of a float backbone.", metavar="PATH"),
    option(
        "--crop",
        "How the face is cut: found by MTCNN, at a fixed place, or the whole picture.",
        type=click.Choice(CROPS),
    ),
    option("--margin", "Pixels of 160 around the detected box.", type=int),
    option(
        "--face",
        "Which of several faces: large and near the centre, the largest, or the detector's surest.",
        type=click.Choice(tuple(FACES)),
    ),
    option(
        "--min-face",
        "Smallest face searched for, in pixels of a picture reduced to 2,048. Default: 20, or a 24th of the shorter "
        "side where that is more.",
        type=int,
        metavar="PIXELS",
    ),
    option(
        "--tta",
        "flip: average the vectors of the crop and its mirror image (twice the work).",
        type=click.Choice(TTA),
    ),
)
device_options = together(
    option("--device", "auto, cpu, cuda or cuda:N; a GPU asked for and absent is an error."),
    option(
        "--runtime",
        "What runs the networks: auto is $BATCHVERIFY_RUNTIME, else OpenVINO on a CPU, torch on a GPU and where "
        "OpenVINO is absent.",
        type=click.Choice(RUNTIMES),
    ),
    option(
        "--dtype",
        "What the backbone computes in: auto takes the fastest that this device has and the weights allow; int8 is "
        "OpenVINO's alone, float16 torch's.",
        type=click.Choice(DTYPES),
        former_name="--numbers",
    ),
)
cache_option = option(
    "--cache",
    "Folder or URI of the embedding cache. Default: $BATCHVERIFY_CACHE, else the user's cache folder.",
    metavar="URI",
)
overwrite_option = option(
    "--overwrite",
    "Start anew, where OUT holds rows of another job, too; without it they are refused.",
    is_flag=True,
)
no_cache_option = option("--no-cache", "Neither read nor write a cache.", is_flag=True)
run_options = together(
    option("--retry-failed", "Try images again whose failure is cached.", is_flag=True),
    device_options,
    option(
        "--batch-size",
        "Faces per forward pass. Default: 32 on a CPU, found by trying on a GPU.",
        type=int,
        metavar="N",
    ),
    option(
        "--engine",
        "Threads of this process, or Ray; auto takes Ray for a cluster and for many new images.",
        type=click.Choice(ENGINES),
    ),
    option("--address", "Ray cluster to run on: auto or HOST:PORT.", metavar="ADDR"),
    option("--num-cpus", "CPUs to use. Default: all that this process may use.", type=int, metavar="N"),
    option("--max-megapixels", "Larger images are not decoded.", type=float, metavar="X"),
    option("--max-megabytes", "Larger files are not read.", type=float, metavar="X"),
    option(
        "--max-failed",
        "Exit with 3 when a larger share of the rows could not be scored.",
        type=float,
        metavar="SHARE",
    ),
)
head_option = option("--head", "Head file. Default: the one shipped for these settings.", metavar="PATH")
threshold_options = together(
    head_option,
    option(
        "--threshold",
        "Label 1 (different) at or above this probability. Default: the head's, of best expected F1.",
        type=float,
        metavar="X",
    ),
    option("--at-far", "Take the head's threshold at this false accept rate.", type=float, metavar="X"),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable summary on stdout.")
talk_options = together(
    json_option,
    click.option("-q", "--quiet", is_flag=True, help="No progress, no summary."),
    click.option("-v", "--verbose", is_flag=True, help="More about what happens, Ray's own messages too."),
)
train_options = together(
    option("--test", "Manifest of pairs to measure the finished head on; they take no part.", metavar="TEST"),
    click.option(
        "--algorithm",
        "algorithms",
        multiple=True,
        metavar="NAME[:FEATURES]",
        help=f"{', '.join(ALGORITHMS)}; repeat for an ensemble.  [default: distance]",
    ),
    option(
        "--features",
        "Pair features of algorithms that name none, joined by +: concat, absdiff, sqdiff, product, chi2, chi2raw, "
        "cosine, euclidean, chi2sum. Default: chi2sum (distance), chi2 (logistic, weighted-chi2), absdiff (network).",
        metavar="NAMES",
    ),
    option(
        "--shrinkage",
        "Pull of a linear head towards equal weights, in pairs that weigh as much.",
        type=float,
        metavar="PAIRS",
    ),
    click.option(
        "--widths",
        default="-".join(str(each) for each in TrainOptions().widths),
        show_default=True,
        metavar="N-N-…",
        help="Neurons of a network's hidden layers.",
    ),
    option("--dropout", "Of a network's hidden layers.", type=float, metavar="SHARE"),
    option("--weight-decay", "Of a network.", type=float, metavar="X"),
    option("--epochs", "A network's most passes over the training pairs.", type=int, metavar="N"),
    option("--patience", "Epochs without a better dev result that end the training.", type=int, metavar="N"),
    option("--max-lr", "A network's highest rate. Default: found by a range test.", type=float, metavar="X"),
    option(
        "--batch-pairs", "Pairs a step. Default: a sixteenth of them, 16 to 1,024.", type=int, metavar="N"
    ),
    option("--monitor", "What makes an epoch the best, on dev.", type=click.Choice(MONITORS)),
    option("--snapshots", "The best so many epochs become an ensemble.", type=int, metavar="N"),
    option(
        "--folds",
        "Training pairs are scored out of so many folds, for calibration and thresholds; 0: dev alone. "
        "Default: 5, or 0 from 5,000 dev pairs.",
        type=int,
        metavar="N",
    ),
    option("--calibration", "How scores become probabilities.", type=click.Choice(CALIBRATIONS)),
    option(
        "--augment", "Learn from so many changed views of each training image, too.", type=int, metavar="N"
    ),
    option(
        "--tune",
        "Search for the best settings on dev, with Ray Tune, in so many trials.",
        type=int,
        metavar="N",
    ),
    option("--seed", "Of everything random."),
    option("--repeats", "Train so often, each with the next seed; the first is kept.", type=int, metavar="N"),
    option(
        "--strict-identities",
        "Refuse sets that share people (columns person_a, person_b) or identical images.",
        is_flag=True,
    ),
    option("--tensorboard", "Folder for TensorBoard's event files.", metavar="DIR"),
)
output_folder = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the manifests.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Of the random draws.")
