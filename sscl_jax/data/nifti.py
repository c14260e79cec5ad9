"""NIfTI files in and out (NumPy, no JAX).

Arrays keep the axis order of the file, (X, Y, Z[, C]), and come with the affine that takes voxel
indices to millimetres. Every error is a ValueError or FileNotFoundError that starts with the path.
"""

import gzip
import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

MAX_VOXELS = 2**31
MAX_LABELS = 256
MASK = "mask made by sscl_jax"  # begins the description in the header of each mask that is written here
FAR = 1e9  # mm; no scan lies so far away, none has voxels of the inverse
AFFINE_TOLERANCE = 1e-3  # relative to the voxel size: what float32 headers lose by rounding
SHEAR = 2e-4  # radians; headers in float32 or with few digits stay below
MILLIMETRES = {1: 1e3, 3: 1e-3}  # in the units of xyzt_units that are not mm: metre and micron
# Deflate cannot shrink by more than this factor, so a .gz file bounds the data that it holds.
_DEFLATE_RATIO = 1032


def quiet_nibabel() -> None:
    """nibabel mends headers and says so, without the file's name; what matters of it is judged here, with the name."""
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Extension size is not a multiple of 16", UserWarning)


quiet_nibabel()


def read_image(path: str | Path, channels: bool = False) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads an image.

    Args:
      path: a `.nii` or `.nii.gz` file of shape (X, Y), (X, Y, Z) or (X, Y, Z, 1); other 4-D shapes, or (X, Y, Z, 1, C)
        as ITK writes it, only with `channels`.
      channels: take the fourth axis as the channels of one image.

    Returns:
      The image as float32 (X, Y, Z, C) with the file's intensity scaling applied, C = 1 for a 3-D
      file; its affine, float64 (4, 4), mm whatever the file's unit, with the voxel sizes of pixdim; its header, for
      `write_mask`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not NIfTI, damaged or truncated, RGB or complex, a shape other than the above, voxels
        that are not finite, or an affine that spans no volume. A fourth axis of 3 or 4 bytes is taken for
        colour, never for time.

    Warns:
      UserWarning: the affine's axes are not at right angles (they are treated as if they were).
    """
    image, array = _load(path, np.float32)
    if array.ndim == 4 and array.shape[3] in (3, 4) and image.get_data_dtype() == np.uint8:
        raise ValueError(
            f"{path}: shape {array.shape} of uint8 looks like an RGB colour image; convert it to one number per "
            "voxel, or to int16 if the fourth axis holds channels or time points"
        )
    array = check_image(path, array, channels)
    affine = check_affine(path, _affine(image.header))
    if warning := shear_warning(path, affine):
        warnings.warn(warning, stacklevel=2)
    return array, affine, image.header


def read_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map.

    Returns:
      The labels (X, Y, Z) in the smallest unsigned integer type that holds them, with the values of
      the file; the affine, float64 (4, 4), mm.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `read_image`; or values that are fractional, negative, not finite or too many
        to be labels.
    """
    image, array = _load(path, None)
    return check_label(path, array), check_affine(path, _affine(image.header))


def read_channels(paths: Sequence[Path], read: Callable[[Path], tuple]) -> tuple:
    """What `read` gives of the first file, with the channels of all of them: (X, Y, Z, C), affine, and so on.

    Raises:
      ValueError: a file cannot be used, or is not on the grid of the first.
    """
    (array, affine, *rest), *others = [read(path) for path in paths]
    parts = [array]
    for path, (other, other_affine, *_) in zip(paths[1:], others, strict=True):
        told = ""
        if other.shape[:3] != array.shape[:3]:
            told = f"shapes {other.shape[:3]} and {array.shape[:3]}"
        elif far := grids_apart(array.shape[:3], other_affine, affine):
            told = f"{far:.3g} mm apart"
        if told:
            raise ValueError(
                f"{path}: is not on the grid of {paths[0]}, as the channels of one image must be ({told}): resample it"
            )
        parts.append(other)
    return np.concatenate(parts, axis=-1) if others else array, affine, *rest


def grids_apart(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """How far two grids of one shape (X, Y, Z) are apart, mm, at that corner where most; 0 for what headers round."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    offset = corners @ (other - affine)[:3, :3].T + (other - affine)[:3, 3]
    most = float(np.linalg.norm(offset, axis=1).max())
    return most if most > max(AFFINE_TOLERANCE * max(shape), 0.05) * voxel_sizes(other).min() else 0.0


def check_image(path: str | Path, array: np.ndarray, channels: bool = False) -> np.ndarray:
    """What an image of any format must be: float32 (X, Y, Z), or (X, Y, Z, C) -> (X, Y, Z, C).

    Raises:
      ValueError: the array is 4-D without `channels`, or has voxels that are not finite.
    """
    if array.ndim == 4 and not channels:
        raise ValueError(
            f"{path}: the image is 4-D, shape {array.shape}; split it into 3-D files, one for each "
            "time point, or say that its fourth axis holds the channels of one image"
        )
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{path}: {bad} of {array.size} voxels are NaN, infinite or beyond float32, the first "
            f"at {first}; replace them by numbers"
        )
    return array.reshape(*array.shape[:3], -1)


def check_label(path: str | Path, array: np.ndarray) -> np.ndarray:
    """What a label map of any format must be: (X, Y, Z) -> the smallest unsigned type that holds it.

    Raises:
      ValueError: the array is 4-D, or its values are fractional, negative, not finite or too many.
    """
    if array.ndim == 4:
        raise ValueError(f"{path}: the label map is 4-D, shape {array.shape}; give one 3-D file")
    if array.dtype.kind == "f":
        # A label stored with an intensity scaling comes back with rounding errors, hence 1e-4.
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(array - np.rint(array)) < 1e-4)
        if wrong.any():
            raise ValueError(
                f"{path}: labels must be whole numbers, found {_some(array[wrong])}; is this an "
                "image or a probability map?"
            )
        array = np.rint(array)
    low, high = array.min(), array.max()
    if low < 0 or high >= 2**32:
        odd = array[(array < 0) | (array >= 2**32)]
        raise ValueError(f"{path}: labels must lie in 0..2^32-1, found {_some(odd)}; is this an image?")
    array = array.astype(np.min_scalar_type(int(high)))
    distinct = np.count_nonzero(np.bincount(array.ravel())) if high < 2**16 else np.unique(array).size
    if distinct > MAX_LABELS:
        raise ValueError(f"{path}: {distinct} distinct values, a label map has at most {MAX_LABELS}; is this an image?")
    return array


@np.errstate(all="ignore")  # of what is damaged, any number can come
def check_affine(path: str | Path, affine: np.ndarray) -> np.ndarray:
    """What an affine of any format must be: finite, with three axes that span a volume. Returns it.

    Raises:
      ValueError: it is not, or its numbers are such as no scan has.
    """
    sizes = voxel_sizes(affine)
    usable = bool((np.abs(affine) < FAR).all() and (sizes > 1 / FAR).all())  # False for NaN
    if not usable or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise ValueError(
            f"{path}: its affine {np.round(affine[:3], 3).tolist()} is not finite, or has no volume: write the voxel "
            "sizes, directions and origin into the header"
        )
    return affine


def shear_warning(path: str | Path, affine: np.ndarray) -> str:
    """What to tell of an affine whose axes are not at right angles, "" if they are, to float32's rounding."""
    angle = _shear(affine)
    if angle < SHEAR:
        return ""
    return (
        f"{path}: the affine is sheared (axes off a right angle by {math.degrees(angle):.2g} degrees); distances and "
        "resampling ignore this"
    )


@np.errstate(all="ignore")  # `check_affine` refuses what is not finite
def header_warning(path: str | Path) -> str:
    """What to tell of a file whose header gives no directions, or two directions or voxel sizes, else "".

    A sform of unit steps along the axes beside other voxel sizes, as that of ACDC, tells none, and no origin.
    """
    image: Any = nib.load(path)
    header = image.header
    _keep_zero_sizes(header, Path(path))
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except ValueError as error:
        return f"{path}: its qform holds no rotation ({error}): the sform counts; correct the header"
    if sform is None and qform is None:
        axes, taken = "".join(nib.aff2axcodes(image.affine)), _sizes(voxel_sizes(_affine(header)))
        return (
            f"{path}: its header gives no directions (qform and sform code 0): axes {axes} and voxels of {taken} mm "
            "are taken; make sure that they are, or convert the scan again"
        )
    if sform is None:
        return ""
    sizes, pixdim = voxel_sizes(sform), np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    extent = [*image.shape[:3], *[1] * (4 - len(image.shape[:3]))]  # and 1 for the origin
    if (sizes > 0).all() and (pixdim > 0).all() and not np.allclose(sizes, pixdim, rtol=0.01):
        if not np.array_equal(np.abs(sform[:3, :3]), np.eye(3)):
            return (
                f"{path}: its voxels are {_sizes(pixdim)} mm by pixdim and {_sizes(sizes)} mm by the sform: pixdim "
                "counts; correct the header"
            )
        sform[:3, :3] *= pixdim
        sizes, extent[3] = pixdim, 0
    if qform is not None and (apart := np.linalg.norm(np.abs(sform - qform)[:3] @ extent)) > sizes.max():
        return (
            f"{path}: its sform and qform differ by up to {apart:.3g} mm and may be mirrored: the sform counts; make "
            "them equal"
        )
    return ""


def write_mask(path: str | Path, mask: np.ndarray, affine: np.ndarray, header: nib.Nifti1Header) -> None:
    """Writes a mask that overlays the image that `affine` and `header` come from.

    The header's geometry (qform, sform, their codes, units, voxel sizes) is kept bit for bit. The
    voxels are stored as the smallest unsigned integer type that holds the largest, unscaled.
    Header extensions are dropped, since they can hold the patient's name, and the description tells
    that it is ours, with a digest of the voxels. The file appears under its name only when
    complete; the parent folder is made.

    Args:
      path: ends in `.nii` or `.nii.gz`.
      mask: (X, Y, Z), whole numbers >= 0; (X, Y, Z, T) for a 4-D image.
      affine: (4, 4), as read with `header`.
      header: of the image, see `read_image`.

    Raises:
      ValueError: the mask is not of a whole-number type, has negative values or another shape than
        the header; the affine is not the header's; the name has another ending.
    """
    path, mask = Path(path), np.asarray(mask)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a mask's file name must end in .nii or .nii.gz")
    if mask.dtype.kind not in "biu" or (mask.size and mask.min() < 0):
        raise ValueError(f"{path}: a mask holds whole numbers >= 0, got {mask.dtype}")
    shape = _without_needless_axes(header.get_data_shape())
    shape = shape if mask.ndim == 4 else shape[:3]
    if mask.shape != shape + (1,) * (3 - len(shape)):
        raise ValueError(f"{path}: the mask's shape {mask.shape} is not the image's, {shape}")
    if not np.allclose(affine, _affine(header), rtol=1e-5, atol=1e-4):
        raise ValueError(f"{path}: the affine is not the header's; give those of the same image")

    header = header.copy()
    dtype = np.min_scalar_type(int(mask.max(initial=0)))
    header.extensions.clear()
    header["vox_offset"] = 0
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = f"{MASK} {_digest(mask)}"
    header.set_intent("none")
    sizes = header["pixdim"].copy()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # With an affine nibabel would rewrite qform and sform; without one it leaves the header's.
    image = image_class(mask.astype(dtype).reshape(shape), None, header)
    # Of which it mends a 0, and sets those of axes that a single slice does not have.
    image.header["pixdim"][:4] = sizes[:4]

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_our_mask(path: str | Path) -> bool:
    """Whether `write_mask` wrote this file, which may have been changed since; reads its header alone."""
    try:
        return nib.load(path).header["descrip"].item().startswith(MASK.encode())  # type: ignore[index]
    except Exception:  # a damaged header can make nibabel raise almost anything
        return False


def is_unchanged_mask(path: str | Path) -> bool:
    """Whether `write_mask` wrote this file, and its voxels are still those that it wrote."""
    try:
        image: Any = nib.load(path)
        return image.header["descrip"].item().decode() == f"{MASK} {_digest(np.asanyarray(image.dataobj))}"
    except Exception:  # as above
        return False


def _digest(mask: np.ndarray) -> str:
    """Eight hexadecimal digits that tell a mask from a corrected one, whatever type it is stored in."""
    return f"{zlib.crc32(mask.T.astype('<u4').tobytes()):08x}"


def _load(path: str | Path, dtype: type | None) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Returns the nibabel image and its scaled voxels (3-D or 4-D), as `dtype` or as they come."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except Exception as error:  # a damaged header can make nibabel raise almost anything
        raise ValueError(
            f"{path}: cannot be read as NIfTI ({_one_line(error)}); is it complete, and .nii or "
            ".nii.gz as its name says?"
        ) from error
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"{path}: is {type(image).__name__}; convert it to .nii.gz")
    stored = image.get_data_dtype()
    if stored.kind not in "biuf":
        kind = "an RGB colour" if stored.fields else f"a {stored}"
        raise ValueError(f"{path}: is {kind} image; convert it to one number per voxel")

    shape = _without_needless_axes(image.shape)
    shape = shape + (1,) * (3 - len(shape)) if len(shape) >= 2 else shape
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"{path}: has shape {image.shape}; expected (X, Y, Z)")
    # Compare the claim with the file before anything is allocated for it.
    compressed = path.name.lower().endswith(".gz")
    expected = int(image.dataobj.offset) + math.prod(shape) * stored.itemsize  # type: ignore[attr-defined]
    room = path.stat().st_size * (_DEFLATE_RATIO if compressed else 1)
    if expected > room or math.prod(shape) > MAX_VOXELS:
        raise ValueError(
            f"{path}: truncated or damaged: its header announces shape {image.shape} of {stored}, "
            f"{expected} bytes, and the file has {path.stat().st_size}; copy it again"
        )

    try:
        if compressed:
            # To the end, so that gzip verifies its checksum; nibabel alone would stop before it.
            with gzip.open(path) as file:
                content = file.read(expected)
                while file.read(2**20):
                    pass
            image = type(image).from_bytes(content)
        _keep_zero_sizes(image.header, path)
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which callers refuse
            array = np.asanyarray(image.dataobj) if dtype is None else image.get_fdata("unchanged", dtype)
    except Exception as error:
        raise ValueError(f"{path}: truncated or damaged ({_one_line(error)}); copy it again") from error
    return image, array.reshape(shape)


def _without_needless_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(X, Y, Z, 1, C), ITK's shape of an image with channels, as (X, Y, Z, C); and no axis of 1 behind the third."""
    shape = (*shape[:3], *shape[4:]) if len(shape) == 5 and shape[3] == 1 else shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _keep_zero_sizes(header: nib.Nifti1Header, path: Path) -> None:
    """Puts back a voxel size of 0 that the file has, for which nibabel takes 1 mm: only the sform can tell it then."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        stored = type(header)(file.read(header.sizeof_hdr), check=False)
    for axis in range(1, 1 + min(3, int(header["dim"][0]))):
        if stored["pixdim"][axis] == 0:
            header["pixdim"][axis] = 0


@np.errstate(all="ignore")  # `check_affine` refuses what is not finite
def _affine(header: nib.Nifti1Header) -> np.ndarray:
    """Voxel indices to mm: directions and origin of the affine, voxel sizes of pixdim where the two disagree.

    They agree in most files. ACDC's have the unit matrix as sform and the true sizes in pixdim alone, and ITK, behind
    the published figures, takes those. A file in metres or microns is converted.
    """
    affine = np.array(header.get_best_affine(), np.float64)
    sizes = voxel_sizes(affine)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    usable = np.isfinite(pixdim).all() and (pixdim > 0).all() and np.isfinite(sizes).all() and (sizes > 0).all()
    if usable and not np.allclose(sizes, pixdim, rtol=0.01):
        affine[:3, :3] *= pixdim / sizes
    affine[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _shear(affine: np.ndarray) -> float:
    """Largest deviation of two voxel axes from a right angle, radians; 0 for a singular affine."""
    sizes = voxel_sizes(affine)
    if not np.all(sizes > 0):
        return 0.0
    unit = affine[:3, :3] / sizes
    return float(np.arcsin(np.clip(np.abs(unit.T @ unit - np.eye(3)).max(), 0, 1)))


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _some(values: np.ndarray) -> str:
    """Up to five distinct values, for a message."""
    values = np.unique(values)
    text = ", ".join(f"{value:g}" for value in values[:5])
    return text + (", ..." if values.size > 5 else "")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
