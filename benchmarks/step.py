"""Where the time of a training step goes.

    python benchmarks/step.py --config=acdc --method=anatomical_pl --data=data/acdc
    python benchmarks/step.py --config=base --images=12+12 --size=256 --dtype=bfloat16 --trace=trace
    python benchmarks/step.py --scaling

Each part is compiled and timed alone, and the parts are taken in turns, so that a machine that slows down slows all of
them; the least of the repeats is printed. The parts need not add up to the whole: fused, some work is shared. Temporary
memory is what XLA says of the compiled program; FLOPs and bytes are counted as `common.Program` says, and set beside
the rates of a large matmul and a large copy on the same machine. Without `--data` the images are made. `--trace` writes
a profile of some steps for TensorBoard or Perfetto, and prints what took longest in it. `--scaling` compiles the
contrast alone, at several sizes and numbers of images.
"""

import argparse
import collections
import functools
import gzip
import importlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    CLASSES,
    Program,
    add_options,
    describe_compilation,
    describe_rates,
    device_memory,
    labeled_and_unlabeled,
    least_seconds,
    machine_rates,
    make_batch,
    on_devices,
    on_gpu,
    set_sizes,
)
from ml_collections import ConfigDict

from configs import base
from sscl_jax import contrast, experiment, parallel, train, train_step
from sscl_jax.data.prepared import PreparedDataset
from sscl_jax.data.sampling import Roles

SIZES, IMAGES = (128, 256, 512), (1, 4, 24)
NETWORK_PIXELS = 4 * 256**2  # more than these in a batch, and on CPU the network takes too long to be timed here
TRACED = 5  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="acdc", help="module below configs/")
    parser.add_argument("--method", default="anatomical_pl", help="row of METHODS in configs/base.py")
    parser.add_argument("--data", help="prepared dataset")
    parser.add_argument("--images", type=labeled_and_unlabeled, default="4+4", help="made ones, without --data")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of made images")
    add_options(parser)
    parser.add_argument("--trace", type=Path, help="folder for a profile of some steps")
    parser.add_argument("--scaling", action="store_true", help="the contrast alone, by size and number of images")
    args = parser.parse_args()
    parallel.keep_memory()
    if args.scaling:
        scaling(args.dtype, args.repeats, args.burst)
        return

    inputs, classes, channels = {}, CLASSES, 1
    try:
        config = importlib.import_module(f"configs.{args.config}").get_config(args.method).copy_and_resolve_references()
        config.model.dtype = args.dtype
        if args.data:
            config.data.path = args.data
            config, dataset, roles = train.open_data(config)
            inputs = make_inputs(config, dataset, roles)
            classes, channels = dataset.num_classes, dataset.channels
        else:
            set_sizes(config, args.images, args.size)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    batch = on_devices(inputs["input from files"].load(0) if inputs else parallel.shard(make_batch(config)))
    model = experiment.make_model(config, classes)
    state = experiment.make_state(config, classes, channels)
    patch = tuple(config.data.patch_size)
    counts = {name: part["image"].shape[0] * part["image"].shape[1] for name, part in batch.items()}
    images = sum(counts.values())
    taught = images if config.contrast.labeled else counts.get("unlabeled", images)  # what the teacher sees
    examples = jax.tree.map(lambda *x: jnp.concatenate(x), *(  # all images of the batch, without labels
        {k: v.reshape(-1, *v.shape[2:]) for k, v in part.items() if k != "label"} for part in batch.values()
    ))  # fmt: skip
    pixels = jnp.asarray(np.random.RandomState(0).randn(images, *patch, channels), jnp.float32)
    views, optimizer = experiment.make_views(config), experiment.make_optimizer(config)
    keys = jax.random.split(jax.random.key(0), images)

    def forward(params, x):
        return model.apply({"params": params}, x)[0]

    def update(state):
        updates, opt_state = optimizer.update(state.student, state.opt_state, state.student)
        student = jax.tree.map(jnp.add, state.student, updates)
        return opt_state, train_step.update_teacher(state.teacher, student, state.step, 0.99, "network")

    def augment(keys, examples):
        return jax.vmap(lambda k, e: train_step.draw_views(k, e, views, patch, classes))(keys, examples)

    def without_contrast():
        other = config.copy_and_resolve_references()
        other.contrast.weight = 0.0
        if not experiment.uses_unlabeled(other):  # the same images and the teacher's pass, at the price of a difference
            other.consistency.weight = config.contrast.weight
        return experiment.make_step(other, classes)

    def fresh():
        return parallel.replicate(state)

    compiled = {
        "whole step": Program(experiment.make_step(config, classes), fresh(), batch),
        "augmentation, both views": Program(jax.jit(augment), keys, examples),
        "teacher forward": Program(jax.jit(forward), state.teacher, pixels[:taught]),
        "student forward": Program(jax.jit(forward), state.student, pixels),
        "student forward + backward": Program(
            jax.jit(jax.grad(lambda p, x: jnp.mean(forward(p, x) ** 2))), state.student, pixels
        ),
        "optimiser + moving average": Program(jax.jit(update), state),
    }
    if config.contrast.weight > 0:
        compiled["whole step without contrast"] = Program(without_contrast(), fresh(), batch)
    parts: dict[str, Any] = {name: functools.partial(batches.load, 0) for name, batches in inputs.items()}
    least = least_seconds(parts | compiled, args.repeats, args.burst)
    memory = device_memory()  # of the device that of all parts together, on CPU of all that the process did
    rates, copy = machine_rates(args.repeats, args.burst)
    matmul = rates[args.dtype]

    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{args.config}:{args.method} in {args.dtype}, {images} images of {patch}, {device}")
    print(describe_rates(rates, copy))
    print(describe_compilation(), end="")
    names = f"{'time':>11}{'of step':>9}{'compile':>9}{'GFLOP':>9}{'of rate':>9}{'GB':>7}{'of rate':>9}{'temp':>10}"
    print(f"{'':30}{names}")
    for name, seconds in least.items():
        print(f"{name:30}{1e3 * seconds:8.2f} ms{100 * seconds / least['whole step']:7.1f} %", end="")
        if program := compiled.get(name):
            print(f"{program.compile_seconds:7.1f} s{program.flops / 1e9:9.2f}", end="")
            print(f"{100 * program.flops / seconds / matmul:7.0f} %{program.bytes / 1e9:7.2f}", end="")
            print(f"{100 * program.bytes / seconds / copy:7.0f} %{program.temporary / 2**20:6.0f} MiB", end="")
        print()
    if config.contrast.weight > 0:
        share = 1 - least["whole step without contrast"] / least["whole step"]
        print(f"{'contrast, by difference':30}{'':11}{100 * share:7.1f} %")
    for name, batches in inputs.items():
        longer = real_input(compiled["whole step"], batches, batch, args.repeats)
        print(f"steps with {name}, against a fixed batch: {100 * longer:+.1f} %")
    print(f"peak memory of the {'device' if on_gpu() else 'process'} {memory:.2f} GiB", flush=True)
    if args.trace:
        trace(compiled["whole step"], args.trace)


def make_inputs(config: ConfigDict, dataset: PreparedDataset, roles: Roles) -> dict[str, train.Batches]:
    """The ways in which a training can get its batches: from files, and from the device's memory if they fit there.

    Files that were just written or read are in the memory of the system.
    """
    from_files = config.copy_and_resolve_references()
    from_files.data.device_memory = 0.0
    inputs = {"input from files": train.Batches(from_files, dataset, roles)}
    batches = train.Batches(config, dataset, roles)
    return inputs | ({"input from device memory": batches} if batches.resident else {})


def real_input(step: Program, batches: train.Batches, fixed: dict, repeats: int) -> float:
    """How much longer steps take that read their batches, as in training, than steps on a batch in memory."""
    count = 10

    def run(inputs: Iterable[dict]) -> Any:
        for step.arguments[1] in inputs:
            result = step()
        return jax.block_until_ready(result)

    def real():
        return run(batch for _, batch in batches.run(0, count))

    seconds = least_seconds({"real": real, "fixed": lambda: run([fixed] * count)}, max(repeats // 3, 1), burst=1)
    return seconds["real"] / seconds["fixed"] - 1


def trace(step: Program, folder: Path) -> None:
    """Writes a profile of some steps, and prints which kernels (on CPU: operations) took most of their time."""
    with jax.profiler.trace(str(folder)):
        for _ in range(TRACED):
            result = step()
        jax.block_until_ready(result)
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    # What other tracks of a GPU show, if there are any, is the time of its streams again.
    streams = {
        track for track, name in threads.items() if name.startswith("Stream") and "/device" in processes[track[0]]
    }

    def counts(event):
        return (event["pid"], event["tid"]) in streams if streams else "hlo_op" in event.get("args", {})

    total, times = collections.Counter[str](), collections.Counter[str]()
    for event in events:
        if event.get("ph") == "X" and counts(event):
            total[event["name"]] += event["dur"] / 1e3 / TRACED
            times[event["name"]] += 1
    print(f"{newest}: {sum(total.values()):.2f} ms a step, of which")
    for name, milliseconds in total.most_common(15):
        print(f"{milliseconds:9.3f} ms{times[name] / TRACED:8.1f} x  {name[:100]}")


def scaling(dtype: str, repeats: int, burst: int | None) -> None:
    """Time and memory of the contrast alone, forward and backward, beside those of the network."""
    config, classes = base.get_config("anatomical"), CLASSES
    config.model.dtype = dtype
    model = experiment.make_model(config, classes)
    params = experiment.make_state(config, classes, channels=1).student
    chosen = experiment.make_contrast(config)

    def loss(projector, features, key_features, query_pixels, key_pixels, keys):
        def drawn(pixels, features, count, stream):
            own = jax.vmap(lambda k: jax.random.fold_in(k, stream))(keys)
            found = contrast.anatomical_draw(own, pixels, num_classes=classes, count=count, threshold=chosen.threshold)
            flat = features.reshape(len(features), -1, features.shape[-1])
            projected = model.apply(
                {"params": {"projector": projector}}, flat[found.image, found.pixel], method="project"
            )
            return projected, found

        queries, query_found = drawn(query_pixels, features, chosen.num_queries, 0)
        targets, key_found = drawn(key_pixels, key_features, chosen.num_keys, 1)
        pairs = contrast.anatomical_pairs(query_found, key_found)
        terms, valid = contrast.info_nce(queries, jax.lax.stop_gradient(targets), *pairs, chosen.temperature)
        return jnp.sum(terms) / jnp.maximum(jnp.sum(valid), 1)

    def term(projector, features, key_features, probs, views, keys):
        pixels = train_step.describe_pixels(probs, views, chosen)
        return jax.grad(loss, argnums=(0, 1))(projector, features, key_features, pixels, pixels, keys)

    def network(params, images):
        def squares(params):
            logits, features = model.apply({"params": params}, images)
            return jnp.mean(logits**2) + jnp.mean(features**2)

        return jax.grad(squares)(params), model.apply({"params": params}, images)

    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(
        f"contrast alone, forward and backward in {dtype}; {classes} classes, {chosen.num_queries} queries and ", end=""
    )
    print(f"{chosen.num_keys} keys of each class and image; {device}")
    print(f"{'size':>5}{'images':>8}{'time':>12}{'temp':>12}{'network':>12}{'temp':>12}{'of both':>9}")
    for size, images in itertools.product(SIZES, IMAGES):
        random = np.random.RandomState(0)
        coarse = (images, size // 2**chosen.level, size // 2**chosen.level, config.model.widths[chosen.level])
        features = jnp.asarray(random.randn(*coarse), jnp.float32)
        # Half of each image is sure of its class, and all classes are there.
        probs = jax.nn.one_hot(np.arange(size) * classes // size, classes)[:, None].repeat(size, 1)
        probs = jnp.broadcast_to(probs, (images, size, size, classes))
        views = {
            "plane": jnp.zeros((images, size, size, 2)),
            "depth": jnp.zeros((images, size, size)),
            "inside": jnp.broadcast_to(jnp.arange(size) < size // 2, (images, size, size)),
        }
        keys = jax.random.split(jax.random.key(0), images)
        parts = {"contrast": Program(jax.jit(term), params["projector"], features, features, probs, views, keys)}
        if on_gpu() or images * size**2 <= NETWORK_PIXELS:
            pixels = jnp.asarray(random.randn(images, size, size, 1), jnp.float32)
            parts["network"] = Program(jax.jit(network), params, pixels)
        seconds = least_seconds(dict(parts), repeats, burst)
        print(f"{size:5}{images:8}", end="")
        for name, program in parts.items():
            print(f"{1e3 * seconds[name]:9.1f} ms{program.temporary / 2**20:8.1f} MiB", end="")
        print(f"{100 * seconds['contrast'] / sum(seconds.values()):7.1f} %" if "network" in parts else "", flush=True)


if __name__ == "__main__":
    main()
