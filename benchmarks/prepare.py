"""Time and memory of preparing many volumes, and of going on after a kill.

    python benchmarks/prepare.py --cases=300 --shape 96 96 12 [--kill] [--processes=2 | --beam_options=...]

Draws random volumes with masks into a temporary folder (--folder: under that one) and prepares them with
`data_prep.folder`, which gets the last two options. --kill: the same again into another folder, killed (SIGKILL) when
half of the cases are kept, started again, and compared, byte for byte. Memory, every 50 ms: what the process has for
itself (RssAnon) and its resident set (VmRSS), which counts pages of memory-mapped files that the system can take back.
"""

import argparse
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from common import positive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=positive, default=300)
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 96, 12))
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path)
    args, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        draw(folder / "scans", args.cases, args.shape)
        print(f"{args.cases} volumes of {' x '.join(map(str, args.shape))} voxels, float32 in all {size(args):.0f} MB")
        run(folder, "undisturbed", others)
        if not args.kill:
            return
        run(folder, "killed", others, lambda: len(list(folder.glob(".killed.*-cases/*.npz"))) >= args.cases / 2)
        run(folder, "killed", others)
        same = files(folder / "killed") == files(folder / "undisturbed")
        left = [path.name for path in folder.glob(".*")]
        print(f"the same bytes: {same}; left over: {left or 'nothing'}")
        sys.exit(not same or bool(left))


def size(args: argparse.Namespace) -> float:
    return args.cases * np.prod(args.shape) * 4 / 1e6


def draw(folder: Path, cases: int, shape: tuple[int, int, int]) -> None:
    random, affine = np.random.default_rng(0), np.diag([1.0, 1.0, 5.0, 1.0])
    noise = random.normal(1000, 100, shape)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(cases):
        image = np.roll(noise, int(random.integers(noise.size)))
        image[tuple(random.integers(shape))] = number
        for kind, array in (("images", image.astype("i2")), ("labels", (image > 1000).astype("u1"))):
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / kind / f"p{number:05d}.nii.gz")


def run(folder: Path, output: str, options: list[str], until: Callable[[], bool] | None = None) -> None:
    """Prepares to `folder / output`, killed as soon as `until` says so, and prints what it took; ends if it fails."""
    words = ["-m", "data_prep.folder", f"--input={folder / 'scans'}", f"--output={folder / output}", *options]
    begin, before = time.monotonic(), processor()
    log = folder / f"{output}.log"
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, text=True)
    peaks: dict[str, list[float]] = {}
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            who = "process" if pid == process.pid else "worker"
            peaks[who] = [max(pair) for pair in zip(memory(pid), peaks.get(who, [0, 0]), strict=True)]
        if until and until():
            process.kill()
        time.sleep(0.05)
    seconds = f"{time.monotonic() - begin:.1f} s, {processor() - before:.1f} s of processors"
    text = process.stdout.read() if process.stdout else ""
    if until and process.returncode == 0:
        sys.exit(f"{output}: done before it was killed; choose more --cases")
    if process.returncode != (-signal.SIGKILL if until else 0):
        sys.exit(f"{output}: status {process.returncode}; {log.read_text(encoding='utf-8').strip()}")
    taken = [line.split(": ", 1)[1] for line in text.splitlines() if "were prepared before" in line]
    used = ", ".join(f"{who} {own:.0f} MiB (resident {resident:.0f})" for who, (own, resident) in peaks.items())
    print(f"{output}, status {process.returncode}: {seconds}; {used}", *taken, sep="; ", flush=True)


def processor() -> float:
    """Seconds that processes which have ended took of all processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [child for each in map(int, found) for child in (each, *children(each))]


def memory(pid: int) -> tuple[float, float]:
    """RssAnon and VmRSS, MiB; 0 for a process that has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return 0.0, 0.0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
