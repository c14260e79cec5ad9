"""HDF5 files as SSL4MIS and the projects built on it use them (ACDC and others) -> prepared dataset.

    python -m data_prep.ssl4mis --input ACDC --spacing 10 1.5 1.5 --output data/acdc_h5

INPUT holds lists of names, and the files they name, each with `image` and `label`:

    train_slices.list (or train.list), val.list, test.list
    data/patient001_frame01.h5                   a volume, slices first (Z, Y, X)
    data/slices/patient001_frame01_slice_1.h5    a slice (Y, X)

A volume is a case; where it is absent, its slices are put together. What stands before `_frame` in a name is the
patient. The order of the train list is kept, so that --config.data.labeled_patients=N takes the first N patients of it,
as the papers do. A file without `label` becomes an unlabelled case. With --splits, the lists are not read.

These files are made from other data sets, by the code of SSL4MIS (Luo et al.); the terms are those of the source: for
ACDC (Bernard et al., IEEE TMI 2018) CC BY-NC-SA 4.0. They hold intensities scaled to 0..1, but no voxel size, and it is
not guessed: give --spacing. It counts for all files. ACDC's scans differ, by a factor of two and more, so distances
in mm are only as true as it is; where you have the original scans, use data_prep.acdc. Nor do the files hold
directions: axes are taken to point up, to the back and to the left (SPL), as in ACDC's scans; --axes says otherwise.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import common
from data_prep.acdc import CLASSES
from sscl_jax import cli
from sscl_jax.data import formats, nifti
from sscl_jax.data.prepared import SPLITS, CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

LISTS = {"train": ("train_slices.list", "train.list"), "val": ("val.list",), "test": ("test.list",)}


@dataclass(frozen=True)
class Files:
    """The files of one case: a volume, or slices by their number."""

    volume: Path | None
    slices: dict[int, Path]


@dataclass(frozen=True)
class SliceStack(CaseSource):
    """A case whose `image_paths` are its slices, in their order, and not channels."""

    affine: np.ndarray | None = None

    def image(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads all slices: float32 (Z, Y, X, 1), and the affine.

        Raises:
          ValueError: a slice is missing between others, cannot be read, or has another shape.
        """
        assert self.affine is not None
        numbers = [split_name(path.stem)[1] or 0 for path in self.image_paths]
        if gaps := sorted(set(range(numbers[0], numbers[-1])).difference(numbers)):
            raise ValueError(
                f"{self.image_paths[0]}: slices {', '.join(map(str, gaps))} of {self.case_id} do not exist: restore "
                "them, or give the volume"
            )
        array = stack(self.image_paths, "image").astype(np.float32)
        return nifti.check_image(self.image_paths[0], array), self.affine


def prepare(
    input_dir: Path,
    output: Path,
    spacing: Sequence[float],
    splits: Path | None = None,
    axes: str = "SPL",
    class_names: Sequence[str] = CLASSES,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of such a folder, writes the prepared dataset, prints what it did.

    Args:
      input_dir: holds the lists and `data/`.
      output: folder to make.
      spacing: of the files' slices, rows and columns, mm.
      splits: split file; None = the lists.
      axes: where slices, rows and columns of the files run to.
      class_names: of the label values 0, 1, ...
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files, the options or the splits do not fit.
    """
    input_dir = Path(input_dir)
    formats.axes_affine(spacing, axes)  # an option that cannot be is told once, not for each file
    sources, problems = list_sources(input_dir, spacing, axes)
    if splits is None:
        sources, patients, more = take_lists(sources, input_dir)
        problems += more
    else:
        patients = common.read_splits(splits)
    common.tell_missing(patients, {source.patient_id for source in sources}, splits or input_dir)
    sources = [source for source in sources if source.split != "none"]
    recipe = Recipe(
        orientation="SPL",
        spacing=(None, None, None),
        intensity="mr",
        label_values=tuple(range(len(class_names))),
        class_names=tuple(class_names),
    )
    return common.build(output, sources, recipe, patients, input_dir.resolve().name, problems, skip_bad, workers)


def list_sources(input_dir: Path, spacing: Sequence[float], axes: str = "SPL") -> tuple[list[CaseSource], list[str]]:
    """Cases of all files, whatever the lists say; problems, one line each."""
    files, problems = find_files(input_dir / "data")
    return [case_of(name, files[name], spacing, axes) for name in files], problems


def take_lists(
    sources: Sequence[CaseSource], input_dir: Path
) -> tuple[list[CaseSource], dict[str, list[str]], list[str]]:
    """Cases with the split whose list names them, "none" where no list does; patients of each split; problems."""
    names, problems = read_lists(input_dir)
    patients = {split: list(dict.fromkeys(map(patient_of, names[split]))) for split in SPLITS}
    problems += listed_twice(patients)
    split_of = {name: split for split in SPLITS for name in names[split]}
    absent = split_of.keys() - {source.case_id for source in sources}
    problems += [
        f"{input_dir / 'data' / name}.h5: is listed under {split}, but does not exist: restore it or correct the list"
        for name, split in split_of.items()
        if name in absent
    ]
    return [replace(s, split=split_of.get(s.case_id, "none")) for s in sources], patients, problems


def find_files(folder: Path) -> tuple[dict[str, Files], list[str]]:
    """Files of each case, by name: `folder`/NAME.h5, `folder`/slices/NAME_slice_N.h5; problems, one line each."""
    problems = []
    found = {path.stem: Files(path, {}) for path in sorted(folder.glob("[!.]*.h5"))}
    for path in sorted((folder / "slices").glob("[!.]*.h5")):
        name, number = split_name(path.stem)
        if number is not None:
            first = found.setdefault(name, Files(None, {})).slices.setdefault(number, path)
            if first != path:
                problems.append(f"{path}: is the same slice as {first}: remove one of them")
    if not found:
        raise FileNotFoundError(f"{folder} has no .h5 file: give --input the folder with the lists and data/")
    return found, problems


def read_lists(input_dir: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the cases of each split, from the lists; problems, one line each."""
    names: dict[str, list[str]] = {}
    problems = []
    for split, files in LISTS.items():
        file = next((input_dir / f for f in files if (input_dir / f).is_file()), None)
        if file is None and split == "train":
            raise FileNotFoundError(f"{input_dir} has no {' and no '.join(files)}: add one, or give --splits")
        if file is None:
            print(f"{split}: no {files[0]}, so no {split} patients")
        listed = file.read_text(encoding="utf-8-sig").split() if file else []
        files_listed = [line.replace("\\", "/").split("/")[-1].removesuffix(".h5") for line in listed]
        names[split] = list(dict.fromkeys(split_name(name)[0] for name in files_listed))
        if file and not listed:
            problems.append(f"{file}: is empty: list at least one name or remove it")
    return names, problems


def split_name(name: str) -> tuple[str, int | None]:
    """Case and number of a slice: "p1_frame01_slice_3" -> ("p1_frame01", 3); of a volume, the name and None."""
    match = re.fullmatch(r"(.+)_slice_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def patient_of(name: str) -> str:
    """What stands before `_frame`, or all of the name."""
    return re.sub(r"_frame\d+$", "", name)


def listed_twice(patients: dict[str, list[str]]) -> list[str]:
    """Patients that are in two lists, one line each."""
    seen: dict[str, str] = {}
    return [
        f"patient {patient}: is listed under {seen[patient]} and {split}: list every patient once"
        for split, ids in patients.items()
        for patient in ids
        if seen.setdefault(patient, split) != split
    ]


def case_of(name: str, files: Files, spacing: Sequence[float], axes: str) -> CaseSource:
    """One case, of its volume or else of its slices."""
    if files.volume:
        label = files.volume if formats.h5_has(files.volume, "label") else None
        read_image = partial(formats.read_h5_image, spacing=spacing, axes=axes)
        read_label = partial(formats.read_h5_label, spacing=spacing, axes=axes)
        return CaseSource(name, patient_of(name), "all", (files.volume,), label, read_image, read_label)
    paths = tuple(files.slices[number] for number in sorted(files.slices))
    label = next((path for path in paths if formats.h5_has(path, "label")), None)
    affine = formats.axes_affine(spacing, axes)
    read = partial(read_labels, paths=paths, affine=affine)
    return SliceStack(name, patient_of(name), "all", paths, label, read_label=read, affine=affine)


def read_labels(path: Path, paths: Sequence[Path], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the masks of the slices `paths`, an error is that of `path`: (Z, Y, X), and `affine`."""
    return nifti.check_label(path, stack(paths, "label")), affine


def stack(paths: Sequence[Path], key: str) -> np.ndarray:
    """Puts the arrays (Y, X) of several files together: (Z, Y, X)."""
    planes = [formats.read_h5_array(path, key, ndim=2) for path in paths]
    for path, plane in zip(paths, planes, strict=True):
        if plane.shape != planes[0].shape:
            raise ValueError(f"{path}: {key} has shape {plane.shape}, that of {paths[0].name} is {planes[0].shape}")
    return np.stack(planes)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("ssl4mis", __doc__)
    add = parser.add_argument
    add(
        "--spacing",
        type=float,
        nargs=3,
        required=True,
        metavar=("Z", "Y", "X"),
        help="of the files' slices, rows and columns, in mm",
    )
    add("--axes", default="SPL", help="where slices, rows and columns of the files run to (default SPL)")
    add(
        "--class_names",
        type=lambda text: [part.strip() for part in text.split(",")],
        default=CLASSES,
        metavar="A,B,C",
        help="of the label values 0, 1, ... (default: those of ACDC)",
    )
    args = cli.parse(parser, argv)
    prepare(**vars(args))


if __name__ == "__main__":
    common.run(main)
