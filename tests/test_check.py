"""`python -m data_prep.check`: what a folder is, what is wrong in it, and that `prepare` finds the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_prep import acdc, check, common, folder, msd
from sscl_jax.data.prepared import CaseSource, open_prepared

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
AXIAL = np.diag([-1.0, -1.25, 5.0, 1.0])
SHAPE = (12, 10, 3)


def write(path, array, affine=AXIAL):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(100, 20, shape).astype("f4")


def label(seed=0, shape=SHAPE, values=(0, 1, 2)):
    return np.random.default_rng(seed).choice(values, shape).astype("u1")


def write_pairs(base, names, values=(0, 1, 2)):
    for number, name in enumerate(names):
        write(base / "images" / f"{name}.nii.gz", image(number))
        write(base / "labels" / f"{name}.nii.gz", label(number, values=values))
    return base


def checked(path, capsys):
    """Lines of the report, and the exit status."""
    with pytest.raises(SystemExit) as left:
        check.main([str(path)])
    return capsys.readouterr().out.splitlines(), left.value.code


def row(lines, name):
    return next(line[len(name) :].split() for line in lines if line.startswith(name))


# --- What a folder is -----------------------------------------------------------------------------


def test_a_good_folder_has_status_0(tmp_path, capsys):
    lines, status = checked(write_pairs(tmp_path, ["a", "b"]), capsys)
    assert status == 0
    assert lines[0] == f"{tmp_path}: folder of images and masks, 2 cases"
    assert not [line for line in lines if line.startswith(("error", "warning"))]
    assert row(lines, "   ") == ["all"] and row(lines, "cases with label 2") == ["2"]
    assert lines[-1] == "0 error(s), 0 warning(s)"


@pytest.fixture
def acdc_folder(tmp_path):
    """Three patients of a split, each in one frame, and one in none, with 4-D files beside them."""
    base = tmp_path / "ACDC"
    for number, patient in enumerate(("patient001", "patient002", "patient003", "patient009")):
        at = base / "training" / patient
        write(at / f"{patient}_frame01.nii.gz", image(number))
        values = (0, 1, 2, 3) if patient != "patient001" else (0, 1, 2)
        write(at / f"{patient}_frame01_gt.nii.gz", label(number, values=values))
        write(at / f"{patient}_4d.nii.gz", image(number, (*SHAPE, 2)))
        (at / "Info.cfg").write_text("ED: 1\nES: 1\n")
    splits = {"train": ["patient001"], "val": ["patient002"], "test": ["patient003"]}
    (base / "splits.json").write_text(json.dumps(splits))
    return base


def test_acdc_is_shown_by_split(acdc_folder, capsys):
    lines, status = checked(acdc_folder, capsys)
    assert status == 0 and "ACDC, 4 cases" in lines[0]
    warned = [line for line in lines if line.startswith("warning")]
    assert len(warned) == 2
    assert "4 files are not frames" in warned[0] and "patient003_4d.nii.gz" in warned[0]
    assert "class left ventricle (label value 3) is in no train mask" in warned[1]
    assert row(lines, "   ") == ["train", "val", "test", "none"]
    assert row(lines, "cases with myocardium") == ["1", "1", "1", "1"]
    assert row(lines, "cases with left ventricle") == ["0", "1", "1", "1"]


def test_check_and_prepare_find_the_same(acdc_folder, tmp_path, capsys):
    at = acdc_folder / "training"
    write(at / "patient001/patient001_frame01_gt.nii.gz", label(0, values=(0, 7)))
    path = at / "patient002/patient002_frame01.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    write(at / "patient003/patient003_frame01.nii.gz", np.full(SHAPE, 7, "i2"))
    lines, status = checked(acdc_folder, capsys)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error")]
    assert status == 1 and len(errors) == 3
    assert not any(line.startswith("error") for line in lines[4:])  # one list
    with pytest.raises(common.Problems) as caught:
        acdc.prepare(acdc_folder, tmp_path / "out")
    assert caught.value.lines == errors


def test_files_of_acdc_in_capitals_in_two_endings_and_hidden(acdc_folder, tmp_path):
    at = acdc_folder / "training" / "patient001"
    (at / "patient001_frame01_gt.nii.gz").rename(at / "patient001_frame01_gt.NII.GZ")
    (at / "._patient001_frame01.nii.gz").write_bytes(b"macOS")
    (at / "Info.cfg").write_bytes("\ufeffED : 1\r\nES : 1\r\nGroup : ".encode() + b"\xfc\r\n")
    dataset = acdc.prepare(acdc_folder, tmp_path / "out")
    assert all(case.has_label for case in dataset.cases) and len(dataset.cases) == 3
    write(at / "patient001_frame01_gt.nii", label(7))
    with pytest.raises(common.Problems, match=r"_gt\.nii: has the name of .*_gt\.NII\.GZ: remove one of them"):
        acdc.prepare(acdc_folder, tmp_path / "other")


def test_msd_is_known_by_dataset_json(tmp_path, capsys):
    description = {"labels": {"0": "background", "1": "front"}, "modality": {"0": "MRI"}, "training": []}
    for name in ("h1", "h2"):
        write(tmp_path / "imagesTr" / f"{name}.nii.gz", image())
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", label(values=(0, 1)))
        description["training"].append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    lines, status = checked(tmp_path, capsys)
    assert status == 0 and "Decathlon, 2 cases" in lines[0] and row(lines, "cases with front") == ["2"]
    write(tmp_path / "labelsTr" / "h2.nii.gz", label(values=(0, 2)))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["h1"], "val": ["h2"]}))
    lines, status = checked(tmp_path, capsys)
    assert status == 1
    assert [
        line for line in lines if line.startswith("error") and "h2.nii.gz: label values 2 are not among 0, 1" in line
    ]
    assert row(lines, "cases  ") == ["1", "1"]


def test_a_plain_folder_pairs_masks_by_their_ending(tmp_path, capsys):
    write(tmp_path / "p1" / "t2.nii.gz", image(1))
    write(tmp_path / "p1" / "t2_seg.nii.gz", label(1))
    write(tmp_path / "p2" / "t2.nii", image(2))
    write(tmp_path / "p2" / "other_seg.nii.gz", image(3))  # of no image: an image itself
    lines, status = checked(tmp_path, capsys)
    assert status == 0 and "folder of NIfTI files, 3 cases" in lines[0]
    assert row(lines, "  with a mask") == ["1"] and row(lines, "cases with label 1") == ["1"]
    assert [
        line for line in lines if "2 of 3 images have no mask and count as unlabelled: other_seg.nii.gz, t2" in line
    ]


def test_a_csv_list(tmp_path, capsys):
    write_pairs(tmp_path, ["a", "b"])
    (tmp_path / "list.csv").write_text(
        "image,label,split\nimages/a.nii.gz,labels/a.nii.gz,train\nimages/b.nii.gz,labels/gone.nii.gz,val\n"
    )
    lines, status = checked(tmp_path / "list.csv", capsys)
    assert status == 1 and row(lines, "   ") == ["train", "val"]
    assert [line for line in lines if "gone.nii.gz: no such file" in line]


def test_a_prepared_dataset(acdc_folder, tmp_path, capsys):
    acdc.prepare(acdc_folder, tmp_path / "out")
    capsys.readouterr()
    lines, status = checked(tmp_path / "out", capsys)
    assert status == 0 and "prepared dataset, 3 cases" in lines[0]
    assert row(lines, "cases with left ventricle") == ["0", "1", "1"]
    cache = tmp_path / "out" / "cache"
    images = np.fromfile(cache / "images.f32", "f4")
    images[5] = np.nan
    images.tofile(cache / "images.f32")
    labels = np.fromfile(cache / "labels.u8", "u1")
    labels[-1] = 4
    labels.tofile(cache / "labels.u8")
    lines, status = checked(tmp_path / "out", capsys)
    errors = [line for line in lines if line.startswith("error")]
    assert status == 1 and len(errors) == 2
    assert "case patient001_frame01: its image has voxels that are not finite" in errors[0]
    assert "case patient003_frame01: its label has a class beyond 3" in errors[1]


def test_a_folder_that_is_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"nothing there that is known \(notes.txt\)"):
        check.check(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        check.check(tmp_path / "gone")
    (tmp_path / "images").mkdir()
    assert check.check(tmp_path)[0].problems == ["no case was found: give the folder of a data set"]


def test_command_line(tmp_path):
    write_pairs(tmp_path, ["a"])
    write(tmp_path / "labels" / "b.nii.gz", label())

    def run(path):
        command = [sys.executable, "-m", "data_prep.check", path]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(tmp_path)
    assert done.returncode == 1 and "error: " in done.stdout and "Traceback" not in done.stderr
    (tmp_path / "labels" / "b.nii.gz").unlink()
    assert run(tmp_path).returncode == 0
    done = run(tmp_path / "gone")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not (REAL / "faulty").is_dir(), reason=f"the real scans are not at {REAL}")
def test_real_faults_are_listed(capsys):
    lines, status = checked(REAL / "faulty" / "msd_with_faults", capsys)
    assert status == 1
    expected = [
        ("error", "hippocampus_010.nii.gz: has no image"),
        ("error", "hippocampus_281.nii.gz: has no image"),
        ("error", "(512, 512, 94)"),
        ("warning", ".DS_Store"),
        ("warning", "hippocampus_003.nii.gz: the mask is stored as float32"),
        ("warning", "hippocampus_243.nii.gz: the mask is stored as float32"),
        ("warning", "1 of 4 images have no mask and count as unlabelled: hippocampus_118.nii.gz"),
    ]
    for kind, text in expected:
        assert [line for line in lines if line.startswith(kind) and text in line], text
    assert lines[-1] == "2 error(s), 4 warning(s)"


# --- Warnings and faults of a case ----------------------------------------------------------------


def facts_of(tmp_path, array, mask=None, affine=AXIAL):
    image_path = write(tmp_path / "a.nii.gz", array, affine)
    mask_path = None if mask is None else write(tmp_path / "a_gt.nii.gz", mask, affine)
    source = CaseSource("a", "a", "train", (image_path,), mask_path)
    (fact,) = common.examine([source], None)
    return fact


def test_what_is_odd_is_a_warning_and_no_fault(tmp_path):
    blank = image(shape=(12, 10, 5))
    blank[..., 0] = blank[..., 3] = 7
    fact = facts_of(tmp_path, blank, np.zeros((12, 10, 5), "f4"))
    assert not fact.problems and len(fact.warnings) == 3
    assert "2 of 5 slices hold one value only (0, 3 along axis 2)" in fact.warnings[0]
    assert "the mask is empty" in fact.warnings[1]
    assert "the mask is stored as float32" in fact.warnings[2]
    many = np.arange(360).reshape(12, 10, 3) % 60
    (line,) = facts_of(tmp_path, image(), many.astype("u1")).warnings
    assert "60 different label values: make sure that it is no image" in line


def test_one_scan_under_two_names_is_told(tmp_path, capsys):
    base = write_pairs(tmp_path, ["a", "b", "c"])
    write(base / "images" / "c.nii.gz", image(0))  # that of a, stored anew
    lines, status = checked(base, capsys)
    (line,) = [line for line in lines if line.startswith("warning")]
    assert status == 0 and "c.nii.gz (all): has the voxels of" in line and "a.nii.gz (all)" in line


def test_one_scan_in_two_splits_is_refused(acdc_folder, tmp_path, capsys):
    at = acdc_folder / "training"
    trained = at / "patient001/patient001_frame01.nii.gz"
    write(at / "patient003/patient003_frame01.nii.gz", image(0))  # that of patient001, stored anew
    write(at / "patient009/patient009_frame01.nii.gz", image(0))  # of no split: nothing is measured on it
    lines, status = checked(acdc_folder, capsys)
    (line,) = [line for line in lines if line.startswith("error")]
    assert status == 1 and f"patient003_frame01.nii.gz (test): has the voxels of {trained} (train)" in line
    assert [line for line in lines if "patient009_frame01.nii.gz (none): has the voxels" in line]
    with pytest.raises(common.Problems, match="leave one of them out .*, or put both patients into one split"):
        acdc.prepare(acdc_folder, tmp_path / "out")
    dataset = acdc.prepare(acdc_folder, tmp_path / "out", skip_bad=True)
    assert [case.patient_id for case in dataset.cases] == ["patient001", "patient002"]
    assert "warning: that leaves no case in test" in capsys.readouterr().out


def split_into(base, train, test):
    (base / "splits.json").write_text(json.dumps({"train": train, "test": test}))
    return base / "splits.json"


@pytest.mark.parametrize(
    "store",
    [
        lambda array: (array[::-1], AXIAL @ np.diag([-1, 1, 1, 1]) + 11 * np.outer(AXIAL[:, 0], [0, 0, 0, 1])),
        lambda array: (array.transpose(1, 0, 2), AXIAL[:, [1, 0, 2, 3]]),
        lambda array: (array, AXIAL @ np.diag([-1, -1, 1, 1])),
        lambda array: (array.astype("f8"), AXIAL),
        lambda array: (np.where(array == 0, -0.0, array), AXIAL),
    ],
    ids=["mirrored", "turned", "other header", "type", "minus zero"],
)
def test_one_scan_stored_in_another_way_is_the_same(store, tmp_path):
    base = write_pairs(tmp_path, ["a", "b"])
    scan = image(0)
    scan[0, 0, 0] = 0
    write(base / "images" / "a.nii.gz", scan)
    write(base / "images" / "b.nii.gz", *store(scan))
    mask, affine = store(label(1))
    write(base / "labels" / "b.nii.gz", mask.astype("u1"), affine)
    with pytest.raises(common.Problems, match="b.nii.gz .test.: has the voxels of .*a.nii.gz .train."):
        folder.prepare(tmp_path / "out", base, splits=split_into(base, ["a"], ["b"]))


def test_of_a_scan_in_two_splits_the_one_that_is_worth_less_is_left_out(tmp_path):
    base = write_pairs(tmp_path, ["a", "b", "c"])
    write(base / "images" / "b.nii.gz", image(0))  # that of a
    splits = split_into(base, ["b", "c"], ["a"])  # a comes first by name, yet train before test
    one = folder.prepare(tmp_path / "one", base, splits=splits, skip_bad=True)
    assert [case.patient_id for case in one.cases] == ["b", "c"]
    (base / "labels" / "b.nii.gz").unlink()
    two = folder.prepare(tmp_path / "two", base, splits=splits, skip_bad=True)
    assert [case.patient_id for case in two.cases] == ["c", "a"]
    write(base / "labels" / "b.nii.gz", label(1, shape=(4, 4, 4)))  # of no use, and so no reason to leave out a
    three = folder.prepare(tmp_path / "three", base, splits=splits, skip_bad=True)
    assert [case.patient_id for case in three.cases] == ["c", "a"]


def test_of_a_scan_in_val_and_test_that_in_test_is_left_out(tmp_path):
    base = write_pairs(tmp_path, ["a", "b", "c"])
    write(base / "images" / "b.nii.gz", image(0))  # that of a
    (base / "splits.json").write_text(json.dumps({"train": ["c"], "val": ["b"], "test": ["a"]}))
    dataset = folder.prepare(tmp_path / "out", base, splits=base / "splits.json", skip_bad=True)
    assert [case.patient_id for case in dataset.cases] == ["c", "b"]


def test_one_scan_in_two_splits_is_found_in_a_prepared_data_set(tmp_path, capsys, monkeypatch):
    base = write_pairs(tmp_path, ["a", "b"])
    write(base / "images" / "b.nii.gz", image(0))
    (base / "labels" / "a.nii.gz").unlink()
    with monkeypatch.context() as patched:  # as it was prepared before this was looked for
        patched.setattr(common, "tell_doubles", lambda sources, facts: None)
        folder.prepare(tmp_path / "out", base, splits=split_into(base, ["a"], ["b"]))
    lines, status = checked(tmp_path / "out", capsys)
    (line,) = [line for line in lines if line.startswith("error")]
    out = tmp_path / "out"  # a, which has no mask, is worth less
    assert status == 1 and f"{out}, case a (train): has the voxels of {out}, case b (test)" in line


def test_check_puts_test_images_of_the_decathlon_where_prepare_puts_them(tmp_path, capsys):
    names = ["h1", "h2"]
    for number, name in enumerate(names):
        write(tmp_path / "imagesTr" / f"{name}.nii.gz", image(number))
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", label(number, values=(0, 1)))
    write(tmp_path / "imagesTs" / "h3.nii.gz", image(1))  # that of h2
    description = {
        "labels": {"0": "background", "1": "front"},
        "modality": {"0": "MRI"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/h3.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    splits = split_into(tmp_path, ["h1"], ["h2"])
    lines, status = checked(tmp_path, capsys)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error")]
    assert status == 1 and "h3.nii.gz (train): has the voxels of" in errors[0]
    with pytest.raises(common.Problems) as caught:
        msd.prepare(tmp_path, tmp_path / "out", splits=splits)
    assert caught.value.lines == errors


def test_endings_in_capitals(tmp_path, capsys):
    base = write_pairs(tmp_path, ["a", "b"])
    (base / "images" / "a.nii.gz").rename(base / "images" / "a.NII.GZ")
    lines, status = checked(base, capsys)
    assert status == 0 and row(lines, "  with a mask") == ["2"] and lines[-1] == "0 error(s), 0 warning(s)"


def test_padding_at_the_ends_of_thin_slices_is_no_finding(tmp_path):
    padded = image(shape=(12, 10, 8))
    padded[..., :2] = padded[..., 7:] = -1000
    cubes = np.diag([1.0, 1.0, 1.2, 1.0])
    assert not facts_of(tmp_path, padded, affine=cubes).warnings
    padded[..., 4] = 0
    (line,) = facts_of(tmp_path, padded, affine=cubes).warnings
    assert "1 of 8 slices hold one value only (4 along axis 2)" in line


def test_an_image_with_fewer_channels_than_the_others_is_a_fault(tmp_path, capsys):
    for name in ("a", "b", "c"):
        for channel in (0, 1) if name != "b" else (0,):
            write(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image(channel))
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", label())
    lines, status = checked(tmp_path, capsys)
    (error,) = [line for line in lines if line.startswith("error")]
    assert status == 1 and "b_0000.nii.gz: 1 channel(s), where most images have 2" in error
    options = {"val_fraction": 0, "test_fraction": 0}
    dataset = folder.prepare(tmp_path / "out", tmp_path, skip_bad=True, **options)
    assert [case.case_id for case in dataset.cases] in (["a", "c"], ["c", "a"]) and dataset.channels == 2


def test_a_constant_channel_is_named(tmp_path):
    write(tmp_path / "images" / "a.nii.gz", np.stack([image(), np.full(SHAPE, 3, "f4")], -1))
    write(tmp_path / "labels" / "a.nii.gz", label())
    with pytest.raises(common.Problems, match=r"a\.nii\.gz: every voxel of channel 1 is 3: "):
        folder.prepare(tmp_path / "out", tmp_path, channels=True, val_fraction=0, test_fraction=0)


def test_gaps_and_doubles_among_channels(tmp_path):
    write(tmp_path / "images" / "a_0000.nii.gz", image())
    write(tmp_path / "images" / "a_0002.nii.gz", image())
    write(tmp_path / "images" / "b.nii.gz", image())
    write(tmp_path / "images" / "b_0000.nii.gz", image())
    _, problems = folder.list_folder(tmp_path)
    assert len(problems) == 2
    assert "the channels of this case are ['a_0000', 'a_0002'], not ['a_0000', 'a_0001']" in problems[0]
    assert "b_0000.nii.gz: is the same case as" in problems[1]


def test_numbers_that_are_names_are_no_channels(tmp_path):
    for number in range(3):
        write(tmp_path / "images" / f"scan_{number:04d}.nii.gz", image(number))
    write(tmp_path / "labels" / "scan_0001.nii.gz", label())
    scans, problems = folder.list_folder(tmp_path)
    assert not problems
    assert [(s.case_id, s.label is not None) for s in scans] == [
        ("scan_0000", False),
        ("scan_0001", True),
        ("scan_0002", False),
    ]


# --- --skip_bad -----------------------------------------------------------------------------------


def test_skip_bad_goes_on_and_records_what_it_left_out(acdc_folder, tmp_path, capsys):
    train = [f"patient00{n}" for n in (1, 4)]
    shutil.copytree(acdc_folder / "training" / "patient001", acdc_folder / "training" / "patient004")
    for path in (acdc_folder / "training" / "patient004").iterdir():
        path.rename(path.with_name(path.name.replace("patient001", "patient004")))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": train, "val": ["patient002"], "test": ["patient003"]}))
    whole = acdc.prepare(acdc_folder, tmp_path / "whole", splits)
    bad = acdc_folder / "training" / "patient004" / "patient004_frame01.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    out = tmp_path / "out"
    arguments = ["--input", str(acdc_folder), "--output", str(out), "--splits", str(splits)]
    with pytest.raises(common.Problems):
        acdc.main(arguments)
    assert not out.exists()
    capsys.readouterr()
    acdc.main([*arguments, "--skip_bad"])
    told = capsys.readouterr()
    assert "skipped: 1 of 4 cases" in told.out and f"skipped: {bad}" in told.err
    dataset = open_prepared(out)
    assert [case.case_id for case in dataset.cases] == [f"patient00{n}_frame01" for n in (1, 2, 3)]
    assert {c.case_id: c.split for c in dataset.cases}.items() <= {c.case_id: c.split for c in whole.cases}.items()
    (line,) = dataset.skipped
    assert str(bad) in line and "truncated" in line
    assert json.loads((out / "metadata.json").read_text())["skipped"] == [line]
    lines, status = checked(out, capsys)
    assert status == 0 and [each for each in lines if each.startswith("warning: left out when it was prepared")]


def test_skip_bad_leaves_a_mask_for_training(tmp_path):
    write_pairs(tmp_path, ["a", "b", "c"])
    (tmp_path / "labels" / "c.nii.gz").unlink()
    write(tmp_path / "labels" / "a.nii.gz", label(shape=(12, 10, 4)))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["a", "c"], "val": ["b"]}))
    with pytest.raises(common.Problems, match="that leaves no mask in train"):
        folder.prepare(tmp_path / "out", tmp_path, skip_bad=True, splits=splits)
    assert not (tmp_path / "out").exists()


def test_channels_in_the_fourth_axis_are_checked_as_prepare_reads_them(tmp_path, capsys):
    for name in "ab":
        write(tmp_path / "images" / f"{name}.nii.gz", image(ord(name), (*SHAPE, 2)))
        write(tmp_path / "labels" / f"{name}.nii.gz", label(ord(name)))
    lines, status = checked(tmp_path, capsys)
    assert status == 1 and any("4-D" in line for line in lines)
    with pytest.raises(SystemExit) as left:
        check.main([str(tmp_path), "--channels"])
    assert left.value.code == 0, capsys.readouterr().out


def test_skip_bad_cannot_skip_everything_nor_faulty_splits(tmp_path):
    write_pairs(tmp_path, ["a"])
    write(tmp_path / "labels" / "a.nii.gz", label(shape=(12, 10, 4)))
    with pytest.raises(common.Problems, match=r"shape \(12, 10, 4\)"):
        folder.prepare(tmp_path / "out", tmp_path, skip_bad=True, val_fraction=0, test_fraction=0)
    write_pairs(tmp_path, ["a", "b"])
    with pytest.raises(common.Problems, match="the draw put none of 2 patients"):
        folder.prepare(tmp_path / "out", tmp_path, skip_bad=True, val_fraction=0.01, test_fraction=0)
