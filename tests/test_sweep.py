import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from sscl_jax import sweep


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_options():
    assert sweep.read_option("contrast.level=0,2") == ("contrast.level", ["0", "2"])
    assert sweep.read_option("data.patch_size=(64,64),(96, 96)") == ("data.patch_size", ["(64,64)", "(96, 96)"])
    assert sweep.read_option("data.path=a=b") == ("data.path", ["a=b"])


@pytest.mark.parametrize("text", ["contrast.level", "=1", "seed="])
def test_options_that_are_none(text):
    with pytest.raises(sweep.argparse.ArgumentTypeError, match="write FIELD=VALUE"):
        sweep.read_option(text)


def test_grid_is_crossed_and_what_varies_changes_alone():
    runs = sweep.plan_runs([("method", ["a", "b"]), ("seed", ["0", "1"])], [("x", ["5", "6"]), ("y", ["7"])])
    base = [{"method": m, "seed": s} for m in "ab" for s in "01"]
    assert runs[:4] == base
    assert runs[4:] == [run | change for change in ({"x": "5"}, {"x": "6"}, {"y": "7"}) for run in base]
    assert sweep.plan_runs([], []) == [{}]
    with pytest.raises(ValueError, match="seed given twice"):
        sweep.plan_runs([("seed", ["0"])], [("seed", ["1"])])


def test_names_and_commands(tmp_path):
    fields = {"method": "region", "data.patch_size": "(64, 64)"}
    assert sweep.folder_name(fields) == "method=region,data.patch_size=_64,_64_"
    assert sweep.folder_name({"data.path": "../up"}) == "data.path=.._up"
    assert sweep.command_line("c.py", tmp_path, fields)[1:] == [
        "-m", "sscl_jax.main", "--config=c.py:region", f"--workdir={tmp_path}", "--config.data.patch_size=(64, 64)",
    ]  # fmt: skip


def test_table_by_hand():
    def row(method, seed, patients, dice, **more):
        task = {"method": method, "seed": seed, "data.labeled_patients": patients}
        return task | {"revision": "r", "labelled": "p", "minutes": 2.0, "dice": dice, "hd95_mm": 4.0, **more}

    rows = [row("supervised", "0", "3", 80.0), row("supervised", "1", "3", 84.0), row("supervised", "0", "1", 50.0)]
    rows += [row("region", "0", "3", 83.0, pseudo_label_accuracy=90.0), row("region", "1", "3", 85.0)]
    rows += [row("region", "0", "1", 61.0), row("region", "7", "1", 61.5)]
    lines = sweep.format_results(rows, "test").splitlines()
    assert "Dice %, test" in lines[0]
    assert lines[2:] == [
        "| method=supervised, data.labeled_patients=3 | 2 | 82 ± 2 |  | 4 ± 0 |  |  |  | 2 ± 0 |",
        "| method=supervised, data.labeled_patients=1 | 1 | 50 |  | 4 |  |  |  | 2 |",
        "| method=region, data.labeled_patients=3 | 2 | 84 ± 1 | 2 ± 1 | 4 ± 0 |  |  | 90 | 2 ± 0 |",
        "| method=region, data.labeled_patients=1 | 2 | 61.2 ± 0.25 | 11 | 4 ± 0 |  |  |  | 2 ± 0 |",
    ]


@pytest.mark.end_to_end
def test_a_sweep_trains_what_has_not_ended_and_names_what_failed(phantom_data, tmp_path):
    def run(*options):
        small = {
            "data.path": phantom_data, "data.labeled_patients": 2, "data.labeled_batch": 2, "data.unlabeled_batch": 2,
            "data.patch_size": "(16,16)", "model.widths": "(8,8)", "steps": 4, "eval.every": 2, "save_every": 2,
        }  # fmt: skip
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "sscl_jax.sweep",
            "--config=configs/base.py",
            f"--output={tmp_path}",
        ]
        command += [f"--set={name}={value}" for name, value in small.items()]
        return subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ)

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
    second = run("--grid=method=supervised,pseudo_label", "--vary=model.norm=none")
    check_results("val")
    assert second.returncode == 1 and "2 of 4 trainings did not end well" in second.stderr
    assert "model.norm='none': choose 'group' or 'batch'" in second.stdout
    assert (tmp_path / "method=supervised" / "report.html").stat().st_mtime_ns == kept
