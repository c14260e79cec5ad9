import csv
import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sscl_jax import compare, evaluate, metrics


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.9))
def test_windows_cover_with_the_overlap_asked_for(size, patch, overlap):
    starts = evaluate.window_starts(size, patch, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - patch)
    steps = np.diff(starts)
    assert (steps > 0).all()
    # Starts are rounded to whole pixels, so a step may exceed the exact one by less than one.
    assert (steps < patch * (1 - overlap) + 1).all() and (steps <= patch).all()


class Pointwise:
    """A network whose logits depend on each pixel alone, so that windows cannot matter."""

    num_classes = 3

    def apply(self, variables, images):
        x = images * variables
        return jnp.concatenate([x, 0.5 - x, x * x], axis=-1), None


@pytest.mark.parametrize(("patch", "shape"), [((8, 6), (3, 21, 5)), ((8, 6), (1, 8, 6)), ((4, 8, 6), (3, 21, 13))])
def test_sliding_window_of_a_pointwise_network_is_the_network(patch, shape):
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    logits = 2 * image
    logits = np.concatenate([logits, 0.5 - logits, logits**2], axis=-1)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = evaluate.make_predictor(Pointwise(), patch, overlap=0.5, batch=4)(2.0, image)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_gaussian_window_is_separable_and_greatest_in_the_centre():
    weights = evaluate.gaussian_window((9, 5))
    assert weights.shape == (9, 5) and np.argmax(weights) == 4 * 5 + 2 and weights.min() > 0
    single = np.zeros(9)
    single[4] = 1
    profile = ndimage.gaussian_filter1d(single, 9 / 8, mode="constant", truncate=10)
    np.testing.assert_allclose(weights[:, 2], np.maximum(profile / profile.max(), 1e-3), rtol=2e-2)


def test_largest_component_by_hand():
    classes = np.zeros((9, 6, 2), np.uint8)
    classes[:3, :3] = 1
    classes[3, 3, 1] = 2  # touches class 1 at a corner
    classes[2, 5, 0] = 1  # an island
    classes[6:, :2] = 2  # a larger part of class 2, but not in the organ
    expected = classes.copy()
    expected[2, 5, 0] = 0
    expected[6:] = 0
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes), expected)
    classes[:3, :3, 0] = 2  # now the organ's class 2 has 9 voxels there, and one elsewhere that touches only class 1
    classes[3, 3, 1] = 1
    classes[4, 4, 1] = 2
    expected = np.zeros_like(classes)
    expected[:3, :3, 0], expected[:3, :3, 1], expected[3, 3, 1] = 2, 1, 1
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes), expected)
    nothing = np.zeros((3, 3, 3), np.uint8)
    np.testing.assert_array_equal(evaluate.keep_largest_component(nothing), nothing)


def write(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([1.5, 2, 8, 1]) if affine is None else affine), path)


@pytest.fixture
def masks(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write(tmp_path / "p" / f"{name}.nii.gz", rng.choice([0, 2, 5], (6, 7, 4)))
        write(tmp_path / "r" / f"{name}_gt.nii.gz", rng.choice([0, 2, 5], (6, 7, 4)))
    return tmp_path


def test_folders_are_measured_by_voxel_size_and_label_value(masks):
    names, classes, results = evaluate.evaluate_folders(masks / "p", masks / "r")
    assert names == ["a", "b"] and classes == ["0", "2", "5"]
    for name, result in zip(names, results, strict=True):
        load = [np.asarray(nib.load(masks / f).dataobj) for f in (f"p/{name}.nii.gz", f"r/{name}_gt.nii.gz")]
        p, r = (np.searchsorted([0, 2, 5], array) for array in load)
        expected = metrics.case_metrics(p, r, 3, (1.5, 2, 8))
        for field in ("dice", "hd95", "assd"):
            np.testing.assert_allclose(getattr(result, field), getattr(expected, field))


def test_a_mask_without_partner_is_an_error(masks):
    (masks / "p" / "b.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"b_gt\.nii\.gz.*no prediction"):
        evaluate.evaluate_folders(masks / "p", masks / "r")
    write(masks / "p" / "b.nii.gz", np.zeros((6, 7, 4)))
    write(masks / "p" / "c.nii.gz", np.zeros((6, 7, 4)))
    with pytest.raises(FileNotFoundError, match=r"c\.nii\.gz.*no reference"):
        evaluate.evaluate_folders(masks / "p", masks / "r")


def test_masks_on_other_grids_are_an_error(masks):
    write(masks / "p" / "a.nii.gz", np.ones((6, 7, 5)))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: shape"):
        evaluate.evaluate_folders(masks / "p", masks / "r")
    write(masks / "p" / "a.nii.gz", np.ones((6, 7, 4)), np.diag([1.5, 2, 9, 1]))
    with pytest.raises(ValueError, match=r"a\.nii\.gz.*not the same grid"):
        evaluate.evaluate_folders(masks / "p", masks / "r")


def test_empty_folders_and_masks_are_an_error(tmp_path, masks):
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        evaluate.evaluate_folders(tmp_path / "none", masks / "r")
    for folder, name in (("p2", "a"), ("r2", "a")):
        write(tmp_path / folder / f"{name}.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="empty"):
        evaluate.evaluate_folders(tmp_path / "p2", tmp_path / "r2")


def run_table(workdir, dice):
    """A finished training's case table; `dice` is {(case, class): value or None where it does not count}."""
    workdir.mkdir()
    with open(workdir / "val_cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(evaluate.CASE_COLUMNS)
        for (case, name), value in dice.items():
            numbers = ["nan"] * 4 if value is None else [value, value, 3.0, 1.0]
            writer.writerow(["teacher", case, case, name, *numbers, int(value is not None), 0])
    config = {"method": workdir.name, "seed": 0, "data": {"labeled_patients": 2}}
    (workdir / "config.json").write_text(json.dumps(config))


def test_comparison_by_hand(tmp_path):
    run_table(tmp_path / "one", {("a", "x"): 0.5, ("a", "y"): 0.7, ("b", "x"): 0.9, ("b", "y"): None})
    run_table(tmp_path / "two", {("a", "x"): 0.6, ("a", "y"): 0.8, ("b", "x"): 0.8, ("b", "y"): None})
    one, two = (compare.read_cases(tmp_path / name, "val", "teacher") for name in ("one", "two"))
    assert compare.class_mean(one, "dice") == pytest.approx((0.7 + 0.7) / 2)
    mean, std, n, p = compare.paired(one, two)
    assert (mean, std, n) == (pytest.approx(0.0), pytest.approx(0.1), 2)
    assert p == pytest.approx(1.0)
    table = compare.compare([tmp_path / "one", tmp_path / "two"], "val", "teacher")
    assert "70.00" in table and "75.00" in table and "n = 2" in table
    with pytest.raises(FileNotFoundError, match="test_cases"):
        compare.read_cases(tmp_path / "one", "test", "teacher")
