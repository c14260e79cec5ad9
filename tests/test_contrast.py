"""The contrast against double loops in float64, and its behaviour where there is nothing to contrast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from sscl_jax import contrast


def loop_info_nce(queries, keys, positive, negative, temperature):
    """Loss of each query, and the gradient of their sum with respect to the queries, pair by pair."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    losses, gradient = np.zeros(len(queries)), np.zeros_like(queries)
    for i, q in enumerate(queries):
        positives = [j for j in range(len(keys)) if positive[i, j]]
        negatives = [j for j in range(len(keys)) if negative[i, j]]
        if not positives or not negatives:
            continue
        for p in positives:
            others = [p, *negatives]
            scores = np.array([q @ keys[j] / temperature for j in others])
            weights = np.exp(scores - logsumexp(scores))
            losses[i] += (logsumexp(scores) - scores[0]) / len(positives)
            expected = sum(w * keys[j] for w, j in zip(weights, others, strict=True))
            gradient[i] += (expected - keys[p]) / temperature / len(positives)
    return losses, gradient


def unit(rng, n, dim):
    x = rng.standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


loss_and_gradient = jax.jit(
    jax.value_and_grad(lambda q, k, p, n, t: contrast.info_nce(q, k, p, n, t)[0].sum()), static_argnums=4
)
info_nce = jax.jit(contrast.info_nce, static_argnums=4)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_equals_the_double_loop(temperature):
    rng = np.random.default_rng(0)
    queries, keys = unit(rng, 9, 5), unit(rng, 14, 5)
    kind = rng.integers(0, 3, (9, 14))  # positive, negative, neither
    positive, negative = kind == 0, kind == 1
    positive[3], negative[4] = False, False  # no positive; no negative
    losses, gradient = loop_info_nce(queries, keys, positive, negative, temperature)
    got, valid = info_nce(queries, keys, positive, negative, temperature)
    np.testing.assert_allclose(got, losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(valid, positive.any(1) & negative.any(1))
    _, got_gradient = loss_and_gradient(queries, keys, positive, negative, temperature)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-3, atol=1e-4)
    assert not got_gradient[3].any() and not got_gradient[4].any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**30),
    st.sampled_from([(4, 6), (1, 1), (0, 3), (3, 0)]),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_info_nce_is_right_whatever_the_shapes_and_masks(seed, shape, size, share):
    rng = np.random.default_rng(seed)
    queries, keys = size * unit(rng, shape[0], 3), unit(rng, shape[1], 3)
    positive = rng.random(shape) < share
    negative = (rng.random(shape) < share) & ~positive
    value, gradient = loss_and_gradient(queries, keys, positive, negative, 0.01)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~(positive.any(1) & negative.any(1))].any()
    # Scores reach size / 0.01, each rounded to float32's seven digits.
    losses, _ = loop_info_nce(queries, keys, positive, negative, 0.01)
    np.testing.assert_allclose(value, losses.sum(), rtol=1e-4, atol=1e-3 + 1e-4 * size)
    assert value >= 0


def test_sampling_takes_eligible_members_once():
    rng = np.random.default_rng(0)
    group = rng.integers(-1, 4, 50)
    group[group == 2] = 3  # group 2 is absent
    eligible = rng.random(50) < 0.6
    index, valid = contrast.sample_pixels(jax.random.key(0), jnp.array(group), jnp.array(eligible), 4, 6)
    assert index.shape == valid.shape == (4, 6)
    for g in range(4):
        members = set(np.flatnonzero((group == g) & eligible))
        taken = np.asarray(index[g])[np.asarray(valid[g])]
        assert len(set(taken)) == len(taken) == min(6, len(members))
        assert set(taken) <= members


def test_sampling_is_uniform():
    group, eligible = jnp.zeros(8, jnp.int32), jnp.arange(8) != 5
    draw = jax.jit(jax.vmap(lambda k: contrast.sample_pixels(k, group, eligible, 1, 2)[0]))
    index = np.asarray(draw(jax.random.split(jax.random.key(1), 7000)))
    counts = np.bincount(index.ravel(), minlength=8)
    assert counts[5] == 0
    # Each of 7 pixels is in a draw of 2 with chance 2/7: 2000 of 7000, standard deviation 38.
    assert np.abs(np.delete(counts, 5) - 2000).max() < 5 * 38


def test_sampling_more_than_there_are_pixels():
    index, valid = contrast.sample_pixels(jax.random.key(0), jnp.zeros(3, jnp.int32), jnp.ones(3, bool), 2, 10)
    assert index.shape == (2, 3)
    assert valid[0].all() and not valid[1].any()


def example_pixels(seed=0, batch=3, pixels=40, classes=3):
    rng = np.random.default_rng(seed)
    return contrast.Pixels(
        anatomy=jnp.array(rng.integers(0, classes, (batch, pixels))),
        confidence=jnp.array(rng.integers(0, 5, (batch, pixels)) / 4, jnp.float32),  # often exactly a threshold
        cell=jnp.array(rng.integers(0, 4, (batch, pixels))),
        partition=jnp.array(rng.integers(0, 2, (batch, pixels))),
        inside=jnp.array(rng.random((batch, pixels)) < 0.8),
    )


def check_drawn(drawn, pixels, group, eligible, count):
    """Each image gives of each group `count` eligible pixels, or all, once each, with what is known of them."""
    drawn, pixels = jax.tree.map(np.asarray, (drawn, pixels))
    taken = [(int(i), int(p)) for i, p, v in zip(drawn.image, drawn.pixel, drawn.valid, strict=True) if v]
    assert len(set(taken)) == len(taken)
    for image, row in enumerate(group):
        for g in range(group.max() + 1):
            members = {(image, p) for p in range(len(row)) if row[p] == g and eligible[image, p]}
            assert len(members & set(taken)) == min(count, len(members))
    assert all(eligible[at] for at in taken)
    for name in ("anatomy", "cell", "partition"):
        expected = [getattr(pixels, name)[at] for at in zip(drawn.image, drawn.pixel, strict=True)]
        np.testing.assert_array_equal(getattr(drawn, name), expected)


def test_anatomical_draw_and_pairs_equal_loops():
    draw = dict(num_classes=3, threshold=0.5)
    views = example_pixels(), example_pixels(5)
    seeds = jax.random.split(jax.random.key(0), 6)
    queries = contrast.anatomical_draw(seeds[:3], views[0], count=8, **draw)
    keys = contrast.anatomical_draw(seeds[3:], views[1], count=8, **draw)
    for drawn, pixels in zip((queries, keys), views, strict=True):
        assert len(drawn.valid) == 3 * 3 * 8
        eligible = np.asarray(pixels.inside) & (np.asarray(pixels.confidence) >= 0.5)
        check_drawn(drawn, pixels, np.asarray(pixels.anatomy), eligible, 8)
    positive, negative = (np.asarray(mask) for mask in contrast.anatomical_pairs(queries, keys))
    q, k = jax.tree.map(np.asarray, (queries, keys))
    assert not q.valid.all() and not k.valid.all()
    for i, j in np.ndindex(positive.shape):
        both, same = bool(q.valid[i] and k.valid[j]), bool(q.anatomy[i] == k.anatomy[j])
        assert positive[i, j] == (both and same) and negative[i, j] == (both and not same)


def test_region_draw_and_pairs_equal_loops():
    views = example_pixels(1), example_pixels(4, pixels=30)
    seeds = jax.random.split(jax.random.key(0), 6)
    queries = contrast.region_draw(seeds[:3], views[0], num_cells=4, count=8)
    keys = contrast.region_draw(seeds[3:], views[1], num_cells=4, count=8)
    for drawn, pixels in zip((queries, keys), views, strict=True):
        check_drawn(drawn, pixels, np.asarray(pixels.cell), np.asarray(pixels.inside), 8)
    positive, negative = (np.asarray(mask) for mask in contrast.region_pairs(queries, keys))
    q, k = jax.tree.map(np.asarray, (queries, keys))
    assert not q.valid.all() and not k.valid.all()
    for i, j in np.ndindex(positive.shape):
        both, same = q.valid[i] and k.valid[j], q.cell[i] == k.cell[j]
        assert positive[i, j] == (both and same and q.partition[i] == k.partition[j])
        assert negative[i, j] == (both and not same)


def test_each_image_draws_with_its_own_key():
    pixels = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), example_pixels(1))
    first, other = jax.random.split(jax.random.key(0))
    drawn = contrast.region_draw(jnp.stack([first, other, first]), pixels, num_cells=4, count=3)
    rows = np.asarray(drawn.pixel).reshape(3, -1)
    assert (rows[0] == rows[2]).all() and (rows[0] != rows[1]).any()


def test_class_means_are_the_only_positives():
    pixels = example_pixels(2)
    rng = np.random.default_rng(0)
    drawn = contrast.anatomical_draw(
        jax.random.split(jax.random.key(0), 3), pixels, num_classes=4, count=3, threshold=0.0
    )
    vectors = unit(rng, len(drawn.valid), 5)
    keys, extended = contrast.with_class_means(jnp.array(vectors), drawn, 4)
    for c in range(3):
        mean = vectors[np.asarray(drawn.valid & (drawn.anatomy == c))].mean(0)
        np.testing.assert_allclose(keys[c], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    assert not extended.valid[3] and np.isfinite(keys[3]).all()  # no pixel has class 3
    positive, negative = contrast.anatomical_pairs(drawn, extended, 4)
    assert not positive[:, 4:].any() and not negative[:, :4].any()
    for i in np.flatnonzero(drawn.valid):
        assert list(np.flatnonzero(positive[i])) == [int(drawn.anatomy[i])]


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("case", ["absent from an image", "one class", "none above the threshold", "all padding"])
def test_batches_with_little_in_them(case, means):
    pixels = example_pixels(3)
    if case == "absent from an image":
        pixels = pixels._replace(anatomy=pixels.anatomy.at[0].set(0))
    elif case == "one class":
        pixels = pixels._replace(anatomy=jnp.ones_like(pixels.anatomy))
    elif case == "none above the threshold":
        pixels = pixels._replace(confidence=pixels.confidence * 0.1)
    else:
        pixels = pixels._replace(inside=jnp.zeros_like(pixels.inside))
    drawn = contrast.anatomical_draw(
        jax.random.split(jax.random.key(0), 3), pixels, num_classes=3, count=4, threshold=0.5
    )
    vectors = jnp.array(unit(np.random.default_rng(0), len(drawn.valid), 5))
    keys, extended = contrast.with_class_means(vectors, drawn, 3) if means else (vectors, drawn)
    positive, negative = contrast.anatomical_pairs(drawn, extended, 3 if means else 0)
    value, gradient = loss_and_gradient(vectors, keys, positive, negative, 0.1)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (value > 0) == (case == "absent from an image")


def test_grid_cell_by_hand():
    position = jnp.array([[0.0, 0.0], [0.0, 0.34], [0.99, 0.99], [1.0, 1.0], [0.5, 0.1]])
    np.testing.assert_array_equal(contrast.grid_cell(position, 3), [0, 1, 8, 8, 3])
