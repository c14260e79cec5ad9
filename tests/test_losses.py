import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sscl_jax import losses


def test_cross_entropy_equals_optax():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 6, 4)).astype(np.float32), rng.integers(0, 4, (2, 5, 6))
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(losses.cross_entropy(jnp.array(logits), jnp.array(labels)), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: losses.cross_entropy(x, jnp.array(labels)).sum())(jnp.array(logits))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, probs - np.eye(4)[labels], rtol=1e-4, atol=1e-6)


def test_soft_dice_by_hand():
    probs = jnp.array([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0]])
    labels, weight = jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.0])  # the third pixel takes no part
    overlap, total = losses.dice_sums(probs, labels, weight)
    np.testing.assert_allclose(overlap, [0.8, 0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(total, [1.2 + 1, 0.8 + 1, 0.0], rtol=1e-6)
    expected = np.array([(1.6 + 1) / (2.2 + 1), (1.2 + 1) / (1.8 + 1), 1.0])  # the third class is absent: no loss
    dice = losses.soft_dice(jnp.stack([overlap, total]))
    np.testing.assert_allclose(dice, expected, rtol=1e-5)


def test_dice_loss_by_hand():
    dice = jnp.array([1.0, 0.75, 0.5, 0.25, 0.01])
    expected = [0.0, 0.25, 0.5, 0.5 + 0.5 * np.log(2), 0.5 + 0.5 * np.log(50)]
    np.testing.assert_allclose(losses.rescuing_dice_loss(dice), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.dice_loss(dice), [0.0, 0.25, 0.5, 0.75, 0.99], rtol=1e-6)
    slopes = jax.vmap(jax.grad(losses.rescuing_dice_loss))(dice)
    np.testing.assert_allclose(slopes, [-1, -1, -1, -2, -50], rtol=1e-6)


def test_a_class_that_is_hardly_found_still_pulls():
    # A class of 1,000 pixels of 10,000, found with a probability of p there, of 1e-7 elsewhere.
    labels = jnp.arange(10_000) < 1000

    def pull(p):
        def loss(logits):
            sums = losses.dice_sums(jax.nn.softmax(logits), labels.astype(int), jnp.ones(10_000))
            return losses.rescuing_dice_loss(losses.soft_dice(sums))[1]

        probs = jnp.where(labels, p, 1e-7)
        logits = jnp.log(jnp.stack([1 - probs, probs], -1))
        return -jnp.sum(jax.grad(loss)(logits)[:1000, 1])

    # By hand, without the rest: D = (2o + 1) / (1001 + o) with o = 1000p, dloss/dD = -1 / 2D, dp/dlogit = p (1 - p).
    for p in (1e-4, 1e-3, 1e-2, 0.3):
        o = 1000 * p
        expected = o * (1 - p) * (1 / (2 * o + 1) - 1 / (2 * (1001 + o)))
        np.testing.assert_allclose(pull(p), expected, rtol=0.01)
    assert pull(1e-2) > 0.4  # as of a class that is half known; of 1 - D it would be 0.02


def test_a_pixel_counts_in_soft_dice_by_its_weight():
    probs = jnp.array([[0.75, 0.25], [0.5, 0.5]])
    overlap, total = losses.dice_sums(probs, jnp.array([0, 1]), jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(overlap, [0.375, 0.125], rtol=1e-6)
    np.testing.assert_allclose(total, [0.5 * 1.75 + 0.25 * 0.5, 0.5 * 0.25 + 0.25 * 1.5], rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_finite_for_extreme_logits(weight):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    labels = jnp.array([1, 2])

    def loss(logits):
        sums = losses.dice_sums(jax.nn.softmax(logits), labels, jnp.full(2, weight))
        return jnp.sum(losses.cross_entropy(logits, labels)) + jnp.sum(
            losses.rescuing_dice_loss(losses.soft_dice(sums))
        )

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_squared_difference_by_hand():
    a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 0.5]])
    np.testing.assert_allclose(losses.squared_difference(a, b), [0.25])
