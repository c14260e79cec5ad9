"""Segments new scans with a trained network.

    python -m sscl_jax.predict --checkpoint=runs/acdc --input=DIR_OR_FILE --output=DIR

A scan is a NIfTI, NRRD or MetaImage file, or a folder with the slices of one DICOM series. For a network trained on
several channels, they are the fourth axis of a file, or files named as in nnU-Net: `p1_0000.nii.gz`, `p1_0001.nii.gz`,
... (or folders `p1_0000`, ... with a DICOM series each) are the scan `p1`.

A mask has the name and geometry of its scan, and the label values trained on; it is NIfTI, whatever the scan is. Exit
status 1 if any scan could not be segmented. A mask that was corrected since is kept, which is told.
"""

import functools
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from sscl_jax import cli, evaluate, experiment, parallel
from sscl_jax.data import formats, nifti, workers
from sscl_jax.data import recipe as recipes


@dataclass(frozen=True)
class Scan:
    """One scan.

    Attributes:
      paths: its file or DICOM folder, or one for each channel, in their order.
      mask: file name of its mask, below --output.
    """

    paths: tuple[Path, ...]
    mask: Path


def find_scans(path: Path, channels: int = 1) -> list[Scan]:
    """The scan that `path` is, or all below it, sorted; masks among them are left out, and that is told.

    Args:
      path: a file, or a folder.
      channels: of the network; if several, files `NAME_0000`, `NAME_0001`, ... are one scan.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: the masks of two scans would have the same name.
    """
    path = path if path.name not in ("", "..") else path.resolve()
    found = [path] if path.is_file() else _without_masks(list_scans(path))
    if not found:
        raise FileNotFoundError(f"{path}: no .nii or .nii.gz file there, nor NRRD, MetaImage or DICOM.")
    root = path.parent if found == [path] else path
    if channels > 1 and found == [path] and formats.stem(path).endswith("_0000"):
        found = [p for p in list_scans(root) if p.parent == root and _case(p) == _case(path)]
    groups = _by_case(found) if channels > 1 else {p: [p] for p in found}
    scans: dict[Path, Scan] = {}
    for case, paths in groups.items():
        # The folder itself can be a scan: one with DICOM slices, beside other scans.
        below = path.parent if paths == [path] else root
        scan = Scan(tuple(paths), _mask_name(case, paths[0]).relative_to(below))
        other = scans.setdefault(scan.mask, scan)
        if other != scan:
            raise ValueError(f"{scan.paths[0]}, {other.paths[0]}: the masks of both would be {scan.mask}; rename one.")
    return list(scans.values())


def _without_masks(found: list[Path]) -> list[Path]:
    """Without masks: those that `predict` wrote, named as a scan beside them, or in labels/ beside images/.

    All, where there is nothing else.
    """
    beside = {p.with_name(name) for p in found for name in (formats.stem(p), _case(p)) if name}

    def is_mask(path: Path) -> bool:
        name = formats.stem(path)
        scan = formats.without_mask_ending(name)
        folder = path.parent  # labels, labelsTr, ...
        images = folder.with_name(f"images{folder.name[6:]}") if folder.name.startswith("labels") else folder
        beside_scan = scan != name and path.with_name(scan) in beside
        return beside_scan or (images != folder and images.is_dir()) or nifti.is_our_mask(path)

    masks = {path: is_mask(path) for path in found}
    if not any(masks.values()) or all(masks.values()):
        return found
    first = next(path for path in found if masks[path])
    print(f"left out: {sum(masks.values())} masks, of scans beside them or written by predict, such as {first}")
    return [path for path in found if not masks[path]]


def _by_case(found: list[Path]) -> dict[Path, list[Path]]:
    """Groups `NAME_0000`, `NAME_0001`, ... under `NAME`; what has no such number, or no `_0000`, stays alone."""
    first = {p.with_name(_case(p) or p.name) for p in found if formats.stem(p).endswith("_0000")}
    groups: dict[Path, list[Path]] = {}
    for p in found:
        case = p.with_name(_case(p) or p.name)
        groups.setdefault(case if case in first else p, []).append(p)
    return groups


def list_scans(folder: Path) -> list[Path]:
    """Files that are scans, and folders that hold DICOM files, at and below `folder`; hidden ones are passed over."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        files = [p for p in paths if p.name.lower().endswith(formats.SUFFIXES)]
        if any(formats.is_dicom(p) for p in paths if p not in files):
            found.append(Path(place))
        found += files
    return sorted(found)


def _case(path: Path) -> str | None:
    """The name before `_0000`, `_0001`, ..., None if there is no such number."""
    match = re.fullmatch(r"(.+)_\d{4}", formats.stem(path))
    return match[1] if match else None


def _mask_name(case: Path, first: Path) -> Path:
    """Path of a mask beside its scan; `case` is the path of the scan, or that of all its channels."""
    ending = next((e for e in (".nii.gz", ".nii") if first.name.lower().endswith(e)), None)
    if case != first:
        return case.with_name(f"{case.name}{ending or '.nii.gz'}")
    return first if ending else first.with_name(f"{formats.stem(first)}.nii.gz")


def read_scan(paths: Sequence[Path], channels: int) -> tuple[np.ndarray, np.ndarray, nib.Nifti1Header]:
    """Reads a scan for a network of `channels`: (X, Y, Z, C), affine, header; of one channel, C counts the frames.

    Raises:
      ValueError: a file cannot be read, is not on the grid of the first, or the channels are not those trained on.
    """
    numbers, expected = [formats.stem(path)[-5:] for path in paths], [f"_{i:04d}" for i in range(channels)]
    if len(paths) > 1 and numbers != expected:
        raise ValueError(
            f"{paths[0]}: its channels are {', '.join(numbers)}, but the network was trained on {', '.join(expected)}."
        )
    read = functools.partial(formats.read_image, channels=True)
    image, affine, header = nifti.read_channels(paths, read)
    if channels > 1 and image.shape[-1] != channels:
        raise ValueError(f"{paths[0]}: {image.shape[-1]} channels, but the network was trained on {channels}.")
    return image, affine, header


class Prepared(NamedTuple):
    """A scan as a network takes it.

    Attributes:
      frames: (D, H, W, C) each; several of a 4-D scan for a one-channel network.
      grid: links them to the file.
      affine: (4, 4), of the file.
      header: of the file.
    """

    frames: list[np.ndarray]
    grid: recipes.Grid
    affine: np.ndarray
    header: nib.Nifti1Header


def read_prepared(network: experiment.Network, paths: Sequence[Path]) -> Prepared:
    """Reads a scan, and prepares it as the images were that the network was trained on.

    Args:
      network: from `experiment.load_networks`.
      paths: file or DICOM folder of the scan, or one for each channel.

    Raises:
      ValueError: the scan cannot be read, or has not the channels trained on; names the file.
    """
    channels = network.meta["channels"]
    image, affine, header = read_scan(paths, channels)
    try:
        grid = recipes.make_grid(image.shape[:3], affine, network.recipe)
    except ValueError as error:
        raise ValueError(f"{paths[0]}: {error}") from error
    frames = [image[..., i : i + 1] for i in range(image.shape[-1])] if channels == 1 else [image]
    return Prepared([recipes.prepare_image(frame, grid, network.recipe) for frame in frames], grid, affine, header)


def segment_scan(network: experiment.Network, predict: evaluate.Predictor, scan: Prepared, output: Path) -> None:
    """Segments a scan, frame by frame, and writes its mask.

    Args:
      network: from `experiment.load_networks`.
      predict: from `evaluate.make_predictor`.
      scan: from `read_prepared`.
      output: mask to write.
    """
    masks, largest = [], network.config.eval.largest_component
    for frame in scan.frames:
        classes, _ = evaluate.segment(predict, network.variables, frame, scan.grid, network.recipe, largest)
        masks.append(recipes.unmap_labels(classes, network.recipe.label_values))
    mask = masks[0] if len(masks) == 1 else np.stack(masks, axis=-1)
    nifti.write_mask(output, mask, scan.affine, scan.header)


class Corrected(Exception):
    """A mask that stays as it is, since it is not what `predict` wrote."""


def _check_replaceable(target: Path) -> None:
    """Lets only a mask be replaced that `predict` wrote and nobody changed. Raises ValueError, Corrected."""
    if not nifti.is_our_mask(target):
        raise ValueError(f"{target}: is no mask that predict wrote, so it stays; choose another --output.")
    if not nifti.is_unchanged_mask(target):
        raise Corrected(f"{target}: may have been corrected since predict wrote it")


class Outcome(NamedTuple):
    """What became of a scan: its mask, or why there is none, the seconds of work on it, and what was warned of."""

    scan: Scan
    mask: Path
    error: Exception | None
    seconds: float
    warned: list[str]


def predict_scans(
    network: experiment.Network, predict: evaluate.Predictor, scans: Sequence[Scan], output: Path
) -> Iterator[Outcome]:
    """Segments scans, in their order: one is read, resampled or written while the network is at work on another."""
    originals = {path.resolve() for scan in scans for path in scan.paths}

    def read(scan: Scan) -> tuple[Outcome, Prepared | None]:
        start, target = time.monotonic(), output / scan.mask
        prepared, error = None, None
        # It catches those of the whole process, so scans are read in this thread alone.
        with warnings.catch_warnings(record=True) as found:
            try:
                if target.resolve() in originals:
                    raise ValueError(f"{target}: the mask would replace a scan; choose another --output.")
                if target.is_file() and not target.is_symlink():
                    _check_replaceable(target)
                prepared = read_prepared(network, scan.paths)
            except Exception as raised:  # for its turn: the scans before it are not told yet
                error = raised
        warned = [str(each.message) for each in found]
        return Outcome(scan, target, error, time.monotonic() - start, warned), prepared

    def finish(item: tuple[Outcome, Prepared | None]) -> Outcome:
        outcome, prepared = item
        start, error = time.monotonic(), outcome.error
        if prepared:
            try:
                segment_scan(network, predict, prepared, outcome.mask)
            except Exception as raised:
                error = raised
        return outcome._replace(error=error, seconds=outcome.seconds + time.monotonic() - start)

    return workers.map_ahead(finish, map(read, scans), threads=2)


def _tell_doubts(paths: Sequence[Path], warned: Sequence[str]) -> None:
    """Prints what makes a mask doubtful, with the scan's name: what was warned of, and headers as the check does."""
    headers = [nifti.header_warning(p) for p in paths if p.is_file() and p.name.lower().endswith(formats.NIFTI)]
    for line in (line for line in (*warned, *headers) if line):
        named = line if any(str(p) in line for p in paths) else f"{paths[0]}: {line}"
        print(f"warning: {named}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `sscl-predict`."""
    parser = cli.make_parser("sscl_jax.predict", __doc__)
    parser.add_argument("--checkpoint", required=True, help="--workdir of a training")
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        help="a scan (NIfTI, NRRD, MetaImage, folder of a DICOM series), or a folder of scans (searched in depth)",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the masks")
    parser.add_argument("--network", default="teacher", choices=["teacher", "student"], help="default: teacher")
    parser.add_argument("--kind", default="best", choices=["best", "last"], help="best on val (default), or last")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="least overlap of windows, in [0, 1) (default 0.5)",
    )
    args = cli.parse(parser, argv)
    if not 0 <= args.overlap < 1:
        parser.error(f"--overlap={args.overlap}: must lie in [0, 1)")
    parallel.keep_memory()
    try:
        network = experiment.load_networks(Path(args.checkpoint), args.kind)[args.network]
        scans = find_scans(args.input, network.meta["channels"])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    predict = evaluate.make_predictor(network.model, tuple(network.config.data.patch_size), args.overlap)
    print(f"{network.path}, {network.name}: {len(scans)} scan(s)")
    failed = 0
    for outcome in predict_scans(network, predict, scans, args.output):
        try:
            if outcome.error:
                raise outcome.error
            print(f"{outcome.mask}  {outcome.seconds:.2f} s", flush=True)
            _tell_doubts(outcome.scan.paths, outcome.warned)
        except Corrected as kept:
            print(f"kept: {kept}", flush=True)
        except Exception as error:  # whatever it is, the other scans can still be segmented
            if os.environ.get("SSCL_TRACEBACK"):
                raise
            failed += 1
            told = " ".join(str(error).split())
            if not isinstance(error, (ValueError, OSError)):  # these name the file
                kind = "out of memory" if parallel.out_of_memory(error) else type(error).__name__
                told = f"{outcome.scan.paths[0]}: {kind}: {told}"
            print(f"error: {told}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"error: {failed} of {len(scans)} scans could not be segmented; the reasons are above.")


if __name__ == "__main__":
    main()
