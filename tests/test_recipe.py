"""The recipe: geometry against world coordinates, intensities by hand, errors."""

import itertools
import json

import jax.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial.transform import Rotation

from sscl_jax.data.recipe import (
    Recipe,
    make_grid,
    map_labels,
    prepare_image,
    prepare_label,
    to_native,
    unmap_labels,
)

ORIENTATIONS = [
    "".join(pair[side] for pair, side in zip(pairs, sides, strict=True))
    for pairs in itertools.permutations(("LR", "PA", "IS"))
    for sides in itertools.product((0, 1), repeat=3)
]
# World (RAS) grid of the reference object: shape, voxel sizes (mm), position of voxel (0, 0, 0).
SHAPE, SIZES, ORIGIN = (17, 22, 9), (1.25, 0.9, 2.5), (-31.0, 12.5, 70.0)


def recipe(**fields):
    defaults = {"label_values": (0, 1, 2, 4), "class_names": ("bg", "a", "b", "c")}
    return Recipe(**{**defaults, **fields})


def affine_of(sizes=SIZES, origin=ORIGIN):
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = origin
    return affine


def stored_as(array, affine, codes):
    """The same physical object stored with other axes: (array, affine)."""
    ornt = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
    stored = orientations.apply_orientation(array, ornt)
    return stored, affine @ orientations.inv_ornt_aff(ornt, array.shape)


def blob(shape=SHAPE):
    """An ellipsoid off the centre, with a smaller one in it; values 0, 1, 4."""
    x, y, z = (np.arange(n) / n for n in shape)
    x, y, z = np.meshgrid(x, y, z, indexing="ij")
    inside = ((x - 0.4) / 0.3) ** 2 + ((y - 0.55) / 0.35) ** 2 + ((z - 0.5) / 0.4) ** 2 < 1
    core = ((x - 0.4) / 0.15) ** 2 + ((y - 0.65) / 0.15) ** 2 + ((z - 0.5) / 0.25) ** 2 < 1
    return np.where(core, 4, inside.astype(int))


def back(label, grid, rec):
    """Prepared classes -> native values, the way that prediction does it."""
    one_hot = np.eye(len(rec.label_values), dtype=np.float32)[label]
    return unmap_labels(to_native(one_hot, grid, rec).argmax(-1), rec.label_values)


def dice(a, b):
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("target", ["SPL", "RAS", "IAR", "PSR"])
def test_every_storage_order_is_prepared_alike_and_comes_back_exactly(target):
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, 4], SHAPE)
    image = rng.normal(size=SHAPE).astype(np.float32)
    exact = recipe(orientation=target, spacing=(None, None, None))
    coarse = recipe(orientation=target, spacing=(2.0, 1.1, 1.3))
    first = {}
    for codes in ORIENTATIONS:
        stored, affine = stored_as(label, affine_of(), codes)
        scan, _ = stored_as(image, affine_of(), codes)
        grid = make_grid(stored.shape, affine, exact)
        prepared = prepare_label(stored, grid, exact)
        np.testing.assert_array_equal(back(prepared, grid, exact), stored)
        for rec in (exact, coarse):
            grid = make_grid(stored.shape, affine, rec)
            now = prepare_label(stored, grid, rec), prepare_image(scan[..., None], grid, rec)
            then = first.setdefault(rec, now)
            np.testing.assert_array_equal(now[0], then[0])
            # The sums over taps run the other way on a flipped axis, hence the rounding.
            np.testing.assert_allclose(now[1], then[1], atol=1e-5)


def test_prepared_axes_point_where_the_orientation_says():
    affine = affine_of()
    label = np.zeros(SHAPE, int)
    label[2, 5, 7] = 4  # RAS index: x from the left, y from the back, z from the foot
    rec = recipe(orientation="SPL", spacing=(None, None, None))
    prepared = prepare_label(label, make_grid(SHAPE, affine, rec), rec)
    # Slices foot -> head: 7. Rows front -> back: 21 - 5. Columns right -> left: 16 - 2.
    assert np.argwhere(prepared == 3).tolist() == [[7, 16, 14]]


@pytest.mark.parametrize("angles", [(10, -20, 15), (40, 5, -5), (0, 0, 30)])
def test_oblique_scan_comes_back(angles):
    affine = affine_of()
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(SIZES)
    label = np.random.default_rng(1).choice([0, 1, 2, 4], SHAPE)
    for codes in ORIENTATIONS:
        stored, oblique = stored_as(label, affine, codes)
        rec = recipe(spacing=(None, None, None))
        grid = make_grid(stored.shape, oblique, rec)
        np.testing.assert_allclose(sorted(grid.spacing), sorted(SIZES))
        np.testing.assert_array_equal(back(prepare_label(stored, grid, rec), grid, rec), stored, err_msg=codes)


@pytest.mark.parametrize("spacing", [(None, 1.5, 1.5), (2.0, 0.5, 0.7), (2.5, 1.7, 1.0)])
def test_resampled_object_keeps_shape_and_place(spacing):
    shape = (60, 70, 24)
    for codes in ORIENTATIONS[::5]:
        stored, affine = stored_as(blob(shape), affine_of(), codes)
        rec = recipe(spacing=spacing)
        grid = make_grid(stored.shape, affine, rec)
        again = back(prepare_label(stored, grid, rec), grid, rec)
        assert dice(again > 0, stored > 0) > 0.96
        assert dice(again == 4, stored == 4) > 0.93
        before, after = (apply_affine(affine, ndimage.center_of_mass(a > 0)) for a in (stored, again))
        assert np.linalg.norm(before - after) < 0.15  # mm


def prepared_positions(grid, rec):
    """World coordinates (D, H, W, 3) of the prepared voxels, from the definition alone.

    The axes' directions are the affine's unit columns; the two fields of view share their centre.
    """
    centre = apply_affine(grid.native_affine, (np.array(grid.native_shape) - 1) / 2)
    columns = grid.native_affine[:3, :3] / np.array(grid.native_spacing)
    codes = orientations.aff2axcodes(grid.native_affine)
    positions = centre
    for axis, letter in enumerate(rec.orientation):
        pair = next(p for p in ("LR", "PA", "IS") if letter in p)
        native = next(i for i, code in enumerate(codes) if code in pair)
        direction = columns[:, native] * (1 if codes[native] == letter else -1)
        n = grid.shape[axis]
        steps = (np.arange(n) - (n - 1) / 2) * grid.spacing[axis]
        steps = steps.reshape([-1 if a == axis else 1 for a in range(3)])
        positions = positions + steps[..., None] * direction
    return positions


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "ILP", "ASR"])
def test_resampling_equals_interpolation_in_world_space(codes):
    affine = affine_of()
    rotation = Rotation.from_euler("xyz", (12, -8, 20), degrees=True).as_matrix()
    affine[:3, :3] = rotation @ np.diag(SIZES)
    image = np.random.default_rng(2).uniform(-150, 230, SHAPE).astype(np.float32)
    stored, affine = stored_as(image, affine, codes)
    rec = recipe(spacing=(2.1, 0.8, 0.77), intensity="ct", orientation="SPL")
    grid = make_grid(stored.shape, affine, rec)
    positions = prepared_positions(grid, rec)
    index = apply_affine(np.linalg.inv(affine), positions)
    expected = ndimage.map_coordinates(stored, np.moveaxis(index, -1, 0), order=1, mode="nearest")
    actual = prepare_image(stored[..., None], grid, rec)[..., 0]
    np.testing.assert_allclose(actual, (expected + 160) / 200 - 1, atol=1e-4)

    # And back: the same with the roles of the grids exchanged.
    rec = recipe(spacing=(2.9, 1.3, 1.9), orientation="SPL")
    grid = make_grid(stored.shape, affine, rec)
    values = np.random.default_rng(3).random((*grid.shape, 2), np.float32)
    origin, *ends = (prepared_positions(grid, rec)[i] for i in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
    prepared_affine = np.eye(4)
    prepared_affine[:3] = np.stack([*(end - origin for end in ends), origin], axis=1)
    native = np.moveaxis(np.indices(stored.shape), 0, -1)
    index = apply_affine(np.linalg.inv(prepared_affine) @ affine, native)
    expected = np.stack(
        [
            ndimage.map_coordinates(v, np.moveaxis(index, -1, 0), order=1, mode="nearest")
            for v in np.moveaxis(values, -1, 0)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(to_native(values, grid, rec), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_shrinking_equals_antialiased_resize(factor):
    image = np.random.default_rng(4).uniform(-160, 240, (24, 36, 12)).astype(np.float32)
    rec = recipe(orientation="RAS", spacing=(factor, factor, factor), intensity="ct")
    grid = make_grid(image.shape, np.eye(4), rec)
    expected = jax.image.resize(image, grid.shape, "linear", antialias=True)
    actual = prepare_image(image[..., None], grid, rec)[..., 0]
    np.testing.assert_allclose(actual, np.asarray(expected) / 200 - 0.2, atol=1e-5)


def test_grid_of_a_short_axis_case():
    rec = recipe(spacing=(None, 1.5, 1.5))
    grid = make_grid((20, 30, 5), affine_of((1.25, 1.25, 10.0)), rec)
    assert grid.shape == (5, 25, 17)  # 30 * 1.25 / 1.5 = 25; 20 * 1.25 / 1.5 = 16.7
    assert grid.spacing == (10.0, 1.5, 1.5)
    assert grid.native_spacing == (1.25, 1.25, 10.0)
    assert make_grid((1, 1, 1), np.eye(4), recipe(spacing=(9.0, 9.0, 9.0))).shape == (1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    sizes=st.tuples(*[st.floats(0.3, 12)] * 3),
    spacing=st.tuples(*[st.none() | st.floats(0.5, 12)] * 3),
    codes=st.sampled_from(ORIENTATIONS),
    target=st.sampled_from(ORIENTATIONS),
)
def test_any_grid_keeps_field_of_view_and_constants(shape, sizes, spacing, codes, target):
    _, affine = stored_as(np.zeros(shape), affine_of(sizes), codes)
    native_shape = stored_as(np.zeros(shape), affine_of(sizes), codes)[0].shape
    rec = recipe(spacing=spacing, orientation=target, intensity="ct", window=(0.0, 2.0))
    grid = make_grid(native_shape, affine, rec)
    ones = to_native(np.ones((*grid.shape, 2), np.float32), grid, rec)
    assert ones.shape == (*native_shape, 2) and ones.dtype == np.float32
    np.testing.assert_allclose(ones, 1, atol=1e-5)
    label = prepare_label(np.full(native_shape, 4), grid, rec)
    assert label.shape == grid.shape and (label == 3).all()
    image = np.full((*native_shape, 1), 1.5, np.float32)
    with pytest.warns(UserWarning, match="constant"):
        np.testing.assert_allclose(prepare_image(image, grid, rec), 0.5, atol=1e-5)
    native = np.prod([n * s for n, s in zip(shape, sizes, strict=True)])
    prepared = np.prod([n * s for n, s in zip(grid.shape, grid.spacing, strict=True)])
    if min(grid.shape) > 1:
        assert 0.4 < prepared / native < 2.0  # each axis is off by half a voxel at most


@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 500, 600), (0, 255, 70000)])
def test_labels_map_there_and_back(values):
    rec = recipe(label_values=values, class_names=tuple("abcd"[: len(values)]))
    label = np.random.default_rng(5).choice(values, (8, 9, 4))
    classes = map_labels(label, values)
    assert classes.dtype == np.uint8 and classes.max() == len(values) - 1
    np.testing.assert_array_equal(unmap_labels(classes, values), label)
    grid = make_grid(label.shape, np.eye(4), rec)
    assert set(np.unique(prepare_label(label, grid, rec))) <= set(range(len(values)))
    grid = make_grid(label.shape, np.eye(4), recipe(spacing=(None, None, None)))
    np.testing.assert_array_equal(back(prepare_label(label, grid, rec), grid, rec), label)


def test_label_boundaries_between_2_and_4_never_make_another_class():
    label = np.full((10, 10, 10), 2)
    label[5:] = 4
    rec = recipe(spacing=(0.4, 0.4, 0.4))
    assert np.unique(prepare_label(label, make_grid(label.shape, np.eye(4), rec), rec)).tolist() == [
        2,
        3,
    ]


def test_unknown_labels_and_classes_are_listed():
    with pytest.raises(ValueError, match=r"\[3, 9\] in 2 voxels; known are \[0, 1\]"):
        map_labels(np.array([0, 1, 9, 3]), (0, 1))
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2"):
        unmap_labels(np.array([0, 2]), (0, 1))
    with pytest.raises(ValueError, match=r"got -1\.\.0"):
        unmap_labels(np.array([0, -1]), (0, 1))


def as_is(**fields):
    rec = recipe(spacing=(None, None, None), orientation="RAS", **fields)
    return rec, make_grid((4, 5, 6), np.eye(4), rec)


def test_mr_intensities_by_hand():
    rec, grid = as_is(percentiles=(0, 100))
    image = np.zeros((4, 5, 6, 2), np.float32)
    image[2:, ..., 0] = 100
    image[3:, ..., 0] = 300  # body: 30 voxels of 100, 30 of 300: mean 200, deviation 100
    image[..., 1] = image[..., 0] * 7 - 3  # another unit gives the same
    out = prepare_image(image, grid, rec)
    assert out.dtype == np.float32
    for channel in (0, 1):
        np.testing.assert_allclose(out[2, ..., channel], -1, atol=1e-6)
        np.testing.assert_allclose(out[3, ..., channel], 1, atol=1e-6)
        np.testing.assert_allclose(out[0, ..., channel], -1, atol=1e-6)  # clipped to the body's


def test_mr_clips_a_hot_voxel():
    rec, _ = as_is()
    image = np.random.default_rng(6).uniform(50, 100, (20, 20, 20, 1)).astype(np.float32)
    grid = make_grid((20, 20, 20), np.eye(4), rec)
    plain = prepare_image(image, grid, rec)
    image[1, 1, 1] = 1e6
    hot = prepare_image(image, grid, rec)
    assert hot.max() == hot[1, 1, 1, 0] < 1.8  # the end of a uniform distribution is sqrt(3)
    image[1, 1, 1] = hot[1, 1, 1] = plain[1, 1, 1]
    np.testing.assert_allclose(hot, plain, atol=0.01)


@pytest.mark.parametrize("lit", [1, 30, 119])
def test_mr_binary_image_keeps_its_contrast(lit):
    rec, grid = as_is()
    image = np.zeros(120, np.float32)
    image[:lit] = 5
    out = prepare_image(image.reshape(4, 5, 6, 1), grid, rec)
    assert np.isfinite(out).all() and np.unique(out).size == 2


def test_mr_constant_parts_are_not_blown_up_by_resampling():
    image = np.zeros((40, 40, 40, 1), np.float32)
    image[13:] = 0.1
    rec = recipe(spacing=(0.9, 1.3, 0.7), percentiles=(5, 95))
    out = prepare_image(image, make_grid((40, 40, 40), np.eye(4), rec), rec)
    assert np.abs(out).max() < 3 and out.max() - out.min() > 1


def test_ct_intensities_by_hand():
    rec, grid = as_is(intensity="ct")
    image = np.full((4, 5, 6, 1), -1000, np.float32)
    image[0], image[1], image[2] = 40, 240, 3000
    out = prepare_image(image, grid, rec)
    np.testing.assert_allclose(out[:, 0, 0, 0], [0, 1, 1, -1], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -7.5, 3e4, 1e-30])
def test_constant_image_gives_zeros_and_a_warning(value):
    rec, grid = as_is()
    with pytest.warns(UserWarning, match="channel 0 of the image is constant"):
        out = prepare_image(np.full((4, 5, 6, 1), value, np.float32), grid, rec)
    assert (out == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_image_is_refused(value):
    rec, grid = as_is()
    image = np.ones((4, 5, 6, 1), np.float32)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        prepare_image(image, grid, rec)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=2), st.integers(0, 99))
def test_two_values_never_give_nan(values, count):
    rec, grid = as_is()
    image = np.full(120, values[0], np.float32)
    image[:count] = values[1]
    if values[0] == values[1] or count == 0:
        return
    assert np.isfinite(prepare_image(image.reshape(4, 5, 6, 1), grid, rec)).all()


def test_shapes_must_be_the_grids():
    rec, grid = as_is()
    with pytest.raises(ValueError, match=r"\(4, 5, 6\)"):
        prepare_image(np.zeros((4, 5, 7, 1)), grid, rec)
    with pytest.raises(ValueError, match=r"\(4, 5, 6\)"):
        prepare_image(np.zeros((4, 5, 6)), grid, rec)
    with pytest.raises(ValueError, match=r"\(5, 4, 6\)"):
        prepare_label(np.zeros((5, 4, 6), int), grid, rec)
    with pytest.raises(ValueError, match="classes"):
        to_native(np.zeros((4, 5, 6)), grid, rec)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 0, 1, 1]),
        np.full((4, 4), np.nan),
        np.eye(3),
        np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_degenerate_affine_is_refused(affine):
    with pytest.raises(ValueError, match="affine"):
        make_grid((4, 5, 6), affine, recipe())


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="too large at a spacing"):
        make_grid((500, 500, 500), np.diag([100.0, 100, 100, 1]), recipe(spacing=(1, 1, 1)))
    with pytest.raises(ValueError, match="three axes"):
        make_grid((4, 5), np.eye(4), recipe())
    with pytest.raises(ValueError, match="three axes"):
        make_grid((4, 5, 0), np.eye(4), recipe())


def test_recipe_goes_through_json():
    rec = recipe(spacing=[None, 1, np.float64(2)], label_values=[np.int64(0), 1, 2, 4])
    again = Recipe.from_dict(json.loads(json.dumps(rec.to_dict())))
    assert again == rec and hash(again) == hash(rec)
    assert again.spacing == (None, 1.0, 2.0)
    with pytest.raises(ValueError, match="colour"):
        Recipe.from_dict({**rec.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="label_values"):
        Recipe.from_dict({"class_names": ["a"]})


@pytest.mark.parametrize(
    "fields",
    [
        {"orientation": "SPP"},
        {"orientation": "SP"},
        {"orientation": "SPLR"},
        {"orientation": "XYZ"},
        {"spacing": (1.0, 1.0)},
        {"spacing": (1.0, 1.0, 0.0)},
        {"spacing": (1.0, 1.0, float("nan"))},
        {"intensity": "us"},
        {"percentiles": (99, 1)},
        {"percentiles": (0, 101)},
        {"window": (240, -160)},
        {"window": (0, float("inf"))},
        {"label_values": (0, 1, 1, 2)},
        {"label_values": (0, 1, 2, -1)},
        {"label_values": (0, 1, 2, 2.5)},
        {"label_values": (0,)},
        {"class_names": ("bg", "a")},
        {"class_names": ("bg", "a", "b", "a")},
    ],
)
def test_wrong_recipe_names_the_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        recipe(**fields)
