"""From a config to the things it describes. Here the config ends: what is built takes plain values."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from sscl_jax import parallel, train_step
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.config_fields import FREE_FIELDS, UNLABELED_TERMS, flat_config
from sscl_jax.data.recipe import Recipe
from sscl_jax.models import UNet
from sscl_jax.train_state import TrainState, create_train_state

NETWORKS = ("student", "teacher")
CHOICES = {
    "contrast.sampler": ("anatomical", "region", "both"),
    "contrast.positives": ("pixels", "means"),
    "teacher.scope": ("network", "encoder"),
    "eval.select": ("teacher", "student"),
    "eval.largest_component": ("none", "class", "foreground"),
    "model.norm": ("group", "batch"),
    "model.dtype": ("float32", "bfloat16"),
}


def check_config(config: ConfigDict) -> None:
    """Refuses values that no training can start from.

    Raises:
      ValueError: names the field, its value and what it may be.
    """

    def get(field: str) -> Any:
        return functools.reduce(lambda value, name: value[name], field.split("."), config)

    def require(good: bool, field: str, remedy: str) -> None:
        if not good:
            raise ValueError(f"{field}={get(field)!r}: {remedy}.")

    for field in ("steps", "log_every", "save_every", "eval.every", "data.labeled_batch", "data.unlabeled_batch",
                  "contrast.num_queries", "contrast.num_keys", "contrast.cells", "contrast.partitions",
                  "model.projection_dim"):  # fmt: skip
        require(get(field) >= 1, field, "must be at least 1")
    for field in (*(f"{term}.weight" for term in UNLABELED_TERMS), "optimizer.warmup_steps", "optimizer.weight_decay",
                  "augment.rotate", "augment.shear", "augment.elastic", "augment.weak_contrast",
                  "augment.weak_brightness", "augment.weak_gamma", "augment.contrast", "augment.brightness",
                  "augment.gamma", "augment.bias", "augment.noise", "augment.blur"):  # fmt: skip
        require(get(field) >= 0, field, "must be at least 0")
    require(config.optimizer.learning_rate > 0, "optimizer.learning_rate", "must be positive")
    require(config.optimizer.clip_norm > 0, "optimizer.clip_norm", "must be positive; a large one clips nothing")
    for field in ("contrast.threshold", "pseudo_label.threshold", "augment.foreground", "augment.spread",
                  "augment.cutmix_probability", "augment.cutmix_labeled"):  # fmt: skip
        require(0 <= get(field) <= 1, field, "must lie in [0, 1]")
    for field in ("teacher.decay", "eval.overlap", "eval.final_overlap"):
        require(0 <= get(field) < 1, field, "must lie in [0, 1)")
    for field, (*others, last) in CHOICES.items():
        require(get(field) in (*others, last), field, f"choose {', '.join(map(repr, others))} or {last!r}")
    require(0 <= config.ramp <= 1, "ramp", "a share of the steps, 0 to 1")
    require(0 <= config.data.labeled_fraction <= 1, "data.labeled_fraction", "a share of the patients, 0 to 1")
    zoom, area = config.augment.scale, config.augment.cutmix_area
    require(len(zoom) == 2 and 0 < zoom[0] <= zoom[1], "augment.scale", "give (least, greatest) zoom, above 0")
    good = len(area) == 2 and 0 <= area[0] <= area[1] <= 1
    require(good, "augment.cutmix_area", "give (least, greatest) share of a patch, 0 to 1")
    require(min(config.model.widths, default=0) >= 1, "model.widths", "each must be at least 1")
    require(bool(config.data.path), "data.path", "name the folder that a data_prep command wrote")
    require(0 <= config.seed < 2**32, "seed", "choose 0 to 2**32 - 1")
    require(config.data.device_memory >= 0, "data.device_memory", "must not be negative")
    require(len(config.data.patch_size) in (2, 3), "data.patch_size", "give (H, W) or (D, H, W)")
    levels = len(config.model.widths)
    factor = 2 ** (levels - 1)
    divisible = all(n > 0 and n % factor == 0 for n in config.data.patch_size)
    require(divisible, "data.patch_size", f"each must be a multiple of {factor} for {levels} levels")
    axes = len(config.data.patch_size)
    require(len(config.augment.flip) == axes, "augment.flip", "give one value for each axis")
    require(0 <= config.contrast.level < levels, "contrast.level", f"choose 0 to {levels - 1}")
    require(config.contrast.temperature > 0, "contrast.temperature", "must be positive")
    if config.contrast.weight > 0 and config.contrast.sampler != "anatomical":
        require(config.contrast.cells >= 2, "contrast.cells", "must be at least 2: all in one cell have no negative")
    parallel.local_slice(config.data.labeled_batch)
    if uses_unlabeled(config):
        parallel.local_slice(config.data.unlabeled_batch)
        per_device = config.data.unlabeled_batch // jax.device_count()
        require(
            per_device % 2 == 0 or config.augment.cutmix_probability == 0,
            "data.unlabeled_batch",
            f"CutMix pairs images, so each of {jax.device_count()} devices needs an even number (or set "
            "augment.cutmix_probability=0)",
        )


def uses_unlabeled(config: ConfigDict) -> bool:
    """Whether any term of the loss looks at unlabelled images."""
    return any(config[term].weight > 0 for term in UNLABELED_TERMS)


def make_model(config: ConfigDict, num_classes: int) -> UNet:
    """The network of student and teacher."""
    return UNet(
        num_classes=num_classes,
        widths=tuple(config.model.widths),
        feature_level=config.contrast.level,
        projection_dim=config.model.projection_dim,
        norm=config.model.norm,
        axis_name=parallel.AXIS,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to 0."""
    warmup = min(config.optimizer.warmup_steps, config.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, config.optimizer.learning_rate, warmup, config.steps)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with the gradient's global norm clipped."""
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(make_schedule(config), weight_decay=config.optimizer.weight_decay),
    )


def _state_maker(config: ConfigDict, num_classes: int, channels: int) -> Callable[[], TrainState]:
    model, optimizer = make_model(config, num_classes), make_optimizer(config)
    return functools.partial(create_train_state, model, optimizer, config.seed, tuple(config.data.patch_size), channels)


def make_state(config: ConfigDict, num_classes: int, channels: int) -> TrainState:
    """The state before the first step."""
    return _state_maker(config, num_classes, channels)()


def empty_state(config: ConfigDict, num_classes: int, channels: int) -> TrainState:
    """Zeros in the shapes of `make_state`: what a checkpoint is restored into, without compiling an initialisation."""
    shapes = jax.eval_shape(_state_maker(config, num_classes, channels))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def make_weights(config: ConfigDict) -> dict[str, Callable[[jax.Array], jax.Array] | None]:
    """Weight of each term of the loss by step; None for a term that is off."""
    return {
        term: train_step.sigmoid_ramp(config[term].weight, config.ramp * config.steps)
        if config[term].weight > 0
        else None
        for term in UNLABELED_TERMS
    }


def make_views(config: ConfigDict) -> train_step.Views:
    """How weak and strong views are drawn."""
    augment = config.augment
    return train_step.Views(
        geometry={name: augment[name] for name in ("rotate", "scale", "shear", "elastic", "flip", "spread")},
        weak={name: augment[f"weak_{name}"] for name in ("contrast", "brightness", "gamma")},
        strong={name: augment[name] for name in ("contrast", "brightness", "gamma", "bias", "noise", "blur")},
        foreground=augment.foreground,
        cutmix_area=tuple(augment.cutmix_area),
        cutmix_probability=augment.cutmix_probability,
        cutmix_labeled=augment.cutmix_labeled,
    )


def make_contrast(config: ConfigDict) -> train_step.Contrast:
    """How pixels are contrasted."""
    return train_step.Contrast(**{f.name: config.contrast[f.name] for f in dataclasses.fields(train_step.Contrast)})


def make_step(config: ConfigDict, num_classes: int) -> Callable:
    """The training step, mapped over the devices."""
    weights = make_weights(config)
    return parallel.parallel_step(
        train_step.make_train_step(
            make_model(config, num_classes),
            make_optimizer(config),
            patch=tuple(config.data.patch_size),
            views=make_views(config),
            contrast_options=make_contrast(config),
            contrast_weight=weights["contrast"],
            consistency_weight=weights["consistency"],
            pseudo_label_weight=weights["pseudo_label"],
            pseudo_label_threshold=config.pseudo_label.threshold,
            pseudo_label_competence=config.pseudo_label.competence,
            ema_decay=config.teacher.decay,
            ema_scope=config.teacher.scope,
            axis_name=parallel.AXIS,
        )
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network with all that it takes to use it.

    Attributes:
      model: the architecture.
      variables: its parameters (and statistics), as `model.apply` takes them.
      recipe: preprocessing that the training saw.
      config: config of the training.
      meta: what else was saved: step, fingerprint, val figures.
      path: the checkpoint.
      name: `teacher` or `student`.
    """

    model: UNet
    variables: dict[str, Any]
    recipe: Recipe
    config: ConfigDict
    meta: dict[str, Any]
    path: Path
    name: str


def network_variables(state: TrainState, network: str) -> dict[str, Any]:
    """Variables of the student or the teacher, as `model.apply` takes them."""
    params, stats = getattr(state, network), getattr(state, f"{network}_stats")
    return {"params": params, "batch_stats": stats} if stats else {"params": params}


def load_networks(workdir: Path, kind: str = "best") -> dict[str, Network]:
    """Loads student and teacher, by name, from the working folder of a training.

    Args:
      workdir: `--workdir` of the training.
      kind: `best` on val, or `last`; a training without val cases has only `last`.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    kinds = [kind, "last"] if kind == "best" else [kind]
    for each in kinds:
        checkpoints = Checkpoints(Path(workdir), each)
        if (newest := checkpoints.newest()) is None:
            continue
        meta = newest[1]
        config = ConfigDict(meta["config"])
        # Of the last call, which may have changed free fields. It is not needed, so it may be absent or damaged.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            flat = flat_config(ConfigDict(json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8"))))
            config.update_from_flattened_dict({name: flat[name] for name in FREE_FIELDS if name in flat})
        recipe = Recipe.from_dict(meta["recipe"])
        num_classes = len(recipe.label_values)
        restored = checkpoints.restore(empty_state(config, num_classes, meta["channels"]), set_aside=False)
        assert restored is not None
        state, meta = restored
        model, path = make_model(config, num_classes), checkpoints.folder / str(int(state.step))
        return {
            name: Network(model, network_variables(state, name), recipe, config, meta, path, name) for name in NETWORKS
        }
    if not (Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints: give the --workdir of a training.")
    raise FileNotFoundError(f"{workdir} holds no checkpoint yet: train for longer, or give another --workdir.")
