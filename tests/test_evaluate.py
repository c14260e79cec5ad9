import contextlib
import csv
import gzip
import json
import shutil
import struct
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sscl_jax import compare, evaluate, metrics
from sscl_jax.data.recipe import Recipe, make_grid


@settings(deadline=None)
@example(300, 64, 1 - 1e-12)
@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 1, exclude_max=True))
def test_windows_cover_with_the_overlap_asked_for(size, patch, overlap):
    starts = evaluate.window_starts(size, patch, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - patch)
    steps, wanted = np.diff(starts), max(patch * (1 - overlap), 1)  # at most so many windows as there are places
    assert (steps > 0).all()
    # Starts are rounded to whole pixels, so a step may exceed the exact one by less than one.
    assert (steps < wanted + 1).all() and (steps <= patch).all()
    if len(starts) > 2:  # with one window fewer, the overlap would be too small
        assert (size - patch) / (len(starts) - 2) > wanted * (1 - 1e-9)


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


@pytest.mark.parametrize(("limit", "together"), [(0, 1), (10**9, 3)])
def test_large_cases_are_segmented_one_at_a_time(limit, together, monkeypatch):
    meet, inside, held, most = threading.Barrier(together), [], [], []

    def to_native(probs, grid, recipe):
        inside.append(grid)
        meet.wait(timeout=60)
        time.sleep(0.05)  # for the others to come in, if they can
        result = probs.copy()
        held.append(weakref.ref(result))
        most.append(max(len(inside), sum(ref() is not None for ref in held)))
        inside.pop()
        return result

    def slow(classes, of):
        time.sleep(0.1)  # so that what this case holds is there when the next comes
        return classes

    monkeypatch.setattr(evaluate, "LARGE", limit)
    monkeypatch.setattr(evaluate.recipes, "to_native", to_native)
    monkeypatch.setattr(evaluate, "keep_largest_component", slow)
    recipe = Recipe(label_values=(0, 1), class_names=("background", "organ"))
    grid = make_grid((4, 3, 2), np.eye(4), recipe)
    probs = np.ones((2, 3, 4, 2), np.float32)
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(evaluate.segment, lambda *_: probs, None, probs, grid, recipe, "none") for _ in range(3)]
        assert all(end.result()[0].shape == (2, 3, 4) for end in ends)
    assert max(most) == together


def test_pseudo_labels_by_hand():
    recipe = Recipe(orientation="RAS", spacing=(None,) * 3, label_values=(0, 1), class_names=("background", "x"))
    label = np.array([0, 0, 1, 1, 1, 0], np.uint8).reshape(6, 1, 1)
    # predicted:        0    1    1    1    0    0     the last two: missed, and background that does not count
    second = np.array([0.1, 0.9, 0.9, 0.6, 0.05, 0.0]).reshape(6, 1, 1)
    probs = np.stack([1 - second, second], -1)
    case = SimpleNamespace(index=0, grid=make_grid(label.shape, np.eye(4), recipe))
    data = SimpleNamespace(image=lambda _: probs, native_label=lambda _: label, num_classes=2, recipe=recipe)

    def sure(threshold, largest="none"):
        (result,) = evaluate.evaluate_cases(lambda _, image: image, None, data, [case], largest, threshold)
        return result.sure

    assert sure(0.0) == (4, 4, 2) == sure(0.0, largest="foreground")
    assert sure(0.8) == (4, 3, 1)  # 0.6 is too little; of 0.9, 0.9 and 0.95 one is right
    assert sure(0.93) == (4, 1, 0)


@pytest.mark.parametrize(("largest", "expected"), [("none", [0, 1, 1, 1, 0, 1]), ("foreground", [0, 1, 1, 1, 0, 0])])
def test_what_is_measured_is_the_largest_part_if_that_is_asked_for(largest, expected):
    recipe = Recipe(orientation="RAS", spacing=(None,) * 3, label_values=(0, 1), class_names=("background", "x"))
    label = np.array([0, 1, 1, 1, 0, 0], np.uint8).reshape(6, 1, 1)
    second = np.array([0.1, 0.9, 0.9, 0.9, 0.1, 0.9]).reshape(6, 1, 1)
    case = SimpleNamespace(index=0, grid=make_grid(label.shape, np.eye(4), recipe))
    probs = np.stack([1 - second, second], -1)
    data = SimpleNamespace(image=lambda _: probs, native_label=lambda _: label, num_classes=2, recipe=recipe)
    (result,) = evaluate.evaluate_cases(lambda _, image: image, None, data, [case], largest)
    assert result.prediction.ravel().tolist() == expected
    np.testing.assert_allclose(result.metrics.dice, [2 * 3 / (3 + sum(expected))])


class Averaging:
    """A network whose logits depend on the whole window, padding included."""

    num_classes = 2

    def apply(self, variables, images):
        mean = images.mean(axis=tuple(range(1, images.ndim)), keepdims=True)
        return jnp.concatenate([images, mean + 0 * images], axis=-1), None


@pytest.mark.parametrize(("patch", "shape"), [((8, 6), (2, 21, 3)), ((4, 8, 6), (3, 17, 9))])
def test_overlapping_windows_are_averaged_by_weight(patch, shape):
    image = 3 + np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    window = (1,) * (3 - len(patch)) + patch
    short = [max(0, p - n) for p, n in zip(window, shape, strict=True)]
    pads = [(s // 2, s - s // 2) for s in short]
    padded = np.pad(image[..., 0], pads, constant_values=image.min())
    weights = evaluate.gaussian_window(patch).reshape(window)
    total, norm = np.zeros((*padded.shape, 2)), np.zeros(padded.shape)
    corners = [
        (i, j, k)
        for i in evaluate.window_starts(padded.shape[0], window[0], 0.5 if window[0] > 1 else 0)
        for j in evaluate.window_starts(padded.shape[1], window[1], 0.5)
        for k in evaluate.window_starts(padded.shape[2], window[2], 0.5)
    ]
    for i, j, k in corners:
        part = padded[i : i + window[0], j : j + window[1], k : k + window[2]]
        first = 1 / (1 + np.exp(part.mean() - part))
        for at in np.ndindex(window):
            place = (i + at[0], j + at[1], k + at[2])
            total[place] += weights[at] * np.array([first[at], 1 - first[at]])
            norm[place] += weights[at]
    inside = tuple(slice(before, before + n) for (before, _), n in zip(pads, shape, strict=True))
    got = evaluate.make_predictor(Averaging(), patch, overlap=0.5, batch=4)(None, image)
    np.testing.assert_allclose(got, (total / norm[..., None])[inside], rtol=1e-4, atol=1e-5)


def test_each_channel_is_surrounded_by_its_own_minimum():
    class Means:
        num_classes = 2

        def apply(self, _, images):
            return jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape), None

    image = np.broadcast_to(np.float32([2, -1]), (1, 3, 2, 2))
    got = evaluate.make_predictor(Means(), (4, 8))(None, image)
    np.testing.assert_allclose(got[..., 0], 1 / (1 + np.exp(-3)), rtol=1e-6)


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
    by_class = np.where(np.arange(9)[:, None, None] < 6, 0, classes)
    by_class[:3, :3] = 1  # organs that do not touch both stay, and of each its largest part
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes, "class"), by_class)
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes, "none"), classes)
    expected[6:] = 0
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes, "foreground"), expected)
    classes[:3, :3, 0] = 2  # now the organ's class 2 has 9 voxels there, and one elsewhere that touches only class 1
    classes[3, 3, 1] = 1
    classes[4, 4, 1] = 2
    expected = np.zeros_like(classes)
    expected[:3, :3, 0], expected[:3, :3, 1], expected[3, 3, 1] = 2, 1, 1
    np.testing.assert_array_equal(evaluate.keep_largest_component(classes, "foreground"), expected)
    # Nor does it matter which part is met first.
    np.testing.assert_array_equal(
        evaluate.keep_largest_component(classes[::-1, ::-1], "foreground"), expected[::-1, ::-1]
    )
    nothing = np.zeros((3, 3, 3), np.uint8)
    np.testing.assert_array_equal(evaluate.keep_largest_component(nothing, "foreground"), nothing)


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


def test_a_rotated_grid_is_measured_along_its_own_axes(tmp_path):
    affine = np.array([[0, 2, 0, 5], [-1.5, 0, 0, 0], [0, 0, 8, 0], [0, 0, 0, 1.0]])
    p, r = np.zeros((12, 7, 4)), np.zeros((12, 7, 4))
    p[2, 3, 1] = r[9, 3, 1] = 1
    p[3, 3, 1] = 4  # a value that only the prediction has
    write(tmp_path / "p" / "a.nii.gz", p, affine)
    write(tmp_path / "r" / "a.nii.gz", r, affine)
    _, classes, (result,) = evaluate.evaluate_folders(tmp_path / "p", tmp_path / "r")
    assert classes == ["0", "1", "4"]
    np.testing.assert_allclose(result.hd95, [7 * 1.5, np.linalg.norm([12 * 1.5, 7 * 2, 4 * 8])], rtol=1e-5)
    np.testing.assert_array_equal(result.flagged, [False, True])


def test_masks_pair_by_place_and_name(tmp_path, capsys):
    p, r = tmp_path / "p", tmp_path / "r"
    for name in ("one/a", "two/a", "b", "c", "d", "f_0000", "e/e", "e/e_gt"):
        write(p / f"{name}.nii.gz", np.ones((2, 2, 2)))
    # The last lies beside its scan and others, as in ACDC; the prediction has the scan's name.
    for name in ("one/a_gt", "two/a", "b_label", "c_seg", "d", "f", "e/e", "e/e_4d", "e/e_gt"):
        write(r / f"{name}.nii.gz", np.ones((2, 2, 2)))
    found = evaluate.mask_pairs(p, r)
    told, warned = capsys.readouterr().err.splitlines()
    assert told == f"passed over: 2 scans beside references, such as {r / 'e' / 'e.nii.gz'}"
    # A mask of a mask, which must not stand for that of the scan.
    assert warned.startswith("warning: not measured: 1 of 8 predictions") and warned.endswith(f"{p}/e/e_gt.nii.gz")
    pairs = {name: (a.relative_to(p).as_posix(), b.relative_to(r).as_posix()) for name, a, b in found}
    assert len(found) == len(pairs)
    assert pairs == {
        "one/a": ("one/a.nii.gz", "one/a_gt.nii.gz"),
        "two/a": ("two/a.nii.gz", "two/a.nii.gz"),
        "b": ("b.nii.gz", "b_label.nii.gz"),
        "c": ("c.nii.gz", "c_seg.nii.gz"),
        "d": ("d.nii.gz", "d.nii.gz"),
        "f_0000": ("f_0000.nii.gz", "f.nii.gz"),
        "e/e": ("e/e.nii.gz", "e/e_gt.nii.gz"),
    }


def test_a_reference_that_is_taken_for_a_scan_is_told(tmp_path):
    for name in ("p/a", "p/b", "r/a", "r/a_seg", "r/b"):
        write(tmp_path / f"{name}.nii.gz", np.ones((2, 2, 2)))
    with pytest.raises(FileNotFoundError, match=r"p/b\.nii\.gz: .*r/b\.nii\.gz is taken for its scan.*: name its "):
        evaluate.mask_pairs(tmp_path / "p", tmp_path / "r")


def test_two_references_of_one_prediction_are_an_error(tmp_path):
    for name in ("p/b", "r/b_gt", "r/b_seg"):
        write(tmp_path / f"{name}.nii.gz", np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match=r"b_seg\.nii\.gz: another reference is of .*b\.nii\.gz too"):
        evaluate.mask_pairs(tmp_path / "p", tmp_path / "r")


def test_a_reference_without_partner_is_an_error_and_a_prediction_is_told(masks, capsys):
    (masks / "p" / "b.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"b_gt\.nii\.gz.*no prediction"):
        evaluate.evaluate_folders(masks / "p", masks / "r")
    write(masks / "p" / "b.nii.gz", np.zeros((6, 7, 4)))
    write(masks / "p" / "c.nii.gz", np.zeros((6, 7, 4)))
    names, *_ = evaluate.evaluate_folders(masks / "p", masks / "r")
    assert names == ["a", "b"]
    told = f"warning: not measured: 1 of 3 predictions have no reference in {masks / 'r'}, such as"
    assert f"{told} {masks / 'p' / 'c.nii.gz'}\n" in capsys.readouterr().err


def test_masks_on_other_grids_are_an_error(masks):
    write(masks / "p" / "a.nii.gz", np.ones((6, 7, 5)))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: shape"):
        evaluate.evaluate_folders(masks / "p", masks / "r")
    write(masks / "p" / "a.nii.gz", np.ones((6, 7, 4)), np.diag([1.5, 2, 9, 1]))
    with pytest.raises(ValueError, match=r"a\.nii\.gz.*not the same grid"):
        evaluate.evaluate_folders(masks / "p", masks / "r")


@pytest.mark.parametrize(
    ("shift", "size", "same"), [(0.02, 0, True), (0, 0.002, True), (0.2, 0, False), (0, 0.2, False)]
)
def test_grids_are_the_same_where_the_preparer_takes_them_for_it(shift, size, same, masks):
    affine = nib.load(masks / "r" / "a_gt.nii.gz").affine
    affine[0, 3] += shift
    affine[0, 0] += size
    write(masks / "p" / "a.nii.gz", np.ones((6, 7, 4)), affine)
    with contextlib.nullcontext() if same else pytest.raises(ValueError, match=r"a\.nii\.gz: not the same grid"):
        evaluate.evaluate_folders(masks / "p", masks / "r")


def test_images_in_place_of_masks_are_an_error(tmp_path):
    for folder, start in (("p", 0), ("r", 56)):
        write(tmp_path / folder / "a.nii.gz", np.arange(start, start + 200).reshape(10, 10, 2))
    with pytest.raises(ValueError, match="256 different label values; is one of the files an image"):
        evaluate.evaluate_folders(tmp_path / "p", tmp_path / "r")


def test_empty_folders_and_masks_are_an_error(tmp_path, masks):
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        evaluate.evaluate_folders(masks / "p", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="none"):
        evaluate.evaluate_folders(tmp_path / "none", masks / "r")
    for folder, name in (("p2", "a"), ("r2", "a")):
        write(tmp_path / folder / f"{name}.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="empty"):
        evaluate.evaluate_folders(tmp_path / "p2", tmp_path / "r2")


def run_table(workdir, dice):
    """A finished training's case table; `dice` is {(case, class): value or None where it does not count}.

    The patient of a case is its first letter.
    """
    workdir.mkdir()
    with open(workdir / "val_cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(evaluate.CASE_COLUMNS)
        for (case, name), value in dice.items():
            numbers = ["nan"] * 4 if value is None else [value, value, 3.0, 1.0]
            writer.writerow(["teacher", case, case[0], name, *numbers, int(value is not None), 0])
            writer.writerow(["student", case, case[0], name, 0.2, 0.2, 9.0, 9.0, 1, 0])
    method, _, seed = workdir.name.partition("-")
    data = {"labeled_patients": 2, "labeled_seed": int(seed or 0)}
    config = {"method": method, "seed": int(seed or 0), "steps": 40, "data": data}
    (workdir / "config.json").write_text(json.dumps(config))


def test_comparison_by_hand(tmp_path):
    run_table(tmp_path / "one", {("a", "x"): 0.5, ("a", "y"): 0.7, ("b", "x"): 0.9, ("b", "y"): None})
    run_table(tmp_path / "two", {("a", "x"): 0.6, ("a", "y"): 0.8, ("b", "x"): 0.8, ("b", "y"): None})
    one, two = (compare.read_cases(tmp_path / name, "val", "teacher") for name in ("one", "two"))
    assert compare.class_mean(one, "dice") == pytest.approx((0.7 + 0.7) / 2)
    mean, std, n, p = compare.paired([one], [two])
    assert (mean, std, n) == (pytest.approx(0.0), pytest.approx(0.1), 2)
    assert p == pytest.approx(1.0)
    table = compare.compare([tmp_path / "one", tmp_path / "two"], "val", "teacher")
    assert "70.00" in table and "75.00" in table and "n = 2" in table
    assert table.endswith("[two, 2 labelled, 40 steps, seed 0]")
    with pytest.raises(FileNotFoundError, match="test_cases"):
        compare.read_cases(tmp_path / "one", "test", "teacher")
    (tmp_path / "one" / "test_cases.csv").write_text("patient,case,class,dice\na,a,x,0.5\n")
    with pytest.raises(ValueError, match="test_cases.csv has no column assd_mm, counted, flagged"):
        compare.read_cases(tmp_path / "one", "test", "teacher")


def test_pairs_are_compared_by_case_where_both_count(tmp_path):
    run_table(tmp_path / "one", {("a", "x"): 0.5, ("a", "y"): 0.7, ("b", "x"): 0.9, ("b", "y"): 0.1, ("c", "x"): 0.4})
    run_table(tmp_path / "two", {("a", "x"): 0.6, ("a", "y"): 0.9, ("b", "x"): 0.8, ("b", "y"): None, ("c", "x"): 0.8})
    one, two = (compare.read_cases(tmp_path / name, "val", "teacher") for name in ("one", "two"))
    mean, std, n, p = compare.paired([one], [two])
    differences = [0.15, -0.1, 0.4]  # ranks 2, 1, 3: W = 1, which or less come of 2 of the 8 signs, on two sides
    assert (mean, std, n) == (pytest.approx(np.mean(differences)), pytest.approx(np.std(differences)), 3)
    assert p == pytest.approx(2 * 2 / 8)
    assert np.isnan(compare.paired([one], [one])[3])
    with pytest.raises(ValueError, match="not measured on the same cases"):
        compare.paired([one], [{key: row for key, row in two.items() if key.case != "c"}])


def test_figures_on_other_masks_are_not_compared(tmp_path):
    for name, masks in (("one", "m"), ("two", "m"), ("other", "n"), ("older", None)):
        run_table(tmp_path / name, {("a", "x"): 0.5, ("b", "x"): 0.7})
        facts = {"measured_on": {"val": masks, "test": "t"}} if masks else {}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
    compare.compare([tmp_path / name for name in ("one", "two", "older")], "val", "teacher")
    with pytest.raises(ValueError, match=r"one and .*other were measured on other masks of val"):
        compare.compare([tmp_path / name for name in ("one", "older", "other")], "val", "teacher")


def test_repeats_are_averaged_by_patient(tmp_path):
    for name, values in {
        "one-0": (0.5, 0.9, 0.4),
        "one-1": (0.6, 0.7, 0.2),
        "two-0": (0.8, 0.8, 0.5),
        "two-1": (0.7, 0.9, 0.3),
        "three-0": (0.8, 0.8, None),
        "three-1": (0.7, 0.9, 0.3),
    }.items():
        run_table(tmp_path / name, {(case, "x"): value for case, value in zip("abc", values, strict=True)})
    one, two, three = (str(tmp_path / f"{name}-?") for name in ("one", "two", "three"))
    first, second, third = compare.compare([one, two, three], "val", "teacher").splitlines()[2:]
    assert first.split()[1] == "55.00" and second.split()[1] == "66.67"
    gains = 100 * np.array([(0.3 + 0.1) / 2, (-0.1 + 0.2) / 2, (0.1 + 0.1) / 2])  # all of one sign: p = 2 / 8
    assert f"{gains.mean():+.2f} ± {gains.std():.2f}, n = 3, p = 0.25 (+10.00, +13.33)" in second
    assert second.endswith("[two, 2 labelled, 40 steps, seed 0, 1]")
    assert "+12.50 ± 7.50, n = 2" in third  # c counts in one pair only
    with pytest.raises(ValueError, match=r"are \[\(1, 1\)\] in .*two-1 and \[\(0, 0\), \(1, 1\)\] in .*one-"):
        compare.compare([one, tmp_path / "two-1"], "val", "teacher")
    with pytest.raises(ValueError, match=r"one-0 and .*one-1 differ in steps; name repeats of one training"):
        change_config(tmp_path / "one-1", steps=50)
        compare.compare([one], "val", "teacher")
    with pytest.raises(ValueError, match=r"have the same seeds, \(1, 1\); name one of them"):
        change_config(tmp_path / "two-0", seed=1, data={"labeled_patients": 2, "labeled_seed": 1})
        compare.compare([two], "val", "teacher")
    with pytest.raises(FileNotFoundError, match=r"four-\?: no folder has this name or fits this pattern"):
        compare.compare([str(tmp_path / "four-?")], "val", "teacher")
    (tmp_path / "four-0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"four-0 has no config.json; give --workdir of trainings"):
        compare.compare([str(tmp_path / "four-?")], "val", "teacher")


def change_config(workdir, **fields):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | fields))


def test_repeats_are_paired_by_seed_on_the_same_cases(tmp_path):
    for name, value in {"one-9": 0.1, "one-10": 0.3, "two-09": 0.2, "two-10": 0.5}.items():
        run_table(tmp_path / name, {("a", "x"): value})
    patterns = [str(tmp_path / "one-*"), str(tmp_path / "two-*")]
    assert "+15.00 ± 0.00, n = 1, p = nan (+10.00, +20.00)" in compare.compare(patterns, "val", "teacher")
    for name in ("one-10", "two-10"):
        shutil.rmtree(tmp_path / name)
        run_table(tmp_path / name, {("b", "x"): 0.5})
    with pytest.raises(ValueError, match="not measured on the same cases"):
        compare.compare(patterns, "val", "teacher")


def test_volumes_of_one_patient_count_as_one(tmp_path):
    before = {("a1", "x"): 0.5, ("a1", "y"): 0.7, ("a2", "x"): 0.6, ("a2", "y"): None, ("b1", "x"): 0.9}
    after = {("a1", "x"): 0.6, ("a1", "y"): 0.9, ("a2", "x"): 0.9, ("a2", "y"): 0.2, ("b1", "x"): 0.8}
    run_table(tmp_path / "one", before)
    run_table(tmp_path / "two", after)
    one, two = (compare.read_cases(tmp_path / name, "val", "teacher") for name in ("one", "two"))
    mean, std, n, p = compare.paired([one], [two])
    # Cases: a1 (0.1 + 0.2) / 2, a2 0.3, b1 -0.1; patients: a (0.15 + 0.3) / 2, b -0.1. Two of opposite sign: p = 1.
    assert (mean, std, n) == (pytest.approx((0.225 - 0.1) / 2), pytest.approx((0.225 + 0.1) / 2), 2)
    assert p == pytest.approx(1.0)


def test_what_counts_in_one_training_only_is_no_difference_of_splits(tmp_path):
    run_table(tmp_path / "one", {("a", "x"): 0.5, ("a", "y"): None, ("b", "x"): 0.9, ("b", "y"): 0.1})
    run_table(tmp_path / "two", {("a", "x"): None, ("a", "y"): 0.8, ("b", "x"): 0.8, ("b", "y"): None})
    run_table(tmp_path / "none", {("a", "x"): None, ("a", "y"): 0.8, ("b", "x"): None, ("b", "y"): None})
    one, two, none = (compare.read_cases(tmp_path / name, "val", "teacher") for name in ("one", "two", "none"))
    mean, _, n, p = compare.paired([one], [two])  # only class x of case b counts in both
    assert (mean, n) == (pytest.approx(-0.1), 1) and np.isnan(p)
    assert compare.class_means(two, "dice") == pytest.approx({"x": 0.8, "y": 0.8})
    assert compare.class_mean(none, "dice") == pytest.approx(0.8)  # class x counts nowhere
    assert "nan" in compare.compare([tmp_path / "two", tmp_path / "none"], "val", "teacher").splitlines()[-1]
    with pytest.raises(ValueError, match="no case with a class that counts in all of them"):
        compare.paired([one], [none])


def test_case_table_goes_out_and_in(tmp_path):
    one, nan = np.array([True, True]), np.array([np.nan, 0.25])
    full = metrics.CaseMetrics(*(np.array(v) for v in ([0.5, 0.6], [0.3, 0.4], [7.0, 8.0], [1.0, 2.0])), one, ~one)
    half = metrics.CaseMetrics(nan, nan, nan, nan, np.array([False, True]), np.array([False, True]))
    rows = [("student", "a", "p", half), ("teacher", "a", "p", full), ("teacher", "b", "q", half)]
    evaluate.write_case_table(tmp_path / "val_cases.csv", rows, ["background", "x", "y"])
    read = compare.read_cases(tmp_path, "val", "teacher")
    names = (*compare.METRICS, "flagged")
    assert {key: [row[name] for name in names] for key, row in read.items()} == {
        ("p", "a", "x"): [0.5, 0.3, 7.0, 1.0, 0.0],
        ("p", "a", "y"): [0.6, 0.4, 8.0, 2.0, 0.0],
        ("q", "b", "x"): pytest.approx([np.nan] * 4 + [0.0], nan_ok=True),
        ("q", "b", "y"): [0.25, 0.25, 0.25, 0.25, 1.0],
    }
    assert compare.counted(read, "dice", "case") == {"a": [0.5, 0.6], "b": [0.25]}
    assert compare.counted(read, "dice", "label") == {"x": [0.5], "y": [0.6, 0.25]}
    assert compare.case_means(read, "hd95_mm") == {"a": 7.5, "b": 0.25}
    with open(tmp_path / "val_cases.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["patient"] for row in table] == ["p"] * 4 + ["q"] * 2
    assert [row["flagged"] for row in table] == ["0", "1", "0", "0", "0", "1"]
    assert (table[2]["jaccard"], table[2]["assd_mm"]) == ("0.3", "1")


class Labels:
    """A network whose features tell each pixel's class, as one of three axes, and a pool of such images."""

    feature_level, canvas, samples = 1, (6, 8), [None] * 3

    def apply(self, variables, images):
        return None, images[:, 1::2, 1::2]

    def batch(self, indices):
        label = np.random.RandomState(0).randint(0, 3, (3, 6, 8))[indices]
        return {"label": label, "image": np.eye(3, dtype=np.float32)[label]}


def test_features_meet_the_labels_of_their_pixels():
    both = Labels()
    x, y = evaluate.pixel_features(both, {}, both, 3, batch=2)
    np.testing.assert_array_equal(x, np.eye(3)[y])
    assert metrics.compactness_separability(x, y, 3) == (pytest.approx(1), pytest.approx(1))


def test_no_more_pixels_of_a_class_than_asked_for():
    counts = np.bincount(evaluate.pixel_features(Labels(), {}, Labels(), 3, per_class=5, batch=2)[1])
    assert counts[1:].tolist() == [5, 5] and counts[0] <= 5


# --- Masks on disk, as they come ------------------------------------------------------------------


def write_mask(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 4.0, 1.0])), path)
    return path


@pytest.fixture
def pair(tmp_path):
    """One prediction that is its reference: values 0 and 1."""
    mask = np.random.default_rng(0).integers(0, 2, (6, 5, 4)).astype("u1")
    return write_mask(tmp_path / "p" / "a.nii.gz", mask), write_mask(tmp_path / "r" / "a.nii.gz", mask), mask


def test_hidden_files_and_endings_of_masks(pair):
    prediction, reference, mask = pair
    (prediction.parent / "._a.nii.gz").write_bytes(b"macOS")
    reference.rename(reference.parent / "a_mask.NII.GZ")
    _, _, (measured,) = evaluate.evaluate_folders(prediction.parent, reference.parent)
    assert measured.dice.tolist() == [1.0]
    nib.save(nib.Nifti1Image(1 - mask, nib.load(prediction).affine), prediction.parent / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii\.gz: has the name of .*a\.nii: remove one"):
        evaluate.evaluate_folders(prediction.parent, reference.parent)


def test_masks_of_other_formats_are_measured(pair):
    sitk = pytest.importorskip("SimpleITK")
    prediction, reference, _ = pair
    sitk.WriteImage(sitk.ReadImage(str(prediction)), prediction.parent / "a.nrrd")
    prediction.unlink()
    _, _, (measured,) = evaluate.evaluate_folders(prediction.parent, reference.parent)
    assert measured.dice.tolist() == [1.0]


def test_values_that_predictions_alone_have_are_told(pair, capsys):
    prediction, reference, mask = pair
    write_mask(prediction, mask * 255)
    _, names, (measured,) = evaluate.evaluate_folders(prediction.parent, reference.parent)
    assert names == ["0", "1", "255"] and measured.dice.tolist() == [0.0, 0.0]
    assert "label values 255 are in no reference" in capsys.readouterr().err


def test_a_reference_without_voxel_size_is_not_measured_in_mm(pair):
    prediction, reference, _ = pair
    for path in (prediction, reference):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<f", raw, 88, 0.0)  # pixdim of the third axis
        struct.pack_into("<h", raw, 254, 0)  # no sform
        path.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(ValueError, match=r"/a\.nii\.gz: its affine .* has no volume: write the voxel sizes"):
        evaluate.evaluate_folders(prediction.parent, reference.parent)
