"""What a training would do: its data, steps, memory and time. Nothing is written to --workdir.

python -m sscl_jax.main --config=configs/acdc.py --workdir=runs/acdc --dry_run
"""

import os
import statistics
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sscl_jax import config_fields, evaluate, experiment, parallel, train
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.data.sampling import classes_held, identity

STEPS = 5  # timed, after one that compiles


def show_plan(config: ConfigDict, workdir: Path) -> None:
    """Prints the plan of a training; takes some steps of it, to tell how long all will take.

    Args:
      config: see `configs/base.py`.
      workdir: where the training would go on, if there is one.

    Raises:
      ValueError, FileNotFoundError, OSError: as `train.train` would.
    """
    config, dataset, roles = train.open_data(config)
    place = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise OSError(f"--workdir={workdir} cannot be written: choose another folder.")
    start = 0
    if newest := Checkpoints(workdir, "last").newest():
        start, meta = newest
        config_fields.check_same_training(config, meta, identity(dataset, roles), workdir)
    tell = print if parallel.is_main_process() else lambda *_: None
    if parallel.is_main_process():
        train.describe(config, dataset, roles, classes_held(dataset, roles.labeled + roles.val), start)
    if start >= config.steps:
        tell(f"dry run: this training has ended; the same command measures it again in {workdir}")
        return

    state = parallel.replicate(experiment.make_state(config, dataset.num_classes, dataset.channels))
    step_fn, batches = experiment.make_step(config, dataset.num_classes), train.Batches(config, dataset, roles)
    seconds = []
    for step in range(1 + STEPS):
        mark = time.monotonic()
        state, metrics = step_fn(state, batches.load(step))
        jax.block_until_ready((state, metrics))
        seconds.append(time.monotonic() - mark)
    first, typical = seconds[0], statistics.median(seconds[1:])
    left, speed = config.steps - start, train.images_of_step(config) / typical
    total = first + (left - 1) * typical
    tell(f"  a step takes {typical:.2f} s ({speed:.0f} images/s), the first {first:.0f} s; {left} steps are left")
    if roles.val:
        model = experiment.make_model(config, dataset.num_classes)
        predict = evaluate.make_predictor(model, tuple(config.data.patch_size), config.eval.overlap)
        variables = experiment.network_variables(parallel.to_host(state), config.eval.select)
        for _ in range(2):  # the first compiles
            mark = time.monotonic()
            evaluate.evaluate_cases(predict, variables, dataset, roles.val[:1], config.eval.largest_component)
        once = (time.monotonic() - mark) * len(roles.val)
        times = -(-config.steps // config.eval.every) - start // config.eval.every
        total += times * once
        tell(f"  an evaluation takes about {train.duration(once)}; {times} are left, then the final tables")
    tell(f"  in all about {train.duration(total)}, without the final tables; memory {_memory()}")
    tell(f"dry run: nothing was written to {workdir}")


def _memory() -> str:
    """Greatest use of memory so far, of the device where it tells, otherwise of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        limit = f" of {stats['bytes_limit'] / 2**30:.1f}" if "bytes_limit" in stats else ""
        return f"{stats['peak_bytes_in_use'] / 2**30:.2f}{limit} GiB on each device"
    return f"{parallel.peak_memory():.2f} GiB"
