"""`MODEL_CARD.md` beside the checkpoints of a training: what the network is, what it saw, how good it is.

Written at the end of every training, from what `report.read_run` reads.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sscl_jax import compare, report

CARD = """# {dataset}: {method}, {labelled} labelled patients

A U-Net ({rank}-D, widths {widths}) that segments {classes}. {verdict}

For research; not a medical device.

## Use

```sh
python -m sscl_jax.predict --checkpoint={workdir} --input=SCANS --output=MASKS
```

Input: {modality}, {channels} channel(s). Preprocessing is in the checkpoint and done by the command: orientation
{orientation}, voxels resampled to {spacing} mm (slices, rows, columns; None: as they are), {intensity}.
Masks hold the values {values}.

## Trained on

{roles}

Data set `{dataset}`, fingerprint `{fingerprint}`. The patients by name are in `report.html`. Method `{method}`,
{steps} steps, seed {seed}; the config is in `config.json`.

## Measured

{measured}

## Not known

How it does on another scanner, protocol, age group or disease than those of the patients above; how far another seed or
other labelled patients would move these figures. Measure it on labelled scans of your own before you use it.

## Made with

{versions}; {hardware}; {minutes:.0f} minutes of training.
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
    roles = [[role, len(parts[role]["patients"]), parts[role]["cases"], parts[role]["slices"]] for role in report.ROLES]
    text = CARD.format(
        dataset=facts["dataset"],
        method=config["method"],
        labelled=config["data"]["labeled_patients"],
        rank=len(config["data"]["patch_size"]),
        widths=", ".join(map(str, config["model"]["widths"])),
        classes=", ".join(recipe["class_names"][1:]),
        verdict=report.verdict(run),
        workdir=workdir,
        modality=recipe["intensity"].upper(),
        channels=facts["channels"],
        orientation=recipe["orientation"],
        spacing=" x ".join(map(str, recipe["spacing"])),
        intensity=scaling[recipe["intensity"]],
        values=", ".join(
            f"{value} ({name})" for value, name in zip(recipe["label_values"], recipe["class_names"], strict=True)
        ),
        roles=_table(["part", "patients", "cases", "slices"], roles),
        fingerprint=facts["fingerprint"],
        steps=config["steps"],
        seed=config["seed"],
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
        dice, distance = compare.counted(rows, "dice", 1), compare.counted(rows, "hd95_mm", 1)
        for name, values in dice.items():
            cells = [f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}", f"{np.mean(distance[name]):.1f}"]
            lines.append([network, name, *cells, len(values)])
    note = "By case on the scan's own grid, mean ± standard deviation over the n cases that hold the class."
    return f"On {split}:\n\n{_table(['network', 'class', 'Dice %', 'HD95 mm', 'n'], lines)}\n\n{note}"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
