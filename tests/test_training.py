"""Whole trainings on tiny phantoms, within this process; what they compile they share."""

import csv
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import pytest
from nibabel import orientations
from tensorboardX.record_writer import RecordWriter

from configs import base
from data_prep import acdc
from sscl_jax import evaluate, experiment, parallel, plan, predict, train
from sscl_jax import main as command
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.data import nifti
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.recipe import Recipe
from sscl_jax.data.sampling import Pool, assign_roles, digest_of_labels

TIMES = ("seconds", "images_per_s")  # columns of metrics.csv that no two runs share

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory, compiled_once):
    """A training that was never stopped, with its final tables."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    summaries = train.train(tiny_config(), workdir)
    return workdir, summaries


@pytest.fixture
def no_tables(monkeypatch):
    """The final tables take longer than so short a training."""
    monkeypatch.setattr(train, "_final_tables", lambda *_: {})


def rows_of(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return [{n: v for n, v in row.items() if n not in TIMES} for row in csv.DictReader(file)]


def state_of(workdir, config, kind="last"):
    return Checkpoints(workdir, kind).restore(experiment.make_state(config, 4, 1))


def assert_same_training(workdir, other, config):
    """Bit for bit: all of the state, the best one too, and the table."""
    for kind in ("last", "best"):
        (state, meta), (expected, expected_meta) = (state_of(w, config, kind) for w in (workdir, other))
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert meta["best"] == expected_meta["best"]
    assert rows_of(workdir) == rows_of(other)


# ---------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_tells_what_a_training_would_do_and_writes_nothing(tiny_config, tmp_path, capsys):
    config = tiny_config()
    plan.show_plan(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "labelled    2 patients, 4 cases" in told and "in 4 of 4 labelled cases" in told
    assert re.search(r"a step takes [\d.]+ s \(\d+ images/s\), the first \d+ s; 120 steps are left", told)
    assert "; 3 are left, then the final tables" in told and re.search(r"in all about .*; memory [\d.]+ GiB", told)
    assert "goes on from" not in told and list(tmp_path.iterdir()) == []


def test_the_plan_of_a_training_that_was_stopped(trained, tiny_config, tmp_path, capsys):
    workdir, _ = trained
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    shutil.rmtree(run / "checkpoints" / "last" / "120")
    (before,) = Checkpoints(run, "last").steps()
    assert 80 <= before < 120
    files = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    plan.show_plan(tiny_config(), run)
    told = capsys.readouterr().out
    assert f"goes on from step {before}" in told and f"; {120 - before} steps are left" in told
    assert "; 1 are left, then" in told  # of the evaluations at 40, 80 and 120
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == files
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        plan.show_plan(tiny_config(seed=1), run)
    with pytest.raises(OSError, match="cannot be written: choose another folder"):
        plan.show_plan(tiny_config(), run / "config.json")
    plan.show_plan(tiny_config(), workdir)
    assert "this training has ended" in capsys.readouterr().out


def test_a_new_training_in_a_used_folder_shows_nothing_of_the_old(trained, tiny_config, no_tables, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    shutil.copy(run / "val_cases.csv", run / "test_cases.csv")
    shutil.copytree(run / "val_overlays", run / "test_overlays")
    shutil.rmtree(run / "checkpoints")
    (run / "test_images").mkdir()  # of the user, whatever their names are
    (run / "val_list.txt").write_text("p1")
    train.train(tiny_config("supervised", steps=2), run)
    assert sorted(path.name for path in run.glob("test_*")) == ["test_images"]
    left = {path.name for path in run.glob("val_*")}
    assert "val_list.txt" in left and not {"val_cases.csv", "val_features.png"} & left


def test_val_alone_chooses_the_checkpoint(trained, tiny_config, no_tables, tmp_path, monkeypatch):
    """Of three evaluations the first finds nothing to measure, and the second is not worse than the last."""
    measured, turns, evaluate_cases = [], iter((np.nan, 0.7, 0.7)), evaluate.evaluate_cases

    def listed(predict_, variables, dataset, cases, *others):
        measured.append({case.patient_id for case in cases})
        return evaluate_cases(predict_, variables, dataset, cases, *others)

    def summary(_):
        return SimpleNamespace(overall_mean={"dice": next(turns), "hd95": 1.0})

    monkeypatch.setattr(evaluate, "evaluate_cases", listed)
    monkeypatch.setattr(train.metrics, "summarise", summary)
    train.train(tiny_config(), tmp_path)
    assert measured == [{"patient005"}] * 3
    best, last = (experiment.load_networks(tmp_path, kind) for kind in ("best", "last"))
    assert {network.path.name for network in best.values()} == {"80"}
    assert {network.path.name for network in last.values()} == {"120"}
    state, _ = state_of(tmp_path, tiny_config(), "best")
    for name in ("student", "teacher"):
        loaded, saved = best[name].variables["params"], getattr(state, name)
        assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(saved)))
    assert not all(map(np.array_equal, jax.tree.leaves(state.student), jax.tree.leaves(state.teacher)))


def test_evaluate_refuses_other_data_than_those_of_the_training(trained, phantom_scans, tmp_path):
    acdc.prepare(phantom_scans, tmp_path / "other", spacing=7.0)
    with pytest.raises(SystemExit, match="other is not the prepared dataset that .* was trained with"):
        evaluate.main([f"--checkpoint={trained[0]}", f"--data={tmp_path / 'other'}"])


# ----------------------------------------------------------------------------------------------------------- learning


def test_batches_hold_the_patients_of_their_part_alone(tiny_config):
    config, dataset, roles = train.open_data(tiny_config())
    pools = train.Batches(config, dataset, roles).pools
    patients = {part: {case.patient_id for case, _ in pool.samples} for part, pool in pools.items()}
    assert patients["labeled"] == set(dataset.patients["train"][:2])
    assert patients["unlabeled"] == set(dataset.patients["train"][2:]) and len(patients["unlabeled"]) == 2


def test_a_batch_is_the_same_from_device_memory_and_from_disk(tiny_config):
    batches = []
    for memory in (1.0, 0.0):
        config, dataset, roles = train.open_data(tiny_config(**{"data.device_memory": memory}))
        batches.append(train.Batches(config, dataset, roles))
        size = sum(pool.size_in_bytes() for pool in batches[-1].pools.values())
        held = [leaf.nbytes for leaf in jax.tree.leaves(batches[-1].resident)]
        assert sum(held) == (size if memory else 0)
    for step in (0, 3, 50):  # in the first pass over the samples, and later
        inside, read = (b.load(step) for b in batches)
        assert jax.tree.structure(inside) == jax.tree.structure(read)
        for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(read), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_loss_falls_and_dice_rises(trained):
    workdir, summaries = trained
    rows = rows_of(workdir)
    # One row for each multiple of log_every; evaluations (every 40) fall on some of them.
    assert [int(row["step"]) for row in rows] == list(range(10, 121, 10))
    assert [int(row["step"]) for row in rows if row["val_dice"]] == [40, 80, 120]
    supervised = [float(row["sup_ce"]) + float(row["sup_dice"]) for row in rows]
    # With background as its prior cross-entropy does not start at chance, about 1, but Dice at next to nothing.
    assert supervised[-1] < 0.6 * supervised[0] and supervised[-1] < 0.65
    dice = [float(row["val_dice"]) for row in rows if row["val_dice"]]
    assert dice == sorted(dice) and dice[-1] > max(0.43, dice[0] + 0.02)
    assert all(np.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert float(rows[0]["weight_contrast"]) < float(rows[-1]["weight_contrast"]) == pytest.approx(0.03)
    assert set(summaries) == {"val"} and set(summaries["val"]) == {"student", "teacher"}


def test_a_training_leaves_what_a_user_looks_at(trained, tiny_config):
    workdir, _ = trained
    assert (workdir / "config.json").is_file() and (workdir / "val_cases.csv").is_file()
    assert list((workdir / "val_overlays").glob("*.png"))
    assert "Results on val" in (workdir / "report.html").read_text()
    dataset = open_prepared(tiny_config().data.path)
    masks = digest_of_labels(dataset, assign_roles(dataset, 2).val)
    assert json.loads((workdir / "run.json").read_text())["measured_on"] == {"val": masks}
    (events,) = (workdir / "tensorboard").glob("events*")
    content = events.read_bytes()
    assert all(tag in content for tag in (b"val_dice", b"val/best", b"val/median", b"val/worst", b"PNG"))
    with open(workdir / "val_cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["network"], row["class"]) for row in rows} == {
        (n, c) for n in ("student", "teacher") for c in ("right ventricle", "myocardium", "left ventricle")
    }
    assert Checkpoints(workdir, "last").steps()[-1] == 120


def test_the_model_card_tells_the_figures_of_the_tables(trained):
    workdir, summaries = trained
    card = (workdir / "MODEL_CARD.md").read_text()
    for network, summary in summaries["val"].items():
        for c, name in enumerate(("right ventricle", "myocardium", "left ventricle")):
            values = f"{100 * summary.mean['dice'][c]:.1f} ± {100 * summary.std['dice'][c]:.1f}"
            rest = f"{summary.mean['hd95'][c]:.1f} | {summary.n[c]} | {summary.flagged[c]} |"
            assert f"| {network} | {name} | {values} | {rest}" in card
    assert "| labelled | 2 | 4 |" in card and "| val | 1 | 2 |" in card
    assert "0 (background), 1 (right ventricle)" in card and "not a medical device" in card


def test_pseudo_labels_are_measured_on_val(trained):
    rows = [row for row in rows_of(trained[0]) if row["val_dice"]]
    for name in ("val_pl_coverage", "val_pl_accuracy"):
        values = [float(row[name]) for row in rows]
        assert all(0 <= v <= 1 for v in values) and values[-1] > 0


def test_a_finished_training_run_again_changes_nothing(trained, tiny_config, monkeypatch):
    workdir, _ = trained
    before, told = rows_of(workdir), []
    monkeypatch.setattr(train, "_final_tables", lambda *arguments: told.extend(arguments[-2:]))
    train.train(tiny_config(), workdir)
    assert rows_of(workdir) == before
    assert told == [state_of(workdir, tiny_config())[1][name] for name in ("seconds", "peak")] and min(told) > 0


def test_a_table_of_test_that_is_there_is_measured_again(trained, tiny_config, tmp_path):
    """Else it would stay beside a run.json that tells nothing of the masks it was measured on."""
    shutil.copytree(trained[0], tmp_path / "copy")
    (tmp_path / "copy" / "test_cases.csv").touch()
    assert set(train.train(tiny_config(), tmp_path / "copy")) == {"val", "test"}
    dataset = open_prepared(tiny_config().data.path)
    told = json.loads((tmp_path / "copy" / "run.json").read_text())["measured_on"]
    for split, patient in (("val", "patient005"), ("test", "patient006")):
        with open(tmp_path / "copy" / f"{split}_cases.csv", newline="") as file:
            assert {row["patient"] for row in csv.DictReader(file)} == {patient}
        assert told[split] == digest_of_labels(dataset, [c for c in dataset.cases if c.patient_id == patient])


# ------------------------------------------------------------------------------------------------------------ resuming


def interrupt(monkeypatch, how, *at):
    """Calls `how` before the steps `at`, once before each."""
    run, left = train.Batches.run, set(at)

    def interrupted(self, start, stop):
        for step, batch in run(self, start, stop):
            if step in left:
                left.remove(step)
                how()
            yield step, batch

    monkeypatch.setattr(train.Batches, "run", interrupted)


def crash():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("at", [33, 39])  # after step 39 val is measured
def test_sigterm_saves_and_the_same_command_goes_on(at, trained, tiny_config, no_tables, tmp_path, monkeypatch, capsys):
    config = tiny_config()
    interrupt(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM), at)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train.train(config, tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    # Python hands a signal over before the next step or a few steps later; then that step is saved.
    (saved,) = set(Checkpoints(tmp_path, "last").steps()) - {25}
    assert at < saved <= at + 3
    assert f"stopped by SIGTERM at step {saved}; saved" in capsys.readouterr().out
    train.train(config, tmp_path)
    assert f"goes on from step {saved}" in capsys.readouterr().out
    assert_same_training(tmp_path, trained[0], config)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert all(float(row["images_per_s"]) > 0 for row in csv.DictReader(file))


class Later(np.ndarray):
    """A result of the device that takes note when it is waited for."""

    waited: list[int] = []

    def block_until_ready(self):
        self.waited.append(int(self))
        return self


def test_few_steps_are_in_line_when_a_signal_comes(tiny_config, no_tables, tmp_path, monkeypatch):
    config = tiny_config(steps=8, **{"log_every": 100, "eval.every": 100})
    Later.waited.clear()
    begun = []

    def step(state, batch):
        begun.append(int(state.step))
        assert set(begun[: -train.IN_FLIGHT]) <= set(Later.waited)
        one, later = np.ones(()), np.array(begun[-1]).view(Later)
        return state.replace(step=state.step + 1), {"loss": (one, one), "grad_norm": (one, later)}

    monkeypatch.setattr(experiment, "make_step", lambda *_: step)
    train.train(config, tmp_path)
    assert begun == list(range(8))


def test_a_signal_between_two_saves_is_answered_with_a_save(tiny_config, no_tables, tmp_path, monkeypatch):
    config = tiny_config(steps=20, **{"eval.every": 20})
    write = train.Log.write

    def and_signal(self, row, *others):  # at step 10, where nothing is saved
        write(self, row, *others)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Log, "write", and_signal)
    with pytest.raises(SystemExit):
        train.train(config, tmp_path)
    assert Checkpoints(tmp_path, "last").steps() == [11]


def test_crashes_between_two_saves_change_no_bit(trained, tiny_config, no_tables, tmp_path, monkeypatch):
    config = tiny_config()
    # Before any save; after rows that no save holds; between an evaluation and the next save.
    interrupt(monkeypatch, crash, 15, 62, 85)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(config, tmp_path)
    train.train(config, tmp_path)
    assert_same_training(tmp_path, trained[0], config)


def test_a_crash_between_the_saves_of_last_and_best_changes_no_bit(
    trained, tiny_config, no_tables, tmp_path, monkeypatch
):
    save, left = Checkpoints.save, [1]

    def crash_once(self, state, meta):
        if self.folder.name == "best" and left.pop():
            crash()
        save(self, state, meta)

    monkeypatch.setattr(Checkpoints, "save", crash_once)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(tiny_config(), tmp_path)
    assert Checkpoints(tmp_path, "last").steps() and not Checkpoints(tmp_path, "best").steps()
    step = Checkpoints(tmp_path, "last").steps()[-1]
    (tmp_path / "checkpoints" / "last" / "7.orbax-checkpoint-tmp").mkdir()
    monkeypatch.setattr(Checkpoints, "save", save)
    run = train.Batches.run

    def look(self, start, stop):  # the best is whole before a step is made
        assert start == step and Checkpoints(tmp_path, "best").steps() == [step]
        assert not list(tmp_path.rglob("*.orbax-checkpoint-tmp"))
        return run(self, start, stop)

    monkeypatch.setattr(train.Batches, "run", look)
    train.train(tiny_config(), tmp_path)
    assert_same_training(tmp_path, trained[0], tiny_config())


def test_events_that_cannot_be_written_end_the_training_and_do_not_hang_it(
    tiny_config, no_tables, tmp_path, monkeypatch
):
    write, count = RecordWriter.write, [0]

    def fill(self, data):
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill)
    with pytest.raises(OSError, match="No space left"):
        train.train(tiny_config(log_every=1), tmp_path)


def test_a_damaged_last_checkpoint_costs_only_time(trained, tiny_config, no_tables, tmp_path):
    config = tiny_config()
    shutil.copytree(trained[0], tmp_path / "copy")
    newest = tmp_path / "copy" / "checkpoints" / "last" / "120"
    shutil.rmtree(newest / "meta")
    with pytest.warns(UserWarning, match="last/120 cannot be read"):
        train.train(config, tmp_path / "copy")
    assert_same_training(tmp_path / "copy", trained[0], config)


def test_a_training_that_starts_anew_keeps_no_best_checkpoint_of_the_old(trained, tiny_config, no_tables, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "last")  # as the error says, where none of them can be read
    assert Checkpoints(tmp_path / "copy", "best").steps() == [120]
    config = tiny_config(seed=1, steps=8, **{"eval.every": 4})
    train.train(config, tmp_path / "copy")
    (step,) = Checkpoints(tmp_path / "copy", "best").steps()
    assert step in (4, 8) and state_of(tmp_path / "copy", config, "best")[1]["best"]["step"] == step


def test_what_the_tables_were_made_with_is_what_evaluate_takes(trained, tiny_config, no_tables, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    shutil.copytree(tiny_config().data.path, tmp_path / "moved")
    free = {"eval.final_overlap": 0.25, "data.path": str(tmp_path / "moved")}
    train.train(tiny_config(**free), tmp_path / "copy")
    for network in experiment.load_networks(tmp_path / "copy").values():
        assert network.config.eval.final_overlap == 0.25 and network.config.data.path == str(tmp_path / "moved")
        assert network.config.seed == 0
    (tmp_path / "copy" / "config.json").write_text("")  # cut short
    assert experiment.load_networks(tmp_path / "copy")["teacher"].config.eval.final_overlap == 0.5


def test_another_config_in_the_same_workdir_is_refused(trained, tiny_config, no_tables):
    workdir, _ = trained
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.01, is 0\.5") as error:
        train.train(tiny_config(**{"optimizer.learning_rate": 0.5}), workdir)
    assert "seed" not in str(error.value) and "--workdir" in str(error.value)
    with pytest.raises(ValueError, match="model.widths|another network"):
        train.train(tiny_config(**{"model.widths": (8, 16, 8)}), workdir)
    assert (workdir / "config.json").read_text() == before


def test_other_data_in_the_same_workdir_are_refused(trained, tiny_config, no_tables, phantom_scans, tmp_path):
    acdc.prepare(phantom_scans, tmp_path / "other", spacing=7.0)
    with pytest.raises(ValueError, match="the prepared data are others"):
        train.train(tiny_config(**{"data.path": str(tmp_path / "other")}), trained[0])


def test_what_is_only_shown_may_change(trained, tiny_config, no_tables, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    train.train(tiny_config(log_every=7, save_every=3), tmp_path / "copy")


def test_a_folder_in_which_a_training_runs_is_refused_until_it_ends(tiny_config, no_tables, tmp_path, monkeypatch):
    config = tiny_config("supervised", steps=2)
    files = []

    def start_another():
        files.append(sorted(tmp_path.rglob("*")))
        with pytest.raises(OSError, match=f"--workdir={tmp_path}: another training runs in this folder: wait"):
            train.train(config, tmp_path)
        files.append(sorted(tmp_path.rglob("*")))
        raise RuntimeError("power cut")

    interrupt(monkeypatch, start_another, 1)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(config, tmp_path)
    assert files[0] == files[1]
    train.train(config, tmp_path)
    assert Checkpoints(tmp_path, "last").steps() == [2]


def test_a_file_system_without_locks_is_no_obstacle(tiny_config, no_tables, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(train.fcntl, "flock", no_locks)
    train.train(tiny_config("supervised", steps=2), tmp_path)


@pytest.mark.end_to_end
def test_a_killed_process_goes_on_to_the_same_bits(trained, tiny_config, no_tables, phantom_data, tmp_path):
    """Once while a checkpoint is being written, once after a later one; benchmarks/kill.py does so by the hundred."""
    workdir = tmp_path / "run"
    script = (
        f"import sys; sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]!r}\n"
        "import conftest, pathlib; from sscl_jax import train\n"
        f"train.train(conftest.tiny({str(phantom_data)!r}), pathlib.Path({str(workdir)!r}))"
    )
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    for moment in ("checkpoints/last/25.orbax-checkpoint-tmp", "checkpoints/last/50"):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None and not (workdir / moment).exists():
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    assert 0 < Checkpoints(workdir, "last").steps()[-1] < 120
    train.train(tiny_config(), workdir)
    assert_same_training(workdir, trained[0], tiny_config())


# ----------------------------------------------------------------------------------------- labels that must not be read


def delete(path):
    path.unlink()


def scramble(path):
    image = nibabel.load(path)
    noise = np.random.default_rng(0).integers(0, 4, image.shape).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(noise, image.affine, image.header), path)


@pytest.fixture
def change_masks(tiny_config, phantom_scans, phantom_data, tmp_path):
    """Changes all masks of some parts (names of `Roles`) and prepares; returns the config."""

    def run(change, *parts):
        roles = assign_roles(open_prepared(phantom_data), 2)
        patients = {case.patient_id for part in parts for case in getattr(roles, part)}
        shutil.copytree(phantom_scans, tmp_path / "scans")
        masks = [p for p in (tmp_path / "scans").rglob("*_gt.nii.gz") if p.parent.name in patients]
        assert len(masks) == 2 * len(patients) == sum(4 if part.endswith("labeled") else 2 for part in parts)
        for path in masks:
            change(path)
        acdc.prepare(tmp_path / "scans", tmp_path / "prepared", splits=phantom_scans / "splits.json", spacing=6.0)
        return tiny_config(**{"data.path": str(tmp_path / "prepared")})

    return run


@pytest.fixture
def train_with_changed_masks(change_masks, no_tables, tmp_path):
    """`change_masks`, then a training; returns its folder and config."""

    def run(change, *parts):
        config = change_masks(change, *parts)
        train.train(config, tmp_path / "run")
        return tmp_path / "run", config

    return run


@pytest.mark.parametrize("part", ["labeled", "val", "unlabeled", "test"])
def test_other_masks_in_the_same_workdir_are_refused_if_they_are_used(part, trained, change_masks, no_tables, tmp_path):
    config = change_masks(scramble, part)
    shutil.copytree(trained[0], tmp_path / "copy")
    if part in ("labeled", "val"):
        with pytest.raises(ValueError, match=r"the labelled or the val patients, or their masks, are others\. Choose"):
            train.train(config, tmp_path / "copy")
        with pytest.raises(ValueError, match="or their masks, are others"):
            plan.show_plan(config, tmp_path / "copy")
    else:
        train.train(config, tmp_path / "copy")


def test_labels_of_unlabelled_patients_change_no_bit(trained, train_with_changed_masks):
    workdir, config = train_with_changed_masks(delete, "unlabeled")
    assert_same_training(workdir, trained[0], config)


def test_noise_in_all_masks_but_the_labelled_ones_reaches_no_parameter(trained, train_with_changed_masks):
    workdir, config = train_with_changed_masks(scramble, "unlabeled", "val", "test")
    (state, _), (expected, _) = (state_of(w, config) for w in (workdir, trained[0]))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    # Val was measured by its masks, or they would have been another's.
    dice, as_it_was = ([row["val_dice"] for row in rows_of(w) if row["val_dice"]] for w in (workdir, trained[0]))
    assert len(dice) == len(as_it_was) == 3 and dice != as_it_was


def test_roles_are_disjoint_in_patients(phantom_data):
    roles = assign_roles(open_prepared(phantom_data), 2)
    parts = [{c.patient_id for c in part} for part in (roles.labeled, roles.unlabeled, roles.val, roles.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes."),
            "RESOURCE_EXHAUSTED: Out of memory all",
        ),
        (MemoryError("Unable to allocate"), "Unable to allocate"),
    ],
)
def test_out_of_memory_is_one_line(error, told, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(train, "train", fails)
    monkeypatch.setattr(parallel, "keep_compiled", lambda: None)
    for flag, value in {"_CONFIG": None, "_WORKDIR": "run", "_DRY_RUN": False, "_COORDINATOR": "",
                        "_NUM_PROCESSES": 0, "_PROCESS_ID": -1, "_DISTRIBUTED": False}.items():  # fmt: skip
        monkeypatch.setattr(command, flag, SimpleNamespace(value=value))
    with pytest.raises(SystemExit) as stopped:
        command.main(["sscl_jax.main"])
    assert str(stopped.value).startswith(f"error: out of memory ({told}") and "\n" not in str(stopped.value)
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        command.main(["sscl_jax.main"])


def test_nan_in_a_scan_stops_and_names_it(tiny_config, no_tables, tmp_path, monkeypatch):
    config = tiny_config(**{"data.device_memory": 0.0})  # so that each batch is read
    read = Pool.batch
    poisoned = "patient003"

    def with_nan(self, indices):
        batch = read(self, indices)
        for row, name in enumerate(self.names(indices)):
            if name.startswith(poisoned) and with_nan.armed:
                batch["image"][row, 20, 20] = np.nan
        return batch

    with_nan.armed = False
    monkeypatch.setattr(Pool, "batch", with_nan)
    interrupt(monkeypatch, lambda: setattr(with_nan, "armed", True), 27)
    with pytest.raises(FloatingPointError, match="not finite at step") as error:
        train.train(config, tmp_path)
    assert poisoned in str(error.value) and "learning_rate" in str(error.value)
    state, _ = state_of(tmp_path, config)
    assert int(state.step) == 25  # of the saves at 25 and 50, the one before the failure
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert all(np.isfinite(float(value)) for row in rows_of(tmp_path) for value in row.values() if value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.labeled_patients": 0}, r"data\.labeled_patients=0: .* 4 training patients.*choose 1 to 4"),
        ({"data.labeled_patients": 5}, r"data\.labeled_patients=5: .*choose 1 to 4"),
        ({"data.labeled_patients": -1}, "leaves no unlabelled patient"),
        ({"data.path": "/no/such/folder"}, r"/no/such/folder"),
        ({"data.path": ""}, r"data\.path='': name the folder"),
        ({"data.patch_size": (30, 32)}, r"data\.patch_size=\(30, 32\): each must be a multiple of 4"),
        ({"data.unlabeled_batch": 3}, r"data\.unlabeled_batch=3: CutMix pairs images"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"augment.scale": (1.0,)}, r"augment\.scale=\(1\.0,\): give \(least, greatest\) zoom"),
        ({"augment.scale": (0.0, 1.0)}, r"augment\.scale=\(0\.0, 1\.0\): .* above 0"),
        ({"augment.cutmix_area": (0.1,)}, r"augment\.cutmix_area=\(0\.1,\): give \(least, greatest\) share"),
        ({"augment.cutmix_area": (0.5, 0.2)}, r"augment\.cutmix_area=\(0\.5, 0\.2\)"),
        ({"model.widths": (8, 0, 16)}, r"model\.widths=\(8, 0, 16\): each must be at least 1"),
        ({"model.projection_dim": 0}, r"model\.projection_dim=0: must be at least 1"),
        ({"ramp": 1.5}, r"ramp=1\.5: a share of the steps, 0 to 1"),
        ({"contrast.level": 3}, r"contrast\.level=3: choose 0 to 2"),
        ({"contrast.sampler": "all"}, "choose 'anatomical', 'region' or 'both'"),
        ({"contrast.temperature": 0.0}, "must be positive"),
        (
            {"contrast.weight": 0.1, "contrast.sampler": "both", "contrast.cells": 1},
            r"contrast\.cells=1: .* no negative",
        ),
        ({"optimizer.clip_norm": 0.0}, r"optimizer\.clip_norm=0\.0: must be positive; a large one clips nothing"),
        ({"optimizer.learning_rate": 0.0}, r"optimizer\.learning_rate=0\.0: must be positive"),
        ({"optimizer.warmup_steps": -1}, r"optimizer\.warmup_steps=-1: must be at least 0"),
        ({"augment.noise": -0.1}, r"augment\.noise=-0\.1: must be at least 0"),
        ({"augment.spread": 1.5}, r"augment\.spread=1\.5: must lie in \[0, 1\]"),
        ({"teacher.scope": "decoder"}, "choose 'network' or 'encoder'"),
        ({"teacher.decay": 1.0}, r"teacher\.decay=1\.0"),
        ({"contrast.threshold": 1.5}, r"contrast\.threshold=1\.5: must lie in \[0, 1\]"),
        ({"pseudo_label.weight": -1.0}, r"pseudo_label\.weight=-1\.0"),
        ({"eval.overlap": 1.0}, r"eval\.overlap=1\.0"),
        ({"model.norm": "layer"}, "choose 'group' or 'batch'"),
    ],
)
def test_bad_configs_end_in_one_line(fields, message, tiny_config, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train.train(tiny_config(**fields), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_over_the_devices(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="a batch of 2 does not divide over 4 devices.*multiples of 4"):
        train.train(tiny_config(), tmp_path)


def test_a_workdir_that_cannot_be_written(tiny_config, tmp_path, monkeypatch):
    def read_only(path, *args, **kwargs):  # the user who runs the tests may be root
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(train, "open", read_only, raising=False)
    with pytest.raises(
        OSError, match=r"--workdir=.* cannot be written \(Read-only file system\): choose another folder"
    ):
        train.train(tiny_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_a_file(tiny_config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run cannot be written"):
        train.train(tiny_config(), tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- prediction


def val_scans(phantom_scans, tmp_path):
    """A folder with the val patient's scans alone, and one with its masks."""
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    masks.mkdir()
    for path in (phantom_scans / "training" / "patient005").glob("*.nii.gz"):
        shutil.copy(path, masks if path.name.endswith("_gt.nii.gz") else scans)
    assert len(list(scans.iterdir())) == len(list(masks.iterdir())) == 2
    return scans, masks


def test_predict_then_evaluate_gives_the_figures_of_training(trained, phantom_scans, tmp_path):
    workdir, _ = trained
    scans, masks = val_scans(phantom_scans, tmp_path)
    predict.main([f"--checkpoint={workdir}", f"--input={scans}", f"--output={tmp_path / 'out'}"])
    for scan in scans.iterdir():
        image, mask = nibabel.load(scan), nibabel.load(tmp_path / "out" / scan.name)
        assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        for code in ("qform_code", "sform_code", "xyzt_units"):
            assert mask.header[code] == image.header[code]
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3}

    names, classes, measured = evaluate.evaluate_folders(tmp_path / "out", masks)
    assert classes == ["0", "1", "2", "3"]
    with open(workdir / "val_cases.csv", newline="") as file:
        table = [row for row in csv.DictReader(file) if row["network"] == "teacher"]
    assert sorted(names) == sorted({row["case"] for row in table})
    for name, metrics in zip(names, measured, strict=True):
        rows = [row for row in table if row["case"] == name]
        assert [float(row["dice"]) for row in rows] == pytest.approx(metrics.dice.tolist(), rel=1e-5)
        assert [float(row["hd95_mm"]) for row in rows] == pytest.approx(metrics.hd95.tolist(), rel=1e-5)
    assert max(metrics.dice.max() for metrics in measured) > 0.2  # not empty


def test_predict_reports_what_it_cannot_segment_and_goes_on(trained, phantom_scans, tmp_path, capsys):
    workdir, _ = trained
    scans, _ = val_scans(phantom_scans, tmp_path)
    (scans / "broken.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(SystemExit, match="1 of 3 scans could not be segmented"):
        predict.main([f"--checkpoint={workdir}", f"--input={scans}", f"--output={tmp_path / 'out'}"])
    assert "broken.nii.gz" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_predict_never_replaces_a_scan(trained, phantom_scans, tmp_path, capsys):
    scans, _ = val_scans(phantom_scans, tmp_path)
    before = {p: p.read_bytes() for p in scans.iterdir()}
    with pytest.raises(SystemExit, match="2 of 2"):
        predict.main([f"--checkpoint={trained[0]}", f"--input={scans}", f"--output={scans}"])
    assert {p: p.read_bytes() for p in scans.iterdir()} == before


def test_predict_without_a_training_or_a_scan(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no .nii or .nii.gz file there"):
        predict.main([f"--checkpoint={trained[0]}", f"--input={tmp_path / 'empty'}", f"--output={tmp_path}"])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), "f4"), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(SystemExit, match="holds no checkpoints"):
        predict.main([f"--checkpoint={tmp_path}", f"--input={tmp_path / 'a.nii'}", f"--output={tmp_path / 'out'}"])


# ------------------------------------------------------------------------------------------------------------ geometry

RECIPE = Recipe(
    orientation="SPL",
    spacing=(None, 2.1, 1.7),
    intensity="ct",
    window=(0, 100),
    label_values=(0, 10, 20, 40),
    class_names=("background", "low", "front", "bright"),
)


class Stub:
    """A network of fixed opinions: prediction depends on position in the prepared array and on intensity."""

    recipe, config, variables = RECIPE, base.get_config(), None
    meta = {"channels": 1}

    @staticmethod
    def predict(variables, image):
        # Prepared arrays go from foot to head, from front to back, from right to left; here from 0 to 1.
        d, h, w = np.meshgrid(*((np.arange(n) + 0.5) / n for n in image.shape[:3]), indexing="ij")
        classes = np.zeros(image.shape[:3], int)
        classes[(d < 0.4) & (w < 0.3)] = 1
        classes[(h < 0.35) & (w > 0.6)] = 2
        classes[image[..., 0] > 0.2] = 3
        return np.eye(4, dtype=np.float32)[classes]


def scan(seed=0, shape=(14, 11, 6)):
    """(X, Y, Z) of a bright ellipsoid off the centre, in the window of `RECIPE`."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    centre = np.array([0.3, -0.4, 0.35]).reshape(3, 1, 1, 1)
    smooth = 100 * np.exp(-3 * ((grid - centre) ** 2).sum(0))
    return (smooth + np.random.default_rng(seed).uniform(0, 5, shape)).astype(np.int16)


# From left to right, from back to front, from foot to head: what nibabel calls RAS.
AFFINE = np.array([[1.5, 0, 0, -7], [0, 1.9, 0, 3], [0, 0, 5.0, 11], [0, 0, 0, 1]])


def segment_array(array, affine, folder, dtype=None, **save):
    image = nibabel.Nifti1Image(array, affine)
    image.set_data_dtype(dtype or array.dtype)
    for name, value in save.items():
        image.header[name] = value
    nibabel.save(image, folder / "scan.nii.gz")
    predict.segment_scan(
        Stub, Stub.predict, predict.read_prepared(Stub, [folder / "scan.nii.gz"]), folder / "mask.nii.gz"
    )
    mask = nibabel.load(folder / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, affine, atol=1e-4)
    return np.asarray(mask.dataobj)


def test_the_stub_is_right_about_where_things_lie(tmp_path):
    mask = segment_array(scan(), AFFINE, tmp_path)
    assert set(np.unique(mask)) == {0, 10, 20, 40}
    assert mask.shape == (14, 11, 6)
    # `AFFINE` is RAS: the right side of the body is at high x, the front at high y, the head at high z.
    assert mask[-1, 0, 0] == 10 and mask[0, -1, -1] == 20
    assert mask[0, 0, 0] == 0 and mask[-1, 0, -1] == 0
    brightest = np.unravel_index(scan().argmax(), mask.shape)
    assert mask[brightest] == 40


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_every_orientation_of_a_scan_gives_the_same_mask(axes, tmp_path):
    expected = segment_array(scan(), AFFINE, tmp_path)
    for flips in itertools.product((1, -1), repeat=3):
        ornt = np.array(list(zip(axes, flips, strict=True)))
        array = orientations.apply_orientation(scan(), ornt)
        affine = AFFINE @ orientations.inv_ornt_aff(ornt, scan().shape)
        mask = segment_array(array, affine, tmp_path)
        assert mask.shape == array.shape
        np.testing.assert_array_equal(mask, orientations.apply_orientation(expected, ornt))


@pytest.mark.parametrize("angles", [(20, 0, 0), (0, -25, 10), (12, 15, -30)])
def test_an_oblique_scan_is_segmented_along_its_own_axes(angles, tmp_path):
    expected = segment_array(scan(), AFFINE, tmp_path)
    rotation = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(angles)):
        turn, (i, j) = np.eye(4), [a for a in range(3) if a != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    np.testing.assert_array_equal(segment_array(scan(), rotation @ AFFINE, tmp_path), expected)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32", "float64", "int32"])
def test_the_mask_is_of_a_whole_number_type_whatever_the_scan_is(dtype, tmp_path):
    expected = segment_array(scan(), AFFINE, tmp_path)
    mask = segment_array(scan().astype(dtype), AFFINE, tmp_path, dtype)
    np.testing.assert_array_equal(mask, expected)
    header = nibabel.load(tmp_path / "mask.nii.gz").header
    assert header.get_data_dtype() == np.uint8
    assert header.get_slope_inter() in ((1.0, 0.0), (None, None))


def test_scans_keep_their_order_errors_and_warnings(tmp_path, monkeypatch):
    names = [f"{i}.nii" for i in range(6)]
    for i, name in enumerate(names):
        nibabel.save(nibabel.Nifti1Image(scan(i), AFFINE), tmp_path / name)
    (tmp_path / names[2]).write_bytes(b"no scan")
    read = predict.read_scan

    def warn_and_read(paths, channels):
        time.sleep(0.05)  # for another thread to catch it, if scans were read in several
        warnings.warn(f"read {paths[0].name}", stacklevel=1)
        time.sleep(0.05)
        return read(paths, channels)

    monkeypatch.setattr(predict, "read_scan", warn_and_read)
    scans = [predict.Scan((tmp_path / name,), Path(name)) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcomes = list(predict.predict_scans(Stub, Stub.predict, scans, tmp_path / "out"))
    assert [outcome.scan for outcome in outcomes] == scans
    assert [outcome.warned for outcome in outcomes] == [[f"read {name}"] for name in names]
    assert ["2.nii" in str(outcome.error) for outcome in outcomes] == [i == 2 for i in range(6)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [n for n in names if n != names[2]]


def test_a_scaled_header_does_not_scale_the_mask(tmp_path):
    image = nibabel.Nifti1Image(scan().astype("f8") * 0.5 + 3, AFFINE)
    image.header.set_data_dtype(np.int16)  # nibabel chooses a slope and an intercept
    nibabel.save(image, tmp_path / "scan.nii")
    predict.segment_scan(
        Stub, Stub.predict, predict.read_prepared(Stub, [tmp_path / "scan.nii"]), tmp_path / "mask.nii"
    )
    assert nibabel.load(tmp_path / "scan.nii").dataobj.slope != 1
    assert set(np.unique(nifti.read_label(tmp_path / "mask.nii")[0])) <= {0, 10, 20, 40}


def test_a_4d_scan_is_segmented_frame_by_frame(tmp_path):
    frames = [scan(), 100 - scan(1), scan(2) // 2]
    expected = [segment_array(frame, AFFINE, tmp_path) for frame in frames]
    mask = segment_array(np.stack(frames, -1), AFFINE, tmp_path)
    np.testing.assert_array_equal(mask, np.stack(expected, -1))
