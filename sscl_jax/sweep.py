r"""Trains a grid of configs, and makes one table of them.

    python -m sscl_jax.sweep --config=configs/acdc.py --output=runs/sweep --set data.path=data/acdc \
        --grid method=supervised,anatomical_pl --grid seed=0,1,2 --grid data.labeled_seed=-1,0 \
        --vary contrast.temperature=0.07,0.5 --vary contrast.level=0,2

--grid fields are crossed with one another; each value of --vary is one more config, in which that field alone differs,
crossed with the grid. Here: 2 x 3 x 2 x (1 + 4) trainings. Each is the command line of `sscl_jax.main` in a folder of
its own; one that has ended is not run again, so the same command goes on with a sweep that was stopped. All are
checked before the first. After each, OUTPUT/results.csv has a row more, and OUTPUT/results.md the means over seeds
and labelled patients.

The figures are of val, by which to choose. With --split=test each training measures test too, and the table is of that.
"""

import argparse
import concurrent.futures
import csv
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sscl_jax import cli, compare, config_fields, report, train
from sscl_jax import main as training
from sscl_jax.data.sampling import identity

Fields = dict[str, str]  # config field -> value, as on the command line

# Fields that say what is to be learnt from: trainings that differ in one of them are not compared.
TASK = (*compare.REPEATS, "data.labeled_patients", "data.labeled_fraction", "data.path")


def read_option(text: str) -> tuple[str, list[str]]:
    """`contrast.level=0,1` to ("contrast.level", ["0", "1"]); commas in brackets do not separate.

    Raises:
      argparse.ArgumentTypeError: there is no `=`, nothing behind it, a value is empty, or brackets do not match.
    """
    name, _, values = text.partition("=")
    parts = re.split(r",(?![^(\[]*[)\]])", values)
    if not name or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write FIELD=VALUE or FIELD=VALUE,VALUE")
    if any(part.count(left) != part.count(right) for part in parts for left, right in ("()", "[]")):
        raise argparse.ArgumentTypeError(f"{text!r}: brackets do not match, or are nested")
    return name, parts


def plan_runs(grid: Sequence[tuple[str, list[str]]], vary: Sequence[tuple[str, list[str]]]) -> list[Fields]:
    """The trainings of a sweep, by the fields in which they differ: the base first, then what varies.

    Raises:
      ValueError: a field, a value or a training is given twice, or two trainings would have one folder.
    """
    names = [name for name, _ in (*grid, *vary)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--grid and --vary: {', '.join(sorted(repeated))} given twice; list its values once.")
    pairs = ([(name, value) for value in values] for name, values in grid)
    crossed = [dict(fields) for fields in itertools.product(*pairs)]
    changes: list[Fields] = [{}, *({name: value} for name, values in vary for value in values)]
    runs = [base | change for change in changes for base in crossed]
    folders = [folder_name(fields) for fields in runs]
    if repeated := {name for name in folders if folders.count(name) > 1}:
        raise ValueError(f"two trainings would be {', '.join(sorted(repeated))}: list each value once.")
    return runs


def folder_name(fields: Fields) -> str:
    """A folder for a training: its fields, in letters that every file system takes."""
    text = ",".join(f"{name}={value}" for name, value in fields.items()) or "base"
    return re.sub(r"[^\w.,=+-]", "_", text)


def options_of(config: str, fields: Fields) -> list[str]:
    """What `sscl_jax.main` is told to train `config` with `fields` changed."""
    method = f":{fields['method']}" if "method" in fields else ""
    options = [f"--config.{name}={value}" for name, value in fields.items() if name != "method"]
    return [f"--config={config}{method}", *options]


def check_run(workdir: Path, options: list[str], split: str) -> None:
    """Refuses what no training could start from, and a folder with the figures of another training than this one.

    Raises:
      ValueError, OSError: as `train.open_data`; or there is nothing to measure in `split`; or lists the fields that
        differ; or the folder cannot be read.
      SystemExit: there is no such config, method or field; says which.
    """
    config, dataset, roles = train.open_data(training.read_config(options))
    if not getattr(roles, split):
        raise ValueError(f"{dataset.name} has no {split} case with a label: there would be nothing to compare.")
    if not (workdir / "report.html").is_file():
        return
    try:
        left = report.read_run(workdir)
        meta = {"fingerprint": left.run["fingerprint"], **left.run, "config": left.config}
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{workdir} cannot be read ({error}): delete it, or choose another --output.") from error
    data = identity(dataset, roles)
    config_fields.check_same_training(config, meta, data, workdir, config_fields.IDLE_FIELDS, "--output")


def has_ended(workdir: Path, split: str) -> bool:
    """Whether a training has ended and measured `split`; run again, one that did not measure test does only that."""
    if not (workdir / "report.html").is_file():
        return False
    return split in json.loads((workdir / "run.json").read_text(encoding="utf-8")).get("features", {})


def read_run(workdir: Path, split: str) -> dict[str, str | float]:
    """What a training that `has_ended` came to, the teacher: Dice in %, HD95 in mm, time in minutes.

    How many pseudo-labels are right is known of val alone.
    """
    facts = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    rows = compare.read_cases(workdir, split, "teacher")
    cases = list(compare.case_means(rows, "dice").values())
    result: dict[str, str | float] = {
        "revision": facts["revision"],
        "labelled": " ".join(facts["roles"]["labelled"]["patients"]),
        "minutes": facts["seconds"] / 60,
        "dice": 100 * compare.class_mean(rows, "dice"),
        "dice_sd_of_cases": 100 * float(np.std(cases)),
        "hd95_mm": compare.class_mean(rows, "hd95_mm"),
        **facts["features"][split]["teacher"],
    }
    result |= {f"dice_{name}": 100 * mean for name, mean in compare.class_means(rows, "dice").items()}
    if split == "val":
        with open(workdir / "metrics.csv", newline="", encoding="utf-8") as file:
            accuracies = [row["val_pl_accuracy"] for row in csv.DictReader(file) if row.get("val_pl_accuracy")]
        if accuracies:
            result["pseudo_label_accuracy"] = 100 * float(accuracies[-1])
    return result


def write_results(output: Path, runs: Sequence[Fields], split: str) -> str:
    """Writes results.csv and results.md of the trainings that have ended, on `split`; returns the second."""
    ended = [fields for fields in runs if has_ended(output / folder_name(fields), split)]
    rows = [{**fields, **read_run(output / folder_name(fields), split)} for fields in ended]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()} for row in rows)
    table = format_results(rows, split, runs)
    (output / "results.md").write_text(table, encoding="utf-8")
    return table


def format_results(rows: Sequence[dict], split: str, runs: Sequence[Fields]) -> str:
    """A Markdown table, one line for each config: mean ± standard deviation over its repeats, where it has some.

    The gain is over the first of the planned `runs` on the same task, that is with equal `TASK` fields, run by run;
    where that one has not ended there is none, which is told.
    """
    columns = ("dice", "hd95_mm", "compactness", "separability", "pseudo_label_accuracy", "minutes")
    measured = {"revision", "labelled", *columns}
    groups: dict[str, list[dict]] = {}
    base = {_task(fields): fields for fields in reversed(runs)}
    names = {name for fields in runs for name in fields}
    planned = [{name: value for name, value in row.items() if name in names} for row in rows]
    first = {task: rows[planned.index(fields)] if fields in planned else None for task, fields in base.items()}
    for row in rows:
        fields = (
            f"{n}={v}" for n, v in row.items() if not (n in measured or n in compare.REPEATS or n.startswith("dice_"))
        )
        groups.setdefault(", ".join(fields) or "base", []).append(row)

    def spread(values: list[float]) -> str:
        if len(values) < 2:
            return f"{values[0]:.3g}" if values else ""
        return f"{np.mean(values):.3g} ± {np.std(values):.2g}"

    lines = [
        f"| config | n | Dice %, {split} | gain | HD95 mm | compactness | separability "
        "| pseudo-labels right % | minutes |",
        "| --- " * 9 + "|",
    ]
    for name, group in groups.items():
        pairs = ((row, first[_task(row)]) for row in group)
        gains = [row["dice"] - against["dice"] for row, against in pairs if against and against is not row]
        dice, *others = (spread([row[column] for row in group if column in row]) for column in columns)
        lines.append(f"| {name} | {len(group)} | {dice} | {spread(gains)} | {' | '.join(others)} |")
    if missing := [folder_name(base[task]) for task, row in first.items() if row is None]:
        lines += ["", f"Not ended, so no gain over it: {', '.join(missing)}."]
    if len(revisions := dict.fromkeys(row["revision"] for row in rows)) > 1:
        lines += ["", f"Trained at different revisions of the code: {', '.join(revisions)}."]
    return "\n".join(lines) + "\n"


def _task(row: dict) -> tuple:
    return tuple(row.get(name) for name in TASK)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.sweep`."""
    parser = cli.make_parser("sscl_jax.sweep", __doc__)
    parser.add_argument("--config", required=True, help="config file, as for sscl_jax.main")
    parser.add_argument("--output", required=True, type=Path, help="folder of the trainings and tables")
    option = functools.partial(
        parser.add_argument, action="append", default=[], type=read_option, metavar="FIELD=VALUE"
    )
    option("--set", help="a field that all trainings have in common")
    option("--grid", help="FIELD=VALUE,VALUE: crossed with the other --grid fields")
    option("--vary", help="FIELD=VALUE,VALUE: one field at a time")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="where the table's figures are from (val)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on a share of the cores (1)")
    args = cli.parse(parser, argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs={args.jobs}: at least 1 training at a time.")
        runs = plan_runs(args.grid, args.vary)
        cli.make_folder(args.output, "--output")
        fixed = {name: ",".join(values) for name, values in args.set}
        if args.split == "test":
            fixed["eval.test"] = "True"
        jax.config.update("jax_platforms", "cpu")  # the accelerators are for the trainings
        for fields in runs:
            check_run(args.output / folder_name(fields), options_of(args.config, fixed | fields), args.split)
        ends = run_all(args, fixed, runs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first training
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if not all(ends):
        sys.exit(f"{ends.count(False)} of {len(ends)} trainings did not end well; the same command tries them again.")


def run_all(args: argparse.Namespace, fixed: Fields, runs: list[Fields]) -> list[bool]:
    """Trains what has not ended, `args.jobs` at a time, each with a log beside its folder; prints the table after each.

    At SIGINT or SIGTERM the trainings save and end, and so does this; at the second they are killed.

    Returns:
      Whether each ended well.
    """
    # What the trainings share is compiled once.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(args.output / "compiled")} | os.environ
    running: set[subprocess.Popen] = set()
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        for process in list(running):
            (process.kill if stopped else process.terminate)()
        stopped.append(number)

    def run(fields: Fields) -> bool:
        workdir = args.output / folder_name(fields)
        if has_ended(workdir, args.split):
            return True
        if stopped:
            return False
        print(f"{workdir.name} ...", flush=True)
        options = options_of(args.config, fixed | fields)
        command = [sys.executable, "-m", "sscl_jax.main", f"--workdir={workdir}", *options]
        with open(f"{workdir}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running.add(process)
            if stopped:  # while it started
                process.terminate()
            status = process.wait()
            running.remove(process)
        if status:
            last = Path(log.name).read_text(encoding="utf-8").strip().splitlines()[-1:]
            print(f"{workdir.name}: exit status {status}; {' '.join(last)} (all of it in {log.name})", flush=True)
        return status == 0

    ends = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with concurrent.futures.ThreadPoolExecutor(
            args.jobs, initializer=_take_cores, initargs=(itertools.count(), args.jobs)
        ) as pool:
            for end in pool.map(run, runs):
                ends.append(end)
                if not stopped:
                    print(write_results(args.output, runs, args.split), flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        print("stopped; the same command goes on.", file=sys.stderr, flush=True)
        sys.exit(128 + stopped[0])
    return ends


def _take_cores(turn: "itertools.count[int]", jobs: int) -> None:
    """Binds this thread, and so the trainings that it starts, to its share of the cores.

    XLA's threads, as many as it sees cores, wait busily for one another: two trainings on the same cores are slower
    together than one after the other.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[next(turn) % jobs :: jobs] or cores)


if __name__ == "__main__":
    main()
