"""Pixel contrast between a student and its teacher: which pixels to compare, and InfoNCE over them.

Everything has a fixed shape. A sampler draws, in each image, up to `count` pixels of each group (a class, or a cell
of the plane) by Gumbel top-k and says which of the drawn are real; features are then gathered by index. So memory
grows with the pixels drawn, never with the square of the pixels there are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands for log 0: far below any cosine / temperature, yet finite, so that gradients stay finite too.
_LOG_ZERO = -1e30


def sample_pixels(
    key: jax.Array, group: jax.Array, eligible: jax.Array, num_groups: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """Draws pixels of one image, group by group, uniformly and without replacement.

    Ranking by independent Gumbel scores and taking the first k is drawing k without replacement (Kool et al., 2019).

    Args:
      key: random key.
      group: (pixels,) int, the group of each pixel; outside [0, num_groups) takes no part.
      eligible: (pixels,) bool, the pixels that may be drawn.
      num_groups: number of groups.
      count: pixels to draw of each group; no more than there are pixels are returned.

    Returns:
      indices (num_groups, k) int32 and valid (num_groups, k) bool, with k = min(count, pixels). A group with fewer
      eligible pixels gets them all, and False for the rest.
    """
    members = (group == jnp.arange(num_groups)[:, None]) & eligible
    scores = jnp.where(members, jax.random.gumbel(key, group.shape), -jnp.inf)
    best, indices = jax.lax.top_k(scores, min(count, group.shape[0]))
    return indices, best > -jnp.inf


def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE with several positives, the mean taken outside the logarithm (Khosla et al., 2020, eq. 2).

        l(q) = -1/|P(q)| sum_{p in P(q)} log [ exp(q.p/t) / (exp(q.p/t) + sum_{n in N(q)} exp(q.n/t)) ]

    Each positive competes with the negatives only, not with the other positives.

    Args:
      queries: (Q, D) unit vectors.
      keys: (K, D) unit vectors.
      positive: (Q, K) bool, P(q).
      negative: (Q, K) bool, N(q), disjoint from P(q).
      temperature: t > 0.

    Returns:
      loss (Q,) float32, at least 0, and valid (Q,) bool: whether the query has a positive and a negative. Loss and
      gradient of the others are 0.
    """
    # Some devices would round the factors to TF32 or bfloat16, and a low temperature makes much of that.
    products = jnp.matmul(queries.astype(jnp.float32), keys.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    scores = products / temperature
    log_negatives = jax.nn.logsumexp(jnp.where(negative, scores, _LOG_ZERO), axis=1)
    # -log(e^p / (e^p + sum e^n)) = softplus(log sum e^n - p)
    terms = jax.nn.softplus(log_negatives[:, None] - scores)
    positives = jnp.sum(positive, axis=1)
    valid = (positives > 0) & jnp.any(negative, axis=1)
    terms = jnp.where(positive & valid[:, None], terms, 0.0)
    return jnp.sum(terms, axis=1) / jnp.maximum(positives, 1), valid


class Pixels(NamedTuple):
    """What the samplers know of the pixels of a batch on the feature grid, flattened to (batch, pixels).

    Attributes:
      anatomy: class of each pixel: the true label, or the teacher's pseudo-label.
      confidence: in [0, 1], how sure that class is.
      cell: cell of the R x R grid in which the pixel lies, in the image's own coordinates.
      partition: part of the volume, along its slices, in which the pixel lies.
      inside: False for padding.
    """

    anatomy: jax.Array
    confidence: jax.Array
    cell: jax.Array
    partition: jax.Array
    inside: jax.Array


class Drawn(NamedTuple):
    """Pixels drawn from a batch, (n,) each: where they lie, and what decides who is whose positive."""

    image: jax.Array
    pixel: jax.Array
    anatomy: jax.Array
    cell: jax.Array
    partition: jax.Array
    valid: jax.Array


def _draw(keys: jax.Array, pixels: Pixels, group: jax.Array, eligible: jax.Array, **counts: int) -> Drawn:
    """Draws from each image with its own key, so that the split over devices changes nothing."""
    index, valid = jax.vmap(lambda k, g, e: sample_pixels(k, g, e, **counts))(keys, group, eligible)
    batch = index.shape[0]
    index, valid = index.reshape(batch, -1), valid.reshape(batch, -1)
    image = jnp.broadcast_to(jnp.arange(batch)[:, None], index.shape)
    attributes = (pixels.anatomy, pixels.cell, pixels.partition)
    taken = (jnp.take_along_axis(a, index, axis=1) for a in attributes)
    return Drawn(*(x.reshape(-1) for x in (image, index, *taken, valid)))


def anatomical_draw(keys: jax.Array, pixels: Pixels, *, num_classes: int, count: int, threshold: float) -> Drawn:
    """Anatomical-aware: up to `count` confident pixels of each class from each image."""
    eligible = pixels.inside & (pixels.confidence >= threshold)
    return _draw(keys, pixels, pixels.anatomy, eligible, num_groups=num_classes, count=count)


def region_draw(keys: jax.Array, pixels: Pixels, *, num_cells: int, count: int) -> Drawn:
    """Region-aware: up to `count` pixels of each cell of the plane from each image."""
    return _draw(keys, pixels, pixels.cell, pixels.inside, num_groups=num_cells, count=count)


def anatomical_pairs(queries: Drawn, keys: Drawn, num_means: int = 0) -> tuple[jax.Array, jax.Array]:
    """Positive and negative masks (Q, K): same class, other class.

    With `num_means` > 0 the first keys are the class means of `with_class_means`, and the only positives.
    """
    both = queries.valid[:, None] & keys.valid
    same = queries.anatomy[:, None] == keys.anatomy
    is_mean = jnp.arange(keys.valid.shape[0]) < num_means
    positive = both & same & is_mean if num_means else both & same
    return positive, both & ~same & ~is_mean


def region_pairs(queries: Drawn, keys: Drawn) -> tuple[jax.Array, jax.Array]:
    """Positive and negative masks (Q, K): same partition and same cell; another cell.

    The keys are the teacher's view, so all images of the batch, the query's own included, may hold positives. The
    same cell in another partition is neither: it may or may not be the same tissue.
    """
    both = queries.valid[:, None] & keys.valid
    same_cell = queries.cell[:, None] == keys.cell
    same_partition = queries.partition[:, None] == keys.partition
    return both & same_cell & same_partition, both & ~same_cell


def with_class_means(keys: jax.Array, drawn: Drawn, num_classes: int) -> tuple[jax.Array, Drawn]:
    """Puts the unit mean of each class before the keys: (K, D) to (num_classes + K, D)."""
    member = jax.nn.one_hot(drawn.anatomy, num_classes, dtype=keys.dtype) * drawn.valid[:, None]
    sums = member.T @ keys
    means = sums * jax.lax.rsqrt(jnp.maximum(jnp.sum(sums * sums, -1, keepdims=True), 1e-12))
    zeros = jnp.zeros(num_classes, drawn.image.dtype)
    classes = jnp.arange(num_classes, dtype=drawn.anatomy.dtype)
    head = Drawn(zeros, zeros, classes, zeros, zeros, jnp.any(member > 0, axis=0))
    joined = (jnp.concatenate([a, b]) for a, b in zip(head, drawn, strict=True))
    return jnp.concatenate([means, keys]), Drawn(*joined)


def grid_cell(position: jax.Array, cells: int) -> jax.Array:
    """Cell of a `cells` x `cells` grid: position (..., 2) in [0, 1] to (...) int32."""
    index = jnp.clip(jnp.floor(position * cells).astype(jnp.int32), 0, cells - 1)
    return index[..., 0] * cells + index[..., 1]
