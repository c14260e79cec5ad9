"""Synapse / BTCV (multi-atlas labelling beyond the cranial vault: abdominal CT, 13 organs) -> prepared dataset.

    python -m data_prep.synapse --input RawData --output data/synapse --eight

The challenge (Landman et al., MICCAI 2015) hands out its scans at https://www.synapse.org, project syn3193805, to those
who register and accept the terms of use given there. INPUT is the unpacked archive "Abdomen", with or without its level
`RawData/`:

    [RawData/]Training/img/img0001.nii.gz     Training/label/label0001.nii.gz
    [RawData/]Testing/img/img0061.nii.gz      no labels

All 13 organs are classes; with --eight those eight that papers since TransUNet (Chen et al., 2021) report, in their
order, and the other five become background. Every scan counts as a patient. One without a label is unlabelled: the
images of Testing are unlabelled cases of train, unless --no_test_images leaves them out.

The packaged split has TransUNet's 12 test scans. Its other 18 are for training, without a val part, which decisions
need: 0007, 0024 and 0033 are our choice of one, drawn by a hash of their number, and 15 are left for train. So figures
on test compare with published ones but for the three scans that training does without.
"""

import functools
import re
from pathlib import Path

import numpy as np

from data_prep import common, folder
from sscl_jax import cli
from sscl_jax.data import nifti
from sscl_jax.data.prepared import CaseSource, PreparedDataset
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.workers import Workers

ORGANS = {
    0: "background",
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "esophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "inferior vena cava",
    10: "portal and splenic veins",
    11: "pancreas",
    12: "right adrenal gland",
    13: "left adrenal gland",
}
EIGHT = (0, 8, 4, 3, 2, 6, 11, 1, 7)
WINDOW = (-125.0, 275.0)  # HU, as in TransUNet
PACKAGED_SPLITS = Path(__file__).parent / "splits" / "synapse.json"


def prepare(
    input_dir: Path,
    output: Path,
    splits: Path | None = None,
    *,
    eight: bool = False,
    window: tuple[float, float] = WINDOW,
    spacing: float = 1.5,
    no_test_images: bool = False,
    skip_bad: bool = False,
    workers: Workers = 0,
) -> PreparedDataset:
    """Checks the files, writes the prepared dataset, prints what it did.

    Args:
      input_dir: the unpacked archive.
      output: folder to make.
      splits: split file; None = the packaged one.
      eight: eight organs instead of all 13.
      window: HU.
      spacing: of rows and columns, mm; slices stay as they are.
      no_test_images: leave out the images of Testing.
      skip_bad: go on without the cases that have a fault.
      workers: who does it; see `sscl_jax.data.workers`.

    Raises:
      ValueError, FileNotFoundError: the files or the splits do not fit.
    """
    values = EIGHT if eight else tuple(ORGANS)
    sources, problems = list_sources(Path(input_dir), no_test_images, values)
    patients, more = folder.take_splits(sources, splits or PACKAGED_SPLITS)
    recipe = Recipe(
        orientation="SPL",
        spacing=(None, spacing, spacing),
        intensity="ct",
        window=window,
        label_values=values,
        class_names=tuple(ORGANS[value] for value in values),
    )
    return common.build(output, sources, recipe, patients, "synapse", problems + more, skip_bad, workers)


def list_sources(
    input_dir: Path, no_test_images: bool = False, kept: tuple[int, ...] = tuple(ORGANS)
) -> tuple[list[CaseSource], list[str]]:
    """Scans with their labels, by number; problems, one line each. Prints what it passes over; `kept`: see below."""
    base = input_dir / "RawData" if (input_dir / "RawData").is_dir() else input_dir
    parts = ("Training",) if no_test_images else ("Training", "Testing")
    images = [path for part in parts for path in common.nifti_files(base / part / "img")]
    labels = [path for part in parts for path in common.nifti_files(base / part / "label")]
    (image_of, twice), (label_of, more) = _by_number(images, "img"), _by_number(labels, "label")
    if not image_of:
        raise FileNotFoundError(
            f"{base} has no Training/img/img*.nii.gz: give --input the unpacked archive, with Training in it"
        )
    read = functools.partial(read_label, kept=kept)
    sources = [
        CaseSource(number, number, "all", (path,), label_of.get(number), read_label=read)
        for number, path in image_of.items()
    ]
    ignored = sorted({*images, *labels}.difference(image_of.values(), label_of.values()))
    if ignored:
        print(f"ignored: {len(ignored)} other files, such as {ignored[0]}")
    alone = [(number, path) for number, path in label_of.items() if number not in image_of]
    return sources, twice + more + [
        f"{path}: has no image: add img{number}.nii.gz or remove the label" for number, path in alone
    ]


def _by_number(paths: list[Path], word: str) -> tuple[dict[str, Path], list[str]]:
    """Files that are called `word` and a number, by that number; problems of `common.by_stem`."""
    found, problems = common.by_stem(paths)
    matches = {path: re.fullmatch(rf"{word}(\d+)", name) for name, path in found.items()}
    return {match[1]: path for path, match in matches.items() if match}, problems


def read_label(path: Path, kept: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map with organs that are not among `kept` as background; see `nifti.read_label`."""
    array, affine = nifti.read_label(path)
    array[np.isin(array, sorted(set(ORGANS).difference(kept)))] = 0
    return array, affine


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = common.make_parser("synapse", __doc__)
    add = parser.add_argument
    add("--eight", action="store_true", help="the eight organs of TransUNet instead of all 13")
    common.add_window(parser, WINDOW)
    add("--spacing", type=float, default=1.5, metavar="MM", help="of rows and columns (default 1.5)")
    add("--no_test_images", action="store_true", help="leave out the images that have no labels")
    args = vars(cli.parse(parser, argv))
    prepare(**args)


if __name__ == "__main__":
    common.run(main)
