import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_prep import acdc, common, folder
from sscl_jax.data import prepared
from sscl_jax.data.prepared import SPLITS, CaseSource, open_prepared

ROOT = Path(__file__).parents[1]
REAL_ACDC = Path(__file__).parents[2] / "shared" / "data" / "acdc"
AXIAL = np.diag([-1.0, -1.25, 5.0, 1.0])


def write_nifti(path, array, affine=AXIAL):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def image_of(seed, shape=(12, 10, 3)):
    return np.random.default_rng(seed).normal(100, 20, shape).astype("f4")


def label_of(seed, shape=(12, 10, 3), values=(0, 1, 2, 3)):
    return np.random.default_rng(seed).choice(values, shape).astype("u1")


# --- ACDC -----------------------------------------------------------------------------------------


@pytest.fixture
def acdc_folder(tmp_path):
    """Four patients: one whose ED is frame 4, one that lacks a mask, one in no split."""
    base = tmp_path / "ACDC" / "database"
    frames = {
        "patient001": (1, 9),
        "patient002": (4, 11),
        "patient003": (1, 7),
        "patient009": (1, 2),
    }
    for number, (patient, (ed, es)) in enumerate(frames.items()):
        at = base / "training" / patient
        for frame in (ed, es):
            write_nifti(at / f"{patient}_frame{frame:02d}.nii.gz", image_of(10 * number + frame))
            write_nifti(at / f"{patient}_frame{frame:02d}_gt.nii.gz", label_of(number))
        write_nifti(at / f"{patient}_4d.nii.gz", image_of(number, (12, 10, 3, 2)))
        (at / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: NOR\nNbFrame: 20\n")
    (base / "training" / "patient003" / "patient003_frame07_gt.nii.gz").unlink()
    splits = {"train": ["patient003", "patient002"], "val": ["patient001"], "test": ["patient101"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    return tmp_path / "ACDC"


def test_acdc(acdc_folder, tmp_path, capsys):
    dataset = acdc.prepare(acdc_folder, tmp_path / "out", tmp_path / "splits.json")
    told = capsys.readouterr().out
    assert [(case.case_id, case.split, case.has_label) for case in dataset.cases] == [
        ("patient003_frame01", "train", True),
        ("patient003_frame07", "train", False),
        ("patient002_frame04", "train", True),
        ("patient002_frame11", "train", True),
        ("patient001_frame01", "val", True),
        ("patient001_frame09", "val", True),
    ]
    assert dataset.recipe.class_names[1:] == ("right ventricle", "myocardium", "left ventricle")
    assert dataset.cases[0].grid.spacing == (5.0, 1.5, 1.5)
    np.testing.assert_array_equal(dataset.native_label(0), label_of(2))
    assert "missing: 1 of 1 test patients (patient101)" in told
    assert "ignored: 1 patients that are in no split (patient009)" in told
    assert "ignored: 3 other files, such as patient003_4d.nii.gz" in told
    assert dataset.patients == {
        "train": ["patient003", "patient002"],
        "val": ["patient001"],
        "test": [],
    }
    lines = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in told.splitlines()}
    assert lines["patients"] == ["2", "1", "0"]
    assert lines["cases"] == ["4", "2", "0"]
    assert lines["labelled"] == ["3", "2", "0"]
    assert lines["unlabelled"] == ["1", "0", "0"]
    assert lines["slices"] == ["12", "6", "0"]
    assert lines["cases with myocardium"] == ["3", "2", "0"]


def test_acdc_level_database_may_be_absent(acdc_folder, tmp_path):
    splits = tmp_path / "splits.json"
    one = acdc.prepare(acdc_folder, tmp_path / "one", splits)
    two = acdc.prepare(acdc_folder / "database", tmp_path / "two", splits)
    assert one.fingerprint == two.fingerprint


def test_acdc_takes_testing_patients_and_splits_that_come_along(acdc_folder, tmp_path):
    base = acdc_folder / "database"
    (base / "testing").mkdir()
    (base / "training" / "patient001").rename(base / "testing" / "patient001")
    (acdc_folder / "splits.json").write_text(json.dumps({"train": ["patient002"], "test": ["patient001"]}))
    dataset = acdc.prepare(acdc_folder, tmp_path / "out")
    assert {case.patient_id: case.split for case in dataset.cases} == {
        "patient002": "train",
        "patient001": "test",
    }


def test_acdc_class_presence_counts_labelled_cases(acdc_folder, tmp_path, capsys):
    at = acdc_folder / "database" / "training" / "patient002"
    write_nifti(at / "patient002_frame04_gt.nii.gz", label_of(5, values=(0, 2, 3)))
    acdc.prepare(acdc_folder, tmp_path / "out", tmp_path / "splits.json")
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if "right ventricle" in line)
    assert line.split()[-3:] == ["2", "2", "0"]


def test_acdc_without_train_patients(acdc_folder, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"train": ["patient777"]}))
    with pytest.raises(ValueError, match="none of the 1 train patients"):
        acdc.prepare(acdc_folder, tmp_path / "out", tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="unpacked ACDC archive"):
        acdc.prepare(tmp_path, tmp_path / "out", tmp_path / "splits.json")


def test_all_problems_are_told_at_once(acdc_folder, tmp_path, capsys):
    at = acdc_folder / "database" / "training"
    write_nifti(at / "patient001/patient001_frame01_gt.nii.gz", label_of(0, (12, 10, 4)))
    write_nifti(at / "patient001/patient001_frame09_gt.nii.gz", label_of(0, values=(0, 7)))
    path = at / "patient002/patient002_frame04.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    shifted = AXIAL + np.array([[0, 0, 0, 3.0]] + [[0.0] * 4] * 3)
    write_nifti(at / "patient002/patient002_frame11_gt.nii.gz", label_of(1), shifted)
    write_nifti(at / "patient003/patient003_frame01.nii.gz", np.full((12, 10, 3), 7, "i2"))
    nan = image_of(3)
    nan[1, 2, 1] = np.nan
    write_nifti(at / "patient003/patient003_frame07.nii.gz", nan)
    with pytest.raises(common.Problems) as caught:
        acdc.prepare(acdc_folder, tmp_path / "out", tmp_path / "splits.json")
    expected = [
        ("patient003_frame01.nii.gz", "every voxel is 7"),
        ("patient003_frame07.nii.gz", "NaN"),
        ("patient002_frame04.nii.gz", "truncated"),
        ("patient002_frame11_gt.nii.gz", "3 mm away from its image"),
        ("patient001_frame01_gt.nii.gz", "(12, 10, 4)"),
        ("patient001_frame09_gt.nii.gz", "label values 7 are not among 0, 1, 2, 3"),
    ]
    assert len(caught.value.lines) == len(expected)
    for line, parts in zip(caught.value.lines, expected, strict=True):
        assert all(part in line for part in parts), line
        assert "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Info.cfg: does not exist"),
        ("ED: x\nES: 3\n", "ED is 'x', not a frame number"),
        ("ED: 1\nES: 30\n", "frame30.nii.gz: does not exist, but Info.cfg names frame 30"),
    ],
)
def test_acdc_info_file(acdc_folder, tmp_path, content, message):
    path = acdc_folder / "database" / "training" / "patient002" / "Info.cfg"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(common.Problems, match=message):
        acdc.prepare(acdc_folder, tmp_path / "out", tmp_path / "splits.json")


def test_packaged_split_is_the_conventional_one():
    content = json.loads(acdc.PACKAGED_SPLITS.read_text())
    patients = common.read_splits(acdc.PACKAGED_SPLITS)
    assert {split: len(ids) for split, ids in patients.items()} == {
        "train": 70,
        "val": 10,
        "test": 20,
    }
    everyone = [patient for split in SPLITS for patient in patients[split]]
    assert sorted(everyone) == [f"patient{number:03d}" for number in range(1, 101)]
    # A labelled subset of n patients is the first n of train.
    assert set(content["labeled"]) == {"1", "3", "7"}
    for count, subset in content["labeled"].items():
        assert set(subset) == set(patients["train"][: int(count)])
        assert len(subset) == int(count)


def test_held_out_patients_are_of_the_conventional_train():
    held_out = json.loads((acdc.PACKAGED_SPLITS.parent / "acdc_held_out.json").read_text())
    patients = common.read_splits(acdc.PACKAGED_SPLITS)
    assert held_out["train"] == patients["train"][:50] and held_out["val"] == patients["val"]
    assert held_out["test"] == [patient for patient in patients["train"][50:] if patient != "patient076"]


@pytest.mark.skipif(not REAL_ACDC.is_dir(), reason=f"the real scans are not at {REAL_ACDC}")
def test_a_scan_that_is_in_real_acdc_twice_is_in_one_split(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["patient074"], "test": ["patient076"]}))
    with pytest.raises(common.Problems) as caught:
        acdc.prepare(REAL_ACDC, tmp_path / "out", tmp_path / "splits.json")
    assert len(caught.value.lines) == 2 and all("patient076" in line for line in caught.value.lines)


@pytest.mark.skipif(not REAL_ACDC.is_dir(), reason=f"the real scans are not at {REAL_ACDC}")
def test_real_acdc(tmp_path):
    splits = {"train": ["patient090"], "val": ["patient028"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    dataset = acdc.prepare(REAL_ACDC, tmp_path / "out", tmp_path / "splits.json")
    # Patient 090 begins at frame 4, and the voxel size is in pixdim alone.
    assert [c.case_id for c in dataset.cases[:2]] == ["patient090_frame04", "patient090_frame11"]
    for case in dataset.cases:
        path = REAL_ACDC / "training" / case.patient_id / case.source
        zooms = nibabel.load(path).header.get_zooms()
        np.testing.assert_allclose(case.grid.native_spacing, zooms, rtol=1e-5)
        np.testing.assert_allclose(case.grid.spacing, (zooms[2], 1.5, 1.5), rtol=1e-5)
        classes = np.asarray(nibabel.load(str(path).replace(".nii", "_gt.nii")).dataobj)
        np.testing.assert_array_equal(dataset.native_label(case.index), classes)
        volumes = [
            np.bincount(label.ravel(), minlength=4) * np.prod(spacing)
            for label, spacing in (
                (dataset.label(case.index), case.grid.spacing),
                (classes, case.grid.native_spacing),
            )
        ]
        np.testing.assert_allclose(volumes[0][1:], volumes[1][1:], rtol=0.05)


# --- Folders and lists ----------------------------------------------------------------------------


@pytest.fixture
def any_folder(tmp_path):
    """Eight patients with two visits each; p5 has no masks; label values 0, 5, 9."""
    base = tmp_path / "study"
    for number in range(8):
        for visit in (1, 2):
            name = f"p{number}_v{visit}"
            write_nifti(base / "images" / f"{name}.nii.gz", image_of(10 * number + visit))
            if number != 5:
                mask = label_of(number, values=(0, 5, 9))
                write_nifti(base / "labels" / f"{name}.nii.gz", mask)
    (base / "images" / ".DS_Store").write_bytes(b"x")
    return base


OPTIONS = {"patient_pattern": r"^(p\d+)_", "val_fraction": 0.3, "test_fraction": 0.2, "seed": 1}


def test_folder(any_folder, tmp_path, capsys):
    dataset = folder.prepare(tmp_path / "out", any_folder, **OPTIONS)
    assert dataset.recipe.label_values == (0, 5, 9)
    assert dataset.recipe.class_names == ("background", "label 5", "label 9")
    assert dataset.recipe.orientation == "SPL"
    assert dataset.recipe.spacing == (None, 1.125, 1.125)
    assert dataset.name == "study"
    assert len(dataset.cases) == 16
    _assert_disjoint(dataset)
    assert all(dataset.patients[split] for split in SPLITS)
    assert "p5" in dataset.patients["train"]
    assert {c.patient_id for c in dataset.cases if not c.has_label} == {"p5"}
    assert "cases with label 9" in capsys.readouterr().out
    again = folder.prepare(tmp_path / "out", any_folder, **OPTIONS)
    assert again.fingerprint == dataset.fingerprint
    assert "already prepared" in capsys.readouterr().out


def _assert_disjoint(dataset):
    of = {split: {c.patient_id for c in dataset.cases if c.split == split} for split in SPLITS}
    assert sum(map(len, of.values())) == len(set().union(*of.values()))
    for case in dataset.cases:
        assert case.patient_id in dataset.patients[case.split]


def test_masks_of_unlabelled_patients_may_be_deleted(any_folder, tmp_path):
    options = {**OPTIONS, "label_values": (0, 5, 9)}
    before = folder.prepare(tmp_path / "before", any_folder, **options)
    first = next(case.patient_id for case in before.cases if case.split == "train" and case.has_label)
    for patient in before.patients["train"]:
        for path in () if patient == first else (any_folder / "labels").glob(f"{patient}_*"):
            path.unlink()
    after = folder.prepare(tmp_path / "after", any_folder, **options)
    assert after.fingerprint == before.fingerprint
    assert after.patients == before.patients
    files = [d.path / "cache" / "images.f32" for d in (before, after)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for case in before.cases:
        kept = case.split != "train" or case.patient_id == first
        assert after.cases[case.index].case_id == case.case_id
        assert after.cases[case.index].has_label == (kept and case.has_label)


def test_draw_does_not_move_the_others():
    scans = folder.to_sources(
        [folder.Scan(f"c{n}", Path("i"), Path("l") if n % 3 else None, f"p{n}") for n in range(300)]
    )
    whole, _ = folder.draw_splits(scans, 0.2, 0.1, 0)
    part, _ = folder.draw_splits(scans[50:], 0.2, 0.1, 0)
    for split in SPLITS:
        kept = [p for p in whole[split] if int(p[1:]) >= 50]
        assert part[split] == kept
    assert not any(int(p[1:]) % 3 == 0 for p in whole["val"] + whole["test"])
    assert abs(len(whole["val"]) / 200 - 0.2) < 0.08
    assert abs(len(whole["test"]) / 200 - 0.1) < 0.06
    assert folder.draw_splits(scans, 0.2, 0.1, 1)[0] != whole


def test_draw_that_leaves_a_part_empty():
    scans = folder.to_sources([folder.Scan(f"c{n}", Path("i"), Path("l"), f"p{n}") for n in range(7)])
    _, problems = folder.draw_splits(scans, 0.2, 0.2, 0)
    assert "none of 7 patients with masks into val" in problems[0]
    seed = int(problems[0].split("--seed ")[1].split(",")[0])
    patients, problems = folder.draw_splits(scans, 0.2, 0.2, seed)
    assert not problems and all(patients.values())
    _, problems = folder.draw_splits(scans[:1], 0.2, 0.2, 0)
    assert "change the fractions" in problems[0]


def test_a_draw_of_patients_that_were_joined_by_name_leads_to_the_pattern_first(tmp_path):
    """Of visits of the same people, v1_p1, v1_p2 and v2_p1, it would make a seed for a leak."""
    for number, name in enumerate(f"v{visit}_p{person}" for visit in (1, 2) for person in (1, 2, 3)):
        for part, array in (("images", image_of(number)), ("labels", label_of(number))):
            write_nifti(tmp_path / "in" / part / f"{name}.nii.gz", array)
    with pytest.raises(common.Problems, match="if these are not 2 patients, see --patient_pattern first"):
        folder.prepare(tmp_path / "out", tmp_path / "in")


@pytest.mark.parametrize("labelled", [2, 3, 4])
def test_a_draw_leaves_a_mask_for_training(labelled):
    scans = folder.to_sources(
        [folder.Scan(f"c{n}", Path("i"), Path("l") if n < labelled else None, f"p{n}") for n in range(labelled + 30)]
    )
    with_mask = {f"p{n}" for n in range(labelled)}
    told = 0
    for seed in range(60):
        patients, problems = folder.draw_splits(scans, 0.2, 0.2, seed)
        if problems and (said := re.search(r"--seed (\d+)", problems[0])):
            told += 1
            patients, problems = folder.draw_splits(scans, 0.2, 0.2, int(said[1]))
            assert not problems
        assert problems or all(with_mask.intersection(patients[split]) for split in SPLITS)
    assert told if labelled > 2 else "change the fractions" in problems[0]


def test_names_as_in_nnunet(tmp_path):
    base = tmp_path / "Dataset001"
    for name in ("a", "b"):
        write_nifti(base / "imagesTr" / f"{name}_0000.nii.gz", image_of(1))
        write_nifti(base / "labelsTr" / f"{name}.nii.gz", label_of(1))
    scans, problems = folder.list_folder(base)
    assert [(s.case_id, s.label.name) for s in scans] == [("a", "a.nii.gz"), ("b", "b.nii.gz")]
    assert not problems
    write_nifti(base / "imagesTr" / "a_0001.nii.gz", image_of(2))
    scans, problems = folder.list_folder(base)
    assert not problems and [len(scan.channels) for scan in scans] == [1, 0]


def test_folder_problems_in_one_list(any_folder, tmp_path):
    (any_folder / "images" / "p0_v1.nii.gz").unlink()
    write_nifti(any_folder / "images" / "oddname.nii.gz", image_of(0))
    write_nifti(any_folder / "labels" / "p1_v1.nii.gz", np.full((12, 10, 3), 0.5, "f4"))
    write_nifti(any_folder / "images" / "p2_v1.nii.gz", image_of(0, (12, 10, 3, 2)))
    with pytest.raises(common.Problems) as caught:
        folder.prepare(tmp_path / "out", any_folder, **OPTIONS)
    text = "\n".join(caught.value.lines)
    assert len(caught.value.lines) == 4
    assert "labels/p0_v1.nii.gz: has no image of that name" in text
    assert "finds no patient in 'oddname'" in text
    assert "p1_v1.nii.gz" in text and "0.5" in text
    assert "p2_v1.nii.gz" in text and "4-D" in text


def test_csv(any_folder, tmp_path):
    rows = ["image,label,patient,split"]
    for number, split in enumerate(["train", "val", "test"]):
        for visit in (1, 2):
            name = f"p{number}_v{visit}.nii.gz"
            label = f"labels/{name}" if visit == 1 else ""
            rows.append(f"images/{name},{label},Q{number},{split}")
    file = any_folder / "list.csv"
    file.write_text("\n".join(rows))
    dataset = folder.prepare(tmp_path / "out", csv_file=file, modality="ct", window=(0.0, 200.0))
    assert dataset.patients == {"train": ["Q0"], "val": ["Q1"], "test": ["Q2"]}
    assert [c.case_id for c in dataset.cases[:2]] == ["images_p0_v1", "images_p0_v2"]
    assert [c.has_label for c in dataset.cases] == [True, False] * 3
    assert (dataset.recipe.intensity, dataset.recipe.window) == ("ct", (0.0, 200.0))
    file.write_text("\n".join([*rows, "images/p3_v1.nii.gz,,Q0,val", "images/p3_v2.nii.gz,,Q7,"]))
    with pytest.raises(common.Problems) as caught:
        folder.prepare(tmp_path / "other", csv_file=file)
    assert "line 9: split is ''" in caught.value.lines[0]
    assert "patient Q0: is in two splits, train and val" in caught.value.lines[1]


def test_csv_with_an_image_alone(any_folder, tmp_path):
    file = any_folder / "list.csv"
    file.write_text("image\nimages/p0_v1.nii.gz\nimages/gone.nii.gz\nimages/p0_v1.nii.gz\n")
    with pytest.raises(common.Problems) as caught:
        folder.prepare(tmp_path / "out", csv_file=file, val_fraction=0, test_fraction=0)
    assert "line 4: is the same image as line 2" in caught.value.lines[0]
    assert "gone.nii.gz: no such file" in caught.value.lines[1]
    file.write_text("image\nimages/p0_v1.nii.gz\n")
    with pytest.raises(ValueError, match="no mask holds a value other than 0"):
        folder.prepare(tmp_path / "out", csv_file=file, val_fraction=0, test_fraction=0)
    file.write_text("scan\nimages/p0_v1.nii.gz\n")
    with pytest.raises(ValueError, match="has the columns scan"):
        folder.prepare(tmp_path / "out", csv_file=file)


def test_split_file(any_folder, tmp_path, capsys):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"train": ["p7", "p0"], "val": ["p1"], "test": ["p99"]}))
    dataset = folder.prepare(tmp_path / "out", any_folder, splits=file, patient_pattern=r"^(p\d+)_")
    assert dataset.patients == {"train": ["p7", "p0"], "val": ["p1"], "test": []}
    told = capsys.readouterr().out
    assert "missing: 1 of 1 test patients (p99)" in told
    assert "ignored: 5 patients that are in no split (p2, p3, p4, p5, p6)" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["a"], "val": ["b", "a"]}', "patient a is listed under train and val"),
        ('{"train": ["a", "a"]}', "patient a is listed under train and train"),
        ('{"train": []}', 'no patient under "train"'),
        ('{"train": [1]}', '"train" is not a list of patient ids'),
        ('{"train": ["a"], "validation": ["b"]}', '"validation" is no name of a split: write "val"'),
        ('{"Train": ["a"]}', '"Train" is no name of a split: write "train"'),
        ("[]", '"train" is not a list'),
        ("{", "is not JSON"),
    ],
)
def test_faulty_split_files(tmp_path, content, message):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        common.read_splits(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("spacings", "expected"),
    [
        ([(1.0, 1.2, 5.0), (1.0, 1.2, 8.0)], ("SPL", (None, 1.1, 1.1))),
        ([(0.8, 3.0, 0.8)], ("AIL", (None, 0.8, 0.8))),
        ([(4.0, 1.0, 1.0)], ("LIP", (None, 1.0, 1.0))),
        ([(1.0, 1.0, 1.0)], ("SPL", (1.0, 1.0, 1.0))),
        ([(0.8, 0.8, 1.0)], ("SPL", (1.0, 0.8, 0.8))),
    ],
)
def test_orientation_and_spacing_follow_the_voxels(spacings, expected, capsys):
    assert folder.choose_grid(spacings) == expected
    assert "warning" not in capsys.readouterr().out


def test_cases_cut_in_different_directions_are_told(capsys):
    folder.choose_grid([(1.0, 1.0, 5.0), (1.0, 1.0, 5.0), (1.0, 5.0, 1.0)])
    assert "1 of 3 cases have their longest voxels along another" in capsys.readouterr().out


def test_coronal_scans_are_cut_into_coronal_slices(tmp_path):
    # File axes run right->left, foot->head, front->back; the last has the long voxels.
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, -4.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    image, mask = image_of(1, (9, 11, 5)), label_of(1, (9, 11, 5), (0, 1))
    write_nifti(tmp_path / "in" / "images" / "a.nii.gz", image, affine)
    write_nifti(tmp_path / "in" / "labels" / "a.nii.gz", mask, affine)
    dataset = folder.prepare(tmp_path / "out", tmp_path / "in", val_fraction=0, test_fraction=0)
    assert dataset.recipe.orientation == "AIL"
    assert dataset.cases[0].grid.shape == (5, 11, 9)
    # AIL: slices back->front, rows head->foot, columns right->left.
    expected = mask.transpose(2, 1, 0)[::-1, ::-1]
    np.testing.assert_array_equal(dataset.label(0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dir": None}, "either --input DIR or --csv FILE"),
        ({"patient_pattern": "p[0-9]+"}, "has no group"),
        ({"patient_pattern": "(p"}, "is not valid"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave a part for training"),
        ({"spacing": (1.0, 2.0)}, "one number or three"),
    ],
)
def test_options_that_cannot_be(any_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        folder.prepare(tmp_path / "out", **{"input_dir": any_folder, **options})


def test_command_line_reports_without_traceback(any_folder, tmp_path):
    write_nifti(any_folder / "labels" / "p9_v1.nii.gz", label_of(0))
    write_nifti(any_folder / "labels" / "p1_v1.nii.gz", label_of(0, (12, 10, 4)))
    command = [sys.executable, "-m", "data_prep.folder", "--input", any_folder]
    command += ["--output", tmp_path / "out", "--patient_pattern", r"^(p\d+)_"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), done.stderr


@pytest.mark.parametrize("module", [acdc, folder])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert "--splits" in capsys.readouterr().out


def test_main_of_acdc(acdc_folder, tmp_path, capsys):
    out, splits = tmp_path / "out", tmp_path / "splits.json"
    acdc.main(["--input", str(acdc_folder), "--output", str(out), "--splits", str(splits)])
    assert len(open_prepared(out).cases) == 6


def test_started_again_only_scans_that_are_not_done_are_read(acdc_folder, tmp_path, monkeypatch, capsys):
    out, splits = tmp_path / "out", tmp_path / "splits.json"
    original, read = prepared._prepare_case, []

    def stop(source, recipe):
        if source.case_id == "patient001_frame01":  # the fifth of six
            raise KeyboardInterrupt
        return original(source, recipe)

    monkeypatch.setattr(prepared, "_prepare_case", stop)
    with pytest.raises(KeyboardInterrupt):
        acdc.prepare(acdc_folder, out, splits)
    monkeypatch.undo()
    done = len(list(tmp_path.glob(".out.partial-cases/*.npz")))
    assert done >= 4
    image = CaseSource.image
    monkeypatch.setattr(CaseSource, "image", lambda source: read.append(source.case_id) or image(source))
    acdc.prepare(acdc_folder, out, splits)
    assert read == ["patient001_frame01", "patient001_frame09"][: 6 - done]
    told = capsys.readouterr().out
    assert f"{done} of 6 cases were prepared before, and are taken" in told
    monkeypatch.undo()
    acdc.prepare(acdc_folder, tmp_path / "undisturbed", splits)
    assert told.splitlines()[-12:] == capsys.readouterr().out.splitlines()[-12:]  # the summary


def test_started_again_a_scan_that_changed_is_checked_again(acdc_folder, tmp_path):
    out, splits = tmp_path / "out", tmp_path / "splits.json"
    scan = acdc_folder / "database" / "training" / "patient002" / "patient002_frame04.nii.gz"
    write_nifti(scan, image_of(0, (12, 10, 4)))
    with pytest.raises(common.Problems, match=r"frame04_gt.nii.gz: shape \(12, 10, 3\), but its image"):
        acdc.prepare(acdc_folder, out, splits)
    write_nifti(scan, image_of(0))
    acdc.prepare(acdc_folder, out, splits)
    assert not list(tmp_path.glob(".out*"))
    # Where the output is there, nothing is left to go on with.
    with pytest.raises(ValueError, match="choose another --output"):
        acdc.prepare(acdc_folder, out, splits, spacing=3.0)
    assert not list(tmp_path.glob(".out*"))


def test_what_the_check_keeps_of_a_case_is_what_it_learnt(acdc_folder, tmp_path):
    folders = acdc.find_patients(acdc_folder)
    sources, *_ = acdc.list_cases(folders, list(folders), {})
    (tmp_path / "kept").mkdir()
    for _ in range(2):  # made, then taken
        facts = common.examine(sources, (0, 1, 2), tmp_path / "kept")
        assert facts == common.examine(sources, (0, 1, 2))
    assert len(list((tmp_path / "kept").iterdir())) == 8
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert facts == common.examine(sources, (0, 1, 2), tmp_path / "kept")
    assert facts != common.examine(sources, None, tmp_path / "kept")  # 3 may be there too


@pytest.mark.parametrize("at", range(3))
def test_what_the_check_kept_is_not_taken_with_a_flipped_bit(acdc_folder, tmp_path, at):
    folders = acdc.find_patients(acdc_folder)
    sources, *_ = acdc.list_cases(folders, list(folders), {})
    facts = common.examine(sources, (0, 1, 2), tmp_path / "kept")
    for file in (tmp_path / "kept").iterdir():
        content = bytearray(file.read_bytes())
        content[content.index(b'"channels": 1') + 12] ^= 1 << at  # 0, 3 and 5 channels
        file.write_bytes(content)
    assert facts == common.examine(sources, (0, 1, 2), tmp_path / "kept")


def test_a_place_that_cannot_be_written(acdc_folder, tmp_path, monkeypatch, capsys):
    out, splits = tmp_path / "out", tmp_path / "splits.json"
    acdc.prepare(acdc_folder, out, splits)
    make = Path.mkdir

    def read_only(path, *args, **kwargs):  # the user who runs the tests may be root
        if path.parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    acdc.prepare(acdc_folder, out, splits)
    assert "already prepared" in capsys.readouterr().out
    read = []
    monkeypatch.setattr(CaseSource, "image", read.append)
    with pytest.raises(OSError, match=r"--output=.*/new cannot be written \(Read-only file system\): choose another"):
        acdc.prepare(acdc_folder, tmp_path / "new", splits)
    assert not read


def test_processes_by_the_command_line(acdc_folder, tmp_path):
    splits = tmp_path / "splits.json"
    one = acdc.prepare(acdc_folder, tmp_path / "threads", splits)
    command = [sys.executable, "-m", "data_prep.acdc", "--input", acdc_folder, "--splits", splits, "--processes=2"]
    subprocess.run([*command, "--output", tmp_path / "processes"], cwd=ROOT, check=True)
    other = open_prepared(tmp_path / "processes")
    assert one.fingerprint == other.fingerprint
    names = [path.name for path in one.path.iterdir() if path.is_file()]
    assert len(names) == 5  # records of two splits, metadata, features, information
    for name in names:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


@pytest.mark.parametrize("options", [["--processes=-1"], ["--processes=2", "--beam_options=--runner=DirectRunner"]])
def test_workers_that_cannot_be(options, capsys):
    with pytest.raises(SystemExit) as caught:
        acdc.main(["--input=a", "--output=b", *options])
    assert caught.value.code == 2
    assert "--processes" in capsys.readouterr().err.splitlines()[-1]


def test_options_of_a_pipeline_are_words():
    parser = common.make_parser("acdc", None)
    args = parser.parse_args(["--input=a", "--output=b", "--beam_options=--runner=X '--temp_location=a b'"])
    assert args.workers == ["--runner=X", "--temp_location=a b"]
    assert parser.parse_args(["--input=a", "--output=b"]).workers == 0
