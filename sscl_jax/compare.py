"""Puts trainings side by side, by case.

    python -m sscl_jax.compare runs/acdc_supervised runs/acdc [--split=val] [--network=teacher]

The first is the one that the others are compared with, in paired differences over the same cases.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats


def read_cases(workdir: Path, split: str, network: str) -> dict[tuple[str, str], dict[str, float]]:
    """The counted rows of a training's case table: (case, class) to `dice` and `hd95_mm`.

    Raises:
      FileNotFoundError: the training has no such table.
    """
    path = workdir / f"{split}_cases.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; let the training end, or choose another --split.")
    with open(path, newline="", encoding="utf-8") as file:
        return {
            (row["case"], row["class"]): {name: float(row[name]) for name in ("dice", "hd95_mm")}
            for row in csv.DictReader(file)
            if row["network"] == network and row["counted"] == "1"
        }


def class_mean(rows: dict[tuple[str, str], dict[str, float]], name: str) -> float:
    """Mean over classes of the mean over the class's cases."""
    classes = sorted({c for _, c in rows})
    return float(np.mean([np.mean([row[name] for (_, c), row in rows.items() if c == each]) for each in classes]))


def paired(a: dict, b: dict) -> tuple[float, float, int, float]:
    """Difference b - a of the mean Dice of each case: mean, standard deviation, n, Wilcoxon signed-rank p.

    Raises:
      ValueError: the two were not measured on the same cases.
    """
    # Which classes count depends on the prediction too, so compare where both count.
    cases = sorted({case for case, _ in a})
    if cases != sorted({case for case, _ in b}):
        raise ValueError("the trainings were not measured on the same cases: their splits differ.")
    differences = []
    for case in cases:
        shared = [key for key in a if key[0] == case and key in b]
        differences.append(np.mean([b[key]["dice"] - a[key]["dice"] for key in shared]))
    d = np.array(differences)
    p = float(stats.wilcoxon(d).pvalue) if len(d) > 1 and np.any(d != 0) else math.nan
    return float(d.mean()), float(d.std()), len(d), p


def compare(workdirs: Sequence[Path], split: str, network: str) -> str:
    """The table as text."""
    runs = [read_cases(workdir, split, network) for workdir in workdirs]
    classes = list(dict.fromkeys(c for _, c in runs[0]))
    width = max(len(str(workdir)) for workdir in workdirs)
    header = ["Dice %", *classes, "HD95 mm", "difference to the first, by case (Wilcoxon p)"]
    lines = [f"{split}, {network}", f"{'':{width}}  " + "  ".join(f"{h:>10}" for h in header)]
    for workdir, rows in zip(workdirs, runs, strict=True):
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        cells = [100 * class_mean(rows, "dice")]
        cells += [100 * float(np.mean([row["dice"] for (_, c), row in rows.items() if c == each])) for each in classes]
        cells.append(class_mean(rows, "hd95_mm"))
        text = "  ".join(f"{cell:{max(10, len(h))}.2f}" for cell, h in zip(cells, header, strict=False))
        if rows is not runs[0]:
            mean, std, n, p = paired(runs[0], rows)
            text += f"  {100 * mean:+.2f} ± {100 * std:.2f}, n = {n}, p = {p:.2g}"
        labeled = config["data"]["labeled_patients"]
        lines.append(
            f"{str(workdir):{width}}  {text}   [{config['method']}, {labeled} labelled, seed {config['seed']}]"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.compare`."""
    parser = argparse.ArgumentParser(prog="sscl_jax.compare", description="Puts trainings side by side.")
    parser.add_argument("workdirs", nargs="+", type=Path, help="--workdir of two or more trainings that have ended")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="default: val")
    parser.add_argument("--network", default="teacher", choices=["teacher", "student"], help="default: teacher")
    args = parser.parse_args(argv)
    try:
        print(compare(args.workdirs, args.split, args.network))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
