"""Puts trainings side by side, by patient.

    python -m sscl_jax.compare runs/acdc_supervised runs/acdc [--split=val] [--network=teacher]
    python -m sscl_jax.compare 'runs/supervised_seed?' 'runs/acdc_seed?'

The first is the one that the others are compared with, in paired differences over the same patients. A pattern, in
quotes, stands for repeats of one training, with other seeds or labelled patients: its figures are means over them, and
a patient's difference is the mean over the pairs of repeats with the same seeds; that of each pair is told in brackets.
"""

import csv
import glob
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from sscl_jax import cli, config_fields

METRICS = ("dice", "jaccard", "hd95_mm", "assd_mm")
# Fields in which repeats of one training differ.
REPEATS = ("seed", "data.labeled_seed")


class Key(NamedTuple):
    """What a row of a case table is about."""

    patient: str
    case: str
    label: str  # name of the class


# What to do where a training has no table of a split.
NO_TABLE = {
    "val": "let the training end",
    "test": "run the command of the training again, with --config.eval.test=True (it measures, and trains no more)",
}
Rows = dict[Key, dict[str, float]]  # values are NaN where the class does not count in the case


def read_cases(workdir: Path, split: str, network: str) -> Rows:
    """The rows of a training's case table, with `METRICS` and `flagged`.

    Raises:
      FileNotFoundError: the training has no such table.
      ValueError: the table is not one of ours.
    """
    path = workdir / f"{split}_cases.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; {NO_TABLE[split]}, or choose another --split.")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        needed = {"patient", "case", "class", "network", "counted", "flagged", *METRICS}
        if missing := needed.difference(reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; measure the training again.")
        return {
            Key(row["patient"], row["case"], row["class"]): {
                **{name: float(row[name]) if row["counted"] == "1" else math.nan for name in METRICS},
                "flagged": float(row["flagged"]),
            }
            for row in reader
            if row["network"] == network
        }


def counted(rows: Rows, name: str, by: str) -> dict[str, list[float]]:
    """Values of a metric that count, `by` "case" or "label", in the order of the table."""
    values: dict[str, list[float]] = {}
    for key, row in rows.items():
        if not math.isnan(row[name]):
            values.setdefault(getattr(key, by), []).append(row[name])
    return values


def flagged(rows: Rows, name: str) -> int:
    """In how many cases a class is flagged: missed altogether, or found where there is none."""
    return int(sum(row["flagged"] for key, row in rows.items() if key.label == name))


def case_means(rows: Rows, name: str) -> dict[str, float]:
    """Mean of each case over the classes that count in it; a case without any is left out."""
    return {case: float(np.mean(values)) for case, values in counted(rows, name, "case").items()}


def class_means(rows: Rows, name: str) -> dict[str, float]:
    """Mean of each class over the cases in which it counts; a class that counts in none is left out."""
    return {each: float(np.mean(values)) for each, values in counted(rows, name, "label").items()}


def class_mean(rows: Rows, name: str) -> float:
    """Mean over classes of `class_means`; NaN where there is none."""
    means = list(class_means(rows, name).values())
    return float(np.mean(means)) if means else math.nan


def differences(a: Rows, b: Rows) -> dict[str, float]:
    """Difference b - a of the mean Dice of each patient, from the same cases.

    Volumes of one patient are alike: taken for independent ones they would make p too small. So a patient counts once,
    with the mean over its cases. Which classes count depends on the prediction too, so each case is compared over the
    classes that count in both; a patient without any is left out.
    """
    patient_of = {key.case: key.patient for key in a}
    by_class: Rows = {key: {"dice": b[key]["dice"] - row["dice"]} for key, row in a.items()}
    patients: dict[str, list[float]] = {}
    for case, mean in case_means(by_class, "dice").items():
        patients.setdefault(patient_of[case], []).append(mean)
    return {patient: float(np.mean(values)) for patient, values in patients.items()}


def paired(before: Sequence[Rows], after: Sequence[Rows]) -> tuple[float, float, int, float]:
    """`differences` of each patient, the mean over repeats: mean, standard deviation, n, Wilcoxon signed-rank p.

    A patient who is left out of one repeat is left out of n.

    Raises:
      ValueError: the tables are not of the same cases and classes, or no patient is in all repeats.
    """
    if any(rows.keys() != before[0].keys() for rows in (*before, *after)):
        raise ValueError("the trainings were not measured on the same cases: their splits differ.")
    found = [differences(a, b) for a, b in zip(before, after, strict=True)]
    patients = [patient for patient in found[0] if all(patient in each for each in found)]
    if not patients:
        raise ValueError("the trainings have no case with a class that counts in all of them.")
    d = np.array([np.mean([each[patient] for each in found]) for patient in patients])
    p = float(stats.wilcoxon(d).pvalue) if len(d) > 1 and np.any(d != 0) else math.nan
    return float(d.mean()), float(d.std()), len(d), p


def check_same_masks(facts: dict[str, dict[str, Any]], split: str) -> None:
    """Refuses trainings that were measured against other masks, by what their run.json say.

    Raises:
      ValueError: names two of them.
    """
    told = {name: fact.get("measured_on", {}).get(split) for name, fact in facts.items()}
    known = {name: digest for name, digest in told.items() if digest}  # older trainings tell nothing
    if other := next((name for name in known if known[name] != known[next(iter(known))]), None):
        raise ValueError(
            f"{next(iter(known))} and {other} were measured on other masks of {split}: they are of other data, or a "
            "mask was changed in between. Measure both on the same masks: run the command of the older again, or train "
            "it anew in another --workdir."
        )


class Repeats(NamedTuple):
    """Trainings that differ in `REPEATS` alone, in the order of these; one training is a repeat of itself."""

    folders: list[Path]
    seeds: list[tuple[int, int]]  # `REPEATS` of each
    kind: str


def find_repeats(training: str | Path) -> Repeats:
    """The folder of a training, or those that a pattern stands for.

    Raises:
      FileNotFoundError: there is no such folder, or one has no config.json.
      ValueError: they differ in other fields, or two do not differ at all.
    """
    folders = [Path(training)]
    if not folders[0].is_dir():
        folders = [path for path in map(Path, glob.glob(str(training))) if path.is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{training}: no folder has this name or fits this pattern; give --workdir of trainings."
        )
    configs: dict[tuple[int, int], tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; give --workdir of trainings.")
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = config_fields.flat_config(ConfigDict(json.loads(text)))
        seeds = (config["seed"], config["data.labeled_seed"])
        taken, _ = configs.setdefault(seeds, (folder, config))
        if taken != folder:
            raise ValueError(f"{training}: {taken} and {folder} have the same seeds, {seeds}; name one of them.")
    (first, config), *others = (configs[seeds] for seeds in sorted(configs))
    for folder, other in others:
        if differ := config_fields.differing_fields(config, other, (*REPEATS, *config_fields.IDLE_FIELDS)):
            raise ValueError(
                f"{training}: {first} and {folder} differ in {', '.join(differ)}; name repeats of one training."
            )
    labelled = "all" if config["data.labeled_patients"] < 0 else config["data.labeled_patients"]
    kind = f"{config['method']}, {labelled} labelled, {config['steps']} steps"
    return Repeats([configs[seeds][0] for seeds in sorted(configs)], sorted(configs), kind)


def compare(trainings: Sequence[str | Path], split: str, network: str) -> str:
    """The table as text.

    Args:
      trainings: the --workdir of each, or a pattern for its repeats.

    Raises:
      FileNotFoundError, ValueError: as `find_repeats`, `read_cases`, `paired`; or the seeds are not those of the first.
    """
    found = [find_repeats(training) for training in trainings]
    runs = [[read_cases(folder, split, network) for folder in repeats.folders] for repeats in found]
    facts = [folder / "run.json" for repeats in found for folder in repeats.folders]
    check_same_masks({str(f.parent): json.loads(f.read_text(encoding="utf-8")) for f in facts if f.is_file()}, split)
    classes = list(dict.fromkeys(key.label for key in runs[0][0]))
    width = max(len(str(training)) for training in trainings)
    header = ["Dice %", *classes, "HD95 mm", "difference to the first, by patient (Wilcoxon p)"]
    lines = [f"{split}, {network}", f"{'':{width}}  " + "  ".join(f"{h:>10}" for h in header)]
    for training, repeats, tables in zip(trainings, found, runs, strict=True):
        means = [class_means(rows, "dice") for rows in tables]
        cells = [100 * np.mean([class_mean(rows, "dice") for rows in tables])]
        cells += [100 * np.mean([mean.get(each, math.nan) for mean in means]) for each in classes]
        cells.append(np.mean([class_mean(rows, "hd95_mm") for rows in tables]))
        text = "  ".join(f"{cell:{max(10, len(h))}.2f}" for cell, h in zip(cells, header, strict=False))
        if tables is not runs[0]:
            if len(tables) != len(runs[0]) or (len(tables) > 1 and repeats.seeds != found[0].seeds):
                raise ValueError(
                    f"{' and '.join(REPEATS)} are {repeats.seeds} in {training} and {found[0].seeds} in "
                    f"{trainings[0]}: name as many repeats of each, with the same seeds."
                )
            mean, std, n, p = paired(runs[0], tables)
            text += f"  {100 * mean:+.2f} ± {100 * std:.2f}, n = {n}, p = {p:.2g}"
            if len(tables) > 1:
                each = (np.mean(list(differences(a, b).values())) for a, b in zip(runs[0], tables, strict=True))
                text += f" ({', '.join(f'{100 * gain:+.2f}' for gain in each)})"
        seeds = ", ".join(str(seed) for seed, _ in repeats.seeds)
        lines.append(f"{training!s:{width}}  {text}   [{repeats.kind}, seed {seeds}]")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.compare`."""
    parser = cli.make_parser("sscl_jax.compare", __doc__)
    parser.add_argument(
        "trainings",
        nargs="+",
        help="--workdir of two or more trainings that have ended, or a pattern for repeats of one",
    )
    parser.add_argument("--split", default="val", choices=["val", "test"], help="default: val")
    parser.add_argument("--network", default="teacher", choices=["teacher", "student"], help="default: teacher")
    args = cli.parse(parser, argv)
    try:
        print(compare(args.trainings, args.split, args.network))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
