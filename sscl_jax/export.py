"""Writes a trained network to a file that runs without sscl_jax.

    python -m sscl_jax.export --checkpoint=runs/acdc --output=exported --format=stablehlo

`model.stablehlo` runs wherever JAX does, whatever the device: `jax.export.deserialize(bytes).call(windows)`.
`model.onnx` (`pip install '.[onnx]'`) runs under ONNX Runtime and the like. Either maps windows (n, *patch, channels)
float32 to probabilities (n, *patch, classes), for any n. `model.json` beside it tells what belongs around it:
preprocessing, window, label values.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from sscl_jax import cli, experiment

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_network(network: experiment.Network, output: Path, form: str = "stablehlo") -> Path:
    """Writes `model.stablehlo` or `model.onnx`, and `model.json`, into a folder.

    Args:
      network: from `experiment.load_networks`.
      output: folder, made if absent.
      form: one of `FORMATS`.

    Returns:
      The model's file.

    Raises:
      ModuleNotFoundError: ONNX is asked for and its converter is not installed.
    """
    patch, channels = tuple(network.config.data.patch_size), network.meta["channels"]

    def probabilities(windows: jax.Array) -> jax.Array:
        return jax.nn.softmax(network.model.apply(network.variables, windows)[0])

    content = {"stablehlo": _stablehlo, "onnx": _onnx}[form](probabilities, patch, channels)
    facts = {
        "input": {"name": "windows", "shape": ["n", *patch, channels], "dtype": "float32"},
        "output": {"name": "probabilities", "shape": ["n", *patch, network.model.num_classes], "dtype": "float32"},
        "recipe": network.recipe.to_dict(),
        "largest_component": network.config.eval.largest_component,
        "network": network.name,
        "checkpoint": str(network.path),
        "method": network.config.method,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "model.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    path = output / f"model.{form}"
    path.write_bytes(content)
    return path


def _stablehlo(function: Callable[[jax.Array], jax.Array], patch: tuple[int, ...], channels: int) -> bytes:
    shape = jax.export.symbolic_shape(", ".join(["n", *map(str, patch), str(channels)]))
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return bytes(exported.serialize())


def _onnx(function: Callable[[jax.Array], jax.Array], patch: tuple[int, ...], channels: int) -> bytes:
    try:
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX needs jax2onnx: pip install 'sscl_jax[onnx]'.") from error
    shape: list[Any] = ["n", *patch, channels]
    model = to_onnx(function, [shape], input_names=["windows"], output_names=["probabilities"])
    return model.SerializeToString()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m sscl_jax.export`."""
    parser = cli.make_parser("sscl_jax.export", __doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="--workdir of a training")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--format", default=FORMATS[0], choices=FORMATS, help=f"default {FORMATS[0]}")
    parser.add_argument("--network", default="teacher", choices=experiment.NETWORKS, help="default: teacher")
    parser.add_argument("--kind", default="best", choices=["best", "last"], help="best on val (default), or last")
    args = cli.parse(parser, argv)
    try:
        network = experiment.load_networks(args.checkpoint, args.kind)[args.network]
        print(export_network(network, args.output, args.format))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
