"""What the preparers share: splits, the check of all files, the summary, errors on one line."""

import argparse
import functools
import json
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from sscl_jax import cli
from sscl_jax.data import formats, kept, nifti
from sscl_jax.data.prepared import (
    SPLITS,
    CaseSource,
    PreparedDataset,
    file_digests,
    package_version,
    write_prepared,
)
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers, map_ahead, spread

LONGEST_NAME = 200  # bytes of a case's name, which others are made of; file systems take 255
MANY_LABELS = 50  # different values in one mask, beyond which it may be an image
SHEARED = ".*the affine is sheared"  # of `nifti.read_image`; the check tells it in its own list
ANISOTROPY = 1.5  # voxels that are longer by this factor along one axis than along both others make thick slices
VOXEL_SIZES = (0.01, 50.0)  # mm, beyond which a header is doubtful
LOWEST_MR = -500.0  # below which an image is taken for CT: some MR is z-scored, and so a little below 0
# What the splits are called elsewhere, so that none is passed over.
OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
ANATOMY = ("left-right", "front-back", "foot-head")


class Problems(ValueError):
    """Everything found wrong with the files: one line each, with file, finding and remedy."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@dataclass(frozen=True)
class CaseFacts:
    """What the check of one case learns.

    Attributes:
      problems: findings for which the case cannot be used, one line each.
      warnings: findings to look at, one line each.
      channels: of its image, 0 if that cannot be read.
      values: label values of its mask, empty when it has none.
      spacing: mm along left-right, front-back, foot-head; None if the image cannot be read.
      digest: of the image's voxels, "" if it cannot be read.
      lowest: value of the image, None if it cannot be read.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    channels: int = 0
    values: frozenset[int] = frozenset()
    spacing: tuple[float, float, float] | None = None
    digest: str = ""
    lowest: float | None = None


def run(main: Callable[[list[str] | None], None]) -> None:
    """Runs a preparer; what a user can put right is told on one line a finding, status 1."""
    warnings.filterwarnings("ignore", SHEARED)
    try:
        main(None)
    except Problems as problems:
        for line in problems.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of a folder, sorted; hidden ones, such as macOS leaves, are passed over."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if p.name.lower().endswith(formats.NIFTI) and p.name[0] != "."]


def scan_files(folder: Path) -> list[Path]:
    """Scans of a folder, sorted: files of any format that `formats` reads, and folders that hold DICOM files."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        p
        for p in paths
        if p.name[0] != "." and (p.name.lower().endswith(formats.SUFFIXES) or (p.is_dir() and formats.holds_dicom(p)))
    ]


def by_stem(paths: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Files by their name without ending; a problem for each that has the name of another, as a.nii and a.nii.gz."""
    found: dict[str, Path] = {}
    twice = [path for path in paths if found.setdefault(formats.stem(path), path) != path]
    return found, [f"{path}: has the name of {found[formats.stem(path)]}: remove one of them" for path in twice]


def read_splits(path: Path) -> dict[str, list[str]]:
    """Reads a split file: JSON with lists of patient ids under "train", "val" and "test".

    Other keys are left alone. The order of "train" is the order in which labelled patients are
    taken.

    Raises:
      FileNotFoundError, ValueError: no such file, no such lists, one under another name, or a patient in two of them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give --splits a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): correct it") from error
    for key in content if isinstance(content, dict) else ():
        meant = OTHER_NAMES.get(key.lower(), key.lower())
        if meant in SPLITS and key != meant:
            raise ValueError(f'{path}: "{key}" is no name of a split: write "{meant}"')
    splits = {}
    for split in SPLITS:
        ids = content.get(split, []) if isinstance(content, dict) else None
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise ValueError(
                f'{path}: "{split}" is not a list of patient ids: '
                'write {"train": ["p1", ...], "val": [...], "test": [...]}'
            )
        splits[split] = [formats.composed(patient) for patient in ids]
    if not splits["train"]:
        raise ValueError(f'{path} has no patient under "train": list at least one')
    seen: dict[str, str] = {}
    problems = []
    for split, ids in splits.items():
        for patient in ids:
            if patient in seen:
                problems.append(
                    f"{path}: patient {patient} is listed under {seen[patient]} and {split}: list every patient once"
                )
            seen.setdefault(patient, split)
    if problems:
        raise Problems(problems)
    return splits


def tell_missing(patients: dict[str, list[str]], present: Collection[str], splits: Path) -> None:
    """Prints which patients of a split file are absent, and which present ones it leaves out; see `require_train`."""
    require_train(patients, present, splits)
    for split, ids in patients.items():
        missing = [patient for patient in ids if patient not in present]
        if missing:
            print(f"missing: {len(missing)} of {len(ids)} {split} patients ({few(missing)})")
    unlisted = sorted(set(present).difference(*patients.values()))
    if unlisted:
        print(f"ignored: {len(unlisted)} patients that are in no split ({few(unlisted)})")


def require_train(patients: dict[str, list[str]], present: Collection[str], splits: Path) -> None:
    """Raises ValueError if no train patient of a split file is present."""
    if not set(present).intersection(patients["train"]):
        train = patients["train"]
        raise ValueError(
            f"none of the {len(train)} train patients of {splits} ({few(train)}) is in the input "
            f"({few(sorted(present)) or 'nobody'}): check --input, or give --splits a file that lists your patients"
        )


def few(names: Sequence[object], most: int = 5) -> str:
    """The first `most` names, and whether there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def put_into_splits(
    sources: Sequence[CaseSource], patients: dict[str, list[str]], rest: str | None = None
) -> list[CaseSource]:
    """Cases with the split of their patient; those of patients in no split are left out, or get the split `rest`."""
    split_of = {patient: split for split in SPLITS for patient in patients[split]}
    found = ((source, split_of.get(source.patient_id, rest)) for source in sources)
    return [replace(source, split=split) for source, split in found if split]


def check_case(source: CaseSource, label_values: Sequence[int] | None) -> CaseFacts:
    """Reads the files of one case in full and compares them with each other.

    Args:
      source: the case.
      label_values: values that a mask may hold; None = any.
    """
    problems, warned = [], []
    name = source.image_paths[0]
    if len(os.fsencode(source.case_id)) > LONGEST_NAME:
        problems.append(
            f"{name}: the name of the case, {source.case_id}, is longer than {LONGEST_NAME} bytes, too long for the "
            "files that are made of it: shorten it"
        )
    shape = affine = spacing = None
    channels, digest, lowest = 0, "", None
    try:
        array, affine = source.image()
        shape, channels = array.shape[:3], array.shape[3]
        spacing = _anatomical_spacing(nifti.check_affine(name, affine))
        warned += _image_warnings(name, array, affine)
        for channel in range(channels):
            part = array[..., channel]
            if part.min() == part.max():
                which = f" of channel {channel}" if channels > 1 else ""
                problems.append(f"{name}: every voxel{which} is {part.flat[0]:g}: replace or remove the file")
        digest, lowest = digest_of(array), float(array.min())
        del array
    except (ValueError, OSError) as error:
        problems.append(_with_name(name, error))
    values: frozenset[int] = frozenset()
    if source.label_path is not None:
        try:
            label, label_affine, *_ = source.read_label(source.label_path)
            values = frozenset(np.unique(label).tolist())
            warned += _label_warnings(source.label_path, values)
            problems += _label_problems(source, label.shape, label_affine, shape, affine)
            if digest and digest_of(label[..., None].astype(np.float32)) == digest:
                problems.append(
                    f"{source.label_path}: has the voxels of its image {name}: replace the one that is wrong"
                )
            allowed = sorted(values if label_values is None else label_values)
            unknown = sorted(values.difference(allowed))
            if unknown:
                problems.append(
                    f"{source.label_path}: label values {few(unknown, 8)} are not among "
                    f"{few(allowed, 8)}: correct the mask or the list of label values"
                )
        except (ValueError, OSError) as error:
            problems.append(_with_name(source.label_path, error))
    return CaseFacts(problems, warned, channels, values, spacing, digest, lowest)


def digest_of(array: np.ndarray) -> str:
    """The same for images (X, Y, Z, C), float32, that hold the same values, however their axes are turned and mirrored.

    Sums over voxels, which no order changes, since the header that says how an image lies may be wrong, or lost.
    """
    sums = np.zeros(3, np.uint64)
    for plane in np.moveaxis(array, 2, 0):
        bits = (plane + 0).view(np.uint32).astype(np.uint64)  # + 0: -0 is 0
        sums += np.array([bits.sum(), (bits * bits).sum(), (bits * bits * bits).sum()])  # modulo 2 ** 64
    return f"{sorted(array.shape[:3])} x {array.shape[3]}: {sums.tolist()}"


def _image_warnings(path: Path, array: np.ndarray, affine: np.ndarray) -> list[str]:
    """Odd geometry, and slices without content, of an image (X, Y, Z, C) that is not empty as a whole."""
    doubtful = nifti.header_warning(path) if path.name.lower().endswith(formats.NIFTI) else ""
    found = [line for line in (nifti.shear_warning(path, affine), doubtful) if line]
    sizes = voxel_sizes(affine)
    if sizes.min() < VOXEL_SIZES[0] or sizes.max() > VOXEL_SIZES[1]:
        text = " x ".join(f"{size:.4g}" for size in sizes)
        found.append(f"{path}: its voxels are {text} mm large: correct the header, its voxel sizes or their unit")
    across = int(np.argmax(sizes))
    others = tuple(axis for axis in range(4) if axis != across)
    filled = np.flatnonzero(array.min(others) < array.max(others))
    if filled.size:
        # Where slices are not thick, those at the ends are often padding, which is no finding.
        thick = sizes[across] > ANISOTROPY * np.sort(sizes)[1]
        first, last = (0, array.shape[across] - 1) if thick else (filled[0], filled[-1])
        empty = sorted(set(range(first, last + 1)).difference(filled.tolist()))
        if empty:
            found.append(
                f"{path}: {len(empty)} of {array.shape[across]} slices hold one value only ({few(empty, 8)} along axis "
                f"{across}): copy the file again, or cut them off if they pad it"
            )
    return found


def _label_warnings(path: Path, values: Collection[int]) -> list[str]:
    """What is odd of a mask with these values, and yet may be meant."""
    found = []
    if not any(values):
        found.append(f"{path}: the mask is empty: if the scan holds a structure, draw it, or remove the mask")
    if len(values) > MANY_LABELS:
        found.append(f"{path}: {len(values)} different label values: make sure that it is no image")
    if path.name.lower().endswith(formats.NIFTI) and (kind := nibabel.load(path).get_data_dtype()).kind == "f":  # type: ignore[attr-defined]
        found.append(f"{path}: the mask is stored as {kind}: read as whole numbers; an integer type says what it is")
    return found


def _label_problems(
    source: CaseSource,
    label_shape: tuple[int, ...],
    label_affine: np.ndarray,
    shape: tuple[int, ...] | None,
    affine: np.ndarray | None,
) -> list[str]:
    """How the grid of a mask differs from that of its image, if that could be read."""
    if shape is None or affine is None:
        return []
    if label_shape != shape:
        return [
            f"{source.label_path}: shape {label_shape}, but its image {source.image_paths[0]} has "
            f"{shape}: resample the mask to the image's grid"
        ]
    if apart := nifti.grids_apart(shape, label_affine, affine):
        own, other = ("".join(nibabel.aff2axcodes(each)) for each in (label_affine, affine))
        turned = "" if own == other else f" (its axes run {own}, those of the image {other})"
        return [
            f"{source.label_path}: lies up to {apart:.3g} mm away from its image "
            f"{source.image_paths[0]} by their affines{turned}: resample the mask to the image's grid, or "
            "copy the image's affine if only the header is wrong"
        ]
    return []


def _with_name(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if str(path) in text else f"{path}: {text}"


def _anatomical_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size (mm) along left-right, front-back and foot-head."""
    axes = nibabel.io_orientation(affine)[:, 0].astype(int)
    sizes = voxel_sizes(affine)
    left_right, front_back, foot_head = (float(sizes[list(axes).index(i)]) for i in range(3))
    return left_right, front_back, foot_head


def examine(
    sources: Sequence[CaseSource],
    label_values: Sequence[int] | None,
    folder: Path | None = None,
    workers: Workers = 0,
) -> list[CaseFacts]:
    """Checks all cases, in parallel; that all images have as many channels, and that none is in two splits.

    Args:
      sources: the cases.
      label_values: values that masks may hold; None = any.
      folder: where what was learnt of a case is kept, and taken from if its files are as they were; None = nowhere.
      workers: see `sscl_jax.data.workers`; those of a pipeline need a `folder`.
    """
    cases = [(source, label_values, folder) for source in sources]
    spread(_facts, cases, workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SHEARED)
        checked = map_ahead(_facts, cases, workers)
        facts = list(tqdm(checked, "checking", len(sources), unit=" cases", disable=None))
    usual = Counter(fact.channels for fact in facts if fact.channels).most_common(1)
    for number, (source, fact) in enumerate(zip(sources, facts, strict=True)):
        if fact.channels and fact.channels != (most := usual[0][0]):
            line = (
                f"{source.image_paths[0]}: {fact.channels} channel(s), where most images have {most}: "
                "complete the image or remove it"
            )
            facts[number] = replace(fact, problems=[*fact.problems, line])
    tell_doubles(sources, facts)
    return facts


def _facts(case: tuple[CaseSource, Sequence[int] | None, Path | None]) -> CaseFacts:
    source, label_values, folder = case
    try:
        digests = file_digests(source)
    except (OSError, ValueError):
        folder = None  # the check tells which file it is, and why
    if folder is None:
        return check_case(source, label_values)
    path = folder / f"{kept.digest(source, digests, label_values, check_case, package_version())}.json"
    try:
        told = json.loads(kept.read(path))
        spacing = told["spacing"] and tuple(told["spacing"])
        return CaseFacts(**{**told, "values": frozenset(told["values"]), "spacing": spacing})
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not whole
        facts = check_case(source, label_values)
    with suppress(OSError):  # what cannot be kept is learnt again
        if file_digests(source) == digests:  # it did not change while it was read
            kept.write(path, lambda file: file.write(json.dumps(asdict(facts), default=sorted).encode()))
    return facts


def tell_doubles(sources: Sequence[CaseSource], facts: Sequence[CaseFacts]) -> None:
    """Adds to the findings of each case what it shares with one before it: voxels, mask, or name but for its case.

    A scan that is in two splits is a problem of one of its two cases, so that `skip_bad` leaves out that alone: of one
    that has others, or no mask; or else of that in val rather than in train, in test rather than in val. Other scans of
    the same patient stay.
    """

    def last(case: tuple[CaseSource, CaseFacts]) -> tuple[bool, bool, bool, int]:
        source, fact = case
        known = source.split in SPLITS  # not so where nothing says which split it is of
        place = SPLITS.index(source.split) if known else 0
        return bool(fact.problems), not known, source.label_path is None, place

    voxels: dict[str, CaseSource] = {}
    masks: dict[Path, CaseSource] = {}
    patients: dict[str, CaseSource] = {}
    for source, fact in sorted(zip(sources, facts, strict=True), key=last):
        image = source.image_paths[0]
        if fact.digest and (other := voxels.setdefault(fact.digest, source)) is not source:
            line = f"{image} ({source.split}): has the voxels of {other.image_paths[0]} ({other.split}): "
            if source.split != other.split and {source.split, other.split} <= set(SPLITS):
                # What is measured on it would be worth nothing.
                fact.problems.append(
                    f"{line}leave one of them out (preparing with --skip_bad leaves out the first of these), or "
                    "put both patients into one split (--splits)"
                )
            else:
                fact.warnings.append(f"{line}one scan under two names counts twice, remove one")
        if source.label_path and (other := masks.setdefault(source.label_path, source)) is not source:
            fact.warnings.append(
                f"{source.label_path}: is the mask of {image} and of {other.image_paths[0]}: correct one"
            )
        patient, other = source.patient_id, patients.setdefault(source.patient_id.lower(), source)
        if patient != other.patient_id:
            fact.warnings.append(
                f"{image}: patients {other.patient_id} and {patient} count as two: if they are one, write them alike"
            )


def warn_of_modality(sources: Sequence[CaseSource], facts: Sequence[CaseFacts], modality: str) -> None:
    """Warns of images that are not as their modality is: CT in HU reaches -1000 in air, magnitudes of MR are >= 0."""

    def warn(which: list[Path], what: str) -> None:
        if which:
            print(f"warning: {len(which)} of {len(facts)} images {what} ({few([p.name for p in which])})")

    lowest = [(source.image_paths[0], fact.lowest) for source, fact in zip(sources, facts, strict=True)]
    if modality == "ct":
        above = [path for path, low in lowest if low is not None and low >= 0]
        warn(above, "hold nothing below 0, as CT in HU does: make sure that they are CT, and not off by 1024")
    else:
        below = [path for path, low in lowest if low is not None and low < LOWEST_MR]
        warn(below, f"reach below {LOWEST_MR:g}, as CT in HU does, and are taken as MR: give --modality=ct if wrong")


def check_cases(
    sources: Sequence[CaseSource],
    label_values: Sequence[int] | None = None,
    problems: Sequence[str] = (),
    skip_bad: bool = False,
    output: Path | None = None,
    workers: Workers = 0,
) -> tuple[list[CaseSource], list[CaseFacts], list[str]]:
    """Checks all cases, and raises all that is wrong with them at once.

    Args:
      sources: the cases.
      label_values: values that masks may hold; None = any.
      problems: findings made before, to be told in the same list.
      skip_bad: print the findings and leave out the cases that have any, instead of raising them.
      output: the dataset to be; what is learnt is kept beside it, for when this is done again. None = it is not.
      workers: see `examine`.

    Returns:
      The cases that are good, what was learnt of each, and the findings about the others.

    Raises:
      Problems: anything was found, and not `skip_bad`, or no case is good.
    """
    folder = output and kept.folder_beside(output)
    if output and folder and sources and not output.exists():  # told before the work
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--output={output} cannot be written ({error.strerror}): choose another folder") from error
    facts = examine(sources, label_values, folder, workers)
    for line in (line for fact in facts for line in fact.warnings):
        print(f"warning: {line}")
    found = [*problems, *(line for fact in facts for line in fact.problems)]
    good = [(source, fact) for source, fact in zip(sources, facts, strict=True) if not fact.problems]
    if found and not (skip_bad and good):
        raise Problems(found)
    for line in found:
        print(f"skipped: {line}", file=sys.stderr)
    if len(good) < len(sources):
        print(f"skipped: {len(sources) - len(good)} of {len(sources)} cases, for the reasons above")
    for split in SPLITS:
        if any(source.split == split for source in sources) and not any(source.split == split for source, _ in good):
            print(f"warning: that leaves no case in {split}")
    left = [source for source, _ in good]
    before, after = (any(each.split == "train" and each.label_path for each in part) for part in (sources, left))
    if before and not after:
        raise Problems(["that leaves no mask in train: put the cases above right"])
    return left, [fact for _, fact in good], found


def build(
    output: Path,
    sources: Sequence[CaseSource],
    recipe: Recipe,
    patients: dict[str, list[str]],
    name: str,
    problems: Sequence[str] = (),
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks all files, writes the prepared dataset, and prints its summary.

    Args:
      output: folder to make.
      sources: the cases, whatever their split; those of patients in no split are left out.
      recipe: preprocessing; masks may hold its label values.
      patients: ordered patients of each split.
      name: of the dataset.
      problems: findings made before.
      skip_bad: see `check_cases`.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      Problems: see `check_cases`.
      ValueError: see `write_prepared`.
    """
    sources = put_into_splits(sources, patients)
    good, facts, found = check_cases(sources, recipe.label_values, problems, skip_bad, output, workers)
    warn_of_modality(good, facts, recipe.intensity)
    dataset = write_prepared(output, good, recipe, patients, name, found, workers)
    print(summary(dataset))
    return dataset


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with what every preparer takes: --input, --output, --splits, --skip_bad and those of `add_workers`."""
    parser = cli.make_parser(f"data_prep.{module}", description)
    parser.add_argument("--input", type=Path, required=True, dest="input_dir", metavar="DIR", help="see above")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--splits", type=Path, metavar="FILE", help="JSON file with train, val and test patients")
    parser.add_argument("--skip_bad", action="store_true", help="go on without the cases that have a fault")
    add_workers(parser)
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds --processes and --beam_options, of which one can be given: the `workers` of `sscl_jax.data.workers`."""
    group = parser.add_mutually_exclusive_group()
    add = functools.partial(group.add_argument, dest="workers", default=0)
    add(
        "--processes",
        type=process_count,
        metavar="N",
        help="that read and preprocess (default: threads of one, up to 8)",
    )
    text = "in quotes, of an Apache Beam pipeline that does so, as in --beam_options='--runner=FlinkRunner ...'"
    add("--beam_options", type=shlex.split, metavar="OPTIONS", help=text)


def process_count(text: str) -> int:
    """A whole number, not negative."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def class_rows(
    held: Sequence[tuple[str, Collection[int]]], names: dict[int, str], columns: Sequence[str]
) -> list[list[str]]:
    """Rows of a table: how many cases hold each class, and how many masks are empty, if any are.

    Args:
      held: of each case with a mask, its split and the label values in its mask.
      names: of the label values.
      columns: splits, in the order of the table.
    """
    rows = [
        [f"cases with {name}", *(str(sum(value in values for s, values in held if s == split)) for split in columns)]
        for value, name in names.items()
    ]
    empty = [sum(not any(values) for s, values in held if s == split) for split in columns]
    return [*rows, ["cases with an empty mask", *map(str, empty)]] if any(empty) else rows


def absent_classes(held: Sequence[tuple[str, Collection[int]]], names: dict[int, str]) -> list[str]:
    """A warning for each class that no mask of the train split holds, background among them; see `class_rows`."""
    learnt = {value for split, values in held if split == "train" for value in values}
    open_ground = [
        "no train mask holds background (label value 0): if another value means it, write 0 there in the masks"
    ]
    return (open_ground if learnt and 0 in names and 0 not in learnt else []) + [
        f"class {name} (label value {value}) is in no train mask, so it cannot be learnt: change the splits, or leave "
        "the class out"
        for value, name in names.items()
        if value and value not in learnt
    ]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    width = max(len(row[0]) for row in rows)
    return [row[0].ljust(width) + "".join(f"{cell:>7}" for cell in row[1:]) for row in rows]


def add_window(parser: argparse.ArgumentParser, window: tuple[float, float], note: str = "") -> None:
    """Adds --window LOW HIGH with its default, HU; `note` says when it counts."""
    low, high = window
    text = f"range of HU to keep{note} (default {low:g} {high:g})"
    parser.add_argument("--window", type=float, nargs=2, default=window, metavar=("LOW", "HIGH"), help=text)


def summary(dataset: PreparedDataset) -> str:
    """Text table of a prepared dataset. Reads the labels, not the images."""
    cases = dataset.cases
    grids = [case.grid for case in cases]

    def span(values: list[float], form: str) -> str:
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low}-{high}"

    def spans(rows: list[tuple], form: str) -> str:
        return " x ".join(span(list(column), form) for column in zip(*rows, strict=True))

    rows: list[list[str]] = [["", *SPLITS]]

    def row(name: str, count: Callable[[str], int]) -> None:
        rows.append([name, *(str(count(split)) for split in SPLITS)])

    of = {split: [case for case in cases if case.split == split] for split in SPLITS}
    row("patients", lambda s: len(dataset.patients[s]))
    row("cases", lambda s: len(of[s]))
    row("  labelled", lambda s: sum(case.has_label for case in of[s]))
    row("  unlabelled", lambda s: sum(not case.has_label for case in of[s]))
    row("slices", lambda s: sum(case.grid.shape[0] for case in of[s]))
    values = dataset.recipe.label_values
    held = [
        (case.split, frozenset(values[c] for c in np.unique(dataset.native_label(case.index))))
        for case in cases
        if case.has_label
    ]
    names = dict(zip(values, dataset.recipe.class_names, strict=True))
    rows += class_rows(held, names, SPLITS)
    table = align(rows)
    table += [f"warning: {line}" for line in absent_classes(held, names)]
    return "\n".join(
        [
            f"{dataset.path}: {dataset.name}, fingerprint {dataset.fingerprint[:12]}",
            f"files:    shape {spans([g.native_shape for g in grids], 'd')}, "
            f"spacing {spans([g.native_spacing for g in grids], '.2f')} mm",
            f"prepared: shape {spans([g.shape for g in grids], 'd')}, "
            f"spacing {spans([g.spacing for g in grids], '.2f')} mm, "
            f"orientation {dataset.recipe.orientation}, {dataset.channels} channel(s)",
            *table,
        ]
    )
