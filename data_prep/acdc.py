"""ACDC (cine cardiac MRI; Bernard et al., IEEE TMI 2018) -> prepared dataset.

    python -m data_prep.acdc --input ACDC --output data/acdc

INPUT is the unpacked archive, with or without its level `database/`:

    [database/]training/patient001/Info.cfg
                                   patient001_frame01.nii.gz     patient001_frame01_gt.nii.gz
                                   patient001_frame12.nii.gz     patient001_frame12_gt.nii.gz
    [database/]testing/patient101/...

The two frames of a patient are those that its Info.cfg calls ED and ES. A frame without its `_gt`
file becomes an unlabelled case. The split is by patient; the packaged one is the conventional 70,
10 and 20 of the 100 training patients (an INPUT that brings its own `splits.json` along is split by
that). Patients of `testing/` take part only where the split file lists them.

`--splits=data_prep/splits/acdc_held_out.json` holds 19 of the 70 out as test: the last 20 of its list, but for
patient076, whose scans are those of patient074.
"""

from collections.abc import Iterable
from pathlib import Path

from data_prep import common
from sscl_jax import cli
from sscl_jax.data import formats
from sscl_jax.data.prepared import SPLITS, CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
LABEL_VALUES = (0, 1, 2, 3)
PACKAGED_SPLITS = Path(__file__).parent / "splits" / "acdc.json"


def prepare(
    input_dir: Path,
    output: Path,
    splits: Path | None = None,
    spacing: float = 1.5,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of an ACDC folder, writes the prepared dataset, prints what it did.

    Args:
      input_dir: the unpacked archive.
      output: folder to make.
      splits: split file; None = `splits.json` in `input_dir` if there, else the packaged one.
      spacing: of rows and columns, mm; slices stay as they are.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the splits do not fit.
    """
    input_dir = Path(input_dir)
    name = "acdc"
    if splits is None and (input_dir / "splits.json").is_file():
        # As the phantoms do, which are not ACDC and should not be called so.
        splits, name = input_dir / "splits.json", input_dir.resolve().name
    splits = splits or PACKAGED_SPLITS
    patients = common.read_splits(splits)
    folders = find_patients(input_dir)
    common.tell_missing(patients, folders, splits)
    split_of = {patient: split for split in SPLITS for patient in patients[split]}
    used = [patient for patient in split_of if patient in folders]
    sources, ignored, problems = list_cases(folders, used, split_of)
    if ignored:
        print(f"ignored: {len(ignored)} other files, such as {ignored[0].name}")
    recipe = Recipe(
        orientation="SPL",
        spacing=(None, spacing, spacing),
        intensity="mr",
        label_values=LABEL_VALUES,
        class_names=CLASSES,
    )
    return common.build(output, sources, recipe, patients, name, problems, skip_bad, workers)


def find_patients(input_dir: Path) -> dict[str, Path]:
    """Folder of each patient id, for any of the layouts in which the archive is found."""
    base = input_dir / "database" if (input_dir / "database").is_dir() else input_dir
    folders = {
        formats.stem(folder): folder
        for part in ("training", "testing")
        for folder in sorted((base / part).glob("patient*"))
        if folder.is_dir()
    }
    if not folders:
        raise FileNotFoundError(f"{base} has no training/patient* folder: give --input the unpacked ACDC archive")
    return folders


def list_cases(
    folders: dict[str, Path], patients: Iterable[str], split_of: dict[str, str]
) -> tuple[list[CaseSource], list[Path], list[str]]:
    """Cases of `patients`, see `patient_cases`; those that `split_of` does not name are in the split "none"."""
    sources, ignored, problems = [], [], []
    for patient in patients:
        found, others, wrong = patient_cases(folders[patient], split_of.get(patient, "none"))
        sources += found
        ignored += others
        problems += wrong
    return sources, ignored, problems


def patient_cases(folder: Path, split: str) -> tuple[list[CaseSource], list[Path], list[str]]:
    """Cases of one patient: the frames that Info.cfg names.

    Returns:
      Cases; the NIfTI files that belong to none of them; problems, one line each.
    """
    patient = formats.stem(folder)
    try:
        frames = read_frames(folder / "Info.cfg")
    except (ValueError, OSError) as error:
        return [], [], [str(error)]
    cases = []
    files, problems = common.by_stem(common.nifti_files(folder))
    for frame in frames:
        stem = f"{patient}_frame{frame:02d}"
        image, label = files.get(stem), files.get(f"{stem}_gt")
        if image is None:
            problems.append(
                f"{folder / stem}.nii.gz: does not exist, but Info.cfg names frame {frame}: "
                "restore the file or correct Info.cfg"
            )
        else:
            cases.append(CaseSource(stem, patient, split, (image,), label))
    used = {path for case in cases for path in (*case.image_paths, case.label_path)}
    return cases, [path for path in files.values() if path not in used], problems


def read_frames(path: Path) -> tuple[int, ...]:
    """Frame numbers of end-diastole and end-systole, from lines such as "ED: 1" and "ES: 9"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist: restore it, it names the ED and ES frames")
    text = path.read_text(encoding="utf-8-sig", errors="replace")  # a wrong letter leaves no number
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    frames = []
    for key in ("ED", "ES"):
        value = fields.get(key, "")
        if not value.isdecimal():
            raise ValueError(f"{path}: {key} is {value!r}, not a frame number: correct the file")
        frames.append(int(value))
    return tuple(dict.fromkeys(frames))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("acdc", __doc__)
    parser.add_argument("--spacing", type=float, default=1.5, help="of rows and columns, in mm (default 1.5)")
    args = cli.parse(parser, argv)
    prepare(**vars(args))


if __name__ == "__main__":
    common.run(main)
