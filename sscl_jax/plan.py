"""What a training would do: its data, steps, memory and time. Nothing is written.

python -m sscl_jax.main --config=configs/acdc.py --workdir=runs/acdc --dry_run
"""

import resource
import statistics
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sscl_jax import evaluate, experiment, parallel, train
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.data.sampling import classes_held

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
    start = 0
    if (workdir / "checkpoints" / "last").is_dir():
        last = Checkpoints(workdir, "last")
        start = max(last.steps(), default=0)
        if start:
            experiment.check_same_training(config, last.meta(start), dataset.fingerprint, workdir)
    train.describe(config, dataset, roles, classes_held(dataset, roles.labeled + roles.val), start)

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
    print(
        f"  a step takes {typical:.2f} s ({speed:.0f} images/s), the first {first:.0f} s: {left} steps take about "
        f"{train.duration(first + left * typical)}"
    )
    if roles.val:
        model = experiment.make_model(config, dataset.num_classes)
        predict = evaluate.make_predictor(model, tuple(config.data.patch_size), config.eval.overlap)
        variables = experiment.network_variables(parallel.to_host(state), config.eval.select)
        for _ in range(2):  # the first compiles
            mark = time.monotonic()
            evaluate.evaluate_cases(predict, variables, dataset, roles.val[:1], config.eval.largest_component)
        once = (time.monotonic() - mark) * len(roles.val)
        times = -(-config.steps // config.eval.every) - start // config.eval.every
        print(f"  an evaluation takes about {train.duration(once)}: {times} on the way, then the final tables")
    print(f"  memory: {_memory()}\ndry run: nothing was written to {workdir}")


def _memory() -> str:
    """Greatest use of memory so far, of the device where it tells, otherwise of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        limit = f" of {stats['bytes_limit'] / 2**30:.1f}" if "bytes_limit" in stats else ""
        return f"{stats['peak_bytes_in_use'] / 2**30:.2f}{limit} GiB on each device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
