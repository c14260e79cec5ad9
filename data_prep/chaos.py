"""CHAOS (healthy abdomen in CT and MR) -> prepared dataset.

    python -m data_prep.chaos --input CHAOS --modality t2 --output data/chaos_t2

INPUT holds the unpacked archives, with or without the levels `Train_Sets/` and `Test_Sets/`:

    [Train_Sets/]CT/1/DICOM_anon/*.dcm                          CT/1/Ground/*.png            (--modality ct)
    [Train_Sets/]MR/1/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm    MR/1/T1DUAL/Ground/*.png (--modality t1)
    [Train_Sets/]MR/1/T2SPIR/DICOM_anon/*.dcm                   MR/1/T2SPIR/Ground/*.png     (--modality t2)

The data come from the organisers of the challenge (Combined Healthy Abdominal Organ Segmentation, ISBI 2019; Kavur et
al., Medical Image Analysis 2021), under the Creative Commons licence that comes with them; cite it. A patient without
`Ground` becomes an unlabelled case, so the patients of Test_Sets are for training without labels.

CT masks hold the liver. MR masks hold four organs by grey value: liver 55-70, right kidney 110-135, left kidney
175-200, spleen 240-255; masks that are predicted have 63, 126, 189 and 252, as the challenge asks, and for CT 255. With
t1, an image has two channels, in phase and out of phase.

The nth PNG belongs to the nth DICOM file by name. Where a file lies is told by its header, and in many CT series the
first file is the topmost slice: so images and masks are paired by name first, and put in order together.

There is no conventional split within the patients that have masks. Without --splits they are drawn for val and test by
a seeded hash of their id, about one fifth each: 4 and 4 of the 20 MR patients, 3 and 4 of the 20 for CT.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import common
from data_prep.folder import draw_splits
from sscl_jax import cli
from sscl_jax.data import formats, nifti
from sscl_jax.data.prepared import CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

MR_CLASSES = {0: "background", 63: "liver", 126: "right kidney", 189: "left kidney", 252: "spleen"}
MR_RANGES = ((0, 0), (55, 70), (110, 135), (175, 200), (240, 255))  # of grey values, ends included
CT_CLASSES = {0: "background", 255: "liver"}
CT_RANGES = ((0, 0), (1, 255))  # a mask may hold 1 or 255
CLASSES = {"ct": CT_CLASSES, "t1": MR_CLASSES, "t2": MR_CLASSES}

SEED = 1  # of the draw: one that leaves enough for val and test
# Folders of the images, below that of the patient, and of the masks.
FOLDERS = {
    "ct": ("CT", ("DICOM_anon",), "Ground"),
    "t1": ("MR", ("T1DUAL/DICOM_anon/InPhase", "T1DUAL/DICOM_anon/OutPhase"), "T1DUAL/Ground"),
    "t2": ("MR", ("T2SPIR/DICOM_anon",), "T2SPIR/Ground"),
}


def prepare(
    input_dir: Path,
    output: Path,
    modality: str,
    splits: Path | None = None,
    seed: int = SEED,
    spacing: float = 1.5,
    window: tuple[float, float] = (-160.0, 240.0),
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of CHAOS, writes the prepared dataset, prints what it did.

    Args:
      input_dir: the unpacked archives.
      output: folder to make.
      modality: "ct", "t1" or "t2".
      splits: split file; None = a draw.
      seed: of the draw.
      spacing: of rows and columns, mm; slices stay as they are.
      window: HU, for "ct".
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the splits do not fit.
    """
    sources, problems = list_sources(Path(input_dir), modality)
    if splits is not None:
        patients = common.read_splits(splits)
        common.tell_missing(patients, {source.patient_id for source in sources}, splits)
    else:
        patients, more = draw_splits(sources, 0.2, 0.2, seed)
        problems += more
    recipe = Recipe(
        orientation="SPL",
        spacing=(None, spacing, spacing),
        intensity="ct" if modality == "ct" else "mr",
        window=window,
        label_values=tuple(CLASSES[modality]),
        class_names=tuple(CLASSES[modality].values()),
    )
    return common.build(output, sources, recipe, patients, f"chaos_{modality}", problems, skip_bad, workers)


def list_sources(input_dir: Path, modality: str) -> tuple[list[CaseSource], list[str]]:
    """The case of each patient, in the order of their numbers; problems, one line each."""
    part, images, _ = FOLDERS[modality]
    bases = [input_dir / level / part for level in ("", "Train_Sets", "Test_Sets")]
    found = [folder for base in bases for folder in base.glob("[!.]*") if folder.is_dir()]
    if not any((folder / images[0]).is_dir() for folder in found):
        raise FileNotFoundError(
            f"{input_dir} has no {part}/*/{images[0]}: give --input the folder of the unpacked archives"
        )
    folders: dict[str, Path] = {}
    problems = []
    for folder in sorted(found, key=_by_number):
        absent = [image for image in images if not (folder / image).is_dir()]
        first = folders.setdefault(formats.stem(folder), folder) if not absent else folder
        if absent:
            problems.append(f"{folder}: has no {' and no '.join(absent)}: restore it or remove the patient")
        elif first != folder:
            problems.append(f"{folder}: is the same patient as {first}: remove one of them")
    return [case_of(patient, folder, modality) for patient, folder in folders.items()], problems


def case_of(patient: str, folder: Path, modality: str) -> CaseSource:
    """The case of one patient; unlabelled where there is no folder of masks."""
    _, images, ground = FOLDERS[modality]
    label = folder / ground
    return CaseSource(
        f"{modality}_{patient}",
        patient,
        "all",
        tuple(folder / image for image in images),
        label if label.is_dir() else None,
        # A folder is a series by its place; the anonymised headers may number every file as its own.
        partial(formats.read_dicom, one_series=False),
        partial(read_ground, dicom=folder / images[0], modality=modality),
    )


def read_ground(folder: Path, dicom: Path, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the PNG masks of a patient: (X, Y, Z), values as `label_values`, and the affine of the DICOM series.

    Args:
      folder: of the masks.
      dicom: of the series that they were drawn on.
      modality: tells how grey values map to organs.

    Raises:
      ValueError: another number of masks than of slices, a mask that is not grey, or an unknown grey value.
    """
    files, affine = formats.sort_slices(dicom, one_series=False)
    names = sorted(files, key=_by_number)
    masks = sorted((p for p in folder.glob("*.png") if p.name[0] != "."), key=_by_number)
    if len(masks) != len(names):
        raise ValueError(f"{folder}: holds {len(masks)} PNG masks for the {len(names)} slices of {dicom}: restore them")
    mask_of = dict(zip(names, masks, strict=True))
    planes = [_read_png(mask_of[file]) for file in files]
    shapes = {plane.shape for plane in planes}
    if len(shapes) > 1:
        raise ValueError(f"{folder}: its masks have different sizes, {sorted(shapes)}: restore them")
    grey = np.stack(planes, axis=-1)
    label = np.full(grey.shape, -1, np.int16)
    ranges = CT_RANGES if modality == "ct" else MR_RANGES
    for value, (low, high) in zip(CLASSES[modality], ranges, strict=True):
        label[(grey >= low) & (grey <= high)] = value
    if (label < 0).any():
        file = masks[names.index(files[int(np.argwhere(label < 0)[0, 2])])]
        raise ValueError(
            f"{file}: grey values {', '.join(map(str, np.unique(grey[label < 0])[:5]))} are of no organ: correct it"
        )
    return nifti.check_label(folder, label), affine


def _read_png(path: Path) -> np.ndarray:
    """Grey values (columns, rows) of one mask."""
    from PIL import Image  # Pillow comes with matplotlib

    try:
        with Image.open(path) as image:
            mode = image.mode
            plane = np.asarray(image.convert("L") if mode == "P" else image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as PNG ({error}): copy it again") from error
    if mode not in ("1", "L", "P"):
        raise ValueError(f"{path}: is not a grey picture of 8 bits, but {mode}: convert it")
    return plane.T.astype(np.uint8)


def _by_number(path: Path) -> list:
    """Sorts names with numbers in them by the numbers, as "2" before "10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("chaos", __doc__)
    add = parser.add_argument
    add("--modality", choices=tuple(FOLDERS), required=True, help="CT, T1 in and out of phase, or T2")
    add("--seed", type=int, default=SEED, help=f"of the draw of patients (default {SEED})")
    add("--spacing", type=float, default=1.5, metavar="MM", help="of rows and columns (default 1.5)")
    common.add_window(parser, (-160.0, 240.0), ", for ct")
    args = vars(cli.parse(parser, argv))
    prepare(**args)


if __name__ == "__main__":
    common.run(main)
