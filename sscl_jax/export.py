"""Writes a trained network to a file that runs without sscl_jax.

    python -m sscl_jax.export --checkpoint=runs/acdc --output=exported --format=stablehlo

`model.stablehlo` runs wherever JAX does, whatever the device: `jax.export.deserialize(bytes).call(windows)`.
`model.onnx` (`pip install '.[onnx]'`) runs under ONNX Runtime and the like. Either maps windows (n, *patch, channels)
float32 to probabilities (n, *patch, classes), for any n; ONNX computes in float32, whatever `model.dtype`. `model.json`
beside it tells what belongs around it: preprocessing, window and overlap, label values. Export a 3-D network on the
kind of device that it will run on: the result is the same elsewhere, but slower.
"""

import json
import logging
import os
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
      ValueError: the folder has another network.
      OSError: nothing can be written there.
    """
    patch, channels = tuple(network.config.data.patch_size), network.meta["channels"]
    # ONNX Runtime has no convolution in bfloat16 on a CPU.
    model = network.model.clone(dtype="float32") if form == "onnx" else network.model

    def probabilities(windows: jax.Array) -> jax.Array:
        return jax.nn.softmax(model.apply(network.variables, windows)[0])

    facts = {
        "input": {"name": "windows", "shape": ["n", *patch, channels], "dtype": "float32"},
        "output": {"name": "probabilities", "shape": ["n", *patch, network.model.num_classes], "dtype": "float32"},
        "recipe": network.recipe.to_dict(),
        "overlap": network.config.eval.final_overlap,
        "largest_component": network.config.eval.largest_component,
        "network": network.name,
        "method": network.config.method,
        "step": int(network.path.name),
        "checkpoint": network.meta["digest"],
    }
    cli.make_folder(output, "--output")
    told, path = output / "model.json", output / f"model.{form}"
    text = json.dumps(facts, indent=1)
    if told.is_file() and told.read_text(encoding="utf-8") != text:
        raise ValueError(f"{told} is of another network, or of another version: choose another --output.")
    part = path.with_name(f"{path.name}.part")  # never half a model under its name
    try:
        part.write_bytes({"stablehlo": _stablehlo, "onnx": _onnx}[form](probabilities, patch, channels))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    told.write_text(text, encoding="utf-8")
    return path


def _stablehlo(function: Callable[[jax.Array], jax.Array], patch: tuple[int, ...], channels: int) -> bytes:
    shape = jax.export.symbolic_shape(", ".join(["n", *map(str, patch), str(channels)]))
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return bytes(exported.serialize())


def _onnx(function: Callable[[jax.Array], jax.Array], patch: tuple[int, ...], channels: int) -> bytes:
    for name in ("jax2onnx", "onnx_ir"):  # what they tell by the hundred is of no use here
        logging.getLogger(name).setLevel(logging.CRITICAL)
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
        print(f"{network.path}, {network.name}: {export_network(network, args.output, args.format)}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
