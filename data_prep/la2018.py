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
from sscl_jax.data.prepared import SPLITS, CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe

CLASSES = ("background", "left atrium")
IMAGES = {"h5": "mri_norm2.h5", "nrrd": "lgemri.nrrd"}
NRRD_LABEL = "laendo.nrrd"
LABEL_VALUES = {"h5": (0, 1), "nrrd": (0, 255)}
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

    Raises:
      ValueError, FileNotFoundError: the files, the options or the splits do not fit.
    """
    splits = splits or PACKAGED_SPLITS
    patients = common.read_splits(splits)
    form, images, problems = find_cases(Path(input_dir), form)
    if form == "h5":
        told = "as --spacing_of_files says" if spacing_of_files else "as the challenge documents"
        spacing_of_files = spacing_of_files or DOCUMENTED_SPACING
        print(f"h5 files hold no geometry: taken as {spacing_of_files:g} mm along each axis, {told}, axes {H5_AXES}")
    elif spacing_of_files:
        raise ValueError("--spacing_of_files is for h5 files; NRRD files tell their own spacing: leave it out")
    common.tell_missing(patients, images, splits)
    sources = [
        case_of(patient, split, images[patient], form, spacing_of_files)
        for split in SPLITS
        for patient in patients[split]
        if patient in images
    ]
    recipe = Recipe(
        orientation="SPL",
        spacing=(spacing, spacing, spacing),
        intensity="mr",
        label_values=LABEL_VALUES[form],
        class_names=CLASSES,
    )
    return common.build(output, sources, recipe, patients, "la2018", problems, skip_bad)


def find_cases(input_dir: Path, form: str | None) -> tuple[str, dict[str, Path], list[str]]:
    """The form of the files, the image of each patient, and problems, one line each."""
    found = {f: sorted(input_dir.rglob(name)) for f, name in IMAGES.items() if form in (None, f)}
    found = {f: paths for f, paths in found.items() if paths}
    if not found:
        names = " or ".join(f"CASE/{name}" for f, name in IMAGES.items() if form in (None, f))
        raise FileNotFoundError(f"{input_dir} has no {names}: give --input the folder with the cases")
    if len(found) > 1:
        raise ValueError(f"{input_dir} holds both {' and '.join(IMAGES.values())}: say --form h5 or --form nrrd")
    ((form, paths),) = found.items()
    images: dict[str, Path] = {}
    problems = []
    for path in paths:
        first = images.setdefault(path.parent.name, path)
        if first != path:
            problems.append(f"{path}: is the same case as {first}: remove one of them")
    return form, images, problems


def case_of(patient: str, split: str, image: Path, form: str, spacing_of_files: float | None) -> CaseSource:
    """The case of one patient; unlabelled where there is no mask."""
    if form == "nrrd":
        mask = image.with_name(NRRD_LABEL)
        label = mask if mask.is_file() else None
        return CaseSource(patient, patient, split, (image,), label, formats.read_image, formats.read_label)
    sizes = (spacing_of_files or DOCUMENTED_SPACING,) * 3
    return CaseSource(
        patient,
        patient,
        split,
        (image,),
        image if formats.h5_has(image, "label") else None,
        partial(formats.read_h5_image, spacing=sizes, axes=H5_AXES),
        partial(formats.read_h5_label, spacing=sizes, axes=H5_AXES),
    )


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
