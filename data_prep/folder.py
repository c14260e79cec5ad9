"""A folder of scans, or a list of them -> prepared dataset.

    python -m data_prep.folder --input DIR --output data/mine --patient_pattern '^(p[0-9]+)_'
    python -m data_prep.folder --csv FILE --output data/mine

DIR holds `images/` and `labels/` (or `imagesTr/` and `labelsTr/`). An image is a NIfTI, NRRD or MetaImage file, or a
folder with the slices of one DICOM series; so is a mask, which has the name of its image, or that with _gt, _label,
_seg, _mask or .seg behind it. Several channels of an image
are files of their own, named as in nnU-Net: a_0000, a_0001, ... with the mask a; or, with --channels, they are the
fourth axis of one file. An image without a mask is an unlabelled case. FILE has the columns image and, as far as you
like, label, patient and split; its paths are relative to its own folder, and an empty label makes an unlabelled case.

The split is by patient. Say with --patient_pattern how a file name tells the patient. Without it,
images whose names are the same up to the first number, as p08_0 and p08_1, are kept together as one
patient, which is told; and where no two are, every image is a patient of its own. Without --splits
or a split column, patients with masks are drawn for val and test by a seeded hash of their id, so
that a patient stays where it is when others come or go; patients without masks are for training.
A file for --splits lists those too: whom it does not list is left out, which is told.

Slices are cut across the direction in which voxels are longest, if they are 1.5 times longer there
than in both others: axial (orientation SPL, also for voxels that are nearly cubes), coronal (AIL)
or sagittal (LIP). They keep their distance; rows and columns are resampled to the median of their
spacing, and where voxels are nearly cubes, so are the slices.
"""

import csv
import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from data_prep import common
from sscl_jax import cli
from sscl_jax.data import formats
from sscl_jax.data.prepared import SPLITS, CaseSource, PreparedDataset, write_prepared
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

CSV_COLUMNS = ("image", "label", "patient", "split")
UNREAD = (".img", ".hdr", ".mgz", ".mgh", ".npy", ".npz", *formats.H5, *formats.DICOM)
PATIENT_NAME = r"^(.*?\d+)(?![0-9A-Za-z])"
# Slice axis, then rows and columns as a reader sees them: head or face up, right side on the left.
ORIENTATIONS = {"foot-head": "SPL", "front-back": "AIL", "left-right": "LIP"}


@dataclass(frozen=True)
class Scan:
    """One image as listed.

    Attributes:
      case_id: its name.
      image: its file, or that of the first channel.
      label: file of the mask, None for an unlabelled case.
      patient, split: empty where the list says nothing.
      channels: files of the further channels.
    """

    case_id: str
    image: Path
    label: Path | None
    patient: str = ""
    split: str = ""
    channels: tuple[Path, ...] = ()


def prepare(
    output: Path,
    input_dir: Path | None = None,
    csv_file: Path | None = None,
    *,
    patient_pattern: str | None = None,
    splits: Path | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    label_values: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    modality: str = "mr",
    window: tuple[float, float] = (-160.0, 240.0),
    spacing: Sequence[float] | None = None,
    orientation: str | None = None,
    name: str | None = None,
    channels: bool = False,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks all files, writes the prepared dataset, prints what it did.

    Args:
      output: folder to make.
      input_dir: folder with images/ and labels/; this or `csv_file`.
      csv_file: list of files.
      patient_pattern: regular expression, for file names; its first group is the patient.
      splits: split file, of all patients to use; None = the split column, else the draw by fractions.
      val_fraction: chance of a patient with masks to be drawn for val, 0..1.
      test_fraction: the same for test.
      seed: of the draw and of the order of train patients.
      label_values: values in the masks, background first; None = 0 and all values found.
      class_names: one for each label value.
      modality: "mr" or "ct".
      window: HU, for "ct".
      spacing: mm, of rows and columns, or of slices, rows and columns; None = the median.
      orientation: axis codes of slices, rows and columns; None = by the voxels' shape.
      name: of the dataset; None = that of the input.
      channels: the fourth axis of an image holds its channels.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the options do not fit.
    """
    listing = input_dir or csv_file
    if listing is None or (input_dir and csv_file):
        raise ValueError("give either --input DIR or --csv FILE")
    check_options(spacing, val_fraction, test_fraction)
    scans, problems = (list_folder if input_dir else list_csv)(Path(listing))
    if not scans and not problems:
        raise ValueError(f"{listing}: lists no image: give one with at least one scan")
    if splits is not None and any(scan.split for scan in scans):
        raise ValueError(f"{listing} has a split column: give that or --splits, not both")
    if input_dir and (others := other_files(input_dir)):
        print(f"ignored: {len(others)} other files, such as {others[0].name}")
    listed = {} if splits is None else common.read_splits(splits)
    told: list[str] = []
    if patient_pattern is None:
        ids = {patient for each in listed.values() for patient in each}
        joined, told = join_patients(scans)
        named, apart = (len(ids & {scan.patient or scan.case_id for scan in each}) for each in (joined, scans))
        if splits is None or named > apart:  # a split file may list patients, or images
            scans = joined
            for line in told:
                print(f"warning: {line}")
    scans, more = name_patients(scans, patient_pattern)
    problems += more
    sources = to_sources(scans, channels)
    wrong: list[str] = []  # with the splits, whatever cases are left out
    if splits is not None:
        patients = listed
        common.tell_missing(patients, {source.patient_id for source in sources}, splits)
    elif any(scan.split for scan in scans):
        patients, wrong = listed_splits(sources)
    else:
        patients, wrong = draw_splits(sources, val_fraction, test_fraction, seed)
        if told:  # the names alone say who is whose
            number = len({source.patient_id for source in sources})
            wrong = [f"{line}; but if these are not {number} patients, see --patient_pattern first" for line in wrong]
    sources = common.put_into_splits(sources, patients)
    sources, facts, skipped = common.check_cases(
        sources, label_values, problems + wrong, skip_bad and not wrong, output, workers
    )
    if label_values is None:
        label_values = sorted({0}.union(*(fact.values for fact in facts)))
        if len(label_values) < 2:
            raise ValueError(
                f"{listing}: no mask holds a value other than 0, and "
                f"{sum(source.label_path is None for source in sources)} of {len(sources)} images have no mask: add "
                "masks, in labels/ by the name of their image, or give --label_values"
            )
    orientation, grid_spacing = fit_grid(facts, orientation and orientation.upper(), spacing)
    common.warn_of_modality(sources, facts, modality)
    recipe = Recipe(
        orientation=orientation,
        spacing=grid_spacing,
        intensity=modality,
        window=window,
        label_values=tuple(label_values),
        class_names=tuple(class_names or ["background", *(f"label {value}" for value in list(label_values)[1:])]),
    )
    name = name or Path(listing).resolve().stem
    dataset = write_prepared(output, sources, recipe, patients, name, skipped, workers)
    print(common.summary(dataset))
    return dataset


def check_options(spacing: Sequence[float] | None, val_fraction: float, test_fraction: float) -> None:
    """Refuses what no files could fit. Raises ValueError that names the option."""
    if spacing is not None and len(spacing) not in (1, 3):
        raise ValueError(f"--spacing takes one number or three, not {len(spacing)}")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"--val_fraction {val_fraction} and --test_fraction {test_fraction} must not be "
            "negative and leave a part for training"
        )


# --- Lists of files -------------------------------------------------------------------------------


def list_folder(folder: Path) -> tuple[list[Scan], list[str]]:
    """Images of `folder` with their masks, by name; problems, one line each."""
    for tail in ("", "Tr"):
        images, labels = folder / f"images{tail}", folder / f"labels{tail}"
        if images.is_dir():
            break
    else:
        raise FileNotFoundError(
            f"{folder} has no folder images/: put images there and masks into labels/, or use --csv"
        )
    masks, problems = common.by_stem(common.scan_files(labels))
    files = common.scan_files(images)
    masks = _named_as_images(masks, files)
    scans: list[Scan] = []
    for case_id, paths in group_channels(files, masks).items():
        stems = [formats.stem(path) for path in paths]
        channels = stems[0] != case_id
        if len(set(stems)) < len(stems) or (not channels and len(stems) > 1):
            problems.append(f"{paths[1]}: is the same case as {paths[0]}: remove one of them")
        elif channels and stems != (expected := [f"{case_id}_{number:04d}" for number in range(len(stems))]):
            problems.append(f"{paths[0]}: the channels of this case are {stems}, not {expected}: add what is missing")
        scans.append(Scan(case_id, paths[0], masks.pop(case_id, None), channels=tuple(paths[1:]) if channels else ()))
    problems += _unread(folder).values()
    problems += [
        f"{path}: has no image of that name in {images}: add the image or remove the mask{_told_shape(path)}"
        for path in masks.values()
    ]
    return scans, problems


def _named_as_images(masks: dict[str, Path], images: Sequence[Path]) -> dict[str, Path]:
    """Masks by the name of their image, if theirs is that with one of `formats.MASK_ENDINGS` behind it."""
    cases = {name for stem in map(formats.stem, images) for name in (stem, re.sub(r"_\d{4}$", "", stem))}
    named = {name: path for name, path in masks.items() if name in cases}
    for name, path in masks.items():
        case = formats.without_mask_ending(name)
        named.setdefault(case if case in cases and case not in named else name, path)
    return named


def _told_shape(path: Path) -> str:
    """Shape of a NIfTI file in brackets, "" if it cannot be read."""
    try:
        return f" (its shape is {tuple(nibabel.load(path).shape)})"  # type: ignore[attr-defined]
    except Exception:  # a damaged header can make nibabel raise almost anything
        return ""


def _unread(folder: Path) -> dict[Path, str]:
    """Scans in the folders of images and masks that are not taken, in other formats or deeper, and what to tell."""
    told = {}
    for path in _not_taken(folder):
        if path.name.lower().endswith(UNREAD) and path.is_file():
            told[path] = f"{path}: is a scan of a format that is not read here: convert it to .nii.gz or remove it"
        elif path.is_dir() and any(common.scan_files(each) for each in (path, *path.rglob("*/"))):
            told[path] = f"{path}: is a folder with scans, which are not searched for in it: move them up, or use --csv"
    return told


def other_files(folder: Path) -> list[Path]:
    """Files in the folders of images and masks that are no scans, or hidden: they are passed over."""
    unread = _unread(folder)
    return [path for path in _not_taken(folder) if path not in unread]


def _not_taken(folder: Path) -> list[Path]:
    folders = [folder / f"{kind}{tail}" for kind in ("images", "labels") for tail in ("", "Tr")]
    files = [path for each in folders if each.is_dir() for path in sorted(each.iterdir())]
    used = {path for each in folders for path in common.scan_files(each)}
    used |= {path for scan in used if scan.is_file() for path in formats.data_files(scan)}
    return [path for path in files if path not in used]


def group_channels(images: Sequence[Path], masks: Collection[str]) -> dict[str, list[Path]]:
    """Files of each case, by its name.

    nnU-Net's a_0000, a_0001, ... are the channels of case a. But such numbers can be plain names: without an a_0000, or
    with masks that carry them, each file is a case.
    """
    numbered: dict[str, set[str]] = {}
    for stem in map(formats.stem, images):
        if match := re.fullmatch(r"(.+)_\d{4}", stem):
            numbered.setdefault(match[1], set()).add(stem)
    groups: dict[str, list[Path]] = {}
    for path in images:
        stem = formats.stem(path)
        case = re.sub(r"_\d{4}$", "", stem)
        family = numbered.get(case, set())
        is_channel = stem in family and f"{case}_0000" in family and family.isdisjoint(masks)
        groups.setdefault(case if is_channel else stem, []).append(path)
    return groups


def list_csv(file: Path) -> tuple[list[Scan], list[str]]:
    """Images listed in a CSV file; problems, one line each.

    A case is named by its path as listed, for many collections have the same file name in the
    folder of every patient.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give --csv a file with a column image")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as CSV UTF-8") from error
    # Spreadsheets put between the cells what is usual in the country.
    reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")
    header, *rows = [[cell.strip() for cell in row] for row in reader] or [[]]
    columns = [name.lower() for name in header if name]
    unknown = {name for name in columns if name not in CSV_COLUMNS or columns.count(name) > 1}
    if "image" not in columns or unknown or any(header[len(columns) :]):
        raise ValueError(
            f"{file} has the columns {', '.join(header)}: name them image and, optionally, label, patient, split"
        )
    scans, problems = [], []
    with_split = "split" in columns and any("".join(row[columns.index("split") :][:1]) for row in rows)
    seen: dict[str | Path, int] = {}
    for number, row in enumerate(rows, start=2):
        where = f"{file}, line {number}"
        cells = dict.fromkeys(CSV_COLUMNS, "") | dict(zip(columns, row, strict=False))
        if any(row[len(columns) :]):
            problems.append(f"{where}: has more than {len(columns)} cells: put quotes around a path with a comma")
            continue
        if not any(row):
            continue
        if not cells["image"]:
            problems.append(f"{where}: has no image: fill in its path or remove the line")
            continue
        if with_split and cells["split"] not in SPLITS:
            problems.append(f"{where}: split is {cells['split']!r}: write train, val or test on every line")
        listed, label = (Path(cells[column].replace("\\", "/")) for column in ("image", "label"))
        parts = [part for part in listed.with_name(formats.stem(listed)).parts if part not in ("/", "..")]
        case_id = formats.composed("_".join(parts))
        image = file.parent / listed
        same = [seen[key] for key in (image.resolve(), case_id) if key in seen]
        if same:
            problems.append(
                f"{where}: is the same image as line {same[0]}, or would have the same name, {case_id}: "
                "remove one line, or rename one file"
            )
            continue
        seen |= {case_id: number, image.resolve(): number}
        mask = file.parent / label if cells["label"] else None
        scans.append(Scan(case_id, image, mask, formats.composed(cells["patient"]), cells["split"]))
    return scans, problems


# --- Patients and splits --------------------------------------------------------------------------


def join_patients(scans: list[Scan]) -> tuple[list[Scan], list[str]]:
    """Makes scans one patient whose names agree up to the first number, as p08_0 and p08_1; a warning of what was done.

    Frames of one patient on both sides of a split would flatter every figure, so names that look alike are kept
    together. Names that say nothing, img1, img2, ... or one patient's alone, stay as they are, which is told too.
    """
    matches = {scan.case_id: re.match(PATIENT_NAME, scan.case_id) for scan in scans if not scan.patient}
    joined = {case: match[1] if match else case for case, match in matches.items()}
    number = len(set(joined.values()))
    if not 1 < number < len(joined):
        told = (
            f"each of the {len(joined)} images counts as a patient of its own; if that is wrong, say who is whose with "
            "--patient_pattern, or in a column patient: one patient in two splits would flatter every figure"
        )
        return scans, [told] if len(joined) > 1 else []
    one = Counter(joined.values()).most_common(1)[0][0]
    example = [case for case, patient in joined.items() if patient == one]
    told = (
        f"by their names, the {len(joined)} images are of {number} patients: {', '.join(example[:3])} are "
        f"kept together as {one}. Say who is whose with --patient_pattern ('{PATIENT_NAME}' does what is done now, "
        "'(.*)' makes every image a patient of its own), or in a column patient"
    )
    return [dataclasses.replace(scan, patient=joined.get(scan.case_id, scan.patient)) for scan in scans], [told]


def name_patients(scans: list[Scan], pattern: str | None) -> tuple[list[Scan], list[str]]:
    """Fills in the patient where the list names none; problems, one line each."""
    if pattern is not None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"--patient_pattern {pattern!r} is not valid: {error}") from error
        if groups < 1:
            raise ValueError(
                f"--patient_pattern {pattern!r} has no group: put the patient into brackets, as in '^(p[0-9]+)_'"
            )
    named, problems = [], []
    for scan in scans:
        patient = scan.patient
        if not patient and pattern is not None:
            stem = scan.case_id if scan.channels else formats.stem(scan.image).removesuffix("_0000")
            match = re.search(pattern, stem)
            patient = (match and match[1]) or ""
            if not patient:
                problems.append(
                    f"{scan.image}: --patient_pattern {pattern!r} finds no patient in "
                    f"{stem!r}: correct the pattern or the name"
                )
                continue
        patient = patient or scan.case_id
        named.append(dataclasses.replace(scan, patient=patient))
    return named, problems


def to_sources(scans: Sequence[Scan], channels: bool = False) -> list[CaseSource]:
    """Cases of listed scans, in the split that the list says, else "all"; `channels`: see `prepare`."""
    read = functools.partial(formats.read_image, channels=channels)
    return [
        CaseSource(
            scan.case_id,
            scan.patient,
            scan.split or "all",
            (scan.image, *scan.channels),
            scan.label,
            read,
            formats.read_label,
        )
        for scan in scans
    ]


def listed_splits(sources: Sequence[CaseSource]) -> tuple[dict[str, list[str]], list[str]]:
    """Patients by the split column, in the order of the list; problems, one line each."""
    split_of: dict[str, str] = {}
    problems = []
    for source in sources:
        patient, split = source.patient_id, source.split
        if split in SPLITS and split_of.setdefault(patient, split) != split:
            problems.append(
                f"patient {patient}: is in two splits, {split_of[patient]} and "
                f"{split} ({source.image_paths[0]}): give all images of a patient the same split"
            )
    patients = {split: [p for p, s in split_of.items() if s == split] for split in SPLITS}
    return patients, problems


def take_splits(
    sources: Sequence[CaseSource],
    splits: Path | None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[dict[str, list[str]], list[str]]:
    """Patients by a split file, see `read_splits`, or else drawn; problems, one line each."""
    if splits is None:
        return draw_splits(sources, val_fraction, test_fraction, seed)
    present = {source.patient_id for source in sources}
    common.require_train(common.read_splits(splits), present, splits)
    patients = read_splits(sources, splits)
    common.tell_missing(patients, present, splits)
    return patients, []


def read_splits(sources: Sequence[CaseSource], splits: Path) -> dict[str, list[str]]:
    """Patients by a split file. Those without masks whom it does not list are for training, at the end of its list."""
    patients = common.read_splits(splits)
    listed = {patient for ids in patients.values() for patient in ids}
    with_mask = {source.patient_id for source in sources if source.label_path is not None}
    patients["train"] += sorted({source.patient_id for source in sources} - with_mask - listed)
    return patients


def draw_splits(
    sources: Sequence[CaseSource], val_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, list[str]], list[str]]:
    """Draws patients with masks for val and test by a hash of (seed, patient id).

    A patient's place depends on its own id alone, so the sizes are only near the fractions.

    Returns:
      Patients of each split; a problem for each part that was asked for and has no patient with a mask.
    """
    labelled = {source.patient_id for source in sources if source.label_path is not None}
    everyone = {source.patient_id for source in sources}

    def split_of(patient: str, seed: int) -> str:
        chance = _chance(seed, "split", patient)
        if patient not in labelled or chance >= test_fraction + val_fraction:
            return "train"
        return "test" if chance < test_fraction else "val"

    fractions = {"train": 1.0, "val": val_fraction, "test": test_fraction}
    wanted = {split for split in SPLITS if fractions[split] > 0 and (labelled or split != "train")}
    patients: dict[str, list[str]] = {split: [] for split in SPLITS}
    # By another hash, so that the first patients of train are a random draw as well.
    for patient in sorted(everyone, key=lambda p: _chance(seed, "order", p)):
        patients[split_of(patient, seed)].append(patient)
    empty = [split for split in SPLITS if split in wanted and not labelled.intersection(patients[split])]
    if not empty:
        return patients, []
    fitting = (s for s in range(1000) if wanted <= {split_of(p, s) for p in labelled})
    seed_that_fits = next(fitting, None)
    remedy = "change the fractions (0 for none)" if seed_that_fits is None else f"give --seed {seed_that_fits}"
    return patients, [
        f"split: the draw put none of {len(labelled)} patients with masks into "
        f"{' and '.join(empty)}: {remedy}, or name the patients in a file for --splits"
    ]


def _chance(*parts: object) -> float:
    """A number in [0, 1) that is a function of `parts` alone, on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# --- Orientation and spacing ----------------------------------------------------------------------


def fit_grid(
    facts: Sequence[common.CaseFacts], orientation: str | None, spacing: Sequence[float] | None
) -> tuple[str, tuple[float | None, float, float]]:
    """Orientation and spacing that were asked for, and otherwise suit the cases.

    Args:
      facts: of each case.
      orientation: axis codes of slices, rows and columns; None = by the voxels' shape.
      spacing: mm, of rows and columns, or of slices, rows and columns; None = the median.

    Raises:
      ValueError: slices are to be cut across another axis, and `spacing` is None.
    """
    found, median = choose_grid([fact.spacing for fact in facts if fact.spacing])
    if spacing is not None:
        across = None if len(spacing) == 1 else spacing[0]
        return orientation or found, (across, spacing[-2 if across else -1], spacing[-1])
    if orientation is not None and orientation[0] not in _either_way(found[0]):
        raise ValueError("with an --orientation of your own, give --spacing as well")
    return orientation or found, median


def choose_grid(
    spacings: Sequence[tuple[float, float, float]],
) -> tuple[str, tuple[float | None, float, float]]:
    """Orientation and spacing that suit the cases; prints a warning where one is of another kind.

    Args:
      spacings: voxel size of each case along left-right, front-back and foot-head, mm.

    Returns:
      Axis codes; spacing of slices, rows and columns, where None keeps each case's own.
    """
    medians = np.median(np.asarray(spacings), axis=0)
    through = _through_plane(medians)
    slices = 2 if through is None else through
    odd = [n for n, own in enumerate(spacings) if _through_plane(own) not in (None, slices)]
    if odd:
        print(
            f"warning: slices are cut across {common.ANATOMY[slices]}, but {len(odd)} of "
            f"{len(spacings)} cases have their longest voxels along another direction"
        )
    in_plane = [own for axis, own in enumerate(medians) if axis != slices]
    rows = round(float(np.median(in_plane)), 4)
    across = None if through is not None else round(float(medians[slices]), 4)
    return ORIENTATIONS[common.ANATOMY[slices]], (across, rows, rows)


def _through_plane(spacing: Sequence[float]) -> int | None:
    """Index of the axis with clearly longer voxels than both others, None if there is none."""
    order = np.argsort(spacing)
    return int(order[2]) if spacing[order[2]] > common.ANISOTROPY * spacing[order[1]] else None


def _either_way(code: str) -> str:
    return next(pair for pair in ("LR", "PA", "SI") if code in pair)


# --- Command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.make_parser("data_prep.folder", __doc__)
    add = parser.add_argument
    add("--input", type=Path, dest="input_dir", metavar="DIR", help="folder with images/, labels/")
    add("--csv", type=Path, dest="csv_file", metavar="FILE", help="list with a column image")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--patient_pattern", metavar="REGEX", help="its first group is the patient in a file name")
    add("--splits", type=Path, metavar="FILE", help="JSON file with train, val and test patients")
    add("--val_fraction", type=float, default=0.2, help="of the patients with masks (default 0.2)")
    add("--test_fraction", type=float, default=0.2, help="of the patients with masks (default 0.2)")
    add("--seed", type=int, default=0, help="of the draw of patients (default 0)")
    add(
        "--label_values",
        type=_numbers,
        metavar="0,1,2",
        help="values in the masks, background first (default 0 and all that are found)",
    )
    add("--class_names", type=_names, metavar="A,B,C", help="one for each label value")
    add("--modality", choices=("mr", "ct"), default="mr", help="how intensities are scaled")
    common.add_window(parser, (-160.0, 240.0), ", for ct")
    add(
        "--spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="of rows and columns, or of slices, rows and columns (default: the median)",
    )
    add("--orientation", metavar="SPL", help="axis codes of slices, rows, columns")
    add("--name", help="of the dataset (default: that of the input)")
    add("--channels", action="store_true", help="the fourth axis of an image holds its channels")
    add("--skip_bad", action="store_true", help="go on without the cases that have a fault")
    common.add_workers(parser)
    args = vars(cli.parse(parser, argv))
    prepare(args.pop("output"), **args)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


if __name__ == "__main__":
    common.run(main)
