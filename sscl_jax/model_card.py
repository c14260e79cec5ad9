"""`MODEL_CARD.md` beside the checkpoints of a training: what the network is, what it saw, how good it is.

Written at the end of every training, from what `report.read_run` reads.
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sscl_jax import compare, report

CARD = """# {dataset}: {method}, {labelled} labelled patients

A U-Net ({rank}-D, widths {widths}) that segments {classes}; of student and teacher, `predict` takes the teacher.
{verdict}

For research; not a medical device.

## Use

```sh
python -m sscl_jax.predict --checkpoint={workdir} --input=SCANS --output=MASKS
```

Input: {modality}, {channels} channel(s). Preprocessing is in the checkpoint and done by the command: orientation
{orientation}; voxel sizes of slices, rows and columns {spacing}; {intensity}.
{largest}Masks hold the values {values}.

## Patients

{roles}

Data set `{dataset}`, fingerprint `{fingerprint}`. The patients by name are in `report.html`. Method `{method}`,
{steps} steps, seed {seed}, measured at step {step}; the config is in `config.json`.

## Measured

{measured}

## Not known

How it does on another scanner, protocol, age group or disease than those of the patients above; how far another seed or
other labelled patients would move these figures. Measure it on labelled scans of your own before you use it.

## Made with

{versions}; {hardware}; {minutes:.1f} minutes of training.
"""


def write_card(workdir: Path) -> Path:
    """Writes `MODEL_CARD.md` into the folder of a training that has ended, and returns its path."""
    run = report.read_run(workdir)
    config, facts, recipe = run.config, run.run, run.run["recipe"]
    scaling = {
        "mr": f"intensities clipped to percentiles {recipe['percentiles']} of the body, then standardised",
        "ct": f"intensities clipped to {recipe['window']} HU, then scaled to [-1, 1]",
    }
    parts = facts["roles"]
    names = {role: role for role in report.ROLES}
    if not report.uses_unlabeled(run):
        names["unlabelled"] += ", not used by this method"
    roles = [[n, len(parts[r]["patients"]), parts[r]["cases"], parts[r]["slices"]] for r, n in names.items()]
    text = CARD.format(
        dataset=facts["dataset"],
        method=config["method"],
        labelled=len(parts["labelled"]["patients"]),
        rank=len(config["data"]["patch_size"]),
        widths=", ".join(map(str, config["model"]["widths"])),
        classes=", ".join(recipe["class_names"][1:]),
        verdict=report.verdict(run),
        workdir=shlex.quote(str(workdir)),
        modality=recipe["intensity"].upper(),
        channels=facts["channels"],
        orientation=recipe["orientation"],
        spacing=", ".join("as they are" if size is None else f"{size} mm" for size in recipe["spacing"]),
        intensity=scaling[recipe["intensity"]],
        values=", ".join(
            f"{value} ({name})" for value, name in zip(recipe["label_values"], recipe["class_names"], strict=True)
        ),
        largest={
            "none": "",
            "class": "Only the largest part of each class is kept. ",
            "foreground": "Only the largest part of the foreground, and of each class in it, is kept. ",
        }[config["eval"]["largest_component"]],
        roles=_table(["part", "patients", "cases", "slices"], roles),
        fingerprint=facts["fingerprint"],
        steps=config["steps"],
        seed=config["seed"],
        step=facts["checkpoint"],
        measured="\n\n".join(_results(split, tables) for split, tables in run.cases.items())
        or "Nothing: no val cases.",
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        hardware=facts["hardware"],
        minutes=facts["seconds"] / 60,
    )
    path = workdir / "MODEL_CARD.md"
    path.write_text(text, encoding="utf-8")
    return path


def _results(split: str, tables: dict[str, compare.Rows]) -> str:
    lines = []
    for network, rows in tables.items():
        dice, distance = compare.counted(rows, "dice", "label"), compare.counted(rows, "hd95_mm", "label")
        for name in dict.fromkeys(key.label for key in rows):
            values = dice.get(name, [])
            cells = ["n/a", "n/a"]
            if values:
                cells = [f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}", f"{np.mean(distance[name]):.1f}"]
            lines.append([network, name, *cells, len(values), compare.flagged(rows, name)])
    table = _table(["network", "class", "Dice %", "HD95 mm", "n", "flagged"], lines)
    return f"On {split}:\n\n{table}\n\n{report.NOTE}"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
