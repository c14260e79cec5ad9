"""One training step: a pure function of state and batch.

    L = L_sup + w_con(t) L_con + w_cons(t) L_cons + w_pl(t) L_pl

The student sees strong views of labelled and unlabelled images, the teacher weak views through the same warps, so
that their pixels correspond. Then the optimiser moves the student and the teacher follows it.

Randomness is keyed by (seed, step, place in the global batch) and every mean runs over the global batch, so any
number of devices gives the same step to rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sscl_jax import augment, contrast, losses
from sscl_jax.models import UNet
from sscl_jax.models.unet import pool
from sscl_jax.train_state import TrainState

Batch = dict[str, dict[str, jax.Array]]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How pixels are contrasted.

    Attributes:
      sampler: `anatomical`, `region` or `both`: the mean of the two losses.
      level: level of the U-Net whose features are contrasted (0 = full resolution).
      temperature: of InfoNCE.
      num_queries: pixels drawn from the student, for each image and each class or cell.
      num_keys: pixels drawn from the teacher, likewise.
      threshold: least confidence of a pixel's class, in [0, 1] (anatomical only).
      positives: `pixels` or `means`, the class means of the batch (anatomical only).
      cells: R, the plane is cut into R x R cells (region only).
      partitions: S, the volume is cut into S parts along its slices (region only).
      labeled: whether labelled images give queries and keys too, or unlabelled ones alone.
    """

    sampler: str
    level: int
    temperature: float
    num_queries: int
    num_keys: int
    threshold: float
    positives: str
    cells: int
    partitions: int
    labeled: bool


@dataclasses.dataclass(frozen=True)
class Views:
    """How weak and strong views are drawn; the meaning of each field is in `sscl_jax.augment`.

    Attributes:
      geometry: keywords of `augment.random_coordinates`, without shapes.
      weak: keywords of `augment.weak_intensity`.
      strong: keywords of `augment.strong_intensity`.
      foreground: share of the labelled patches whose centre is a pixel of a labelled structure.
      cutmix_area: (least, greatest) share of a patch that is replaced by its partner's.
      cutmix_probability: of an unlabelled image getting a box of another image.
      cutmix_labeled: probability that the box comes from a labelled image, and not from the unlabelled partner.
    """

    geometry: dict[str, Any]
    weak: dict[str, Any]
    strong: dict[str, Any]
    foreground: float
    cutmix_area: tuple[float, float]
    cutmix_probability: float
    cutmix_labeled: float


def sigmoid_ramp(weight: float, steps: float) -> Callable[[jax.Array], jax.Array]:
    """w exp(-5 (1 - t/T)^2) up to step T, then w (Laine & Aila, 2017); constant if `steps` is 0."""
    if steps == 0:
        return lambda step: jnp.asarray(weight, jnp.float32)
    return lambda step: weight * jnp.exp(-5.0 * (1.0 - jnp.minimum(step / steps, 1.0)) ** 2)


def ramped_decay(step: jax.Array, decay: float) -> jax.Array:
    """a_t = min(decay, 1 - 1 / (t + 1)): the average forgets its random start."""
    return jnp.minimum(decay, 1.0 - 1.0 / (step + 1.0))


def update_teacher(teacher: Any, student: Any, step: jax.Array, decay: float, scope: str) -> Any:
    """theta' <- a_t theta' + (1 - a_t) theta, with a_t of `ramped_decay` (Tarvainen & Valpola, 2017).

    Args:
      teacher: parameters before the update, in the groups `encoder`, `decoder`, `projector`.
      student: parameters after optimiser step number `step`, counted from 0.
      step: () int, t.
      decay: the final decay.
      scope: `network` averages every group; `encoder` averages the encoder and copies the rest.
    """
    average = optax.incremental_update(student, teacher, 1.0 - ramped_decay(step, decay))
    if scope == "network":
        return average
    return {group: average[group] if group == "encoder" else student[group] for group in student}


def draw_views(
    key: jax.Array, example: dict[str, jax.Array], views: Views, patch: tuple[int, ...], num_classes: int
) -> dict[str, jax.Array]:
    """Weak and strong view of one example through one warp, with the pixels' labels and positions.

    Args:
      key: random key of this example.
      example: `image` (*canvas, channels), `extent` (rank,), `depth` (2,), and `label` (*canvas) if labelled.
      views: strengths.
      patch: size of the views.
      num_classes: number of classes, background included.

    Returns:
      `weak` and `strong` (*patch, channels); `plane` (*patch, 2), position in the plane in [0, 1]; `depth` (*patch),
      position along the volume in [0, 1]; `inside` (*patch) bool; `label` (*patch) int32 if labelled.
    """
    image = example["image"]
    shape = image.shape[:-1]
    warp_key, weak_key, strong_key, focus_key = jax.random.split(key, 4)
    focus = None
    if "label" in example and views.foreground > 0:
        focus = augment.random_foreground(focus_key, example["label"], num_classes, views.foreground)
    coords = augment.random_coordinates(
        warp_key, shape=shape, extent=example["extent"], patch=patch, focus=focus, **views.geometry
    )
    warped = augment.resample(image, coords, jnp.min(image, axis=range(len(shape))))
    position, inside = augment.normalised_position(coords, shape, example["extent"])
    low, high = example["depth"]
    along = position[..., 0] if len(patch) == 3 else jnp.full(patch, 0.5)
    result = {
        "weak": augment.weak_intensity(weak_key, warped, **views.weak),
        "strong": augment.strong_intensity(strong_key, warped, **views.strong),
        "plane": position[..., -2:],
        "depth": low + (high - low) * along,
        "inside": inside,
    }
    if "label" in example:
        result["label"] = augment.resample_labels(example["label"], coords).astype(jnp.int32)
    return result


def paste(tree: Any, other: Any, box: jax.Array) -> Any:
    """CutMix (Yun et al., 2019): inside `box` (batch, *patch) or (batch,) what `other` holds, else what `tree` does."""

    def mix(x, y):
        return jnp.where(box.reshape(box.shape + (1,) * (x.ndim - box.ndim)), y, x)

    return jax.tree.map(mix, tree, other)


def describe_pixels(probs: jax.Array, views: dict[str, jax.Array], contrast_: Contrast) -> contrast.Pixels:
    """What the samplers need to know, on the feature grid.

    Class probabilities are averaged over the block of pixels that a feature covers, so a block that straddles a
    border is not confident, even where the class of every pixel is known. Positions are those of a block's centre.
    """
    batch, *spatial, classes = probs.shape
    step = 2**contrast_.level
    pooled = pool(probs, step, jnp.mean).reshape(batch, -1, classes)
    centre = (slice(None), *(slice(step // 2, None, step),) * len(spatial))
    plane, depth, inside = (views[name][centre] for name in ("plane", "depth", "inside"))
    parts = contrast_.partitions
    partition = jnp.clip(jnp.floor(depth * parts).astype(jnp.int32), 0, parts - 1)
    return contrast.Pixels(
        anatomy=jnp.argmax(pooled, -1).astype(jnp.int32),
        confidence=jnp.max(pooled, -1),
        cell=contrast.grid_cell(plane, contrast_.cells).reshape(batch, -1),
        partition=partition.reshape(batch, -1),
        inside=inside.reshape(batch, -1),
    )


def make_train_step(
    model: UNet,
    optimizer: optax.GradientTransformation,
    *,
    patch: tuple[int, ...],
    views: Views,
    contrast_options: Contrast,
    contrast_weight: Callable[[jax.Array], jax.Array] | None,
    consistency_weight: Callable[[jax.Array], jax.Array] | None,
    pseudo_label_weight: Callable[[jax.Array], jax.Array] | None,
    pseudo_label_threshold: float,
    pseudo_label_competence: bool,
    ema_decay: float,
    ema_scope: str,
    axis_name: str,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step. What is bound here is static; a weight of None leaves its term out of the program.

    Args:
      model: student and teacher network; its `feature_level` must equal `contrast_options.level`.
      optimizer: moves the student.
      patch: size of a view, (H, W) or (D, H, W).
      views: how views are drawn.
      contrast_options: how pixels are contrasted.
      contrast_weight: w_con, a function of the step; likewise consistency and pseudo-label weight.
      pseudo_label_threshold: least confidence of a pseudo-label, in [0, 1].
      pseudo_label_competence: whether the weight is multiplied by the least soft Dice, over the classes of the labelled
        batch, that the student reaches there.
      ema_decay: see `update_teacher`; likewise `ema_scope`.
      axis_name: the device axis that the step is mapped over.

    Returns:
      `train_step(state, batch) -> (state, metrics)`; `batch` is {"labeled": ..., "unlabeled": ...} with a leading
      batch axis on what `draw_views` takes, and without "unlabeled" when no term uses it. Metrics are (sum, count)
      pairs over the global batch.
    """
    if model.feature_level != contrast_options.level:
        raise ValueError(f"feature_level {model.feature_level} is not {contrast_options.level}.")
    num_classes = model.num_classes
    samplers = ("anatomical", "region") if contrast_options.sampler == "both" else (contrast_options.sampler,)
    uses_unlabeled = any((contrast_weight, consistency_weight, pseudo_label_weight))

    def project(params, features, drawn):
        flat = features.reshape(features.shape[0], -1, features.shape[-1])
        return model.apply({"params": params}, flat[drawn.image, drawn.pixel], method="project")

    def global_sum(x):
        return jax.lax.psum(x, axis_name)

    def example_keys(stream, state, local_batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), stream), state.step)
        place = jax.lax.axis_index(axis_name) * local_batch + jnp.arange(local_batch)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, place)

    def segmentation_loss(logits, labels, weight, dice_loss, term, metrics):
        """This device's share of half cross-entropy, half Dice loss over the global batch, of the classes it holds.

        And the least soft Dice of these classes, in [0, 1] and a constant: how well the class is known that is known
        least.
        """
        ce = jnp.sum(losses.cross_entropy(logits, labels) * weight)
        pixels = global_sum(jnp.asarray(weight.size, jnp.float32))
        sums = losses.dice_sums(jax.nn.softmax(logits), labels, weight)
        # The Dice of a class that is absent is minimal where its probability is 0 everywhere, and steep there. So it
        # extinguishes a class that is slow to learn, or of which the teacher is not sure yet; cross-entropy does not.
        held = jnp.sum(jax.nn.one_hot(labels, num_classes) * weight[..., None], tuple(range(labels.ndim)))
        held = (global_sum(held) > 0).at[0].set(True)
        by_class = losses.soft_dice(global_sum(sums))
        dice = jnp.average(dice_loss(by_class), weights=held.astype(jnp.float32))
        metrics[f"{term}_ce"] = (global_sum(ce), pixels)
        metrics[f"{term}_dice"] = (dice, jnp.ones(()))
        least = jax.lax.stop_gradient(jnp.min(jnp.where(held, by_class, 1.0)))
        # Every device holds the whole Dice; the shares must add up to it once.
        return 0.5 * ce / pixels + 0.5 * dice / global_sum(1), least

    def draw(sampler, keys, pixels, count):
        options = contrast_options
        if sampler == "anatomical":
            return contrast.anatomical_draw(
                keys, pixels, num_classes=num_classes, count=count, threshold=options.threshold
            )
        return contrast.region_draw(keys, pixels, num_cells=options.cells**2, count=count)

    def contrast_loss(sampler, student, teacher, query_features, key_features, query_pixels, key_pixels, keys):
        """This device's share of the mean InfoNCE of one sampler, its queries against the keys of all devices.

        And the number of queries, on all devices, that have a positive and a negative.
        """
        options = contrast_options
        query_keys, key_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        queries = draw(sampler, query_keys, query_pixels, options.num_queries)
        drawn = draw(sampler, key_keys, key_pixels, options.num_keys)
        projected = jax.lax.stop_gradient(project(teacher, key_features, drawn))
        projected, drawn = jax.lax.all_gather((projected, drawn), axis_name, tiled=True)
        if sampler == "region":
            positive, negative = contrast.region_pairs(queries, drawn)
        elif options.positives == "means":
            projected, drawn = contrast.with_class_means(projected, drawn, num_classes)
            positive, negative = contrast.anatomical_pairs(queries, drawn, num_classes)
        else:
            positive, negative = contrast.anatomical_pairs(queries, drawn)
        loss, valid = contrast.info_nce(
            project(student, query_features, queries),
            projected,
            positive,
            negative,
            options.temperature,
        )
        count = global_sum(jnp.sum(valid))
        return jnp.sum(loss) / jnp.maximum(count, 1), count

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # 1. Views, through one warp each.
        parts = ("labeled", "unlabeled") if uses_unlabeled else ("labeled",)
        drawn = {}
        for stream, part in enumerate(parts):
            keys = example_keys(stream, state, batch[part]["image"].shape[0])
            drawn[part] = jax.vmap(lambda k, e: draw_views(k, e, views, patch, num_classes))(keys, batch[part])
        labeled = drawn["labeled"]
        num_labeled = labeled["strong"].shape[0]

        # 2. The teacher on weak views.
        if uses_unlabeled:
            unlabeled = drawn["unlabeled"]
            weak = unlabeled["weak"]
            if contrast_weight and contrast_options.labeled:
                weak = jnp.concatenate([labeled["weak"], weak])
            teacher = {"params": state.teacher, "batch_stats": state.teacher_stats}
            teacher_logits, teacher_features = jax.lax.stop_gradient(model.apply(teacher, weak))
            teacher_probs = jax.nn.softmax(teacher_logits[-unlabeled["weak"].shape[0] :])

            # 3. What the student is asked to find: views, targets and positions mixed alike.
            where = ("plane", "depth", "inside")
            true = jax.nn.one_hot(labeled["label"], num_classes)
            mixed = {name: unlabeled[name] for name in ("strong", *where)} | {"probs": teacher_probs}
            if views.cutmix_probability > 0:
                count = teacher_probs.shape[0]
                sources = jax.tree.map(lambda x: x[jnp.arange(count) ^ 1], mixed)
                box_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(example_keys(2, state, count))
                if views.cutmix_labeled > 0:
                    # In blocks, so that an image has the same partner on any number of devices.
                    given = {name: labeled[name] for name in ("strong", *where)} | {"probs": true}
                    given = jax.tree.map(lambda x: x[jnp.arange(count) * num_labeled // count], given)
                    coins = jax.vmap(lambda k: jax.random.bernoulli(k, views.cutmix_labeled))(coin_keys)
                    sources = paste(sources, given, coins)
                boxes = jax.vmap(lambda k: draw_box(k, views, patch))(box_keys)
                mixed = paste(mixed, sources, boxes)

        def loss_fn(student):
            metrics: Metrics = {}
            images = labeled["strong"]
            if uses_unlabeled:
                images = jnp.concatenate([images, mixed["strong"]])
            variables = {"params": student, "batch_stats": state.student_stats}
            (logits, features), updated = model.apply(variables, images, train=True, mutable=["batch_stats"])

            ones = jnp.ones(labeled["label"].shape)
            loss, competence = segmentation_loss(
                logits[:num_labeled], labeled["label"], ones, losses.rescuing_dice_loss, "sup", metrics
            )
            if pseudo_label_weight:
                confidence = jnp.max(mixed["probs"], -1)
                sure = (confidence >= pseudo_label_threshold) & mixed["inside"]
                target = jnp.argmax(mixed["probs"], -1)
                sure_weight = sure.astype(jnp.float32)
                term, _ = segmentation_loss(logits[num_labeled:], target, sure_weight, losses.dice_loss, "pl", metrics)
                # The pixels of a class that is not known yet are, surely, taken for background.
                if pseudo_label_competence:
                    term *= competence
                    metrics["pl_competence"] = (competence, jnp.ones(()))
                loss += pseudo_label_weight(state.step) * term
                counts = jnp.sum(sure_weight), jnp.sum(mixed["inside"].astype(jnp.float32))
                metrics["pl_coverage"] = global_sum(counts)
            if consistency_weight:
                probs = jax.nn.softmax(logits[num_labeled:])
                term = losses.squared_difference(probs, mixed["probs"]) * mixed["inside"]
                total = jnp.sum(term), global_sum(jnp.sum(mixed["inside"].astype(jnp.float32)))
                loss += consistency_weight(state.step) * total[0] / total[1]
                metrics["cons"] = (global_sum(total[0]), total[1])
            if contrast_weight:
                query_views, key_views = mixed, unlabeled | {"probs": teacher_probs}
                query_features, keys = features[num_labeled:], example_keys(4, state, teacher_probs.shape[0])
                if contrast_options.labeled:
                    given = labeled | {"probs": true}
                    query_views, key_views = (
                        {n: jnp.concatenate([given[n], other[n]]) for n in (*where, "probs")}
                        for other in (query_views, key_views)
                    )
                    query_features = features
                    keys = jnp.concatenate([example_keys(3, state, num_labeled), keys])
                sides = (
                    student,
                    state.teacher,
                    query_features,
                    teacher_features,
                    describe_pixels(query_views["probs"], query_views, contrast_options),
                    describe_pixels(key_views["probs"], key_views, contrast_options),
                    keys,
                )
                terms, counts = zip(*(contrast_loss(sampler, *sides) for sampler in samplers), strict=True)
                term, count = sum(terms) / len(samplers), jnp.stack(counts).sum()
                loss += contrast_weight(state.step) * term
                metrics["con"] = (global_sum(term), (count > 0).astype(jnp.float32))  # a step without pairs has none
                metrics["con_queries"] = (count.astype(jnp.float32), jnp.ones(()))
            metrics["loss"] = (global_sum(loss), jnp.ones(()))
            return loss, (metrics, updated.get("batch_stats", {}))

        # 4. The student moves; each device differentiated its share of the loss, so the gradients add up.
        grads, (metrics, student_stats) = jax.grad(loss_fn, has_aux=True)(state.student)
        grads = global_sum(grads)
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.ones(()))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)

        # 5. The teacher follows.
        stats_step = 1.0 - ramped_decay(state.step, ema_decay)
        state = TrainState(
            step=state.step + 1,
            seed=state.seed,
            student=student,
            teacher=update_teacher(state.teacher, student, state.step, ema_decay, ema_scope),
            student_stats=student_stats,
            teacher_stats=optax.incremental_update(student_stats, state.teacher_stats, stats_step),
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def draw_box(key: jax.Array, views: Views, patch: tuple[int, ...]) -> jax.Array:
    """(*patch) bool: the part of one image to be replaced, empty with 1 - `cutmix_probability`."""
    choice, box = jax.random.split(key)
    chosen = jax.random.bernoulli(choice, views.cutmix_probability)
    return augment.cutmix_mask(box, patch, views.cutmix_area) & chosen
