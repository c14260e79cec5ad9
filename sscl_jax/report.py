"""One HTML file that shows what a training did: no network, light and dark, printable.

    python -m sscl_jax.report --workdir=runs/acdc [--compare runs/acdc_supervised ...]

Written at the end of every training too. It reads what the training left in its folder: `run.json`, `config.json`,
`metrics.csv`, the case tables and the pictures.
"""

import base64
import csv
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from sscl_jax import cli, compare, config_fields
from sscl_jax.pictures import COLOURS, plain

# Panels of the curves: title, columns of metrics.csv.
CURVES = (
    ("loss", ("loss",)),
    ("val Dice", ("val_dice",)),
    ("val HD95, mm", ("val_hd95_mm",)),
    ("terms of the loss", ("sup_ce", "sup_dice", "pl_ce", "pl_dice", "cons")),
    ("contrast", ("con",)),
    ("queries that are contrasted, in a step", ("con_queries",)),
    ("share of pixels with a pseudo-label", ("pl_coverage",)),
    ("least soft Dice of a class, on the labels of a step", ("pl_competence",)),
    ("pseudo-labels of the foreground on val", ("val_pl_coverage", "val_pl_accuracy")),
    ("weights of the terms", ("weight_contrast", "weight_consistency", "weight_pseudo_label")),
    ("learning rate", ("learning_rate",)),
)
ROLES = ("labelled", "unlabelled", "val", "test")
NETWORKS = ("teacher", "student")
NOTE = (
    "Mean ± standard deviation over the n cases in which the class is in reference or prediction. Flagged: in one of "
    "them only, scored as Dice 0 and distance = image diagonal. On the scans' own grid."
)
WORST = 10  # cases listed; all others are a click away

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #31a354; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.3rem; line-height: 1.4; white-space: nowrap; } .card span { opacity: .75; }
.verdict { border-left: .3rem solid var(--good); padding: .2rem .8rem; background: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } td.text, th.text { text-align: left; white-space: normal; }
img { max-width: 100%; border-radius: .3rem; background: #fff; } figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; }
figcaption, .note { opacity: .8; font-size: .9rem; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Run(NamedTuple):
    """What a training left in its folder.

    Attributes:
      workdir: the folder.
      config: its config.
      run: what `train` wrote in `run.json`: data, roles, devices, versions, time, features.
      curves: rows of metrics.csv.
      cases: by split and network, rows of the case table.
    """

    workdir: Path
    config: dict[str, Any]
    run: dict[str, Any]
    curves: list[dict[str, str]]
    cases: dict[str, dict[str, compare.Rows]]


def read_run(workdir: Path) -> Run:
    """Reads the folder of a training, also one that has not ended.

    Raises:
      FileNotFoundError: it is none.
    """
    for name in ("config.json", "run.json"):
        if not (workdir / name).is_file():
            raise FileNotFoundError(f"{workdir} has no {name}: give the --workdir of a training.")
    config, run = (json.loads((workdir / n).read_text(encoding="utf-8")) for n in ("config.json", "run.json"))

    cases, curves = {}, []
    for split in ("val", "test"):
        if (workdir / f"{split}_cases.csv").is_file():
            cases[split] = {network: compare.read_cases(workdir, split, network) for network in NETWORKS}
    if (workdir / "metrics.csv").is_file():
        with open(workdir / "metrics.csv", newline="", encoding="utf-8") as file:
            curves = list(csv.DictReader(file))
    return Run(workdir, config, run, curves, cases)


def write_report(workdir: Path, others: Sequence[Path] = ()) -> Path:
    """Writes `report.html` into the folder of a training.

    Args:
      workdir: the training.
      others: trainings to compare it with.

    Returns:
      The file.

    Raises:
      FileNotFoundError, ValueError: a folder is no training, or the trainings cannot be compared.
    """
    run = read_run(workdir)
    name, method = run.run["dataset"], run.config["method"]
    parts = [f"<h1>{_text(name)}: {_text(method)}, labelled patients: {_labelled(run)}</h1>"]
    parts += _first_screen(run)
    parts += _comparison(run, [read_run(other) for other in others])
    for split in run.cases:
        parts += _results(run, split)
    parts += _curves(run)
    parts += _background(run)
    title = f"sscl_jax report: {name}, {method}"
    path = workdir / "report.html"
    path.write_text(PAGE.format(title=_text(title), style=STYLE, body="\n".join(parts)), encoding="utf-8")
    return path


# --- First screen ---------------------------------------------------------------------------------


def _first_screen(run: Run) -> list[str]:
    cards = []
    for role in ROLES:
        counts = run.run["roles"][role]
        note = ", not used by this method" if role == "unlabelled" and not uses_unlabeled(run) else ""
        cards.append((str(len(counts["patients"])), f"{role} patients ({counts['cases']} cases){note}"))
    for split, tables in run.cases.items():
        for network, rows in tables.items():
            spread = np.std(list(compare.case_means(rows, "dice").values()) or [math.nan])
            value = f"{100 * compare.class_mean(rows, 'dice'):.1f} % ± {100 * spread:.1f}"
            distance = compare.class_mean(rows, "hd95_mm")
            cards.append((value, f"Dice of the {network} on {split}; HD95 {distance:.1f} mm"))
    text = "".join(f'<div class="card"><b>{value}</b><span>{_text(name)}</span></div>' for value, name in cards)
    return [f'<p class="verdict">{_text(verdict(run))}</p>', f'<div class="cards">{text}</div>']


def uses_unlabeled(run: Run) -> bool:
    """Whether a term of the loss uses scans without labels."""
    return any(run.config[term]["weight"] for term in config_fields.UNLABELED_TERMS)


def _labelled(run: Run) -> int:
    return len(run.run["roles"]["labelled"]["patients"])


def verdict(run: Run) -> str:
    """What the figures say, in words."""
    if not run.cases:
        done = max((int(row["step"]) for row in run.curves), default=0)
        if done < run.config["steps"]:
            return f"Not measured yet: {done} of {run.config['steps']} steps are done."
        return "Not measured: there is no val case with a label. Nothing is known of how good this network is."
    split = "test" if "test" in run.cases else "val"
    rows = run.cases[split]["teacher"]
    by_case, by_class = compare.case_means(rows, "dice"), compare.class_means(rows, "dice")
    if not by_case:
        return f"No class is in any reference or prediction on {split}: there is nothing to measure."
    worst, weakest = min(by_case, key=lambda c: by_case[c]), min(by_class, key=lambda c: by_class[c])
    dice, distance = compare.class_mean(rows, "dice"), compare.class_mean(rows, "hd95_mm")
    missed = int(sum(row["flagged"] for row in rows.values()))
    sentences = [
        f"On {len(by_case)} {split} cases the teacher reaches a mean Dice of {100 * dice:.1f} % and an HD95 of "
        f"{distance:.1f} mm.",
        f"Weakest class: {weakest}, {100 * by_class[weakest]:.1f} %." if len(by_class) > 1 else "",
        f"Worst case: {worst}, {100 * by_case[worst]:.1f} %.",
        f"{missed} times a class was missed altogether, or found where there is none." if missed else "",
        "Val also chose the checkpoint, so expect a little less on new scans." if split == "val" else "",
        "This is one seed: the spread between trainings is not in these figures.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _comparison(run: Run, others: Sequence[Run]) -> list[str]:
    if not others:
        return []
    parts = ["<h2>Compared with other trainings</h2>"]
    for split, tables in run.cases.items():
        compare.check_same_masks({str(each.workdir): each.run for each in (run, *others)}, split)
        lines = []
        for other in (run, *others):
            if split not in other.cases:
                raise ValueError(f"{other.workdir} has no table of {split}: {compare.NO_TABLE[split]}.")
            rows = other.cases[split]["teacher"]
            cells: list[object] = [other.workdir, other.config["method"], _labelled(other)]
            cells += [other.config["seed"], f"{100 * compare.class_mean(rows, 'dice'):.2f}"]
            cells.append(f"{compare.class_mean(rows, 'hd95_mm'):.2f}")
            if other is not run:
                mean, std, n, p = compare.paired([rows], [tables["teacher"]])
                cells += [f"{100 * mean:+.2f} ± {100 * std:.2f}", n, f"{p:.2g}"]
            lines.append([str(cell) for cell in cells])
        header = ["training", "method", "labelled", "seed", "Dice %", "HD95 mm", "this one minus that one", "n", "p"]
        parts.append(f"<h3>{split}, teacher</h3>" + _table(header, lines))
    note = "Differences of the patients' mean Dice, mean ± standard deviation; p: Wilcoxon signed-rank test."
    return [*parts, f'<p class="note">{note}</p>']


# --- Results --------------------------------------------------------------------------------------


def _results(run: Run, split: str) -> list[str]:
    tables, shown = run.cases[split], run.config["eval"]["select"]
    # best_CASE.png and so on: the order in which they are shown, and the case
    found = [
        path for rank in ("best", "median", "worst") for path in run.workdir.glob(f"{split}_overlays/{rank}_*.png")
    ]
    pictures = {path.stem.split("_", 1)[1]: path for path in found}
    parts = [f"<h2>Results on {split}</h2>", _class_table(tables), _strip_plot(tables["teacher"], split)]
    if pictures:
        parts.append(f"<h2>Best, median and worst case on {split}, {shown}</h2>")
    for case, path in pictures.items():
        parts.append(f'<figure id="{split}-{_text(case)}">{_png(path, f"overlay of {case}")}</figure>')
    dice = compare.case_means(tables["teacher"], "dice")
    ranked = sorted(dice, key=lambda case: dice[case])
    parts += [f"<h2>Worst cases on {split}</h2>", _case_table(tables["teacher"], ranked[:WORST], split, pictures)]
    if len(ranked) > WORST:
        table = _case_table(tables["teacher"], ranked, split, pictures)
        parts.append(f"<details><summary>all {len(ranked)} cases</summary>{table}</details>")
    if (features := run.workdir / f"{split}_features.png").is_file():
        caption = f"Pixel features of the {shown}, coloured by reference class, on their first two principal axes. "
        caption += "; ".join(
            f"{network}: compactness {q['compactness']:.3f} (0 to 1), separability {q['separability']:.3f} (0 to 2)"
            for network, q in run.run.get("features", {}).get(split, {}).items()
        )
        picture = _png(features, "pixel features")
        parts += [
            f"<h2>Pixel features on {split}</h2>",
            f"<figure>{picture}<figcaption>{caption}</figcaption></figure>",
        ]
    return parts


def _class_table(tables: dict[str, compare.Rows]) -> str:
    lines = []
    for network, rows in tables.items():
        for name in dict.fromkeys(key.label for key in rows):
            cells = [f"{network}, {name}"]
            for metric, scale in zip(compare.METRICS, (100, 100, 1, 1), strict=True):
                values = scale * np.array(compare.counted(rows, metric, "label").get(name, []))
                cells.append(f"{values.mean():.2f} ± {values.std():.2f}" if values.size else "n/a")
            lines.append([*cells, str(values.size), str(compare.flagged(rows, name))])
    header = ["class", "Dice %", "Jaccard %", "HD95 mm", "ASSD mm", "n", "flagged"]
    return _table(header, lines) + f'<p class="note">{NOTE}</p>'


def _strip_plot(rows: compare.Rows, split: str) -> str:
    classes = list(dict.fromkeys(key.label for key in rows))
    values = compare.counted(rows, "dice", "label")
    figure = Figure(figsize=(7.5, 0.6 + 0.45 * len(classes)), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(classes):
        points = np.array(values.get(name, []))
        offsets = 0.28 * np.sin(2.4 * np.arange(points.size))  # not by chance: the same report every time
        axis.plot(points, place + offsets, "o", ms=4, alpha=0.65, color=COLOURS[place % len(COLOURS)])
        if points.size:
            axis.plot([np.median(points)] * 2, [place - 0.38, place + 0.38], color="#000000", lw=1.6)
    axis.set(yticks=range(len(classes)), yticklabels=[plain(name) for name in classes], xlim=(-0.02, 1.02))
    axis.set_xlabel(f"Dice by {split} case, teacher; bar: median")
    axis.invert_yaxis()
    return f"<figure>{_svg(figure)}</figure>"


def _case_table(rows: compare.Rows, cases: Sequence[str], split: str, pictures: dict[str, Path]) -> str:
    dice, distance = compare.case_means(rows, "dice"), compare.case_means(rows, "hd95_mm")
    lines = []
    for case in cases:
        detail = ", ".join(
            f"{key.label} {100 * row['dice']:.1f}{' (flagged)' if row['flagged'] else ''}"
            for key, row in rows.items()
            if key.case == case and not math.isnan(row["dice"])
        )
        link = f'<a href="#{split}-{_text(case)}">{_text(case)}</a>' if case in pictures else _text(case)
        lines.append([link, f"{100 * dice[case]:.1f}", f"{distance[case]:.1f}", _text(detail)])
    return _table(["case", "Dice %", "HD95 mm", "by class, Dice %"], lines, escape=False)


# --- Curves, and what was run ---------------------------------------------------------------------


def _curves(run: Run) -> list[str]:
    def series(column: str) -> tuple[list[int], list[float]]:
        pairs = [(int(row["step"]), float(row[column])) for row in run.curves if row.get(column)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    panels = []
    for title, columns in CURVES:
        lines = [(column, *series(column)) for column in columns]
        lines = [(column, x, y) for column, x, y in lines if any(y)]  # a term that is off stays 0
        if lines:
            panels.append((title, lines))
    if not panels:
        return []
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.ravel(), panels, strict=False):
        for place, (column, x, y) in enumerate(lines):
            marker = "o" if column.startswith("val_") else ""
            axis.plot(x, y, marker=marker, ms=3, lw=1.3, color=COLOURS[(place + 2) % len(COLOURS)], label=column)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    return ["<h2>Curves by step</h2>", f"<figure>{_svg(figure)}</figure>"]


def _background(run: Run) -> list[str]:
    facts = run.run
    patients = [[role, ", ".join(facts["roles"][role]["patients"]) or "none"] for role in ROLES]
    about = [
        ["data", f"{facts['dataset']}, fingerprint {facts['fingerprint'][:12]}"],
        ["hardware", facts["hardware"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())],
    ]
    if facts.get("seconds"):
        about.append(["training time", f"{facts['seconds'] / 60:.1f} min, {run.config['steps']} steps"])
        about.append(["peak memory", f"{facts['peak_memory_gib']:.2f} GiB"])
        about.append(["checkpoint measured", f"step {facts['checkpoint']}"])
    fields = [[name, json.dumps(value)] for name, value in config_fields.flat_config(ConfigDict(run.config)).items()]
    config = _table(["field", "value"], fields, text=True)
    return [
        "<h2>Patients</h2>",
        _table(["part", "patients"], patients, text=True),
        "<h2>What was run</h2>",
        _table(["", ""], about, text=True),
        "<h2>Config</h2>",
        f"<details><summary>{len(fields)} fields</summary>{config}</details>",
        '<p class="note">Made by sscl_jax. For research; not a medical device.</p>',
    ]


# --- HTML -----------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False, escape: bool = True) -> str:
    form = _text if escape else str
    style = ' class="text"' if text else ""
    head = "".join(f"<th{style}>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td{style}>{form(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _png(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{data}">'


def _svg(figure: Figure) -> str:
    """The figure as inline SVG whose black is the page's text colour, so that it suits light and dark."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sscl_jax", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.report`."""
    parser = cli.make_parser("sscl_jax.report", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the training")
    parser.add_argument("--compare", nargs="+", default=[], type=Path, metavar="RUN", help="trainings to set beside it")
    args = cli.parse(parser, argv)
    try:
        print(write_report(args.workdir, args.compare))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
