"""Medical Segmentation Decathlon, any task (Antonelli et al., Nature Communications 2022) -> prepared dataset.

    python -m data_prep.msd --input Task04_Hippocampus --output data/hippocampus

The ten tasks come from http://medicaldecathlon.com, under CC BY-SA 4.0. Many other data sets are handed on in the same
layout, the raw data of nnU-Net among them. INPUT is the folder of a task:

    dataset.json                        labels, modality (or channel_names), training, test
    imagesTr/hippocampus_001.nii.gz     several channels: a fourth axis, or files _0000, _0001, ... (nnU-Net)
    labelsTr/hippocampus_001.nii.gz
    imagesTs/hippocampus_002.nii.gz     no labels

`labels` may be {"1": "Anterior"} or {"Anterior": 1}. Where dataset.json has no list `training`, the folders are listed.
The images of `test` have no labels, so they are unlabelled cases of train; where a challenge does not want that, leave
them out with --no_test_images. Hidden files, such as macOS leaves, are passed over.

A channel that is called CT makes intensities HU, and is scaled by --window; all others are z-scored.

No task says which volumes are of one patient: each counts as a patient of its own unless --patient_pattern tells the
patient from the file name. The split is that of --splits, or of a `splits.json` in INPUT, or else drawn by a hash of
the patient's id. Orientation and spacing are chosen as in data_prep.folder.
"""

import functools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from data_prep import common, folder
from data_prep.folder import Scan
from sscl_jax import cli
from sscl_jax.data import formats, nifti
from sscl_jax.data.prepared import CaseSource, PreparedDataset, write_prepared
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers


def prepare(
    input_dir: Path,
    output: Path,
    splits: Path | None = None,
    *,
    patient_pattern: str | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    modality: str | None = None,
    window: tuple[float, float] = (-160.0, 240.0),
    spacing: Sequence[float] | None = None,
    orientation: str | None = None,
    no_test_images: bool = False,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of a task, writes the prepared dataset, prints what it did.

    Args:
      input_dir: the task's folder.
      output: folder to make.
      splits: split file; None = `splits.json` in `input_dir` if there, else the draw by fractions.
      patient_pattern: regular expression, for file names; its first group is the patient.
      val_fraction: chance of a patient with masks to be drawn for val, 0..1.
      test_fraction: the same for test.
      seed: of the draw and of the order of train patients.
      modality: "mr" or "ct"; None = by dataset.json.
      window: HU, for "ct".
      spacing: mm, of rows and columns, or of slices, rows and columns; None = the median.
      orientation: axis codes of slices, rows and columns; None = by the voxels' shape.
      no_test_images: leave out the images of `test`.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the options do not fit.
    """
    input_dir = Path(input_dir)
    folder.check_options(spacing, val_fraction, test_fraction)
    if not input_dir.is_dir():
        raise FileNotFoundError(f"{input_dir} is not a folder: give --input the folder with dataset.json")
    content, problems = read_description(input_dir / "dataset.json")
    names, wrong_labels = read_labels(content, input_dir / "dataset.json")
    channels, modality, wrong_modality = read_modality(content, input_dir / "dataset.json", modality)
    fatal = wrong_labels + wrong_modality

    sources, more = list_sources(input_dir, content, channels, no_test_images, patient_pattern)
    problems += fatal + more

    if patient_pattern is None:
        print("patients: each volume counts as one of its own; if that is wrong, give --patient_pattern")
    if splits is None and (input_dir / "splits.json").is_file():
        splits = input_dir / "splits.json"
    patients, more = folder.take_splits(sources, splits, val_fraction, test_fraction, seed)
    problems += more if sources else []
    sources = common.put_into_splits(sources, patients)
    values = sorted(names) if names else None
    sources, facts, skipped = common.check_cases(sources, values, problems, skip_bad and not fatal, output, workers)
    if not names:
        names = {value: f"label {value}" for value in sorted(set().union(*(fact.values for fact in facts)) - {0})}
        names = {0: "background", **names}
    orientation, grid_spacing = folder.fit_grid(facts, orientation, spacing)
    common.warn_of_modality(sources, facts, modality)
    recipe = Recipe(
        orientation=orientation,
        spacing=grid_spacing,
        intensity=modality,
        window=window,
        label_values=tuple(sorted(names)),
        class_names=tuple(names[value] for value in sorted(names)),
    )
    dataset = write_prepared(output, sources, recipe, patients, input_dir.resolve().name, skipped, workers)
    print(common.summary(dataset))
    return dataset


# --- dataset.json ---------------------------------------------------------------------------------


def read_description(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Content of dataset.json, empty if it cannot be read; problems, one line each."""
    remedy = "restore it, it names labels and channels (--skip_bad takes labels as found, and one channel of MR)"
    if not path.is_file():
        return {}, [f"{path}: does not exist: {remedy}"]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        return {}, [f"{path}: is not JSON ({error}): {remedy}"]
    if not isinstance(content, dict):
        return {}, [f"{path}: holds {type(content).__name__} instead of an object: {remedy}"]
    return content, []


def read_labels(content: dict[str, Any], path: Path) -> tuple[dict[int, str], list[str]]:
    """Name of each label value, background included; problems, one line each.

    `labels` is {"1": "Anterior"} in the Decathlon and {"Anterior": 1} in nnU-Net from version 2 on.
    """
    if not content:
        return {}, []
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        return {}, [f'{path}: "labels" is {labels!r}: write {{"0": "background", "1": "name", ...}}']
    names: dict[int, str] = {}
    problems = []
    for key, entry in labels.items():
        if isinstance(entry, list):
            problems.append(
                f"{path}: label {key!r} is a region, values {entry}: regions overlap and are not supported, "
                "write one value for each label"
            )
            continue
        old = isinstance(entry, str) and key.isdecimal()
        value, name = (key, entry) if old else (entry, key)
        if isinstance(value, bool) or not str(value).isdecimal():
            problems.append(f"{path}: label {key!r} is {entry!r}: one of the two must be a whole number >= 0")
            continue
        if name == "ignore":
            problems.append(
                f'{path}: label {value} is "ignore": masks that leave voxels open are not supported, fill them in'
            )
        if int(value) in names:
            problems.append(
                f"{path}: labels {names[int(value)]!r} and {name!r} have the same value {value}: correct one"
            )
        if name.lower() == "background" and int(value):
            problems.append(
                f"{path}: label {value} is background: masks must hold 0 there, map the values of the masks"
            )
        if name in names.values():
            problems.append(f"{path}: two labels are called {name!r}: rename one, or give the masks one value for both")
        names[int(value)] = name
    return {0: "background", **names}, problems


def read_modality(content: dict[str, Any], path: Path, wanted: str | None) -> tuple[tuple[str, ...], str, list[str]]:
    """Names of the channels; how to scale them, "mr" or "ct"; problems, one line each.

    Args:
      content: of dataset.json.
      path: of dataset.json.
      wanted: "mr" or "ct", whatever the names say; None = by the names.
    """
    if not content:
        return ("unknown",), wanted or "mr", []
    entry = content.get("channel_names", content.get("modality"))
    names = [entry] if isinstance(entry, str) else list(entry.values()) if isinstance(entry, dict) else entry
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        remedy = 'write {"0": "CT"} or {"0": "T1", "1": "T2"}'
        return ("unknown",), wanted or "mr", [f'{path}: "modality" (or "channel_names") is {entry!r}: {remedy}']
    # "CT", "ct" and "CT_arterial" are CT, "contrast" is not.
    kinds = {"ct" if re.search(r"(?<![a-z0-9])ct(?![a-z])", name.lower()) else "mr" for name in names}
    if wanted is None and len(kinds) > 1:
        return tuple(names), "mr", [
            f"{path}: the channels are {', '.join(names)}, and one rule scales them all: give --modality mr, by which "
            "each is z-scored, or keep the CT alone"
        ]  # fmt: skip
    return tuple(names), wanted or kinds.pop(), []


# --- Files ----------------------------------------------------------------------------------------


def list_sources(
    base: Path,
    content: dict[str, Any],
    channels: Sequence[str],
    no_test_images: bool = False,
    patient_pattern: str | None = None,
) -> tuple[list[CaseSource], list[str]]:
    """Cases of a task whose files are all there; problems, one line each. Prints what it passes over.

    Args:
      base: the task's folder.
      content: of dataset.json.
      channels: their names.
      no_test_images, patient_pattern: see `prepare`.
    """
    training, problems = list_training(base, content, len(channels))
    test, more = ([], []) if no_test_images else list_test(base, content, len(channels))
    listed = {path for scan in test for path in channel_files(scan.image, len(channels))}
    if test:
        others = set(common.nifti_files(base / "imagesTs")) - listed
        tell_ignored("other images of imagesTs that dataset.json does not list", others)
    problems += more + check_unlisted(base, training + test, len(channels))
    tell_oddities(base, training, content)
    scans, more = whole_cases([*(scan for scan in training if scan.label), *test], len(channels))
    problems += more
    scans, more = folder.name_patients(scans, patient_pattern)
    sources = []
    for scan in scans:
        files = channel_files(scan.image, len(channels))
        read = functools.partial(read_image, count=len(channels) // len(files), names=channels)
        sources.append(CaseSource(scan.case_id, scan.patient, "all", files, scan.label, read))
    return sources, problems + more


def list_training(base: Path, content: dict[str, Any], channels: int) -> tuple[list[Scan], list[str]]:
    """Training cases as dataset.json lists them, or else as the folders hold them; problems, one line each.

    One that lacks its mask is among both.
    """
    if "training" in content:
        scans, problems = _listed_training(base, content["training"])
    else:
        masks, problems = common.by_stem(common.nifti_files(base / "labelsTr"))
        images = _first_channels(common.nifti_files(base / "imagesTr"), masks, channels)
        scans = [Scan(name, path, masks.get(name)) for name, path in images]
        if not scans:
            problems.append(f"{base / 'imagesTr'}: holds no .nii or .nii.gz file: put the images there")
    remedy = f"add it to {base / 'labelsTr'}, or move the image to {base / 'imagesTs'} if it has none"
    return scans, problems + [f"{scan.image}: has no mask: {remedy}" for scan in scans if scan.label is None]


def _listed_training(base: Path, entries: Any) -> tuple[list[Scan], list[str]]:
    """Image and mask of each entry of the list `training`; problems, one line each."""
    where = f'{base / "dataset.json"}: "training"'
    if not isinstance(entries, list) or not entries:
        return [], [f'{where} is {entries!r}: write [{{"image": path, "label": path}}, ...] or leave it away']
    scans, problems = [], []
    for number, entry in enumerate(entries):
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not image or not isinstance(image, str) or not isinstance(label, str | None):
            problems.append(f'{where}, entry {number} is {entry!r}: write {{"image": path, "label": path}}')
        else:
            scans.append(_listed(base / image.replace("\\", "/"), base / label.replace("\\", "/") if label else None))
    return scans, problems


def list_test(base: Path, content: dict[str, Any], channels: int) -> tuple[list[Scan], list[str]]:
    """Images of `test`, or of the folder imagesTs if nothing is listed; problems, one line each."""
    if not content.get("test"):
        images = _first_channels(common.nifti_files(base / "imagesTs"), (), channels)
        return [Scan(name, path, None) for name, path in images], []
    entries = content["test"]
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return [], [f'{base / "dataset.json"}: "test" is not a list of paths: correct it, or give --no_test_images']
    scans = [_listed(base / entry.replace("\\", "/"), None) for entry in entries]
    if scans and not any(scan.image.is_file() for scan in scans):
        print(f"ignored: the {len(scans)} test images that dataset.json lists, for none of them is there")
        return [], []
    return scans, []


def _listed(image: Path, label: Path | None) -> Scan:
    """A case as listed. Lists of nnU-Net name a case's images without the channel that their files have."""
    name = formats.stem(image)
    first = _renamed(image, f"{name}_0000")
    if not image.is_file() and first.is_file():
        image = first
    elif label is None or formats.stem(label) != name:
        name = name.removesuffix("_0000")
    return Scan(name, image, label)


def _first_channels(images: Sequence[Path], masks: Collection[str], channels: int) -> list[tuple[str, Path]]:
    """Case name and first (or only) file of each image of a folder.

    A name that ends in _0001 is a further of the `channels` if there is its _0000, unless a mask has all of that name.
    """
    names = {formats.stem(path) for path in images}
    cases = []
    for path in images:
        name = formats.stem(path)
        channel = re.fullmatch(r"(.*)_(\d{4})", name)
        if channel is None or name in masks or f"{channel[1]}_0000" not in names or 0 < int(channel[2]) >= channels:
            cases.append((name, path))
        elif channel[2] == "0000":
            cases.append((channel[1], path))
    return cases


def channel_files(image: Path, channels: int) -> tuple[Path, ...]:
    """All files of an image: the one, or case_0000, case_0001, ... where it is the first of several."""
    name = formats.stem(image)
    if channels == 1 or not name.endswith("_0000"):
        return (image,)
    case = name.removesuffix("_0000")
    return tuple(_renamed(image, f"{case}_{number:04d}") for number in range(channels))


def _renamed(path: Path, name: str) -> Path:
    """The file of another name in the same folder, with the same ending."""
    return path.with_name(name + path.name.removeprefix(formats.stem(path)))


def read_image(path: Path, count: int, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image file that holds `count` of the channels `names`: (X, Y, Z, count), and the affine.

    Raises:
      ValueError: it has another number of channels; or see `nifti.read_image`.
    """
    array, affine, _ = nifti.read_image(path, channels=True)
    if array.shape[3] != count:
        raise ValueError(
            f"{path}: has {array.shape[3]} channels (shape {array.shape}), expected {count} of {', '.join(names)}: "
            "correct the file, or the channels in dataset.json"
        )
    return array, affine


def whole_cases(scans: Sequence[Scan], channels: int) -> tuple[list[Scan], list[str]]:
    """Cases whose files are all there; a problem for each file that is not, and each name that comes twice."""
    whole, problems = [], []
    seen: dict[str, Path] = {}
    for scan in scans:
        files = [*channel_files(scan.image, channels), *([scan.label] if scan.label else [])]
        missing = [path for path in files if not path.is_file()]
        problems += [f"{path}: does not exist: restore it, or take it out of dataset.json" for path in missing]
        if scan.case_id in seen:
            problems.append(f"{scan.image}: has the case name of {seen[scan.case_id]}: rename one, or list it once")
        elif not missing:
            whole.append(scan)
        seen.setdefault(scan.case_id, scan.image)
    return whole, problems


def check_unlisted(base: Path, scans: Sequence[Scan], channels: int) -> list[str]:
    """Problems of files in imagesTr and labelsTr that belong to no case: an image or a mask without the other.

    Prints how many others there are.
    """
    used = {path for scan in scans for path in (*channel_files(scan.image, channels), scan.label)}
    images, masks = common.nifti_files(base / "imagesTr"), common.nifti_files(base / "labelsTr")
    image_names = {name for path in images for name in (formats.stem(path), _without_channel(path))}
    mask_names = {formats.stem(path) for path in masks}
    alone = [p for p in images if p not in used and not mask_names & {formats.stem(p), _without_channel(p)}]
    problems = [f"{path}: has no mask, and is not in dataset.json: add the mask or remove it" for path in alone]
    orphans = [path for path in masks if path not in used and formats.stem(path) not in image_names]
    shapes = {_shape(path) for path in images} if orphans else set()
    for path in orphans:
        remark = "" if _shape(path) in shapes else f" (and no image has its shape, {_shape(path)})"
        problems.append(f"{path}: has no image of that name in {base / 'imagesTr'}{remark}: add it or remove the mask")
    tell_ignored("other files that dataset.json does not list", set(images + masks) - used - {*alone, *orphans})
    return problems


def _without_channel(path: Path) -> str:
    return re.sub(r"_\d{4}$", "", formats.stem(path))


def _shape(path: Path) -> tuple[int, ...] | None:
    try:
        return nibabel.load(path).shape[:3]  # type: ignore[attr-defined]
    except Exception:  # what is wrong with a file of a case, its check tells
        return None


def tell_oddities(base: Path, scans: Sequence[Scan], content: dict[str, Any]) -> None:
    """Prints what is unusual and does no harm: hidden files, another number of cases than dataset.json says."""
    folders = [base / name for name in ("imagesTr", "labelsTr", "imagesTs") if (base / name).is_dir()]
    tell_ignored("hidden files", {path for each in folders for path in each.iterdir() if path.name[0] == "."})
    count, number = sum(scan.label is not None for scan in scans), content.get("numTraining")
    if isinstance(number, int) and number != count:
        print(f"note: dataset.json says numTraining {number}, and there are {count} training cases")


def tell_ignored(what: str, paths: set[Path]) -> None:
    """Prints how many files are passed over, and the first of them."""
    if paths:
        print(f"ignored: {len(paths)} {what}, such as {min(paths)}")


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("msd", __doc__)
    add = parser.add_argument
    add("--patient_pattern", metavar="REGEX", help="its first group is the patient in a file name")
    add("--val_fraction", type=float, default=0.2, help="of the patients with masks (default 0.2)")
    add("--test_fraction", type=float, default=0.2, help="of the patients with masks (default 0.2)")
    add("--seed", type=int, default=0, help="of the draw of patients (default 0)")
    add("--modality", choices=("mr", "ct"), help="how intensities are scaled (default: by dataset.json)")
    common.add_window(parser, (-160.0, 240.0), ", for ct")
    add("--spacing", type=float, nargs="+", metavar="MM",
        help="of rows and columns, or of slices, rows and columns (default: the median)")  # fmt: skip
    add("--orientation", metavar="SPL", help="axis codes of slices, rows, columns")
    add("--no_test_images", action="store_true", help="leave out the images of `test`, which have no labels")
    args = vars(cli.parse(parser, argv))
    prepare(args.pop("input_dir"), args.pop("output"), **args)


if __name__ == "__main__":
    common.run(main)
