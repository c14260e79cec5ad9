"""What the benchmarks share: made images, compiled programs with their counts, and rates of the machine."""

import argparse
import functools
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sscl_jax import experiment, parallel

CLASSES = 4  # of the made images

# Bytes of an element. Without u8: labels aside, which are few, that is scratch memory of cuDNN and cuBLAS.
_BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def positive(text: str) -> int:
    """A number of things, at least 1: the type of an option."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="model.dtype of jax")
    parser.add_argument(
        "--burst", type=positive, help="calls a turn, with one wait at their end (default 10 on a GPU, or 1)"
    )
    parser.add_argument("--repeats", type=positive, default=10, help="turns")


def labeled_and_unlabeled(text: str) -> tuple[int, int]:
    """`4+4`: the type of the option `--images`."""
    labeled, unlabeled = map(int, text.split("+"))
    return labeled, unlabeled


def set_sizes(config: ConfigDict, images: tuple[int, int], size: int) -> None:
    """Makes a config one for made images, so many in a step and as large as a view.

    Raises:
      ValueError: no training can have these sizes.
    """
    if len(config.data.patch_size) != 2:
        raise ValueError("made images are 2-D; this config needs --data")
    config.data.path = "made"
    config.data.labeled_batch, config.data.unlabeled_batch = images
    config.data.patch_size = (size, size)
    config.augment.foreground = 0.0  # an image is as large as a view, so there is nothing to choose
    experiment.check_config(config)


def make_batch(config: ConfigDict) -> dict[str, dict[str, np.ndarray]]:
    """Noise with discs of the classes 1, 2 and 3 in one another, as the step takes them."""
    random = np.random.RandomState(0)
    size = config.data.patch_size
    rows, columns = np.ogrid[: size[0], : size[1]]

    def part(count):
        centres = random.uniform(0.3, 0.7, (2, count, 1, 1)) * size[0]
        radius = np.hypot(rows - centres[0], columns - centres[1]) / size[0]
        label = np.select([radius < 0.08, radius < 0.14, radius < 0.25], [3, 2, 1], 0).astype(np.uint8)
        image = (label + 0.5 * random.randn(*label.shape))[..., None].astype(np.float32)
        extent = np.tile(np.float32(size), (count, 1))
        return {"image": image, "label": label, "extent": extent, "depth": np.tile(np.float32([0, 1]), (count, 1))}

    batch = {"labeled": part(config.data.labeled_batch)}
    if experiment.uses_unlabeled(config):
        batch["unlabeled"] = part(config.data.unlabeled_batch)
        del batch["unlabeled"]["label"]
    return batch


def on_devices(batch: Any) -> Any:
    """A batch that is split as `parallel.shard` does, each part in the memory of its device."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (parallel.AXIS,))
    return jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.AXIS)))


class Program:
    """A function and its arguments, compiled by the first call; a state that is donated gives way to the one returned.

    Attributes:
      compile_seconds: tracing, lowering and compiling.
    """

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, list(arguments)
        self.donates = hasattr(arguments[0], "opt_state") and len(arguments) > 1

    @functools.cached_property
    def compiled(self) -> Any:
        start = time.perf_counter()
        compiled = self.function.lower(*self.arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def __call__(self) -> Any:
        result = self.compiled(*self.arguments)
        if self.donates:
            self.arguments[0] = result[0]
        return result

    # XLA's cost_analysis passes over calls of cuDNN and cuBLAS, so over nearly all that a step does on a GPU.

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of the convolutions, their padding included, and of the matrix products: two a multiply-add."""
        return _flops(jax.make_jaxpr(self.function)(*self.arguments).jaxpr)

    @functools.cached_property
    def bytes(self) -> int:
        """Operands and results of all fusions and other operations of the optimised program.

        What one of them leaves in a cache for the next counts as written and read; a loop counts once.
        """
        return _bytes(self.compiled.as_text())

    @property
    def temporary(self) -> int:
        """Bytes of memory besides arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            width = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // width
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += _flops(inner) if hasattr(inner, "eqns") else 0
    return total


def _bytes(text: str) -> int:
    computations: dict[str, list[tuple[str, ...]]] = {}
    entry = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            computations[start[2]] = instructions = []
            entry = start[2] if start[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)", line):
            instructions.append(instruction.groups())

    def size(kind):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", kind)
        return sum(_BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)

    def total(name):
        number, sizes = 0, {result: size(kind) for result, kind, *_ in computations[name]}
        for result, _, operation, operands, rest in computations[name]:
            if operation in ("call", "while", "conditional"):
                called = re.findall(r"(?:to_apply|body|branch_computations|true_computation)=\{?%?([\w.\-]+)", rest)
                number += sum(map(total, called))
            elif operation not in _FREE and not operation.endswith("-done"):
                number += sizes[result] + sum(sizes.get(found, 0) for found in re.findall(r"[\w.\-]+", operands))
        return number

    return total(entry)


def least_seconds(
    parts: dict[str, Callable[[], Any]],
    repeats: int,
    burst: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of one call of each part, the least of some turns; the first turn does not count."""
    burst = burst or (10 if on_gpu() else 1)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            start = clock()
            for _ in range(burst if repeat else 1):
                result = part()
            jax.block_until_ready(result)  # a device works in the order of the calls
            seconds = (clock() - start) / (burst if repeat else 1)
            print(f"turn {repeat}, {name}: {1e3 * seconds:.2f} ms", file=sys.stderr, flush=True)
            if repeat:
                times[name].append(seconds)
    return {name: min(values) for name, values in times.items()}


def machine_rates(
    repeats: int, burst: int | None, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], float]:
    """FLOP/s of a large matmul by type, and bytes/s of a large copy, read and written, on this machine, by `clock`.

    In float32 as jax multiplies by default: in TF32 where a GPU has that.
    """
    n, count = (8192, 2**28) if on_gpu() else (2048, 2**26)
    matrix, line = jax.random.normal(jax.random.key(0), (n, n)), jnp.ones(count)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    matrices = {dtype: matrix.astype(dtype) for dtype in ("float32", "bfloat16")}
    parts: dict[str, Callable] = {d: functools.partial(multiply, m, m) for d, m in matrices.items()}
    seconds = least_seconds(parts | {"copy": lambda: add(line)}, repeats, burst, clock)
    return {dtype: 2 * n**3 / seconds[dtype] for dtype in matrices}, 2 * 4 * count / seconds["copy"]


def describe_rates(rates: dict[str, float], copy: float) -> str:
    matmul = " and ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    return f"a matmul does {matmul}, a copy moves {copy / 1e9:.4g} GB/s"


def describe_compilation() -> str:
    """A warning, where compiled programs are kept: a time of compilation may be that of reading one."""
    folder = jax.config.jax_compilation_cache_dir
    return f"compiled programs are kept in {folder}: times of compilation may be of reading them\n" if folder else ""


def device_memory() -> float:
    """Greatest memory that jax has had of its device, or on CPU this process of the machine, in GiB."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else parallel.peak_memory()
