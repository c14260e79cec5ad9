"""Segments new scans with a trained network.

    python -m sscl_jax.predict --checkpoint=runs/acdc --input=DIR_OR_FILE --output=DIR

A mask has the file name, geometry and label values of its scan. Exit status 1 if any scan could not be segmented.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sscl_jax import evaluate, experiment
from sscl_jax.data import nifti
from sscl_jax.data import recipe as recipes


def find_scans(path: Path) -> list[Path]:
    """NIfTI files: the file itself, or all below a folder, sorted.

    Raises:
      FileNotFoundError: nothing there.
    """
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.name.endswith((".nii", ".nii.gz")) and p.is_file())
    if not found:
        raise FileNotFoundError(f"{path}: no .nii or .nii.gz file there.")
    return found


def predict_file(network: experiment.Network, predict: evaluate.Predictor, scan: Path, output: Path) -> None:
    """Segments one scan; a 4-D scan of a one-channel network is segmented frame by frame.

    Args:
      network: from `experiment.load_networks`.
      predict: from `evaluate.make_predictor`.
      scan: NIfTI file.
      output: mask to write.

    Raises:
      ValueError: the scan cannot be read, or has not the channels trained on; names the file.
    """
    image, affine, header = nifti.read_image(scan, channels=True)
    grid = recipes.make_grid(image.shape[:3], affine, network.recipe)
    channels = network.meta["channels"]
    if channels == 1:
        frames = [image[..., i : i + 1] for i in range(image.shape[-1])]
    elif image.shape[-1] == channels:
        frames = [image]
    else:
        raise ValueError(f"{scan}: {image.shape[-1]} channels, but the network was trained on {channels}.")
    masks = []
    for frame in frames:
        prepared = recipes.prepare_image(frame, grid, network.recipe)
        largest = network.config.eval.largest_component
        classes = evaluate.segment(predict, network.variables, prepared, grid, network.recipe, largest)
        masks.append(recipes.unmap_labels(classes, network.recipe.label_values))
    mask = masks[0] if len(masks) == 1 else np.stack(masks, axis=-1)
    nifti.write_mask(output, mask, affine, header)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `sscl-predict`."""
    parser = argparse.ArgumentParser(prog="sscl_jax.predict", description="Segments scans with a trained network.")
    parser.add_argument("--checkpoint", required=True, help="--workdir of a training")
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        help="a NIfTI file, or a folder of them (searched in depth)",
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
    args = parser.parse_args(argv)
    if not 0 <= args.overlap < 1:
        parser.error(f"--overlap={args.overlap}: must lie in [0, 1)")
    try:
        scans = find_scans(args.input)
        network = experiment.load_networks(Path(args.checkpoint), args.kind)[args.network]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    predict = evaluate.make_predictor(network.model, tuple(network.config.data.patch_size), args.overlap)
    print(f"{network.path}, {network.name}: {len(scans)} scan(s)")
    root = args.input if args.input.is_dir() else args.input.parent
    failed = 0
    for scan in scans:
        start = time.monotonic()
        target = args.output / scan.relative_to(root)
        try:
            if target.resolve() == scan.resolve():
                raise ValueError(f"{scan}: the mask would replace the scan; choose another --output.")
            predict_file(network, predict, scan, target)
            print(f"{target}  {time.monotonic() - start:.2f} s", flush=True)
        except (ValueError, OSError) as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"error: {failed} of {len(scans)} scans could not be segmented; the reasons are above.")


if __name__ == "__main__":
    main()
