"""Medical Segmentation Decathlon, MM-WHS and Synapse: miniatures of the official layouts, written by hand."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from configs import base, msd_hippocampus, openkbp
from configs import mmwhs as mmwhs_config
from configs import synapse as synapse_config
from data_prep import check, common, mmwhs, msd, synapse
from sscl_jax import experiment
from sscl_jax.data.prepared import open_prepared

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
# File axes run to the back, to the left and to the feet, as those of OpenKBP do; voxels of 2 mm.
PLI = np.array([[0, -2.0, 0, 5], [-2.0, 0, 0, -7], [0, 0, -2.0, 11], [0, 0, 0, 1]])
SHAPE = (8, 7, 6)


def write_nifti(path, array, affine=PLI):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def image_of(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(-900, 900, shape).astype("i2")


def label_of(seed, values=(0, 1, 2), shape=SHAPE):
    return np.random.default_rng(seed).choice(values, shape).astype("u2")


def as_spl(array):
    """From axes that run to the back, left and feet: slices from the feet up, rows to the back, columns to the left."""
    return array[:, :, ::-1].transpose(2, 0, 1)


def scaled(array, low, high):
    return ((np.clip(array.astype("f8"), low, high) - low) / (high - low) * 2 - 1).astype("f4")


def problems_of(prepare, *args, **options):
    with pytest.raises(common.Problems) as caught:
        prepare(*args, **options)
    assert not any("\n" in line for line in caught.value.lines)
    return caught.value.lines


def assert_told(lines, expected):
    """Each finding is told once, in any order, and nothing else is."""
    assert len(lines) == len(expected), "\n".join(lines)
    for parts in expected:
        assert sum(all(part in line for part in parts) for line in lines) == 1, parts


# --- Medical Segmentation Decathlon ---------------------------------------------------------------

SPLITS = {"train": ["ct_1", "ct_2"], "val": ["ct_3"], "test": ["ct_4"]}


def describe(base, **fields):
    content = {
        "name": "Mini",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "right", "2": "left"},
        "numTraining": 4,
        "training": [{"image": f"./imagesTr/ct_{n}.nii.gz", "label": f"./labelsTr/ct_{n}.nii.gz"} for n in range(1, 5)],
        "test": ["./imagesTs/ct_5.nii.gz"],
    } | fields
    content = {key: value for key, value in content.items() if value is not None}
    (base / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def task(tmp_path):
    """Four CT volumes with masks, one without, hidden files, and a split that comes along."""
    base = tmp_path / "Task99_Mini"
    for n in range(1, 5):
        write_nifti(base / "imagesTr" / f"ct_{n}.nii.gz", image_of(n))
        write_nifti(base / "labelsTr" / f"ct_{n}.nii.gz", label_of(n))
    write_nifti(base / "imagesTs" / "ct_5.nii.gz", image_of(5))
    (base / "imagesTr" / "._ct_1.nii.gz").write_bytes(b"x")
    (base / "labelsTr" / ".DS_Store").write_bytes(b"x")
    describe(base)
    (base / "splits.json").write_text(json.dumps(SPLITS))
    return base


def test_msd_takes_all_images_without_masks(task, tmp_path, capsys):
    """Where none is listed, and where names look like channels that there are not; and tells of those not listed."""
    for name in ("ct_6_0000", "ct_6_0001"):
        write_nifti(task / "imagesTs" / f"{name}.nii.gz", image_of(ord(name[-1])))
    describe(task, test=[])
    dataset = msd.prepare(task, tmp_path / "out")
    assert sorted(c.case_id for c in dataset.cases if not c.has_label) == ["ct_5", "ct_6", "ct_6_0001"]
    describe(task)
    msd.prepare(task, tmp_path / "listed")
    told = capsys.readouterr().out
    assert "ignored: 2 other images of imagesTs that dataset.json does not list, such as " in told


def test_msd_values_geometry_and_parts(task, tmp_path, capsys):
    dataset = msd.prepare(task, tmp_path / "out", window=(-200.0, 300.0))
    told = capsys.readouterr().out
    assert [(c.case_id, c.patient_id, c.split, c.has_label) for c in dataset.cases] == [
        ("ct_1", "ct_1", "train", True),
        ("ct_2", "ct_2", "train", True),
        ("ct_5", "ct_5", "train", False),
        ("ct_3", "ct_3", "val", True),
        ("ct_4", "ct_4", "test", True),
    ]
    assert dataset.name == "Task99_Mini"
    assert dataset.recipe.class_names == ("background", "right", "left")
    assert (dataset.recipe.intensity, dataset.recipe.window) == ("ct", (-200.0, 300.0))
    assert (dataset.recipe.orientation, dataset.recipe.spacing) == ("SPL", (2.0, 2.0, 2.0))
    for case in dataset.cases:
        number = int(case.case_id[-1])
        np.testing.assert_allclose(case.grid.native_affine, PLI)
        expected = scaled(as_spl(image_of(number)), -200, 300)
        np.testing.assert_allclose(dataset.image(case.index)[..., 0], expected, atol=1e-6)
        if case.has_label:
            np.testing.assert_array_equal(dataset.label(case.index), as_spl(label_of(number)))
            np.testing.assert_array_equal(dataset.native_label(case.index), label_of(number))
    assert "ignored: 2 hidden files" in told
    assert "each volume counts as one of its own" in told
    assert "note" not in told


def test_msd_splits_patients_and_test_images(task, tmp_path):
    dataset = msd.prepare(task, tmp_path / "a", no_test_images=True)
    assert dataset.patients == SPLITS
    # An option goes before the split that comes along; a name that tells the patient keeps visits together.
    (tmp_path / "s.json").write_text(json.dumps({"train": ["ct"]}))
    dataset = msd.prepare(task, tmp_path / "b", tmp_path / "s.json", patient_pattern="^(ct)_")
    assert dataset.patients == {"train": ["ct"], "val": [], "test": []}
    assert len(dataset.cases) == 5
    (task / "splits.json").unlink()
    dataset = msd.prepare(task, tmp_path / "c", val_fraction=0.3, test_fraction=0, seed=3)
    assert sorted(dataset.patients["train"] + dataset.patients["val"]) == [f"ct_{n}" for n in range(1, 6)]
    assert dataset.patients["val"] and "ct_5" in dataset.patients["train"]


def test_msd_test_images_that_were_not_downloaded(task, tmp_path, capsys):
    (task / "imagesTs" / "ct_5.nii.gz").unlink()
    assert len(msd.prepare(task, tmp_path / "out").cases) == 4
    assert "ignored: the 1 test images" in capsys.readouterr().out


def test_msd_channels_in_a_fourth_axis_and_in_files(task, tmp_path):
    for n in range(1, 5):
        both = np.stack([image_of(n), image_of(n + 50)], -1)
        write_nifti(task / "imagesTr" / f"ct_{n}.nii.gz", both)
    describe(task, modality={"0": "T2", "1": "ADC"}, test=[])
    one = msd.prepare(task, tmp_path / "one", no_test_images=True)
    assert (one.channels, one.recipe.intensity) == (2, "mr")
    first = one.image(0)
    for channel, seed in enumerate((1, 51)):
        # Another seed's image would correlate with neither.
        corr = np.corrcoef(first[..., channel].ravel(), as_spl(image_of(seed)).ravel())[0, 1]
        assert corr > 0.99
    for n in range(1, 5):
        (task / "imagesTr" / f"ct_{n}.nii.gz").unlink()
        write_nifti(task / "imagesTr" / f"ct_{n}_0000.nii.gz", image_of(n))
        write_nifti(task / "imagesTr" / f"ct_{n}_0001.nii.gz", image_of(n + 50))
    # A list that names the cases, as nnU-Net had it, and none at all, as it has now.
    listed = msd.prepare(task, tmp_path / "listed", no_test_images=True)
    describe(
        task, modality=None, channel_names={"0": "T2", "1": "ADC"}, training=None, test=None, file_ending=".nii.gz"
    )
    write_nifti(task / "imagesTs" / "ct_5_0000.nii.gz", image_of(5))
    found = msd.prepare(task, tmp_path / "found", no_test_images=True)
    assert one.fingerprint == listed.fingerprint == found.fingerprint
    lines = problems_of(msd.prepare, task, tmp_path / "bad")
    expected = [
        ("ct_5_0001.nii.gz", "does not exist"),
        ("ct_5_0000.nii.gz", "has the case name of"),
        ("imagesTs/ct_5.nii.gz", "has 1 channels", "T2, ADC"),
    ]
    assert_told(lines, expected)
    (task / "imagesTs" / "ct_5.nii.gz").unlink()
    write_nifti(task / "imagesTs" / "ct_5_0001.nii.gz", image_of(55))
    (task / "imagesTr" / "ct_2_0001.nii.gz").unlink()
    assert_told(problems_of(msd.prepare, task, tmp_path / "bad"), [("ct_2_0001.nii.gz", "does not exist")])
    write_nifti(task / "imagesTr" / "ct_2_0001.nii.gz", image_of(2, (8, 7, 5)))
    assert_told(problems_of(msd.prepare, task, tmp_path / "bad"), [("ct_2_0001.nii.gz", "(8, 7, 5)")])


def test_msd_numbers_of_four_digits_are_no_channels(task, tmp_path):
    for n in range(1, 5):
        for part in ("imagesTr", "labelsTr"):
            (task / part / f"ct_{n}.nii.gz").rename(task / part / f"ct_{n - 1:04d}.nii.gz")
    describe(task, training=None)
    names = [f"ct_{n:04d}" for n in range(4)]
    (task / "splits.json").write_text(json.dumps({"train": names}))
    dataset = msd.prepare(task, tmp_path / "out", no_test_images=True)
    assert [c.case_id for c in dataset.cases] == names
    pairs = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names]
    describe(task, training=pairs)
    assert msd.prepare(task, tmp_path / "out", no_test_images=True).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"0": "background", "1": "Anterior", "2": "Posterior"}, {0: "background", 1: "Anterior", 2: "Posterior"}),
        ({"background": 0, "Anterior": 1, "Posterior": 2}, {0: "background", 1: "Anterior", 2: "Posterior"}),
        ({"Anterior": "7"}, {0: "background", 7: "Anterior"}),
        ({"0": "0", "1": "2", "2": "1"}, {0: "0", 1: "2", 2: "1"}),
    ],
)
def test_msd_spellings_of_labels(labels, expected):
    assert msd.read_labels({"labels": labels}, Path("dataset.json")) == (expected, [])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, "label 'whole' is a region"),
        ({"0": "background", "one": "two"}, "label 'one' is 'two'"),
        ({"background": 0, "organ": 1.5}, "label 'organ' is 1.5"),
        ({"background": 0, "organ": True}, "label 'organ' is True"),
        ({"background": 0, "a": 1, "b": 1}, "labels 'a' and 'b' have the same value 1"),
        ({"0": "background", "1": "a", "2": "a"}, "two labels are called 'a': rename one"),
        ({"background": 0, "a": 1, "ignore": 2}, 'label 2 is "ignore"'),
        ({"0": "organ", "1": "background"}, "label 1 is background: masks must hold 0 there"),
        (["background", "organ"], '"labels" is '),
    ],
)
def test_msd_labels_that_cannot_be(task, tmp_path, labels, message):
    describe(task, labels=labels)
    for skip_bad in (False, True):
        lines = problems_of(msd.prepare, task, tmp_path / "out", skip_bad=skip_bad)
        assert len(lines) >= 1 and message in lines[0]


@pytest.mark.parametrize(
    ("content", "wanted", "expected"),
    [
        ({"modality": {"0": "MRI"}}, None, (("MRI",), "mr")),
        ({"modality": {"0": "CT"}}, None, (("CT",), "ct")),
        ({"channel_names": {"0": "ct"}}, None, (("ct",), "ct")),
        ({"modality": ["CT_arterial"]}, None, (("CT_arterial",), "ct")),
        ({"modality": "T1 contrast"}, None, (("T1 contrast",), "mr")),
        ({"modality": {"0": "CT", "1": "PET"}}, "mr", (("CT", "PET"), "mr")),
        ({}, "ct", (("unknown",), "ct")),
    ],
)
def test_msd_modality(content, wanted, expected):
    assert msd.read_modality(content, Path("dataset.json"), wanted) == (*expected, [])


@pytest.mark.parametrize(
    ("modality", "message"),
    [({"0": "CT", "1": "PET"}, "give --modality mr"), ({}, "is {}"), (3, "is 3"), (None, "is None")],
)
def test_msd_modality_that_cannot_be(task, tmp_path, modality, message):
    describe(task, modality=modality)
    lines = problems_of(msd.prepare, task, tmp_path / "out", skip_bad=True)
    assert any("dataset.json" in line and message in line for line in lines)


def test_msd_windows_paths_and_a_split_file_with_other_names(task, tmp_path):
    pairs = [{"image": f"imagesTr\\ct_{n}.nii.gz", "label": f"labelsTr\\ct_{n}.nii.gz"} for n in range(1, 5)]
    describe(task, training=pairs, test=["imagesTs\\ct_5.nii.gz"])
    assert len(msd.prepare(task, tmp_path / "out").cases) == 5
    # The unlabelled ct_5 goes to train whatever the file says, and is not all that it trains on.
    (task / "splits.json").write_text(json.dumps({"train": ["ct_1.nii.gz"], "val": ["ct_2.nii.gz"]}))
    with pytest.raises(ValueError, match="none of the 1 train patients of .*splits.json .* is in the input"):
        msd.prepare(task, tmp_path / "other")


def test_a_file_in_both_endings_is_a_problem(task, hearts, abdomens, tmp_path):
    """What is listed by folder; of a list, the file that it names counts."""
    write_nifti(task / "labelsTr" / "ct_1.nii", label_of(1))
    msd.prepare(task, tmp_path / "listed")
    describe(task, training=None)
    write_nifti(hearts / "ct_train1" / "ct_train_1001_label.nii", label_of(1, HEART))
    write_nifti(abdomens / "RawData" / "Training" / "img" / "img0006.nii", image_of(6), THICK)
    for module, at, args, name in (
        (msd, task, (), "ct_1"),
        (mmwhs, hearts, ("ct", tmp_path / "splits.json"), "ct_train_1001_label"),
        (synapse, abdomens, (), "img0006"),
    ):
        (line,) = problems_of(module.prepare, at, tmp_path / "out", *args)
        assert f"{name}.nii.gz: has the name of" in line and f"{name}.nii: remove one of them" in line


def test_msd_faults_in_one_list(task, tmp_path, capsys):
    training = [{"image": f"imagesTr/ct_{n}.nii.gz", "label": f"labelsTr/ct_{n}.nii.gz"} for n in range(1, 9)]
    del training[6]["label"]
    describe(task, training=[*training, "ct_9", training[0]], test=["imagesTs/ct_5.nii.gz", "imagesTs/ct_6.nii.gz"])
    write_nifti(task / "imagesTr" / "ct_5.nii.gz", image_of(5))  # no mask; and imagesTs has the name as well
    write_nifti(task / "imagesTr" / "ct_7.nii.gz", image_of(7))  # listed without a mask
    write_nifti(task / "labelsTr" / "ct_8.nii.gz", label_of(8))  # listed, no image
    write_nifti(task / "imagesTr" / "ct_10.nii.gz", image_of(10))  # not listed, no mask
    write_nifti(task / "labelsTr" / "ct_11.nii.gz", label_of(11, shape=(5, 5, 5)))  # not listed, no image
    for part in ("imagesTr", "labelsTr"):
        write_nifti(task / part / "ct_12.nii.gz", label_of(12))  # both, not listed
    write_nifti(task / "labelsTr" / "ct_2.nii.gz", label_of(2, shape=(8, 7, 5)))
    write_nifti(task / "labelsTr" / "ct_3.nii.gz", label_of(3, (0, 1, 4)))
    write_nifti(task / "imagesTr" / "ct_4.nii.gz", np.stack([image_of(4)] * 2, -1))
    expected = [
        ("entry 8 is 'ct_9'",),
        ("imagesTr/ct_1.nii.gz", "list it once"),
        ("labelsTr/ct_2.nii.gz", "(8, 7, 5)"),
        ("labelsTr/ct_3.nii.gz", "label values 4 are not among 0, 1, 2"),
        ("imagesTr/ct_4.nii.gz", "has 2 channels"),
        ("labelsTr/ct_5.nii.gz", "does not exist"),
        ("imagesTs/ct_5.nii.gz", "has the case name of", "imagesTr/ct_5.nii.gz"),
        ("imagesTr/ct_6.nii.gz", "does not exist"),
        ("labelsTr/ct_6.nii.gz", "does not exist"),
        ("imagesTs/ct_6.nii.gz", "does not exist"),
        ("imagesTs/ct_6.nii.gz", "has the case name of"),
        ("imagesTr/ct_7.nii.gz", "has no mask: add it"),
        ("imagesTr/ct_8.nii.gz", "does not exist"),
        ("imagesTr/ct_10.nii.gz", "has no mask, and is not in dataset.json"),
        ("labelsTr/ct_11.nii.gz", "has no image of that name", "no image has its shape, (5, 5, 5)"),
    ]
    lines = problems_of(msd.prepare, task, tmp_path / "out")
    assert_told(lines, expected)
    told = capsys.readouterr().out
    assert "ignored: 2 other files that dataset.json does not list" in told
    assert "note: dataset.json says numTraining 4, and there are 8" in told
    assert not (tmp_path / "out").exists()
    dataset = msd.prepare(task, tmp_path / "out", skip_bad=True)
    assert [case.case_id for case in dataset.cases] == ["ct_1"]
    assert sorted(dataset.skipped) == sorted(lines)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_msd_without_a_description(task, tmp_path, content):
    (task / "dataset.json").unlink() if content is None else (task / "dataset.json").write_text(content)
    (task / "imagesTs" / "ct_5.nii.gz").unlink()
    lines = problems_of(msd.prepare, task, tmp_path / "out")
    assert len(lines) == 1 and "dataset.json" in lines[0] and "--skip_bad" in lines[0]
    dataset = msd.prepare(task, tmp_path / "out", skip_bad=True)
    assert dataset.recipe.class_names == ("background", "label 1", "label 2")
    assert dataset.recipe.intensity == "mr"


def test_msd_folder_that_is_no_task(tmp_path):
    lines = problems_of(msd.prepare, tmp_path, tmp_path / "out", skip_bad=True)
    assert_told(lines, [("dataset.json", "does not exist"), ("imagesTr", "holds no .nii")])
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        msd.prepare(tmp_path / "none", tmp_path / "out")


def msd_command(folder, output, *options):
    command = [sys.executable, "-m", "data_prep.msd", "--input", folder, "--output", output, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not (REAL / "faulty").is_dir(), reason=f"the real files with faults are not at {REAL}")
def test_real_msd_with_faults(tmp_path):
    faulty = REAL / "faulty" / "msd_with_faults"
    status, told = msd_command(faulty, tmp_path / "out")
    assert status == 1 and "Traceback" not in told
    for parts in [
        ("error", "dataset.json", "does not exist"),
        ("error", "imagesTr/hippocampus_118.nii.gz", "has no mask"),
        ("error", "labelsTr/hippocampus_010.nii.gz", "has no image"),
        ("error", "labelsTr/hippocampus_281.nii.gz", "has no image", "no image has its shape, (512, 512, 94)"),
        ("labelsTr/hippocampus_003.nii.gz", "float32"),
        ("labelsTr/hippocampus_243.nii.gz", "float32"),
        ("ignored: 1 hidden files", ".DS_Store"),
    ]:
        assert any(all(part in line for part in parts) for line in told.splitlines()), (parts, told)
    status, told = msd_command(faulty, tmp_path / "out", "--skip-bad")
    assert status == 0, told
    dataset = open_prepared(tmp_path / "out")
    assert sorted(c.case_id for c in dataset.cases) == [f"hippocampus_{n}" for n in ("001", "003", "243")]
    assert sum("hippocampus_281" in line for line in dataset.skipped) == 1


@pytest.mark.skipif(not (REAL / "openkbp").is_dir(), reason=f"the real scans are not at {REAL}")
def test_real_openkbp_has_its_sides(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["pt_2"], "val": ["pt_201"]}))
    dataset = msd.prepare(REAL / "openkbp", tmp_path / "out", tmp_path / "s.json")
    assert dataset.recipe.class_names[3:5] == ("right parotid", "left parotid")
    assert (dataset.recipe.orientation, dataset.recipe.intensity) == ("SPL", "ct")
    for case in dataset.cases:
        label, native = dataset.label(case.index), dataset.native_label(case.index)
        columns = [np.argwhere(label == side)[:, 2].mean() for side in (3, 4)]
        # Millimetres grow from the patient's left to the right, columns from right to left.
        world = [(case.grid.native_affine @ [*np.argwhere(native == side).mean(0), 1])[0] for side in (3, 4)]
        assert columns[0] < columns[1] and world[0] > world[1]
        # The mandible lies in front of the cord, which lies below the brainstem.
        rows, slices = ([np.argwhere(label == organ)[:, axis].mean() for organ in (1, 2, 5)] for axis in (1, 0))
        assert rows[2] < rows[1] and slices[1] < slices[0]


@pytest.mark.skipif(not (REAL / "msd").is_dir(), reason=f"the real scans are not at {REAL}")
def test_real_hippocampus(tmp_path):
    names = ["hippocampus_001", "hippocampus_007"]
    (tmp_path / "s.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    task = REAL / "msd" / "Task04_Hippocampus"
    dataset = msd.prepare(task, tmp_path / "out", tmp_path / "s.json")
    assert dataset.recipe.class_names == ("background", "Anterior", "Posterior")
    for case in dataset.cases:
        classes = np.asarray(nibabel.load(task / "labelsTr" / case.source).dataobj)
        np.testing.assert_array_equal(dataset.native_label(case.index), classes)
        # Anterior lies in front: rows run from front to back.
        front, back = (np.argwhere(dataset.label(case.index) == k)[:, 1].mean() for k in (1, 2))
        assert front < back


# --- MM-WHS ---------------------------------------------------------------------------------------

HEART = (0, 500, 600, 420, 550, 205, 820, 850)


@pytest.fixture
def hearts(tmp_path):
    """Four CT and two MR volumes with labels, the CT in two folders as downloaded; one test image of each."""
    base = tmp_path / "MMWHS"
    for n in range(1001, 1005):
        part = base / f"ct_train{1 if n < 1003 else 2}"
        write_nifti(part / f"ct_train_{n}_image.nii.gz", image_of(n))
        write_nifti(part / f"ct_train_{n}_label.nii.gz", label_of(n, HEART))
    for n in (1001, 1002):
        write_nifti(base / "mr_train" / f"mr_train_{n}_image.nii.gz", image_of(n + 50) + 900)
        write_nifti(base / "mr_train" / f"mr_train_{n}_label.nii.gz", label_of(n + 50, HEART))
    for kind in ("ct", "mr"):
        write_nifti(base / f"{kind}_test" / f"{kind}_test_2001_image.nii.gz", image_of(2001) + 900)
    (base / "ct_train1" / "._ct_train_1001_image.nii.gz").write_bytes(b"x")
    splits = {"train": ["ct_train_1003", "ct_train_1001"], "val": ["ct_train_1002"], "test": ["ct_train_1004"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    return base


def test_mmwhs_ct(hearts, tmp_path):
    dataset = mmwhs.prepare(hearts, tmp_path / "out", "ct", tmp_path / "splits.json", spacing=2.0)
    assert [(c.case_id, c.split, c.has_label) for c in dataset.cases] == [
        ("ct_train_1003", "train", True),
        ("ct_train_1001", "train", True),
        ("ct_test_2001", "train", False),
        ("ct_train_1002", "val", True),
        ("ct_train_1004", "test", True),
    ]
    assert dataset.recipe.label_values == HEART
    names = dict(zip(HEART, dataset.recipe.class_names, strict=True))
    assert (names[420], names[205], names[820]) == (
        "left atrium",
        "myocardium of the left ventricle",
        "ascending aorta",
    )
    case = dataset.cases[1]
    np.testing.assert_allclose(case.grid.native_affine, PLI)
    np.testing.assert_array_equal(np.array(HEART)[dataset.label(1)], as_spl(label_of(1001, HEART)))
    np.testing.assert_allclose(dataset.image(1)[..., 0], scaled(as_spl(image_of(1001)), -200, 800), atol=1e-6)


def test_mmwhs_mr_and_its_draw(hearts, tmp_path):
    dataset = mmwhs.prepare(hearts, tmp_path / "out", "mr", val_fraction=0.5, test_fraction=0, seed=1)
    assert dataset.name == "mmwhs_mr" and dataset.recipe.intensity == "mr"
    assert sorted(c.case_id for c in dataset.cases) == ["mr_test_2001", "mr_train_1001", "mr_train_1002"]
    assert "mr_test_2001" in dataset.patients["train"] and len(dataset.patients["val"]) == 1
    alone = mmwhs.prepare(
        hearts, tmp_path / "alone", "mr", val_fraction=0.5, test_fraction=0, seed=1, no_test_images=True
    )
    assert len(alone.cases) == 2


def test_mmwhs_stray_value_is_read_as_what_it_stands_for(hearts, tmp_path, capsys):
    path = hearts / "ct_train1" / "ct_train_1001_label.nii.gz"
    stray = label_of(1001, HEART)
    places = np.flatnonzero(stray == 420)[:3]
    stray.flat[places] = 421
    mended = mmwhs.prepare(hearts, tmp_path / "mended", "ct", tmp_path / "splits.json")
    assert "hold 421" not in capsys.readouterr().out
    write_nifti(path, stray)
    dataset = mmwhs.prepare(hearts, tmp_path / "out", "ct", tmp_path / "splits.json")
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if "hold 421" in line] == [
        f"note: {path}: 3 voxels hold 421, read as 420, left atrium"
    ]
    np.testing.assert_array_equal(dataset.native_label(1), mended.native_label(1))
    # Rotated or resampled, only mapped values appear.
    assert set(np.unique(dataset.label(1))) <= set(range(8))


def test_mmwhs_faults_in_one_list(hearts, tmp_path, capsys):
    part = hearts / "ct_train1"
    write_nifti(part / "ct_train_1001_label.nii.gz", label_of(1, (0, 500, 422)))
    write_nifti(part / "ct_train_1002_label.nii.gz", label_of(1, HEART, (8, 7, 5)))
    write_nifti(part / "ct_train_1009_label.nii.gz", label_of(1, HEART))
    write_nifti(hearts / "ct_test" / "ct_test_2001_label_encrypt_1mm.nii.gz", label_of(1))
    (hearts / "ct_train2" / "ct_train_1003_image.nii.gz").write_bytes(b"no scan")
    lines = problems_of(mmwhs.prepare, hearts, tmp_path / "out", "ct", tmp_path / "splits.json")
    expected = [
        ("ct_train_1001_label", "label values 422 are not among"),
        ("ct_train_1002_label", "(8, 7, 5)"),
        ("ct_train_1009_label", "has no image beside it"),
        ("ct_train_1003_image", "cannot be read as NIfTI"),
    ]
    assert_told(lines, expected)
    assert "ignored: 1 other files" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="folder that holds mr_train"):
        mmwhs.prepare(hearts / "ct_train1", tmp_path / "out", "mr")


# --- Synapse --------------------------------------------------------------------------------------

ORGANS = tuple(range(14))
THICK = np.diag([-1.5, -1.5, 4.0, 1.0])


@pytest.fixture
def abdomens(tmp_path):
    """Three training scans, one of val, one of test, and one test image without a label."""
    base = tmp_path / "RawData"
    for n in (6, 21, 30, 7, 8):
        write_nifti(base / "Training" / "img" / f"img{n:04d}.nii.gz", image_of(n), THICK)
        write_nifti(base / "Training" / "label" / f"label{n:04d}.nii.gz", label_of(n, ORGANS), THICK)
    write_nifti(base / "Testing" / "img" / "img0061.nii.gz", image_of(61), THICK)
    (base / "Training" / "img" / ".DS_Store").write_bytes(b"x")
    return tmp_path


def test_synapse(abdomens, tmp_path, capsys):
    dataset = synapse.prepare(abdomens, tmp_path / "out")
    assert [(c.case_id, c.split, c.has_label) for c in dataset.cases] == [
        ("0006", "train", True),
        ("0021", "train", True),
        ("0030", "train", True),
        ("0061", "train", False),
        ("0007", "val", True),
        ("0008", "test", True),
    ]
    assert "missing: 12 of 16 train patients" in capsys.readouterr().out
    assert dataset.recipe.label_values == ORGANS
    assert dataset.recipe.class_names[4:7] == ("gallbladder", "esophagus", "liver")
    np.testing.assert_array_equal(dataset.native_label(0), label_of(6, ORGANS))
    np.testing.assert_allclose(dataset.cases[0].grid.native_affine, THICK)
    assert dataset.cases[0].grid.spacing == (4.0, 1.5, 1.5)
    # Axes of the file run to the left, front and head.
    expected = scaled(image_of(6).transpose(2, 1, 0), -125, 275)
    np.testing.assert_allclose(dataset.image(0)[..., 0], expected, atol=1e-6)
    inner = synapse.prepare(abdomens / "RawData", tmp_path / "inner")
    assert inner.fingerprint == dataset.fingerprint
    assert len(synapse.prepare(abdomens, tmp_path / "few", no_test_images=True).cases) == 5


def test_synapse_with_eight_organs(abdomens, tmp_path):
    dataset = synapse.prepare(abdomens, tmp_path / "out", eight=True)
    assert dataset.recipe.class_names == (
        "background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach",
    )  # fmt: skip
    label = label_of(6, ORGANS)
    for index, value in enumerate((8, 4, 3, 2, 6, 11, 1, 7), start=1):
        np.testing.assert_array_equal(dataset.native_label(0) == index, label == value)
    np.testing.assert_array_equal(dataset.native_label(0) == 0, np.isin(label, (0, 5, 9, 10, 12, 13)))


@pytest.mark.parametrize("eight", [False, True])
def test_synapse_faults_in_one_list(abdomens, tmp_path, capsys, eight):
    part = abdomens / "RawData" / "Training"
    write_nifti(part / "label" / "label0006.nii.gz", label_of(6, (0, 14)), THICK)
    write_nifti(part / "label" / "label0021.nii.gz", label_of(6, ORGANS), PLI)
    write_nifti(part / "label" / "label0040.nii.gz", label_of(6), THICK)
    write_nifti(part / "img" / "atlas.nii.gz", image_of(1), THICK)
    lines = problems_of(synapse.prepare, abdomens, tmp_path / "out", eight=eight)
    expected = [
        ("label0006.nii.gz", "label values 14 are not among"),
        ("label0021.nii.gz", "mm away from its image"),
        ("label0040.nii.gz", "has no image: add img0040.nii.gz"),
    ]
    assert_told(lines, expected)
    assert "ignored: 1 other files, such as" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="with Training in it"):
        synapse.prepare(part, tmp_path / "out")


def test_synapse_split_is_that_of_transunet_with_a_val_part_out_of_train():
    patients = common.read_splits(synapse.PACKAGED_SPLITS)
    test = "0008 0022 0038 0036 0032 0002 0029 0003 0001 0004 0025 0035".split()
    train = "0005 0006 0007 0009 0010 0021 0023 0024 0026 0027 0028 0030 0031 0033 0034 0037 0039 0040".split()
    assert sorted(patients["test"]) == sorted(test)
    assert sorted(patients["train"] + patients["val"]) == train
    assert all(number in synapse.__doc__ for number in patients["val"])


# --- The check of what was not prepared yet -------------------------------------------------------


def test_check_knows_both_modalities_of_mmwhs(hearts, tmp_path):
    ct, mr = check.check(hearts)
    assert (ct.kind, mr.kind) == ("MM-WHS, ct", "MM-WHS, mr") and len(ct.cases) == 5 and len(mr.cases) == 3
    assert check.report(hearts, ct)[1] == check.report(hearts, mr)[1] == 0
    write_nifti(hearts / "ct_train1" / "ct_train_1001_label.nii.gz", label_of(1, (0, 500, 422)))
    write_nifti(hearts / "ct_train1" / "ct_train_1009_label.nii.gz", label_of(1, HEART))
    ct, mr = check.check(hearts)
    told = [*ct.problems, *(line for fact in ct.facts for line in fact.problems)]
    assert told == problems_of(mmwhs.prepare, hearts, tmp_path / "out", "ct", tmp_path / "splits.json")
    assert len(told) == 2 and check.report(hearts, mr)[1] == 0


def test_check_knows_synapse_and_its_split(abdomens, tmp_path):
    (found,) = check.check(abdomens)
    assert found.kind == "Synapse" and check.report(abdomens, found)[1] == 0
    assert {patient: split for split, patient, *_ in found.cases} == {
        "0006": "train", "0021": "train", "0030": "train", "0061": "train", "0007": "val", "0008": "test",
    }  # fmt: skip
    write_nifti(abdomens / "RawData" / "Training" / "label" / "label0006.nii.gz", label_of(6, (0, 14)), THICK)
    (found,) = check.check(abdomens / "RawData")
    assert found.facts[0].problems == problems_of(synapse.prepare, abdomens, tmp_path / "out")


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [msd, mmwhs, synapse])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "--skip_bad" in told and "--no_test_images" in told


def test_main(task, hearts, abdomens, tmp_path):
    def arguments(folder, name, *options):
        return ["--input", str(folder), "--output", str(tmp_path / name), *options]

    msd.main(arguments(task, "a", "--window", "-100", "100", "--spacing", "3", "--orientation", "SPL"))
    recipe = open_prepared(tmp_path / "a").recipe
    assert (recipe.window, recipe.spacing) == ((-100.0, 100.0), (None, 3.0, 3.0))
    splits = str(tmp_path / "splits.json")
    mmwhs.main(arguments(hearts, "b", "--modality", "ct", "--splits", splits, "--window", "-100", "100"))
    assert open_prepared(tmp_path / "b").recipe.window == (-100.0, 100.0)
    synapse.main(arguments(abdomens, "c", "--eight", "--spacing", "3"))
    assert open_prepared(tmp_path / "c").recipe.spacing == (None, 3.0, 3.0)


@pytest.mark.parametrize("config", [msd_hippocampus, openkbp, mmwhs_config, synapse_config])
@pytest.mark.parametrize("method", base.METHODS)
def test_config(config, method):
    experiment.check_config(config.get_config(method))
