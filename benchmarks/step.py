"""Where the time of a training step goes.

    python benchmarks/step.py --config=acdc --method=anatomical_pl --data=data/acdc

Each part is compiled and timed alone, and the parts are taken in turns, so that a machine that slows down slows all of
them; the least of the repeats is printed. The parts need not add up to the whole: fused, some work is shared.
"""

import argparse
import importlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sscl_jax import experiment, parallel, train, train_step
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.sampling import assign_roles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="acdc", help="module below configs/")
    parser.add_argument("--method", default="anatomical_pl", help="row of METHODS in configs/base.py")
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    config = importlib.import_module(f"configs.{args.config}").get_config(args.method)
    config.data.path = args.data
    dataset = open_prepared(Path(args.data))
    roles = assign_roles(dataset, config.data.labeled_patients)
    batches = train.Batches(config, dataset, roles)
    batch = batches.load(0)
    classes, channels = dataset.num_classes, dataset.channels
    model = experiment.make_model(config, classes)
    state = experiment.make_state(config, classes, channels)
    patch = tuple(config.data.patch_size)
    images = sum(batches.sizes.values())
    examples = jax.tree.map(lambda *x: jnp.concatenate(x), *(  # all images of the batch, without labels
        {k: v.reshape(-1, *v.shape[2:]) for k, v in part.items() if k != "label"} for part in batch.values()
    ))  # fmt: skip
    pixels = np.random.RandomState(0).randn(images, *patch, channels).astype(np.float32)
    views, optimizer = experiment.make_views(config), experiment.make_optimizer(config)
    keys = jax.random.split(jax.random.key(0), images)

    def forward(params, x):
        return model.apply({"params": params}, x)[0]

    @jax.jit
    def update(state):
        updates, opt_state = optimizer.update(state.student, state.opt_state, state.student)
        student = jax.tree.map(jnp.add, state.student, updates)
        return opt_state, train_step.update_teacher(state.teacher, student, state.step, 0.99, "network")

    def without_contrast():
        other = config.copy_and_resolve_references()
        other.contrast.weight = 0.0
        return experiment.make_step(other, classes)

    def run_step(step, holder):
        holder[0], metrics = step(holder[0], batch)
        return metrics

    def holder():
        return [parallel.to_host(state)]

    augment = jax.jit(jax.vmap(lambda k, e: train_step.draw_views(k, e, views, patch, classes)))
    student = jax.jit(jax.grad(lambda p, x: jnp.mean(forward(p, x) ** 2)))
    teacher = jax.jit(forward)
    whole, whole_state = experiment.make_step(config, classes), holder()
    parts = {
        "input (read, on the host)": lambda: batches.load(0),
        "augmentation, both views": lambda: augment(keys, examples),
        "teacher forward": lambda: teacher(state.teacher, pixels),
        "student forward": lambda: teacher(state.student, pixels),
        "student forward + backward": lambda: student(state.student, pixels),
        "optimiser + moving average": lambda: update(state),
        "whole step": lambda: run_step(whole, whole_state),
    }
    if config.contrast.weight > 0:
        plain, plain_state = without_contrast(), holder()
        parts["whole step without contrast"] = lambda: run_step(plain, plain_state)

    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(args.repeats + 1):  # the first compiles
        for name, part in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(part())
            if repeat:
                times[name].append(time.perf_counter() - start)
    least = {name: min(values) for name, values in times.items()}
    print(f"{args.config}:{args.method}, {images} images of {patch}, {jax.devices()[0].device_kind}")
    for name, seconds in least.items():
        print(f"  {name:30} {1e3 * seconds:8.1f} ms  {100 * seconds / least['whole step']:6.1f} % of the step")
    if config.contrast.weight > 0:
        share = 1 - least["whole step without contrast"] / least["whole step"]
        print(f"  {'contrast, by difference':30} {'':8}     {100 * share:6.1f} % of the step")
    print(f"  peak memory {parallel.peak_memory():.2f} GiB")


if __name__ == "__main__":
    main()
