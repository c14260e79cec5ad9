"""Kills trainings and preparations over and over, and compares what they end in with what was never stopped.

    python benchmarks/kill.py --kills=100 --output=DIR

Draws tiny phantoms, prepares them and trains on them twice, undisturbed. Then the same commands are started again and
again, as a user types them, and killed (SIGKILL, the whole process group) at moments drawn from --seed: a share of them
at any time, a share while a checkpoint is being written, a share while a prepared dataset is. Each training is resumed
until it ends, then compared: student, teacher, optimiser, step, the best-so-far figures, the best checkpoint, the
tables of val; and the rows of metrics.csv, apart from times. Prints where the kills fell, by the Python stack at that
moment, and what came next; exit status 1 if anything differs, or a start ends in an error. CPU only. DIR must be new.
"""

import argparse
import csv
import functools
import gzip
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import nibabel
import numpy as np

from configs import phantom as phantom_config
from data_prep import phantom
from sscl_jax import experiment
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.data.prepared import open_prepared

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "images_per_s")  # columns of metrics.csv that no two runs share
# Rows, saves and evaluations fall on different steps, so that metrics wait for their row when a checkpoint is written.
FIELDS = {
    "data.patch_size": (32, 32), "data.labeled_batch": 2, "data.unlabeled_batch": 2, "model.widths": (8, 16),
    "contrast.num_queries": 4, "steps": 72, "log_every": 2, "save_every": 3, "eval.every": 20, "eval.test": False,
}  # fmt: skip
OUR_SIGNALS = (-signal.SIGKILL, -signal.SIGUSR1)  # the second, where it comes before Python is up
# Where a kill fell, by what is found in the stack; the first that fits.
PLACES = {
    "checkpoint write": r'checkpoint\.py", line \d+ in save',
    "final tables": "in _final_tables",
    "evaluation": "in evaluate_cases|in write_overlays",
    "prepare: records": "in _write_records|in file_digests|in examine",
    "prepare: cache": "in _fill_cache",
    "prepare: other": r"data_prep/|sscl_jax/data/prepared\.py",
}
# Python imports a module of this name when it starts; SIGUSR1 then writes the stack of the main thread.
TELLS_STACK = """
import faulthandler, os, signal
faulthandler.register(signal.SIGUSR1, open(os.environ["STACK"], "w"), all_threads=False)
"""


class Killer:
    """Starts commands, kills them, and keeps count.

    Attributes:
      kills: how many fell where.
      then: for each place, what the next start did.
      half: kills that left a half-written checkpoint.
      findings: what went wrong, one line each.
    """

    def __init__(self, folder: Path):
        self.folder, self.stack = folder, folder / "stack.txt"
        (folder / "stack").mkdir()
        (folder / "stack" / "sitecustomize.py").write_text(TELLS_STACK)
        path = os.pathsep.join([str(folder / "stack"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.env = os.environ | {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "STACK": str(self.stack),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.kills: Counter[str] = Counter()
        self.then: Counter[tuple[str, str]] = Counter()
        self.half, self.starts = 0, 0
        self.findings: list[str] = []
        self._unanswered: list[str] = []  # places of the kills since a start last came as far as to say what it does

    def start(self, words: list[str], log: Path) -> subprocess.Popen:
        """Starts `python -m` with `words`, in a process group of its own."""
        self.starts += 1
        self.stack.write_text("")
        with open(log, "w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *words], cwd=ROOT, env=self.env, stdout=file, stderr=file, start_new_session=True
            )

    def kill(self, process: subprocess.Popen) -> str:
        """Kills the process group; the stack of that moment, "" if Python was not up yet, or not any more."""
        process.send_signal(signal.SIGUSR1)
        patience = time.monotonic() + 0.1
        stack = ""
        while not re.search(r"_run_module_as_main\n|  \.\.\.\n", stack) and time.monotonic() < patience:
            stack = self.stack.read_text()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        return stack

    def count(self, where: str) -> None:
        """Takes note of a kill."""
        self.kills[where] += 1
        self._unanswered.append(where)

    def answer(self, what: str) -> None:
        """Takes note of what the start after the last kills did."""
        self.then.update((where, what) for where in self._unanswered)
        self._unanswered.clear()


def new_folder(parser: argparse.ArgumentParser, path: Path) -> Path:
    """Makes the folder of `--output`, which must not be there yet; ends with one line if it cannot."""
    folder = path.resolve()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many (default 100)")
    parser.add_argument("--output", required=True, type=Path, help="folder for all that is written; must be new")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    folder = new_folder(parser, args.output)
    killer, rng = Killer(folder), np.random.default_rng(args.seed)

    write_scans(folder / "scans")
    prepare = ["data_prep.acdc", f"--input={folder / 'scans'}", "--spacing=6"]
    begin = time.monotonic()
    undisturbed(killer, [*prepare, f"--output={folder / 'prepared'}"], folder / "prepare.log")
    to_prepare = time.monotonic() - begin
    flags = [f"--config.{name}={value}" for name, value in {"data.path": folder / "prepared", **FIELDS}.items()]
    train = ["sscl_jax.main", f"--config={ROOT / 'configs/phantom.py'}", *flags]
    for name in ("first", "whole"):  # the first one compiles
        begin = time.monotonic()
        undisturbed(killer, [*train, f"--workdir={folder / name}"], folder / f"{name}.log")
        to_train = time.monotonic() - begin
    killer.findings += compare(folder / "first", folder / "whole", folder / "prepared")
    print(f"undisturbed, preparing takes {to_prepare:.1f} s and training {to_train:.1f} s", flush=True)

    of_prepare = max(1, args.kills // 6)
    preparations = trainings = 0
    while killer.kills.total() < of_prepare:
        preparations += 1
        kill_preparation(killer, rng, prepare, folder / f"prepared{preparations}", of_prepare, to_prepare)
        killer.findings += compare_prepared(folder / f"prepared{preparations}", folder / "prepared")
    while killer.kills.total() < args.kills:
        trainings += 1
        workdir = folder / f"run{trainings}"
        if kill_training(killer, rng, [*train, f"--workdir={workdir}"], workdir, args.kills, to_train):
            killer.findings += compare(workdir, folder / "whole", folder / "prepared")
        print(f"{killer.kills.total()} kills, {trainings} trainings, {len(killer.findings)} findings", flush=True)

    print(f"\n{'where':<20}{'kills':>6}   the next start")
    for where, number in killer.kills.most_common():
        told = ", ".join(f"{what}: {n}" for (place, what), n in sorted(killer.then.items()) if place == where)
        print(f"{where:<20}{number:>6}   {told}")
    print(f"{killer.half} half-written checkpoints; {killer.starts} starts")
    print(f"{trainings} trainings and {preparations} preparations came to their end; findings: {len(killer.findings)}")
    for line in killer.findings:
        print(f"  {line}")
    sys.exit(bool(killer.findings))


def write_scans(folder: Path, val: int = 1) -> None:
    """Phantoms of every fourth voxel: what is measured on the files' own grid then takes little time."""
    phantom.generate(folder, patients=4, val=val, test=1)
    for path in folder.rglob("*.nii.gz"):
        image = nibabel.load(path).slicer[::4, ::4]
        path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def undisturbed(killer: Killer, words: list[str], log: Path) -> None:
    if killer.start(words, log).wait():
        sys.exit(f"error: {' '.join(words)} failed:\n{log.read_text()}")


def kill_preparation(
    killer: Killer, rng: np.random.Generator, words: list[str], output: Path, kills: int, seconds: float
) -> None:
    """Prepares into `output`, killed over and over until it is through, or `kills` is reached and it is left alone."""
    log = output.with_suffix(".log")
    while True:
        process = killer.start([*words, f"--output={output}"], log)
        if killer.kills.total() < kills:
            if rng.random() < 0.5:  # as soon as something is written, or is there and its cache is made
                wait(process, seconds, lambda: any(output.parent.glob(f".{output.name}.partial-*")) or output.exists())
                wait(process, rng.uniform(0, 0.4 * seconds))
            else:
                wait(process, rng.uniform(0, seconds))
        else:
            process.wait()
        stack = killer.kill(process) if process.poll() is None else ""
        if process.returncode not in OUR_SIGNALS:
            break
        killer.count(place(stack, "prepare: start-up"))
    killer.answer("came to its end")
    if process.returncode:
        killer.findings.append(f"{output.name}: status {process.returncode}: {log.read_text().splitlines()[-1:]}")


def kill_training(
    killer: Killer, rng: np.random.Generator, words: list[str], workdir: Path, kills: int, seconds: float
) -> bool:
    """The same for a training; True if it came to its end."""
    log = workdir.with_suffix(".log")
    while True:
        written = functools.partial(half_written, workdir, half_written(workdir))
        process = killer.start(words, log)
        if killer.kills.total() < kills:
            kind = rng.random()
            if kind < 0.3:
                wait(process, rng.uniform(0, 0.6 * seconds))
            elif kind < 0.65:  # in one of the next checkpoints that are written
                for _ in range(rng.integers(4)):
                    wait(process, 10 * seconds, written)
                    wait(process, 10 * seconds, lambda written=written: not written())
                wait(process, 10 * seconds, written)
                wait(process, rng.uniform(0, 0.1))
            else:
                wait(process, 10 * seconds, lambda: "\nstep " in log.read_text())
                wait(process, rng.uniform(0, 0.2 * seconds))
        else:
            process.wait()
        stack = killer.kill(process) if process.poll() is None else ""
        text = log.read_text()
        if "cannot be read" in text:
            killer.findings.append(f"{workdir.name}: a kill damaged a checkpoint: {text}")
        if "goes on from step" in text:
            killer.answer("went on")
        elif "process(es)" in text:
            killer.answer("began anew")
        if process.returncode not in OUR_SIGNALS:
            break
        later = "final tables" if "trained for" in text else "training" if "\nstep " in text else "start-up"
        killer.count(place(stack, later))
        killer.half += bool(written())
    if process.returncode:
        killer.findings.append(f"{workdir.name}: status {process.returncode}: {text.splitlines()[-1:]}")
    return process.returncode == 0


def half_written(workdir: Path, besides: Collection[Path] = ()) -> set[Path]:
    """Checkpoints that are being written, or that a kill left so."""
    return set(workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp*")).difference(besides)


def wait(process: subprocess.Popen, seconds: float, until: Callable[[], object] = bool) -> None:
    """Until the time is over, the process has ended or the condition holds."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not until():
        time.sleep(0.002)


def place(stack: str, otherwise: str) -> str:
    return next((name for name, mark in PLACES.items() if re.search(mark, stack)), otherwise)


def compare(workdir: Path, other: Path, prepared: Path) -> list[str]:
    """What differs between two trainings, one line each."""
    config, dataset = phantom_config.get_config(), open_prepared(prepared)
    config.update_from_flattened_dict(FIELDS)
    empty = experiment.empty_state(config, dataset.num_classes, dataset.channels)
    found = []
    for kind in ("last", "best"):
        (state, meta), (wanted, wanted_meta) = (
            Checkpoints(folder, kind).restore(empty, set_aside=False) for folder in (workdir, other)
        )
        leaves, others = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, wanted))
        if len(leaves) != len(others):
            found.append(f"{kind}: {len(leaves)} arrays, not {len(others)}")
        for (name, a), (_, b) in zip(leaves, others, strict=False):
            if np.asarray(a).dtype != np.asarray(b).dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes():
                found.append(f"{kind}{jax.tree_util.keystr(name)}")
        found += [f"{kind}: {n}" for n in ("best", "pending", "unpredicted") if meta[n] != wanted_meta[n]]
    if rows(workdir) != rows(other):
        found.append("metrics.csv")
    if (workdir / "val_cases.csv").read_bytes() != (other / "val_cases.csv").read_bytes():
        found.append("val_cases.csv")
    return [f"{workdir.name} differs from {other.name}: {name}" for name in found]


def rows(workdir: Path) -> list[dict[str, str]]:
    with open(workdir / "metrics.csv", newline="") as file:
        return [{name: v for name, v in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def compare_prepared(output: Path, other: Path) -> list[str]:
    """What differs between two prepared datasets, and what the killed ones left beside them."""
    found = [f"{path.name} is left" for path in output.parent.glob(f".{output.name}.partial-*")]
    found += [f"{path.name} is left" for path in output.glob(".*")]
    if open_prepared(output).fingerprint != open_prepared(other).fingerprint:
        found.append("fingerprint")
    for path in (other / "cache").iterdir():
        if path.read_bytes() != (output / "cache" / path.name).read_bytes():
            found.append(f"cache/{path.name}")
    return [f"{output.name}: {name}" for name in found]


if __name__ == "__main__":
    main()
