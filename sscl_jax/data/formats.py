"""Scans in formats other than NIfTI: NRRD, MetaImage, DICOM series, HDF5 (NumPy, no JAX).

`read_image` and `read_label` take what `nifti` takes, and

    .nrrd .nhdr .mha .mhd    one file (SimpleITK)
    a folder                 the slices of one DICOM series (SimpleITK)

HDF5 files hold arrays and nothing else, so `read_h5_image` and `read_h5_label` are told the spacing and the axes.

Arrays are (X, Y, Z[, C]), the order in which nibabel gives a NIfTI file; affines take voxel indices to millimetres in
RAS, that is to the right, to the front and up. ITK and DICOM count to the left and to the back, so two rows change
sign. Every error is a ValueError or FileNotFoundError that starts with the path.
"""

import importlib
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np

from sscl_jax.data import nifti

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
H5 = (".h5", ".hdf5")
DICOM = (".dcm", ".ima")
SUFFIXES = (*NIFTI, *ITK)  # of files that are whole scans
# Behind the name of a scan, in that of its mask; .seg is 3D Slicer's, of .seg.nrrd.
MASK_ENDINGS = ("_gt", "_label", "_seg", "_mask", ".seg")

# Units in NRRD's headers that change nothing: millimetres, and those of axes that are not of space.
NRRD_UNITS = {b"mm", b"millimeter", b"millimeters", b"millimetre", b"millimetres", b"none", b"???", b"s", b"ms"}

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
UNEQUAL = 0.05  # of the slices' distance: by how much one of them may differ
TILT = math.radians(0.5)  # by which the row of slices may lean from their normal


def read_image(path: str | Path, channels: bool = False) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads an image of any format.

    Args:
      path: a file, or a folder with one DICOM series.
      channels: take a fourth axis, or the components of each voxel, as the channels of one image.

    Returns:
      The image as float32 (X, Y, Z, C), scaled as the file says (CT from DICOM is in HU); its affine, float64 (4, 4),
      mm, RAS; a NIfTI header of this geometry, for `nifti.write_mask`.

    Raises:
      FileNotFoundError: there is nothing of this name.
      ValueError: an unknown format, or one whose library is not installed; damaged; RGB or complex; voxels that are
        not finite; a DICOM folder with several series, or whose slices are not equally spaced.

    Warns:
      UserWarning: as `nifti.read_image`.
    """
    path = Path(path)
    if path.is_dir():
        return read_dicom(path)
    if path.name.lower().endswith(NIFTI):
        return nifti.read_image(path, channels)
    array, affine = _read_itk(path)
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (3, 4):
        raise ValueError(f"{path}: is an RGB colour image; convert it to one number per voxel")
    array = nifti.check_image(path, _to_float32(array), channels)
    if warning := nifti.shear_warning(path, affine):
        warnings.warn(warning, stacklevel=2)
    return array, affine, make_header(array.shape, affine)


def read_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map of any format: whole numbers (X, Y, Z) in the smallest unsigned type, and the affine.

    Raises:
      FileNotFoundError, ValueError: as `read_image` and `nifti.read_label`.
    """
    path = Path(path)
    if path.is_dir():
        array, affine, _ = read_dicom(path)
        return nifti.check_label(path, array[..., 0]), affine
    if path.name.lower().endswith(NIFTI):
        return nifti.read_label(path)
    array, affine = _read_itk(path)
    return nifti.check_label(path, array), affine


def make_header(shape: Sequence[int], affine: np.ndarray) -> nib.Nifti1Header:
    """A NIfTI header for a scan of another format.

    Args:
      shape: (X, Y, Z[, C]); one channel takes no axis.
      affine: (4, 4), mm, RAS, axes at right angles.
    """
    header = nib.Nifti1Header()
    header.set_data_shape(shape if len(shape) == 4 and shape[3] > 1 else shape[:3])
    header.set_data_dtype(np.float32)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    return header


def stem(path: Path) -> str:
    """Name of a scan: of a file without its ending, of a folder as it is; in NFC, for macOS has accents otherwise."""
    ending = next((e for e in SUFFIXES if path.name.lower().endswith(e)), "")
    return composed(path.name if path.is_dir() else path.name[: len(path.name) - len(ending)])


def composed(name: str) -> str:
    """A name in NFC, that is with each accent in its letter, so that one name is written in one way."""
    return unicodedata.normalize("NFC", name)


def without_mask_ending(name: str) -> str:
    """Name of the scan of which a file would be the mask, by its name without ending; the same where it is none."""
    ending = next((each for each in MASK_ENDINGS if name.endswith(each)), "")
    return name.removesuffix(ending) or name


def _to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which is refused
        return array.astype(np.float32, copy=False)


# --- NRRD and MetaImage ---------------------------------------------------------------------------


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z[, C]) as stored, and the affine (4, 4), of one file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    name = path.name.lower()
    if name.endswith(H5):
        raise ValueError(f"{path}: HDF5 holds no spacing; convert it to NIfTI, with the spacing of the scan")
    if is_dicom(path):
        raise ValueError(f"{path}: is one DICOM file; give the folder of its series")
    if not name.endswith(ITK):
        raise ValueError(f"{path}: is of no known format; convert it to .nii.gz ({', '.join(SUFFIXES)} can be read)")
    sitk = _library("SimpleITK", "nrrd")
    _check_says_spacing(path)
    data_files(path)
    _check_names_slices(path)
    image = _read(sitk, path)
    if "complex" in image.GetPixelIDTypeAsString():
        raise ValueError(f"{path}: is a complex image; convert it to one number per voxel")
    axes, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if axes not in (3, 4) or (axes == 4 and components > 1):
        raise ValueError(f"{path}: has shape {image.GetSize()}; expected (X, Y, Z)")
    array = sitk.GetArrayFromImage(image)
    # ITK's arrays run backwards, with the components last.
    array = np.moveaxis(array.T, 0, -1) if components > 1 else array.T
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array, nifti.check_affine(
        path, _affine_of(image)
    )


def data_files(path: Path) -> list[Path]:
    """Files in which an NRRD or MetaImage header says that its voxels are; none where they follow the header.

    Raises:
      OSError, ValueError: it cannot be read, or counts them in steps of 0.
    """
    if not path.name.lower().endswith(ITK):
        return []
    with open(path, "rb") as file:
        text = file.read(2**20).decode("latin-1").replace("\r", "")
    if path.name.lower().endswith((".nrrd", ".nhdr")):
        text = text.split("\n\n")[0]
    match = re.search(r"^(?:data ?file:|ElementDataFile *=) *(.*?) *$", text, re.MULTILINE | re.IGNORECASE)
    if not match or match[1].upper() == "LOCAL":
        return []
    names = [match[1]]
    if match[1].upper().startswith("LIST"):
        names = text[match.end() :].split("\n")
    elif numbered := re.fullmatch(r"(\S*%\d*d\S*) +(\d+) +(\d+) +(\d+).*", match[1]):
        if not int(numbered[4]):  # ITK would divide by it, which ends the process
            raise ValueError(f"{path}: counts its files in steps of 0; correct the last number of {match[1]!r}")
        names = [numbered[1] % n for n in range(int(numbered[2]), int(numbered[3]) + 1, int(numbered[4]))]
    return [path.parent / name.strip() for name in names if name.strip()]


def _affine_of(image: Any) -> np.ndarray:
    """Affine (4, 4), RAS, of the first three axes of a SimpleITK image."""
    axes = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (axes, axes))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return LPS_TO_RAS @ affine


def _check_says_spacing(path: Path) -> None:
    """Refuses a header that gives no voxel size, for which ITK would put 1 mm, or gives it in another unit."""
    with open(path, "rb") as file:
        text = file.read(2**16).lower()
    if path.name.lower().endswith((".nrrd", ".nhdr")):
        header, words = text.replace(b"\r", b"").split(b"\n\n")[0], (b"space directions:", b"spacings:")
    else:
        header, words = text.split(b"elementdatafile")[0], (b"elementspacing", b"elementsize")
    if not any(word in header for word in words):
        names = " or ".join(word.decode().rstrip(":") for word in words)
        raise ValueError(f"{path}: its header has no {names}; write the voxel sizes into it")
    # NRRD writes NaN for what is not known, or has no size, as an axis of channels.
    line = re.search(rb"^spacings:(.*)$", header, re.MULTILINE)
    sizes = line[1].split() if line else []
    if b"nan" in sizes and len(sizes) - sizes.count(b"nan") < 3:
        told = b" ".join(sizes).decode(errors="replace")
        raise ValueError(f"{path}: its spacings are {told}; write the voxel sizes into its header")
    units = re.search(rb"^(?:space )?units:(.*)$", header, re.MULTILINE)
    if units and (others := set(re.findall(rb'"([^"]+)"', units[1])) - NRRD_UNITS):
        raise ValueError(
            f"{path}: its voxel sizes are in {others.pop().decode(errors='replace')}, which is not read: write mm"
        )


def _check_names_slices(path: Path) -> None:
    """Refuses a MetaImage header that lists too few files, for which ITK would leave slices as memory was found."""
    text = path.read_bytes()[: 2**20].decode("latin-1") if path.name.lower().endswith(".mhd") else ""
    sizes, listed = re.search(r"^DimSize *=.*?(\d+)\s*$", text, re.MULTILINE), re.search(r"= *LIST *\r?\n", text)
    if sizes and listed and (lines := text.count("\n", listed.end())) < int(sizes[1]):
        raise ValueError(
            f"{path}: lists {lines} files, each on a line that ends, for {sizes[1]} slices; complete the list"
        )


def _read(sitk: ModuleType, path: Path, *pixel_type: int) -> Any:
    """`sitk.ReadImage`, with errors on one line."""
    try:
        return sitk.ReadImage(str(path), *pixel_type)
    except RuntimeError as error:
        raise ValueError(f"{path}: truncated or damaged ({_reason(error)}); copy it again") from error


def _reason(error: Exception) -> str:
    """The last line of ITK's message, which is the one that says what happened."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _library(name: str, extra: str) -> ModuleType:
    """Imports a library that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name} is not installed, and this format needs it: pip install 'sscl_jax[{extra}]'"
        ) from error


# --- DICOM ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """What the header of one DICOM file says.

    Attributes:
      path: the file.
      series: SeriesInstanceUID.
      title: SeriesDescription.
      size: columns, rows.
      affine: (4, 4), LPS, mm: column, row and slice 0 -> world; the third column is the unit normal.
      thickness: mm, as told by the header, None where it tells nothing.
    """

    path: Path
    series: str
    title: str
    size: tuple[int, int]
    affine: np.ndarray
    thickness: float | None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending or its mark."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.name.lower().endswith(DICOM):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file in a folder."""
    return any(is_dicom(path) for path in folder.iterdir())


def read_dicom(folder: Path, one_series: bool = True) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads the slices of a folder: float32 (X, Y, Z, 1), affine RAS, header, as `read_image`.

    Rescale slope and intercept of each file are applied, so CT is in HU.

    Args:
      folder: holds the files of one series; files that are not DICOM are passed over.
      one_series: refuse files of several series. Some collections number every file as its own; their folders do
        without.

    Raises:
      FileNotFoundError, ValueError: see `read_image` and `sort_slices`.
    """
    files, affine = sort_slices(folder, one_series)
    sitk = _library("SimpleITK", "dicom")
    planes = [sitk.GetArrayFromImage(_read(sitk, file, sitk.sitkFloat32))[0].T for file in files]
    array = nifti.check_image(folder, np.stack(planes, axis=-1))
    return array, affine, make_header(array.shape, affine)


def sort_slices(folder: Path, one_series: bool = True) -> tuple[list[Path], np.ndarray]:
    """The files of a DICOM folder in the order of their place along the normal, and the affine (4, 4), RAS.

    Reads headers only.

    Raises:
      FileNotFoundError: there is no DICOM file.
      ValueError: several series, a file without a place in space, planes of different size or direction, several
        files at one place, missing slices, unequal distances, a tilted gantry, or an unknown distance (one slice).
    """
    folder = Path(folder)
    files = [path for path in sorted(folder.iterdir()) if is_dicom(path)] if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{folder}: a folder, and no DICOM file there; give a file, or the folder that holds the slices"
        )
    slices = [_read_slice(path) for path in files]
    if one_series and len({s.series for s in slices}) > 1:
        names = {s.series: s.title for s in slices}
        counts = [f"{title or 'no name'} ({series}: {sum(s.series == series for s in slices)} files)"
                  for series, title in names.items()]  # fmt: skip
        raise ValueError(f"{folder}: holds {len(names)} series, {'; '.join(counts)}; put each into a folder of its own")
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size or not np.allclose(other.affine[:3, :3], first.affine[:3, :3], atol=1e-3):
            raise ValueError(
                f"{other.path}: its plane has another size, spacing or direction than that of {first.path.name}; "
                "remove scouts and other series from the folder"
            )
    normal = first.affine[:3, 2]
    slices.sort(key=lambda s: float(s.affine[:3, 3] @ normal))
    affine = slices[0].affine.copy()
    affine[:3, 2] *= _distance(folder, slices, normal)
    return [s.path for s in slices], LPS_TO_RAS @ affine


def _distance(folder: Path, slices: list[Slice], normal: np.ndarray) -> float:
    """Distance (mm) between slices that are sorted along `normal`; raises unless it is the same everywhere."""
    if len(slices) == 1:
        if slices[0].thickness is None:
            raise ValueError(f"{folder}: has one slice, whose header tells no thickness; give the whole series")
        return slices[0].thickness
    places = np.array([s.affine[:3, 3] for s in slices])
    steps = np.diff(places @ normal)
    step = float(np.median(steps))
    for gap, before, after in zip(steps, slices[:-1], slices[1:], strict=True):
        names = f"{before.path.name} and {after.path.name}"
        if gap < 1e-3:
            raise ValueError(
                f"{folder}: {names} lie at one place; put time points and echoes into folders of their own"
            )
        if abs(gap - step) > UNEQUAL * step:
            missing = round(gap / step) - 1
            what = f"{missing} slice(s) are missing" if missing > 0 else "the slices are unequally spaced"
            raise ValueError(
                f"{folder}: {what}: {gap:.4g} mm between {names}, elsewhere {step:.4g} mm; "
                "complete the series, or resample it to equal distances"
            )
    along = (places[-1] - places[0]) / np.linalg.norm(places[-1] - places[0])
    if (lean := math.acos(min(1.0, float(along @ normal)))) > TILT:
        raise ValueError(
            f"{folder}: the gantry was tilted: the slices lean by {math.degrees(lean):.3g} degrees; "
            "convert the series to NIfTI with a tool that corrects this, such as dcm2niix"
        )
    return float((places[-1] - places[0]) @ normal) / (len(slices) - 1)


def _read_slice(path: Path) -> Slice:
    """Reads the header of one DICOM file."""
    sitk = _library("SimpleITK", "dicom")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.SetImageIO("GDCMImageIO")
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read as DICOM ({_reason(error)}); copy it again or remove it") from error

    def field(tag: str) -> str:
        return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""

    if reader.GetNumberOfComponents() > 1:
        raise ValueError(f"{path}: is an RGB colour image; remove it from the folder")
    if field("0028|0008") not in ("", "1"):
        raise ValueError(f"{path}: holds {field('0028|0008')} frames; convert it to NIfTI, for example with dcm2niix")
    wanted = {"0020|0032": "ImagePositionPatient", "0020|0037": "ImageOrientationPatient", "0028|0030": "PixelSpacing"}
    missing = [name for tag, name in wanted.items() if not field(tag)]
    if missing:
        raise ValueError(
            f"{path}: its header has no {' and no '.join(missing)}; it is not a slice of a scan, remove it"
        )
    affine = np.eye(4)
    direction = np.reshape(reader.GetDirection(), (3, 3))
    affine[:3, :3] = direction * [*reader.GetSpacing()[:2], 1.0]
    affine[:3, 3] = reader.GetOrigin()
    columns, rows = reader.GetSize()[:2]
    thickness = next((float(t) for tag in ("0018|0088", "0018|0050") if (t := field(tag)) and float(t) > 0), None)
    return Slice(path, field("0020|000e"), field("0008|103e"), (columns, rows), affine, thickness)


# --- HDF5 -----------------------------------------------------------------------------------------


def read_h5_image(
    path: str | Path, spacing: Sequence[float], axes: str, key: str = "image"
) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads an image of three axes from an HDF5 file.

    Args:
      path: the file.
      spacing: voxel size along the array's axes, mm; the file does not know it.
      axes: where each axis of the array points, such as "LPS"; neither does it know this.
      key: name of the array in the file.

    Returns:
      float32 (n0, n1, n2, 1), axes in the order of the file; affine with the origin at voxel 0; header.

    Raises:
      FileNotFoundError, ValueError: as `read_image`; there is no such key, or it has not three axes.
    """
    array = nifti.check_image(path, _to_float32(read_h5_array(path, key)))
    affine = axes_affine(spacing, axes)
    return array, affine, make_header(array.shape, affine)


def read_h5_label(
    path: str | Path, spacing: Sequence[float], axes: str, key: str = "label"
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map from an HDF5 file; see `read_h5_image`."""
    return nifti.check_label(path, read_h5_array(path, key)), axes_affine(spacing, axes)


def read_h5_array(path: str | Path, key: str, ndim: int = 3) -> np.ndarray:
    """Reads one array of numbers with `ndim` axes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    h5py = _library("h5py", "h5")
    try:
        with h5py.File(path, "r") as file:
            names = sorted(file)
            array = np.asarray(file[key][()]) if key in file else None
    except Exception as error:  # a damaged file can make HDF5 raise almost anything
        raise ValueError(f"{path}: truncated, damaged or not HDF5 ({_reason(error)}); copy it again") from error
    if array is None:
        raise ValueError(f"{path}: has no {key!r}, it holds {', '.join(names) or 'nothing'}; write the array under it")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key} is of type {array.dtype}; write one number per voxel")
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{path}: {key} has shape {array.shape}; expected {ndim} axes")
    return array


def h5_has(path: Path, key: str) -> bool:
    """Whether an HDF5 file has an array of this name; False if it cannot be read, which reading it will tell."""
    try:
        with _library("h5py", "h5").File(path, "r") as file:
            return key in file
    except OSError:
        return False


def axes_affine(spacing: Sequence[float], axes: str) -> np.ndarray:
    """Affine (4, 4), RAS, of an array whose axes point along `axes`, such as "LPS"; voxel 0 is the origin.

    Raises:
      ValueError: not three sizes above 0, or not one letter of each of LR, PA and SI.
    """
    sizes, letters = np.array(spacing, np.float64), axes.upper()
    if sizes.shape != (3,) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"spacing is {tuple(spacing)}: give three sizes in mm")
    rows = [row for c in letters for row, pair in enumerate(("RL", "AP", "SI")) if c in pair]
    if len(letters) != 3 or sorted(rows) != [0, 1, 2]:
        raise ValueError(f"axes are {axes!r}: give one letter of each of LR, PA and SI, as in LPS")
    affine = np.zeros((4, 4))
    affine[rows, range(3)] = [size if c in "RAS" else -size for c, size in zip(letters, sizes, strict=True)]
    affine[3, 3] = 1
    return affine
