"""2018 Atrial Segmentation Challenge (late-gadolinium MRI, left atrium) -> prepared dataset.

    python -m data_prep.la2018 --input DIR --output data/la

INPUT is searched in depth for one of the two forms in which these scans are found:

    CASE/lgemri.nrrd, CASE/laendo.nrrd     the challenge's own archive (masks hold 0 and 255)
    CASE/mri_norm2.h5                      image and label; what most papers on semi-supervision use

The data come from the challenge's organisers (Xiong et al., Medical Image Analysis 2021), for research; cite it. A case
without a mask becomes an unlabelled one, and CASE is the patient.

The h5 files hold no geometry. What is used instead, and printed: voxels of 0.625 mm along each axis, which is what the
challenge documents for all its scans (--spacing_of_files says otherwise); and axes that point to the left, to the back
and up (LPS). That is how the arrays look: along the last axis, always 88 long, lie axial slices from liver to pulmonary
trunk; in them the spine lies at the far end of the second axis, and the descending aorta beyond it on the first.

The h5 images are z-scored and cut out around the label, which also the test scans are: figures on them are not those of
whole scans. The z-score does no harm, since the scaling of the recipe gives the same for an image and its z-score.

The packaged split is the papers' 80 for training and 20 for test, in their order; as the papers have no val patients,
the 9th to 12th for training are ours. So --config.data.labeled_patients=4 or 8 takes the papers' labelled patients; for
their 16, give --splits a file with another choice for val.
"""

from functools import partial
from pathlib import Path

from data_prep import common
from sscl_jax import cli
from sscl_jax.data import formats
from sscl_jax.data.prepared import CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

IMAGES = {"h5": "mri_norm2.h5", "nrrd": "lgemri.nrrd"}
NRRD_LABEL = "laendo.nrrd"
CLASSES = {"h5": {0: "background", 1: "left atrium"}, "nrrd": {0: "background", 255: "left atrium"}}
DOCUMENTED_SPACING = 0.625  # mm, along each axis
H5_AXES = "LPS"
PACKAGED_SPLITS = Path(__file__).parent / "splits" / "la2018.json"


def prepare(
    input_dir: Path,
    output: Path,
    splits: Path | None = None,
    form: str | None = None,
    spacing_of_files: float | None = None,
    spacing: float = DOCUMENTED_SPACING,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of the challenge, writes the prepared dataset, prints what it did.

    Args:
      input_dir: searched in depth.
      output: folder to make.
      splits: split file; None = the packaged one.
      form: "h5" or "nrrd"; None = the one that is there.
      spacing_of_files: voxel size in the h5 files, mm; None = what the challenge documents.
      spacing: of the prepared voxels along each axis, mm.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files, the options or the splits do not fit.
    """
    splits = splits or PACKAGED_SPLITS
    patients = common.read_splits(splits)
    form = form or find_form(Path(input_dir))
    sources, problems = list_sources(Path(input_dir), form, spacing_of_files or DOCUMENTED_SPACING)
    if form == "h5":
        told = "as --spacing_of_files says" if spacing_of_files else "as the challenge documents"
        size = spacing_of_files or DOCUMENTED_SPACING
        print(f"h5 files hold no geometry: taken as {size:g} mm along each axis, {told}, axes {H5_AXES}")
    elif spacing_of_files:
        raise ValueError("--spacing_of_files is for h5 files; NRRD files tell their own spacing: leave it out")
    common.tell_missing(patients, {source.patient_id for source in sources}, splits)
    recipe = Recipe(
        orientation="SPL",
        spacing=(spacing, spacing, spacing),
        intensity="mr",
        label_values=tuple(CLASSES[form]),
        class_names=tuple(CLASSES[form].values()),
    )
    return common.build(output, sources, recipe, patients, "la2018", problems, skip_bad, workers)


def find_form(input_dir: Path) -> str:
    """The form in which the scans are there."""
    found = [form for form, name in IMAGES.items() if any(input_dir.rglob(name))]
    if not found:
        names = " or ".join(f"CASE/{name}" for name in IMAGES.values())
        raise FileNotFoundError(f"{input_dir} has no {names}: give --input the folder with the cases")
    if len(found) > 1:
        raise ValueError(f"{input_dir} has {' and '.join(IMAGES.values())}: say --form h5 or --form nrrd")
    return found[0]


def list_sources(
    input_dir: Path, form: str, spacing_of_files: float = DOCUMENTED_SPACING
) -> tuple[list[CaseSource], list[str]]:
    """Cases of one form, unlabelled where there is no mask; problems, one line each."""
    paths = sorted(input_dir.rglob(IMAGES[form]))
    if not paths:
        raise FileNotFoundError(f"{input_dir} has no CASE/{IMAGES[form]}: give --input the folder with the cases")
    images: dict[str, Path] = {}
    problems = []
    for path in paths:
        first = images.setdefault(formats.stem(path.parent), path)
        if first != path:
            problems.append(f"{path}: is the same case as {first}: remove one of them")
    return [case_of(patient, image, form, spacing_of_files) for patient, image in images.items()], problems


def case_of(patient: str, image: Path, form: str, spacing_of_files: float) -> CaseSource:
    """The case of one patient; unlabelled where there is no mask."""
    if form == "nrrd":
        mask = image.with_name(NRRD_LABEL)
        label = mask if mask.is_file() else None
        return CaseSource(patient, patient, "all", (image,), label, formats.read_image, formats.read_label)
    sizes = (spacing_of_files,) * 3
    label = image if formats.h5_has(image, "label") else None
    read_image = partial(formats.read_h5_image, spacing=sizes, axes=H5_AXES)
    read_label = partial(formats.read_h5_label, spacing=sizes, axes=H5_AXES)
    return CaseSource(patient, patient, "all", (image,), label, read_image, read_label)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("la2018", __doc__)
    add = parser.add_argument
    add("--form", choices=tuple(IMAGES), help="which files to take, where both are there")
    add(
        "--spacing_of_files",
        type=float,
        metavar="MM",
        help=f"voxel size in the h5 files (default {DOCUMENTED_SPACING}, which the challenge documents)",
    )
    add(
        "--spacing",
        type=float,
        default=DOCUMENTED_SPACING,
        metavar="MM",
        help=f"of the prepared voxels, along each axis (default {DOCUMENTED_SPACING})",
    )
    args = cli.parse(parser, argv)
    prepare(**vars(args))


if __name__ == "__main__":
    common.run(main)
