"""Metrics against MedPy, a brute force over all pairs of surface voxels, and values by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary as medpy
from scipy import ndimage
from scipy.spatial.distance import cdist

from sscl_jax.metrics import (
    METRICS,
    CaseMetrics,
    case_metrics,
    compactness_separability,
    format_table,
    summarise,
)

NAN = float("nan")


# ---- against MedPy ----


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """A mask that is not empty: noise, blobs, a box (often at the border), one voxel, or all."""
    kind = draw(st.sampled_from(["noise", "blobs", "box", "voxel", "all"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.zeros(shape, dtype=bool)
    if kind == "noise":
        mask = random.random(shape) < draw(st.sampled_from([0.05, 0.3, 0.8]))
    elif kind == "blobs":
        field = ndimage.gaussian_filter(random.standard_normal(shape), 1.0)
        mask = field > np.quantile(field, draw(st.sampled_from([0.5, 0.8])))
    elif kind == "box":
        ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        mask[tuple(slice(*e) for e in ends)] = True
    elif kind == "all":
        mask[...] = True
    # One sure voxel: the only one for the kind "voxel", and no empty mask for the others.
    if not mask.any():
        mask[tuple(random.integers(0, n) for n in shape)] = True
    return mask


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    rank = draw(st.sampled_from([2, 3]))
    shape = draw(st.tuples(*[st.integers(1, 11)] * rank))
    spacing = draw(st.tuples(*[st.sampled_from([0.3, 0.7, 1.0, 1.52, 5.0, 10.0])] * rank))
    return draw(masks(shape)), draw(masks(shape)), spacing


@settings(deadline=None, max_examples=300)
@given(mask_pairs())
def test_equals_medpy(pair):
    prediction, reference, spacing = pair
    ours = case_metrics(prediction.astype(np.uint8), reference.astype(np.uint8), 2, spacing)
    np.testing.assert_allclose(ours.dice[0], medpy.dc(prediction, reference), rtol=1e-12)
    np.testing.assert_allclose(ours.jaccard[0], medpy.jc(prediction, reference), rtol=1e-12)
    for name in ("hd95", "assd"):
        theirs = getattr(medpy, name)(prediction, reference, voxelspacing=spacing)
        np.testing.assert_allclose(getattr(ours, name)[0], theirs, rtol=1e-12)
    assert ours.counted[0]
    assert not ours.flagged[0]


@settings(deadline=None, max_examples=150)
@given(mask_pairs())
def test_equals_brute_force_and_is_symmetric(pair):
    prediction, reference, spacing = pair
    distances = cdist(*(surface_points(mask, spacing) for mask in (prediction, reference)))
    pooled = np.concatenate([distances.min(axis=0), distances.min(axis=1)])
    ours = case_metrics(prediction.astype(int), reference.astype(int), 2, spacing)
    np.testing.assert_allclose(ours.hd95[0], np.percentile(pooled, 95), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.assd[0], pooled.mean(), rtol=1e-9, atol=1e-9)
    swapped = case_metrics(reference.astype(int), prediction.astype(int), 2, spacing)
    for name in METRICS:
        np.testing.assert_allclose(getattr(ours, name), getattr(swapped, name), rtol=1e-12)


def surface_points(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Positions in mm of the voxels of `mask` with a face neighbour outside of it."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)
    return (np.argwhere(padded & ~inside) - 1) * np.array(spacing)


@settings(deadline=None, max_examples=100)
@given(mask_pairs(), st.data())
def test_bounding_box_equals_full_image(pair, data):
    """Any margin of background around the image leaves every bit: its outside is background."""
    prediction, reference, spacing = pair
    margins = [(data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))) for _ in spacing]
    tight = case_metrics(prediction.astype(int), reference.astype(int), 2, spacing)
    far_p, far_r = np.pad(prediction, margins), np.pad(reference, margins)
    wide = case_metrics(far_p.astype(int), far_r.astype(int), 2, spacing)
    for name in METRICS:
        np.testing.assert_array_equal(getattr(tight, name), getattr(wide, name))
    for name in ("hd95", "assd"):
        theirs = getattr(medpy, name)(far_p, far_r, voxelspacing=spacing)
        np.testing.assert_allclose(getattr(wide, name)[0], theirs, rtol=1e-12)


def test_many_classes_are_scored_one_by_one():
    random = np.random.default_rng(0)
    shape, spacing = (5, 24, 20), (8.0, 1.4, 1.2)
    fields = ndimage.gaussian_filter(random.standard_normal((4, *shape)), (0, 1, 3, 3))
    reference = fields.argmax(axis=0)
    prediction = (fields + 0.02 * random.standard_normal(fields.shape)).argmax(axis=0)
    ours = case_metrics(prediction, reference, 4, spacing)
    for c in (1, 2, 3):
        p, r = prediction == c, reference == c
        assert 0 < ours.dice[c - 1] < 1
        np.testing.assert_allclose(ours.dice[c - 1], medpy.dc(p, r), rtol=1e-12)
        np.testing.assert_allclose(ours.hd95[c - 1], medpy.hd95(p, r, spacing), rtol=1e-12)
        np.testing.assert_allclose(ours.assd[c - 1], medpy.assd(p, r, spacing), rtol=1e-12)


# ---- values by hand ----


def test_box_shifted_by_one_voxel():
    reference = np.zeros((12, 12), dtype=np.uint8)
    reference[3:7, 3:7] = 1
    ours = case_metrics(np.roll(reference, 1, axis=1), reference, 2, (1.0, 2.0))
    # 4 x 4 box, 12 of its 16 voxels shared.
    assert ours.dice[0] == 24 / 32
    assert ours.jaccard[0] == 12 / 20
    # Of the 12 surface voxels of each box: 4 on the outer face and 2 inner ones on the face
    # within the other box are off the other surface. The outer are 2 mm away; the inner 1 mm,
    # to the top or bottom row of the other box.
    assert ours.hd95[0] == 2.0
    np.testing.assert_allclose(ours.assd[0], (4 * 2.0 + 2 * 1.0) / 12)


def test_masks_one_thick_slice_apart():
    """Two 6 x 20 x 20 masks, one slice of 10 mm apart."""
    reference = np.zeros((10, 24, 24), dtype=np.uint8)
    reference[1:7, 2:22, 2:22] = 1
    prediction = np.roll(reference, 1, axis=0)
    ours = case_metrics(prediction, reference, 2, (10.0, 1.0, 1.0))
    assert ours.dice[0] == 5 / 6
    assert ours.jaccard[0] == 5 / 7
    # By direction 2 * 400 + 4 * 76 surface voxels. The outer face of 400 is 10 mm away. Of the
    # other face, 18 x 18 voxels lie inside the other mask: k voxels from its side walls, k = 1..9,
    # ring k of 4 * (20 - 2k - 1) voxels, k mm away (less than 10). The walls are shared.
    inner = sum(4 * (20 - 2 * k - 1) * k for k in range(1, 10))
    surface = 2 * 400 + 4 * 76
    assert ours.hd95[0] == 10.0
    np.testing.assert_allclose(ours.assd[0], (400 * 10.0 + inner) / surface)
    # Without the thickness of the slice the same masks would be 1 mm apart.
    assert case_metrics(prediction, reference, 2, (1.0, 1.0, 1.0)).hd95[0] == 1.0


def test_identical_masks():
    reference = np.zeros((4, 5, 6), dtype=np.int16)
    reference[1:3, 0:4, 2:] = 1
    ours = case_metrics(reference, reference.copy(), 2, (3.0, 1.0, 1.0))
    assert [getattr(ours, name)[0] for name in METRICS] == [1.0, 1.0, 0.0, 0.0]


def test_no_overlap_is_measured_not_flagged():
    prediction, reference = np.zeros((2, 1, 9), dtype=int)
    prediction[0, 1] = reference[0, 5] = 1
    ours = case_metrics(prediction, reference, 2, (1.0, 2.5))
    assert [getattr(ours, name)[0] for name in METRICS] == [0.0, 0.0, 10.0, 10.0]
    assert ours.counted[0]
    assert not ours.flagged[0]


def test_distance_does_not_depend_on_the_sampling():
    """Two balls of radius 8 mm, centres 4 mm apart along axis 2, at 1 mm and at 1 x 1 x 2 mm."""

    def ball(centre_x: float, step: float) -> np.ndarray:
        z, y, x = np.meshgrid(np.arange(24), np.arange(24), np.arange(0, 32, step), indexing="ij")
        return ((z - 12) ** 2 + (y - 12) ** 2 + (x - centre_x) ** 2 <= 8**2).astype(np.uint8)

    fine = case_metrics(ball(16, 1), ball(12, 1), 2, (1, 1, 1))
    coarse = case_metrics(ball(16, 2), ball(12, 2), 2, (1, 1, 2))
    assert abs(fine.hd95[0] - 4.0) <= 1.0
    assert abs(fine.hd95[0] - coarse.hd95[0]) <= 2.0
    assert abs(fine.assd[0] - coarse.assd[0]) <= 1.0
    assert abs(fine.dice[0] - coarse.dice[0]) <= 0.03


# ---- absent classes ----


def test_rules_for_absent_classes():
    prediction, reference = np.zeros((2, 3, 4, 12), dtype=np.uint8)
    prediction[0, 0, 0] = 1  # class 1: predicted, not in the reference
    reference[1, 1, 1:3] = 3  # class 3: missed; class 2: in neither
    ours = case_metrics(prediction, reference, 4, (1.0, 1.0, 1.0))
    diagonal = 13.0  # 3, 4, 12
    np.testing.assert_array_equal(ours.counted, [True, False, True])
    np.testing.assert_array_equal(ours.flagged, [True, False, True])
    np.testing.assert_array_equal(ours.dice, [0, NAN, 0])
    np.testing.assert_array_equal(ours.jaccard, [0, NAN, 0])
    np.testing.assert_allclose(ours.hd95, [diagonal, NAN, diagonal])
    np.testing.assert_allclose(ours.assd, [diagonal, NAN, diagonal])


def test_all_zero_prediction_and_diagonal_in_mm():
    reference = np.zeros((3, 4), dtype=np.uint8)
    reference[1, 1] = 3
    ours = case_metrics(np.zeros_like(reference), reference, 4, (10.0, 10.0))
    np.testing.assert_array_equal(ours.counted, [False, False, True])
    assert ours.dice[2] == 0.0
    assert ours.hd95[2] == ours.assd[2] == 50.0
    assert ours.flagged[2]


def test_nothing_anywhere_counts_nothing():
    empty = np.zeros((3, 4, 5), dtype=np.uint8)
    ours = case_metrics(empty, empty, 3, (1, 1, 1))
    assert not ours.counted.any()
    assert not ours.flagged.any()
    assert all(np.isnan(getattr(ours, name)).all() for name in METRICS)


# ---- bad input ----

ZEROS = np.zeros((4, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("prediction", "reference", "num_classes", "spacing", "message"),
    [
        (ZEROS, ZEROS[:3], 2, (1, 1), "shape"),
        (ZEROS[0], ZEROS[0], 2, (1,), "rank 2 or 3"),
        (ZEROS[:0], ZEROS[:0], 2, (1, 1), "non-empty"),
        (ZEROS + 2, ZEROS, 2, (1, 1), r"prediction has values 2\.\.2"),
        (ZEROS, ZEROS + 255, 4, (1, 1), r"reference has values 255\.\.255"),
        (ZEROS.astype(int) - 1, ZEROS, 2, (1, 1), r"prediction has values -1\.\.-1"),
        (ZEROS.astype(float), ZEROS, 2, (1, 1), "integer"),
        (ZEROS, ZEROS, 2, (1, 1, 1), "spacing"),
        (ZEROS, ZEROS, 2, (1, 0), "spacing"),
        (ZEROS, ZEROS, 2, (1, -1), "spacing"),
        (ZEROS, ZEROS, 2, (1, NAN), "spacing"),
        (ZEROS, ZEROS, 1, (1, 1), "num_classes"),
    ],
)
def test_bad_input_is_refused(prediction, reference, num_classes, spacing, message):
    with pytest.raises(ValueError, match=message):
        case_metrics(prediction, reference, num_classes, spacing)


def test_large_unsigned_values_do_not_wrap():
    reference = np.full((2, 2), 2**32 + 1, dtype=np.uint64)
    with pytest.raises(ValueError, match="reference"):
        case_metrics(np.zeros((2, 2), dtype=np.uint64), reference, 2, (1, 1))


# ---- summary ----


def case(dice, hd95, flagged) -> CaseMetrics:
    """A case with Jaccard = Dice / 2 and ASSD = HD95 / 2, not counted where Dice is NaN."""
    dice, hd95 = np.array(dice), np.array(hd95)
    return CaseMetrics(dice, dice / 2, hd95, hd95 / 2, ~np.isnan(dice), np.array(flagged))


CASES = [
    case([0.9, 0.5, NAN], [2.0, 4.0, NAN], [False, False, False]),
    case([0.7, NAN, NAN], [6.0, NAN, NAN], [False, False, False]),
    case([0.5, 0.0, NAN], [4.0, 100.0, NAN], [False, True, False]),
    case([NAN, NAN, NAN], [NAN, NAN, NAN], [False, False, False]),
]


def test_summary_by_hand():
    summary = summarise(CASES)
    np.testing.assert_array_equal(summary.n, [3, 2, 0])
    np.testing.assert_array_equal(summary.flagged, [0, 1, 0])
    np.testing.assert_allclose(summary.mean["dice"], [0.7, 0.25, NAN])
    np.testing.assert_allclose(summary.mean["hd95"], [4.0, 52.0, NAN])
    np.testing.assert_allclose(summary.std["dice"], [np.sqrt(0.08 / 3), 0.25, NAN])
    np.testing.assert_allclose(summary.std["hd95"], [np.sqrt(8 / 3), 48.0, NAN])
    # Over classes with n > 0, which is not the mean over cases of (0.7, 0.7, 0.25).
    np.testing.assert_allclose(summary.overall_mean["dice"], 0.475)
    np.testing.assert_allclose(summary.overall_mean["hd95"], 28.0)
    # Over the three cases that count: Dice 0.7, 0.7, 0.25 and HD95 3, 6, 52.
    np.testing.assert_allclose(summary.overall_std["dice"], 0.45 * np.sqrt(2) / 3)
    np.testing.assert_allclose(summary.overall_std["hd95"], np.std([3, 6, 52]))
    for half, whole in (("jaccard", "dice"), ("assd", "hd95")):
        np.testing.assert_allclose(summary.mean[half], summary.mean[whole] / 2)
        np.testing.assert_allclose(summary.std[half], summary.std[whole] / 2)
        np.testing.assert_allclose(summary.overall_mean[half], summary.overall_mean[whole] / 2)
        np.testing.assert_allclose(summary.overall_std[half], summary.overall_std[whole] / 2)
    assert summary.overall_n == 3
    assert summary.overall_flagged == 1


def test_summary_with_nothing_counted():
    summary = summarise(CASES[3:])
    np.testing.assert_array_equal(summary.n, [0, 0, 0])
    assert summary.overall_n == 0
    assert all(np.isnan(summary.overall_mean[name]) for name in METRICS)
    assert all(np.isnan(summary.overall_std[name]) for name in METRICS)


def test_summary_refuses_no_cases_and_mixed_classes():
    with pytest.raises(ValueError, match="0 cases"):
        summarise([])
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        summarise([CASES[0], case([0.5], [1.0], [False])])


def test_table():
    lines = format_table(summarise(CASES), ["RV", "myocardium", "LV"], "val, teacher").split("\n")
    assert lines[0] == "val, teacher"
    header = lines[2]
    rows = {line.split()[0]: line.split() for line in lines}
    assert all(name in header for name in ("Dice %", "Jaccard %", "HD95 mm", "ASSD mm", "flagged"))
    assert " ".join(rows["RV"]) == "RV 70.00 ± 16.33 35.00 ± 8.16 4.00 ± 1.63 2.00 ± 0.82 3 0"
    assert rows["myocardium"][-2:] == ["2", "1"]
    assert rows["LV"] == ["LV", "n/a", "n/a", "n/a", "n/a", "0", "0"]
    assert lines[-1].split()[:4] == ["mean", "47.50", "±", "21.21"]
    assert lines[-1].split()[-2:] == ["3", "1"]
    assert len({len(line) for line in lines[2:]}) == 1
    with pytest.raises(ValueError, match="class names"):
        format_table(summarise(CASES), ["background", "RV", "myocardium", "LV"], "")


def test_table_with_nothing_counted():
    lines = format_table(summarise(CASES[3:]), ["a", "b", "c"], "").split("\n")
    assert lines[-1].split() == ["mean", "n/a", "n/a", "n/a", "n/a", "0", "0"]


# ---- features ----


def test_compactness_and_separability_by_hand():
    # Class 0: two unit vectors 90 degrees apart, mean of length 1/sqrt(2), at 45 degrees.
    # Class 2: one direction, at 180 degrees. Class 1 is absent. Norms play no part.
    features = np.array([[3.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [-5.0, 0.0]])
    compactness, separability = compactness_separability(features, np.array([0, 0, 2, 2]), 3)
    np.testing.assert_allclose(compactness, (np.sqrt(0.5) + 1) / 2)
    np.testing.assert_allclose(separability, 1 + np.sqrt(0.5))


def test_compactness_and_separability_by_definition():
    random = np.random.default_rng(3)
    labels = random.integers(0, 4, 200)
    features = random.standard_normal((200, 8)) + 2 * random.standard_normal((4, 8))[labels]
    units = [f / np.linalg.norm(f) for f in features]
    centroids, tight = [], []
    for c in range(4):
        members = [u for u, label in zip(units, labels, strict=True) if label == c]
        centroid = sum(members) / len(members)
        centroids.append(centroid / np.linalg.norm(centroid))
        tight.append(np.mean([u @ centroids[-1] for u in members]))
    apart = [1 - centroids[a] @ centroids[b] for a in range(4) for b in range(a + 1, 4)]
    ours = compactness_separability(features, labels, 4)
    np.testing.assert_allclose(ours, (np.mean(tight), np.mean(apart)))


def test_features_where_undefined_or_degenerate():
    nothing = compactness_separability(np.zeros((0, 4)), np.zeros(0, dtype=int), 3)
    assert np.isnan(nothing).all()
    one_class = compactness_separability(np.eye(2), np.array([1, 1]), 3)
    np.testing.assert_allclose(one_class[0], np.sqrt(0.5))
    assert np.isnan(one_class[1])
    # Zero vectors, and members that cancel, have no direction: cosine 0, nothing divided by zero.
    zeros = compactness_separability(np.zeros((2, 3)), np.array([0, 1]), 2)
    assert zeros == (0.0, 1.0)
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert compactness_separability(opposite, np.array([0, 0, 1]), 2) == (0.5, 1.0)
    # Squares of these would under- or overflow.
    extreme = np.array([[1e-300, 0.0], [1e300, 0.0]])
    assert compactness_separability(extreme, np.array([0, 0]), 2)[0] == 1.0


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        compactness_separability(np.zeros((3, 2)), np.zeros(2, dtype=int), 2)
    with pytest.raises(ValueError, match="NaN"):
        compactness_separability(np.array([[NAN]]), np.array([0]), 2)
    with pytest.raises(ValueError, match="labels"):
        compactness_separability(np.ones((1, 2)), np.array([2]), 2)
    with pytest.raises(ValueError, match="integer"):
        compactness_separability(np.ones((1, 2)), np.array([0.0]), 2)
