import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny

from configs import base
from sscl_jax import augment, config_fields, experiment, losses, parallel, train_step
from sscl_jax.models.unet import pool
from sscl_jax.train_step import Contrast, Views

STILL = Views(
    geometry=dict(rotate=0.0, scale=(1.0, 1.0), shear=0.0, elastic=0.0, flip=(False, False), spread=0.0),
    weak=dict(contrast=0.0, brightness=0.0, gamma=0.0),
    strong=dict(contrast=0.0, brightness=0.0, gamma=0.0, bias=0.0, noise=0.0, blur=0.0),
    foreground=0.0,
    cutmix_area=(0.25, 0.25),
    cutmix_probability=0.0,
    cutmix_labeled=0.0,
)


# ------------------------------------------------------------------------------------------------------- the optimiser


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    fields = {"optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 10}
    schedule = experiment.make_schedule(tiny("x", steps=110, **fields))
    for step, expected in ((0, 0.0), (5, 0.01), (10, 0.02), (35, 0.01 * (1 + np.sqrt(0.5))), (60, 0.01), (110, 0.0)):
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-9)


def test_the_optimiser_is_adamw_of_clipped_gradients():
    fields = {"optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 2, "optimizer.weight_decay": 0.1}
    optimizer = experiment.make_optimizer(tiny("x", steps=100, **fields, **{"optimizer.clip_norm": 2.0}))
    weights = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([2.0])}
    state, by_hand = optimizer.init(weights), np.array([3.0, -1.0, 2.0])
    mean, square = np.zeros(3), np.zeros(3)
    for step, gradient in enumerate(np.array([[60.0, 80.0, 0.0], [0.3, 0.4, 1.0], [0.0, 0.0, 0.0]]), start=1):
        given = {"a": jnp.array(gradient[:2]), "b": jnp.array(gradient[2:])}
        updates, state = optimizer.update(given, state, weights)
        weights = optax.apply_updates(weights, updates)
        gradient = gradient * min(1.0, 2.0 / max(np.linalg.norm(gradient), 1e-9))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = (0.0, 0.01, 0.02)[step - 1]  # the schedule begins at 0
        adam = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        by_hand = by_hand - rate * (adam + 0.1 * by_hand)
        np.testing.assert_allclose(np.concatenate([weights["a"], weights["b"]]), by_hand, rtol=1e-5)


# -------------------------------------------------------------------------------------- weights and the moving average


def test_sigmoid_ramp_by_hand():
    ramp = train_step.sigmoid_ramp(2.0, 10)
    for step, expected in ((0, 2 * np.exp(-5)), (5, 2 * np.exp(-1.25)), (10, 2.0), (99, 2.0)):
        np.testing.assert_allclose(ramp(jnp.asarray(step)), expected, rtol=1e-6)
    assert train_step.sigmoid_ramp(0.5, 0)(jnp.asarray(0)) == 0.5


@pytest.mark.parametrize(("ramp", "expected"), [(1.0, 0.5 * np.exp(-1.25)), (0.5, 0.5), (0.0, 0.5)])
def test_the_ramp_is_a_share_of_the_steps(ramp, expected):
    weights = experiment.make_weights(tiny("x", "pseudo_label", steps=40, ramp=ramp, **{"pseudo_label.weight": 0.5}))
    np.testing.assert_allclose(weights["pseudo_label"](jnp.asarray(20)), expected, rtol=1e-6)
    assert weights["contrast"] is None


def test_update_teacher_by_hand():
    teacher = {g: {"w": jnp.asarray(8.0)} for g in ("encoder", "decoder", "projector")}
    expected = 8.0
    # a_t = 0, 1/2, 2/3, 3/4, then the final 0.75.
    for step, a in enumerate((0.0, 1 / 2, 2 / 3, 0.75, 0.75, 0.75)):
        student = {g: {"w": jnp.asarray(float(step**2 + 1))} for g in teacher}
        teacher = train_step.update_teacher(teacher, student, jnp.asarray(step), 0.75, "network")
        expected = a * expected + (1 - a) * (step**2 + 1)
        for group in teacher.values():
            np.testing.assert_allclose(group["w"], expected, rtol=1e-6)


def test_the_first_average_is_the_student_exactly():
    random = np.random.default_rng(0)
    student, teacher = ({"encoder": {"w": jnp.asarray(random.normal(size=50), "f4")}} for _ in range(2))
    updated = train_step.update_teacher(teacher, student, jnp.asarray(0), 0.99, "network")
    np.testing.assert_array_equal(updated["encoder"]["w"], student["encoder"]["w"])


def test_scope_encoder_copies_the_rest():
    teacher = {g: jnp.asarray(0.0) for g in ("encoder", "decoder", "projector")}
    student = {g: jnp.asarray(1.0) for g in teacher}
    updated = train_step.update_teacher(teacher, student, jnp.asarray(3), 0.99, "encoder")
    assert {g: float(v) for g, v in updated.items()} == {"encoder": 0.25, "decoder": 1.0, "projector": 1.0}


# ------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(("shape", "level"), [((8, 4), 1), ((8, 4), 2), ((8, 4), 0), ((4, 8, 2), 1)])
def test_means_of_blocks_by_brute_force(shape, level):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("f4")
    step = 2**level
    small = [n // step for n in shape]
    expected = np.empty((2, *small, 3))
    for index in np.ndindex(*small):
        block = x[(slice(None), *(slice(i * step, (i + 1) * step) for i in index))]
        expected[(slice(None), *index)] = block.reshape(2, -1, 3).mean(1)
    np.testing.assert_allclose(pool(jnp.asarray(x), step, jnp.mean), expected, atol=1e-6)


def test_paste_by_brute_force():
    random = np.random.default_rng(0)
    box, whole = random.random((4, 3, 5)) < 0.5, np.array([True, False, False, True])
    tree, other = (
        {"image": random.normal(size=(4, 3, 5, 2)), "label": random.integers(0, 9, (4, 3, 5))} for _ in range(2)
    )
    boxed, swapped = (
        jax.device_get(train_step.paste(*jax.tree.map(jnp.asarray, (tree, other)), jnp.asarray(b)))
        for b in (box, whole)
    )
    for name in tree:
        for i, r, c in np.ndindex(box.shape):
            expected = (other if box[i, r, c] else tree)[name][i, r, c]
            np.testing.assert_allclose(boxed[name][i, r, c], expected, rtol=1e-6)
            np.testing.assert_allclose(swapped[name][i, r, c], (other if whole[i] else tree)[name][i, r, c], rtol=1e-6)


def options(**fields):
    defaults = dict(sampler="region", level=1, temperature=0.1, num_queries=4, num_keys=4, threshold=0.5)
    return Contrast(**defaults | dict(positives="pixels", cells=4, partitions=3, labeled=True) | fields)


def test_describe_pixels_by_brute_force():
    random = np.random.default_rng(0)
    probs = random.dirichlet([0.3] * 3, (2, 8, 4)).astype("f4")
    plane, depth = random.random((2, 8, 4, 2)).astype("f4"), random.random((2, 8, 4)).astype("f4")
    plane[0, 1, 1], depth[0, 1, 1] = 1.0, 1.0  # the far edge belongs to the last cell
    inside = random.random((2, 8, 4)) < 0.5
    views = {"plane": jnp.asarray(plane), "depth": jnp.asarray(depth), "inside": jnp.asarray(inside)}
    pixels = jax.device_get(train_step.describe_pixels(jnp.asarray(probs), views, options()))
    for i in range(2):
        for flat, (r, c) in enumerate(np.ndindex(4, 2)):
            mean = probs[i, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1))
            centre = i, 2 * r + 1, 2 * c + 1
            row, column = (min(int(p * 4), 3) for p in plane[centre])
            assert pixels.anatomy[i, flat] == mean.argmax()
            np.testing.assert_allclose(pixels.confidence[i, flat], mean.max(), rtol=1e-5)
            assert pixels.cell[i, flat] == 4 * row + column
            assert pixels.partition[i, flat] == min(int(depth[centre] * 3), 2)
            assert pixels.inside[i, flat] == inside[centre]


def test_a_block_across_a_border_is_not_confident():
    labels = jnp.array([[[0, 0, 1, 1], [0, 1, 1, 1]]])
    where = {"plane": jnp.zeros((1, 2, 4, 2)), "depth": jnp.zeros((1, 2, 4)), "inside": jnp.ones((1, 2, 4), bool)}
    pixels = train_step.describe_pixels(jax.nn.one_hot(labels, 2), where, options())
    np.testing.assert_allclose(pixels.confidence, [[0.75, 1.0]])


# -------------------------------------------------------------------------------------------------------------- views


def gridded_example(shape=(40, 36), extent=(30, 28)):
    """An image whose two channels are its own row and column, so that a view tells where each pixel came from."""
    rows, columns = np.meshgrid(*(np.arange(n, dtype="f4") for n in shape), indexing="ij")
    label = np.random.default_rng(0).integers(0, 4, shape).astype("u1")
    image = np.stack([rows, columns], -1)
    return {"image": image, "label": label, "extent": np.array(extent, "f4"), "depth": np.array([0.3, 0.3], "f4")}


def test_views_keep_image_label_and_position_aligned():
    example = gridded_example()
    geometry = dict(rotate=40.0, scale=(0.7, 1.4), shear=0.2, elastic=2.0, flip=(True, True), spread=1.0)
    views = Views(geometry, STILL.weak, STILL.strong, 0.0, (0.1, 0.5), 0.0, 0.0)
    draw = jax.jit(jax.vmap(lambda k: train_step.draw_views(k, example, views, (24, 20), 4)))
    drawn = jax.device_get(draw(jax.random.split(jax.random.key(1), 8)))
    inside = drawn["inside"]
    assert 0.2 < inside.mean() < 1  # some pixels lie in the padding
    np.testing.assert_allclose(drawn["weak"], drawn["strong"], atol=1e-3)

    came_from = drawn["weak"][inside]
    nearest = np.floor(came_from + 0.5).astype(int)
    clear = (np.abs(came_from + 0.5 - np.round(came_from + 0.5)) > 1e-3).all(-1)  # not on the edge of two pixels
    expected = example["label"][nearest[:, 0], nearest[:, 1]]
    np.testing.assert_array_equal(drawn["label"][inside][clear], expected[clear])

    # Canvas 40 x 36 holds an image of 30 x 28, so it starts at pixel (5, 4); a pixel's centre is half a pixel in.
    np.testing.assert_allclose(drawn["plane"][inside], (came_from - [5, 4] + 0.5) / [30, 28], atol=1e-4)
    np.testing.assert_allclose(drawn["depth"], 0.3, rtol=1e-6)
    low, high = drawn["plane"].min(), drawn["plane"].max()
    assert low >= 0 and high <= 1


def test_still_views_are_the_centred_crop():
    example = gridded_example((10, 8), (10, 8))
    drawn = jax.jit(lambda k: train_step.draw_views(k, example, STILL, (4, 4), 4))(jax.random.key(0))
    rows, columns = np.meshgrid(np.arange(3, 7), np.arange(2, 6), indexing="ij")
    np.testing.assert_allclose(drawn["weak"], np.stack([rows, columns], -1), atol=1e-4)
    np.testing.assert_array_equal(drawn["label"], example["label"][3:7, 2:6])
    assert drawn["inside"].all()


def test_a_labelled_pixel_that_is_drawn_becomes_the_centre():
    example = gridded_example((10, 8), (10, 8)) | {"label": np.zeros((10, 8), "u1")}
    example["label"][7, 3] = 2
    for share, shown in ((1.0, True), (0.0, False)):
        views = dataclasses.replace(STILL, foreground=share)
        drawn = jax.jit(lambda k, v=views: train_step.draw_views(k, example, v, (4, 4), 3))(jax.random.key(0))
        assert (drawn["label"][2, 2] == 2) == shown
        np.testing.assert_array_equal(drawn["weak"][2, 2], [7, 3] if shown else [5, 4])


def test_depth_of_a_volume_follows_its_first_axis(cheap):
    example = {
        "image": np.zeros((4, 4, 4, 1), "f4"), "extent": np.full(3, 4, "f4"), "depth": np.array([0, 1], "f4"),
    }  # fmt: skip
    views = Views({**STILL.geometry, "flip": (False,) * 3}, STILL.weak, STILL.strong, 0.0, (0.1, 0.5), 0.0, 0.0)
    drawn = jax.jit(lambda k: train_step.draw_views(k, example, views, (4, 4, 4), 4))(jax.random.key(0))
    np.testing.assert_allclose(drawn["depth"][:, 0, 0], [0.125, 0.375, 0.625, 0.875], rtol=1e-6)
    assert drawn["plane"].shape == (4, 4, 4, 2)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_cutmix_box_is_there_with_its_probability(probability):
    views = Views(STILL.geometry, STILL.weak, STILL.strong, 0.0, (0.25, 0.25), probability, 0.0)
    draw = jax.jit(jax.vmap(lambda k: train_step.draw_box(k, views, (16, 16))))
    boxes = draw(jax.random.split(jax.random.key(0), 8))
    share = np.asarray(boxes).mean((1, 2))
    assert np.all(np.abs(share - 0.25 * probability) < 0.08 * probability + 1e-9)


# ----------------------------------------------------------------------------------------------------------- the step


def cheap_augmentation(patch):
    """Replaces the augmentation by one that compiles in no time but still depends on every key.

    A crop at a random whole pixel, and noise; the real one has its own tests and takes part in test_training.py.
    """

    def coordinates(key, *, shape, extent, patch, **_):
        starts = jnp.stack([
            jax.random.randint(jax.random.fold_in(key, a), (), 0, n - p + 1)
            for a, (n, p) in enumerate(zip(shape, patch, strict=True))
        ])  # fmt: skip
        grid = jnp.meshgrid(*(jnp.arange(p, dtype=jnp.float32) for p in patch), indexing="ij")
        return jnp.stack(grid, -1) + starts

    patch.setattr(augment, "random_coordinates", coordinates)
    patch.setattr(augment, "weak_intensity", lambda key, image, **_: image + 0.1 * jax.random.normal(key, ()))
    patch.setattr(augment, "strong_intensity", lambda key, image, **_: image * (1 + 0.3 * jax.random.normal(key, ())))


@pytest.fixture
def cheap(monkeypatch):
    cheap_augmentation(monkeypatch)


def make_batch(config, num_classes=3, seed=0):
    """Random blobs on a canvas a little larger than the patch."""
    random = np.random.default_rng(seed)
    canvas = tuple(n + 4 for n in config.data.patch_size)

    def part(size, labeled):
        label = random.integers(0, num_classes, (size, *(n // 4 for n in canvas)))
        for axis in range(1, label.ndim):
            label = label.repeat(4, axis)
        image = label[..., None] + 0.3 * random.normal(size=(*label.shape, 1))
        batch = {"image": image.astype("f4"), "extent": np.tile(np.array(canvas, "f4"), (size, 1))}
        batch["depth"] = np.repeat(random.random((size, 1)), 2, 1).astype("f4")
        return batch | ({"label": label.astype("u1")} if labeled else {})

    return {"labeled": part(config.data.labeled_batch, True), "unlabeled": part(config.data.unlabeled_batch, False)}


def small(method, **fields):
    return tiny("none", method, **{"data.patch_size": (16, 16), "model.widths": (4, 8), "teacher.decay": 0.5} | fields)


STEPS, STATES = {}, {}  # compiled steps and first states, by what they depend on


def first_state(config):
    model = json.dumps([config_fields.plain_config(config.model), config.contrast.level, config.data.patch_size])
    if model not in STATES:
        STATES[model] = parallel.to_host(experiment.make_state(config, 3, 1))
    return STATES[model]


def run(config, steps=2, devices=1, change=lambda state: state, key=""):
    """States before and after each step, on the host, and metrics of the last.

    By plain gradient descent: Adam would blow up the rounding of gradients that are almost 0. Steps of one config and
    `key` are compiled once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_optimizer", lambda config: optax.sgd(0.1))
        first = first_state(config)
        chosen = jax.devices()[:devices]
        patch.setattr(
            parallel,
            "parallel_step",
            lambda step: jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=(None, None), devices=chosen),
        )
        name = json.dumps([config_fields.flat_config(config), devices, key])
        if name not in STEPS:
            STEPS[name] = experiment.make_step(config, 3)
        patch.setattr(jax, "local_devices", lambda: chosen)
        state = parallel.replicate(change(first))
    states = [parallel.to_host(state)]
    for step in range(steps):
        batch = make_batch(config, seed=step)
        batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        state, metrics = STEPS[name](state, batch)
        states.append(parallel.to_host(state))
    return states, {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}


def differ(one, other):
    return any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


GROUPS = ("encoder", "decoder", "projector")
CONTRAST = {"con", "con_queries"}
PSEUDO_LABEL = {"pl_ce", "pl_dice", "pl_coverage", "pl_competence"}
# What each method reports beside the supervised terms, and options that it tries out on the way.
EXPECTED = {
    "supervised": (set(), {}),
    "mean_teacher": ({"cons"}, {}),
    "region": (CONTRAST, {"data.patch_size": (8, 8, 8), "augment.flip": (False,) * 3}),
    "anatomical": (
        CONTRAST,
        {"contrast.positives": "means", "contrast.level": 0, "teacher.scope": "encoder", "contrast.labeled": True},
    ),
    "pseudo_label": (PSEUDO_LABEL, {"model.norm": "batch", "pseudo_label.threshold": 0.3}),
    "region_pl": (
        CONTRAST | PSEUDO_LABEL - {"pl_competence"},
        {"pseudo_label.competence": False},
    ),
    "anatomical_pl": (CONTRAST | PSEUDO_LABEL, {"contrast.labeled": True}),  # the teacher knows one class so early
}


def test_every_method_is_expected():
    assert set(EXPECTED) == set(base.METHODS)


def test_region_draws_as_many_pixels_of_an_image_as_anatomical_of_four_classes():
    anatomical, region = base.get_config("anatomical").contrast, base.get_config("region").contrast
    for name in ("num_queries", "num_keys"):
        assert region[name] * region.cells**2 == anatomical[name] * 4


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_moves_student_and_teacher_and_reports_its_terms(method, cheap):
    terms, fields = EXPECTED[method]
    config = small(method, **fields)
    states, metrics = run(config, steps=3)
    assert set(metrics) == {"loss", "sup_ce", "sup_dice", "grad_norm"} | terms
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics.get("con", 1) > 0 and metrics.get("pl_coverage", 1) > 0
    options = config.contrast
    groups = {"region": options.cells**2, "anatomical": 4, "both": options.cells**2 + 4}[options.sampler]
    images = config.data.unlabeled_batch + options.labeled * config.data.labeled_batch
    assert 0 < metrics.get("con_queries", 1) <= images * groups * options.num_queries
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    for state in states:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

    # A gradient reaches all that the method uses: the projector only where there is contrast.
    moved = {group for group in GROUPS if differ(states[0].student[group], states[-1].student[group])}
    assert moved == set(GROUPS if "con" in terms else GROUPS[:2])

    # The teacher is the average of its old self and the new student, and nothing else: no gradient reaches it.
    for t, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        a = np.float32(min(0.5, 1 - 1 / (t + 1)))
        for group in GROUPS:
            if config.teacher.scope == "encoder" and group != "encoder":
                assert not differ(after.teacher[group], after.student[group])
                continue
            expected = jax.tree.map(lambda x, y, a=a: a * x + (1 - a) * y, before.teacher[group], after.student[group])
            for x, y in zip(jax.tree.leaves(after.teacher[group]), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
        expected = jax.tree.map(lambda x, y, a=a: a * x + (1 - a) * y, before.teacher_stats, after.student_stats)
        for x, y in zip(jax.tree.leaves(after.teacher_stats), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    assert not differ(states[1].teacher, states[1].student)  # a_0 = 0, exactly
    assert bool(jax.tree.leaves(states[0].student_stats)) == (config.model.norm == "batch")


def test_the_seed_is_in_the_state_and_not_in_the_program():
    programs, states = [], []
    for seed in (0, 5):
        config = small("anatomical_pl", seed=seed)
        states.append(experiment.make_state(config, 3, 1))
        batch = jax.tree.map(lambda x: x[None], make_batch(config))
        programs.append(experiment.make_step(config, 3).lower(states[-1], batch).as_text())
    assert [int(state.seed) for state in states] == [0, 5]
    assert programs[0] == programs[1]


def test_a_step_in_bfloat16_is_near_that_in_float32(cheap):
    fields = {"pseudo_label.threshold": 0.0, "augment.cutmix_probability": 0.0}
    (_, _, full), expected = run(small("anatomical_pl", **fields))
    (_, _, half), metrics = run(small("anatomical_pl", **fields, **{"model.dtype": "bfloat16", "model.remat": True}))
    assert {leaf.dtype for leaf in jax.tree.leaves((half.student, half.teacher))} == {np.dtype("float32")}
    assert differ(half.student, full.student)  # or it was not used
    for term in ("loss", "sup_ce", "sup_dice", "con", "pl_ce", "pl_dice"):
        assert metrics[term] == pytest.approx(expected[term], rel=0.05), term


def test_the_supervised_step_ignores_the_teacher(cheap):
    def disturb(state):
        return state.replace(teacher=jax.tree.map(lambda x: x + 100.0, state.teacher))

    config = small("supervised")
    plain, disturbed = run(config)[0][-1], run(config, change=disturb)[0][-1]
    assert not differ(plain.student, disturbed.student)


def test_terms_of_weight_zero_leave_the_supervised_step(cheap, monkeypatch):
    supervised, _ = run(small("supervised"))
    monkeypatch.setattr(train_step, "sigmoid_ramp", lambda weight, steps: lambda step: 0.0 * step)
    silent, metrics = run(small("anatomical_pl", **{"contrast.labeled": True}), key="silent")
    assert metrics["con"] > 0  # it was computed
    for one, other in zip(supervised, silent, strict=True):
        for a, b in zip(jax.tree.leaves(one.student), jax.tree.leaves(other.student), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("labeled", [True, False])
def test_labelled_images_take_part_in_the_contrast_if_asked_to(labeled, cheap, monkeypatch):
    config = small("anatomical", **{"contrast.labeled": labeled, "augment.foreground": 0.0})
    original, terms = make_batch, []
    for shift in (0.0, 1.0):

        def shifted(*args, shift=shift, **kwargs):
            batch = original(*args, **kwargs)
            image = batch["labeled"]["image"]
            return batch | {"labeled": batch["labeled"] | {"image": image * (1 - 2 * shift)}}

        monkeypatch.setitem(globals(), "make_batch", shifted)
        terms.append(run(config, steps=1)[1])
    assert terms[0]["sup_ce"] != terms[1]["sup_ce"]
    assert (terms[0]["con"] != terms[1]["con"]) == labeled


def test_both_samplers_together_are_the_mean_of_the_two(cheap):
    fields = {"contrast.threshold": 0.0, "contrast.labeled": False}
    alone = [run(small(method, **fields), steps=1)[1] for method in ("anatomical", "region")]
    _, together = run(small("anatomical", **fields, **{"contrast.sampler": "both"}), steps=1)
    assert alone[0]["con"] != pytest.approx(alone[1]["con"], rel=0.01)
    for name in ("con", "loss"):
        assert together[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-5)


def test_an_absent_class_has_no_part_in_the_dice(cheap):
    def change(state):
        def sure_of(params, c):
            dense = {"kernel": np.zeros((4, 3), "f4"), "bias": np.float32([100 * (c == i) for i in range(3)])}
            return params | {"decoder": params["decoder"] | {"Dense_1": dense}}

        return state.replace(student=sure_of(state.student, 1), teacher=sure_of(state.teacher, 0))

    # The teacher finds background alone, the student class 1 alone. Background: 1 - (0 + 1) / (pixels + 1), nearly 1;
    # over all three classes, of which the last is absent from both and so perfect, it would be 2/3.
    _, metrics = run(small("pseudo_label", **{"augment.cutmix_probability": 0.0}), steps=1, change=change)
    assert metrics["pl_coverage"] == 1
    assert 0.99 < metrics["pl_dice"] < 1
    # Nor in that of the labels, where what is missed altogether counts by its logarithm.
    assert metrics["sup_dice"] > 1


@pytest.mark.parametrize("blind", [True, False])
def test_pseudo_labels_teach_as_much_as_the_least_known_class_is_known(blind, cheap):
    def change(state):
        # Sure of class 1 everywhere: of the other two it knows nothing, the Dice is (0 + 1) / (pixels + 1).
        dense = {"kernel": np.zeros((4, 3), "f4"), "bias": np.float32([0, 100, 0])}
        params = state.student | {"decoder": state.student["decoder"] | {"Dense_1": dense}}
        return state.replace(student=params) if blind else state

    fields = {"ramp": 0.0, "pseudo_label.threshold": 0.0}
    _, metrics = run(small("pseudo_label", **fields), steps=1, change=change)
    sup, pl = (0.5 * metrics[f"{term}_ce"] + 0.5 * metrics[f"{term}_dice"] for term in ("sup", "pl"))
    # The least Dice has a greater loss than the mean of the classes.
    assert 0 < metrics["pl_competence"] < (0.02 if blind else 1)
    assert losses.rescuing_dice_loss(metrics["pl_competence"]) > metrics["sup_dice"]
    np.testing.assert_allclose(metrics["loss"], sup + metrics["pl_competence"] * pl, rtol=1e-5)


class Pixelwise:
    """A network without parameters: the logits of a pixel are its value, the opposite of it, and 0."""

    feature_level, num_classes = 1, 3

    def apply(self, variables, images, mutable=None, **_):
        logits = jnp.concatenate([images, -images, 0 * images], -1)
        return ((logits, images[:, ::2, ::2]), {}) if mutable else (logits, images[:, ::2, ::2])


def probabilities(value):
    return np.exp([value, -value, 0.0]) / np.exp([value, -value, 0.0]).sum()


@pytest.fixture
def run_pixelwise(cheap, monkeypatch):
    """`run` of one step with that network."""

    def run_(config, key):
        monkeypatch.setattr(experiment, "make_optimizer", lambda config: optax.sgd(0.1))  # as `run` has it
        first_state(config)  # of a real one
        monkeypatch.setattr(experiment, "make_model", lambda *_: Pixelwise())
        return run(config, steps=1, key=key)[1]

    return run_


def test_the_student_sees_strong_views_the_teacher_weak_ones_and_padding_counts_nowhere(run_pixelwise, monkeypatch):
    def half_padding(config, seed=0, make_batch=make_batch):
        batch = make_batch(config, seed=seed)
        batch["labeled"]["label"] *= 0
        batch["unlabeled"]["extent"] = np.full_like(batch["unlabeled"]["extent"], 8)  # of 20; the patch is 16
        return batch

    monkeypatch.setitem(globals(), "make_batch", half_padding)
    monkeypatch.setattr(augment, "weak_intensity", lambda key, image, **_: 0 * image + 1)
    monkeypatch.setattr(augment, "strong_intensity", lambda key, image, **_: 0 * image + 2)
    fields = {"consistency.weight": 1.0, "pseudo_label.threshold": 0.0, "augment.cutmix_probability": 0.0}
    metrics = run_pixelwise(small("pseudo_label", **fields), "views")
    weak, strong = probabilities(1.0), probabilities(2.0)
    np.testing.assert_allclose(metrics["sup_ce"], -np.log(strong[0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["cons"], np.mean((strong - weak) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["pl_ce"], -np.log(strong[0]) * 8 * 8 / (16 * 16), rtol=1e-5)
    assert metrics["pl_coverage"] == 1


def test_cutmix_mixes_targets_as_it_mixes_images(run_pixelwise, monkeypatch):
    """Where both views are the image, a mixed image is asked for what the network says of it."""
    for name in ("weak_intensity", "strong_intensity"):
        monkeypatch.setattr(augment, name, lambda key, image, **_: image)
    fields = {"augment.cutmix_probability": 1.0, "augment.cutmix_labeled": 0.0}
    assert run_pixelwise(small("mean_teacher", **fields), "mixed")["cons"] < 1e-10


def test_the_consistency_counts_with_its_weight(cheap):
    _, metrics = run(small("mean_teacher", ramp=0.0, **{"consistency.weight": 7.0}), steps=1)
    sup = 0.5 * metrics["sup_ce"] + 0.5 * metrics["sup_dice"]
    assert metrics["cons"] > 1e-4
    np.testing.assert_allclose(metrics["loss"], sup + 7.0 * metrics["cons"], rtol=1e-5)


def test_the_gradient_takes_competence_for_a_constant(cheap):
    fields = {"ramp": 0.0, "pseudo_label.threshold": 0.0}
    states, metrics = run(small("pseudo_label", **fields), steps=1)
    assert 0.01 < metrics["pl_competence"] < 0.9
    fields |= {"pseudo_label.competence": False, "pseudo_label.weight": metrics["pl_competence"]}
    constant, _ = run(small("pseudo_label", **fields), steps=1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, states[-1].student, constant[-1].student)
    assert differ(states[0].student, states[-1].student)


def test_a_batch_with_nothing_confident_is_finite(cheap, monkeypatch):
    fields = {"contrast.threshold": 1.0, "pseudo_label.threshold": 1.0, "augment.cutmix_labeled": 0.0}
    config = small("anatomical_pl", **fields)
    # Not even a label is sure of its class.
    monkeypatch.setattr(train_step, "pool", lambda x, size, reduce: 0.5 * jnp.mean(x) + 0 * x[:, ::2, ::2])
    states, metrics = run(config, steps=1, key="unsure")
    assert metrics["con"] == 0 and metrics["con_queries"] == 0 and metrics["pl_coverage"] == 0 and metrics["pl_ce"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((states[-1], metrics)))


# -------------------------------------------------------------------------------------------------- several devices


SEVERAL = {
    "anatomical_pl": (
        "anatomical_pl",
        {
            "consistency.weight": 1.0,
            "contrast.labeled": True,
            "augment.cutmix_probability": 1.0,
            "augment.cutmix_labeled": 0.5,
            "augment.foreground": 0.5,
        },
        2,
    ),  # fmt: skip
    "region_pl": (
        "region_pl",
        {"model.norm": "batch", "pseudo_label.threshold": 0.3, "contrast.sampler": "both"},
        4,
    ),
}


@pytest.fixture(scope="module")
def on_several_devices(tmp_path_factory):
    """This file, run as a program with four virtual devices, writes what it found."""
    output = tmp_path_factory.mktemp("devices") / "found.json"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    subprocess.run([sys.executable, __file__, str(output)], env=env, check=True)
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", SEVERAL)
def test_several_devices_equal_one(name, on_several_devices):
    found = on_several_devices[name]
    assert found["moved"] > 1e-2
    assert found["largest_difference"] < 1e-5
    one, several = found["metrics"]
    assert one.keys() == several.keys() and one["pl_coverage"] > 0 and one["con"] > 0
    for term in one:
        assert several[term] == pytest.approx(one[term], rel=1e-4, abs=1e-6), term


def compare_devices(method, fields, devices):
    config = small(method, **{"data.labeled_batch": 4, "data.unlabeled_batch": 8} | fields)
    one, one_metrics = run(config, steps=3)
    several, several_metrics = run(config, steps=3, devices=devices)
    largest = lambda a, b: max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))  # noqa: E731
    return {
        "largest_difference": largest(one[-1], several[-1]),
        "moved": largest(one[0].student, one[-1].student),
        "metrics": [one_metrics, several_metrics],
    }


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as main_patch:
        cheap_augmentation(main_patch)
        Path(sys.argv[1]).write_text(json.dumps({n: compare_devices(*values) for n, values in SEVERAL.items()}))
