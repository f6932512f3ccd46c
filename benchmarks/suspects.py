"""How well `evaluate --suspects` finds wrong labels: `python benchmarks/suspects.py --lfw MANIFEST --fiw MANIFEST`.

Two tables. View 1 test (`--lfw`): the ranks of six pairs labelled same that show two people. Labelled pairs of
another set (`--fiw`): a share of the labels is turned round, and so many suspects are asked for as were turned round;
printed is the share of these that were. Four ways: with `person_a` and `person_b`, without them, without the vectors
of the images either (`--no-images`), and by the normalised margin of confident learning alone.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results import publish, table

import batchverify
from batchverify.evaluation.confident_learning import ConfidentLearning

BACKBONES = ("vggface2", "compact", "vggface2+compact")
# Pairs of View 1 test labelled same that show two people, as we judge by eye. Looked at were the 14 pairs labelled
# same that vggface2, and the 14 that compact, finds least alike.
TWO_PEOPLE = (
    ("Cristina_Fernandez_0001.jpg", "Cristina_Fernandez_0002.jpg"),
    ("Elisabeth_Schumacher_0001.jpg", "Elisabeth_Schumacher_0002.jpg"),
    ("Janica_Kostelic_0001.jpg", "Janica_Kostelic_0002.jpg"),
    ("Denise_Johnson_0001.jpg", "Denise_Johnson_0002.jpg"),
    ("Flor_Montulo_0001.jpg", "Flor_Montulo_0002.jpg"),
    ("Surakait_Sathirathai_0001.jpg", "Surakait_Sathirathai_0002.jpg"),
)
NOTE = (
    "The six show two people, as we judge by eye: of the first three we are certain, of the others nearly so. Looked "
    "at were the 14 pairs labelled same that vggface2, and the 14 that compact, finds least alike. One that compact "
    "calls two people shows one, behind a racket (Amelie_Mauresmo). Names are not turned round with the labels: with "
    "names, each such label contradicts its own row. With a reference, 'nor vectors' has the scores of both runs."
)
ASKED = 15
PEOPLE = ("person_a", "person_b")
WAYS = ("with names", "without names", "nor vectors", "scores alone")


def suspects(scores: Path, most: int, *, images: bool = True, second: Path | None = None) -> pa.Table:
    """The suspects of a score table, as `--suspects` writes them.

    images: whether these may be looked up. second: the reference run, whose labels are not looked at.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "suspects.parquet"
        options: Any = {"draws": 0, "suspects": (most, str(target)), "no_images": not images}
        found = batchverify.evaluate(scores, None, second, threshold=0.5, **options)
        told = found.document["suspects"]
        if images and told["vectors"] is None:
            click.echo(f"{scores}: by the scores alone: {told['without_vectors']}", err=True)
        return pq.read_table(target)


def two_people_row(backbone: str, scores: Path, second: Path | None = None) -> list[str]:
    """The rank of each pair of two people in View 1 test, and how many are among the first."""
    found = suspects(scores, ASKED, second=second)
    pairs = list(zip(*(map(file_name, found[side].to_pylist()) for side in ("image_a", "image_b")), strict=True))
    ranks = [pairs.index(pair) + 1 if pair in pairs else None for pair in TWO_PEOPLE]
    shown = [str(rank) if rank else "–" for rank in ranks]
    return [backbone, *shown, f"{sum(rank is not None for rank in ranks)} of {len(TWO_PEOPLE)}"]


def file_name(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2]


def flipped(scores: Path, target: Path, share: float, seed: int, *, names: bool) -> np.ndarray:
    """Write a score table with a share of the scored labels turned round, and return their rows."""
    whole = pq.read_table(scores)
    truth = whole["true_label"].to_numpy().copy()
    scored = np.flatnonzero(~np.isnan(whole["probability"].to_numpy()))
    rows = np.random.default_rng(seed).choice(scored, round(share * len(scored)), replace=False)
    truth[rows] = 1 - truth[rows]
    place = whole.column_names.index("true_label")
    changed = whole.set_column(place, "true_label", pa.array(truth))
    kept = [name for name in changed.column_names if names or name not in PEOPLE]
    # With the run record, which names the cache of the vectors.
    stored = {key: value for key, value in pq.read_metadata(scores).metadata.items() if key != b"ARROW:schema"}
    pq.write_table(changed.select(kept).replace_schema_metadata(stored), target)
    return rows


def by_scores(scores: Path, most: int) -> np.ndarray:
    """The rows that confident learning alone ranks first."""
    columns = pq.read_table(scores, columns=["true_label", "probability"])
    labels, probability = (column.to_numpy() for column in columns)
    rows = np.flatnonzero(~np.isnan(probability))
    margin = ConfidentLearning.of(probability[rows], labels[rows]).margin
    return rows[np.argsort(margin, kind="stable")[:most]]


def flipped_row(
    backbone: str, scores: Path, folder: Path, share: float, seed: int, second: Path | None = None
) -> list[str]:
    """Precision at the number flipped, each way."""
    cells = []
    for way in WAYS:
        target = folder / "flipped.parquet"
        wrong = flipped(scores, target, share, seed, names=way == WAYS[0])
        if way == WAYS[-1]:
            found = by_scores(target, len(wrong))
        else:
            found = suspects(target, len(wrong), images=way != WAYS[2], second=second)["row"].to_numpy() - 1
        cells.append(f"{np.isin(found, wrong).sum() / len(wrong):.3f}")
    return [backbone, str(seed), str(len(wrong)), *cells]


def scored(manifest: Path, backbone: str, target: Path, options: dict[str, Any]) -> Path:
    """The manifest's pairs, scored."""
    batchverify.score(manifest, target, backbone=backbone, quiet=True, **options)
    return target


@click.command(help=__doc__)
@click.option("--lfw", type=click.Path(exists=True, path_type=Path), required=True, help="View 1 test.")
@click.option("--fiw", type=click.Path(exists=True, path_type=Path), required=True, help="Labelled pairs.")
@click.option("--backbone", "backbones", multiple=True, default=BACKBONES, show_default=True)
@click.option("--share", default=0.02, show_default=True, help="Of the labels that are turned round.")
@click.option("--seeds", default=3, show_default=True, help="Draws of these.")
@click.option("--cache", help="Embedding cache.")
@click.option("--record", is_flag=True, help="Put the tables into RESULTS.md.")
def main(
    lfw: Path,
    fiw: Path,
    backbones: tuple[str, ...],
    share: float,
    seeds: int,
    cache: str | None,
    record: bool,
) -> None:
    """Print the tables."""
    options = {"cache": cache} if cache else {}
    ranks, turned = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, backbone in enumerate(backbones):
            ranks.append(two_people_row(backbone, scored(lfw, backbone, folder / f"lfw{number}.parquet", options)))
            scores = scored(fiw, backbone, folder / f"fiw{number}.parquet", options)
            turned += [flipped_row(backbone, scores, folder, share, seed) for seed in range(seeds)]
        if len(backbones) > 1:
            # The first backbone, with the second one's run as the reference.
            both = f"{backbones[0]}, reference {backbones[1]}"
            ranks.append(two_people_row(both, folder / "lfw0.parquet", folder / "lfw1.parquet"))
            runs = folder / "fiw0.parquet", folder, share
            turned += [flipped_row(both, *runs, seed, folder / "fiw1.parquet") for seed in range(seeds)]
    names = [pair[0].rpartition("_")[0] for pair in TWO_PEOPLE]
    header = ["backbone", *names, f"among the first {ASKED}"]
    body = f"Ranks in View 1 test:\n\n{table(header, ranks)}\n\n"
    body += f"Precision at the number of labels turned round, {share:.0%} of them:\n\n"
    body += f"{table(['backbone', 'seed', 'turned round', *WAYS], turned)}\n\n{NOTE}"
    command = "python benchmarks/suspects.py --lfw MANIFEST --fiw MANIFEST"
    publish("Suspect labels", command, body, record=record)


if __name__ == "__main__":
    main()
