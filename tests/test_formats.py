import struct
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from configs import base
from data_prep import common
from sscl_jax import predict
from sscl_jax.data import formats, nifti
from sscl_jax.data.prepared import CaseSource, write_prepared
from sscl_jax.data.recipe import Recipe

h5py = pytest.importorskip("h5py")


def voxels(seed=0, shape=(7, 6, 5)):
    return np.random.default_rng(seed).integers(-900, 900, shape).astype(np.int16)


def oblique(turn=(0.3, -0.2, 0.5)):
    """A rotation matrix, by three angles."""
    matrix = np.eye(3)
    for axis, angle in enumerate(turn):
        step, (i, j) = np.eye(3), [a for a in range(3) if a != axis]
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ step
    return matrix


def itk_image(array, spacing=(0.7, 1.1, 3.0), origin=(-12.0, 34.0, 5.5), direction=None, vector=False):
    """(X, Y, Z[, C]) as a SimpleITK image, in its own world (to the left, to the back, up)."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0, *range(3, array.ndim)), isVector=vector)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((oblique() if direction is None else direction).ravel())
    return image


# --- NRRD and MetaImage ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
def test_the_same_voxels_in_the_same_place_as_by_nibabel(ending, tmp_path):
    image = itk_image(voxels())
    for name in (f"scan.{ending}", "scan.nii.gz"):
        sitk.WriteImage(image, tmp_path / name, useCompression=ending in ("nrrd", "mha"))
    array, affine, header = formats.read_image(tmp_path / f"scan.{ending}")
    theirs = nibabel.load(tmp_path / "scan.nii.gz")
    assert array.dtype == np.float32 and array.shape == (7, 6, 5, 1)
    np.testing.assert_array_equal(array[..., 0], theirs.get_fdata())
    np.testing.assert_allclose(affine, theirs.affine, atol=1e-5)
    np.testing.assert_allclose(header.get_best_affine(), theirs.affine, atol=1e-5)
    # By hand: voxel (1, 0, 0) lies one column of the direction further, with left and back turned round.
    step = oblique()[:, 0] * 0.7 * [-1, -1, 1]
    np.testing.assert_allclose(affine[:3, :3] @ [1, 0, 0], step, atol=1e-6)
    np.testing.assert_allclose(affine[:3, 3], [12, -34, 5.5], atol=1e-6)


@pytest.mark.parametrize("ending", ["nhdr", "mhd", "nrrd", "mha"])
def test_what_was_prepared_is_known_by_its_voxels_where_the_header_is_a_file_of_its_own(ending, tmp_path, capsys):
    """The header stays as it is, but for one in front of its voxels."""
    path = tmp_path / f"a.{ending}"
    source = CaseSource("a", "a", "train", (path,), None, formats.read_image)
    recipe = Recipe(label_values=(0, 1), class_names=("background", "a"))

    def prepare(seed):
        sitk.WriteImage(itk_image(voxels(seed)), path, useCompression=False)
        return write_prepared(tmp_path / "out", [source], recipe, {"train": ["a"]}, "scans")

    first = prepare(0)
    assert prepare(0).fingerprint == first.fingerprint and "already prepared" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was not made from these files"):
        prepare(1)


def test_all_files_that_hold_the_voxels_of_a_header(tmp_path):
    """As a list and by number: the files that ITK takes, for without one of them it reads nothing."""
    array = voxels()
    for k in range(5):
        array[..., k].T.astype("<i2").tofile(tmp_path / f"s{k + 1:02d}.raw")
    names = [f"s{k + 1:02d}.raw" for k in range(5)]
    mhd = "NDims = 3\nDimSize = 7 6 5\nElementSpacing = 1 1 2\nElementType = MET_SHORT\nElementDataFile = "
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nspacings: 1 1 2\nendian: little\nencoding: raw\n"
    headers = {
        "list.mhd": mhd + "\n".join(["LIST", *names, ""]),
        "number.mhd": mhd + "s%02d.raw 1 5 1",
        "list.nhdr": nrrd + "\n".join(["data file: LIST", *names, ""]),
        "number.nhdr": nrrd + "data file: s%02d.raw 1 5 1\n",
    }
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
        np.testing.assert_array_equal(formats.read_image(tmp_path / name)[0][..., 0], array)
        assert formats.data_files(tmp_path / name) == [tmp_path / n for n in names], name
    assert formats.data_files(tmp_path / names[0]) == []
    # ITK reads a list up to its last newline, and takes for the rest what lies in memory.
    (tmp_path / "list.mhd").write_text(headers["list.mhd"].rstrip())
    with pytest.raises(ValueError, match=r"list\.mhd: lists 4 files, each on a line that ends, for 5 slices"):
        formats.read_image(tmp_path / "list.mhd")


@pytest.mark.parametrize("data", ["scan.mhd", ".", "s%02d.raw 1 5 0"])
def test_a_header_that_leads_nowhere_is_told_by_the_check(data, tmp_path):
    """It names itself, a folder, or counts in steps of 0, by which ITK divides."""
    header = f"NDims = 3\nDimSize = 7 6 5\nElementSpacing = 1 1 2\nElementType = MET_SHORT\nElementDataFile = {data}"
    (tmp_path / "scan.mhd").write_text(header)
    source = CaseSource("a", "a", "train", (tmp_path / "scan.mhd",), None, formats.read_image)
    facts = common.examine([source], None, tmp_path / "kept")
    assert [line.startswith(f"{tmp_path}/scan.mhd: ") for line in facts[0].problems] == [True]


def test_nifti_goes_the_same_way(tmp_path):
    sitk.WriteImage(itk_image(voxels()), tmp_path / "a.nii.gz")
    for mine, theirs in zip(
        formats.read_image(tmp_path / "a.nii.gz")[:2], nifti.read_image(tmp_path / "a.nii.gz")[:2], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    sitk.WriteImage(itk_image(np.abs(voxels()) % 5), tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(
        formats.read_label(tmp_path / "l.nii.gz")[0], nifti.read_label(tmp_path / "l.nii.gz")[0]
    )


def test_an_nrrd_written_by_hand_in_ras(tmp_path):
    text = (
        "NRRD0004\ntype: unsigned char\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 1 3\nencoding: raw\n"
        "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(text.encode() + bytes([1, 2, 3, 4, 5, 6]))
    array, affine, _ = formats.read_image(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(array[:, 0, :, 0], [[1, 3, 5], [2, 4, 6]])  # the first axis runs fastest
    expected = np.diag([2.0, 3.0, 4.0, 1.0])
    expected[:3, 3] = 10, 20, 30
    np.testing.assert_allclose(affine, expected)


def test_labels(tmp_path):
    values = np.abs(voxels()) % 3 * 100
    sitk.WriteImage(itk_image(values), tmp_path / "a.mha")
    array, affine = formats.read_label(tmp_path / "a.mha")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, values)
    np.testing.assert_allclose(affine, formats.read_image(tmp_path / "a.mha")[1])
    sitk.WriteImage(itk_image(values.astype("f4") + 0.5), tmp_path / "b.mha")
    with pytest.raises(ValueError, match=r"b\.mha: labels must be whole numbers"):
        formats.read_label(tmp_path / "b.mha")
    sitk.WriteImage(itk_image(voxels()), tmp_path / "c.nrrd")
    with pytest.raises(ValueError, match=r"c\.nrrd: labels must lie in"):
        formats.read_label(tmp_path / "c.nrrd")
    sitk.WriteImage(itk_image(np.arange(420, dtype="u2").reshape(7, 6, 10)), tmp_path / "d.nrrd")
    with pytest.raises(ValueError, match="420 distinct values"):
        formats.read_label(tmp_path / "d.nrrd")


def test_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(7, 6, 5, 2)).astype("f4")
    sitk.WriteImage(itk_image(array, vector=True), tmp_path / "vector.nrrd")
    with pytest.raises(ValueError, match="4-D"):
        formats.read_image(tmp_path / "vector.nrrd")
    read, _, header = formats.read_image(tmp_path / "vector.nrrd", channels=True)
    np.testing.assert_array_equal(read, array)
    assert header.get_data_shape() == (7, 6, 5, 2)
    # The same as a fourth axis, as time points are stored.
    sitk.WriteImage(sitk.JoinSeries([itk_image(array[..., i]) for i in range(2)]), tmp_path / "four.nrrd")
    read, affine, _ = formats.read_image(tmp_path / "four.nrrd", channels=True)
    np.testing.assert_array_equal(read, array)
    np.testing.assert_allclose(affine, formats.read_image(tmp_path / "vector.nrrd", channels=True)[1], atol=1e-6)


def test_what_is_no_scan(tmp_path):
    def refused(name, match, image=None, error=ValueError):
        if image is not None:
            sitk.WriteImage(image, tmp_path / name)
        with pytest.raises(error, match=match) as caught:
            formats.read_image(tmp_path / name, channels=True)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)

    refused("gone.nrrd", "no such file", error=FileNotFoundError)
    refused("rgb.nrrd", "RGB", itk_image(np.zeros((7, 6, 5, 3), "u1"), vector=True))
    refused("complex.nrrd", "complex", itk_image(np.zeros((7, 6, 5), "c8")))
    nan = voxels().astype("f4")
    nan[1, 2, 3] = np.nan
    refused("nan.nrrd", r"1 of 210 voxels are NaN, .* \(1, 2, 3", itk_image(nan))
    huge = voxels().astype("f8")
    huge[0, 0, 0] = 1e300
    refused("huge.nrrd", "beyond float32", itk_image(huge))
    refused("flat.nrrd", "expected .X, Y, Z.", sitk.GetImageFromArray(np.zeros((4, 4), "u1")))
    for name in ("cut.nrrd", "cut.mha"):
        sitk.WriteImage(itk_image(voxels(0, (40, 40, 40))), tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5000])
        refused(name, "truncated or damaged")
    (tmp_path / "none.mha").write_bytes(b"not a scan ElementSpacing")
    refused("none.mha", "truncated or damaged")
    (tmp_path / "scan.txt").write_text("")
    refused("scan.txt", "no known format")
    (tmp_path / "a.h5").write_bytes(b"")
    refused("a.h5", "HDF5 holds no spacing")


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_a_header_without_voxel_size_is_not_taken_for_1_mm(ending, tmp_path):
    sitk.WriteImage(itk_image(voxels()), tmp_path / f"a.{ending}")
    content = (tmp_path / f"a.{ending}").read_bytes()
    lines = content.split(b"\n")
    kept = [line for line in lines if not line.startswith((b"space directions", b"ElementSpacing"))]
    assert len(kept) == len(lines) - 1
    (tmp_path / f"a.{ending}").write_bytes(b"\n".join(kept))
    with pytest.raises(ValueError, match="write the voxel sizes"):
        formats.read_image(tmp_path / f"a.{ending}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("spacings: nan nan nan", "its spacings are nan nan nan; write the voxel sizes"),
        ("spacings: 0.7 0.7 NaN", "write the voxel sizes"),
        ('spacings: 1 1 2\nunits: "cm" "cm" "cm"', "in cm, which is not read"),
        ('spacings: 1 1 2\nunits: "mm" "mm" "mm"', None),
        ("space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)", None),
        (
            "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\n"
            'space units: "um" "um" "um"',
            "in um, which is not read",
        ),
    ],
)
def test_an_nrrd_whose_voxel_sizes_are_unknown_or_no_millimetres(line, told, tmp_path):
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\n{line}\nendian: little\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + voxels().T.astype("<i2").tobytes())
    if told:
        with pytest.raises(ValueError, match=rf"a\.nrrd: .*{told}"):
            formats.read_image(tmp_path / "a.nrrd")
    else:
        np.testing.assert_array_equal(np.abs(np.diag(formats.read_image(tmp_path / "a.nrrd")[1])), [1, 1, 2, 1])


def test_a_sheared_nrrd_is_told_as_a_sheared_nifti_file(tmp_path):
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nspace: left-posterior-superior\n"
        "space directions: (0.7,0,0) (0.1,0.7,0) (0,0,5)\nspace origin: (0,0,0)\nendian: little\nencoding: raw\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + voxels().T.astype("<i2").tobytes())
    with pytest.warns(UserWarning, match=r"a\.nrrd: the affine is sheared"):
        formats.read_image(tmp_path / "a.nrrd")


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    sitk.WriteImage(itk_image(voxels()), tmp_path / "a.nrrd")
    write_series(tmp_path / "ct")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = voxels()
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for read, extra in (
        (lambda: formats.read_image(tmp_path / "a.nrrd"), "nrrd"),
        (lambda: formats.read_image(tmp_path / "ct"), "dicom"),
        (lambda: formats.read_h5_image(tmp_path / "a.h5", (1, 1, 1), "LPS"), "h5"),
    ):
        with pytest.raises(ValueError, match=rf"pip install 'sscl_jax\[{extra}\]'"):
            read()


# --- DICOM ----------------------------------------------------------------------------------------


def element(group, number, kind, value):
    """One element of a DICOM file, explicit little endian."""
    if isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind in ("OB", "OW") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + length + value


def dicom_bytes(pixels, position, direction=None, spacing=(0.7, 1.1), series="1.2.3", slope=1, intercept=0, **more):
    """A DICOM file, by hand. `pixels` is (columns, rows) int16; `spacing` is along columns' and rows' index."""

    def numbers(values):
        return "\\".join(f"{v:.8g}" for v in values)

    def short(value):
        return struct.pack("<H", value)

    meta = element(2, 0x1, "OB", b"\0\1")
    meta += element(2, 0x2, "UI", "1.2.840.10008.5.1.4.1.1.2") + element(2, 0x3, "UI", "1.2.3.4")
    meta += element(2, 0x10, "UI", "1.2.840.10008.1.2.1")
    columns, rows = pixels.shape
    direction = np.eye(3) if direction is None else direction
    fields = {
        (0x8, 0x16): ("UI", "1.2.840.10008.5.1.4.1.1.2"),
        (0x8, 0x18): ("UI", "1.2.3.4"),
        (0x8, 0x60): ("CS", "CT"),
        (0x8, 0x103E): ("LO", f"series {series}"),
        (0x18, 0x50): ("DS", "2.5"),
        (0x20, 0xE): ("UI", series),
        (0x20, 0x32): ("DS", numbers(position)),
        (0x20, 0x37): ("DS", numbers([*direction[:, 0], *direction[:, 1]])),
        (0x28, 0x2): ("US", short(1)),
        (0x28, 0x4): ("CS", "MONOCHROME2"),
        (0x28, 0x10): ("US", short(rows)),
        (0x28, 0x11): ("US", short(columns)),
        (0x28, 0x30): ("DS", numbers(spacing[::-1])),  # between rows, then between columns
        (0x28, 0x100): ("US", short(16)),
        (0x28, 0x101): ("US", short(16)),
        (0x28, 0x102): ("US", short(15)),
        (0x28, 0x103): ("US", short(1)),
        (0x28, 0x1052): ("DS", f"{intercept}"),
        (0x28, 0x1053): ("DS", f"{slope}"),
        (0x7FE0, 0x10): ("OW", pixels.T.astype("<i2").tobytes()),
    }
    fields |= more.get("fields", {})
    body = b"".join(element(*tag, *value) for tag, value in sorted(fields.items()) if value)
    return b"\0" * 128 + b"DICM" + element(2, 0, "UL", struct.pack("<I", len(meta))) + meta + body


def write_series(folder, array=None, direction=None, step=2.5, names=None, places=None, **options):
    """A series of `array` (X, Y, Z); slice k is `names[k]` and lies `places[k]` steps along the normal."""
    array = voxels() if array is None else array
    direction = oblique() if direction is None else direction
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(array.shape[2]):
        name = names[k] if names else f"{k:03d}.dcm"
        along = k if places is None else places[k]
        position = np.array([-12.0, 34.0, 5.5]) + direction[:, 2] * step * along
        (folder / name).write_bytes(dicom_bytes(array[..., k], position, direction, **options))
    return folder


def test_a_dicom_series(tmp_path):
    folder = write_series(tmp_path / "ct", intercept=-1024, slope=2)
    array, affine, header = formats.read_image(folder)
    assert array.dtype == np.float32 and array.shape == (7, 6, 5, 1) and header.get_data_shape() == (7, 6, 5)
    np.testing.assert_array_equal(array[..., 0], voxels() * 2.0 - 1024)
    expected = np.eye(4)
    expected[:3, :3] = oblique() * [0.7, 1.1, 2.5]
    expected[:3, 3] = -12, 34, 5.5
    expected[:2] *= -1  # left and back -> right and front
    np.testing.assert_allclose(affine, expected, atol=1e-5)
    # ITK's own reader of series, through a NIfTI file and nibabel.
    series = sitk.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(folder)))
    sitk.WriteImage(series.Execute(), tmp_path / "ct.nii.gz")
    theirs = nibabel.load(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(array[..., 0], theirs.get_fdata())
    np.testing.assert_allclose(affine, theirs.affine, atol=1e-4)


def test_slices_are_sorted_by_place_not_by_name(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "notes.txt").write_text("not DICOM")
    folder = write_series(tmp_path / "ct", names=["IM4", "IM9", "IM1", "IM22", "IM0.dcm"])
    np.testing.assert_array_equal(formats.read_image(folder)[0][..., 0], voxels())
    files, _ = formats.sort_slices(folder)
    assert [f.name for f in files] == ["IM4", "IM9", "IM1", "IM22", "IM0.dcm"]


def test_each_file_has_its_own_slope(tmp_path):
    folder = write_series(tmp_path / "pet")
    position = np.array([-12.0, 34.0, 5.5]) + oblique()[:, 2] * 2.5
    (folder / "001.dcm").write_bytes(dicom_bytes(voxels()[..., 1], position, oblique(), slope=0.25, intercept=0.5))
    array = formats.read_image(folder)[0][..., 0]
    np.testing.assert_array_equal(array[..., 1], voxels()[..., 1] * 0.25 + 0.5)
    np.testing.assert_array_equal(array[..., 2], voxels()[..., 2])


def test_a_mask_as_dicom(tmp_path):
    values = np.abs(voxels()) % 4
    label, _ = formats.read_label(write_series(tmp_path / "mask", values))
    np.testing.assert_array_equal(label, values)


def test_several_series_in_a_folder_are_named(tmp_path):
    write_series(tmp_path / "ct")
    write_series(tmp_path / "ct", names=[f"b{k}.dcm" for k in range(5)], series="1.2.9")
    with pytest.raises(ValueError, match=r"2 series, series 1\.2\.3 \(1\.2\.3: 5 files\); series 1\.2\.9 \(1\.2\.9: 5"):
        formats.read_image(tmp_path / "ct")


def test_files_that_each_are_a_series_may_be_taken_as_one(tmp_path):
    folder = write_series(tmp_path / "ct")
    for k, path in enumerate(sorted(folder.iterdir())):
        path.write_bytes(path.read_bytes().replace(b"1.2.3\0", f"1.2.{k}\0".encode(), 1))
    with pytest.raises(ValueError, match="series"):
        formats.read_dicom(folder)
    np.testing.assert_array_equal(formats.read_dicom(folder, one_series=False)[0][..., 0], voxels())


@pytest.mark.parametrize(
    ("places", "match"),
    [
        ([0, 1, 2, 4, 5], r"1 slice\(s\) are missing: 5 mm between 002\.dcm and 003\.dcm, elsewhere 2\.5 mm"),
        ([0, 1, 2, 3, 6], r"2 slice\(s\) are missing"),
        ([0, 1, 2, 3, 4.2], "unequally spaced: 3 mm between 003.dcm and 004.dcm"),
        ([0, 1, 2, 2, 3], "002.dcm and 003.dcm lie at one place"),
    ],
)
def test_slices_that_are_not_equally_spaced(places, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        formats.read_image(write_series(tmp_path / "ct", places=places))


def test_distances_that_are_rounded_do_no_harm(tmp_path):
    affine = formats.read_image(write_series(tmp_path / "ct", places=[0, 1.01, 2, 2.99, 4]))[1]
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(2.5, abs=1e-4)


def test_a_tilted_gantry(tmp_path):
    (tmp_path / "ct").mkdir()
    for k in range(5):
        (tmp_path / "ct" / f"{k}.dcm").write_bytes(dicom_bytes(voxels()[..., k], (0, 0.5 * k, 2.5 * k)))
    with pytest.raises(ValueError, match=r"gantry was tilted: the slices lean by 11\.3 degrees"):
        formats.read_image(tmp_path / "ct")


def test_one_slice_has_the_thickness_of_its_header(tmp_path):
    folder = write_series(tmp_path / "one", voxels()[..., :1], np.eye(3))
    np.testing.assert_allclose(np.abs(np.diag(formats.read_image(folder)[1])), [0.7, 1.1, 2.5, 1])
    write_series(folder, voxels()[..., :1], np.eye(3), fields={(0x18, 0x50): None})
    with pytest.raises(ValueError, match="tells no thickness"):
        formats.read_image(folder)


def test_dicom_files_that_do_not_belong(tmp_path):
    folder = write_series(tmp_path / "ct")
    good = (folder / "003.dcm").read_bytes()
    position = np.array([-12.0, 34.0, 5.5]) + oblique()[:, 2] * 7.5

    def refused(content, match):
        (folder / "003.dcm").write_bytes(content)
        with pytest.raises(ValueError, match=match) as caught:
            formats.read_image(folder)
        assert "003.dcm" in str(caught.value) and "\n" not in str(caught.value)

    refused(dicom_bytes(voxels()[..., 3], position), "another size, spacing or direction")
    refused(dicom_bytes(voxels()[:, :4, 3], position, oblique()), "another size")
    no_place = {(0x20, 0x32): None, (0x28, 0x30): None}
    refused(dicom_bytes(voxels()[..., 3], position, oblique(), fields=no_place), "no ImagePositionPatient and no Pixel")
    frames = {(0x28, 0x8): ("IS", "2"), (0x7FE0, 0x10): ("OW", voxels()[..., :2].T.tobytes())}
    refused(dicom_bytes(voxels()[..., 3], position, oblique(), fields=frames), "holds 2 frames")
    refused(b"not DICOM", "cannot be read as DICOM")
    refused(good[:-20], "copy it again")
    with pytest.raises(ValueError, match="give the folder of its series"):
        formats.read_image(folder / "001.dcm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no DICOM file there"):
        formats.read_image(tmp_path / "empty")


# --- HDF5 -----------------------------------------------------------------------------------------


def test_h5(tmp_path):
    path = tmp_path / "a.h5"
    labels = np.abs(voxels()) % 3
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = voxels(), labels
        file["flat"], file["text"] = voxels()[0], "words"
    array, affine, _ = formats.read_h5_image(path, (3.0, 1.0, 2.0), "SPL")
    np.testing.assert_array_equal(array[..., 0], voxels())
    np.testing.assert_array_equal(affine, [[0, 0, -2, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    assert "".join(nibabel.aff2axcodes(affine)) == "SPL"
    label, _ = formats.read_h5_label(path, (3.0, 1.0, 2.0), "SPL")
    np.testing.assert_array_equal(label, labels)
    assert formats.h5_has(path, "label") and not formats.h5_has(path, "mask")
    assert not formats.h5_has(tmp_path / "gone.h5", "label")
    for key, match in (("flat", "expected 3 axes"), ("text", "type"), ("mask", "no 'mask', it holds flat, image, lab")):
        with pytest.raises(ValueError, match=match):
            formats.read_h5_image(path, (1, 1, 1), "LPS", key)
    with pytest.raises(ValueError, match="labels must lie in"):
        formats.read_h5_label(path, (1, 1, 1), "LPS", "image")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="truncated, damaged or not HDF5"):
        formats.read_h5_image(path, (1, 1, 1), "LPS")


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "AIR"])
def test_axes_as_nibabel_names_them(axes):
    affine = formats.axes_affine((1.0, 2.0, 3.0), axes)
    assert "".join(nibabel.aff2axcodes(affine)) == axes
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), (1, 2, 3))


@pytest.mark.parametrize(
    ("spacing", "axes"),
    [((1, 1), "LPS"), ((1, 1, 0), "LPS"), ((1, 1, np.nan), "LPS"), ((1, 1, 1), "LPP"), ((1, 1, 1), "LP"),
     ((1, 1, 1), "LRS"), ((1, 1, 1), "XYZ")],
)  # fmt: skip
def test_axes_and_spacing_that_cannot_be(spacing, axes):
    with pytest.raises(ValueError, match="three sizes in mm|one letter of each"):
        formats.axes_affine(spacing, axes)


# --- Prediction -----------------------------------------------------------------------------------


class Bright:
    """A network that marks what is bright in its last channel."""

    recipe = Recipe(
        spacing=(None, None, None), intensity="ct", window=(-900, 900), label_values=(0, 7), class_names=("none", "b")
    )
    config, variables = base.get_config(), None
    meta = {"channels": 1}

    @staticmethod
    def predict(variables, image):
        return np.eye(2, dtype=np.float32)[(image[..., -1] > 0).astype(int)]


class BrightOfTwo(Bright):
    meta = {"channels": 2}


def test_masks_lie_where_itk_sees_the_scan(tmp_path):
    image = itk_image(voxels())
    sitk.WriteImage(image, tmp_path / "scan.nrrd")
    predict.segment_scan(
        Bright, Bright.predict, predict.read_prepared(Bright, [tmp_path / "scan.nrrd"]), tmp_path / "mask.nii.gz"
    )
    mask = sitk.ReadImage(tmp_path / "mask.nii.gz")
    for field in ("Size", "Spacing", "Origin", "Direction"):
        ours, theirs = (getattr(i, f"Get{field}")() for i in (mask, image))
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=field)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, (voxels() > 0) * 7)

    write_series(tmp_path / "ct")
    predict.segment_scan(
        Bright, Bright.predict, predict.read_prepared(Bright, [tmp_path / "ct"]), tmp_path / "ct.nii.gz"
    )
    series = sitk.ReadImage([str(p) for p in sorted((tmp_path / "ct").iterdir())])
    mask = sitk.ReadImage(tmp_path / "ct.nii.gz")
    for field in ("Size", "Spacing", "Origin", "Direction"):
        ours, theirs = (getattr(i, f"Get{field}")() for i in (mask, series))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=field)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, (voxels() > 0) * 7)


def listing(path, channels=1):
    scans = predict.find_scans(path, channels)
    return [([str(p.relative_to(path)) for p in scan.paths], str(scan.mask)) for scan in scans]


def test_scans_of_a_folder(tmp_path):
    for name in ("a.nii.gz", "sub/b.nii", "c.mha", "sub/d.e.nrrd", "notes.txt", "._a.nii.gz", "._IM1.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_series(tmp_path / "sub" / "p1")
    write_series(tmp_path / "p2" / "deep", names=["IM0", "IM1", "IM2", "IM3", "IM4"])
    assert listing(tmp_path) == [
        (["a.nii.gz"], "a.nii.gz"),
        (["c.mha"], "c.nii.gz"),
        (["p2/deep"], "p2/deep.nii.gz"),
        (["sub/b.nii"], "sub/b.nii"),
        (["sub/d.e.nrrd"], "sub/d.e.nii.gz"),
        (["sub/p1"], "sub/p1.nii.gz"),
    ]
    assert predict.find_scans(tmp_path / "sub" / "p1") == [
        predict.Scan((tmp_path / "sub" / "p1",), predict.Path("p1.nii.gz"))
    ]
    # The folder that is given can hold a series itself, beside others.
    write_series(tmp_path / "study" / "sub")
    write_series(tmp_path / "study")
    assert listing(tmp_path / "study") == [(["."], "study.nii.gz"), (["sub"], "sub.nii.gz")]
    (tmp_path / "a.mha").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the masks of both would be a\.nii\.gz"):
        predict.find_scans(tmp_path)


def test_channels_in_files_of_their_own(tmp_path):
    for name in ("p1_0000.nii.gz", "p1_0001.nii.gz", "p2.nii.gz", "s/v_2023.nii.gz", "s/v_2024.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sitk.WriteImage(itk_image(voxels(len(name))), tmp_path / name)
    assert [paths for paths, _ in listing(tmp_path)] == [
        ["p1_0000.nii.gz"], ["p1_0001.nii.gz"], ["p2.nii.gz"], ["s/v_2023.nii.gz"], ["s/v_2024.nii.gz"]
    ]  # fmt: skip
    assert listing(tmp_path, 2) == [
        (["p1_0000.nii.gz", "p1_0001.nii.gz"], "p1.nii.gz"),
        (["p2.nii.gz"], "p2.nii.gz"),
        (["s/v_2023.nii.gz"], "s/v_2023.nii.gz"),
        (["s/v_2024.nii.gz"], "s/v_2024.nii.gz"),
    ]
    one = predict.find_scans(tmp_path / "p1_0000.nii.gz", 2)
    assert [len(scan.paths) for scan in one] == [2] and str(one[0].mask) == "p1.nii.gz"

    sitk.WriteImage(itk_image(voxels(9)), tmp_path / "p1_0001.nii.gz")
    predict.segment_scan(
        BrightOfTwo, Bright.predict, predict.read_prepared(BrightOfTwo, one[0].paths), tmp_path / "mask.nii.gz"
    )
    np.testing.assert_array_equal(nifti.read_label(tmp_path / "mask.nii.gz")[0], (voxels(9) > 0) * 7)

    sitk.WriteImage(itk_image(voxels(9), origin=(0, 0, 0)), tmp_path / "p1_0001.nii.gz")
    with pytest.raises(ValueError, match=r"p1_0001\.nii\.gz: is not on the grid of"):
        predict.read_scan(one[0].paths, 2)
    with pytest.raises(ValueError, match="its channels are _0000, _0001, .* _0000, _0001, _0002"):
        predict.read_scan(one[0].paths, 3)
    with pytest.raises(ValueError, match="1 channels, but the network was trained on 2"):
        predict.read_scan(one[0].paths[:1], 2)
