"""The phantoms: reproducible, laid out like ACDC, and anatomically what their labels say."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_prep import phantom

TRAIN, VAL, TEST = 3, 1, 1  # five patients: one of each group
PATIENTS = [f"patient{number:03d}" for number in range(1, TRAIN + VAL + TEST + 1)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("phantom") / "data"
    assert phantom.generate(output, TRAIN, VAL, TEST, seed=3, workers=2)
    return output


def read_info(folder: Path) -> dict[str, str]:
    return dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())


def frames(folder: Path) -> dict[str, tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Image and label of the frames that Info.cfg names ED and ES."""
    info = read_info(folder)
    return {
        phase: tuple(nib.load(folder / f"{folder.name}_frame{int(info[phase]):02d}{end}.nii.gz") for end in ("", "_gt"))
        for phase in ("ED", "ES")
    }


@pytest.fixture(scope="module")
def labels(dataset: Path) -> dict[tuple[str, str], np.ndarray]:
    return {
        (patient, phase): np.asarray(label.dataobj)
        for patient in PATIENTS
        for phase, (_, label) in frames(dataset / "training" / patient).items()
    }


def test_a_patient_depends_on_seed_and_number_alone(dataset: Path, tmp_path: Path) -> None:
    """Written by a worker among others or alone in this process: the same bytes."""
    phantom.write_patient(tmp_path, seed=3, number=2)
    files = sorted((tmp_path / "training" / "patient002").iterdir())
    assert len(files) == 5
    for path in files:
        assert path.read_bytes() == (dataset / "training" / "patient002" / path.name).read_bytes()


def test_seed_and_number_change_the_anatomy() -> None:
    drawn = [phantom.draw_patient(np.random.default_rng(key), "NOR") for key in ([0, 1], [0, 1], [1, 1], [0, 2])]
    assert drawn[0].contrast.tolist() == drawn[1].contrast.tolist()
    assert drawn[0].ventricles == drawn[1].ventricles
    assert len({one.rotation for one in drawn}) == 3
    assert len({one.ventricles["ED"].endo_radius for one in drawn}) == 3


def test_layout_and_info(dataset: Path) -> None:
    assert sorted(path.name for path in dataset.iterdir()) == [
        "phantom.json",
        "splits.json",
        "training",
    ]
    assert sorted(path.name for path in (dataset / "training").iterdir()) == PATIENTS
    groups = []
    for patient in PATIENTS:
        folder = dataset / "training" / patient
        info = read_info(folder)
        assert list(info) == ["ED", "ES", "Group", "Height", "NbFrame", "Weight"]
        assert 1 == int(info["ED"]) < int(info["ES"]) < int(info["NbFrame"])
        assert 1.4 < float(info["Height"]) / 100 < 2.0 and 40 < float(info["Weight"]) < 120
        stems = [f"{patient}_frame{int(info[phase]):02d}" for phase in ("ED", "ES")]
        expected = {"Info.cfg"} | {f"{stem}{end}.nii.gz" for stem in stems for end in ("", "_gt")}
        assert {path.name for path in folder.iterdir()} == expected
        groups.append(info["Group"])
    assert set(groups) == {"NOR", "DCM", "HCM", "MINF", "RV"}


def test_headers(dataset: Path) -> None:
    shapes = set()
    for patient in PATIENTS:
        for image, label in frames(dataset / "training" / patient).values():
            assert image.shape == label.shape
            np.testing.assert_array_equal(image.affine, label.affine)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            zooms = np.array(image.header.get_zooms())
            np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), zooms, rtol=1e-5)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)
            assert 1.4 <= zooms[0] == zooms[1] <= 2.0 and 8 <= zooms[2] <= 10
            assert all(96 <= n <= 128 for n in image.shape[:2]) and 6 <= image.shape[2] <= 9
            assert image.get_data_dtype() in (np.int16, np.float32)
            assert label.get_data_dtype() == np.uint8
            values = np.asarray(image.dataobj)
            assert np.isfinite(values).all() and values.min() >= 0 and values.std() > 0
            shapes.add(image.shape)
    assert len(shapes) > 1


def test_splits_are_disjoint_and_complete(dataset: Path) -> None:
    splits = json.loads((dataset / "splits.json").read_text())
    assert {name: len(ids) for name, ids in splits.items()} == {
        "train": TRAIN,
        "val": VAL,
        "test": TEST,
    }
    assert sorted(sum(splits.values(), [])) == PATIENTS


def test_every_class_in_every_frame_and_little_foreground(labels: dict) -> None:
    for label in labels.values():
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert 0.01 < np.mean(label > 0) < 0.2


def test_left_ventricle_contracts(dataset: Path, labels: dict) -> None:
    for patient in PATIENTS:
        voxel = np.prod(frames(dataset / "training" / patient)["ED"][1].header.get_zooms())
        ml = {phase: (labels[patient, phase] == 3).sum() * voxel / 1000 for phase in ("ED", "ES")}
        assert ml["ES"] < 0.95 * ml["ED"]
        assert 30 < ml["ED"] < 400


def test_left_ventricle_is_enclosed_by_myocardium(labels: dict) -> None:
    """In every slice; at most a few of the voxels next to the cavity are not myocardium."""
    cross = ndimage.generate_binary_structure(2, 1)
    for label in labels.values():
        for plane in np.moveaxis(label, 2, 0):
            cavity = plane == 3
            rim = ndimage.binary_dilation(cavity, cross) & ~cavity
            assert np.isin(plane[rim], (0, 1)).sum() <= 0.03 * rim.sum()


def test_right_ventricle_lies_against_the_septum(labels: dict) -> None:
    for label in labels.values():
        right = label == 1
        near = ndimage.binary_dilation(label == 2, np.ones((3, 3, 1)))
        slices = right.sum((0, 1)) > 40
        # a basal slice may show the right ventricle alone, as in ACDC
        slices &= (label == 2).any((0, 1))
        assert slices.any()
        assert (right & near).any((0, 1))[slices].all()


def test_cavities_are_brighter_than_the_wall_everywhere(dataset: Path) -> None:
    """Contrast differs between patients, but an expert could draw each of them."""
    for patient in PATIENTS:
        for image, label in frames(dataset / "training" / patient).values():
            values, classes = np.asarray(image.dataobj, np.float64), np.asarray(label.dataobj)
            core = ndimage.binary_erosion(classes == 3, np.ones((3, 3, 1)))
            wall = classes == 2
            assert np.median(values[core]) > 1.15 * np.median(values[wall])


def test_label_is_the_majority_and_intensity_the_mean() -> None:
    """One voxel of 2 x 2 x 2 points, five of them LV blood."""
    tissue = np.full((1, 2, 2, 2), phantom.Tissue.MYOCARDIUM, np.uint8)
    tissue.reshape(-1)[:5] = phantom.Tissue.LV_BLOOD
    assert phantom.to_label(tissue, (1, 1, 1)).tolist() == [[[3]]]
    tissue.reshape(-1)[0] = phantom.Tissue.PAPILLARY
    assert phantom.to_label(tissue, (1, 1, 1)).tolist() == [[[3]]]
    tissue.reshape(-1)[:2] = phantom.Tissue.LUNG
    assert phantom.to_label(tissue, (1, 1, 1)).tolist() == [[[2]]], "3 : 3 : 2, the lower label"


def test_noise_free_image_shows_the_contrast_table() -> None:
    """Without artefacts a voxel deep in one tissue has that tissue's signal."""
    drawn = phantom.draw_patient(np.random.default_rng(5), "NOR")
    plain = dataclasses.replace(
        drawn,
        shape=(24, 20, 2),
        dtype="int16",
        scale=1000.0,
        gamma=1.0,
        noise=0.0,
        blur=0.3,
        bias=np.zeros(5),
        texture=np.zeros_like(drawn.texture),
        ghost=(0, 0.0, 1),
    )
    tissue = np.full((2, 1, 24, 20), phantom.Tissue.LIVER, np.uint8)
    tissue[:, :, :12] = phantom.Tissue.LV_BLOOD
    image = phantom.to_mr(np.random.default_rng(0), plain, tissue).astype(float)
    # the gain of a slice is random, the ratio of two tissues within it is not
    ratio = plain.contrast[phantom.Tissue.LIVER] / plain.contrast[phantom.Tissue.LV_BLOOD]
    np.testing.assert_allclose(image[20, 10] / image[4, 10], ratio, atol=0.01)


def test_a_finished_folder_is_left_alone(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    assert not phantom.generate(dataset, TRAIN, VAL, TEST, seed=3, workers=1)
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_other_parameters_are_refused(dataset: Path) -> None:
    with pytest.raises(FileExistsError, match="'seed': 3.*'seed': 4.*delete"):
        phantom.generate(dataset, TRAIN, VAL, TEST, seed=4, workers=1)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a phantom data set"):
        phantom.generate(tmp_path, 1, 0, 0, seed=0, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, seed: int, number: int) -> str:
        (root / "training").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(phantom, "write_patient", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.generate(tmp_path / "data", 1, 0, 0, seed=0, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patients": 0}, "patients=0"),
        ({"val": -1}, "val=-1"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -2}, "seed=-2"),
        ({"patients": 1000}, "999"),
    ],
)
def test_bad_counts(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phantom.generate(tmp_path / "data", **{"patients": 1, "val": 0, "test": 0, **change})
    assert not (tmp_path / "data").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SystemExit) as stop:
        phantom.main(["--output", str(tmp_path / "full")])
    assert stop.value.code == 1
    assert "choose another folder" in capsys.readouterr().err
