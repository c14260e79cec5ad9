"""Segmentation losses. All return unreduced values or sums, so that the caller can reduce over devices."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each pixel, in nats.

    Args:
      logits: (..., classes) float.
      labels: (...) int in [0, classes).

    Returns:
      (...) float32, at least 0.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # A choice and not an index, whose gradient would be a scatter over the whole image.
    chosen = labels[..., None] == jnp.arange(logits.shape[-1])
    return -jnp.sum(jnp.where(chosen, log_probs, 0.0), axis=-1)


def dice_sums(probs: jax.Array, labels: jax.Array, weight: jax.Array) -> jax.Array:
    """The two sums of the soft Dice of each class, (2, classes) float32: overlap and total.

    Args:
      probs: (..., classes) in [0, 1].
      labels: (...) int in [0, classes).
      weight: (...) in [0, 1]; pixels of weight 0 take no part.
    """
    probs = probs.astype(jnp.float32)
    reference = jax.nn.one_hot(labels, probs.shape[-1], dtype=probs.dtype)
    axes = tuple(range(probs.ndim - 1))
    w = weight[..., None].astype(probs.dtype)
    overlap = jnp.sum(w * probs * reference, axes)
    total = jnp.sum(w * (probs + reference), axes)
    return jnp.stack([overlap, total])


def soft_dice(sums: jax.Array) -> jax.Array:
    """(2 overlap + 1) / (total + 1) of each class, in (0, 1] (Milletari et al., 2016, with a linear denominator).

    The sums run over the whole batch, since a slice often lacks a class, and the 1 (pixel) makes a class absent from
    both a perfect match instead of 0 / 0.
    """
    overlap, total = sums
    return (2.0 * overlap + 1.0) / (total + 1.0)


def dice_loss(dice: jax.Array) -> jax.Array:
    """1 - D of a soft Dice D."""
    return 1.0 - dice


def rescuing_dice_loss(dice: jax.Array) -> jax.Array:
    """1 - D above 1/2, (1 - log 2D) / 2 below: the logarithm goes on with value and slope.

    The gradient of 1 - D goes with the probability of the class, so of a class that is hardly found there is next to
    none, and it can stay forgotten. That of -log D (Wong et al., 2018) is 1 / D times as large. It is not taken for
    the whole, since of the classes that are known it would weigh the worst most. D must be above 0, as `soft_dice` is.
    """
    return jnp.where(dice > 0.5, dice_loss(dice), 0.5 - 0.5 * jnp.log(2.0 * dice))


def squared_difference(probs: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over classes of the squared difference of two probability maps: (..., classes) to (...).

    The consistency of the mean teacher (Tarvainen & Valpola, 2017).
    """
    return jnp.mean(jnp.square(probs.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)
