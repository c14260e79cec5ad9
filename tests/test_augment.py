import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sscl_jax import augment

# Most of the time of these tests is compilation, which this option halves.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

resample = quick_jit(augment.resample)
resample_labels = quick_jit(augment.resample_labels)
normalised_position = quick_jit(augment.normalised_position, static_argnums=1)

STILL = {
    "rotate": 0.0,
    "scale": (1.0, 1.0),
    "shear": 0.0,
    "elastic": 0.0,
    "spread": 0.0,
}
QUIET = {"contrast": 0.0, "brightness": 0.0, "gamma": 0.0}
CLEAR = QUIET | {"bias": 0.0, "noise": 0.0, "blur": 0.0}


@functools.partial(quick_jit, static_argnames=("shape", "patch", "flip"))
def batch_of_coords(keys, strengths, extent, focus, *, shape, patch, flip):
    # The strengths are traced, so that tests which differ only in them share one compilation.
    return jax.vmap(
        lambda key: augment.random_coordinates(
            key, shape=shape, patch=patch, flip=flip, extent=extent, focus=focus, **strengths
        )
    )(keys)


def draw_many(count: int, *, shape, patch, extent=None, flip=None, focus=None, **changes) -> np.ndarray:
    """Coordinates of `count` warps in which only what `changes` names is not a centred crop."""
    keys = jax.random.split(jax.random.key(0), count)
    extent = jnp.asarray(shape if extent is None else extent, jnp.float32)
    flip = (False,) * len(shape) if flip is None else flip
    coords = batch_of_coords(keys, STILL | changes, extent, focus, shape=shape, patch=patch, flip=flip)
    return np.asarray(coords)


def draw_coords(**arguments) -> np.ndarray:
    return draw_many(1, **arguments)[0]


def matrix_of(coords: np.ndarray) -> np.ndarray:
    """Linear part of a warp without elastic: column b is the step for one pixel on axis b."""
    rank = coords.shape[-1]
    origin = coords[(0,) * rank]
    steps = [coords[tuple(int(a == b) for a in range(rank))] - origin for b in range(rank)]
    return np.stack(steps, axis=-1)


def random_points(shape, count: int, margin: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.asarray(shape)
    return rng.uniform(-margin, sizes - 1 + margin, (count, len(shape))).astype(np.float32)


def in_canvas(points: np.ndarray, shape, border: float) -> np.ndarray:
    return np.all((points >= -border) & (points <= np.asarray(shape) - 1 + border), axis=-1)


# --- foreground ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 3)])
def test_foreground_is_drawn_evenly_by_class_and_then_by_pixel(shape):
    label = np.random.default_rng(0).choice([0, 0, 0, 0, 0, 0, 1, 1, 1, 3], shape).astype(np.uint8)  # no class 2
    draws = 4000
    draw = quick_jit(jax.vmap(lambda key: augment.random_foreground(key, label, 4, 0.75)))
    pixels, wanted = jax.device_get(draw(jax.random.split(jax.random.key(0), draws)))
    assert wanted.mean() == pytest.approx(0.75, abs=0.03)
    counts = np.zeros(shape)
    np.add.at(counts, tuple(pixels.T), 1)
    expected = sum(draws / 2 * (label == c) / (label == c).sum() for c in (1, 3))
    assert counts[expected == 0].sum() == 0
    # Binomial: five standard deviations.
    assert (np.abs(counts - expected) < 5 * np.sqrt(np.maximum(expected, 1))).all()


def test_foreground_of_a_label_without_any_does_not_count():
    pixel, wanted = augment.random_foreground(jax.random.key(0), jnp.zeros((4, 5), jnp.uint8), 3, 1.0)
    assert not wanted and np.all((0 <= pixel) & (pixel < np.array([4, 5])))


@pytest.mark.parametrize(
    "pixel, start",
    [((10, 10), (8, 7)), ((5, 4), (5, 4)), ((34, 31), (31, 26)), ((16, 10), (14, 7))],
)
def test_focus_becomes_the_centre_as_far_as_the_patch_stays_in_the_image(pixel, start):
    # The image covers rows 5 to 34 and columns 4 to 31 of the canvas.
    draw = functools.partial(draw_coords, shape=(40, 36), extent=(30, 28), patch=(4, 6), spread=1.0)
    focused = draw(focus=(jnp.array(pixel), jnp.array(True)))
    np.testing.assert_allclose(focused[0, 0], start)
    np.testing.assert_allclose(focused[-1, -1], np.add(start, (3, 5)))
    np.testing.assert_array_equal(draw(focus=(jnp.array(pixel), jnp.array(False))), draw())


def test_focus_leaves_an_image_smaller_than_the_patch_in_the_centre():
    draw = functools.partial(draw_coords, shape=(12, 20), extent=(7, 20), patch=(12, 8))
    focused = draw(focus=(jnp.array([3, 1]), jnp.array(True)))
    np.testing.assert_allclose(focused[0, 0], [draw()[0, 0, 0], 0])


# --- resampling -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11, 8), (5, 9, 7)])
def test_resample_equals_scipy(shape):
    image = np.random.default_rng(1).normal(size=(*shape, 2)).astype(np.float32)
    points = np.concatenate(
        [random_points(shape, 2000, 3.0), list(itertools.product(*((0, n - 1) for n in shape)))]
    ).astype(np.float32)
    # SciPy's "constant" fills from the outermost centre on, ours from the outer edge of the
    # pixel: in between ours is SciPy's "nearest".
    between = in_canvas(points, shape, 0.5) & ~in_canvas(points, shape, 0.0)
    assert between.any()
    ours = resample(jnp.asarray(image), jnp.asarray(points), -7.0)
    assert ours.shape == (len(points), 2)
    for channel in range(2):
        sample = functools.partial(ndimage.map_coordinates, image[..., channel], points.T.astype(np.float64), order=1)
        want = np.where(between, sample(mode="nearest"), sample(mode="constant", cval=-7.0))
        np.testing.assert_allclose(ours[:, channel], want, atol=2e-5)


@pytest.mark.parametrize("shape", [(11, 8), (5, 9, 7)])
def test_labels_equal_scipy(shape):
    labels = np.random.default_rng(2).integers(1, 5, shape).astype(np.uint8)
    points = random_points(shape, 3000, 3.0, seed=3)
    ours = resample_labels(jnp.asarray(labels), jnp.asarray(points))
    # "grid-constant" sees a canvas surrounded by zeros: nearest pixel, 0 beyond the outer edge.
    want = ndimage.map_coordinates(labels, points.T, order=0, mode="grid-constant", cval=0)
    assert ours.dtype == jnp.uint8
    np.testing.assert_array_equal(ours, want)


def test_resample_integer_image_and_float16():
    coords = jnp.array([[0.5, 0.0], [1.0, 1.0]])
    image = jnp.array([[[0], [4]], [[3], [8]]])
    np.testing.assert_allclose(resample(image, coords, 0.0)[:, 0], [1.5, 8.0])
    half = resample(image.astype(jnp.float16), coords, 0.0)
    np.testing.assert_allclose(half[:, 0], [1.5, 8.0])


def test_quarter_turn_by_hand():
    image = np.arange(25.0, dtype=np.float32).reshape(5, 5, 1)
    rows, columns = np.meshgrid(np.arange(5.0), np.arange(5.0), indexing="ij")
    # np.rot90 turns counter-clockwise: out[i, j] = in[j, 4 - i].
    coords = jnp.asarray(np.stack([columns, 4 - rows], axis=-1))
    np.testing.assert_array_equal(resample(image, coords, 0.0), np.rot90(image))


# --- warps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "extent", "patch", "start"),
    [
        ((10, 12), (10, 12), (4, 6), (3, 3)),
        (
            (10, 12),
            (7, 12),
            (4, 5),
            (2, 3),
        ),  # image from row floor(3/2) = 1, then floor(3/2) = 1 more
        ((6, 9, 8), (6, 8, 5), (3, 4, 4), (1, 2, 1)),
    ],
)
def test_still_warp_is_exactly_the_centred_crop(shape, extent, patch, start):
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    crop = tuple(slice(s, s + n) for s, n in zip(start, patch, strict=True))
    coords = draw_coords(shape=shape, patch=patch, extent=extent)
    assert coords.dtype == np.float32
    assert coords.shape == (*patch, len(patch))
    np.testing.assert_array_equal(resample(image, coords, 0.0), image[crop])
    labels = (image[..., 0] > 0).astype(np.int32)
    np.testing.assert_array_equal(resample_labels(labels, coords), labels[crop])


def test_patch_larger_than_the_canvas_is_padded():
    image = np.ones((4, 4, 1), np.float32)
    coords = draw_coords(shape=(4, 4), patch=(8, 6), spread=1.0)
    want = np.pad(image, ((2, 2), (1, 1), (0, 0)), constant_values=-3.0)
    np.testing.assert_array_equal(resample(image, coords, -3.0), want)


def test_flip_reverses_the_axes_that_may_flip():
    image = np.random.default_rng(0).normal(size=(5, 6, 7, 1)).astype(np.float32)
    drawn = draw_many(40, shape=(5, 6, 7), patch=(5, 6, 7), flip=(True, False, True))
    seen = set()
    for coords in drawn:
        axes = tuple(np.flatnonzero(np.diag(matrix_of(coords)) < 0))
        seen.add(axes)
        np.testing.assert_array_equal(resample(image, coords, 0.0), np.flip(image, axes))
    assert seen == {(), (0,), (2,), (0, 2)}


@pytest.mark.parametrize("rank", [2, 3])
def test_rotation_turns_the_last_two_axes(rank):
    shape = (9,) * rank
    drawn = draw_many(200, shape=shape, patch=shape, rotate=30.0)
    matrices = np.stack([matrix_of(coords) for coords in drawn])
    np.testing.assert_allclose(drawn[(slice(None), *(4,) * rank)], 4.0, atol=1e-5)  # centre stays
    plane = matrices[:, -2:, -2:]
    np.testing.assert_allclose(plane @ plane.swapaxes(1, 2), np.eye(2)[None].repeat(200, 0), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(plane), 1.0, atol=1e-5)
    angles = np.degrees(np.arctan2(plane[:, 1, 0], plane[:, 0, 0]))
    assert -30 <= angles.min() < -24 and 24 < angles.max() <= 30
    if rank == 3:
        np.testing.assert_array_equal(matrices[:, 0, 0], 1.0)
        np.testing.assert_array_equal(matrices[:, 0, 1:], 0.0)
        np.testing.assert_array_equal(matrices[:, 1:, 0], 0.0)


def test_zoom_above_one_magnifies_and_shear_slants():
    doubled = matrix_of(draw_coords(shape=(9, 9), patch=(9, 9), scale=(2.0, 2.0)))
    np.testing.assert_allclose(doubled, np.eye(2) / 2, atol=1e-6)
    drawn = draw_many(200, shape=(9, 9), patch=(9, 9), scale=(0.5, 2.0))
    zooms = np.array([1 / matrix_of(coords)[0, 0] for coords in drawn])
    assert 0.5 <= zooms.min() < 0.55 and 1.8 < zooms.max() <= 2.0 + 1e-5
    assert abs(np.mean(np.log(zooms))) < 0.1
    slanted = matrix_of(draw_coords(shape=(9, 9), patch=(9, 9), shear=0.3))
    np.testing.assert_allclose(slanted, [[1, slanted[0, 1]], [0, 1]], atol=1e-6)
    assert 0 < abs(slanted[0, 1]) <= 0.3


def test_spread_covers_the_image_at_whole_pixels():
    shape, extent, patch = (60, 40), (50, 20), (20, 24)
    drawn = draw_many(1000, shape=shape, extent=extent, patch=patch, spread=1.0)
    start = drawn[:, 0, 0]
    np.testing.assert_array_equal(start, np.round(start))
    # The image has rows 5..54; the columns of the patch exceed it, so they stay centred.
    assert start[:, 0].min() == 5
    assert start[:, 0].max() >= 34
    assert start[:, 0].max() <= 35
    np.testing.assert_array_equal(start[:, 1], 8)
    assert abs(start[:, 0].mean() - 20) < 1
    assert 6 < start[:, 0].std() < 7.5  # 0.44 (the truncated normal's) times 15
    half = draw_many(1000, shape=shape, extent=extent, patch=patch, spread=0.5)[:, 0, 0, 0]
    assert half.min() >= 12 and half.max() <= 28


@pytest.mark.parametrize("elastic", [3.0, (0.0, 2.0, 4.0)])
def test_elastic_displacement_has_the_requested_deviation(elastic):
    patch, wanted = (3, 36, 8), np.broadcast_to(elastic, 3)
    drawn = draw_many(4000, shape=patch, patch=patch, elastic=jnp.asarray(wanted, jnp.float32))
    displacement = drawn - np.stack(np.indices(patch), axis=-1)
    np.testing.assert_allclose(displacement.std((0, 1, 2, 3)), wanted, rtol=0.05)
    # The same everywhere in the patch, the borders included.
    everywhere = displacement.std(0)
    assert np.all(np.abs(everywhere - wanted) <= 0.1 * wanted)
    # Smooth: neighbours move together, so that the field does not fold at usual strengths.
    step = np.diff(displacement, axis=2).std((0, 1, 2, 3))
    assert np.all(step <= 0.08 * wanted)


def test_warp_composes_all_parts_about_one_centre():
    # Without elastic every warp is linear about the patch centre, whatever it is made of.
    coords = draw_coords(
        shape=(20, 20),
        patch=(9, 9),
        rotate=40.0,
        scale=(0.7, 1.4),
        shear=0.2,
        flip=(True, True),
    )
    offsets = np.stack(np.meshgrid(*[np.arange(9) - 4.0] * 2, indexing="ij"), axis=-1)
    centre = coords[4, 4]
    np.testing.assert_array_equal(centre, [9.0, 9.0])
    np.testing.assert_allclose(coords, centre + offsets @ matrix_of(coords).T, atol=1e-5)


def test_axis_counts_must_agree():
    with pytest.raises(ValueError, match="one entry for each axis"):
        draw_coords(shape=(8, 8), patch=(4, 4), flip=(True,))


# --- position -------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "extent"), [((12, 10), (7, 10)), ((6, 9, 8), (5, 4, 8))])
def test_position_against_brute_force(shape, extent):
    points = random_points(shape, 1500, 2.0, seed=4)
    position, inside = normalised_position(jnp.asarray(points), shape, jnp.asarray(extent, jnp.float32))
    painted = np.zeros(shape, np.int32)
    lead = [(n - e) // 2 for n, e in zip(shape, extent, strict=True)]
    painted[tuple(slice(s, s + e) for s, e in zip(lead, extent, strict=True))] = 1
    for point, where, is_inside in zip(points, np.asarray(position), np.asarray(inside), strict=True):
        nearest = np.floor(point + 0.5).astype(int)
        on_canvas = all(0 <= i < n for i, n in zip(nearest, shape, strict=True))
        assert is_inside == (on_canvas and painted[tuple(nearest)] == 1)
        for axis, value in enumerate(where):
            want = (point[axis] - lead[axis] + 0.5) / extent[axis]
            assert value == pytest.approx(min(max(want, 0.0), 1.0), abs=1e-6)
    np.testing.assert_array_equal(resample_labels(painted, points) == 1, inside)


def test_position_of_outer_pixels_by_hand():
    coords = draw_coords(shape=(6, 4), extent=(4, 4), patch=(6, 4))
    position, inside = normalised_position(coords, (6, 4), jnp.array([4.0, 4.0]))
    np.testing.assert_allclose(position[:, 0, 0], [0, 0.125, 0.375, 0.625, 0.875, 1])
    np.testing.assert_array_equal(inside[:, 0], [False, True, True, True, True, False])


# --- intensity ------------------------------------------------------------------------


@pytest.fixture
def image() -> jax.Array:
    rng = np.random.default_rng(7)
    return jnp.asarray(ndimage.gaussian_filter(rng.normal(size=(24, 20, 2)), 0.7), jnp.float32)


@quick_jit
def batch_of_weak(keys, image, strengths):
    return jax.vmap(lambda key: augment.weak_intensity(key, image, **strengths))(keys)


@quick_jit
def batch_of_strong(keys, image, strengths):
    return jax.vmap(lambda key: augment.strong_intensity(key, image, **strengths))(keys)


def draw_weak(image, **changes) -> np.ndarray:
    keys = jax.random.split(jax.random.key(1), 400)
    return np.asarray(batch_of_weak(keys, image, QUIET | changes))


def draw_strong(image, **changes) -> np.ndarray:
    keys = jax.random.split(jax.random.key(2), 400)
    return np.asarray(batch_of_strong(keys, image, CLEAR | changes))


def test_zero_strength_changes_nothing(image):
    want = np.broadcast_to(image, (400, *image.shape))
    np.testing.assert_allclose(draw_weak(image), want, atol=1e-5)
    np.testing.assert_allclose(draw_strong(image), want, atol=1e-5)


def test_contrast_brightness_and_gamma_by_their_definition(image):
    flat = np.asarray(image)
    centred = flat - flat.mean((0, 1))
    contrasted = draw_weak(image, contrast=1.0)
    np.testing.assert_allclose(contrasted.mean((1, 2)), flat.mean((0, 1))[None].repeat(400, 0), atol=1e-5)
    factor = contrasted.std((1, 2)) / flat.std((0, 1))
    assert 0.5 - 1e-4 <= factor.min() < 0.53 and 1.9 < factor.max() <= 2 + 1e-4
    want = flat.mean((0, 1)) + factor[:, None, None] * centred
    np.testing.assert_allclose(contrasted, want, atol=1e-4)

    shift = draw_weak(image, brightness=0.3) - flat
    np.testing.assert_allclose(shift.std((1, 2)), 0.0, atol=1e-5)
    assert shift.mean((1, 2)).std() == pytest.approx(0.3, rel=0.15)

    curved = draw_weak(image, gamma=1.0)
    low, high = flat.min((0, 1)), flat.max((0, 1))
    np.testing.assert_allclose(curved.min((1, 2)), low[None].repeat(400, 0), atol=1e-5)
    np.testing.assert_allclose(curved.max((1, 2)), high[None].repeat(400, 0), atol=1e-5)
    unit, bent = (flat - low) / (high - low), (curved - low) / (high - low)
    middle = (unit > 0.2) & (unit < 0.8)
    unit, bent, middle = unit[..., 0], bent[..., 0], middle[..., 0]
    powers = [np.log(sample[middle]) / np.log(unit[middle]) for sample in bent]
    assert max(np.ptp(power) for power in powers) < 1e-3
    means = np.array([power.mean() for power in powers])
    assert 0.5 - 1e-3 <= means.min() < 0.53 and 1.9 < means.max() <= 2 + 1e-3


@pytest.mark.parametrize("change", [{"bias": 0.3}, {"noise": 0.2}, {"blur": 6.0}])
def test_strong_changes_come_half_of_the_time(image, change):
    drawn = draw_strong(image, **change)
    changed = np.abs(drawn - np.asarray(image)).max((1, 2, 3)) > 1e-4
    assert changed.mean() == pytest.approx(0.5, abs=0.08)


def test_bias_field_is_smooth_and_of_the_requested_deviation(image):
    before = np.asarray(image) - np.asarray(image).min((0, 1))
    clear = np.all(before > 0.3, axis=-1)
    after = draw_strong(image, bias=0.3) - np.asarray(image).min((0, 1))
    fields = np.log(after[:, clear] / before[clear])
    applied = fields[np.abs(fields).max((1, 2)) > 1e-3]
    np.testing.assert_allclose(applied[..., 0], applied[..., 1], atol=1e-3)
    assert applied.std() == pytest.approx(0.3, rel=0.15)
    # Smooth: a polynomial of low order explains nearly all of it.
    row, column = np.argwhere(clear).T / 12.0 - 1.0
    terms = [row**i * column**j for i in range(6) for j in range(6)]
    basis, _ = np.linalg.qr(np.stack(terms, axis=-1))
    rest = applied[..., 0].T - basis @ (basis.T @ applied[..., 0].T)
    assert rest.std() < 0.02


def test_noise_is_white_and_scaled_by_the_image(image):
    residual = draw_strong(5.0 * image, noise=0.2) - 5.0 * np.asarray(image)
    level = residual.std((1, 2)) / (5.0 * np.asarray(image).std((0, 1)))
    noisy = level[level[:, 0] > 1e-4]
    assert noisy.max() < 0.2 * 1.15
    assert noisy.mean() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("shape", [(24, 20, 2), (10, 12, 14, 1)])
def test_blur_equals_scipy(shape):
    image = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    blur = quick_jit(augment.gaussian_blur)
    for sigma in (0.0, 0.4, 1.0, 1.7):
        ours = np.asarray(blur(image, sigma))
        for channel in range(shape[-1]):
            want = ndimage.gaussian_filter(image[..., channel], sigma, radius=3, mode="nearest")
            np.testing.assert_allclose(ours[..., channel], want, atol=1e-5)
    # Against the untruncated filter the 7 taps are close where the sigma is small.
    ours = np.asarray(blur(image, 0.8))[..., 0]
    want = ndimage.gaussian_filter(image[..., 0], 0.8, truncate=8.0, mode="nearest")
    np.testing.assert_allclose(ours, want, atol=5e-3)


@quick_jit
def strong_with(seed, value, strengths):
    names = ("contrast", "brightness", "gamma", "bias", "noise", "blur")
    image = value * jnp.ones((9, 8, 2)) * jnp.array([1.0, 0.0]) + jnp.array([0.0, 1.0])
    strong = augment.strong_intensity(jax.random.key(seed), image, **dict(zip(names, strengths, strict=True)))
    peak = image.at[0, 0].add(strengths[0])
    return strong, augment.weak_intensity(
        jax.random.key(seed), peak, **dict(zip(names[:3], strengths[:3], strict=True))
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.floats(-1e6, 1e6, width=32),
    st.lists(st.floats(0, 20, width=32), min_size=6, max_size=6),
)
def test_intensities_stay_finite(seed, value, strengths):
    for result in strong_with(seed, value, jnp.asarray(strengths)):
        assert np.isfinite(result).all()


@quick_jit
def warp_with(seed, extent, strengths):
    rotate, scale, shear, elastic, spread = strengths
    coords = augment.random_coordinates(
        jax.random.key(seed),
        shape=(10, 12),
        extent=extent,
        patch=(7, 9),
        rotate=rotate,
        scale=(1.0 / scale, scale),
        shear=shear,
        elastic=elastic,
        flip=(True, False),
        spread=spread,
    )
    image = jax.random.normal(jax.random.key(seed + 1), (10, 12, 1))
    position, _ = augment.normalised_position(coords, (10, 12), extent)
    return coords, image, augment.resample(image, coords, 0.0), position


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**30),
    st.tuples(st.integers(1, 10), st.integers(1, 12)),
    st.tuples(
        st.floats(0, 360, width=32),
        st.floats(1, 100, width=32),
        st.floats(0, 10, width=32),
        st.floats(0, 100, width=32),
        st.floats(0, 1, width=32),
    ),
)
def test_warps_stay_finite_and_within_the_range_of_the_image(seed, extent, strengths):
    arguments = (jnp.asarray(extent, jnp.float32), jnp.asarray(strengths))
    coords, image, warped, position = warp_with(seed, *arguments)
    assert np.isfinite(coords).all()
    assert np.abs(warped).max() <= np.abs(image).max() + 1e-5
    assert np.min(position) >= 0 and np.max(position) <= 1


# --- CutMix ---------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(64, 64), (40, 96), (16, 48, 32)])
@pytest.mark.parametrize("area", [(0.1, 0.3), (0.25, 0.25), (0.6, 0.95), (0.0, 1.0)])
def test_cutmix_box_is_one_box_of_the_right_area(patch, area):
    mask = functools.partial(augment.cutmix_mask, patch=patch, area=area)
    masks = np.asarray(quick_jit(jax.vmap(mask))(jax.random.split(jax.random.key(0), 100)))
    assert masks.dtype == bool
    assert masks.shape == (100, *patch)
    fractions = masks.reshape(100, -1).mean(1)
    slack = sum(0.5 / n for n in patch) * 1.1
    assert fractions.min() >= area[0] - slack
    assert fractions.max() <= area[1] + slack
    for box in masks:
        if not box.any():
            continue
        ends = [(where.min(), where.max() + 1) for where in np.nonzero(box)]
        assert np.prod([stop - start for start, stop in ends]) == box.sum()
        sides = [(stop - start) / n for (start, stop), n in zip(ends, patch, strict=True)]
        if min(sides) > 0.25:  # rounding to pixels matters for small boxes
            assert max(sides) / min(sides) <= 2.0 * 1.15
    if area[0] < area[1]:
        assert np.ptp(fractions) > 0.7 * (area[1] - area[0])


def test_cutmix_box_reaches_all_corners():
    mask = functools.partial(augment.cutmix_mask, patch=(16, 16), area=(0.1, 0.3))
    masks = np.asarray(quick_jit(jax.vmap(mask))(jax.random.split(jax.random.key(1), 1000)))
    covered = masks.mean(0)
    assert min(covered[0, 0], covered[0, -1], covered[-1, 0], covered[-1, -1]) > 0


# --- keys and vmap --------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "patch"), [((20, 18), (12, 10)), ((6, 12, 10), (4, 8, 8))])
def test_same_key_same_view_and_vmap_equals_loop(shape, patch):
    def view(key, image, label, extent):
        warp, weak, strong, box = jax.random.split(key, 4)
        coords = augment.random_coordinates(
            warp,
            shape=shape,
            extent=extent,
            patch=patch,
            rotate=20.0,
            scale=(0.8, 1.25),
            shear=0.1,
            elastic=2.0,
            flip=(True,) * len(patch),
            spread=1.0,
        )
        warped = augment.resample(image, coords, 0.0)
        return {
            "coords": coords,
            "label": augment.resample_labels(label, coords),
            "position": augment.normalised_position(coords, shape, extent)[0],
            "inside": augment.normalised_position(coords, shape, extent)[1],
            "weak": augment.weak_intensity(weak, warped, contrast=0.1, brightness=0.1, gamma=0.1),
            "strong": augment.strong_intensity(
                strong,
                warped,
                contrast=0.4,
                brightness=0.3,
                gamma=0.4,
                bias=0.3,
                noise=0.2,
                blur=1.5,
            ),
            "box": augment.cutmix_mask(box, patch, (0.1, 0.4)),
        }

    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, *shape, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (3, *shape)), jnp.uint8)
    extents = jnp.asarray(shape, jnp.float32) - jnp.array([[0.0], [1.0], [2.0]])
    keys = jax.random.split(jax.random.key(9), 3)
    batched = quick_jit(jax.vmap(view))
    together = batched(keys, images, labels, extents)
    again = batched(keys, images, labels, extents)
    single = quick_jit(view)
    for name, value in together.items():
        assert value.shape[1 : 1 + len(patch)] == patch
        np.testing.assert_array_equal(value, again[name])
        if value.dtype != bool:
            assert not np.array_equal(value[0], value[1])
    assert together["weak"].shape == together["strong"].shape == (3, *patch, 1)
    for i in range(3):
        alone = single(keys[i], images[i], labels[i], extents[i])
        for name, value in alone.items():
            if name in (
                "label",
                "inside",
            ):  # a rounding may move a pixel over the border of two labels
                assert np.mean(value == together[name][i]) > 0.99
            else:
                np.testing.assert_allclose(value, together[name][i], atol=1e-4)
