"""The preprocessing recipe: native scan -> prepared arrays, and back (NumPy, no JAX).

Training and prediction call the same functions with the same `Recipe`. The order is: reorient, map
label values to classes, resample, scale the intensities.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel import orientations
from nibabel.affines import voxel_sizes

MAX_CLASSES = _UNKNOWN = 255  # no class has this index
_MAX_VOXELS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How scans are prepared; travels with the prepared dataset and the checkpoint.

    Attributes:
      orientation: where each axis of the prepared array points, one letter of each of L/R, P/A and
        S/I. "SPL": slices from foot to head, rows from front to back, columns from right to left.
      spacing: voxel size of the prepared array, mm, in its axis order; None keeps each case's own.
      intensity: "mr": clip to `percentiles` of the body, then zero mean and unit standard deviation
        over the body, for each channel. "ct": clip to `window`, then map it linearly to [-1, 1].
      percentiles: for "mr", in 0..100.
      window: for "ct", lower and upper bound, HU.
      label_values: `label_values[c]` is the value that class c has in files; class 0 is background.
      class_names: one for each class.

    Raises:
      ValueError: a field is out of its range; the message names it.
    """

    orientation: str = "SPL"
    spacing: tuple[float | None, ...] = (None, 1.5, 1.5)
    intensity: str = "mr"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] = (-160.0, 240.0)
    label_values: tuple[int, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("orientation", str(self.orientation).upper())
        put("spacing", tuple(None if s is None else float(s) for s in self.spacing))
        put("percentiles", tuple(float(p) for p in self.percentiles))
        put("window", tuple(float(w) for w in self.window))
        put("class_names", tuple(str(n) for n in self.class_names))
        if any(int(v) != v for v in self.label_values):
            raise ValueError(f"label_values must be whole numbers, got {self.label_values}")
        put("label_values", tuple(int(v) for v in self.label_values))

        axes = sorted("LR" if c in "LR" else "PA" if c in "PA" else c for c in self.orientation)
        if axes not in (["I", "LR", "PA"], ["LR", "PA", "S"]):
            raise ValueError(f"orientation must have one letter of each of LR, PA and SI, got {self.orientation}")
        if len(self.spacing) != 3 or not all(s is None or (math.isfinite(s) and s > 0) for s in self.spacing):
            raise ValueError(f"spacing must be three sizes in mm or None, got {self.spacing}")
        if self.intensity not in ("mr", "ct"):
            raise ValueError(f"intensity must be 'mr' or 'ct', got {self.intensity!r}")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must rise within 0..100, got {self.percentiles}")
        if len(self.window) != 2 or not all(map(math.isfinite, self.window)) or self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two rising numbers, got {self.window}")
        values = self.label_values
        if not 2 <= len(values) <= MAX_CLASSES or len(set(values)) < len(values) or min(values) < 0:
            raise ValueError(f"label_values must be 2 to {MAX_CLASSES} different numbers >= 0, got {values}")
        if len(self.class_names) != len(values):
            raise ValueError(f"class_names must be {len(values)}, one for each value, got {self.class_names}")
        if len(set(self.class_names)) < len(values):  # tables are by name
            raise ValueError(
                f"class_names must differ, got {self.class_names}: give the masks one value for what is one class"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Raises ValueError on unknown or missing fields."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a recipe of this version: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The native and the prepared voxel grid of one scan; they cover the same field of view.

    Attributes:
      native_shape: (X, Y, Z).
      native_affine: float64 (4, 4), voxel index -> mm.
      shape: (D, H, W) of the prepared array.
      spacing: voxel size of the prepared array, mm, in its axis order.
    """

    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @property
    def native_spacing(self) -> tuple[float, float, float]:
        """Voxel size of the native array, mm, in its axis order."""
        x, y, z = voxel_sizes(self.native_affine)
        return float(x), float(y), float(z)


def make_grid(native_shape: Sequence[int], affine: np.ndarray, recipe: Recipe) -> Grid:
    """Lays the prepared grid over a scan.

    The axes are permuted and flipped to the nearest orientation (an oblique scan is not rotated).
    The centres of the two grids coincide; an axis of n voxels of size s gets
    max(1, round(n s / s')) voxels of size exactly s'.

    Args:
      native_shape: (X, Y, Z).
      affine: (4, 4), voxel index -> mm.
      recipe: gives the orientation and the spacing s'.

    Raises:
      ValueError: the affine is singular or not finite; the shape is not 3-D; the prepared array
        would have more than 2^31 voxels.
    """
    affine = np.array(affine, np.float64)
    if len(native_shape) != 3 or min(native_shape) < 1:
        raise ValueError(f"a scan has three axes, got shape {tuple(native_shape)}")
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"the affine must be 4 x 4 and finite, got {affine.tolist()}")
    sizes = voxel_sizes(affine)
    if not np.all(sizes > 0) or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise ValueError(f"the affine is singular, correct the header: {affine.tolist()}")

    _, axes = _reorientation(affine, recipe.orientation)
    native = [float(sizes[axis]) for axis in axes]
    spacing = [own if s is None else s for own, s in zip(native, recipe.spacing, strict=True)]
    counts = [native_shape[axes[i]] * native[i] / spacing[i] for i in range(3)]
    if math.prod(max(1.0, n) for n in counts) > _MAX_VOXELS:
        raise ValueError(
            f"shape {tuple(native_shape)} with voxels of {sizes.tolist()} mm is too large at a "
            f"spacing of {spacing} mm; correct the header's voxel sizes or choose a larger spacing"
        )
    x, y, z = (int(n) for n in native_shape)
    depth, height, width = (max(1, round(n)) for n in counts)
    return Grid((x, y, z), affine, (depth, height, width), (spacing[0], spacing[1], spacing[2]))


def prepare_image(array: np.ndarray, grid: Grid, recipe: Recipe) -> np.ndarray:
    """Reorients, resamples (linear) and scales an image.

    Args:
      array: (X, Y, Z, C), as read.
      grid: from `make_grid`.
      recipe: the same as for the grid.

    Returns:
      float32 (D, H, W, C), finite.

    Raises:
      ValueError: the shape is not the grid's, or voxels are not finite.

    Warns:
      UserWarning: a channel holds one value only, or all of it is on one side of the CT window.
    """
    array = np.asarray(array, np.float32)
    if array.ndim != 4 or array.shape[:3] != grid.native_shape:
        raise ValueError(f"image shape {array.shape} is not {grid.native_shape} + (channels,)")
    if not np.isfinite(array).all():
        raise ValueError("the image has voxels that are NaN or infinite; replace them by numbers")
    low, high = array.min((0, 1, 2)), array.max((0, 1, 2))
    # The clip undoes rounding, which z-scores would blow up where the image is constant.
    array = np.clip(_resample_to_prepared(array, grid, recipe), low, high)
    scale = _scale_mr if recipe.intensity == "mr" else _scale_ct
    bounds = recipe.percentiles if recipe.intensity == "mr" else recipe.window
    out = np.empty(array.shape, np.float32)
    for channel in range(array.shape[-1]):
        out[..., channel] = scale(array[..., channel].astype(np.float64), bounds)
        if out[..., channel].min() == out[..., channel].max():
            warnings.warn(f"channel {channel} of the image is constant", stacklevel=2)
    return out


def prepare_label(array: np.ndarray, grid: Grid, recipe: Recipe) -> np.ndarray:
    """Reorients a label map, maps its values to classes and resamples it.

    Each class's indicator is resampled linearly and the largest wins (the lower class on a tie), so
    that no class can appear that was not there.

    Args:
      array: whole numbers (X, Y, Z), values among `recipe.label_values`.
      grid: from `make_grid`.
      recipe: the same as for the grid.

    Returns:
      uint8 (D, H, W), classes 0..K-1.

    Raises:
      ValueError: the shape is not the grid's, or a value is unknown.
    """
    array = np.asarray(array)
    if array.shape != grid.native_shape:
        raise ValueError(f"label shape {array.shape} is not the image's, {grid.native_shape}")
    classes = map_labels(array, recipe.label_values)
    best = np.full(grid.shape, -1.0, np.float32)
    label = np.zeros(grid.shape, np.uint8)
    for index in range(len(recipe.label_values)):
        share = _resample_to_prepared((classes == index).astype(np.float32), grid, recipe)
        label[share > best] = index
        np.maximum(best, share, out=best)
    return label


def map_labels(array: np.ndarray, label_values: Sequence[int]) -> np.ndarray:
    """Values in files -> classes, uint8. Raises ValueError that lists unknown values."""
    array = np.asarray(array)
    classes = np.full(array.shape, _UNKNOWN, np.uint8)
    for index, value in enumerate(label_values):
        classes[array == value] = index
    unknown = classes == _UNKNOWN
    if unknown.any():
        values = np.unique(array[unknown])
        raise ValueError(
            f"unknown label values {values[:10].tolist()}{' ...' if values.size > 10 else ''} in "
            f"{np.count_nonzero(unknown)} voxels; known are {list(label_values)}"
        )
    return classes


def unmap_labels(classes: np.ndarray, label_values: Sequence[int]) -> np.ndarray:
    """Classes -> values in files, smallest unsigned type. Raises ValueError on another class."""
    classes = np.asarray(classes)
    if classes.size and not 0 <= classes.min() <= classes.max() < len(label_values):
        raise ValueError(f"classes must be 0..{len(label_values) - 1}, got {classes.min()}..{classes.max()}")
    return np.asarray(label_values, np.min_scalar_type(max(label_values)))[classes]


def to_native(values: np.ndarray, grid: Grid, recipe: Recipe) -> np.ndarray:
    """Brings probabilities or logits back to the native grid: linear, then the inverse flips.

    Args:
      values: (D, H, W, K) on the prepared grid.
      grid: from `make_grid`.
      recipe: the same as for the grid.

    Returns:
      float32 (X, Y, Z, K); argmax over the last axis gives the classes.

    Raises:
      ValueError: the shape is not the grid's.
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 4 or values.shape[:3] != grid.shape:
        raise ValueError(f"shape {values.shape} is not {grid.shape} + (classes,)")
    ornt, axes = _reorientation(grid.native_affine, recipe.orientation)
    ratio = [grid.native_spacing[a] / s for a, s in zip(axes, grid.spacing, strict=True)]
    values = _resample(values, [grid.native_shape[axis] for axis in axes], ratio)
    flipped = values.transpose(*ornt[:, 0].astype(int), 3)
    return flipped[tuple(slice(None, None, int(step)) for step in ornt[:, 1])]


def _reorientation(affine: np.ndarray, orientation: str) -> tuple[np.ndarray, list[int]]:
    """nibabel's transform (3, 2) native -> prepared, and the native axis of each prepared axis."""
    ornt = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(orientation))
    return ornt, [int(axis) for axis in np.argsort(ornt[:, 0])]


def _resample_to_prepared(array: np.ndarray, grid: Grid, recipe: Recipe) -> np.ndarray:
    """(X, Y, Z, ...) float32 -> (D, H, W, ...) float32."""
    ornt, axes = _reorientation(grid.native_affine, recipe.orientation)
    ratio = [s / grid.native_spacing[a] for a, s in zip(axes, grid.spacing, strict=True)]
    return _resample(orientations.apply_orientation(array, ornt), grid.shape, ratio)


def _resample(array: np.ndarray, shape: Sequence[int], ratio: Sequence[float]) -> np.ndarray:
    """Resamples the first three axes, one after the other, to `shape`.

    `ratio` is the target's voxel size over the source's. Linear interpolation is separable, so the
    axes are independent; those that shrink most go first, which leaves the others less to do.
    """
    for axis in np.argsort([new / old for new, old in zip(shape, array.shape[:3], strict=True)]):
        if array.shape[axis] != shape[axis] or abs(ratio[axis] - 1) > 1e-5:
            array = _resample_axis(array, int(axis), shape[axis], ratio[axis])
    return array


def _resample_axis(array: np.ndarray, axis: int, new: int, ratio: float) -> np.ndarray:
    """Linear interpolation of float32 `array` along one axis, to `new` voxels.

    Voxel i of the new axis lies at x = (i + 1/2 - new/2) ratio + old/2 - 1/2 of the old one, so the
    centres coincide; beyond the border its voxel goes on. Where the new voxels are larger, the tent
    of linear interpolation is widened to their size (as jax.image.resize and Pillow do), so that a
    coarse grid sees averages of the fine one and not aliases.
    """
    old = array.shape[axis]
    width = max(1.0, ratio)
    x = np.clip((np.arange(new) + 0.5 - new / 2) * ratio + old / 2 - 0.5, 0, old - 1)
    # The old voxels nearer to x than the width; a column of `taps` for each new voxel.
    taps = np.floor(x - width).astype(int) + 1 + np.arange(math.ceil(2 * width))[:, None]
    weights = np.maximum(0, 1 - np.abs(x - taps) / width) * ((taps >= 0) & (taps < old))
    weights = (weights / weights.sum(0)).astype(np.float32)
    taps = np.clip(taps, 0, old - 1)
    weights = weights.reshape(*taps.shape, *[1] * (array.ndim - axis - 1))
    # A gather for each tap is several times faster than a product with the (sparse) matrix.
    out = np.take(array, taps[0], axis) * weights[0]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        part = np.take(array, tap, axis)
        part *= weight
        out += part
    return out


def _scale_mr(image: np.ndarray, percentiles: tuple[float, float]) -> np.ndarray:
    """Clips to percentiles of the body, then z-score over the body; zeros for a constant image.

    The body is what exceeds the minimum by more than a tenth of (99th percentile - minimum): the
    air around a patient is dark and takes no part in the statistics, however much of it there is.
    """
    darkest, brightest = image.min(), image.max()
    if darkest == brightest:
        return np.zeros_like(image)
    body = image[image > darkest + 0.1 * (np.percentile(image, 99) - darkest)]
    low, high = np.percentile(body, percentiles)
    # A body of one value, but for rounding, as in a binary image: take everything instead.
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        body, low, high = image, darkest, brightest
    body = np.clip(body, low, high)
    return (np.clip(image, low, high) - body.mean()) / body.std()


def _scale_ct(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Clips to the window (HU) and maps it to [-1, 1]."""
    low, high = window
    return (np.clip(image, low, high) - low) * (2 / (high - low)) - 1
