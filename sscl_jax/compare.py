"""Puts trainings side by side, by patient.

    python -m sscl_jax.compare runs/acdc_supervised runs/acdc [--split=val] [--network=teacher]

The first is the one that the others are compared with, in paired differences over the same patients.
"""

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from sscl_jax import cli

METRICS = ("dice", "jaccard", "hd95_mm", "assd_mm")


class Key(NamedTuple):
    """What a row of a case table is about."""

    patient: str
    case: str
    label: str  # name of the class


Rows = dict[Key, dict[str, float]]  # values are NaN where the class does not count in the case


def read_cases(workdir: Path, split: str, network: str) -> Rows:
    """The rows of a training's case table, with `METRICS` and `flagged`.

    Raises:
      FileNotFoundError: the training has no such table.
      ValueError: the table is not one of ours.
    """
    path = workdir / f"{split}_cases.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; let the training end, or choose another --split.")
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


def paired(a: Rows, b: Rows) -> tuple[float, float, int, float]:
    """Difference b - a of the mean Dice of each patient: mean, standard deviation, n, Wilcoxon signed-rank p.

    Volumes of one patient are alike: taken for independent ones they would make p too small. So a patient counts once,
    with the mean over its cases. Which classes count depends on the prediction too, so each case is compared over the
    classes that count in both; a patient without any is left out of n.

    Raises:
      ValueError: the two were not measured on the same cases and classes, or share none that counts.
    """
    if a.keys() != b.keys():
        raise ValueError("the trainings were not measured on the same cases: their splits differ.")
    patient_of = {key.case: key.patient for key in a}
    differences: Rows = {key: {"dice": b[key]["dice"] - row["dice"]} for key, row in a.items()}
    patients: dict[str, list[float]] = {}
    for case, mean in case_means(differences, "dice").items():
        patients.setdefault(patient_of[case], []).append(mean)
    if not patients:
        raise ValueError("the trainings have no case with a class that counts in both.")
    d = np.array([np.mean(values) for values in patients.values()])
    p = float(stats.wilcoxon(d).pvalue) if len(d) > 1 and np.any(d != 0) else math.nan
    return float(d.mean()), float(d.std()), len(d), p


def compare(workdirs: Sequence[Path], split: str, network: str) -> str:
    """The table as text."""
    runs = [read_cases(workdir, split, network) for workdir in workdirs]
    classes = list(dict.fromkeys(key.label for key in runs[0]))
    width = max(len(str(workdir)) for workdir in workdirs)
    header = ["Dice %", *classes, "HD95 mm", "difference to the first, by patient (Wilcoxon p)"]
    lines = [f"{split}, {network}", f"{'':{width}}  " + "  ".join(f"{h:>10}" for h in header)]
    for workdir, rows in zip(workdirs, runs, strict=True):
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        cells = [100 * class_mean(rows, "dice")]
        means = class_means(rows, "dice")
        cells += [100 * means.get(each, math.nan) for each in classes]
        cells.append(class_mean(rows, "hd95_mm"))
        text = "  ".join(f"{cell:{max(10, len(h))}.2f}" for cell, h in zip(cells, header, strict=False))
        if rows is not runs[0]:
            mean, std, n, p = paired(runs[0], rows)
            text += f"  {100 * mean:+.2f} ± {100 * std:.2f}, n = {n}, p = {p:.2g}"
        training = f"{config['method']}, {config['data']['labeled_patients']} labelled, {config['steps']} steps"
        lines.append(f"{str(workdir):{width}}  {text}   [{training}, seed {config['seed']}]")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.compare`."""
    parser = cli.make_parser("sscl_jax.compare", __doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, help="--workdir of two or more trainings that have ended")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="default: val")
    parser.add_argument("--network", default="teacher", choices=["teacher", "student"], help="default: teacher")
    args = cli.parse(parser, argv)
    try:
        print(compare(args.workdirs, args.split, args.network))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
