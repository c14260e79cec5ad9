"""MM-WHS 2017 (multi-modality whole heart segmentation, CT and MR) -> prepared dataset.

    python -m data_prep.mmwhs --input MMWHS --output data/mmwhs_ct --modality ct

The challenge (Zhuang and Shen, Medical Image Analysis 2016; Zhuang et al., Medical Image Analysis 2019) hands out its
scans on registration, for research, under the agreement that its site has you accept. INPUT holds its folders, with or
without a number at the end:

    ct_train/ct_train_1001_image.nii.gz     ct_train/ct_train_1001_label.nii.gz
    ct_test/ct_test_2001_image.nii.gz       no labels
    mr_train/...                            mr_test/...

CT and MR are of different patients and are scaled differently, so each makes a prepared dataset of its own. Every
volume counts as a patient. One without a label is unlabelled: the test images are unlabelled cases of train, unless
--no_test_images leaves them out. No split is official: it is that of --splits, or drawn by a hash of the patient's id.

Seven structures have the values 500, 600, 420, 550, 205, 820 and 850. Some voxels hold 421, which is none of them and
is known to stand for 420: they are read as 420, and it is printed in which file and how many.
"""

import functools
import re
from pathlib import Path

import numpy as np

from data_prep import common, folder
from sscl_jax import cli
from sscl_jax.data import formats, nifti
from sscl_jax.data.prepared import CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

CLASSES = {
    0: "background",
    500: "left ventricle",
    600: "right ventricle",
    420: "left atrium",
    550: "right atrium",
    205: "myocardium of the left ventricle",
    820: "ascending aorta",
    850: "pulmonary artery",
}
STRAY, MEANT = 421, 420
# The blood of a contrast-enhanced heart lies at 200 to 600 HU; lung and fat around it stay apart.
WINDOW = (-200.0, 800.0)


def prepare(
    input_dir: Path,
    output: Path,
    modality: str,
    splits: Path | None = None,
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    window: tuple[float, float] = WINDOW,
    spacing: float = 1.5,
    no_test_images: bool = False,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files of one modality, writes the prepared dataset, prints what it did.

    Args:
      input_dir: folder with ct_train/ or mr_train/.
      output: folder to make.
      modality: "ct" or "mr".
      splits: split file; None = the draw by fractions.
      val_fraction: chance of a patient with a label to be drawn for val, 0..1.
      test_fraction: the same for test.
      seed: of the draw and of the order of train patients.
      window: HU, for CT.
      spacing: of all three axes, mm.
      no_test_images: leave out the images of ct_test/ or mr_test/.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the options do not fit.
    """
    folder.check_options(None, val_fraction, test_fraction)
    sources, problems = list_sources(Path(input_dir), modality, no_test_images)
    patients, more = folder.take_splits(sources, splits, val_fraction, test_fraction, seed)
    recipe = Recipe(
        orientation="SPL",
        spacing=(spacing, spacing, spacing),
        intensity=modality,
        window=window,
        label_values=tuple(CLASSES),
        class_names=tuple(CLASSES.values()),
    )
    return common.build(output, sources, recipe, patients, f"mmwhs_{modality}", problems + more, skip_bad, workers)


def list_sources(input_dir: Path, modality: str, no_test_images: bool = False) -> tuple[list[CaseSource], list[str]]:
    """Volumes of one modality with their labels, by name; problems, one line each. Prints what it passes over."""
    parts = ("train",) if no_test_images else ("train", "test")
    folders = [path for part in parts for path in sorted(input_dir.glob(f"{modality}_{part}*")) if path.is_dir()]
    by_name, problems = common.by_stem([path for each in folders for path in common.nifti_files(each)])
    names = [match[1] for name in by_name if (match := re.fullmatch(rf"({modality}_(?:train|test)_\d+)_image", name))]
    if not names:
        raise FileNotFoundError(
            f"{input_dir} has no {modality}_train/{modality}_train_*_image.nii.gz: give --input the folder that holds "
            f"{modality}_train"
        )
    read = functools.partial(read_label, told=set())
    sources = [
        CaseSource(name, name, "all", (by_name[f"{name}_image"],), by_name.get(f"{name}_label"), read_label=read)
        for name in names
    ]
    used = {path for source in sources for path in (*source.image_paths, source.label_path)}
    alone = [path for path in by_name.values() if path not in used and formats.stem(path).endswith("_label")]
    ignored = [path for path in by_name.values() if path not in used and path not in alone]
    if ignored:
        print(f"ignored: {len(ignored)} other files, such as {ignored[0]}")
    problems += [
        f"{path}: has no image beside it: add {path.name.replace('_label', '_image')} or remove the label"
        for path in alone
    ]
    return sources, problems


def read_label(path: Path, told: set[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map with 421 as 420; see `nifti.read_label`.

    Args:
      path: of the label map.
      told: files of which it was printed before, for a file is read more than once.
    """
    array, affine = nifti.read_label(path)
    stray = array == STRAY
    if stray.any():
        array[stray] = MEANT
        if path not in told:
            told.add(path)
            print(f"note: {path}: {np.count_nonzero(stray)} voxels hold {STRAY}, read as {MEANT}, {CLASSES[MEANT]}")
    return array, affine


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("mmwhs", __doc__)
    add = parser.add_argument
    add("--modality", choices=("ct", "mr"), required=True, help="which half of the data to prepare")
    add("--val_fraction", type=float, default=0.2, help="of the patients with labels (default 0.2)")
    add("--test_fraction", type=float, default=0.2, help="of the patients with labels (default 0.2)")
    add("--seed", type=int, default=0, help="of the draw of patients (default 0)")
    common.add_window(parser, WINDOW, ", for ct")
    add("--spacing", type=float, default=1.5, metavar="MM", help="of all three axes (default 1.5)")
    add("--no_test_images", action="store_true", help="leave out the images that have no labels")
    args = vars(cli.parse(parser, argv))
    prepare(**args)


if __name__ == "__main__":
    common.run(main)
