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
    np.testing.assert_allclose(losses.dice_loss(dice, "linear"), 1 - expected, rtol=1e-5)
    np.testing.assert_allclose(losses.dice_loss(dice, "log"), -np.log(expected), rtol=1e-5)


def test_a_class_that_is_hardly_found_pulls_hard_only_in_the_log_form():
    # A class of 100 pixels of 10,000, found with a probability of 1e-4 everywhere; the gradient to its own pixels.
    labels = jnp.arange(10_000) < 100

    def loss(logits, form):
        sums = losses.dice_sums(jax.nn.softmax(logits), labels.astype(int), jnp.ones(10_000))
        return losses.dice_loss(losses.soft_dice(sums, smooth=0.0), form)[1]

    logits = jnp.log(jnp.tile(jnp.array([1 - 1e-4, 1e-4]), (10_000, 1)))
    pull = {form: jnp.sum(jax.grad(loss)(logits, form)[:100, 1]) for form in ("linear", "log")}
    # By hand: Dice 2 o / (100 + 1), o = 100 p; of linear -2 o / 101 (1 - p) + ..., of log -(1 - p) + ...
    np.testing.assert_allclose(pull["log"], -(1 - 1e-4) * (1 - 0.01 / 101), rtol=1e-4)
    np.testing.assert_allclose(pull["log"] / pull["linear"], 101 / (2 * 0.01), rtol=1e-4)


def test_a_pixel_counts_in_soft_dice_by_its_weight():
    probs = jnp.array([[0.75, 0.25], [0.5, 0.5]])
    overlap, total = losses.dice_sums(probs, jnp.array([0, 1]), jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(overlap, [0.375, 0.125], rtol=1e-6)
    np.testing.assert_allclose(total, [0.5 * 1.75 + 0.25 * 0.5, 0.5 * 0.25 + 0.25 * 1.5], rtol=1e-6)


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_finite_for_extreme_logits(weight, form):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    labels = jnp.array([1, 2])

    def loss(logits):
        sums = losses.dice_sums(jax.nn.softmax(logits), labels, jnp.full(2, weight))
        return jnp.sum(losses.cross_entropy(logits, labels)) + jnp.sum(losses.dice_loss(losses.soft_dice(sums), form))

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_squared_difference_by_hand():
    a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 0.5]])
    np.testing.assert_allclose(losses.squared_difference(a, b), [0.25])
