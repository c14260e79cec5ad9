"""Names of files and folders: whatever they are, nothing is written outside the output folder."""

import csv
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from configs import base
from data_prep import folder
from sscl_jax import evaluate, experiment, predict
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.recipe import Recipe

NAMES = ["p1 knee left", "p2_Zoë·Ōe", "p3[1] {x} %s $HOME", "p4.v2;'quoted'", "-p5", "p6_膝"]


def write_scan(path, seed=0, label=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, label])
    array = rng.integers(0, 3, (9, 8, 4)).astype(np.uint8) if label else rng.normal(100, 20, (9, 8, 4)).astype("f4")
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), path)
    return path


def files_of(root):
    """Contents of all files below a folder, by path, links not followed; None for folders and links."""
    return {p: None if p.is_symlink() or p.is_dir() else p.read_bytes() for p in sorted(root.rglob("*"))}


def assert_only_new_in(output, root, before):
    after = files_of(root)
    new = {p for p in after if after[p] != before.get(p, "")}
    assert new and all(p == output or output in p.parents for p in new), new
    assert before.keys() <= after.keys()


@pytest.fixture
def stub(monkeypatch):
    """A network that sees class 1 everywhere, in place of a checkpoint's."""
    recipe = Recipe(spacing=(None, None, None), label_values=(0, 1), class_names=("background", "knee"))
    network = SimpleNamespace(
        recipe=recipe, config=base.get_config(), variables=None, meta={"channels": 1}, model=None, path="", name="stub"
    )
    monkeypatch.setattr(experiment, "load_networks", lambda *_: {"teacher": network})
    ones = lambda _, image: np.broadcast_to(np.float32([0, 1]), (*image.shape[:3], 2))  # noqa: E731
    monkeypatch.setattr(evaluate, "make_predictor", lambda *_: ones)
    return network


def run_predict(source, output):
    predict.main(["--checkpoint=none", f"--input={source}", f"--output={output}"])


def test_prepare_writes_names_of_any_kind_only_where_it_should(tmp_path):
    for seed, name in enumerate(NAMES):
        write_scan(tmp_path / "in" / "images" / f"{name}.nii.gz", seed)
        write_scan(tmp_path / "in" / "labels" / f"{name}.nii.gz", seed, label=True)
    before = files_of(tmp_path)
    output = tmp_path / "out [1] ü"
    folder.prepare(output, tmp_path / "in", val_fraction=0, test_fraction=0)
    assert_only_new_in(output, tmp_path, before)
    assert sorted(case.case_id for case in open_prepared(output).cases) == sorted(NAMES)


def test_prepare_reads_through_links_and_writes_through_none(tmp_path):
    for seed in range(2):
        real = write_scan(tmp_path / "elsewhere" / f"image{seed}.nii.gz", seed)
        mask = write_scan(tmp_path / "elsewhere" / f"mask{seed}.nii.gz", seed, label=True)
        for kind, target in (("images", real), ("labels", mask)):
            (tmp_path / "in" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / kind / f"p{seed}.nii.gz").symlink_to(target)
    before = files_of(tmp_path)
    folder.prepare(tmp_path / "out", tmp_path / "in", val_fraction=0, test_fraction=0)
    assert_only_new_in(tmp_path / "out", tmp_path, before)


@pytest.mark.parametrize("there", [True, False])
def test_prepare_into_a_link_to_a_folder(there, tmp_path):
    for seed in range(2):
        write_scan(tmp_path / "in" / "images" / f"p{seed}.nii.gz", seed)
        write_scan(tmp_path / "in" / "labels" / f"p{seed}.nii.gz", seed, label=True)
    (tmp_path / "big disk").mkdir()
    if there:
        (tmp_path / "big disk" / "data").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big disk" / "data")
    before = files_of(tmp_path)
    folder.prepare(tmp_path / "out", tmp_path / "in", val_fraction=0, test_fraction=0)
    assert_only_new_in(tmp_path / "big disk" / "data", tmp_path, before)
    assert len(open_prepared(tmp_path / "out").cases) == 2 and (tmp_path / "out").is_symlink()


def test_case_names_of_a_list_cannot_leave_a_folder(tmp_path):
    listed = ["../../above/p1.nii.gz", "a/../../p2.nii.gz", str(tmp_path / "absolute" / "p3.nii.gz"), "./b/p4.nii.gz"]
    home = tmp_path / "lists" / "deep"
    home.mkdir(parents=True)
    (home / "a").mkdir()
    with open(home / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "patient"])
        for seed, name in enumerate(listed):
            write_scan(home / name, seed)
            label = Path(name).with_name(f"mask{seed}.nii.gz")
            write_scan(home / label, seed, label=True)
            rows.writerow([name, label, "../../../patient" + str(seed)])
    before = files_of(tmp_path)
    folder.prepare(tmp_path / "out", csv_file=home / "list.csv", val_fraction=0, test_fraction=0)
    assert_only_new_in(tmp_path / "out", tmp_path, before)
    names = [case.case_id for case in open_prepared(tmp_path / "out").cases]
    assert len(names) == 4 and all(Path(name).name == name and name not in ("..", ".") for name in names)


def test_two_images_of_a_list_that_would_have_one_name_are_told(tmp_path):
    for seed, name in enumerate(("a/b.nii", "../a/b.nii")):
        write_scan(tmp_path / "lists" / name, seed)
    (tmp_path / "lists" / "list.csv").write_text("image\na/b.nii\n../a/b.nii\n")
    _, (problem,) = folder.list_csv(tmp_path / "lists" / "list.csv")
    assert "line 3: is the same image as line 2, or would have the same name, a_b: " in problem


def test_predict_writes_names_of_any_kind_only_where_it_should(stub, tmp_path):
    for seed, name in enumerate(NAMES):
        write_scan(tmp_path / "in" / f"sub {seed}" / f"{name}.nii.gz", seed)
    real = write_scan(tmp_path / "elsewhere" / "real.nii.gz")
    (tmp_path / "in" / "link.nii.gz").symlink_to(real)
    (tmp_path / "in" / "up.nii.gz").symlink_to(Path("..") / "elsewhere" / "real.nii.gz")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    before = files_of(tmp_path)
    run_predict(tmp_path / "in", tmp_path / "out ü")
    assert_only_new_in(tmp_path / "out ü", tmp_path, before)
    masks = sorted(str(p.relative_to(tmp_path / "out ü")) for p in (tmp_path / "out ü").rglob("*.nii.gz"))
    assert masks == sorted([*(f"sub {i}/{name}.nii.gz" for i, name in enumerate(NAMES)), "link.nii.gz", "up.nii.gz"])


def test_predict_goes_on_behind_a_qform_without_rotation(stub, tmp_path, capsys):
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}.nii", ord(name))
    with open(tmp_path / "in" / "b.nii", "r+b") as file:
        file.seek(252)  # qform_code, sform_code, quatern_b, quatern_c, quatern_d
        file.write(struct.pack("<hhfff", 1, 1, 0.9, 0.9, 0.9))
    run_predict(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii", "b.nii", "c.nii"]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert line.startswith(f"warning: {tmp_path / 'in' / 'b.nii'}: its qform holds no rotation")


@pytest.mark.parametrize("given", ["in/../in/a.nii.gz", "in/sub/../a.nii.gz", "in/sub/..", "in/."])
def test_predict_of_a_path_with_dots_stays_in_its_output(stub, given, tmp_path):
    write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "sub").mkdir()
    before = files_of(tmp_path)
    run_predict(tmp_path / given, tmp_path / "out")
    assert_only_new_in(tmp_path / "out", tmp_path, before)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def test_a_mask_replaces_a_link_and_not_the_file_it_leads_to(stub, tmp_path):
    scan = write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").symlink_to(write_scan(tmp_path / "precious.nii.gz", 1))
    precious = (tmp_path / "precious.nii.gz").read_bytes()
    run_predict(scan, tmp_path / "out")
    assert (tmp_path / "precious.nii.gz").read_bytes() == precious
    assert not (tmp_path / "out" / "a.nii.gz").is_symlink()


def test_predict_never_replaces_another_scan_either(stub, tmp_path, capsys):
    """The masks' folder leads back to the scans, so that one scan's mask would take the place of another."""
    scans = [write_scan(tmp_path / "in" / name, i) for i, name in enumerate(("a.nii.gz", "sub/a.nii.gz"))]
    before = files_of(tmp_path)
    for source, told in (("in", "the mask would replace a scan"), ("in/a.nii.gz", "is no mask that predict wrote")):
        with pytest.raises(SystemExit, match="1 of . scans could not"):
            run_predict(tmp_path / source, tmp_path / "in" / "sub")
        assert f"sub/a.nii.gz: {told}" in capsys.readouterr().err
    assert all(path.read_bytes() == before[path] for path in scans)


def test_predict_never_replaces_a_mask_that_it_did_not_write(stub, tmp_path, capsys):
    scan = write_scan(tmp_path / "images" / "a.nii.gz")
    reference = tmp_path / "labels" / "a.nii.gz"
    reference.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 8, 4), np.uint8), np.diag([1.0, 1.0, 4.0, 1.0])), reference)
    for content in (reference.read_bytes(), reference.read_bytes()[:90], b"", b"no image"):  # whole, or cut short
        reference.write_bytes(content)
        with pytest.raises(SystemExit, match="1 of 1 scans could not"):
            run_predict(scan, tmp_path / "labels")
        assert "labels/a.nii.gz: is no mask that predict wrote, so it stays" in capsys.readouterr().err
        assert reference.read_bytes() == content


def test_masks_of_an_earlier_call_are_made_again_and_not_segmented(stub, tmp_path, capsys):
    write_scan(tmp_path / "in" / "a.nii.gz")
    for told, output in (("", "in/masks"), ("left out: 1 masks,", "in/masks"), ("left out: 1 masks,", "elsewhere")):
        run_predict(tmp_path / "in", tmp_path / output)
        assert capsys.readouterr().out.startswith(told)
        assert [p.name for p in (tmp_path / output).rglob("*")] == ["a.nii.gz"]


@pytest.mark.parametrize("largest", ["none", "class", "foreground"])
def test_a_mask_is_the_largest_part_if_the_training_says_so(largest, stub, tmp_path, monkeypatch):
    island = np.zeros((4, 8, 9), int)  # slices, rows, columns
    island[1:3, 2:5, 2:5] = island[3, 7, 8] = 1
    monkeypatch.setattr(evaluate, "make_predictor", lambda *_: lambda _, image: np.eye(2, dtype="f4")[island])
    stub.config.eval.largest_component = largest
    write_scan(tmp_path / "in" / "a.nii.gz")
    run_predict(tmp_path / "in", tmp_path / "out")
    mask = np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj)
    assert mask.sum() == 18 + (largest == "none")


def test_a_mask_that_was_corrected_stays_and_is_not_segmented(stub, tmp_path, capsys):
    scan = write_scan(tmp_path / "in" / "a.nii.gz")
    run_predict(tmp_path / "in", tmp_path / "in" / "masks")
    mask = tmp_path / "in" / "masks" / "a.nii.gz"
    written = nibabel.load(mask)
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 8, 4), np.uint8), None, written.header), mask)
    corrected = mask.read_bytes()
    capsys.readouterr()
    run_predict(tmp_path / "in", tmp_path / "in" / "masks")
    assert f"kept: {mask}: may have been corrected since predict wrote it\n" in capsys.readouterr().out
    assert mask.read_bytes() == corrected and scan.is_file()


def test_masks_beside_their_scans_are_not_segmented(stub, tmp_path, capsys):
    for name in ("p1.nii.gz", "p1_seg.nii.gz", "p2.nii.gz", "p3_seg.nii.gz", "sub/p1_gt.nii.gz"):
        write_scan(tmp_path / "in" / name)
    (tmp_path / "in" / "p2.seg.nrrd").touch()  # as 3D Slicer calls it
    write_scan(tmp_path / "in" / "sub" / "_seg.nii.gz")
    assert [scan.mask.as_posix() for scan in predict.find_scans(tmp_path / "in")] == [
        "p1.nii.gz", "p2.nii.gz", "p3_seg.nii.gz", "sub/_seg.nii.gz", "sub/p1_gt.nii.gz"
    ]  # fmt: skip
    assert capsys.readouterr().out == (
        f"left out: 2 masks, of scans beside them or written by predict, such as {tmp_path / 'in' / 'p1_seg.nii.gz'}\n"
    )


def test_masks_of_the_layout_that_is_prepared_are_not_segmented(stub, tmp_path):
    for name in (
        "images/p1.nii.gz",
        "labels/p1.nii.gz",
        "imagesTr/p2.nii.gz",
        "labelsTr/p2.nii.gz",
        "labelsX/p3.nii.gz",
    ):
        write_scan(tmp_path / name)
    masks = [scan.mask.as_posix() for scan in predict.find_scans(tmp_path)]
    assert masks == ["images/p1.nii.gz", "imagesTr/p2.nii.gz", "labelsX/p3.nii.gz"]


def test_masks_beside_scans_of_other_names_do_not_stand_in_the_way_of_a_second_call(stub, tmp_path):
    for channel in range(2):
        write_scan(tmp_path / f"p1_000{channel}.nii.gz", channel)
    (scan,) = predict.find_scans(tmp_path, 2)
    stub.meta["channels"] = 2
    for _ in range(2):
        run_predict(tmp_path, tmp_path)
        assert predict.find_scans(tmp_path, 2) == [scan]


def test_a_scan_whose_header_is_damaged_is_told_and_the_others_segmented(stub, tmp_path, capsys):
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}.nii", ord(name))
    with open(tmp_path / "in" / "b.nii", "r+b") as file:
        file.seek(70)
        file.write(struct.pack("<h", 9999))  # a data type that there is not
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 of 3 scans could not"):
            run_predict(tmp_path / "in", tmp_path / "out")
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'in' / 'b.nii'}: cannot be read")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii", "c.nii"]


def test_a_scan_that_fails_in_no_known_way_is_told_and_the_others_segmented(stub, tmp_path, capsys, monkeypatch):
    for name in "ab":
        write_scan(tmp_path / "in" / f"{name}.nii", ord(name))
    segment = predict.segment_scan

    def broken(network, predict_, scan, output):
        if output.name == "a.nii":
            raise KeyError("voxel")
        segment(network, predict_, scan, output)

    monkeypatch.setattr(predict, "segment_scan", broken)
    with pytest.raises(SystemExit, match="1 of 2 scans could not"):
        run_predict(tmp_path / "in", tmp_path / "out")
    assert capsys.readouterr().err == f"error: {tmp_path / 'in' / 'a.nii'}: KeyError: 'voxel'\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii"]


def test_a_scan_for_which_memory_does_not_suffice_is_told_and_the_others_segmented(stub, tmp_path, capsys, monkeypatch):
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}.nii", ord(name))
    segment = predict.segment_scan

    def with_little(network, predict_, scan, output):
        if output.name < "c.nii":
            raise MemoryError if output.name == "a.nii" else RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        segment(network, predict_, scan, output)

    monkeypatch.setattr(predict, "segment_scan", with_little)
    with pytest.raises(SystemExit, match="2 of 3 scans could not"):
        run_predict(tmp_path / "in", tmp_path / "out")
    assert [line.split(": ")[1:3] for line in capsys.readouterr().err.splitlines()] == [
        [str(tmp_path / "in" / f"{name}.nii"), "out of memory"] for name in "ab"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.nii"]


def test_a_name_that_is_not_unicode_is_segmented(stub, tmp_path):
    try:
        scan = write_scan(tmp_path / "in" / "a.nii.gz").rename(tmp_path / "in" / "a\udcff.nii.gz")
    except OSError:
        pytest.skip("this file system takes Unicode only")
    run_predict(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / scan.name).is_file()


def test_what_makes_a_mask_doubtful_is_told_with_the_name_of_the_scan(stub, tmp_path, capsys):
    scan = np.random.default_rng(0).normal(100, 20, (6, 5, 4)).astype("f4")
    for name, array, affine in (
        ("flat", np.ones_like(scan), np.eye(4)),
        ("bare", scan, None),
        ("good", scan, np.eye(4)),
    ):
        path = tmp_path / "in" / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as it is for a user
        run_predict(tmp_path / "in", tmp_path / "out")
    told = sorted(line for line in capsys.readouterr().err.splitlines())
    assert len(told) == 2 and all(line.startswith(f"warning: {tmp_path / 'in'}") for line in told)
    assert "bare.nii.gz: its header gives no directions" in told[0]
    assert "flat.nii.gz: channel 0 of the image is constant" in told[1]
