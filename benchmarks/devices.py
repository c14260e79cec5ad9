"""Trains on one number of devices and processes, goes on with another, and compares the ends. Kills one of several.

    python benchmarks/devices.py --output=DIR [--kills=4]

Draws tiny phantoms, prepares them and trains on them, as a user types it, 8 labelled and 16 unlabelled images a step:
on 1, 2, 4 and 8 simulated devices, and in 2 and 4 processes of 1 or 2 devices. Then every training is taken up again
from its middle on other numbers: each number of devices on each other one, and processes to and from one device. For
each prints how far it is from one device that was never stopped, as relative differences: all weights of student and
teacher (norm of the difference to norm), the worst of their arrays (greatest difference to greatest value), over all
steps the worst term of the loss and the norm of the gradient, and the ASSD of all val and test cases (so short a
training has no Dice yet). The cases must all be there: 6 and 2, so unequal shares, and fewer cases than processes. A
batch that does not divide must be refused before anything is written.

Last, of 4 processes that train one is killed (SIGKILL), over and over, in turn another one: prints how long the others
took to end, with which status and line; then the same commands go on. Exit status 1 if the weights differ by more than
a thousandth, a case is missing, or the others do not end within 90 s. CPU only. DIR must be new.
"""

import argparse
import csv
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from kill import ROOT, new_folder, write_scans

from configs import phantom as phantom_config
from sscl_jax import experiment
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.data.prepared import open_prepared
from sscl_jax.train import TERMS

STEPS = 12
FIELDS = {
    "data.patch_size": (32, 32), "data.labeled_batch": 8, "data.unlabeled_batch": 16, "model.widths": (4, 8),
    "contrast.num_queries": 4, "contrast.num_keys": 4, "contrast.threshold": 0.5,
    "pseudo_label.threshold": 0.5, "optimizer.warmup_steps": 4, "ramp": 1 / 3,
    "steps": STEPS, "log_every": 1, "save_every": STEPS // 2, "eval.every": STEPS,
}  # fmt: skip
CASES = {"val": 6, "test": 2}
DEVICES = [(1, 1), (1, 2), (1, 4), (1, 8)]  # processes, devices of each
PROCESSES = [(2, 1), (2, 2), (4, 1), (4, 2)]
ONE = DEVICES[0]
TOLERANCE = 1e-3
PATIENCE = 90  # seconds; jax takes a process for dead that is not heard of for 60

Layout = tuple[int, int]


class Trainings:
    """Starts trainings of several processes in `folder`, which holds `prepared`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, layout: Layout, name: str, **fields: object) -> list[subprocess.Popen]:
        """Starts the processes of one training; each writes what it says to NAME.PROCESS.log."""
        processes, devices = layout
        # Optimised code takes XLA four times as long to compile.
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        values = {"data.path": self.folder / "prepared", **FIELDS, **fields}
        words = [sys.executable, "-m", "sscl_jax.main", f"--config={ROOT / 'configs/phantom.py'}"]
        words += [f"--workdir={self.folder / name}", *(f"--config.{n}={value}" for n, value in values.items())]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                words += [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--num_processes={processes}"]
        started = []
        for i in range(processes):
            with open(self.log(name, i), "w") as file:
                own = [*words, f"--process_id={i}"] if processes > 1 else words
                env = self.env | {"XLA_FLAGS": flags}
                started.append(subprocess.Popen(own, cwd=ROOT, env=env, stdout=file, stderr=file))
        return started

    def log(self, name: str, process: int) -> Path:
        return self.folder / f"{name}.{process}.log"

    def run(self, layout: Layout, name: str) -> None:
        """Trains to the end."""
        for i, process in enumerate(self.start(layout, name)):
            if process.wait():
                sys.exit(f"error: {name}, process {i}: status {process.returncode}:\n{self.log(name, i).read_text()}")

    def result(self, name: str) -> tuple[list[np.ndarray], np.ndarray, dict[tuple[str, ...], float]]:
        """Weights of student and teacher, losses (steps, terms), and ASSD by split, network, case and class."""
        config, dataset = phantom_config.get_config(), open_prepared(self.folder / "prepared")
        config.update_from_flattened_dict(FIELDS)
        empty = experiment.empty_state(config, dataset.num_classes, dataset.channels)
        restored = Checkpoints(self.folder / name, "last").restore(empty, set_aside=False)
        assert restored is not None and int(restored[0].step) == STEPS
        state = restored[0]
        with open(self.folder / name / "metrics.csv", newline="") as file:
            losses = np.array([[float(row[n]) for n in TERMS if row[n]] for row in csv.DictReader(file)])
        distances = {}
        for split in CASES:
            with open(self.folder / name / f"{split}_cases.csv", newline="") as file:
                for row in csv.DictReader(file):
                    distances[split, row["network"], row["case"], row["class"]] = float(row["assd_mm"])
        return jax.tree.leaves((state.student, state.teacher)), losses, distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="processes to kill (default 4: each of 4 once)")
    parser.add_argument("--output", required=True, type=Path, help="folder for all that is written; must be new")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    folder = new_folder(parser, args.output)
    trainings = Trainings(folder)
    write_scans(folder / "scans", val=CASES["val"] // 2)
    prepare = ["data_prep.acdc", f"--input={folder / 'scans'}", f"--output={folder / 'prepared'}", "--spacing=6"]
    with open(folder / "prepare.log", "w") as file:
        subprocess.run(
            [sys.executable, "-m", *prepare], cwd=ROOT, env=trainings.env, stdout=file, stderr=file, check=True
        )

    findings = refused(trainings, [(1, 3), (3, 1), (1, 16)])
    columns = ("weights", "an array", "losses", "gradient", "ASSD")
    print(f"\n{'first half':<12}{'second half':<12}" + "".join(f"{column:>10}" for column in columns) + "  cases")
    for layout in (*DEVICES, *PROCESSES):
        trainings.run(layout, name_of(layout))
        findings += compare(trainings, layout, layout, name_of(layout))
    crossed = [*itertools.permutations(DEVICES, 2), *((ONE, p) for p in PROCESSES), *((p, ONE) for p in PROCESSES)]
    for first, second in crossed:
        name = f"{name_of(first)}_then_{name_of(second)}"
        take_up(folder / name_of(first), folder / name)
        trainings.run(second, name)
        findings += compare(trainings, first, second, name)
    findings += kill_one_of_four(trainings, args.kills)
    print(f"\nfindings: {len(findings)}", *findings, sep="\n  ")
    sys.exit(bool(findings))


def name_of(layout: Layout) -> str:
    """`4` devices, or `2x4`: processes and devices of each."""
    processes, devices = layout
    return f"{processes}x{devices}" if processes > 1 else f"{devices}"


def refused(trainings: Trainings, layouts: Iterable[Layout]) -> list[str]:
    """Tries what does not divide."""
    findings = []
    for layout in layouts:
        name = f"refused_{name_of(layout)}"
        statuses = [process.wait() for process in trainings.start(layout, name)]
        last = trainings.log(name, 0).read_text().splitlines()[-1]
        print(f"{name_of(layout)} devices: status {statuses}: {last}", flush=True)
        if set(statuses) != {1} or "does not divide" not in last or (trainings.folder / name).exists():
            findings.append(f"{name}: not refused, or not in time")
    return findings


def take_up(whole: Path, workdir: Path) -> None:
    """Copies a training as it was at its middle."""
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "last" / str(STEPS))
    shutil.rmtree(workdir / "checkpoints" / "best")


def compare(trainings: Trainings, first: Layout, second: Layout, name: str) -> list[str]:
    """Prints a row of the table; how far a training is from the one on one device."""
    weights, losses, distances = trainings.result(name)
    wanted, wanted_losses, wanted_distances = trainings.result(name_of(ONE))
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(weights, wanted, strict=True))
    one, other = (np.concatenate([array.ravel() for array in arrays]) for arrays in (weights, wanted))
    apart = np.linalg.norm(one - other) / np.linalg.norm(other)
    *of_losses, of_gradient = np.max(np.abs(losses - wanted_losses) / wanted_losses, axis=0)
    of_distances = max(abs(distances[key] / value - 1) for key, value in wanted_distances.items() if key in distances)
    cases = {split: len({key[2] for key in distances if key[0] == split}) for split in CASES}
    print(
        f"{name_of(first):<12}{name_of(second):<12}{apart:>10.1e}{worst:>10.1e}{max(of_losses):>10.1e}"
        f"{of_gradient:>10.1e}{of_distances:>10.1e}  {' + '.join(map(str, cases.values()))}",
        flush=True,
    )
    findings = [f"{name}: cases {cases}"] if cases != CASES or distances.keys() != wanted_distances.keys() else []
    if not apart < TOLERANCE:
        findings.append(f"{name}: weights differ by {apart:.1e}")
    return findings


def kill_one_of_four(trainings: Trainings, kills: int) -> list[str]:
    """Kills one of four processes while they train, and starts them again, `kills` times; then stops them."""
    findings, rng, rows = [], np.random.default_rng(0), 0
    table = trainings.folder / "killed" / "metrics.csv"
    print("\nSIGKILL of one of 4 processes", flush=True)
    for kill in range(kills + 1):
        processes = trainings.start((4, 1), "killed", steps=10**5, **{"eval.every": 10**5})
        while all(p.poll() is None for p in processes):
            if table.exists() and len(table.read_text().splitlines()) > rows + STEPS:  # and so saved since
                break
            time.sleep(0.02)
        ended = [p for p in processes if p.poll() is not None]
        if ended:
            findings.append(f"killed, start {kill}: a process ended by itself with status {ended[0].returncode}")
        time.sleep(rng.uniform(0, 0.5))
        if kill == kills:
            processes[0].send_signal(signal.SIGTERM)
            statuses = [process.wait() for process in processes]
            print(f"  SIGTERM to one: status {statuses}", flush=True)
            findings += ["killed: did not stop"] if set(statuses) != {128 + signal.SIGTERM} else []
            break
        victim = kill % 4
        processes[victim].kill()
        begin, left = time.monotonic(), {i: p for i, p in enumerate(processes) if i != victim}
        while left and time.monotonic() < begin + PATIENCE:
            for i in [i for i, p in left.items() if p.poll() is not None]:
                lines = trainings.log("killed", i).read_text().splitlines()
                told = next((line for line in lines if line.startswith("error: ")), "ended by jax")
                seconds, status = time.monotonic() - begin, left.pop(i).returncode
                print(f"  process {victim} killed: {i} ended {seconds:.1f} s later, {status}: {told[:60]}", flush=True)
            time.sleep(0.02)
        findings += [f"process {victim} killed: {i} did not end" for i in left]
        for process in left.values():
            process.kill()
        rows = len(table.read_text().splitlines())
    return findings


if __name__ == "__main__":
    main()
