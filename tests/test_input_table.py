"""Input that people really have, each from a public report about a tool of this field, and what must happen.

Rows that other files test:

  prediction all zero, reference holds class 3      test_metrics: test_all_zero_prediction_and_diagonal_in_mm
  a class in no reference is n/a with n = 0         test_metrics: test_summary_by_hand, test_table
  a class that only the prediction has              test_metrics: test_rules_for_absent_classes
  two masks one thick slice apart; unit in the name test_metrics: test_masks_one_thick_slice_apart, test_table
  two balls, sampled twice                          test_metrics: test_distance_does_not_depend_on_the_sampling
  9 labelled of 8 patients                          test_sampling: test_impossible_numbers_of_patients
  who is labelled, masks of the others unread       test_training: test_labels_of_unlabelled_patients_change_no_bit
  label values {0, 1, 2, 4} there and back          test_recipe: test_labels_map_there_and_back
                                                    test_nifti: test_prediction_on_files
  an int16 header with a slope as reference         test_nifti: test_mask_keeps_geometry
                                                    test_nifti: test_mask_is_as_small_as_it_can_be
  affine, qform, sform, shape of a prediction       test_nifti: test_mask_keeps_geometry
  a cine scan at predict                            test_training: test_a_4d_scan_is_segmented_frame_by_frame
  a cine scan at prepare                            test_data_prep: test_acdc; test_check: test_acdc_is_shown_by_split
  a truncated .nii.gz                               test_data_prep: test_all_problems_are_told_at_once
  prepare killed half-way                           test_prepared:
                                                      test_killed_process_leaves_no_half_that_passes_for_whole
  NaN or infinite voxels                            test_data_prep: test_all_problems_are_told_at_once
                                                    test_nifti: test_non_finite_voxels_are_counted_and_located
  the faulty folder                                 test_check: test_real_faults_are_listed
"""

import csv
import json
import socket
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from conftest import tiny
from scipy.spatial.transform import Rotation

from data_prep import check, common, folder
from sscl_jax import augment, evaluate, losses, train
from sscl_jax.data import nifti
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.recipe import Recipe, make_grid, map_labels, prepare_image, prepare_label, unmap_labels
from sscl_jax.data.sampling import assign_roles, classes_held, patients_of_fraction, unpredicted

AXIAL = np.diag([-1.25, -1.25, 10.0, 1.0])
SHAPE = (12, 10, 3)
ALL_TRAIN = {"val_fraction": 0, "test_fraction": 0}


def write(path, array, affine=AXIAL):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(100, 20, shape).astype("f4")


def label(seed=0, shape=SHAPE, values=(0, 1, 2)):
    return np.random.default_rng(seed).choice(values, shape).astype("u1")


def write_pairs(base, names, shape=SHAPE):
    for number, name in enumerate(names):
        write(base / "images" / f"{name}.nii.gz", image(number, shape))
        write(base / "labels" / f"{name}.nii.gz", label(number, shape))
    return base


def problems_of(base, tmp_path, **options):
    with pytest.raises(common.Problems) as caught:
        folder.prepare(tmp_path / "out", base, **{**ALL_TRAIN, **options})
    return caught.value.lines


# --- Patients, splits, labelled subsets -----------------------------------------------------------


def test_a_fraction_is_of_patients_not_of_slices():
    def of(number):
        return SimpleNamespace(patients={"train": [f"p{i}" for i in range(number)]})

    assert [patients_of_fraction(of(20), f) for f in (0.05, 0.01, 0.5, 1.0)] == [1, 1, 10, 20]
    # The subsets of the literature: of 70 patients of ACDC and 80 of the left atrium.
    assert [patients_of_fraction(of(70), f) for f in (0.05, 0.1)] == [3, 7]
    assert [patients_of_fraction(of(80), f) for f in (0.05, 0.1, 0.2)] == [4, 8, 16]
    assert patients_of_fraction(of(100), 0.29) == 29  # 0.29 * 100 is a little less in binary


def test_five_labelled_of_eight_patients():
    cases = [SimpleNamespace(split="train", patient_id=f"p{i // 2}", has_label=True, index=i) for i in range(16)]
    dataset = SimpleNamespace(name="toy", cases=cases, patients={"train": [f"p{i}" for i in range(8)]})
    roles = assign_roles(dataset, 5)
    assert {c.patient_id for c in roles.labeled} == {"p0", "p1", "p2", "p3", "p4"} and len(roles.unlabeled) == 6
    with pytest.raises(ValueError, match=r"labeled_patients=9: .*choose 1 to 8"):
        assign_roles(dataset, 9)


def test_val_list_equal_to_test_list_is_refused(tmp_path):
    ids = ["p4", "p5", "p6"]
    (tmp_path / "s.json").write_text(json.dumps({"train": ["p1"], "val": ids, "test": ids}))
    with pytest.raises(common.Problems) as caught:
        common.read_splits(tmp_path / "s.json")
    assert [line.split(": ")[1] for line in caught.value.lines] == [
        f"patient {p} is listed under val and test" for p in ids
    ]


def test_a_table_says_what_it_measured():
    network = SimpleNamespace(
        name="teacher", path=Path("runs/a/checkpoints/best/300"), config=SimpleNamespace(method="region", seed=4)
    )
    cases = [SimpleNamespace(case_id=name) for name in ("p4_1", "p5_1")]
    text = evaluate.heading(network, "test", cases)
    for part in (
        "test",
        "teacher",
        "step 300",
        "region",
        "seed 4",
        "runs/a/checkpoints/best/300",
        "2 cases: p4_1, p5_1",
    ):
        assert part in text


def test_frames_of_a_patient_stay_together_and_that_is_told(tmp_path, capsys):
    names = [f"p{number:02d}_{frame}" for number in range(8, 20) for frame in (0, 1)] + ["p23_0"]
    base = write_pairs(tmp_path / "in", names, (6, 5, 2))
    dataset = folder.prepare(tmp_path / "out", base, val_fraction=0.4, test_fraction=0.0, seed=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: by their names")]
    assert "25 images are of 13 patients: p08_0, p08_1 are kept together as p08" in line
    assert folder.PATIENT_NAME in line and "'(.*)'" in line
    assert {c.patient_id for c in dataset.cases} == {name.split("_")[0] for name in names}
    assert dataset.patients["val"] and all(c.patient_id in dataset.patients[c.split] for c in dataset.cases)
    # The pattern that is named does the same, without a word; and the other one makes each its own.
    again = folder.prepare(
        tmp_path / "again", base, val_fraction=0.4, test_fraction=0.0, seed=1, patient_pattern=folder.PATIENT_NAME
    )
    assert again.fingerprint == dataset.fingerprint
    assert "by their names" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (["p08_0", "p08_1", "p09_0"], ["p08", "p08", "p09"]),
        (
            ["patient001_frame01", "patient001_frame12", "patient002_frame01"],
            ["patient001", "patient001", "patient002"],
        ),
        (["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_ses-1_T1w"], ["sub-01", "sub-01", "sub-02"]),
        (["img1", "img2", "img3"], None),
        (["hippocampus_001", "hippocampus_003"], None),
        (["la2018_001", "la2018_002"], None),  # one patient with all scans is no reading of these
        (["p08a", "p08b"], None),
        (["a", "b"], None),
    ],
)
def test_what_names_say_of_patients(names, patients):
    scans, told = folder.join_patients([folder.Scan(name, Path(name), None) for name in names])
    assert [scan.patient for scan in scans] == (patients or [""] * len(names))
    (line,) = told
    assert ("are kept together as" if patients else "each of the ") in line and "--patient_pattern" in line


def test_a_split_file_may_name_images_and_one_patient_in_two_parts_is_named(tmp_path):
    base = write_pairs(tmp_path / "in", ["p08_0", "p08_1", "p09_0", "p23_0"], (6, 5, 2))
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"train": ["p08", "p23"], "val": ["p09", "p23"]}))
    with pytest.raises(ValueError, match="patient p23 is listed under train and val"):
        folder.prepare(tmp_path / "out", base, splits=file)
    file.write_text(json.dumps({"train": ["p08_0", "p08_1"], "val": ["p09_0"]}))
    dataset = folder.prepare(tmp_path / "out", base, splits=file)
    assert dataset.patients == {"train": ["p08_0", "p08_1"], "val": ["p09_0"], "test": []}


def test_a_split_file_that_lists_patients_is_understood_whatever_one_image_is_called(tmp_path):
    base = write_pairs(tmp_path / "in", ["p01", "p02_0", "p02_1", "p03", "p05_0", "p05_1"], (6, 5, 2))
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"train": ["p01", "p02"], "val": ["p03"], "test": ["p05"]}))
    dataset = folder.prepare(tmp_path / "out", base, splits=file)
    assert dataset.patients == {"train": ["p01", "p02"], "val": ["p03"], "test": ["p05"]} and len(dataset.cases) == 6


def test_images_for_four_cases_and_labels_for_two(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b", "c", "d"])
    for name in ("b", "d"):
        (base / "labels" / f"{name}.nii.gz").unlink()
    dataset = folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    assert {c.case_id: c.has_label for c in dataset.cases} == {"a": True, "b": False, "c": True, "d": False}
    roles = assign_roles(dataset, -1)
    assert {c.case_id for c in roles.labeled} == {"a", "c"} and {c.case_id for c in roles.unlabeled} == {"b", "d"}
    for path in [*base.rglob("*.nii.gz"), *dataset.path.glob("*.array_record*")]:
        path.unlink()  # nobody comes back for them
    again = open_prepared(dataset.path)
    assert classes_held(again, assign_roles(again, -1).labeled) == {"a": {1, 2}, "c": {1, 2}}
    with pytest.raises(ValueError, match="has no label"):
        again.label(next(c.index for c in again.cases if c.case_id == "b"))


# --- A training -----------------------------------------------------------------------------------


def test_one_labelled_patient_an_empty_label_and_nothing_but_background(tmp_path, capsys, monkeypatch):
    """20 patients x 2 frames of unequal length, 5 % of them labelled; val every 10 steps, from scratch."""
    base = tmp_path / "in"
    names = [f"p{number:02d}_{frame}" for number in range(20) for frame in (0, 1)] + ["v1_0", "v2_0"]
    for number, name in enumerate(names):
        shape = (16, 16, 3 + 2 * int(name[-1]))
        empty = name in ("p00_1", "v2_0")
        write(base / "images" / f"{name}.nii.gz", image(number, shape))
        write(base / "labels" / f"{name}.nii.gz", np.zeros(shape, "u1") if empty else label(number, shape))
    splits = {"train": [f"p{number:02d}" for number in range(20)], "val": ["v1", "v2"]}
    (tmp_path / "s.json").write_text(json.dumps(splits))
    folder.prepare(tmp_path / "data", base, splits=tmp_path / "s.json", patient_pattern="(.*)_")
    told = capsys.readouterr().out
    assert [line.split()[-3:] for line in told.splitlines() if "empty mask" in line] == [["1", "1", "0"]]
    assert sum("the mask is empty" in line for line in told.splitlines()) == 2

    fields = {
        "data.labeled_fraction": 0.05, "data.patch_size": (16, 16), "model.widths": (4, 8), "contrast.level": 1,
        "steps": 30, "eval.every": 10,
    }  # fmt: skip
    config = tiny(tmp_path / "data", "supervised", **fields)
    background = lambda *_: lambda variables, image: np.eye(3, dtype="f4")[np.zeros(image.shape[:3], int)]  # noqa: E731
    monkeypatch.setattr(evaluate, "make_predictor", background)
    monkeypatch.setattr(train, "_final_tables", lambda *_: {})
    train.train(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "labelled    1 patients, 2 cases, 8 slices: p00\n" in told
    assert "unlabelled  19 patients, 38 cases, 152 slices" in told
    assert "label 1: in 1 of 2 labelled cases, 1 of 2 val cases" in told
    assert "empty label (labelled): p00_1\n" in told and "empty label (val): v2_0\n" in told
    for name in ("label 1", "label 2"):
        assert f"warning: step 30: in 3 evaluations in a row the teacher has predicted no {name}" in told
    assert told.count("evaluations in a row") == 2
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["val_dice"])) for row in rows] == [(10, 0.0), (20, 0.0), (30, 0.0)]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
    # What is kept and shown is the number of patients that the fraction made.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["labeled_patients"] == 1


def test_evaluations_without_a_class_are_counted_in_a_row():
    counts = {}
    for predicted, expected in [
        ({0, 1, 2}, {"3": 1}),
        ({0, 1}, {"2": 1, "3": 2}),
        ({0, 1, 3}, {"2": 2}),
        ({0, 1}, {"2": 3, "3": 1}),
        ({0, 1, 2, 3, 4}, {}),
    ]:
        counts = unpredicted(counts, {1, 2, 3}, predicted)
        assert counts == expected


def test_a_class_that_is_vanishing_is_told_every_third_time(capsys):
    for times in range(1, 8):
        train._tell_unpredicted({"2": times}, ("background", "a", "b"), "student", 10 * times)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["step 30", "step 60"]
    assert "the student has predicted no b in any val case" in lines[0]


def test_a_class_missing_from_a_fold_is_told_before_anything_is_trained(tmp_path, capsys):
    base = write_pairs(tmp_path / "in", ["a", "b", "c"])
    for name in ("a", "b"):
        write(base / "labels" / f"{name}.nii.gz", label(values=(0, 1)))
    (tmp_path / "s.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"]}))
    dataset = folder.prepare(tmp_path / "out", base, splits=tmp_path / "s.json")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in told if line.startswith("cases with label 2")] == [["0", "1", "0"]]
    assert [line for line in told if line.startswith("warning: class label 2 (label value 2) is in no train mask")]
    roles = assign_roles(dataset, 1)
    train._describe_classes(dataset.recipe.class_names, roles, classes_held(dataset, roles.labeled + roles.val))
    told = capsys.readouterr().out
    assert "label 2: in 0 of 1 labelled cases, 1 of 1 val cases" in told
    assert "warning: no labelled case holds label 2" in told and "holds label 1" not in told


# --- Labels ---------------------------------------------------------------------------------------


def test_float_labels_with_a_gap_are_mapped_and_come_back(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    values = np.random.default_rng(0).choice([0, 2, 3, 4, 5], SHAPE)
    write(base / "labels" / "a.nii.gz", values.astype("f4"))
    dataset = folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    assert dataset.recipe.label_values == (0, 2, 3, 4, 5)
    classes = dataset.native_label(0)
    assert classes.max() == 4
    back = unmap_labels(classes, open_prepared(tmp_path / "out").recipe.label_values)
    np.testing.assert_array_equal(back, values)
    assert back.dtype.kind == "u"


def test_an_intensity_image_is_no_label(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    write(base / "labels" / "a.nii.gz", np.linspace(-1024, 1000, 360).reshape(SHAPE).astype("i2"))
    (line,) = problems_of(base, tmp_path)
    assert "labels/a.nii.gz: labels must lie in" in line and "-1024" in line and "is this an image?" in line


def test_mmwhs_values_rotated_and_resampled_stay_what_they_are():
    values = (0, 500, 600, 420, 550, 205, 820, 850)
    recipe = Recipe(spacing=(1.3, 0.7, 1.9), label_values=values, class_names=tuple(map(str, values)))
    scan = np.random.default_rng(0).choice(values, (9, 8, 7)).repeat(2, 0).repeat(2, 1).repeat(2, 2).astype("u2")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([-0.9, 1.1, 1.6])
    prepared = prepare_label(scan, make_grid(scan.shape, affine, recipe), recipe)
    assert prepared.shape != scan.shape and set(np.unique(prepared)) <= set(range(8))
    assert set(np.unique(unmap_labels(prepared, values))) <= set(values)
    # And once more where a training rotates.
    coords = augment.random_coordinates(
        jax.random.key(0), shape=prepared.shape[1:], extent=jnp.array(prepared.shape[1:], jnp.float32), patch=(16, 16),
        rotate=40.0, scale=(0.7, 1.3), shear=0.2, elastic=2.0, flip=(True, True), spread=1.0,
    )  # fmt: skip
    slices = [np.asarray(augment.resample_labels(jnp.asarray(plane), coords)) for plane in prepared]
    assert set(np.unique(unmap_labels(np.stack(slices), values))) <= set(values)
    with pytest.raises(ValueError, match=r"unknown label values \[421\]"):
        map_labels(np.where(scan == 420, 421, scan), values)


def test_a_label_beyond_the_classes_is_caught_on_the_host(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    write(base / "labels" / "b.nii.gz", label(1, values=(0, 1, 2, 3)))
    (line,) = problems_of(base, tmp_path, label_values=(0, 1, 2))
    assert "labels/b.nii.gz: label values 3 are not among 0, 1, 2" in line
    # And in a cache that somebody touched: jax would clamp the index and say nothing.
    dataset = folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    flat = np.fromfile(dataset.path / "cache" / "labels.u8", "u1")
    flat[7] = 4
    flat.tofile(dataset.path / "cache" / "labels.u8")
    with pytest.raises(ValueError, match=r"case [ab]: its label has class 4, but the classes are 0 to 3"):
        train.train(tiny(dataset.path, "supervised", **{"data.labeled_patients": -1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_image_and_label_of_different_shape_stop_with_both_shapes(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    write(base / "labels" / "b.nii.gz", label(shape=(12, 10, 4)))
    (line,) = problems_of(base, tmp_path)
    assert "labels/b.nii.gz" in line and "(12, 10, 4)" in line and "images/b.nii.gz" in line and "(12, 10, 3)" in line


# --- Images ---------------------------------------------------------------------------------------


def test_a_shear_of_a_thousandth_is_told_and_goes_on(tmp_path, capsys):
    affine = AXIAL.copy()
    affine[:3, 1] += 1e-3 * affine[:3, 0]
    base = tmp_path / "in"
    write(base / "images" / "a.nii.gz", image(), affine)
    write(base / "labels" / "a.nii.gz", label(), affine)
    with pytest.warns(UserWarning, match=r"a\.nii\.gz: the affine is sheared"):
        dataset = folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert (
        len(lines) == 1
        and "images/a.nii.gz: the affine is sheared (axes off a right angle by 0.057 degrees)" in lines[0]
    )
    np.testing.assert_allclose(dataset.cases[0].grid.native_affine, affine, atol=1e-6)
    # What a header in float32 loses by rounding is no shear.
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -10, 35), degrees=True).as_matrix() @ np.diag([-1.25, 1.25, 10])
    nifti.read_image(write(tmp_path / "oblique.nii", image(), affine.round(4)))


def test_colour_is_never_taken_for_time(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (16, 16, 4, 3)).astype("u1")
    path = write(tmp_path / "photo.nii", frames)
    for channels in (False, True):  # True is how `predict` asks for the frames of a cine scan
        with pytest.raises(ValueError, match=r"photo\.nii: shape \(16, 16, 4, 3\) of uint8 looks like an RGB"):
            nifti.read_image(path, channels=channels)
    with pytest.raises(ValueError, match="4-D"):
        nifti.read_label(path)
    assert nifti.read_image(write(tmp_path / "cine.nii", frames.astype("i2")), channels=True)[0].shape == (16, 16, 4, 3)
    structured = np.zeros((16, 16, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for read in (nifti.read_image, nifti.read_label):
        with pytest.raises(ValueError, match="is an RGB colour image; convert it to one number per voxel"):
            read(write(tmp_path / "rgb.nii", structured))


def test_losses_are_finite_and_in_float32_whatever_comes(tmp_path):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], jnp.bfloat16)
    labels = jnp.array([1, 0, 2])
    probs = jax.nn.softmax(logits)
    assert probs.dtype == jnp.bfloat16
    results = [
        losses.cross_entropy(logits, labels),
        losses.rescuing_dice_loss(losses.soft_dice(losses.dice_sums(probs, labels, jnp.ones(3)))),
        losses.squared_difference(probs, probs[::-1]),
    ]
    for result in results:
        assert result.dtype == jnp.float32 and jnp.isfinite(result).all()
    # bfloat16 has no 1001.
    ones = jnp.ones((1001, 1), jnp.bfloat16)
    assert losses.dice_sums(ones, jnp.zeros(1001, int), jnp.ones(1001)).tolist() == [[1001.0], [2002.0]]


CT = Recipe(
    spacing=(None, None, None), intensity="ct", window=(-160, 240), label_values=(0, 1), class_names=("background", "a")
)


def test_ct_beyond_the_scale_is_clipped_by_the_recipe_and_alike_at_predict():
    scan = np.linspace(-2000, 1e4, 360).reshape(*SHAPE, 1).astype("f4")
    recipe = Recipe.from_dict(json.loads(json.dumps(CT.to_dict())))  # as it lies in a checkpoint
    prepared = prepare_image(scan, make_grid(SHAPE, AXIAL, recipe), recipe)
    assert prepared.dtype == np.float32 and prepared.min() == -1 and prepared.max() == 1
    clipped = prepare_image(scan.clip(-160, 240), make_grid(SHAPE, AXIAL, CT), CT)
    np.testing.assert_array_equal(prepared, clipped)
    np.testing.assert_allclose(
        np.sort(prepared.ravel()), np.clip((np.sort(scan.ravel()) + 160) / 200 - 1, -1, 1), atol=1e-5
    )


class Threshold:
    """A network that calls bright what is bright."""

    num_classes = 2

    def apply(self, variables, images):
        return jnp.concatenate([-images, images], axis=-1), None


@pytest.mark.parametrize(
    ("shape", "patch"), [((45, 37, 4), (32, 32)), ((12, 12, 3), (32, 32)), ((12, 12, 3), (32, 32, 32))]
)
def test_odd_sizes_are_padded_predicted_and_cropped_back(shape, patch):
    scan = np.random.default_rng(0).uniform(-200, 280, (*shape, 1)).astype("f4")
    grid = make_grid(shape, AXIAL, CT)
    predict = evaluate.make_predictor(Threshold(), patch, overlap=0.5, batch=4)
    mask, _ = evaluate.segment(predict, None, prepare_image(scan, grid, CT), grid, CT, largest_component="none")
    assert mask.shape == shape
    np.testing.assert_array_equal(mask, scan[..., 0] > 40)


def test_a_folder_of_nifti_without_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    dataset = folder.prepare(tmp_path / "out", write_pairs(tmp_path / "in", ["a", "b"]), **ALL_TRAIN)
    assert len(dataset.cases) == 2 and dataset.label(0).max() == 2


# --- Lists, names and headers ---------------------------------------------------------------------


def write_csv(base, text, encoding="utf-8", name="list.csv"):
    (base / name).write_bytes(text.encode(encoding))
    return base / name


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("image,label,split\r\nimages/a.nii.gz,labels/a.nii.gz,train\r\nimages/b.nii.gz,,val\r\n", "utf-8-sig"),
        ("Image; Label; Split\nimages/a.nii.gz; labels/a.nii.gz; train\n\nimages/b.nii.gz; ; val\n;;\n", "utf-8"),
        ("image\tlabel\tsplit\rimages\\a.nii.gz\tlabels\\a.nii.gz\ttrain\rimages\\b.nii.gz\t\tval", "utf-8"),
        ("image,label,split,,\nimages/a.nii.gz,labels/a.nii.gz,train,,\nimages/b.nii.gz,,val,,\n", "utf-8"),
    ],
)
def test_lists_as_spreadsheets_write_them(tmp_path, text, encoding):
    base = write_pairs(tmp_path, ["a", "b"])
    scans, problems = folder.list_csv(write_csv(base, text, encoding))
    assert problems == []
    assert [(scan.case_id, scan.split) for scan in scans] == [("images_a", "train"), ("images_b", "val")]
    assert scans[0].image.samefile(base / "images" / "a.nii.gz")
    assert scans[0].label.samefile(base / "labels" / "a.nii.gz") and scans[1].label is None


def test_a_patient_whose_accents_are_written_in_two_ways_is_one(tmp_path):
    one, other = "Zo\u00eb", "Zoe\u0308"
    base = write_pairs(tmp_path, ["a", "b", "c"])
    lines = [
        f"images/{name}.nii.gz,labels/{name}.nii.gz,{patient}"
        for name, patient in zip("abc", (one, other, "x"), strict=True)
    ]
    scans, _ = folder.list_csv(write_csv(base, "\n".join(["image,label,patient", *lines])))
    assert [scan.patient for scan in scans] == [one, one, "x"]
    (tmp_path / "splits.json").write_text(json.dumps({"train": [other], "val": ["x"]}))
    assert common.read_splits(tmp_path / "splits.json")["train"] == [one]
    (tmp_path / "splits.json").write_text(json.dumps({"train": [other], "val": [one]}))
    with pytest.raises(common.Problems, match="is listed under train and val"):
        common.read_splits(tmp_path / "splits.json")


def test_a_name_that_is_too_long_for_the_files_made_of_it_is_told(tmp_path):
    names = [letter * 70 for letter in "abc"]
    write_pairs(tmp_path.joinpath(*names), ["e"])
    text = f"image,label\n{'/'.join(names)}/images/e.nii.gz,{'/'.join(names)}/labels/e.nii.gz\n"
    with pytest.raises(common.Problems, match="is longer than 200 bytes, too long for the files that are made of it"):
        folder.prepare(tmp_path / "out", csv_file=write_csv(tmp_path, text), **ALL_TRAIN)


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("image,patient\na.nii.gz,Müller\n", "latin-1", r"list\.csv is not UTF-8 .*: save it as CSV UTF-8"),
        ("image,label\na.nii.gz,\n", "utf-16", "is not UTF-8"),
        ("image,image\na.nii.gz,b.nii.gz\n", "utf-8", "has the columns image, image: name them"),
        ("a.nii.gz,b.nii.gz\n", "utf-8", r"has the columns a\.nii\.gz, b\.nii\.gz: name them"),
        ("", "utf-8", "has the columns : name them"),
        ("image,label\n", "utf-8", "lists no image: give one"),
    ],
)
def test_lists_that_cannot_be_read_are_named(tmp_path, text, encoding, message):
    with pytest.raises(ValueError, match=message):
        folder.prepare(tmp_path / "out", csv_file=write_csv(tmp_path, text, encoding))


def test_lines_of_a_list_that_cannot_be(tmp_path):
    base = write_pairs(tmp_path, ["a", "b"])
    lines = [
        "image,label",
        "images/a.nii.gz,labels/a.nii.gz",
        f"{base}/images/a.nii.gz,labels/b.nii.gz",
        "images_a.nii.gz,",
        "images/a, second.nii.gz,labels/a.nii.gz",
    ]
    scans, problems = folder.list_csv(write_csv(base, "\n".join(lines)))
    assert [scan.case_id for scan in scans] == ["images_a"] and len(problems) == 3
    for number, line in zip((3, 4), problems, strict=False):
        assert f"line {number}: is the same image as line 2, or would have the same name" in line
    assert "line 5: has more than 2 cells: put quotes around a path with a comma" in problems[2]


def test_a_mask_in_two_files_of_one_name_is_not_chosen_silently(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    write(base / "labels" / "a.nii", label(5))
    (line,) = problems_of(base, tmp_path)
    assert "labels/a.nii.gz: has the name of" in line and "labels/a.nii: remove one of them" in line
    plain = tmp_path / "plain"
    for name in ("s.nii", "s.nii.gz", "s_seg.nii", "s_seg.nii.gz"):
        write(plain / name, label())
    (found,) = check.check(plain)
    assert [line.split(": ")[0] for line in found.problems] == [str(plain / "s.nii.gz"), str(plain / "s_seg.nii.gz")]


def test_one_mask_of_two_images_and_names_that_differ_in_case_are_told(tmp_path):
    base = write_pairs(tmp_path, ["a", "b"])
    text = (
        "image,label,patient,split\nimages/a.nii.gz,labels/a.nii.gz,P1,train\nimages/b.nii.gz,labels/a.nii.gz,p1,val\n"
    )
    (found,) = check.check(write_csv(base, text))
    mask, name = found.facts[1].warnings
    assert "labels/a.nii.gz: is the mask of" in mask and "images/b.nii.gz and of" in mask
    assert "images/b.nii.gz: patients P1 and p1 count as two: if they are one, write them alike" in name


def test_a_folder_without_masks_or_images_says_so(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    (base / "labels").rename(base / "masks")
    with pytest.raises(ValueError, match="no mask holds a value other than 0, and 2 of 2 images have no mask"):
        folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: lists no image"):
        folder.prepare(tmp_path / "out", tmp_path / "empty")


def test_voxel_sizes_that_no_scan_has_are_told(tmp_path):
    for scale in (1e-3, 1e3):
        affine = AXIAL @ np.diag([scale, scale, scale, 1])
        write(tmp_path / "images" / "a.nii.gz", image(), affine)
        write(tmp_path / "labels" / "a.nii.gz", label(), affine)
        (found,) = check.check(tmp_path)
        (line,) = found.facts[0].warnings
        assert "images/a.nii.gz: its voxels are" in line and "their unit" in line


def test_a_split_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "s.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"train": ["a"]}).encode())
    assert common.read_splits(tmp_path / "s.json")["train"] == ["a"]


def test_an_image_that_is_its_mask(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    (base / "images" / "a.nii.gz").write_bytes((base / "labels" / "a.nii.gz").read_bytes())
    (line,) = problems_of(base, tmp_path)
    assert "labels/a.nii.gz: has the voxels of its image" in line


def test_names_with_accents_pair_however_they_are_spelled(tmp_path):
    base = write_pairs(tmp_path, ["a"])
    for part, form in (("images", "NFC"), ("labels", "NFD")):
        (base / part / "a.nii.gz").rename(base / part / f"{unicodedata.normalize(form, 'é')}.nii.gz")
    ((scan,), problems) = folder.list_folder(base)
    assert scan.label is not None and scan.label.is_file() and not problems


def test_scans_that_are_not_taken_are_no_matter_of_a_remark(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    nibabel.save(nibabel.Nifti1Pair(image(1), AXIAL), base / "images" / "b.img")
    write(base / "images" / "p3" / "t1" / "c.nii.gz", image(2))
    (base / "images" / "notes.txt").write_text("x")
    (base / "images" / "empty").mkdir()
    lines = problems_of(base, tmp_path)
    for name, text in (("b.hdr", "convert it to .nii.gz"), ("b.img", "convert it to .nii.gz"), ("p3", "move them up")):
        assert sum(f"images/{name}: is a" in line and text in line for line in lines) == 1, name
    assert len(lines) == 3
    assert [path.name for path in folder.other_files(base)] == ["empty", "notes.txt"]


# --- What hospitals have --------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["_seg.nii.gz", "_gt.nii.gz", ".seg.nrrd"])
def test_masks_whose_names_say_that_they_are(tmp_path, ending):
    base = write_pairs(tmp_path / "in", ["a_0000", "b"])
    for name, seed in (("a", 0), ("b", 1)):
        (base / "labels" / f"{'a_0000' if name == 'a' else name}.nii.gz").unlink()
        path = base / "labels" / f"{name}{ending}"
        if ending.endswith(".nrrd"):
            sitk = pytest.importorskip("SimpleITK")
            mask = sitk.GetImageFromArray(label(seed).T)
            mask.SetSpacing((1.25, 1.25, 10.0))
            sitk.WriteImage(mask, str(path))
        else:
            write(path, label(seed))
    dataset = folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    for case in dataset.cases:
        seed = ["a", "b"].index(case.case_id)
        np.testing.assert_array_equal(dataset.native_label(case.index), label(seed))


def test_two_masks_of_an_image_are_not_chosen_silently(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    write(base / "labels" / "a_seg.nii.gz", label(3))
    (line,) = problems_of(base, tmp_path)
    assert "a_seg.nii.gz: has no image of that name" in line


def test_a_mask_turned_against_its_image_names_both_directions(tmp_path):
    base = write_pairs(tmp_path / "in", ["a"])
    mask = base / "labels" / "a.nii.gz"
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(mask)), mask)
    (line,) = problems_of(base, tmp_path)
    assert "(its axes run RAS, those of the image LPS)" in line


def test_a_split_file_with_other_names_shows_both(tmp_path):
    base = write_pairs(tmp_path / "in", ["p01_a", "p02_a"])
    (tmp_path / "s.json").write_text(json.dumps({"train": ["P01", "P02"]}))
    with pytest.raises(ValueError, match=r"\(P01, P02\) is in the input \(p01_a, p02_a\)"):
        folder.prepare(tmp_path / "out", base, splits=tmp_path / "s.json")


def test_a_workbook_is_no_list(tmp_path):
    (tmp_path / "list.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"list.xlsx: is no list that is known: save it as CSV"):
        check.check(tmp_path / "list.xlsx")


def test_a_folder_with_the_name_of_a_scan(tmp_path):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    (base / "images" / "a.nii.gz").rename(tmp_path / "a.nii.gz")
    (base / "images" / "a.nii.gz").mkdir()
    lines = problems_of(base, tmp_path)
    assert any("a.nii.gz: a folder, and no DICOM file there; give a file" in line for line in lines)


def test_a_header_without_directions_is_told(tmp_path, capsys):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    nibabel.save(nibabel.Nifti1Image(image(), None), base / "images" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label(), None), base / "labels" / "a.nii.gz")
    folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "directions" in line]
    assert "a.nii.gz: its header gives no directions" in line and "axes LAS and voxels of 1 x 1 x 1 mm" in line


def test_masks_that_hold_no_background_are_told(tmp_path, capsys):
    base = write_pairs(tmp_path / "in", ["a", "b"])
    folder.prepare(tmp_path / "out", base, **ALL_TRAIN)
    assert "holds background" not in capsys.readouterr().out
    for name in ("a", "b"):
        write(base / "labels" / f"{name}.nii.gz", label(values=(1, 2)))
    folder.prepare(tmp_path / "other", base, **ALL_TRAIN)
    assert "no train mask holds background (label value 0)" in capsys.readouterr().out


def test_ct_taken_for_mr_and_mr_for_ct_are_told(tmp_path, capsys):
    base = write_pairs(tmp_path / "in", ["a", "b", "c"])
    ct = image()
    ct[0] = -1000
    write(base / "images" / "b.nii.gz", ct)
    for modality, expected in (
        ("mr", "1 of 3 images reach below -500, as CT in HU does, and are taken as MR: give --modality=ct"),
        ("ct", "2 of 3 images hold nothing below 0, as CT in HU does"),
    ):
        folder.prepare(tmp_path / modality, base, modality=modality, **ALL_TRAIN)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "CT in HU" in line]
        assert expected in line and ("b.nii.gz" in line) == (modality == "mr")
