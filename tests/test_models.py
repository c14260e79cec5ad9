import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sscl_jax.models import UNet
from sscl_jax.models.unet import Conv, GroupNorm, Normalise, depth_to_space, dot_by_image, max_pool


@pytest.mark.parametrize(("shape", "level"), [((2, 16, 8, 1), 1), ((1, 8, 8, 16, 2), 2), ((1, 8, 8, 1), 0)])
def test_shapes(shape, level):
    widths = (4, 6, 8)
    model = UNet(num_classes=3, widths=widths, feature_level=level, projection_dim=5)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    assert set(variables["params"]) == {"encoder", "decoder", "projector"}
    logits, features = jax.eval_shape(model.apply, variables, jnp.zeros(shape))
    assert logits.shape == (*shape[:-1], 3)
    assert features.shape == (shape[0], *(n // 2**level for n in shape[1:-1]), widths[level])
    projected = jax.eval_shape(lambda v, f: model.apply(v, f, method="project"), variables, features)
    assert projected.shape == (*features.shape[:-1], 5)


def test_projections_have_unit_norm_and_survive_zeros():
    model = UNet(num_classes=2, widths=(4, 6), feature_level=1, projection_dim=5)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    features = jnp.concatenate([jax.random.normal(jax.random.key(1), (7, 6)), jnp.zeros((1, 6))])

    def project(f):
        return model.apply(variables, f, method="project")

    np.testing.assert_allclose(jnp.linalg.norm(project(features)[:7], axis=-1), 1, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda f: project(f).sum())(features)).all()


def test_max_pool_equals_a_loop():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 3)).astype(np.float32)
    got = np.asarray(max_pool(jnp.array(x)))
    assert got.shape == (2, 2, 3, 4, 3)
    for i, j, k in np.ndindex(2, 3, 4):
        block = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        np.testing.assert_array_equal(got[:, i, j, k], block.max((1, 2, 3)))


def test_max_pool_gives_its_gradient_to_the_greatest_and_shares_it_among_equals():
    x = jnp.array([[[1.0, 2.0], [4.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]])[..., None]
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x) * jnp.array([8.0, 4.0])[:, None, None, None]))(x)
    np.testing.assert_array_equal(gradient[..., 0], [[[0, 0], [8, 0]], [[1, 1], [1, 1]]])


def test_dot_by_image_equals_dense():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    ours, linen = nn.Dense(7, dot_general=dot_by_image), nn.Dense(7)
    params = linen.init(jax.random.key(1), x)

    def results(module):
        return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(module.apply(p, x))), argnums=(0, 1))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results(ours), results(linen))


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 4, 6, 5, 3), (1, 1, 6, 2, 1)])
def test_convolution_equals_linens(shape):
    ours, theirs = Conv(4), nn.Conv(4, (3,) * (len(shape) - 2), use_bias=False)
    x = jax.random.normal(jax.random.key(0), shape)
    params = ours.init(jax.random.key(1), x)
    expected = theirs.init(jax.random.key(1), x)
    np.testing.assert_array_equal(params["params"]["kernel"], expected["params"]["kernel"])
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5, atol=1e-5)

    def gradients(module):
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(module.apply(p, x))), argnums=(0, 1))(params, x)

    for a, b in zip(jax.tree.leaves(gradients(ours)), jax.tree.leaves(gradients(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_dense_and_depth_to_space_are_a_transposed_convolution(rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *range(3, 3 + rank), 5)).astype(np.float32)
    kernel = rng.normal(size=((2,) * rank + (5, 4))).astype(np.float32)
    dense = np.moveaxis(kernel, -2, 0).reshape(5, -1)
    got = np.asarray(depth_to_space(jnp.array(x @ dense), rank))
    for place in np.ndindex(*x.shape[1:-1]):
        for corner in np.ndindex(*(2,) * rank):
            target = tuple(2 * p + c for p, c in zip(place, corner, strict=True))
            expected = x[(slice(None), *place)] @ kernel[corner]
            np.testing.assert_allclose(got[(slice(None), *target)], expected, rtol=1e-4, atol=1e-5)


def test_group_norm_equals_linen():
    rng = np.random.default_rng(0)
    x = jnp.array(3 * rng.normal(size=(3, 6, 5, 24)) + 5, jnp.float32)
    params = {name: jnp.array(rng.normal(size=24), jnp.float32) for name in ("scale", "bias")}
    weights = jnp.array(rng.normal(size=x.shape), jnp.float32)

    def value(module, params, x):
        return jnp.sum(weights * jnp.tanh(module.apply({"params": params}, x)))

    ours, linen = (
        jax.jit(jax.value_and_grad(lambda p, x, m=m: value(m, p, x), argnums=(0, 1)))(params, x)
        for m in (GroupNorm(groups=8), nn.GroupNorm(num_groups=8))
    )
    np.testing.assert_allclose(ours[0], linen[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours[1], linen[1])


@pytest.mark.parametrize("value", [0.0, 1000.3])
def test_group_norm_of_a_constant_is_finite(value):
    x = jnp.full((1, 4, 4, 16), value)
    params = {"scale": jnp.ones(16), "bias": jnp.full(16, 0.5)}
    result, gradient = jax.value_and_grad(lambda x: GroupNorm(groups=8).apply({"params": params}, x).sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(result, 0.5 * x.size, rtol=0.3)


@pytest.mark.parametrize(("width", "groups"), [(12, 6), (20, 5), (7, 7), (11, 1)])
def test_any_width_has_groups(width, groups):
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 3, width)), jnp.float32)
    got, _ = Normalise("group", None).init_with_output(jax.random.key(0), x, True)
    parts = np.asarray(x).reshape(2, 12, groups, -1)
    mean, var = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    np.testing.assert_allclose(got, ((parts - mean) / np.sqrt(var + 1e-6)).reshape(x.shape), rtol=1e-3, atol=1e-4)


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_network_equals_the_one_written_out():
    model, deep = (UNet(num_classes=3, widths=(4, 16), feature_level=n, projection_dim=5) for n in (0, 1))
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(2, 4, 6, 1)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), jnp.float32), shapes)

    def block(x, block):
        for i in range(2):
            x = convolved(x, block[f"Conv_{i}"]["kernel"])
            norm = block[f"Normalise_{i}"]["GroupNorm_0"]
            x = nn.GroupNorm(num_groups=min(8, x.shape[-1])).apply({"params": norm}, x)
            x = jnp.where(x > 0, x, 0.01 * x)
        return x

    encoder, decoder = params["encoder"], params["decoder"]
    fine = block(x, encoder["ConvBlock_0"])
    coarse = block(fine.reshape(2, 2, 2, 3, 2, 4).max((2, 4)), encoder["ConvBlock_1"])
    dense = np.asarray(coarse @ decoder["Dense_0"]["kernel"] + decoder["Dense_0"]["bias"])
    up = np.empty((2, 4, 6, 4), np.float32)
    for i, j in np.ndindex(2, 2):
        up[:, i::2, j::2] = dense[..., 4 * (2 * i + j) :][..., :4]
    last = block(jnp.concatenate([fine, up], -1), decoder["ConvBlock_0"])
    logits, features = model.apply({"params": params}, x)
    expected = last @ decoder["Dense_1"]["kernel"] + decoder["Dense_1"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features, last, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(deep.apply({"params": params}, x)[1], coarse, rtol=1e-3, atol=1e-3)


def test_batch_norm_follows_the_batch_in_training_and_its_statistics_after():
    model = UNet(num_classes=2, widths=(4, 6), norm="batch")
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert set(variables["batch_stats"]) == {"encoder", "decoder"}
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    _, changed = train(variables, x)
    first = changed["batch_stats"]["encoder"]["ConvBlock_0"]["Normalise_0"]["BatchNorm_0"]
    y = convolved(x, variables["params"]["encoder"]["ConvBlock_0"]["Conv_0"]["kernel"])
    np.testing.assert_allclose(first["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-4)
    before, after = (model.apply(v, x)[0] for v in (variables, variables | changed))
    assert np.abs(before - after).max() > 1e-3


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r"multiple of 4.*data\.patch_size"):
        UNet(num_classes=2, widths=(4, 4, 4)).init(jax.random.key(0), jnp.zeros((1, 10, 8, 1)))
    with pytest.raises(ValueError, match=r"contrast\.level=3"):
        UNet(num_classes=2, widths=(4, 4, 4), feature_level=3).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"model\.norm='instance'"):
        UNet(num_classes=2, widths=(4,), feature_level=0, norm="instance").init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 1))
        )


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_remat_changes_memory_and_nothing_else(norm):
    plain, again = (UNet(num_classes=3, widths=(4, 6, 8), norm=norm, remat=remat) for remat in (False, True))
    x = jax.random.normal(jax.random.key(0), (2, 16, 8, 1))
    variables = jax.jit(plain.init)(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(jax.eval_shape(again.init, jax.random.key(1), x))

    def gradient(model):
        def loss(params):
            outputs, stats = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(outputs[0])), stats

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    for a, b in zip(jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())  # sums of terms of that size
    program = str(jax.make_jaxpr(lambda p: jax.grad(lambda p: again.apply({**variables, "params": p}, x)[0].sum())(p))(
        variables["params"]
    ))  # fmt: skip
    assert "remat" in program or "checkpoint" in program


@pytest.mark.parametrize("shape", [(2, 16, 8, 1), (1, 4, 8, 8, 2)])
def test_bfloat16_is_close_to_float32_and_keeps_float32_where_it_matters(shape):
    full, half = (UNet(num_classes=3, widths=(4, 6), dtype=dtype) for dtype in ("float32", "bfloat16"))
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(half.init)(jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (logits, features), (half_logits, half_features) = full.apply(variables, x), half.apply(variables, x)
    assert half_logits.dtype == jnp.float32 and half_features.dtype == jnp.bfloat16
    assert half.apply(variables, half_features, method="project").dtype == jnp.float32
    assert np.any(half_logits != half_logits.astype(jnp.bfloat16)), "the logits were rounded on their way"
    raised = jax.tree.map(lambda p: p + 1e-3 * (p.shape == (3,)), variables)  # the bias of the logits
    np.testing.assert_allclose(half.apply(raised, x)[0] - half_logits, 1e-3, rtol=1e-3)
    # bfloat16 has 8 bits: about 0.4 % an operation. Equal would mean that it was not used.
    difference = np.abs(np.asarray(half_logits - logits))
    assert 0 < difference.max() < 0.1 * np.abs(logits).max()
    grads = jax.grad(lambda p: half.apply({"params": p}, x)[0].std())(variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(half_features.astype(jnp.float32), features, atol=0.1 * np.abs(features).max())
