import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prep import acdc, phantom
from sscl_jax import sweep
from sscl_jax.checkpoint import Checkpoints


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_options():
    assert sweep.read_option("contrast.level=0,2") == ("contrast.level", ["0", "2"])
    assert sweep.read_option("data.patch_size=(64,64),(96, 96)") == ("data.patch_size", ["(64,64)", "(96, 96)"])
    assert sweep.read_option("data.path=a=b") == ("data.path", ["a=b"])
    assert sweep.read_option("augment.scale=[0.8,1.2],(1,1)") == ("augment.scale", ["[0.8,1.2]", "(1,1)"])


@pytest.mark.parametrize("text", ["contrast.level", "=1", "seed=", "seed=0,"])
def test_options_that_are_none(text):
    with pytest.raises(sweep.argparse.ArgumentTypeError, match="write FIELD=VALUE"):
        sweep.read_option(text)


def test_a_bracket_that_is_not_closed_is_told():
    with pytest.raises(sweep.argparse.ArgumentTypeError, match="brackets do not match"):
        sweep.read_option("data.path=/x/a(b")


def test_grid_is_crossed_and_what_varies_changes_alone():
    runs = sweep.plan_runs([("method", ["a", "b"]), ("seed", ["0", "1"])], [("x", ["5", "6"]), ("y", ["7"])])
    base = [{"method": m, "seed": s} for m in "ab" for s in "01"]
    assert runs[:4] == base
    assert runs[4:] == [run | change for change in ({"x": "5"}, {"x": "6"}, {"y": "7"}) for run in base]
    assert sweep.plan_runs([], []) == [{}]
    with pytest.raises(ValueError, match="seed given twice"):
        sweep.plan_runs([("seed", ["0"])], [("seed", ["1"])])
    # One training is no repeat of itself, and two do not share a folder.
    for grid in (("seed", ["0", "0"]), ("data.path", ["d/a", "d_a"])):
        with pytest.raises(ValueError, match=f"two trainings would be {grid[0]}=.*: list each value once"):
            sweep.plan_runs([grid], [])


def test_names_and_commands(tmp_path):
    fields = {"method": "region", "data.patch_size": "(64, 64)"}
    assert sweep.folder_name(fields) == "method=region,data.patch_size=_64,_64_"
    assert sweep.folder_name({"data.path": "../up"}) == "data.path=.._up"
    assert sweep.options_of("c.py", fields) == ["--config=c.py:region", "--config.data.patch_size=(64, 64)"]


def test_table_by_hand():
    def row(method, seed, patients, dice, **more):
        task = {"method": method, "seed": seed, "data.labeled_patients": patients}
        return task | {"revision": "r", "labelled": "p", "minutes": 2.0, "dice": dice, "hd95_mm": 4.0, **more}

    rows = [row("supervised", "0", "3", 80.0), row("supervised", "1", "3", 84.0), row("supervised", "0", "1", 50.0)]
    rows += [row("region", "0", "3", 83.0, pseudo_label_accuracy=90.0), row("region", "1", "3", 85.0)]
    rows += [row("region", "0", "1", 61.0), row("region", "7", "1", 61.5)]
    runs = [{name: r[name] for name in ("method", "seed", "data.labeled_patients")} for r in rows]
    lines = sweep.format_results(rows, "test", runs).splitlines()
    assert "Dice %, test" in lines[0]
    assert lines[2:] == [
        "| method=supervised, data.labeled_patients=3 | 2 | 82 ± 2 |  | 4 ± 0 |  |  |  | 2 ± 0 |",
        "| method=supervised, data.labeled_patients=1 | 1 | 50 |  | 4 |  |  |  | 2 |",
        "| method=region, data.labeled_patients=3 | 2 | 84 ± 1 | 2 ± 1 | 4 ± 0 |  |  | 90 | 2 ± 0 |",
        "| method=region, data.labeled_patients=1 | 2 | 61.2 ± 0.25 | 11 | 4 ± 0 |  |  |  | 2 ± 0 |",
    ]
    mixed = sweep.format_results([*rows[:-1], rows[-1] | {"revision": "s"}], "test", runs)
    assert mixed.endswith("|\n\nTrained at different revisions of the code: r, s.\n")
    # What --vary changes is not taken for the base, though it has all of the base's fields.
    runs = [{"seed": s} | change for change in ({}, {"x": "1"}, {"x": "2"}) for s in "01"]
    some = [row("m", "1", "3", 80.0), *(row("m", s, "3", 70.0 + int(x), x=x) for x in "12" for s in "01")]
    some = [{n: v for n, v in r.items() if n not in ("method", "data.labeled_patients")} for r in some]
    lines = sweep.format_results(some, "test", runs).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:5]] == ["", "-9", "-8"]
    assert lines[-1] == "Not ended, so no gain over it: seed=0."
    # The first config is the one to compare with, whether it has ended or not.
    runs = [{name: r[name] for name in ("method", "seed", "data.labeled_patients")} for r in rows]
    lines = sweep.format_results(rows[1:], "test", runs).splitlines()
    assert lines[4] == "| method=region, data.labeled_patients=3 | 2 | 84 ± 1 | 1 | 4 ± 0 |  |  | 90 | 2 ± 0 |"
    assert lines[-1] == "Not ended, so no gain over it: method=supervised,seed=0,data.labeled_patients=3."


def command(phantom_data, output, *options):
    small = {
        "data.path": phantom_data, "data.labeled_patients": 2, "data.labeled_batch": 2, "data.unlabeled_batch": 2,
        "data.patch_size": "(16,16)", "model.widths": "(8,8)", "steps": 4, "eval.every": 2, "save_every": 2,
    }  # fmt: skip
    start = [sys.executable, "-W", "ignore", "-m", "sscl_jax.sweep", "--config=configs/base.py", f"--output={output}"]
    return [*start, *(f"--set={name}={value}" for name, value in small.items()), *options]


@pytest.mark.end_to_end
def test_a_sweep_trains_what_has_not_ended_and_names_what_failed(phantom_data, tmp_path):
    def run(*options):
        return subprocess.run(command(phantom_data, tmp_path, *options), capture_output=True, text=True, env=os.environ)

    def check_results(split):
        """results.csv against the tables by case: for each class the mean over cases, then over classes."""
        results = read_csv(tmp_path / "results.csv")
        assert [row["method"] for row in results] == ["supervised", "pseudo_label"]
        for row in results:
            dice = {}
            for case in read_csv(tmp_path / f"method={row['method']}" / f"{split}_cases.csv"):
                if case["network"] == "teacher" and case["counted"] == "1":
                    dice.setdefault(case["class"], []).append(100 * float(case["dice"]))
            assert float(row["dice"]) == pytest.approx(np.mean([np.mean(values) for values in dice.values()]), abs=0.01)
            assert 0 <= float(row["dice"]) <= 100 and row["labelled"]
        assert f"Dice %, {split}" in (tmp_path / "results.md").read_text()

    first = run("--grid=method=supervised,pseudo_label", "--jobs=2")
    assert first.returncode == 0, first.stdout + first.stderr
    check_results("val")
    assert (tmp_path / "results.md").read_text() in first.stdout
    tables = run("--grid=method=supervised,pseudo_label", "--split=test")
    assert tables.returncode == 0, tables.stdout + tables.stderr
    check_results("test")

    kept = (tmp_path / "method=supervised" / "report.html").stat().st_mtime_ns
    (tmp_path / "method=supervised,seed=1").write_text("a file where a training should be")
    second = run("--grid=method=supervised,pseudo_label", "--vary=seed=1", "--set=log_every=1")
    assert [(row["method"], row["seed"]) for row in read_csv(tmp_path / "results.csv")] == [
        ("supervised", ""), ("pseudo_label", ""), ("pseudo_label", "1"),
    ]  # fmt: skip
    assert second.returncode == 1 and "1 of 4 trainings did not end well" in second.stderr
    assert "method=supervised,seed=1: exit status 1; error: --workdir=" in second.stdout
    assert (tmp_path / "method=supervised" / "report.html").stat().st_mtime_ns == kept

    no_test = tmp_path / "no_test"
    phantom.generate(tmp_path / "scans", patients=3, val=1, test=0)
    acdc.prepare(tmp_path / "scans", no_test, spacing=6.0)
    # Nothing is trained where one of the trainings could not be, or where a folder holds the figures of another.
    for option, message in (
        ("--set=optimizer.learning_rate=1", "holds another training: optimizer.learning_rate was 0.002"),
        ("--set=eval.final_overlap=0.25", "eval.final_overlap was 0.5, is 0.25. Choose another --output"),
        ("--set=nosuch=1", "the config has no field nosuch"),
        ("--vary=model.norm=none", "model.norm='none': choose 'group' or 'batch'"),
        ("--jobs=0", "--jobs=0: at least 1 training"),
        (f"--set=data.path={no_test}", "has no test case with a label: there would be nothing to compare"),
    ):
        with pytest.raises(SystemExit) as refused:
            split = ["--split=test"] if "no test" in message else []
            sweep.main(command(phantom_data, tmp_path, "--grid=method=supervised", option, *split)[5:])
        told = str(refused.value.code)
        assert message in told and "\n" not in told
    (tmp_path / "method=supervised" / "run.json").write_text('{"fingerprint": ')
    with pytest.raises(SystemExit, match=r"method=supervised cannot be read \(.*delete it, or choose another --output"):
        sweep.main(command(phantom_data, tmp_path, "--grid=method=supervised")[5:])


@pytest.mark.end_to_end
def test_a_sweep_that_is_stopped_has_its_trainings_save(phantom_data, tmp_path):
    words = command(phantom_data, tmp_path, "--set=steps=5000", "--set=log_every=1", "--grid=seed=0,1,2", "--jobs=2")
    words += ["--set=method=supervised"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for metrics in (tmp_path / f"seed={seed}" / "metrics.csv" for seed in (0, 1)):
            while not (metrics.is_file() and len(read_csv(metrics)) > 1):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "stopped; the same command goes on.\n"
    for seed in (0, 1):
        saved = int(re.search(rf"seed={seed}: exit status 143; stopped by SIGTERM at step (\d+); saved", out)[1])
        assert Checkpoints(tmp_path / f"seed={seed}", "last").newest()[0] == saved > 1
    assert not (tmp_path / "seed=2").exists()
