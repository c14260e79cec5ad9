"""Where the time of a training step goes.

    python benchmarks/step.py --config=acdc --method=anatomical_pl --data=data/acdc
    python benchmarks/step.py --scaling

Each part is compiled and timed alone, and the parts are taken in turns, so that a machine that slows down slows all of
them; the least of the repeats is printed. The parts need not add up to the whole: fused, some work is shared. FLOPs,
bytes and temporary memory are what XLA says of the compiled program; they are set beside the rates of a large matmul
and a large copy on the same machine. `--scaling` compiles the contrast alone, at several sizes and numbers of images,
and needs no data.
"""

import argparse
import importlib
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from sscl_jax import contrast, experiment, parallel, train, train_step
from sscl_jax.data.prepared import open_prepared
from sscl_jax.data.sampling import assign_roles

SIZES, IMAGES = (128, 256, 512), (1, 4, 24)
NETWORK_PIXELS = 4 * 256**2  # more than these in a batch, and the network takes too long to be timed here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="acdc", help="module below configs/")
    parser.add_argument("--method", default="anatomical_pl", help="row of METHODS in configs/base.py")
    parser.add_argument("--data", help="prepared dataset")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--scaling", action="store_true", help="the contrast alone, by size and number of images")
    args = parser.parse_args()
    if args.scaling:
        scaling(args.repeats)
        return
    if not args.data:
        parser.error("--data is needed without --scaling")

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

    def update(state):
        updates, opt_state = optimizer.update(state.student, state.opt_state, state.student)
        student = jax.tree.map(jnp.add, state.student, updates)
        return opt_state, train_step.update_teacher(state.teacher, student, state.step, 0.99, "network")

    def augment(keys, examples):
        return jax.vmap(lambda k, e: train_step.draw_views(k, e, views, patch, classes))(keys, examples)

    def without_contrast():
        other = config.copy_and_resolve_references()
        other.contrast.weight = 0.0
        return experiment.make_step(other, classes)

    def fresh():
        return parallel.replicate(state)

    compiled = {
        "augmentation, both views": Program(jax.jit(augment), keys, examples),
        "teacher forward": Program(jax.jit(forward), state.teacher, pixels),
        "student forward": Program(jax.jit(forward), state.student, pixels),
        "student forward + backward": Program(
            jax.jit(jax.grad(lambda p, x: jnp.mean(forward(p, x) ** 2))), state.student, pixels
        ),
        "optimiser + moving average": Program(jax.jit(update), state),
        "whole step": Program(experiment.make_step(config, classes), fresh(), batch),
    }
    if config.contrast.weight > 0:
        compiled["whole step without contrast"] = Program(without_contrast(), fresh(), batch)
    least = least_seconds({"input (read, on the host)": lambda: batches.load(0)} | compiled, args.repeats)
    matmul, copy = machine_rates(args.repeats)

    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{args.config}:{args.method}, {images} images of {patch}, {device}")
    print(f"a matmul does {matmul / 1e9:.0f} GFLOP/s, a copy moves {copy / 1e9:.1f} GB/s")
    names = f"{'time':>11}{'of step':>9}{'compile':>9}{'GFLOP':>8}{'of rate':>9}{'GB':>7}{'of rate':>9}{'temp':>10}"
    print(f"{'':30}{names}")
    for name, seconds in least.items():
        print(f"{name:30}{1e3 * seconds:8.1f} ms{100 * seconds / least['whole step']:7.1f} %", end="")
        if program := compiled.get(name):
            print(f"{program.compile_seconds:7.1f} s{program.flops / 1e9:8.2f}", end="")
            print(f"{100 * program.flops / seconds / matmul:7.0f} %{program.bytes / 1e9:7.2f}", end="")
            print(f"{100 * program.bytes / seconds / copy:7.0f} %{program.temporary / 2**20:6.0f} MiB", end="")
        print()
    if config.contrast.weight > 0:
        share = 1 - least["whole step without contrast"] / least["whole step"]
        print(f"{'contrast, by difference':30}{'':11}{100 * share:7.1f} %")
    longer = real_input(compiled["whole step"], batches, batch, args.repeats)
    print(f"real input against a fixed batch: {100 * longer:+.1f} %")
    print(f"peak memory of the process {parallel.peak_memory():.2f} GiB")


class Program:
    """A compiled function with its arguments; a state that is donated is replaced by the one returned.

    Attributes:
      compile_seconds: tracing, lowering and compiling.
      flops, bytes: of one call, as XLA counts them.
      temporary: bytes of memory besides arguments and results.
    """

    def __init__(self, function: Any, *arguments: Any):
        start = time.perf_counter()
        self.compiled = function.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        self.arguments = list(arguments)
        self.donates = hasattr(arguments[0], "opt_state") and len(arguments) > 1
        cost = self.compiled.cost_analysis()
        self.flops, self.bytes = cost["flops"], cost["bytes accessed"]
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        result = self.compiled(*self.arguments)
        if self.donates:
            self.arguments[0] = result[0]
        return result


def least_seconds(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each part, the least of some turns; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(part())
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def machine_rates(repeats: int) -> tuple[float, float]:
    """FLOP/s of a float32 matmul and bytes/s of a copy, read and written, on this machine."""
    n, count = 2048, 2**26
    matrix, line = jnp.ones((n, n)), jnp.ones(count)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    seconds = least_seconds({"matmul": lambda: multiply(matrix, matrix), "copy": lambda: add(line)}, repeats)
    return 2 * n**3 / seconds["matmul"], 2 * 4 * count / seconds["copy"]


def real_input(step: Program, batches: train.Batches, fixed: dict, repeats: int) -> float:
    """How much longer steps take that read their batches, as in training, than steps on a batch in memory."""
    count = 10

    def run(inputs: Iterable[dict]) -> Any:
        for step.arguments[1] in inputs:
            result = jax.block_until_ready(step())
        return result

    def real():
        return run(batch for _, batch in batches.run(0, count))

    seconds = least_seconds({"real": real, "fixed": lambda: run([fixed] * count)}, max(repeats // 3, 1))
    return seconds["real"] / seconds["fixed"] - 1


def scaling(repeats: int) -> None:
    """Time and memory of the contrast alone, forward and backward, beside those of the network."""
    config, classes = base.get_config("anatomical"), 4
    model = experiment.make_model(config, classes)
    params = experiment.make_state(config, classes, channels=1).student
    options = {name: config.contrast[name] for name in train_step.Contrast.__dataclass_fields__}
    chosen = train_step.Contrast(**options)

    def loss(projector, features, key_features, query_pixels, key_pixels, keys):
        def drawn(pixels, features, count, stream):
            own = jax.vmap(lambda k: jax.random.fold_in(k, stream))(keys)
            found = contrast.anatomical_draw(own, pixels, num_classes=classes, count=count, threshold=chosen.threshold)
            flat = features.reshape(len(features), -1, features.shape[-1])
            projected = model.apply(
                {"params": {"projector": projector}}, flat[found.image, found.pixel], method="project"
            )
            return projected, found

        queries, query_found = drawn(query_pixels, features, chosen.queries, 0)
        targets, key_found = drawn(key_pixels, key_features, chosen.keys, 1)
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

    print(
        f"contrast alone, forward and backward; {classes} classes, {chosen.queries} queries and {chosen.keys} keys ",
        end="",
    )
    print(f"of each class and image; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'size':>5}{'images':>8}{'time':>12}{'temp':>12}{'network':>12}{'temp':>12}{'of both':>9}")
    for size, images in itertools.product(SIZES, IMAGES):
        random = np.random.RandomState(0)
        coarse = (images, size // 2**chosen.level, size // 2**chosen.level, config.model.widths[chosen.level])
        features = random.randn(*coarse).astype(np.float32)
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
        if images * size**2 <= NETWORK_PIXELS:
            parts["network"] = Program(jax.jit(network), params, random.randn(images, size, size, 1).astype(np.float32))
        seconds = least_seconds(dict(parts), repeats)
        print(f"{size:5}{images:8}", end="")
        for name, program in parts.items():
            print(f"{1e3 * seconds[name]:9.1f} ms{program.temporary / 2**20:8.1f} MiB", end="")
        print(f"{100 * seconds['contrast'] / sum(seconds.values()):7.1f} %" if "network" in parts else "", flush=True)


if __name__ == "__main__":
    main()
