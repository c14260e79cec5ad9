"""Left atrium 2018, CHAOS and SSL4MIS: miniatures of the layouts, written by hand."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_formats import dicom_bytes, itk_image

from configs import base
from configs import chaos as chaos_config
from configs import la as la_config
from data_prep import chaos, check, common, folder, la2018, ssl4mis
from sscl_jax import experiment
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.recipe import prepare_image

h5py = pytest.importorskip("h5py")
sitk = pytest.importorskip("SimpleITK")
Image = pytest.importorskip("PIL.Image")

REAL_LA = Path(__file__).parents[2] / "shared" / "data" / "la2018"
SHAPE = (9, 7, 5)


def image_of(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 900, shape).astype("i2")


def label_of(seed, values=(0, 1), shape=SHAPE):
    return np.random.default_rng(seed).choice(values, shape).astype("u1")


def write_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def write_splits(tmp_path, **splits):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    return path


def problems_of(prepare, *args, **options):
    with pytest.raises(common.Problems) as caught:
        prepare(*args, **options)
    assert not any("\n" in line for line in caught.value.lines)
    return caught.value.lines


def axes_of(case):
    return "".join(nibabel.aff2axcodes(case.grid.native_affine))


# --- Left atrium 2018 -----------------------------------------------------------------------------

LA_SPLITS = {"train": ["CASE1", "CASE2"], "val": ["CASE3"], "test": ["CASE4"]}


@pytest.fixture
def la_h5(tmp_path):
    """Three cases in the folder with a space in its name; the second has no label."""
    at = tmp_path / "LA" / "2018LA_Seg_Training Set"
    for n in (1, 2, 3):
        arrays = {"image": image_of(n).astype("f4") / 300 - 1, "label": label_of(n)}
        if n == 2:
            del arrays["label"]
        write_h5(at / f"CASE{n}" / "mri_norm2.h5", **arrays)
    return tmp_path / "LA"


def test_la_h5(la_h5, tmp_path, capsys):
    dataset = la2018.prepare(la_h5, tmp_path / "out", write_splits(tmp_path, **LA_SPLITS))
    told = capsys.readouterr().out
    assert "0.625 mm along each axis, as the challenge documents, axes LPS" in told
    assert "missing: 1 of 1 test patients (CASE4)" in told
    assert [(c.case_id, c.split, c.has_label) for c in dataset.cases] == [
        ("CASE1", "train", True),
        ("CASE2", "train", False),
        ("CASE3", "val", True),
    ]
    case = dataset.cases[0]
    assert axes_of(case) == "LPS" and case.grid.native_spacing == (0.625, 0.625, 0.625)
    # LPS -> SPL is a transposition without a flip.
    np.testing.assert_array_equal(dataset.label(0), label_of(1).transpose(2, 1, 0))
    np.testing.assert_array_equal(dataset.native_label(0), label_of(1))
    order = np.argsort(image_of(1).transpose(2, 1, 0).ravel(), kind="stable")
    assert (np.diff(dataset.image(0).ravel()[order]) >= 0).all()


def test_la_spacing_of_files(la_h5, tmp_path, capsys):
    splits = write_splits(tmp_path, **LA_SPLITS)
    dataset = la2018.prepare(la_h5, tmp_path / "out", splits, spacing_of_files=1.25, spacing=2.5)
    assert "1.25 mm along each axis, as --spacing_of_files says" in capsys.readouterr().out
    grid = dataset.cases[0].grid
    assert grid.native_spacing == (1.25, 1.25, 1.25) and grid.spacing == (2.5, 2.5, 2.5)
    assert grid.shape == (2, 4, 4)  # halves of 5, 7 and 9, rounded to even
    la2018.prepare(la_h5, tmp_path / "out", splits, spacing_of_files=1.25, spacing=2.5)
    assert "already prepared from these files, nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was not made from these files with these options"):
        la2018.prepare(la_h5, tmp_path / "out", splits, spacing_of_files=1.0, spacing=2.5)


def test_la_nrrd(tmp_path, capsys):
    direction = np.diag([-1.0, -1.0, 1.0])  # the other way round than the h5 files
    for n in (1, 2, 3):
        at = tmp_path / "LA" / "Training Set" / f"CASE{n}"
        at.mkdir(parents=True)
        options = {"spacing": (0.625, 0.625, 0.625), "direction": direction}
        sitk.WriteImage(itk_image(image_of(n), **options), at / "lgemri.nrrd")
        sitk.WriteImage(itk_image(label_of(n, (0, 255)), **options), at / "laendo.nrrd")
    (at / "laendo.nrrd").unlink()
    splits = write_splits(tmp_path, **LA_SPLITS)
    dataset = la2018.prepare(tmp_path / "LA", tmp_path / "out", splits)
    assert "h5" not in capsys.readouterr().out
    assert dataset.recipe.label_values == (0, 255)
    assert [c.has_label for c in dataset.cases] == [True, True, False]
    assert axes_of(dataset.cases[0]) == "RAS"
    expected = label_of(1, (0, 255)).transpose(2, 1, 0)[:, ::-1, ::-1] == 255
    np.testing.assert_array_equal(dataset.label(0), expected)
    with pytest.raises(ValueError, match="NRRD files tell their own spacing"):
        la2018.prepare(tmp_path / "LA", tmp_path / "other", splits, spacing_of_files=1.0)

    write_h5(tmp_path / "LA" / "Training Set" / "CASE1" / "mri_norm2.h5", image=image_of(1), label=label_of(1))
    with pytest.raises(ValueError, match="say --form h5 or --form nrrd"):
        la2018.prepare(tmp_path / "LA", tmp_path / "other", splits)
    again = la2018.prepare(tmp_path / "LA", tmp_path / "out", splits, form="nrrd")
    assert again.fingerprint == dataset.fingerprint


def test_la_problems_in_one_list(la_h5, tmp_path):
    at = la_h5 / "2018LA_Seg_Training Set"
    write_h5(at / "CASE1" / "mri_norm2.h5", image=image_of(1), label=label_of(1, (0, 255)))
    write_h5(at / "CASE3" / "mri_norm2.h5", image=image_of(3), label=label_of(3)[:, :, :4])
    shutil.copytree(at / "CASE3", la_h5 / "copy" / "CASE3")
    broken = at / "CASE2" / "mri_norm2.h5"
    broken.write_bytes(broken.read_bytes()[:-50])
    lines = problems_of(la2018.prepare, la_h5, tmp_path / "out", write_splits(tmp_path, **LA_SPLITS))
    assert len(lines) == 4
    for parts in (
        ("CASE1", "label values 255 are not among 0, 1"),
        ("CASE2", "truncated"),
        ("CASE3", "(9, 7, 4)", "(9, 7, 5)"),
        ("copy/CASE3", "is the same case as"),
    ):
        assert sum(all(part in line for part in parts) for line in lines) == 1, parts
    with pytest.raises(FileNotFoundError, match=r"CASE/mri_norm2\.h5 or CASE/lgemri\.nrrd"):
        la2018.prepare(tmp_path / "out", tmp_path / "other")


def test_la_scaling_undoes_the_z_score(la_h5, tmp_path):
    dataset = la2018.prepare(la_h5, tmp_path / "out", write_splits(tmp_path, **LA_SPLITS))
    raw = image_of(1).astype("f4")[..., None]
    np.testing.assert_allclose(
        dataset.image(0), prepare_image(raw, dataset.cases[0].grid, dataset.recipe), rtol=1e-4, atol=1e-5
    )


def test_la_packaged_split():
    splits = common.read_splits(la2018.PACKAGED_SPLITS)
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 76, "val": 4, "test": 20}


@pytest.mark.skipif(not REAL_LA.is_dir(), reason=f"the real scans are not at {REAL_LA}")
def test_la_real_lists_and_scans(tmp_path):
    splits = common.read_splits(la2018.PACKAGED_SPLITS)
    train = (REAL_LA / "train.list").read_text().split()
    assert splits["test"] == (REAL_LA / "test.list").read_text().split()
    assert splits["train"][:8] + splits["val"] + splits["train"][8:] == train
    # Coarse, so that it is fast.
    dataset = la2018.prepare(REAL_LA, tmp_path / "out", spacing=5.0)
    assert dataset.patients["train"] == train[:8] and dataset.patients["val"] == train[8:12]
    for case in dataset.cases:
        assert case.has_label and case.grid.native_shape[2] == 88
        # The atrium is brighter than what surrounds it.
        label, image = dataset.label(case.index) == 1, dataset.image(case.index)[..., 0]
        assert 0.03 < label.mean() < 0.2 and image[label].mean() > image[~label].mean() + 0.3


# --- CHAOS ----------------------------------------------------------------------------------------

MR_GREY = {0: (0,), 63: (55, 63, 70), 126: (110, 126), 189: (175, 189, 200), 252: (240, 252, 255)}


def chaos_series(folder, array, reverse=False, name="IMG-0004-{:05d}.dcm", spacing=(1.5, 1.5), **options):
    """Slices of `array` (X, Y, Z), axial; every file is numbered as a series of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    count = array.shape[2]
    for k in range(count):
        file = folder / name.format((count - 1 - k if reverse else k) + 1)
        file.write_bytes(dicom_bytes(array[..., k], (-5, -6, 4.0 * k), spacing=spacing, series=f"1.2.{k}", **options))


def chaos_ground(folder, array, reverse=False, name="IMG-0004-{:05d}.png", mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    count = array.shape[2]
    for k in range(count):
        picture = Image.fromarray(array[..., k].T.astype("u1"))
        file = folder / name.format((count - 1 - k if reverse else k) + 1)
        (picture.point(lambda value: 255 * (value > 0), "1") if mode == "1" else picture).save(file)


def grey_of(label, seed):
    """Organs in the grey values that masks of the archive have: any of a range."""
    draw = np.random.default_rng(seed)
    grey = np.zeros(label.shape, "u1")
    for value, greys in MR_GREY.items():
        grey = np.where(label == value, draw.choice(greys, label.shape), grey)
    return grey


@pytest.fixture
def chaos_mr(tmp_path):
    """Four patients, the last one in Test_Sets without masks."""
    for n in (1, 2, 10, 4):
        at = tmp_path / "CHAOS" / ("Test_Sets" if n == 4 else "Train_Sets") / "MR" / str(n)
        label = label_of(n, tuple(MR_GREY))
        chaos_series(at / "T2SPIR" / "DICOM_anon", image_of(n))
        for phase, add in (("InPhase", 100), ("OutPhase", 200)):
            chaos_series(at / "T1DUAL" / "DICOM_anon" / phase, image_of(n + add))
        if n != 4:
            for sequence in ("T2SPIR", "T1DUAL"):
                chaos_ground(at / sequence / "Ground", grey_of(label, n))
    return tmp_path / "CHAOS"


CHAOS_SPLITS = {"train": ["1", "4"], "val": ["2"], "test": ["10"]}


def test_chaos_t2(chaos_mr, tmp_path):
    dataset = chaos.prepare(chaos_mr, tmp_path / "out", "t2", write_splits(tmp_path, **CHAOS_SPLITS))
    assert [(c.case_id, c.split, c.has_label) for c in dataset.cases] == [
        ("t2_1", "train", True),
        ("t2_4", "train", False),
        ("t2_2", "val", True),
        ("t2_10", "test", True),
    ]
    assert dataset.name == "chaos_t2" and dataset.recipe.class_names == tuple(chaos.MR_CLASSES.values())
    assert dataset.cases[0].grid.native_spacing == (1.5, 1.5, 4.0) and axes_of(dataset.cases[0]) == "LPS"
    classes = np.searchsorted(list(MR_GREY), label_of(1, tuple(MR_GREY)))
    np.testing.assert_array_equal(dataset.label(0), classes.transpose(2, 1, 0))
    assert dataset.channels == 1


def test_chaos_t1_has_two_channels(chaos_mr, tmp_path):
    dataset = chaos.prepare(chaos_mr, tmp_path / "out", "t1", write_splits(tmp_path, **CHAOS_SPLITS))
    assert dataset.channels == 2
    for channel, add in enumerate((100, 200)):
        order = np.argsort(image_of(1 + add).transpose(2, 1, 0).ravel(), kind="stable")
        assert (np.diff(dataset.image(0)[..., channel].ravel()[order]) >= 0).all()


@pytest.mark.parametrize("mode", ["1", "L"])
def test_chaos_ct_whose_first_file_is_the_topmost_slice(mode, tmp_path):
    shape = (9, 7, 12)  # more than nine slices: names that sort otherwise as text
    for n, reverse in ((1, False), (2, True)):
        at = tmp_path / "CHAOS" / "CT" / str(n)
        image, label = image_of(n, shape), label_of(n, shape=shape)
        chaos_series(at / "DICOM_anon", image, reverse, "i{},0000b.dcm", intercept=-1000)
        chaos_ground(at / "Ground", label, reverse, "liver_GT_{:03d}.png", mode)
    splits = write_splits(tmp_path, train=["1"], val=["2"])
    dataset = chaos.prepare(tmp_path / "CHAOS", tmp_path / "out", "ct", splits)
    assert dataset.recipe.label_values == (0, 255) and dataset.recipe.intensity == "ct"
    for index, n in enumerate((1, 2)):
        np.testing.assert_array_equal(dataset.label(index), label_of(n, shape=shape).transpose(2, 1, 0))
        hounsfield = image_of(n, shape).transpose(2, 1, 0) - 1000.0
        expected = (np.clip(hounsfield, -160, 240) + 160) / 200 - 1
        np.testing.assert_allclose(dataset.image(index)[..., 0], expected, atol=1e-5)


def test_chaos_draws_patients_with_masks(chaos_mr, tmp_path):
    at = chaos_mr / "Train_Sets" / "MR"
    for n in range(30, 42):
        shutil.copytree(at / "1", at / str(n))
        chaos_series(at / str(n) / "T2SPIR" / "DICOM_anon", image_of(n))
    dataset = chaos.prepare(chaos_mr, tmp_path / "out", "t2")
    assert dataset.patients["val"] and dataset.patients["test"] and "4" in dataset.patients["train"]
    assert sum(map(len, dataset.patients.values())) == 16


def test_chaos_problems_in_one_list(chaos_mr, tmp_path):
    at = chaos_mr / "Train_Sets" / "MR"
    ground = at / "1" / "T2SPIR" / "Ground"
    (ground / "IMG-0004-00003.png").unlink()
    odd = grey_of(label_of(2, tuple(MR_GREY)), 2)
    odd[3, 2, 1] = 90
    chaos_ground(at / "2" / "T2SPIR" / "Ground", odd)
    Image.new("RGB", (9, 7)).save(at / "10" / "T2SPIR" / "Ground" / "IMG-0004-00002.png")
    slices = chaos_mr / "Test_Sets" / "MR" / "4" / "T2SPIR" / "DICOM_anon"
    (slices / "IMG-0004-00002.dcm").unlink()
    (at / "7" / "T1DUAL").mkdir(parents=True)
    splits = write_splits(tmp_path, **CHAOS_SPLITS)
    lines = problems_of(chaos.prepare, chaos_mr, tmp_path / "out", "t2", splits)
    assert len(lines) == 5, "\n".join(lines)
    for parts in (
        ("MR/1/T2SPIR/Ground", "4 PNG masks for the 5 slices"),
        ("MR/2/T2SPIR/Ground/IMG-0004-00002.png", "grey values 90 are of no organ"),
        ("MR/10/T2SPIR/Ground/IMG-0004-00002.png", "not a grey picture"),
        ("MR/4/T2SPIR/DICOM_anon", "1 slice(s) are missing"),
        ("MR/7", "has no T2SPIR/DICOM_anon"),
    ):
        assert sum(all(part in line for part in parts) for line in lines) == 1, parts
    with pytest.raises(FileNotFoundError, match=r"has no CT/\*/DICOM_anon"):
        chaos.prepare(chaos_mr, tmp_path / "out", "ct")


# --- Folders and lists ----------------------------------------------------------------------------


def test_a_folder_holds_scans_of_any_format(tmp_path, capsys):
    """One image in each, and its mask in another: the same voxels, in the same place, as in NIfTI."""
    endings = {"a": ("nii.gz", "nrrd"), "b": ("nrrd", "mha"), "c": ("mhd", "nii"), "d": ("dicom", "nhdr")}
    place = {"spacing": (1.5, 1.5, 4.0), "origin": (-5, -6, 0), "direction": np.eye(3)}
    for name, (ending, mask_ending) in endings.items():
        for part in ("images", "labels"):
            (tmp_path / "in" / part).mkdir(parents=True, exist_ok=True)
        if ending == "dicom":
            (tmp_path / "in" / "images" / name).mkdir()
            for k in range(5):
                slice_ = dicom_bytes(image_of(1)[..., k], (-5, -6, 4.0 * k), spacing=(1.5, 1.5))
                (tmp_path / "in" / "images" / name / f"{k}.dcm").write_bytes(slice_)
        else:
            sitk.WriteImage(itk_image(image_of(1), **place), tmp_path / "in" / "images" / f"{name}.{ending}")
        sitk.WriteImage(itk_image(label_of(1), **place), tmp_path / "in" / "labels" / f"{name}.{mask_ending}")
    dataset = folder.prepare(tmp_path / "out", tmp_path / "in", val_fraction=0, test_fraction=0)
    assert sorted(case.case_id for case in dataset.cases) == list("abcd") and "ignored" not in capsys.readouterr().out
    for case in dataset.cases:
        np.testing.assert_allclose(case.grid.native_affine, dataset.cases[0].grid.native_affine, atol=1e-5)
        np.testing.assert_array_equal(dataset.native_label(case.index), label_of(1))
        np.testing.assert_allclose(dataset.image(case.index), dataset.image(0), atol=1e-5)
    (found,) = check.check(tmp_path / "in")
    assert len(found.cases) == 4 and not any(fact.problems for fact in found.facts)
    lines = ["image,label", *(f"images/{name}.{ends[0]},labels/{name}.{ends[1]}" for name, ends in endings.items())]
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines).replace(".dicom", ""))
    listed = folder.prepare(tmp_path / "listed", csv_file=tmp_path / "in" / "list.csv", val_fraction=0, test_fraction=0)
    assert sorted(case.case_id for case in listed.cases) == [f"images_{name}" for name in "abcd"]


# --- SSL4MIS --------------------------------------------------------------------------------------

VOLUME = (5, 7, 9)  # slices, rows, columns


@pytest.fixture
def ssl4mis_folder(tmp_path):
    """p2's first frame has slices alone, more than nine; p1 has both; p3 a volume alone."""
    base = tmp_path / "ACDC"
    slices = []
    for case, count in (("patient002_frame01", 11), ("patient001_frame01", 5), ("patient001_frame02", 5)):
        seed = int(case[7:10]) * 10 + int(case[-2:])
        image, label = image_of(seed, (count, 7, 9)) / 900, label_of(seed, (0, 1, 2, 3), (count, 7, 9))
        for k in range(count):
            name = f"{case}_slice_{k + 1}"
            write_h5(base / "data" / "slices" / f"{name}.h5", image=image[k], label=label[k])
            slices.append(name)
        if case.startswith("patient001"):
            write_h5(base / "data" / f"{case}.h5", image=image, label=label)
    write_h5(
        base / "data" / "patient003_frame01.h5", image=image_of(31, VOLUME) / 900, label=label_of(31, (0, 3), VOLUME)
    )
    write_h5(base / "data" / "patient004_frame01.h5", image=image_of(41, VOLUME) / 900)
    (base / "train_slices.list").write_text("\n".join(slices))
    (base / "val.list").write_text("patient003_frame01\n")
    (base / "test.list").write_text("patient004_frame01\n")
    return base


def test_ssl4mis(ssl4mis_folder, tmp_path):
    dataset = ssl4mis.prepare(ssl4mis_folder, tmp_path / "out", (10.0, 1.5, 1.25))
    assert dataset.patients == {"train": ["patient002", "patient001"], "val": ["patient003"], "test": ["patient004"]}
    assert [(c.case_id, c.has_label) for c in dataset.cases] == [
        ("patient002_frame01", True),
        ("patient001_frame01", True),
        ("patient001_frame02", True),
        ("patient003_frame01", True),
        ("patient004_frame01", False),
    ]
    for index, (seed, count) in enumerate([(21, 11), (11, 5), (12, 5)]):
        # Nothing is turned or resampled.
        np.testing.assert_array_equal(dataset.label(index), label_of(seed, (0, 1, 2, 3), (count, 7, 9)))
        assert dataset.cases[index].grid.spacing == (10.0, 1.5, 1.25) and axes_of(dataset.cases[index]) == "SPL"
        order = np.argsort(image_of(seed, (count, 7, 9)).ravel(), kind="stable")
        assert (np.diff(dataset.image(index).ravel()[order]) >= 0).all()


def test_ssl4mis_other_axes(ssl4mis_folder, tmp_path):
    dataset = ssl4mis.prepare(ssl4mis_folder, tmp_path / "out", (10.0, 1.5, 1.25), axes="IPL")
    np.testing.assert_array_equal(dataset.label(1), label_of(11, (0, 1, 2, 3), VOLUME)[::-1])
    np.testing.assert_array_equal(dataset.label(0), label_of(21, (0, 1, 2, 3), (11, 7, 9))[::-1])
    with pytest.raises(ValueError, match="one letter of each"):
        ssl4mis.prepare(ssl4mis_folder, tmp_path / "other", (10.0, 1.5, 1.25), axes="XYZ")


def test_ssl4mis_with_a_split_file_and_class_names(ssl4mis_folder, tmp_path):
    splits = write_splits(tmp_path, train=["patient003"], test=["patient002"])
    (ssl4mis_folder / "train_slices.list").unlink()
    names = ("background", "a", "b", "c")
    dataset = ssl4mis.prepare(ssl4mis_folder, tmp_path / "out", (1, 1, 1), splits, class_names=names)
    assert [(c.case_id, c.split) for c in dataset.cases] == [
        ("patient003_frame01", "train"),
        ("patient002_frame01", "test"),
    ]
    assert dataset.recipe.class_names == names
    with pytest.raises(FileNotFoundError, match=r"has no train_slices\.list and no train\.list"):
        ssl4mis.prepare(ssl4mis_folder, tmp_path / "other", (1, 1, 1))


def test_ssl4mis_problems_in_one_list(ssl4mis_folder, tmp_path):
    data = ssl4mis_folder / "data"
    for number in (4, 6):
        (data / "slices" / f"patient002_frame01_slice_{number}.h5").unlink()
    (data / "patient001_frame01.h5").unlink()
    other = image_of(1, (7, 8)), label_of(1, shape=(7, 8))
    write_h5(data / "slices" / "patient001_frame01_slice_3.h5", image=other[0], label=other[1])
    write_h5(data / "patient003_frame01.h5", image=image_of(31, VOLUME), label=label_of(31, (0, 4), VOLUME))
    (ssl4mis_folder / "val.list").write_text("patient003_frame01\npatient001_frame02\n")
    (ssl4mis_folder / "test.list").write_text("patient004_frame01\npatient004_frame09\n")
    lines = problems_of(ssl4mis.prepare, ssl4mis_folder, tmp_path / "out", (10, 1, 1))
    assert len(lines) == 6, "\n".join(lines)
    for parts in (
        ("slices 4, 6 of patient002_frame01 do not exist",),
        ("patient001_frame01_slice_3.h5: image has shape (7, 8)",),
        ("patient001_frame01_slice_3.h5: label has shape (7, 8)",),
        ("patient003_frame01.h5", "label values 4 are not among 0, 1, 2, 3"),
        ("patient patient001: is listed under train and val",),
        ("patient004_frame09.h5: is listed under test, but does not exist",),
    ):
        assert sum(all(part in line for part in parts) for line in lines) == 1, parts


def test_ssl4mis_lists_of_other_systems(ssl4mis_folder, tmp_path):
    names = ["patient001_frame01", "patient001_frame02"]
    text = "\ufeff" + "\r\n".join(["data\\" + names[0] + ".h5", "data/" + names[1] + ".h5", ""])
    (ssl4mis_folder / "train_slices.list").write_bytes(text.encode())
    dataset = ssl4mis.prepare(ssl4mis_folder, tmp_path / "out", (10, 1, 1))
    assert [case.case_id for case in dataset.cases if case.split == "train"] == names


def test_ssl4mis_a_slice_in_two_files(ssl4mis_folder, tmp_path):
    slices = ssl4mis_folder / "data" / "slices"
    shutil.copy(slices / "patient002_frame01_slice_4.h5", slices / "patient002_frame01_slice_04.h5")
    (line,) = problems_of(ssl4mis.prepare, ssl4mis_folder, tmp_path / "out", (10, 1, 1))
    assert "slice_4.h5: is the same slice as" in line and "slice_04.h5: remove one of them" in line


def test_ssl4mis_skips_a_case_with_a_gap(ssl4mis_folder, tmp_path):
    (ssl4mis_folder / "data" / "slices" / "patient002_frame01_slice_4.h5").unlink()
    dataset = ssl4mis.prepare(ssl4mis_folder, tmp_path / "out", (10, 1, 1), skip_bad=True)
    assert "patient002" not in dataset.patients["train"] and len(dataset.cases) == 4
    assert len(dataset.skipped) == 1 and "slices 4 of patient002_frame01" in dataset.skipped[0]


# --- The check of what was not prepared yet -------------------------------------------------------


def test_check_knows_the_left_atrium_in_both_forms(la_h5, tmp_path):
    (found,) = check.check(la_h5)
    assert found.kind == "left atrium 2018, h5" and not found.problems
    assert found.cases == [("none", f"CASE{n}", "mri_norm2.h5", n != 2) for n in (1, 2, 3)]
    assert [fact.values for fact in found.facts] == [{0, 1}, set(), {0, 1}] and found.facts[0].spacing == (0.625,) * 3
    broken = la_h5 / "2018LA_Seg_Training Set" / "CASE3" / "mri_norm2.h5"
    write_h5(broken, image=image_of(3), label=label_of(3)[:, :, :4])
    at = la_h5 / "nrrd" / "CASE1"
    at.mkdir(parents=True)
    sitk.WriteImage(itk_image(image_of(1), spacing=(0.6, 0.6, 1.2)), at / "lgemri.nrrd")
    sitk.WriteImage(itk_image(label_of(1, (0, 254)), spacing=(0.6, 0.6, 1.2)), at / "laendo.nrrd")
    h5, nrrd = check.check(la_h5)
    assert h5.facts[2].problems == problems_of(
        la2018.prepare, la_h5, tmp_path / "out", write_splits(tmp_path, **LA_SPLITS), form="h5"
    )
    assert nrrd.kind == "left atrium 2018, nrrd" and nrrd.facts[0].spacing == pytest.approx((0.6, 0.6, 1.2))
    assert "label values 254 are not among 0, 255" in nrrd.facts[0].problems[0]


@pytest.mark.skipif(not REAL_LA.is_dir(), reason=f"the real scans are not at {REAL_LA}")
def test_check_of_the_real_left_atrium():
    (found,) = check.check(REAL_LA)
    text, errors = check.report(REAL_LA, found)
    assert errors == 0 and "left atrium 2018, h5" in text and all(has_mask for *_, has_mask in found.cases)
    assert {split for split, *_ in found.cases} == {"train", "val"}


def test_check_knows_each_modality_of_chaos(chaos_mr):
    t1, t2 = check.check(chaos_mr)
    assert (t1.kind, t2.kind) == ("CHAOS, t1", "CHAOS, t2")
    assert [fact.channels for fact in t1.facts] == [2] * 4 and [fact.channels for fact in t2.facts] == [1] * 4
    assert [(patient, has_mask) for _, patient, _, has_mask in t2.cases] == [
        ("1", True), ("2", True), ("4", False), ("10", True),
    ]  # fmt: skip
    text, errors = check.report(chaos_mr, t2)
    assert errors == 0
    assert [line.split() for line in text.splitlines() if "right kidney" in line] == [
        ["cases", "with", "right", "kidney", "3"]
    ]
    (chaos_mr / "Train_Sets" / "MR" / "1" / "T2SPIR" / "Ground" / "IMG-0004-00003.png").unlink()
    t1, t2 = check.check(chaos_mr)
    assert check.report(chaos_mr, t1)[1] == 0
    assert check.report(chaos_mr, t2)[1] == 1 and "4 PNG masks for the 5 slices" in t2.facts[0].problems[0]


def test_check_knows_ssl4mis_without_a_spacing(ssl4mis_folder, capsys):
    data = ssl4mis_folder / "data"
    write_h5(data / "patient009_frame01.h5", image=image_of(91, VOLUME), label=label_of(91, (0, 4), VOLUME))
    (found,) = check.check(ssl4mis_folder)
    assert found.kind == "SSL4MIS" and "--spacing" in found.warnings[0]
    split_of = {image.split("_")[0]: split for split, _, image, _ in found.cases}
    assert split_of == dict(
        zip([f"patient00{n}" for n in (1, 2, 3, 4, 9)], ["train", "train", "val", "test", "none"], strict=True)
    )
    text, errors = check.report(ssl4mis_folder, found)
    assert errors == 1 and "patient009_frame01.h5: label values 4 are not among 0, 1, 2, 3" in text
    (data / "patient009_frame01.h5").unlink()
    (data / "slices" / "patient002_frame01_slice_4.h5").unlink()
    (ssl4mis_folder / "test.list").write_text("patient004_frame01\npatient004_frame09\n")
    (found,) = check.check(ssl4mis_folder)
    told = [*found.problems, *(line for fact in found.facts for line in fact.problems)]
    assert told == problems_of(ssl4mis.prepare, ssl4mis_folder, ssl4mis_folder / "out", (10, 1, 1))
    assert len(told) == 2
    (ssl4mis_folder / "train_slices.list").unlink()
    (found,) = check.check(ssl4mis_folder)
    assert "has no train_slices.list" in found.problems[0] and len(found.cases) == 5


# --- Command lines and configs --------------------------------------------------------------------


@pytest.mark.parametrize("module", [la2018, chaos, ssl4mis])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--splits" in told and "et al." in told  # where the data come from


def test_the_commands(la_h5, chaos_mr, ssl4mis_folder, tmp_path, capsys):
    def done(module, folder, *options):
        out = tmp_path / module.__name__
        module.main([f"--input={folder}", f"--output={out}", *options])
        return open_prepared(out)

    splits = write_splits(tmp_path, **LA_SPLITS)
    assert done(la2018, la_h5, f"--splits={splits}", "--spacing_of_files=1").cases[0].grid.native_spacing == (1, 1, 1)
    splits = write_splits(tmp_path, **CHAOS_SPLITS)
    assert done(chaos, chaos_mr, "--modality=t2", f"--splits={splits}", "--spacing=3").cases[0].grid.spacing[1:] == (
        3,
        3,
    )
    assert done(ssl4mis, ssl4mis_folder, "--spacing", "8", "2", "1").cases[0].grid.spacing == (8, 2, 1)
    with pytest.raises(SystemExit):
        ssl4mis.main([f"--input={ssl4mis_folder}", f"--output={tmp_path / 'other'}"])
    assert "--spacing" in capsys.readouterr().err


@pytest.mark.parametrize("method", list(base.METHODS))
@pytest.mark.parametrize("config", [la_config, chaos_config])
def test_configs(config, method):
    experiment.check_config(config.get_config(method))
