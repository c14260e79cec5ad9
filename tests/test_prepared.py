import contextlib
import errno
import fcntl
import functools
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tensorflow_datasets as tfds

from sscl_jax.data import builder, formats, kept, prepared, workers
from sscl_jax.data import recipe as recipes
from sscl_jax.data.prepared import CaseSource, open_prepared, write_prepared
from sscl_jax.data.recipe import Recipe

_SPEC = importlib.util.spec_from_file_location("large", Path(__file__).parents[1] / "benchmarks" / "large.py")
large = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(large)

RECIPE = Recipe(label_values=(0, 10, 20), class_names=("background", "a", "b"))
PATIENTS = {"train": ["p3", "p1"], "val": ["p2"], "test": []}
AFFINE = np.diag([1.0, 1.25, 5.0, 1.0])


def write_nifti(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def make_files(folder, labelled=("p1", "p2", "p3")):
    """Two frames of each of three patients; shapes differ from case to case."""
    sources = []
    for number, patient in enumerate(("p1", "p2", "p3")):
        for frame in (0, 1):
            random = np.random.default_rng([number, frame])
            shape = (12 + number, 10, 3 + frame)
            case = f"{patient}_f{frame}"
            write_nifti(folder / f"{case}.nii.gz", random.normal(100, 20, shape).astype("f4"))
            label = None
            if patient in labelled:
                label = folder / f"{case}_gt.nii.gz"
                write_nifti(label, random.choice([0, 10, 20], shape).astype("u1"))
            split = "val" if patient == "p2" else "train"
            sources.append(CaseSource(case, patient, split, (folder / f"{case}.nii.gz",), label))
    return sources


@pytest.fixture
def sources(tmp_path):
    return make_files(tmp_path / "files")


@pytest.fixture
def dataset(tmp_path, sources):
    return write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")


def test_round_trip_equals_direct_preprocessing(dataset, sources):
    by_id = {source.case_id: source for source in sources}
    assert dataset.recipe == RECIPE
    assert (dataset.name, dataset.channels, dataset.num_classes) == ("toy", 1, 3)
    for case in dataset.cases:
        source = by_id[case.case_id]
        image = nibabel.load(source.image_paths[0]).get_fdata(dtype=np.float32)
        label = np.asarray(nibabel.load(source.label_path).dataobj)
        grid = recipes.make_grid(image.shape, AFFINE, RECIPE)
        assert case.grid.shape == grid.shape
        np.testing.assert_array_equal(case.grid.native_affine, AFFINE)
        assert case.grid.spacing == grid.spacing
        expected = recipes.prepare_image(image[..., None], grid, RECIPE)
        np.testing.assert_array_equal(dataset.image(case.index), expected)
        expected = recipes.prepare_label(label, grid, RECIPE)
        np.testing.assert_array_equal(dataset.label(case.index), expected)
        np.testing.assert_array_equal(dataset.native_label(case.index), label // 10)
        assert case.source == source.image_paths[0].name


def test_order_is_split_patient_case(dataset):
    expected = ["p3_f0", "p3_f1", "p1_f0", "p1_f1", "p2_f0", "p2_f1"]
    assert [case.case_id for case in dataset.cases] == expected
    assert [case.index for case in dataset.cases] == list(range(6))
    assert [case.split for case in dataset.cases] == ["train"] * 4 + ["val"] * 2


def test_views_are_read_only_and_share_the_file(dataset):
    image = dataset.image(0)
    assert isinstance(image, np.memmap) and not image.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident of a file")
def test_what_was_read_does_not_stay_in_memory(dataset):
    shutil.copytree(dataset.path, copy := dataset.path.with_name("large"))
    large.enlarge(copy, 2**26)  # 64 MiB, of images of at most 2240 bytes
    opened = open_prepared(copy)
    resident = []
    for i in range(len(opened.cases)):
        assert np.isfinite(opened.image(i)).all()
        if i % 5000 == 0:
            text = Path("/proc/self/smaps").read_text()
            (kib,) = re.findall(rf"{copy}/cache/images\.f32\n.*?Rss: +(\d+) kB", text, re.DOTALL)
            resident.append(int(kib))
    assert len(resident) > 5 and max(resident) < 2**13  # pages come in blocks of up to 2 MiB


def test_folder_is_a_tfds_dataset(dataset):
    builder = tfds.builder_from_directory(str(dataset.path))
    assert builder.info.metadata["fingerprint"] == dataset.fingerprint
    record = builder.as_data_source("val")[1]
    assert record["case_id"] == b"p2_f1"
    np.testing.assert_array_equal(record["image"], dataset.image(5))
    np.testing.assert_array_equal(record["native_affine"], AFFINE)


def test_case_without_label(tmp_path):
    sources = make_files(tmp_path / "files", labelled=("p2", "p3"))
    dataset = write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert [case.has_label for case in dataset.cases] == [True, True, False, False, True, True]
    with pytest.raises(ValueError, match="p1_f0 has no label"):
        dataset.label(2)
    with pytest.raises(ValueError, match="p1_f0 has no label"):
        dataset.native_label(2)


def test_masks_of_unlabelled_patients_take_no_part(tmp_path, dataset):
    files = make_files(tmp_path / "fewer", labelled=("p2", "p3"))
    fewer = write_prepared(tmp_path / "fewer_out", files, RECIPE, PATIENTS, "toy")
    assert fewer.fingerprint == dataset.fingerprint
    assert fewer.patients == dataset.patients
    for one, other in zip(dataset.cases, fewer.cases, strict=True):
        assert one.case_id == other.case_id
        assert dataset.image(one.index).tobytes() == fewer.image(one.index).tobytes()
    np.testing.assert_array_equal(dataset.label(5), fewer.label(5))


def test_no_label_file_is_opened_for_images(dataset):
    dataset.image(0)
    labels = str(dataset.path / "cache" / "labels.u8")  # other tests of this process may hold those of other data
    assert labels not in map(os.readlink, _descriptors())
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    assert labels not in maps
    dataset.label(0)
    maps = Path("/proc/self/maps").read_text() if maps else ""
    assert not maps or labels in maps


def _descriptors():
    folder = Path("/proc/self/fd")
    return [p for p in folder.iterdir() if p.is_symlink()] if folder.exists() else []


def test_same_files_give_the_same_dataset(tmp_path, dataset, sources):
    again = write_prepared(tmp_path / "again", sources[::-1], RECIPE, PATIENTS, "toy")
    assert again.fingerprint == dataset.fingerprint
    for name in prepared.CACHE_FILES:
        first, second = (d.path / "cache" / name for d in (dataset, again))
        assert first.read_bytes() == second.read_bytes()


def test_fingerprint_depends_on_images_recipe_and_order(tmp_path, dataset, sources):
    swapped = {**PATIENTS, "train": ["p1", "p3"]}
    other = write_prepared(tmp_path / "b", sources, RECIPE, swapped, "toy")
    coarse = Recipe(label_values=(0, 10, 20), class_names=("background", "a", "b"), spacing=(None, 2.0, 2.0))
    third = write_prepared(tmp_path / "c", sources, coarse, PATIENTS, "toy")
    assert len({dataset.fingerprint, other.fingerprint, third.fingerprint}) == 3


def test_second_call_does_nothing(dataset, sources, capsys):
    before = {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")}
    again = write_prepared(dataset.path, sources, RECIPE, PATIENTS, "toy")
    assert again.fingerprint == dataset.fingerprint
    assert {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")} == before
    assert "already prepared" in capsys.readouterr().out


def test_other_input_in_the_same_output_is_refused(dataset, sources, tmp_path):
    write_nifti(sources[0].image_paths[0], np.full((12, 10, 3), 7.0, "f4") * np.arange(3))
    with pytest.raises(ValueError, match="choose another --output"):
        write_prepared(dataset.path, sources, RECIPE, PATIENTS, "toy")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match="choose another --output"):
        write_prepared(tmp_path / "foreign", sources, RECIPE, PATIENTS, "toy")
    assert (tmp_path / "foreign" / "thesis.txt").exists()


def test_failure_half_way_keeps_what_is_done_out_of_sight(tmp_path, sources, monkeypatch):
    original, calls = prepared._prepare_case, itertools.count()

    def fail_late(source, recipe):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return original(source, recipe)

    monkeypatch.setattr(prepared, "_prepare_case", fail_late)
    with pytest.raises(KeyboardInterrupt):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-cases", "files"]
    with pytest.raises(FileNotFoundError, match="half-way"):
        open_prepared(tmp_path / "out")
    monkeypatch.undo()
    assert len(write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy").cases) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "out"]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def killed(tmp_path, sources):
    """Folder that a preparation was to make which was killed when 5 of 6 cases were done."""
    script = f"""
import os, sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_prepared as t
from pathlib import Path
original = t.prepared._prepare_case
def die(source, recipe):
    if source.case_id == "p2_f0":
        while len(list(Path({str(tmp_path)!r}).glob(".out.partial-cases/*.npz"))) < 5:
            time.sleep(0.01)
        os._exit(9)
    return original(source, recipe)
t.prepared._prepare_case = die
sources = t.make_files(Path({str(tmp_path / "files")!r}))
t.write_prepared(Path({str(tmp_path / "out")!r}), sources, t.RECIPE, t.PATIENTS, "toy")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert list(tmp_path.glob(".out.partial-*-*-*/lock"))
    with pytest.raises(FileNotFoundError, match="half-way"):
        open_prepared(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def interrupted(tmp_path, sources, monkeypatch):
    """The same folder, where it was interrupted."""
    original = prepared._prepare_case

    def stop(source, recipe):
        if source.case_id == "p2_f0":
            while len(list(tmp_path.glob(".out.partial-cases/*.npz"))) < 5:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return original(source, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, "_prepare_case", stop)
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    return tmp_path / "out"


@pytest.fixture
def made(monkeypatch):
    """Names of the cases that are prepared in this process from here on."""
    names, original = [], prepared._prepare_case

    def listed(source, recipe):
        names.append(source.case_id)
        return original(source, recipe)

    monkeypatch.setattr(prepared, "_prepare_case", listed)
    return names


def test_killed_process_leaves_no_half_that_passes_for_whole(killed, tmp_path, sources, made, capsys):
    write_prepared(killed, sources, RECIPE, PATIENTS, "toy")
    assert made == ["p2_f0"]
    assert "5 of 6 cases were prepared before, and are taken" in capsys.readouterr().out
    assert not list(tmp_path.glob(".out.partial-*"))  # what the killed one left is gone
    write_prepared(tmp_path / "undisturbed", sources, RECIPE, PATIENTS, "toy")
    assert files_of(killed) == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["image", "label", "recipe", "names", "reader", "truncated", "flipped"])
def test_cases_that_changed_since_are_made_again(interrupted, tmp_path, sources, made, change):
    recipe, expected = RECIPE, {"p2_f0", "p3_f1"}
    at = next(n for n, source in enumerate(sources) if source.case_id == "p3_f1")
    if change == "image":
        write_nifti(sources[at].image_paths[0], np.arange(14 * 10 * 4, dtype="f4").reshape(14, 10, 4))
    elif change == "label":
        write_nifti(sources[at].label_path, np.full((14, 10, 4), 20, "u1"))
    elif change == "recipe":
        recipe = replace(RECIPE, spacing=(None, 2.0, 2.0))
        expected = {source.case_id for source in sources}
    elif change == "names":
        sources[at] = replace(sources[at], case_id="p3_f9")
        expected = {"p2_f0", "p3_f9"}
    elif change == "reader":
        sources[at] = replace(sources[at], read_image=functools.partial(formats.read_image, channels=True))
    else:
        file = max(interrupted.parent.glob(".out.partial-cases/*.npz"), key=_is_of_p3_f1)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if change == "flipped" else content[:-7])
    write_prepared(interrupted, sources, recipe, PATIENTS, "toy")
    assert set(made) == expected
    assert not list(tmp_path.glob(".out.partial-*"))
    write_prepared(tmp_path / "undisturbed", sources, recipe, PATIENTS, "toy")
    assert files_of(interrupted) == files_of(tmp_path / "undisturbed")


def _is_of_p3_f1(path):
    with np.load(path) as case:
        return case["case_id"] == "p3_f1"


def test_preparations_of_one_output_at_the_same_time_all_succeed(tmp_path, sources):
    with ProcessPoolExecutor(3, mp_context=_spawn()) as pool:
        jobs = [pool.submit(write_prepared, tmp_path / "out", sources, RECIPE, PATIENTS, "toy") for _ in range(3)]
        fingerprints = {job.result().fingerprint for job in jobs}
    assert len(fingerprints) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "out"]
    write_prepared(tmp_path / "alone", sources, RECIPE, PATIENTS, "toy")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_who_finds_the_place_taken_by_other_options_leaves_nothing_behind(tmp_path, sources, monkeypatch):
    write = prepared._write_records

    def forestalled(*args):
        monkeypatch.setattr(prepared, "_write_records", write)
        write_prepared(tmp_path / "out", sources, replace(RECIPE, percentiles=(5.0, 90.0)), PATIENTS, "toy")
        return write(*args)

    monkeypatch.setattr(prepared, "_write_records", forestalled)
    with pytest.raises(ValueError, match="was not made from these files with these options"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "out"]


def test_one_that_ends_leaves_alone_what_another_is_at_work_with(tmp_path):
    folder = kept.folder_beside(tmp_path / "out")
    with kept.removed_when_done(folder):
        with kept.removed_when_done(folder):
            kept.write_arrays(folder / "a.npz", {"a": np.arange(3)})
        assert kept.is_whole(folder / "a.npz")
    assert not folder.exists()


def test_who_comes_as_another_ends_begins_a_folder_of_its_own(tmp_path, monkeypatch):
    folder = kept.folder_beside(tmp_path / "out")
    lock = fcntl.flock

    def removed_before(*args):
        monkeypatch.undo()
        shutil.rmtree(folder)
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with kept.removed_when_done(folder):
        kept.write_arrays(folder / "a.npz", {"a": np.arange(3)})
        with kept.removed_when_done(folder):
            pass
        assert kept.is_whole(folder / "a.npz")


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def read(self, path):
        array, affine = formats.read_image(path)
        return array * self.factor, affine


def test_what_is_kept_is_named_by_the_reader_and_its_code(sources, tmp_path, monkeypatch):
    def name(**fields):
        return kept.digest(replace(sources[0], **fields))

    assert name() == name()
    # Two that share all but what they do: the same method, the same place in memory.
    assert name(read_image=Scaled(1).read) != name(read_image=Scaled(2).read)
    assert len({name(read_image=lambda path, n=n: n) for n in range(5)}) == 5
    exec("def read(path): ...", cell := {"__name__": "a notebook"})  # may be defined otherwise at any time
    assert name(read_image=cell["read"]) != name(read_image=cell["read"])
    before = name()
    monkeypatch.setattr(kept, "_code", lambda path: "changed" if path.endswith("recipe.py") else "")
    changed = name()
    monkeypatch.setattr(kept, "_code", lambda path: "")
    assert len({before, changed, name()}) == 3
    monkeypatch.undo()
    (tmp_path / "reader_of_test.py").write_text("def read(path): ...")
    monkeypatch.syspath_prepend(tmp_path)
    reader = importlib.import_module("reader_of_test")
    first = name(read_image=reader.read)
    (tmp_path / "reader_of_test.py").write_text("def read(path): return None")
    kept._code.cache_clear()  # as in another process
    assert name(read_image=reader.read) != first


def test_where_the_folder_is_a_link_what_that_leads_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("thesis.txt", "lock"):
        (tmp_path / "elsewhere" / name).write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with kept.removed_when_done(tmp_path / "link"):
        pass
    assert files_of(tmp_path / "elsewhere") == {"thesis.txt": b"keep", "lock": b"keep"}


def test_every_flipped_bit_of_a_kept_file_is_noticed(tmp_path):
    kept.write_arrays(tmp_path / "a.npz", {"a": np.arange(3.0), "name": "b"})
    content = (tmp_path / "a.npz").read_bytes()
    assert kept.is_whole(tmp_path / "a.npz")
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.npz").write_bytes(flipped)
        assert not kept.is_whole(tmp_path / "b.npz"), bit
    (tmp_path / "b.npz").write_bytes(b"")
    assert not kept.is_whole(tmp_path / "b.npz") and not kept.is_whole(tmp_path)


def test_a_scan_that_changes_while_it_is_read_is_refused(tmp_path, sources, monkeypatch):
    original = prepared._prepare_case

    def copied_over(source, recipe):
        if source.case_id == "p1_f1":
            write_nifti(source.image_paths[0], np.arange(12 * 10 * 4, dtype="f4").reshape(12, 10, 4))
        return original(source, recipe)

    monkeypatch.setattr(prepared, "_prepare_case", copied_over)
    with pytest.raises(ValueError, match=r"p1_f1.nii.gz: changed while it was read"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert not (tmp_path / "out").exists()


def test_another_preparation_that_was_faster_is_not_taken_for_this_one(tmp_path, sources, monkeypatch):
    original, coarse = prepared._write_records, replace(RECIPE, spacing=(None, 2.0, 2.0))

    def late(*args):
        monkeypatch.undo()
        write_prepared(tmp_path / "out", sources, coarse, PATIENTS, "toy")
        return original(*args)

    monkeypatch.setattr(prepared, "_write_records", late)
    with pytest.raises(ValueError, match="not made from these files with these options"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert open_prepared(tmp_path / "out").recipe == coarse


@contextlib.contextmanager
def files_no_larger_than(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_where_there_is_no_room_that_is_told(tmp_path, sources):
    room = rf"^{tmp_path}/out.* could not be written \(File too large\): free some space"
    for size in (1000, 20_000):  # bytes: less than a case that is kept; less than the records, in blocks of 64 KiB
        with files_no_larger_than(size), pytest.raises(OSError, match=room):
            write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    shutil.rmtree(tmp_path / "out" / "cache")
    with files_no_larger_than(1000), pytest.raises(OSError, match=room):
        open_prepared(tmp_path / "out")
    assert not (tmp_path / "out" / "cache").exists()


@pytest.mark.parametrize("files", [["lock"], ["lock.new"], ["new/images.f32"], ["lock", "new/images.f32"], []])
def test_what_a_killed_one_left_goes_whatever_the_name(files, tmp_path):
    """By its lock; where it was killed before it had one, or as it was removed, by its number."""
    pid = 1 if files and files[0] == "lock" else 2**22 + 1  # that of another, as in a container; no process has it
    left = tmp_path / f".a[1]*.partial-{socket.gethostname()}-{pid}-01234567"
    for name in files:
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).touch()
    left.mkdir(exist_ok=True)
    with prepared._partial_folder(tmp_path / "a[1]*") as folder:
        assert [*tmp_path.iterdir()] == [folder]
    assert not [*tmp_path.iterdir()]


def test_without_locks_a_living_process_is_known_by_its_number(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with prepared._partial_folder(tmp_path / "a") as folder, prepared._partial_folder(tmp_path / "a") as other:
        assert folder.is_dir() and other.is_dir()
    elsewhere = tmp_path / ".a.partial-another-host-1-01234567"
    elsewhere.mkdir()
    with prepared._partial_folder(tmp_path / "a"):
        assert elsewhere.is_dir()


def test_where_the_place_cannot_be_taken_what_was_prepared_stays(tmp_path, sources, monkeypatch):
    """As where it is a mount point, which can be empty and yet not be replaced."""
    (tmp_path / "out").mkdir()

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="busy"):
        patch.setattr(prepared.os, "rename", busy)
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    assert len(list(tmp_path.glob(".out.partial-cases/*.npz"))) == len(sources)


def test_the_folder_of_a_living_process_stays_wherever_that_runs(tmp_path):
    """Its number and its host say nothing: in containers both are those of others."""
    with prepared._partial_folder(tmp_path / "a") as folder:
        script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from sscl_jax.data import prepared
with prepared._partial_folder(Path({str(tmp_path / "a")!r})) as other:
    assert len(list(other.parent.iterdir())) == 2
"""
        assert subprocess.run([sys.executable, "-c", script]).returncode == 0
        assert [*tmp_path.iterdir()] == [folder]


def test_a_cache_of_other_records_is_made_again(tmp_path, sources):
    """As where a folder was copied over another, all but the cache."""
    for name, recipe in (("one", RECIPE), ("other", replace(RECIPE, percentiles=(5.0, 90.0)))):
        write_prepared(tmp_path / name, sources, recipe, PATIENTS, "toy")
    expected = files_of(tmp_path / "other" / "cache")
    metadata = json.loads((tmp_path / "other" / "metadata.json").read_text())
    metadata["inputs"] = json.loads((tmp_path / "one" / "metadata.json").read_text())["inputs"]  # by other code
    (tmp_path / "other" / "metadata.json").write_text(json.dumps(metadata))
    shutil.rmtree(tmp_path / "other" / "cache")
    shutil.copytree(tmp_path / "one" / "cache", tmp_path / "other" / "cache")
    open_prepared(tmp_path / "other")
    found = files_of(tmp_path / "other" / "cache")
    assert {n: found[n] for n in prepared.CACHE_FILES} == {n: expected[n] for n in prepared.CACHE_FILES}


def test_hidden_files_beside_slices_change_nothing(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "a.dcm").write_bytes(b"slice")
    before = prepared._path_digest(tmp_path / "ct")
    (tmp_path / "ct" / ".DS_Store").write_bytes(b"Finder")
    assert prepared._path_digest(tmp_path / "ct") == before
    (tmp_path / "ct" / "b.dcm").write_bytes(b"slice")
    assert prepared._path_digest(tmp_path / "ct") != before


def test_a_shard_ends_after_its_number_of_cases(tmp_path, sources, dataset, monkeypatch):
    monkeypatch.setattr(builder, "CASES_PER_SHARD", 3)
    write_prepared(tmp_path / "shards", sources, RECIPE, PATIENTS, "toy")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.array_record*"))
    assert names == [f"cases-train.array_record-0000{n}-of-00002" for n in (0, 1)] + [
        "cases-val.array_record-00000-of-00001"
    ]
    assert files_of(tmp_path / "shards" / "cache") == files_of(dataset.path / "cache")


def test_processes_make_what_threads_make(tmp_path, sources, dataset, made):
    write_prepared(tmp_path / "processes", sources, RECIPE, PATIENTS, "toy", workers=2)
    assert made == []  # here, that is
    assert files_of(tmp_path / "processes") == files_of(dataset.path)


def _hold(path):
    """Holds a lock of the file `path`, and says so, for a minute."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        path.with_suffix(".held").touch()
        time.sleep(60)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_prepared as t
list(t.workers.map_ahead(t._hold, [t.Path({str(tmp_path / "a.lock")!r})], 1))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not (tmp_path / "a.held").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with open(tmp_path / "a.lock") as file:
        for _ in range(600):  # half of what it would be held for
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.05)
    pytest.fail("the process is still there")


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(OSError, match="was killed.*fewer --processes"):
        list(workers.map_ahead(os._exit, [9], 1))


def test_a_beam_pipeline_makes_what_threads_make(tmp_path, sources, dataset, made, monkeypatch):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
    monkeypatch.setattr(prepared, "map_ahead", lambda function, items, *_: _made_already(function, items, made))
    write_prepared(tmp_path / "beam", sources, RECIPE, PATIENTS, "toy", workers=["--runner=DirectRunner"])
    assert files_of(tmp_path / "beam") == files_of(dataset.path)
    assert not list(tmp_path.glob(".beam*"))


def _made_already(function, items, made):
    made.clear()
    for item in items:
        yield function(item)
    assert made == []  # by the pipeline


def test_what_a_beam_worker_fails_at_is_told_in_one_line(tmp_path, sources):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
    write_nifti(sources[3].label_path, np.full((13, 10, 4), 30, "u1"))
    with pytest.raises(ValueError, match=r"^\S*p2_f1_gt.nii.gz: .*30"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy", workers=["--runner=DirectRunner"])


def test_cases_that_a_pipeline_leaves_nowhere_are_made_here_and_told(tmp_path, sources, dataset, monkeypatch, capsys):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
    monkeypatch.setattr(prepared, "spread", lambda *_: None)
    write_prepared(tmp_path / "beam", sources, RECIPE, PATIENTS, "toy", workers=["--runner=DirectRunner"])
    assert "6 cases are made here" in capsys.readouterr().out
    assert files_of(tmp_path / "beam") == files_of(dataset.path)


def test_without_beam_the_error_says_what_to_install(tmp_path, sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"--beam_options needs Apache Beam.*pip install 'sscl_jax\[beam\]'"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy", workers=["--runner=DirectRunner"])


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        ({"train": ["p1", "p3"], "val": ["p2", "p3"]}, "p3 is in two splits, train and val"),
        ({"train": ["p1", "p2", "p3"], "val": []}, "case p2_f0 is in split val, but its patient"),
        ({"train": ["p1", "p3"]}, "patient p2 in none"),
        ({"training": ["p1"]}, "split 'training' is unknown"),
    ],
)
def test_patients_must_be_disjoint_and_agree(tmp_path, sources, patients, message):
    with pytest.raises(ValueError, match=message):
        write_prepared(tmp_path / "out", sources, RECIPE, patients, "toy")


def test_errors_name_the_file(tmp_path, sources):
    write_nifti(sources[3].label_path, np.full((13, 10, 4), 30, "u1"))
    with pytest.raises(ValueError, match=r"p2_f1_gt.nii.gz.*30"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    write_nifti(sources[3].label_path, np.zeros((13, 10, 5), "u1"))
    with pytest.raises(ValueError, match=r"p2_f1_gt.nii.gz has shape \(13, 10, 5\)"):
        write_prepared(tmp_path / "out", sources, RECIPE, PATIENTS, "toy")
    with pytest.raises(ValueError, match="p1_f0 is listed twice"):
        write_prepared(tmp_path / "out", [*sources, sources[0]], RECIPE, PATIENTS, "toy")
    with pytest.raises(ValueError, match="no case"):
        write_prepared(tmp_path / "out", [], RECIPE, PATIENTS, "toy")


@pytest.mark.parametrize("name", ["images.f32", "labels.u8", "index.json"])
def test_truncated_cache_is_made_again(dataset, name):
    expected = dataset.image(0).copy(), dataset.label(5).copy()
    file = dataset.path / "cache" / name
    file.write_bytes(file.read_bytes()[:-8])
    again = open_prepared(dataset.path)
    np.testing.assert_array_equal(again.image(0), expected[0])
    np.testing.assert_array_equal(again.label(5), expected[1])
    assert sorted(p.name for p in dataset.path.iterdir() if "cache" in p.name) == ["cache"]


def test_processes_that_open_at_the_same_time_all_succeed(dataset):
    for path in (dataset.path / "cache").iterdir():
        path.unlink()
    (dataset.path / "cache").rmdir()
    with ProcessPoolExecutor(3, mp_context=_spawn()) as pool:
        sums = list(pool.map(_sum_of_images, [dataset.path] * 3))
    assert sums == [_sum_of_images(dataset.path)] * 3
    assert not list(dataset.path.glob(".cache*"))


def _spawn():
    import multiprocessing

    return multiprocessing.get_context("spawn")


def _sum_of_images(path):
    opened = open_prepared(path)
    return [float(opened.image(i).sum()) for i in range(len(opened.cases))]


def test_a_folder_of_something_else_is_not_told_to_be_deleted(sources, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.nii.gz").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"mine exists and is no prepared data set: choose another --output$"):
        write_prepared(tmp_path / "mine", sources, RECIPE, PATIENTS, "toy")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["scan.nii.gz"]


def test_read_only_folder_uses_the_temporary_folder(dataset, tmp_path, monkeypatch):
    for path in (dataset.path / "cache").iterdir():
        path.unlink()
    (dataset.path / "cache").rmdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(prepared.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    original = Path.mkdir

    def mkdir(self, *args, **kwargs):  # the user who runs the tests may be root
        if dataset.path in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    opened = open_prepared(dataset.path)
    assert not (dataset.path / "cache").exists()
    assert list((tmp_path / "tmp").glob("sscl_jax-*/cache-*/images.f32"))
    np.testing.assert_array_equal(opened.image(1), dataset.image(1))
    assert open_prepared(dataset.path).fingerprint == dataset.fingerprint
    # Prepared anew in its place, from the same files: not the cache of the one before.
    metadata = dataset.path / "metadata.json"
    metadata.write_text(metadata.read_text().replace(dataset.fingerprint, "0" * 64))
    open_prepared(dataset.path)
    assert len(list((tmp_path / "tmp").glob("sscl_jax-*/cache-*/images.f32"))) == 2


def test_open_says_what_to_do(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match="python -m data_prep"):
        open_prepared(tmp_path / "absent")
    metadata = json.loads((dataset.path / "metadata.json").read_text())
    (dataset.path / "metadata.json").write_text(json.dumps({**metadata, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        open_prepared(dataset.path)


def test_damaged_records_are_told(dataset):
    for path in (dataset.path / "cache").iterdir():
        path.unlink()
    (dataset.path / "cache").rmdir()
    for path in dataset.path.glob("*.array_record*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        open_prepared(dataset.path)


def test_map_ahead_keeps_order_and_is_bounded():
    taken = 0
    started = []

    def work(number):
        started.append(number)
        return number

    for number in prepared.map_ahead(work, range(100)):
        assert number == taken
        taken += 1
        assert len(started) - taken <= 10
