"""The loop: the only Python that runs once a step."""

import contextlib
import csv
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sscl_jax import config_fields, evaluate, experiment, metrics, model_card, parallel, pictures, report
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.cli import make_folder
from sscl_jax.data.prepared import PreparedDataset, open_prepared
from sscl_jax.data.sampling import (
    Pool,
    Roles,
    assign_roles,
    canvas_shape,
    classes_held,
    digest_of_labels,
    identity,
    patients_of_fraction,
    sample_order,
    unpredicted,
)

TERMS = (
    "loss",
    "sup_ce",
    "sup_dice",
    "pl_ce",
    "pl_dice",
    "pl_coverage",
    "pl_competence",
    "cons",
    "con",
    "con_queries",
    "grad_norm",
)
COLUMNS = (
    "step", "seconds", "images_per_s", "learning_rate", *TERMS,
    "weight_contrast", "weight_consistency", "weight_pseudo_label",
    "val_dice", "val_hd95_mm", "val_pl_coverage", "val_pl_accuracy",
)  # fmt: skip

UNTOLD = ("con_queries", "grad_norm")  # not on the terminal
IN_FLIGHT = 2  # steps handed to the device and not yet done
UNPREDICTED = 3  # evaluations without a class in any prediction, after which that is told


def train(config: ConfigDict, workdir: Path) -> dict[str, dict[str, metrics.Summary]]:
    """Trains, or goes on with, the training in `workdir`, and measures its best checkpoint.

    Args:
      config: see `configs/base.py`.
      workdir: folder of checkpoints, logs, tables and pictures; made if absent.

    Returns:
      Summary by split (`val`, and `test` if asked for) and network.

    Raises:
      ValueError, FileNotFoundError, OSError: config, data or workdir cannot be used; says why.
      FloatingPointError: the loss is not finite; names the step and its cases.
    """
    parallel.keep_memory()
    config, dataset, roles = open_data(config)
    held = classes_held(dataset, roles.labeled + roles.val)
    make_folder(workdir, "--workdir")
    with alone_in(workdir) if parallel.is_main_process() else contextlib.nullcontext():
        return _train(config, workdir, dataset, roles, held)


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Refuses a folder in which a training runs, and keeps others out. The system unlocks when a process dies.

    Raises:
      OSError: another training runs there, or the folder cannot be written.
    """
    try:
        file = open(workdir / ".lock", "w")
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written ({error.strerror}): choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"--workdir={workdir}: another training runs in this folder: wait for its end, or choose another."
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        yield


def _train(
    config: ConfigDict, workdir: Path, dataset: PreparedDataset, roles: Roles, held: dict[str, set[int]]
) -> dict[str, dict[str, metrics.Summary]]:
    """See `train`; `held`: the classes of the labelled and the val cases."""
    # The state: restored, or new.
    last, best = Checkpoints(workdir, "last"), Checkpoints(workdir, "best")
    data = identity(dataset, roles)
    memory: dict[str, Any] = {"pending": {}, "best": None, "seconds": 0.0, "peak": 0.0, "unpredicted": {}}
    if restored := last.restore(experiment.empty_state(config, dataset.num_classes, dataset.channels)):
        state, meta = restored
        config_fields.check_same_training(config, meta, data, workdir)
        memory |= {name: meta[name] for name in memory if name in meta}
    else:
        state = experiment.make_state(config, dataset.num_classes, dataset.channels)
    start = int(state.step)
    if best.drop_later(start):  # of a training that starts anew, or goes on from before a damaged checkpoint
        memory["best"] = None
    if restored and memory["best"] and memory["best"]["step"] == start:  # killed between the two saves
        best.save(state, meta)
    last.tidy()
    best.tidy()
    state = parallel.replicate(state)
    meta = {
        "config": config_fields.plain_config(config),
        "recipe": dataset.recipe.to_dict(),
        "channels": dataset.channels,
        **data,
    }

    main, alone = parallel.is_main_process(), jax.process_count() == 1
    if main:
        describe(config, dataset, roles, held, start)
        if not start:  # what an earlier training left would be taken for this one's
            for split in ("val", "test"):
                for name in ("cases.csv", "features.png"):
                    (workdir / f"{split}_{name}").unlink(missing_ok=True)
                shutil.rmtree(workdir / f"{split}_overlays", ignore_errors=True)
        _write_json(workdir / "config.json", meta["config"])
        if start < config.steps or not (workdir / "run.json").exists():  # else it tells of the tables that are there
            _write_json(workdir / "run.json", _facts(dataset, roles, data))
    log = Log(workdir, start, main)
    step_fn = experiment.make_step(config, dataset.num_classes)
    patch = tuple(config.data.patch_size)
    model = experiment.make_model(config, dataset.num_classes)
    predict = evaluate.make_predictor(model, patch, config.eval.overlap)
    schedule, weights = experiment.make_schedule(config), experiment.make_weights(config)
    largest, threshold = config.eval.largest_component, config.pseudo_label.threshold
    images = images_of_step(config)
    batches = Batches(config, dataset, roles)
    wanted = set().union(*(held[case.case_id] for case in roles.val))

    pending = {name: tuple(pair) for name, pair in memory["pending"].items()}
    unread: list[tuple[int, Any]] = []
    mark, mark_step = time.monotonic(), start
    with contextlib.closing(log), _caught_signals() as caught:
        for step, batch in batches.run(start, config.steps):
            state, step_metrics = step_fn(state, batch)
            unread.append((step, step_metrics))
            # One step runs and one waits: that keeps a device busy, and with more in line a signal would wait for all.
            if len(unread) >= IN_FLIGHT:
                jax.block_until_ready(unread[-IN_FLIGHT])
            done = step + 1
            final = done == config.steps
            at_log = final or done % config.log_every == 0
            at_eval = bool(roles.val) and (final or done % config.eval.every == 0)
            if step == start and not (at_log or at_eval):  # compiles: that takes time and says nothing of the speed
                jax.block_until_ready(step_metrics)
                memory["seconds"] += time.monotonic() - mark
                mark, mark_step = time.monotonic(), done
            # Looked at once: a signal that comes later in this turn is answered in the next, with a save of its own.
            # Several processes must stop at the same step, so they agree on it where they log.
            stopping = parallel.agreed(caught[0] if caught else 0) if alone or at_log else 0
            at_save = final or at_eval or done % config.save_every == 0 or stopping > 0
            if not (at_log or at_save):
                continue

            # The order is fixed. Read: waits for the device, and finds a loss that is not finite before anything
            # is saved. Evaluate. Log before saving: rows after the last checkpoint are dropped on resume, so a row
            # is never lost, and never doubled. The best replaces the one before it, so it is saved last, when the
            # state that a resumed training goes on from tells of it.
            _read(unread, pending, batches)
            now = time.monotonic()
            memory["seconds"] += now - mark
            speed, mark, mark_step = (done - mark_step) * images / max(now - mark, 1e-9), now, done
            row: dict[str, Any] = {}
            is_best = False
            if at_save:
                host = parallel.to_host(state)
            if at_eval:
                variables = experiment.network_variables(host, config.eval.select)
                results = evaluate.evaluate_cases(predict, variables, dataset, roles.val, largest, threshold)
                summary = metrics.summarise([r.metrics for r in results])
                dice = summary.overall_mean["dice"]
                row = {"val_dice": dice, "val_hd95_mm": summary.overall_mean["hd95"]}
                if config.pseudo_label.weight > 0 and config.eval.select == "teacher":
                    foreground, sure, right = np.sum([r.sure for r in results], axis=0)
                    row["val_pl_coverage"] = sure / max(foreground, 1)
                    if sure:
                        row["val_pl_accuracy"] = right / sure
                predicted = set().union(*(np.unique(r.prediction).tolist() for r in results))
                memory["unpredicted"] = unpredicted(memory["unpredicted"], wanted, predicted)
                if main:
                    _tell_unpredicted(memory["unpredicted"], dataset.recipe.class_names, config.eval.select, done)
                    log.images(pictures.write_overlays(workdir / "val_overlays", results, dataset), done)
                old = memory["best"]
                if old is None or np.isnan(old["dice"]) or dice > old["dice"]:  # NaN: nothing was there to find
                    memory["best"], is_best = {"step": done, "dice": dice}, True
                mark = time.monotonic()  # evaluation is not training time
            if at_log or row:
                row |= {name: total / count for name, (total, count) in pending.items() if count}
                row |= {f"weight_{n}": float(w(jnp.asarray(step))) if w else 0.0 for n, w in weights.items()}
                row |= {"step": done, "seconds": memory["seconds"], "images_per_s": speed}
                row["learning_rate"] = float(schedule(step))
                log.write(row, config.steps, images)
                pending = {}
            if at_save:
                memory["peak"] = max(memory["peak"], parallel.peak_memory())
                last.save(host, meta | memory | {"pending": pending})
            if is_best:
                best.save(host, meta | memory | {"pending": pending})
            if stopping:
                _leave(stopping, done)
        if stopping := parallel.agreed(caught[0] if caught else 0):  # during the last step, which is saved
            _leave(stopping, config.steps)
    return _final_tables(config, workdir, dataset, roles, data, memory["seconds"], memory["peak"])


def _leave(stopping: int, step: int) -> NoReturn:
    if parallel.is_main_process():
        name = signal.Signals(stopping).name
        print(f"stopped by {name} at step {step}; saved. Run the same command to go on.")
    sys.exit(128 + stopping)


def open_data(config: ConfigDict) -> tuple[ConfigDict, PreparedDataset, Roles]:
    """Checks a config, opens its data and says who plays which part.

    Returns:
      The config, with `data.labeled_patients` as `data.labeled_fraction` makes it; the dataset; the parts.

    Raises:
      ValueError, FileNotFoundError: config or data cannot be used; says why.
    """
    experiment.check_config(config)
    dataset = open_prepared(Path(config.data.path))
    if config.data.labeled_fraction > 0:
        config = config.copy_and_resolve_references()
        config.data.labeled_patients = patients_of_fraction(dataset, config.data.labeled_fraction)
    roles = assign_roles(dataset, config.data.labeled_patients, config.data.labeled_seed)
    if experiment.uses_unlabeled(config) and not roles.unlabeled:
        every = config.data.labeled_patients < 0
        raise ValueError(
            f"data.labeled_patients={config.data.labeled_patients}{' (all)' if every else ''} leaves no unlabelled "
            f"patient for method {config.method!r}: give a smaller number, or take :supervised."
        )
    return config, dataset, roles


def images_of_step(config: ConfigDict) -> int:
    """Images in a step, over all devices."""
    return config.data.labeled_batch + (config.data.unlabeled_batch if experiment.uses_unlabeled(config) else 0)


class Batches:
    """The batches of a training, by step.

    Samples that take no more than `data.device_memory` lie in the memory of each device, and a batch is gathered
    there; otherwise it is read from the memory-mapped cache.
    """

    def __init__(self, config: ConfigDict, dataset: PreparedDataset, roles: Roles):
        canvas = canvas_shape(roles.labeled + roles.unlabeled, tuple(config.data.patch_size))
        self.seed = config.seed
        self.pools = {"labeled": Pool(dataset, roles.labeled, canvas, labeled=True)}
        self.sizes = {"labeled": config.data.labeled_batch}
        if experiment.uses_unlabeled(config):
            self.pools["unlabeled"] = Pool(dataset, roles.unlabeled, canvas, labeled=False)
            self.sizes["unlabeled"] = config.data.unlabeled_batch
        self.resident = None
        if sum(pool.size_in_bytes() for pool in self.pools.values()) <= config.data.device_memory * 2**30:
            self.resident = {
                part: jax.device_put(pool.batch(np.arange(len(pool.samples))), parallel.on_every_device())
                for part, pool in self.pools.items()
            }

    def indices(self, step: int) -> dict[str, np.ndarray]:
        """Samples of the global batch of a step, for each pool."""
        return {
            part: sample_order(self.seed, stream, step, self.sizes[part], len(pool.samples))
            for stream, (part, pool) in enumerate(self.pools.items())
        }

    def load(self, step: int) -> dict[str, dict[str, Any]]:
        """This process's share of the batch of a step, split over its devices."""
        share = {part: i[parallel.local_slice(self.sizes[part])] for part, i in self.indices(step).items()}
        if self.resident:
            return {part: parallel.gather(self.resident[part], parallel.shard(i)) for part, i in share.items()}
        return parallel.shard({part: self.pools[part].batch(i) for part, i in share.items()})

    def names(self, step: int) -> dict[str, list[str]]:
        """Case ids in the batch of a step."""
        indices = self.indices(step)
        return {part: pool.names(indices[part]) for part, pool in self.pools.items()}

    def run(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        """Yields (step, batch), reading the next batch while the device works on this one."""
        if self.resident:
            # Nothing is read. And what devices do must be begun in one order in all processes, so not by two threads.
            yield from ((step, self.load(step)) for step in range(start, stop))
            return
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self.load, start)
            for step in range(start, stop):
                batch = following.result()
                following = reader.submit(self.load, step + 1)
                yield step, batch


def _read(unread: list[tuple[int, Any]], pending: dict[str, tuple[float, float]], batches: Batches) -> None:
    """Adds the metrics of past steps to `pending`, (sum, count) each, and empties `unread`."""
    for step, values in jax.device_get(unread):
        if not np.isfinite(values["loss"][0]) or not np.isfinite(values["grad_norm"][0]):
            means = {name: float(total) / max(float(count), 1.0) for name, (total, count) in values.items()}
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {step}: {means}; cases of the batch: "
                f"{batches.names(step)}. The last checkpoint is good; look at these scans, or lower "
                "optimizer.learning_rate."
            )
        for name, (total, count) in values.items():
            old = pending.get(name, (0.0, 0.0))
            pending[name] = (old[0] + float(total), old[1] + float(count))
    unread.clear()


class Log:
    """metrics.csv, TensorBoard events and a line on the terminal for each row; pictures go to the events too.

    Events are written here and not by tensorboardX's thread: with a full disk that ends, and whoever writes to it then
    waits for ever.
    """

    def __init__(self, workdir: Path, start: int, main: bool):
        self.main = main
        if not main:
            return
        self.path = workdir / "metrics.csv"
        rows = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= start]
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.events = EventsWriter(str(folder / "events"))
        # What a training that was killed told of later steps counts no more.
        self._tell(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: dict[str, Any], steps: int, images: int) -> None:
        """Writes one row; fields it lacks stay empty."""
        if not self.main:
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            text = {n: f"{v:.8g}" if isinstance(v, float) else v for n, v in row.items()}
            csv.DictWriter(file, COLUMNS).writerow(text)
        scalars = Summary()
        for name, value in row.items():
            if name != "step":
                scalars.MergeFrom(tensorboard.scalar(name, value))
        self._tell(Event(step=row["step"], summary=scalars))
        left = (steps - row["step"]) * images / max(row["images_per_s"], 1e-9)
        parts = [f"step {row['step']}/{steps}"]
        parts += [f"{name} {row[name]:.3f}" for name in TERMS if name in row and name not in UNTOLD]
        if "val_dice" in row:
            parts += [f"val Dice {row['val_dice']:.3f}"]
        parts += [f"{row['images_per_s']:.0f} images/s", f"{duration(left)} left"]
        print("  ".join(parts), flush=True)

    def images(self, paths: Sequence[Path], step: int) -> None:
        """Adds `best_CASE.png` and so on to the events, as val/best and so on."""
        for path in paths:
            picture = matplotlib.image.imread(path)
            name = f"val/{path.stem.split('_')[0]}"
            self._tell(Event(step=step, summary=tensorboard.image(name, picture, dataformats="HWC")))

    def _tell(self, event: Event) -> None:
        event.wall_time = time.time()
        self.events.write_event(event)
        self.events.flush()

    def close(self) -> None:
        """Closes the file of the events."""
        if self.main:
            self.events.close()


class _caught_signals:
    """Collects SIGTERM and SIGINT, so that the loop can save before it leaves."""

    def __enter__(self) -> list[signal.Signals]:
        caught: list[signal.Signals] = []
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, lambda n, _: caught.append(signal.Signals(n)))
            except ValueError:  # not the main thread, as in a notebook's worker
                pass
        return caught

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def describe(config: ConfigDict, dataset: PreparedDataset, roles: Roles, held: dict[str, set[int]], start: int) -> None:
    """Prints who plays which part, and in how many of their cases each class is; `held`: see `classes_held`."""

    def count(cases):
        patients = len({case.patient_id for case in cases})
        return f"{patients} patients, {len(cases)} cases, {sum(c.grid.shape[0] for c in cases)} slices"

    print(f"{dataset.name}: method {config.method}, {config.steps} steps, seed {config.seed}")
    print(f"  labelled    {count(roles.labeled)}: {', '.join(sorted({c.patient_id for c in roles.labeled}))}")
    used = "" if experiment.uses_unlabeled(config) else " (not used by this method)"
    print(f"  unlabelled  {count(roles.unlabeled)}{used}")
    print(f"  val         {count(roles.val)}\n  test        {count(roles.test)}")
    if roles.left_out:
        print(f"  left out    {', '.join(c.case_id for c in roles.left_out)}: no label, but a labelled patient")
    if not roles.val:
        print("  no val cases: the last checkpoint will be used, and nothing is known of how good it is")
    kind = jax.devices()[0].device_kind
    print(f"  {jax.device_count()} device(s) ({kind}), {jax.process_count()} process(es)")
    if start:
        print(f"  goes on from step {start}", flush=True)
    _describe_classes(dataset.recipe.class_names, roles, held)


def _facts(dataset: PreparedDataset, roles: Roles, data: dict[str, str]) -> dict[str, Any]:
    """What the report tells of data and machine; `data`: see `identity`."""
    parts = {"labelled": roles.labeled, "unlabelled": roles.unlabeled, "val": roles.val, "test": roles.test}
    devices = jax.devices()
    packages = ("sscl_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "dataset": dataset.name,
        **data,
        "recipe": dataset.recipe.to_dict(),
        "channels": dataset.channels,
        "roles": {
            role: {
                "patients": list(dict.fromkeys(case.patient_id for case in cases)),
                "cases": len(cases),
                "slices": sum(case.grid.shape[0] for case in cases),
            }
            for role, cases in parts.items()
        },
        "hardware": f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), "
        f"{os.cpu_count()} cores of {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "revision": _revision(),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that others read, and that is whole under its name."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _revision() -> str:
    """Git commit of the source, with `-dirty` where files of it were changed; "" where this is an installed copy."""
    source = Path(__file__).resolve().parents[1]
    if not (source / ".git").exists():
        return ""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or it will not read this folder
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_classes(class_names: Sequence[str], roles: Roles, held: dict[str, set[int]]) -> None:
    """Prints in how many cases each class is, and which labels are empty; a class to learn must be in one."""
    for c, name in enumerate(class_names[1:], start=1):
        labeled, val = (sum(c in held[case.case_id] for case in part) for part in (roles.labeled, roles.val))
        print(f"  {name}: in {labeled} of {len(roles.labeled)} labelled cases, {val} of {len(roles.val)} val cases")
        if not labeled:
            print(
                f"warning: no labelled case holds {name}, so it cannot be learnt: take more patients, others "
                "(data.labeled_seed), or another split"
            )
    for part, cases in (("labelled", roles.labeled), ("val", roles.val)):
        if empty := [case.case_id for case in cases if not held[case.case_id]]:
            print(f"  empty label ({part}): {', '.join(empty)}")


def _tell_unpredicted(counts: dict[str, int], class_names: Sequence[str], network: str, step: int) -> None:
    """Warns of classes that have not been predicted for some evaluations, and again after as many."""
    for c, times in counts.items():
        if times % UNPREDICTED == 0:
            print(
                f"warning: step {step}: in {times} evaluations in a row the {network} has predicted no "
                f"{class_names[int(c)]} in any val case, though some hold it: label more patients, or train for longer"
            )


def _final_tables(
    config: ConfigDict,
    workdir: Path,
    dataset: PreparedDataset,
    roles: Roles,
    data: dict[str, str],
    seconds: float,
    peak: float,
) -> dict[str, dict[str, metrics.Summary]]:
    """Measures the best checkpoint (the last, without val cases) on val and, if asked for now or before, test.

    `seconds`, `peak` (GiB): what the training took, over all its processes one after the other.
    """
    # A table that an earlier call left is measured again, since masks or settings may have changed.
    test = config.eval.test or parallel.from_main((workdir / "test_cases.csv").is_file)
    splits = {"val": roles.val} | ({"test": roles.test} if test else {})
    model = experiment.make_model(config, dataset.num_classes)
    predict = evaluate.make_predictor(model, tuple(config.data.patch_size), config.eval.final_overlap)
    largest = config.eval.largest_component
    networks = list(experiment.load_networks(workdir).values())
    summaries: dict[str, dict[str, metrics.Summary]] = {}
    facts = _facts(dataset, roles, data) | {"features": {}, "measured_on": {}}
    for split, cases in splits.items():
        if not cases:
            continue
        results = {n.name: evaluate.evaluate_cases(predict, n.variables, dataset, cases, largest) for n in networks}
        summaries[split] = {name: metrics.summarise([r.metrics for r in rs]) for name, rs in results.items()}
        if not parallel.is_main_process():
            continue
        facts["measured_on"][split] = digest_of_labels(dataset, cases)
        rows = [(n, r.case.case_id, r.case.patient_id, r.metrics) for n, rs in results.items() for r in rs]
        evaluate.write_case_table(workdir / f"{split}_cases.csv", rows, dataset.recipe.class_names)
        pictures.write_overlays(workdir / f"{split}_overlays", results[config.eval.select], dataset)
        pool = Pool(dataset, cases, tuple(config.data.patch_size), labeled=True)
        for network in networks:
            title = evaluate.heading(network, split, cases)
            print("\n" + metrics.format_table(summaries[split][network.name], dataset.recipe.class_names[1:], title))
            x, y = evaluate.pixel_features(model, network.variables, pool, dataset.num_classes)
            compactness, separability = metrics.compactness_separability(x, y, dataset.num_classes)
            print(f"pixel features: compactness {compactness:.3f} (0..1), separability {separability:.3f} (0..2)")
            quality = {"compactness": compactness, "separability": separability}
            facts["features"].setdefault(split, {})[network.name] = quality
            if network.name == config.eval.select:
                pictures.write_features(workdir / f"{split}_features.png", x, y, dataset.recipe.class_names)
    if parallel.is_main_process():
        peak = max(peak, parallel.peak_memory())
        facts |= {"seconds": seconds, "peak_memory_gib": peak, "checkpoint": networks[0].path.name}
        _write_json(workdir / "run.json", facts)
        page = report.write_report(workdir)
        model_card.write_card(workdir)
        print(f"\ntrained for {duration(seconds)}, peak memory {peak:.2f} GiB; look at {page}", flush=True)
    return summaries


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
