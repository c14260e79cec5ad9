"""How fast whole volumes are read, prepared, segmented and measured.

    pip install -e '.[test]'    # it has MedPy
    python benchmarks/volumes.py --acdc=DIR [--checkpoint=runs/acdc]

DIR is ACDC's archive, or phantoms in its layout. Printed: plain reading with nibabel in one process; `data_prep.acdc`
as a user runs it, with its peak memory; prediction from file to file, with the network loaded and compiled; HD95 and
ASSD of three classes on 10 x 256 x 216 voxels against MedPy, by turns. Times are the least of the repeats.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from common import positive
from medpy.metric import binary as medpy

from sscl_jax import evaluate, experiment, metrics, parallel, predict
from sscl_jax.data.prepared import open_prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acdc", required=True, type=Path, help="folder with training/")
    parser.add_argument("--checkpoint", type=Path, help="--workdir of a training: measure prediction too")
    parser.add_argument("--repeats", type=positive, default=3)
    args = parser.parse_args()
    parallel.keep_memory()
    labels = sorted(args.acdc.rglob("*_gt.nii.gz"))
    if not labels:
        parser.error(f"--acdc={args.acdc}: there is no *_gt.nii.gz in it")
    images = [path.with_name(path.name.replace("_gt", "")) for path in labels]
    reading(images, labels, args.acdc, args.repeats)
    if args.checkpoint:
        prediction(images[:20], args.checkpoint, args.repeats)
    distances(args.repeats)


def least(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Seconds of each function, the least of some turns."""
    seconds = []
    for _ in range(repeats):
        for function in functions:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[i :: len(functions)]) for i in range(len(functions))]


def reading(images: list[Path], labels: list[Path], acdc: Path, repeats: int) -> None:
    prepared: list[int] = []

    def plain():
        for path in images + labels:
            np.asanyarray(nibabel.load(path).dataobj)

    def prepare():
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "data_prep.acdc", f"--input={acdc}", f"--output={folder}/prepared", "--spacing=2"]
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            prepared.append(len(open_prepared(Path(folder) / "prepared").cases))  # the split may leave some out

    one, other = least(repeats, plain, prepare)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"nibabel, one process    {len(images) / one:7.1f} volumes/s (image and label; {one:.2f} s)")
    print(f"prepare                 {prepared[0] / other:7.1f} volumes/s ({other:.2f} s, peak memory {peak:.2f} GiB)")


def prediction(images: list[Path], checkpoint: Path, repeats: int) -> None:
    network = experiment.load_networks(checkpoint)["teacher"]
    scans = [predict.Scan((path,), Path(path.name)) for path in images]
    for overlap in (0.5, 0.1):
        predictor = evaluate.make_predictor(network.model, tuple(network.config.data.patch_size), overlap)
        with tempfile.TemporaryDirectory() as folder:

            def run(predictor=predictor, folder=folder):
                for outcome in predict.predict_scans(network, predictor, scans, Path(folder)):
                    assert not outcome.error, outcome.error

            run()
            (seconds,) = least(repeats, run)
        print(f"predict, overlap {overlap}    {len(images) / seconds:7.1f} volumes/s, file to file")


def distances(repeats: int) -> None:
    spacing = (10.0, 1.4, 1.4)
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip((10, 256, 216), spacing, strict=True)), indexing="ij")

    def rings(centre):
        radius = np.sqrt((y - centre[0]) ** 2 + (x - centre[1]) ** 2 + (0.6 * (z - 45)) ** 2)
        return np.select([radius < 25, radius < 36, radius < 50], [3, 2, 1], 0).astype(np.uint8)

    predicted, reference = rings((180, 150)), rings((184, 153))
    pairs = [(predicted == c, reference == c) for c in (1, 2, 3)]

    def ours():
        return metrics.case_metrics(predicted, reference, 4, spacing)

    def theirs():
        return [(medpy.hd95(p, r, spacing), medpy.assd(p, r, spacing)) for p, r in pairs]

    measured = ours()
    np.testing.assert_allclose(np.stack([measured.hd95, measured.assd], 1), theirs(), rtol=1e-6)
    one, other = least(repeats, ours, theirs)
    times = f"{1e3 * one:.0f} ms against {1e3 * other:.0f} ms"
    print(f"HD95 and ASSD           {other / one:7.1f} x as fast as MedPy ({times})")


if __name__ == "__main__":
    main()
