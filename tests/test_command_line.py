"""Whole runs in processes of their own, as a user types them."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import pytest

from sscl_jax.checkpoint import Checkpoints

pytestmark = pytest.mark.end_to_end
ROOT = Path(__file__).parents[1]


def command(module, *arguments, devices=1, largest_file="unlimited"):
    """Starts `python -m module`; no file that it writes may be larger than `largest_file` KiB."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
    limited = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash"]
    words = [*limited, sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out, err


def train(data, workdir, *more, method="anatomical_pl", **how):
    fields = {
        "data.path": data, "data.patch_size": "(32, 32)", "data.labeled_batch": 2, "data.unlabeled_batch": 4,
        "model.widths": "(8, 16)", "steps": 40, "log_every": 5, "save_every": 20, "eval.every": 20,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config=configs/phantom.py:{method}"
    return command("sscl_jax.main", config, f"--workdir={workdir}", *flags, *more, **how)


def wait_for(path, process, rows=1):
    """Until `path` holds so many rows under its header, or the process ends."""
    while process.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) > rows):
        time.sleep(0.02)


def test_stop_on_two_devices_go_on_with_one_then_predict_and_evaluate(phantom_data, phantom_scans, tmp_path):
    workdir = tmp_path / "run"
    process = train(phantom_data, workdir, devices=2)
    wait_for(workdir / "metrics.csv", process)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, 128 + signal.SIGTERM)
    assert "2 device(s)" in out and "saved. Run the same command to go on." in out
    assert "Traceback" not in err
    found = Checkpoints(workdir, "last").steps()
    assert found, (out, err, sorted(workdir.rglob("*")))
    stopped = found[-1]
    assert 5 <= stopped < 40

    out, err = finish(train(phantom_data, workdir))
    assert "1 device(s)" in out and f"goes on from step {stopped}" in out and "val, teacher" in out
    assert "Traceback" not in err and "Warning" not in err
    with open(workdir / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(5, 41, 5))
    assert Checkpoints(workdir, "last").steps()[-1] == 40

    scans = phantom_scans / "training" / "patient005"  # the val patient
    scan = next(p for p in sorted(scans.glob("*.nii.gz")) if "_gt" not in p.name)
    finish(command("sscl_jax.predict", f"--checkpoint={workdir}", f"--input={scan}", f"--output={tmp_path / 'masks'}"))
    assert nibabel.load(tmp_path / "masks" / scan.name).shape == nibabel.load(scan).shape
    out, _ = finish(command("sscl_jax.evaluate", f"--checkpoint={workdir}", f"--csv={tmp_path / 'cases.csv'}"))
    with open(tmp_path / "cases.csv", newline="") as one, open(workdir / "val_cases.csv", newline="") as other:
        assert list(csv.DictReader(one)) == list(csv.DictReader(other))  # what training measured


def test_a_checkpoint_that_cannot_be_written_is_one_line(phantom_data, tmp_path):
    _, err = finish(
        train(phantom_data, tmp_path / "run", "--config.eval.every=40", method="supervised", largest_file=20), 1
    )
    assert re.fullmatch(r"error: .*checkpoints/\w+: checkpoint 20 could not be written \(.*\n", err), err


def train_on(count, data, workdir, *more, **how):
    """Starts a training of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    return [train(data, workdir, *together, f"--process_id={i}", *more, **how) for i in range(count)]


def test_two_processes_stop_at_the_same_step_and_one_goes_on(phantom_data, tmp_path):
    workdir = tmp_path / "run"
    more = ["--config.steps=2000", "--config.eval.every=2000"]
    processes = train_on(2, phantom_data, workdir, *more)
    wait_for(workdir / "metrics.csv", processes[0])
    processes[1].send_signal(signal.SIGTERM)  # to one of them only
    (out, err), (other, _) = (finish(process, 128 + signal.SIGTERM) for process in processes)
    assert "2 device(s)" in out and "2 process(es)" in out and "Traceback" not in err
    (stopped,) = Checkpoints(workdir, "last").steps()[-1:]
    assert f"stopped by SIGTERM at step {stopped}; saved." in out and "stopped by" not in other

    process = train(phantom_data, workdir, *more)
    wait_for(workdir / "metrics.csv", process, rows=stopped // 5 + 1)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 128 + signal.SIGTERM)
    assert "1 process(es)" in out and f"goes on from step {stopped}" in out


def test_two_processes_measure_what_one_does(phantom_data, tmp_path):
    workdir = tmp_path / "run"
    more = ["--config.eval.select=student", "--config.optimizer.learning_rate=0.01"]
    (out, _), _ = (finish(p) for p in train_on(2, phantom_data, workdir, *more, method="supervised"))
    assert "2 process(es)" in out and len(list((workdir / "val_overlays").iterdir())) == 3

    finish(command("sscl_jax.evaluate", f"--checkpoint={workdir}", f"--csv={tmp_path / 'cases.csv'}"))
    assert (tmp_path / "cases.csv").read_bytes() == (workdir / "val_cases.csv").read_bytes()
    with open(tmp_path / "cases.csv", newline="") as file:
        cases = [row for row in csv.DictReader(file) if row["network"] == "student"]
    distances = [float(row["hd95_mm"]) for row in cases]
    with open(workdir / "metrics.csv", newline="") as file:
        measured = {int(row["step"]): row["val_hd95_mm"] for row in csv.DictReader(file) if row["val_hd95_mm"]}
    (best,) = Checkpoints(workdir, "best").steps()
    assert len({row["case"] for row in cases}) == 2 and len(set(distances)) > 1
    assert measured.keys() == {20, 40}
    assert float(measured[best]) == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_when_one_process_is_killed_the_other_ends_and_the_same_commands_go_on(phantom_data, tmp_path):
    """And they agree on where from, though the newest checkpoint is damaged."""
    workdir = tmp_path / "run"
    more = ["--config.steps=2000", "--config.eval.every=2000", "--config.save_every=5"]
    processes = train_on(2, phantom_data, workdir, *more, method="supervised")
    wait_for(workdir / "metrics.csv", processes[0], rows=3)  # so that steps 5 and 10 are saved
    processes[1].kill()
    finish(processes[1], -signal.SIGKILL)
    _, err = finish(processes[0], 1)
    assert re.fullmatch(r"error: another process has ended \(.*Gloo.*\): see why, and give the same commands\n", err), (
        err
    )
    assert "Traceback" not in err

    saved, newest = Checkpoints(workdir, "last").steps()
    next((workdir / "checkpoints" / "last" / str(newest) / "state").glob("_METADATA")).write_bytes(b"")
    rows = len((workdir / "metrics.csv").read_text().splitlines())
    processes = train_on(2, phantom_data, workdir, *more, method="supervised")
    wait_for(workdir / "metrics.csv", processes[0], rows=rows)  # one more than the killed one left
    processes[0].send_signal(signal.SIGTERM)
    (out, err), (_, other) = (finish(process, 128 + signal.SIGTERM) for process in processes)
    assert f"goes on from step {saved}" in out
    assert f"set aside as damaged-last-{newest}" in err and "set aside" not in other


# What only the command line can get wrong; all else is in test_training.py.
MISTAKES = {
    "field": (["--config=configs/phantom.py", "--config.data.labelled_patients=3"], "labelled_patients"),
    "method": (["--config=configs/phantom.py:best"], "best"),
    "config": (["--config=configs/none.py"], "configs/none.py"),
    "type": (["--config=configs/phantom.py", "--config.steps=many"], "steps"),
    "data": (["--config=configs/phantom.py", "--config.data.path=/no/such/data"], "/no/such/data"),
    "argument": (["--config=configs/phantom.py", "stray"], "stray"),
    "flag": (["--config=configs/phantom.py", "--wrkdir=x"], "wrkdir"),
    "no config": ([], "config"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(name, tmp_path):
    arguments, word = MISTAKES[name]
    out, err = finish(command("sscl_jax.main", f"--workdir={tmp_path / 'run'}", *arguments), 1)
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and word in lines[-1], err
    assert len(lines) == 1, err
    assert not (tmp_path / "run").exists()


def test_a_batch_must_divide_over_the_devices(phantom_data, tmp_path):
    out, err = finish(train(phantom_data, tmp_path / "run", devices=3), 1)
    assert "error: a batch of 2 does not divide over 3 devices" in err
    assert len(err.splitlines()) == 1
