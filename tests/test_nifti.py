"""NIfTI in and out: geometry to the bit, types, and files that are damaged."""

import gzip
import struct
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from sscl_jax.data import nifti
from sscl_jax.data.nifti import read_image, read_label, write_mask
from sscl_jax.data.recipe import Recipe, make_grid, prepare_label, to_native, unmap_labels

SHAPE = (20, 30, 5)


def oblique_affine():
    affine = np.eye(4)
    rotation = Rotation.from_euler("xyz", (20, -10, 35), degrees=True).as_matrix()
    affine[:3, :3] = rotation @ np.diag((-1.25, 1.25, 10))
    affine[:3, 3] = (-40.5, 17.25, 300)
    return affine


def save(path, array, affine=None, image_class=nib.Nifti1Image, **header):
    image = image_class(array, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def raw_header(path):
    """The first 348 bytes, read without nibabel's image classes."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        return nib.Nifti1Header(file.read(348), check=False)


def noise(dtype=np.int16, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 1000, shape).astype(dtype)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64, ">i2"])
def test_image_comes_back(tmp_path, name, dtype):
    array = noise() % 250
    image = nib.Nifti1Image(array.astype(dtype), oblique_affine())
    if dtype == ">i2":
        image = nib.Nifti1Image(array, oblique_affine(), nib.Nifti1Header(endianness=">"))
        image.set_data_dtype(dtype)
    nib.save(image, tmp_path / name)
    actual, affine, header = read_image(tmp_path / name)
    assert actual.dtype == np.float32 and actual.shape == (*SHAPE, 1)
    assert actual.flags.c_contiguous or actual.flags.f_contiguous
    np.testing.assert_array_equal(actual[..., 0], array)
    np.testing.assert_allclose(affine, oblique_affine(), atol=1e-5)
    assert affine.dtype == np.float64 and header.get_data_shape() == SHAPE


def test_scaling_is_applied(tmp_path):
    array = noise()
    image = nib.Nifti1Image(array, np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<ff", content, 112, 0.5, -1024)  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_allclose(read_image(tmp_path / "a.nii")[0][..., 0], array * 0.5 - 1024)
    with pytest.raises(ValueError, match=r"a\.nii: labels must"):
        read_label(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [((4, 5), (4, 5, 1, 1)), ((4, 5, 6), (4, 5, 6, 1)), ((4, 5, 6, 1), (4, 5, 6, 1))],
)
def test_accepted_shapes(tmp_path, stored, expected):
    path = save(tmp_path / "a.nii.gz", noise(shape=stored))
    image, affine, header = read_image(path)
    assert image.shape == expected
    assert read_label(save(tmp_path / "l.nii", noise(shape=stored) % 3))[0].shape == expected[:3]
    write_mask(tmp_path / "m.nii.gz", image[..., 0].astype(int), affine, header)
    np.testing.assert_array_equal(read_image(tmp_path / "m.nii.gz")[0], image)


def test_four_dimensions_need_channels(tmp_path):
    path = save(tmp_path / "cine.nii.gz", noise(shape=(4, 5, 6, 3)))
    with pytest.raises(ValueError, match=r"cine\.nii\.gz: the image is 4-D, shape \(4, 5, 6, 3\)"):
        read_image(path)
    image, affine, header = read_image(path, channels=True)
    assert image.shape == (4, 5, 6, 3)
    write_mask(tmp_path / "m.nii", np.ones((4, 5, 6), np.uint8), affine, header)
    assert nib.load(tmp_path / "m.nii").shape == (4, 5, 6)
    with pytest.raises(ValueError, match="4-D"):
        read_label(path)
    with pytest.raises(ValueError, match="shape"):
        read_image(save(tmp_path / "five.nii", noise(shape=(2, 3, 4, 2, 2))), channels=True)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (0, 1), (1, 0), (0, 0), (4, 3)])
@pytest.mark.parametrize("name", ["out/deep/m.nii", "out/m.nii.gz"])
def test_mask_keeps_geometry(tmp_path, codes, name):
    image = nib.Nifti1Image(noise(), None)
    other = oblique_affine()
    other[:3, 3] += 3  # sform and qform may differ
    image.set_sform(oblique_affine(), codes[0])
    image.set_qform(other, codes[1])
    image.header.set_zooms((1.25, 1.25, 10))
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(0.01, -7)
    image.header["cal_max"] = 900
    nib.save(image, tmp_path / "a.nii.gz")
    scan, affine, header = read_image(tmp_path / "a.nii.gz")
    before = header.copy()
    mask = np.random.default_rng(1).choice([0, 500, 600], SHAPE)
    write_mask(tmp_path / name, mask, affine, header)

    assert header == before  # the caller's header is not touched
    old, new = raw_header(tmp_path / "a.nii.gz"), raw_header(tmp_path / name)
    fields = ["qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"]
    fields += [f"quatern_{c}" for c in "bcd"] + [f"qoffset_{c}" for c in "xyz"] + ["dim"]
    for field in fields:
        np.testing.assert_array_equal(old[field], new[field], err_msg=field)
    assert new.get_data_dtype() == np.uint16 and new["bitpix"] == 16
    assert (new["scl_slope"], new["scl_inter"], new["cal_max"]) == (1, 0, 0)
    np.testing.assert_array_equal(read_label(tmp_path / name)[0], mask)
    np.testing.assert_allclose(read_label(tmp_path / name)[1], affine, atol=1e-6)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [name.split("/")[-1]]


@pytest.mark.parametrize(
    ("top", "dtype"),
    [(0, np.uint8), (4, np.uint8), (255, np.uint8), (256, np.uint16), (70000, np.uint32)],
)
def test_mask_is_as_small_as_it_can_be(tmp_path, top, dtype):
    path = save(tmp_path / "a.nii", noise(np.float32))
    _, affine, header = read_image(path)
    mask = np.full(SHAPE, top, np.int64)
    mask[0] = 0
    write_mask(tmp_path / "m.nii.gz", mask, affine, header)
    assert nib.load(tmp_path / "m.nii.gz").get_data_dtype() == dtype
    label, _ = read_label(tmp_path / "m.nii.gz")
    assert label.dtype == dtype
    np.testing.assert_array_equal(label, mask)


@pytest.mark.parametrize("values", [(0, 1, 2, 4), (0, 500, 600)])
def test_prediction_on_files(tmp_path, values):
    """Read, prepare, bring back, write: the written file equals the label file."""
    label = np.random.default_rng(2).choice(values, SHAPE).astype(np.int16)
    path = save(tmp_path / "label.nii.gz", label, oblique_affine())
    _, affine, header = read_image(path)
    recipe = Recipe(spacing=(None, None, None), label_values=values, class_names=tuple(map(str, values)))
    array, label_affine = read_label(path)
    np.testing.assert_array_equal(label_affine, affine)
    grid = make_grid(array.shape, affine, recipe)
    one_hot = np.eye(len(values), dtype=np.float32)[prepare_label(array, grid, recipe)]
    mask = unmap_labels(to_native(one_hot, grid, recipe).argmax(-1), values)
    write_mask(tmp_path / "mask.nii.gz", mask, affine, header)
    again, again_affine = read_label(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(again, label)
    np.testing.assert_array_equal(again_affine, affine)


def test_nifti2_stays_nifti2(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise(), oblique_affine(), nib.Nifti2Image)
    _, affine, header = read_image(path)
    write_mask(tmp_path / "m.nii.gz", np.ones(SHAPE, bool), affine, header)
    assert isinstance(nib.load(tmp_path / "m.nii.gz"), nib.Nifti2Image)


def test_extensions_are_dropped(tmp_path):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN" * 100))
    nib.save(image, tmp_path / "a.nii")
    _, affine, header = read_image(tmp_path / "a.nii")
    write_mask(tmp_path / "m.nii", np.ones(SHAPE, int), affine, header)
    assert b"DOE" not in (tmp_path / "m.nii").read_bytes()
    np.testing.assert_array_equal(read_label(tmp_path / "m.nii")[0], 1)


def test_wrong_masks_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", noise())
    _, affine, header = read_image(path)
    mask = np.ones(SHAPE, np.uint8)
    for wrong, message in [
        (mask[:-1], r"shape \(19, 30, 5\) is not the image's, \(20, 30, 5\)"),
        (mask.transpose(1, 0, 2), "shape"),
        (mask * 0.5, "whole numbers >= 0, got float64"),
        (mask.astype(int) - 2, "whole numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_mask(tmp_path / "m.nii.gz", wrong, affine, header)
    with pytest.raises(ValueError, match="affine"):
        write_mask(tmp_path / "m.nii.gz", mask, affine * 2, header)
    with pytest.raises(ValueError, match=r"must end in \.nii"):
        write_mask(tmp_path / "m.mha", mask, affine, header)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_failed_write_leaves_the_old_mask(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", noise())
    _, affine, header = read_image(path)
    write_mask(tmp_path / "m.nii", np.ones(SHAPE, int), affine, header)

    def fail(image, name):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_mask(tmp_path / "m.nii", np.zeros(SHAPE, int), affine, header)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "m.nii"]
    np.testing.assert_array_equal(read_label(tmp_path / "m.nii")[0], 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, ">i2", np.uint8])
def test_labels_of_any_storage_type(tmp_path, dtype):
    label = np.random.default_rng(3).choice([0, 1, 2, 4], SHAPE)
    actual, _ = read_label(save(tmp_path / "l.nii.gz", label.astype(dtype)))
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, label)


def test_scaled_labels_lose_their_rounding(tmp_path):
    label = np.random.default_rng(4).choice([0, 1, 2, 3], SHAPE)
    image = nib.Nifti1Image(label.astype(np.float32), np.eye(4))
    image.set_data_dtype(np.uint8)  # nibabel scales 0..3 to 0..255
    nib.save(image, tmp_path / "l.nii")
    assert nib.load(tmp_path / "l.nii").dataobj.slope != 1
    np.testing.assert_array_equal(read_label(tmp_path / "l.nii")[0], label)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.linspace(0, 1, 60), r"whole numbers, found 0\.0169.*\.\.\."),
        (np.r_[np.ones(59), np.nan], "found nan"),
        (np.r_[np.ones(59), np.inf], "found inf"),
        (np.r_[np.ones(59), -3], "found -3"),
        (np.r_[np.ones(59), 1e12], "found 1e"),
        (np.arange(60 * 6) - 0.0, "360 distinct values"),
        (np.arange(60 * 6) * 1000.0, "360 distinct values"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, array, message):
    path = save(tmp_path / "l.nii", array.reshape(3, 4, -1))
    with pytest.raises(ValueError, match=r"l\.nii: .*" + message):
        read_label(path)


def test_rgb_and_complex_are_refused(tmp_path):
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ValueError, match=r"rgb\.nii: is an RGB"):
        read_image(save(tmp_path / "rgb.nii", rgb))
    with pytest.raises(ValueError, match="complex64"):
        read_image(save(tmp_path / "c.nii", np.ones(SHAPE, np.complex64)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_voxels_are_counted_and_located(tmp_path, value):
    array = np.ones(SHAPE)
    array[3, 4, 2] = array[5, 0, 0] = value
    with pytest.raises(ValueError, match=r"a\.nii: 2 of 3000 voxels .* at \(3, 4, 2\)"):
        read_image(save(tmp_path / "a.nii", array))


def test_missing_file(tmp_path):
    for read in (read_image, read_label):
        with pytest.raises(FileNotFoundError, match=r"gone\.nii: no such file"):
            read(tmp_path / "gone.nii")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_truncation_is_noticed(tmp_path, name):
    path = save(tmp_path / name, noise())
    content = path.read_bytes()
    for size in {0, 1, 100, 347, 348, 352, len(content) // 2, len(content) - 9, len(content) - 1}:
        path.write_bytes(content[:size])
        for read in (read_image, read_label):
            with pytest.raises(ValueError, match=r"a\.nii"):
                read(path)


def test_flipped_bytes_in_gz_are_noticed(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise())
    content = path.read_bytes()
    # After the gzip header (whose name and time have no checksum), any byte counts.
    for position in np.linspace(30, len(content) - 1, 60).astype(int):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.nii\.gz: "):
            read_image(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_damaged_header_never_raises_anything_else(tmp_path, position, value):
    path = save(tmp_path / "a.nii", noise(shape=(6, 5, 4)))
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    for read in (read_image, read_label):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_giant_claim_allocates_nothing(tmp_path, name):
    path = save(tmp_path / name, noise(shape=(6, 5, 4)))
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "rb") as file:
        content = bytearray(file.read())
    struct.pack_into("<3h", content, 42, 30000, 30000, 30000)  # dim[1:4]
    with opener(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"announces shape \(30000, 30000, 30000\)"):
        read_image(path)


def test_wrong_formats_are_refused(tmp_path):
    (tmp_path / "text.nii").write_text("hello " * 100)
    (tmp_path / "text.nii.gz").write_text("hello " * 100)
    save(tmp_path / "a.nii", noise()).rename(tmp_path / "plain.nii.gz")  # not compressed
    nib.save(nib.MGHImage(noise(np.float32), np.eye(4)), tmp_path / "a.mgz")
    for name in ("text.nii", "text.nii.gz", "plain.nii.gz", "a.mgz"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)


def test_sheared_affine_is_read_with_a_warning(tmp_path):
    affine = oblique_affine()
    affine[:3, 1] += 0.05 * affine[:3, 0]
    path = save(tmp_path / "a.nii", noise(), affine)
    with pytest.warns(UserWarning, match=r"a\.nii: the affine is sheared .* 2\.9 degrees"):
        _, actual, header = read_image(path)
    np.testing.assert_allclose(actual, affine, atol=1e-5)
    write_mask(tmp_path / "m.nii", np.ones(SHAPE, int), actual, header)
    np.testing.assert_array_equal(nib.load(tmp_path / "m.nii").affine, actual)


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 1e-30, 1e30])
@pytest.mark.parametrize("place", ["slices", "origin"])
def test_an_affine_without_volume_is_refused(tmp_path, place, value):
    path = save(tmp_path / "a.nii", noise() % 3, np.eye(4), nib.Nifti2Image)
    content = bytearray(path.read_bytes())
    (header,) = np.frombuffer(content, nib.Nifti2Header.template_dtype, 1)
    if place == "slices":
        header["pixdim"][3] = header["srow_z"][2] = value  # where they disagree, pixdim counts
    else:
        header["srow_z"][3] = value
    path.write_bytes(content)
    for read in (read_image, read_label):
        if place == "origin" and value < 1:
            np.testing.assert_array_equal(read(path)[1][:3, 3], [0, 0, value])
        else:
            with pytest.raises(ValueError, match=r"a\.nii: its affine .* is not finite, or has no volume"):
                read(path)


def test_voxel_sizes_come_from_pixdim_where_the_sform_has_none(tmp_path):
    # ACDC's files: sform diag(-1, -1, 1) with a code, true sizes in pixdim alone.
    path = tmp_path / "acdc.nii.gz"
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), None)
    image.header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=2)
    image.header["pixdim"][1:4] = (1.5, 1.25, 10)
    nib.save(image, path)
    expected = np.diag([-1.5, -1.25, 10, 1])
    array, affine, header = read_image(path)
    np.testing.assert_allclose(affine, expected)
    np.testing.assert_allclose(read_label(path)[1], expected)
    write_mask(tmp_path / "mask.nii.gz", array[..., 0].astype(np.uint8), affine, header)
    np.testing.assert_allclose(read_label(tmp_path / "mask.nii.gz")[1], expected)
    assert nib.load(tmp_path / "mask.nii.gz").header.get_sform(coded=True)[1] == 2


def test_four_dimensional_mask(tmp_path):
    save(tmp_path / "cine.nii.gz", noise(shape=(4, 5, 3, 6)), oblique_affine())
    _, affine, header = read_image(tmp_path / "cine.nii.gz", channels=True)
    mask = (noise(shape=(4, 5, 3, 6)) % 4).astype(np.uint8)
    write_mask(tmp_path / "mask.nii.gz", mask, affine, header)
    saved = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), mask)
    np.testing.assert_allclose(saved.affine, oblique_affine(), atol=1e-4)
    with pytest.raises(ValueError, match="shape"):
        write_mask(tmp_path / "mask.nii.gz", mask[..., :2], affine, header)


# --- Headers that say little, or two things -------------------------------------------------------

THICK = np.diag([-1.25, -1.25, 10.0, 1.0])


def with_header(path, *fields, affine=THICK, shape=(5, 4, 3)):
    """A file in whose header (offset, struct format, value) are put."""
    raw = bytearray(nib.Nifti1Image(np.arange(np.prod(shape)).reshape(shape).astype("i2"), affine).to_bytes())
    for offset, form, value in fields:
        struct.pack_into(form, raw, offset, value)
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_voxel_size_of_0_is_that_of_the_sform_or_none(tmp_path, name, capfd):
    path = with_header(tmp_path / name, (88, "<f", 0.0))
    array, affine, header = nifti.read_image(path)
    np.testing.assert_allclose(affine, THICK)
    nifti.write_mask(tmp_path / "mask.nii.gz", array[..., 0].astype("u1"), affine, header)
    np.testing.assert_allclose(nifti.read_label(tmp_path / "mask.nii.gz")[1], THICK)
    assert nifti.header_warning(path) == ""
    # Without one there is none, and it is not taken for 1 mm.
    path = with_header(tmp_path / name, (88, "<f", 0.0), (252, "<h", 0), (254, "<h", 0))
    with pytest.raises(ValueError, match=r"a\.nii.*has no volume: write the voxel sizes"):
        nifti.read_image(path)
    # A plane has no third size that could be missing.
    path = with_header(tmp_path / name, (88, "<f", 0.0), (254, "<h", 0), shape=(5, 4))
    assert np.linalg.norm(nifti.read_image(path)[1][:3, 2]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("unit", "size"), [(1, 1e-3), (3, 1e3), (2, 1.0), (0, 1.0)])
def test_metres_and_microns_become_millimetres_as_in_itk(tmp_path, unit, size):
    path = with_header(tmp_path / "a.nii", (123, "<B", unit), affine=np.diag([size, size, size, 1]) @ THICK)
    array, affine, header = nifti.read_image(path)
    np.testing.assert_allclose(affine, THICK, rtol=1e-6)
    itk = pytest.importorskip("SimpleITK").ReadImage(str(path))
    np.testing.assert_allclose(itk.GetSpacing(), (1.25, 1.25, 10), rtol=1e-5)
    nifti.write_mask(tmp_path / "mask.nii", array[..., 0].astype("u1"), affine, header)
    assert nib.load(tmp_path / "mask.nii").header["xyzt_units"] == unit


def test_channels_as_itk_writes_them(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    voxels = np.random.default_rng(0).normal(size=(5, 4, 3, 2)).astype("f4")
    sitk.WriteImage(sitk.GetImageFromArray(voxels.transpose(2, 1, 0, 3), isVector=True), tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").shape == (5, 4, 3, 1, 2)
    array, affine, header = nifti.read_image(tmp_path / "a.nii.gz", channels=True)
    np.testing.assert_array_equal(array, voxels)
    with pytest.raises(ValueError, match=r"4-D, shape \(5, 4, 3, 2\)"):
        nifti.read_image(tmp_path / "a.nii.gz")
    for mask in (np.ones((5, 4, 3), "u1"), np.ones((5, 4, 3, 2), "u1")):
        nifti.write_mask(tmp_path / "mask.nii.gz", mask, affine, header)
        assert nib.load(tmp_path / "mask.nii.gz").shape == mask.shape


def test_a_header_that_says_two_things_is_told(tmp_path):
    assert nifti.header_warning(with_header(tmp_path / "a.nii")) == ""
    larger = with_header(tmp_path / "b.nii", (88, "<f", 5.0))
    assert "b.nii: its voxels are 1.25 x 1.25 x 5 mm by pixdim and 1.25 x 1.25 x 10 mm by the sform" in (
        nifti.header_warning(larger)
    )
    assert nifti.header_warning(with_header(tmp_path / "c.nii", (88, "<f", 5.0), affine=np.eye(4))) == ""
    mirrored = with_header(tmp_path / "d.nii", (252, "<h", 1), (256, "<f", 0.0), (260, "<f", 0.0), (264, "<f", 0.0))
    assert "d.nii: its sform and qform differ by up to" in nifti.header_warning(mirrored)


def test_a_sform_of_unit_steps_is_compared_with_the_qform_too(tmp_path):
    """It is that of each scan of 1 mm along the axes. Beside other sizes, as in ACDC, it tells no place."""

    def scaled(x, y, z, left=0.0):
        affine = np.diag([x, y, z, 1.0])
        affine[0, 3] = left
        return affine

    image, told = nib.Nifti1Image(np.zeros((5, 4, 3), "i2"), np.eye(4)), "its sform and qform differ"
    cases = (
        ((1, 1, 1), scaled(1, 1, 1), ""),
        ((1, 1, 1), scaled(-1, 1, 1), told),
        ((1, 1, 1), scaled(1, 1, 1, 9), told),
        ((1.4, 1.4, 10), scaled(1.4, 1.4, 10, 70), ""),
        ((1.4, 1.4, 10), scaled(-1.4, 1.4, 10), told),
    )
    for number, (sizes, qform, told) in enumerate(cases):
        image.set_sform(np.eye(4), 2)
        image.set_qform(qform, 1)
        image.header["pixdim"][1:4] = sizes
        path = tmp_path / f"{number}.nii"
        nib.save(image, path)
        warning = nifti.header_warning(path)
        assert told in warning if told else warning == "", number


def test_a_mask_that_was_changed_is_told_from_one_that_was_not(tmp_path):
    path = with_header(tmp_path / "a.nii")
    array, affine, header = nifti.read_image(path)
    mask = np.random.default_rng(0).integers(0, 3, array.shape[:3])
    nifti.write_mask(path, mask, affine, header)
    assert nifti.is_our_mask(path) and nifti.is_unchanged_mask(path)
    written = nib.load(path)
    # Stored in another type it is the same, and with one voxel corrected it is not, whatever the header says.
    for change, same in ((0, True), (1, False)):
        mask[1, 2, 1] += change
        nib.save(nib.Nifti1Image(mask.astype("i2"), None, written.header), path)
        assert nifti.is_our_mask(path) and nifti.is_unchanged_mask(path) is same
    nib.save(nib.Nifti1Image(mask.astype("i2"), affine), path)
    assert not nifti.is_our_mask(path) and not nifti.is_unchanged_mask(path)


def test_the_mask_of_a_single_slice_is_as_thick_as_that(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((5, 4), "i2"), np.diag([0.5, 0.5, 5, 1])), tmp_path / "a.nii")
    array, affine, header = nifti.read_image(tmp_path / "a.nii")
    nifti.write_mask(tmp_path / "mask.nii", np.ones(array.shape[:3], "u1"), affine, header)
    np.testing.assert_array_equal(nifti.read_label(tmp_path / "mask.nii")[1], affine)
    assert np.linalg.norm(affine[:3, 2]) == 5 and nifti.header_warning(tmp_path / "mask.nii") == ""


def test_frames_with_one_channel_each(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((5, 4, 3, 2, 1), "i2"), THICK), tmp_path / "a.nii")
    array, affine, header = nifti.read_image(tmp_path / "a.nii", channels=True)
    nifti.write_mask(tmp_path / "mask.nii", np.ones(array.shape, "u1"), affine, header)
    assert nib.load(tmp_path / "mask.nii").shape == (5, 4, 3, 2)


def test_nibabel_says_nothing_beside_our_own_error(tmp_path, caplog):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[70:72] = (272).to_bytes(2, "little")  # a data type that there is not
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="a.nii"):
        nifti.read_image(path)
    assert not caplog.records
