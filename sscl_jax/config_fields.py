"""The fields of a config as plain values, and held against those of another. Without jax, so it is quick to import."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

# Terms of the loss that use scans without labels; each has a `weight`.
UNLABELED_TERMS = ("contrast", "consistency", "pseudo_label")
# Fields on which no figure of a training depends.
IDLE_FIELDS = (
    "data.path",
    "data.device_memory",
    "data.labeled_fraction",  # data.labeled_patients holds the number that it makes
    "log_every",
    "save_every",
    "eval.test",
)
# Fields that may differ when a training goes on: they decide what is shown and kept, not what is learnt.
FREE_FIELDS = (*IDLE_FIELDS, "eval.every", "eval.overlap", "eval.final_overlap")


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """The config as nested dictionaries of JSON types."""
    return json.loads(json.dumps(config.to_dict()))


def flat_config(config: ConfigDict) -> dict[str, Any]:
    """`{"data.path": ..., ...}` with JSON types."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    visit("", plain_config(config))
    return flat


def differing_fields(one: dict[str, Any], other: dict[str, Any], free: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Of two flat configs the fields that differ, but for `free`, with both values; None where one lacks it."""
    names = sorted((one.keys() | other.keys()).difference(free))
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def check_same_training(
    config: ConfigDict,
    meta: dict[str, Any],
    data: dict[str, str],
    workdir: Path,
    free: Sequence[str] = FREE_FIELDS,
    option: str = "--workdir",
) -> None:
    """Refuses to go on with a training that had another config, but for the fields `free`, or other data.

    `data` is `sampling.identity`, and `meta` what a training saved: its `config` and the same of its data.

    Raises:
      ValueError: lists the fields that differ.
    """
    saved, wanted = flat_config(ConfigDict(meta["config"])), flat_config(config)
    differences = [f"{n} was {was!r}, is {now!r}" for n, (was, now) in differing_fields(saved, wanted, free).items()]
    if meta["fingerprint"] != data["fingerprint"]:
        differences.append("the prepared data are others")
    elif meta.get("labels", data["labels"]) != data["labels"]:  # a training of before this was saved has none
        differences.append("the labelled or the val patients, or their masks, are others")
    if differences:
        raise ValueError(
            f"{workdir} holds another training: {'; '.join(differences)}. Choose another {option}, or go back to what "
            "it was started with."
        )
