"""The report: its figures against the case table, its words, and that it needs nothing but itself."""

import csv
import json
import re

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image

from data_prep import folder
from sscl_jax import config_fields, evaluate, metrics, pictures, report


def make_run(workdir, dice, split="val", used="contrast"):
    """The folder of a training that has ended; `dice` is {(case, class): Dice, None where it does not count}.

    Case a is of one patient, all others are of another.
    """
    workdir.mkdir(parents=True)
    with open(workdir / f"{split}_cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(evaluate.CASE_COLUMNS)
        for network, loss in (("teacher", 0.0), ("student", 0.1)):
            for (case, name), value in dice.items():
                numbers = ["nan"] * 4 if value is None else [value - loss, value / 2, 10 * (1 - value), 1.0]
                writer.writerow(
                    [
                        network,
                        case,
                        "p" if case == "a" else "q",
                        name,
                        *numbers,
                        int(value is not None),
                        int(value == 0),
                    ]
                )
    with open(workdir / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "val_dice", "learning_rate", "con"])
        writer.writeheader()
        writer.writerows({"step": s, "loss": 1 / s, "val_dice": "" if s < 3 else 0.5, "con": 0.0} for s in (1, 2, 3))
    role = {"patients": ["p<1>", "p2"], "cases": 4, "slices": 20}
    facts = {
        "dataset": "hearts & livers", "fingerprint": "0123456789abcdef", "hardware": "1 x cpu",
        "roles": dict.fromkeys(("labelled", "unlabelled", "val", "test"), role), "versions": {"jax": "1.2.3"},
        "features": {split: {"teacher": {"compactness": 0.9, "separability": 0.75}}},
        "seconds": 90.0, "peak_memory_gib": 0.5, "checkpoint": "3",
    }  # fmt: skip
    (workdir / "run.json").write_text(json.dumps(facts))
    config = {"method": workdir.name, "seed": 0, "steps": 3, "data": {"labeled_patients": 2}}
    config["eval"] = {"select": "student"}
    config |= {term: {"weight": float(term == used)} for term in config_fields.UNLABELED_TERMS}
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


DICE = {("a", "x"): 0.5, ("a", "y"): 0.7, ("b", "x"): 0.9, ("b", "y"): None, ("c", "x"): 0.1, ("c", "y"): 0.0}


def cells(page, first):
    """Cells of the table row that begins with `first`."""
    row = next(
        row for row in re.findall(r"<tr>(.*?)</tr>", page) if re.sub("<[^>]*>", "\n", row).split("\n")[1] == first
    )
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_figures_are_those_of_the_table(tmp_path):
    page = report.write_report(make_run(tmp_path / "run", DICE)).read_text()
    x, y = np.array([0.5, 0.9, 0.1]), np.array([0.7, 0.0])
    assert cells(page, "teacher, x")[1] == f"{100 * x.mean():.2f} ± {100 * x.std():.2f}"
    assert cells(page, "teacher, y") == [
        "teacher, y", f"{100 * y.mean():.2f} ± {100 * y.std():.2f}",
        "17.50 ± 17.50", "6.50 ± 3.50", "1.00 ± 0.00", "2", "1",
    ]  # fmt: skip
    assert cells(page, "student, x")[1] == f"{100 * x.mean() - 10:.2f} ± {100 * x.std():.2f}"
    mean, spread = 100 * (0.5 + 0.35) / 2, 100 * np.std([0.6, 0.9, 0.05])
    assert f"<b>{mean:.1f} % ± {spread:.1f}</b>" in page
    assert (
        f"mean Dice of {mean:.1f} %" in page and "Weakest class: y, 35.0 %" in page and "Worst case: c, 5.0 %" in page
    )
    assert "1 times a class was missed" in page
    worst = re.search(r"Worst cases on val</h2>(.*?)</table>", page, re.S)[1]
    assert re.findall(r"<tr><td>(\w)</td>", worst) == ["c", "a", "b"]
    assert "y 0.0 (flagged)" in worst and "x 90.0" in worst and "y nan" not in worst


def test_unlabelled_patients_that_a_method_does_not_use_are_called_so(tmp_path):
    page = report.write_report(make_run(tmp_path / "supervised", DICE, used="")).read_text()
    assert page.count("not used by this method") == 1 and "unlabelled patients (4 cases), not used by this" in page
    for term in config_fields.UNLABELED_TERMS:
        page = report.write_report(make_run(tmp_path / term, DICE, used=term)).read_text()
        assert "unlabelled patients (4 cases)<" in page and "not used" not in page


def test_every_case_is_listed(tmp_path):
    dice = {(f"case{i:02d}", "x"): (i + 1) / 20 for i in range(13)}
    page = report.write_report(make_run(tmp_path / "run", dice)).read_text()
    worst, rest = page.split("<h2>Worst cases on val</h2>")[1].split("<details><summary>all 13 cases</summary>")
    assert re.findall(r"case\d\d", worst) == [f"case{i:02d}" for i in range(10)]
    assert re.findall(r"case\d\d", rest.split("</details>")[0]) == [f"case{i:02d}" for i in range(13)]


def test_page_needs_nothing_but_itself_and_escapes_names(tmp_path):
    workdir = make_run(tmp_path / "run", DICE)
    features = np.random.RandomState(0).randn(40, 5)
    pictures.write_features(workdir / "val_features.png", features, np.arange(40) % 3, ["background", "x", "y"])
    page = report.write_report(workdir).read_text()
    assert "hearts &amp; livers" in page and "p&lt;1&gt;" in page and "<1>" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.findall(r"<(?:script|link|iframe)", page)
    assert page.count("<svg") == 2 and "#000000" not in page
    assert "compactness 0.900" in page and "Pixel features of the student" in page
    assert ">con</text>" not in page  # a term that stayed 0 has no panel


def test_one_class_nothing_measured_and_nothing_there(tmp_path):
    one = make_run(tmp_path / "one", {("a", "x"): 0.5})
    assert "Weakest" not in report.write_report(one).read_text()
    nothing = make_run(tmp_path / "nothing", {("a", "x"): None, ("a", "y"): None})
    page = report.write_report(nothing).read_text()
    assert "nothing to measure" in page and "n/a" in page
    going = make_run(tmp_path / "going", DICE)
    (going / "val_cases.csv").unlink()
    assert "Not measured: there is no val case" in report.write_report(going).read_text()
    config = json.loads((going / "config.json").read_text())
    (going / "config.json").write_text(json.dumps(config | {"steps": 9}))
    assert "Not measured yet: 3 of 9 steps are done" in report.write_report(going).read_text()
    many = {(case, f"organ {i}"): 0.05 * i + 0.1 for case in "ab" for i in range(13)}
    assert report.write_report(make_run(tmp_path / "many", many)).read_text().count("teacher, organ") == 13
    with pytest.raises(FileNotFoundError, match="no config.json: give the --workdir"):
        report.write_report(tmp_path)


def test_comparison_is_paired_by_patient(tmp_path, capsys):
    better = {key: None if value is None else value / 3 + 0.4 for key, value in DICE.items()}
    ours, theirs = make_run(tmp_path / "ours", better), make_run(tmp_path / "theirs", DICE)
    report.main(["--workdir", str(ours), "--compare", str(theirs)])
    page = (ours / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(ours / "report.html")
    differences = 100 * np.array([0.6 - 0.6, np.mean([0.7 - 0.9, (1.3 / 3 + 0.4) / 2 - 0.05])])
    row = cells(page, str(theirs))
    assert row[6:8] == [f"{differences.mean():+.2f} ± {differences.std():.2f}", "2"]
    (theirs / "val_cases.csv").unlink()
    with pytest.raises(SystemExit, match="no table of val"):
        report.main(["--workdir", str(ours), "--compare", str(theirs)])


def test_dollar_signs_in_names_are_no_formulas(tmp_path):
    workdir = make_run(tmp_path / "run", {("a", r"$\x$ and $y"): 0.5})
    names = ["$\\bad{$", r"$\x$ and $y", "$"]
    pictures.write_features(workdir / "val_features.png", np.eye(6), np.arange(6) % 3, names)
    assert r"$\x$ and $y" in report.write_report(workdir).read_text()


def test_a_structure_too_small_for_the_prepared_grid_is_drawn(tmp_path):
    scan, mask = np.random.RandomState(0).rand(24, 24, 4).astype("f4"), np.zeros((24, 24, 4), "u1")
    mask[9, 9, 2] = 1
    for part, array in (("images", scan), ("labels", mask)):
        (tmp_path / part).mkdir()
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 5.0, 1.0])), tmp_path / part / "$\\a{$.nii.gz")
    dataset = folder.prepare(tmp_path / "prepared", tmp_path, spacing=[4.0], val_fraction=0, test_fraction=0)
    (case,) = dataset.cases
    assert mask.any() and not dataset.label(0).any()
    missed = np.zeros_like(mask)
    measured = metrics.case_metrics(missed, mask, 2, case.grid.native_spacing)
    drawn = pictures.write_overlays(tmp_path / "out", [evaluate.CaseResult(case, missed, measured, (1, 0, 0))], dataset)
    assert len(drawn) == 3 and all(image.imread(path).std() > 0 for path in drawn)
