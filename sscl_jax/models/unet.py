"""U-Net (Ronneberger et al., 2015) for 2-D slices and 3-D patches, with a projection head.

One definition serves both ranks: every spatial operation loops over the axes between the batch axis and the
channel axis. Parameters fall into three top-level groups, `encoder`, `decoder` and `projector`, so that a teacher
can average the encoder alone or the whole network.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Probability of background in a network that has learnt nothing yet.
BACKGROUND = 0.9


class GroupNorm(nn.Module):
    """Group norm (Wu & He, 2018) of (batch, *spatial, channels), as linen's, with one multiply-add a pixel.

    Statistics and affine parameters are first folded into one scale and one shift for each image and channel. On
    CPU linen's own, which normalises a grouped copy, takes about a fifth of the whole forward and backward pass.
    """

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        spatial = tuple(range(1, x.ndim - 1))
        wide = x.astype(jnp.float32)
        moments = jnp.stack([jnp.mean(wide, spatial), jnp.mean(wide * wide, spatial)])
        mean, square = jnp.mean(moments.reshape(2, batch, self.groups, -1), -1)
        inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + 1e-6)
        per_channel = lambda v: jnp.repeat(v, channels // self.groups, axis=1)  # noqa: E731
        factor = per_channel(inverse) * scale
        shift = bias - per_channel(mean) * factor
        shape = (batch, *(1,) * len(spatial), channels)
        return (x * factor.reshape(shape) + shift.reshape(shape)).astype(x.dtype)


class Normalise(nn.Module):
    """Group norm, or batch norm synchronised over the device axis.

    Attributes:
      kind: `group` (no running statistics, so an averaged network is a plain average) or `batch`.
      axis_name: device axis over which batch statistics are averaged; None outside pmap.
    """

    kind: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.kind == "group":
            # Eight groups, or the next lower number that divides the channels.
            groups = max(n for n in range(1, 9) if x.shape[-1] % n == 0)
            return GroupNorm(groups=groups)(x)
        if self.kind == "batch":
            # Collectives are only wanted (and only possible) in the pmapped step.
            axis_name = None if self.is_initializing() else self.axis_name
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name, dtype=x.dtype)(x)
        raise ValueError(f"model.norm={self.kind!r}: choose 'group' or 'batch'.")


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of stride 1 that keeps the size.

    On CPU a 3-D one is written as 2-D: each slice is stacked with its two neighbours, as channels. That is the same
    sum in a fifth of the time, since XLA has no fast 3-D convolution there.

    Args:
      x: (batch, *spatial, channels).
      kernel: (3, ..., 3, channels, width), one 3 for each spatial axis.
    """
    if x.ndim == 5 and jax.default_backend() == "cpu":
        depth, *plane, channels = x.shape[1:]
        padded = jnp.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
        stacked = jnp.concatenate([padded[:, i : i + depth] for i in range(3)], axis=-1)
        flat_kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, 3 * channels, -1)
        return convolve(stacked.reshape(-1, *plane, 3 * channels), flat_kernel).reshape(
            -1, depth, *plane, kernel.shape[-1]
        )
    axes = "DHW"[5 - x.ndim :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(axes), "SAME", dimension_numbers=numbers)


class Conv(nn.Module):
    """3 x 3 (x 3) convolution, as linen's without a bias."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3,) * (x.ndim - 2) + (x.shape[-1], self.width)
        return convolve(x, self.param("kernel", nn.initializers.lecun_normal(), shape).astype(x.dtype))


class ConvBlock(nn.Module):
    """Two 3 x 3 (x 3) convolutions, each followed by normalisation and a leaky ReLU."""

    width: int
    norm: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for _ in range(2):
            x = Conv(self.width)(x)
            x = nn.leaky_relu(Normalise(self.norm, self.axis_name)(x, train))
        return x


def conv_block(remat: bool) -> type[ConvBlock]:
    """`ConvBlock`; with `remat` what is inside it is computed again in the backward pass, and not kept until then."""
    return nn.remat(ConvBlock, static_argnums=(2,)) if remat else ConvBlock


def pool(x: jax.Array, size: int, reduce: Callable) -> jax.Array:
    """Makes one pixel of each block: (batch, *spatial, channels) to (batch, *spatial / size, channels).

    By blocks of a reshaped array: on CPU both this and its gradient are faster than XLA's reduce_window, or than
    reducing strided slices.
    """
    blocks = [d for n in x.shape[1:-1] for d in (n // size, size)]
    return reduce(x.reshape(x.shape[0], *blocks, x.shape[-1]), axis=tuple(range(2, 1 + len(blocks), 2)))


def max_pool(x: jax.Array) -> jax.Array:
    """Halves every spatial axis of (batch, *spatial, channels); the sizes must be even."""
    return pool(x, 2, jnp.max)


def depth_to_space(x: jax.Array, rank: int) -> jax.Array:
    """(batch, *spatial, 2**rank * channels) to (batch, *doubled spatial, channels)."""
    batch, spatial, channels = x.shape[0], x.shape[1:-1], x.shape[-1] // 2**rank
    x = x.reshape(batch, *spatial, *(2,) * rank, channels)
    interleaved = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    x = x.transpose(0, *interleaved, 1 + 2 * rank)
    return x.reshape(batch, *(2 * n for n in spatial), channels)


def dot_by_image(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x @ kernel as one product for each image, for `nn.Dense`: (batch, *spatial, c) x (c, d) to (batch, *spatial, d).

    The gradient of the kernel then sums over the pixels of an image and last over images. On CPU XLA's product over all
    pixels of a batch at once takes twice as long. In bfloat16 the last sum would be rounded, so there it is that.
    """
    if x.dtype != jnp.float32:
        return jnp.matmul(x, kernel)
    kernels = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))
    products = jnp.matmul(x.reshape(x.shape[0], -1, x.shape[-1]), kernels)
    return products.reshape(*x.shape[:-1], -1)


class Encoder(nn.Module):
    """Features of every level, finest first: level l has 1 / 2**l of the resolution and `widths[l]` channels."""

    widths: Sequence[int]
    norm: str
    axis_name: str | None
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        levels = []
        for level, width in enumerate(self.widths):
            block = conv_block(self.remat)(width, self.norm, self.axis_name, name=f"ConvBlock_{level}")
            x = block(max_pool(x) if level else x, train)
            levels.append(x)
        return levels


def background_bias(key: jax.Array, shape: tuple[int], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Bias of the logits with which the network starts by taking nearly everything for background (class 0).

    A prior as in Lin et al. (2017), section 4.1. Otherwise the first hundreds of steps are spent on learning that
    organs are small, which in 3-D, at about 1 % of the voxels, stalls.
    """
    return jnp.zeros(shape, dtype).at[0].set(jnp.log(BACKGROUND / (1 - BACKGROUND) * max(shape[0] - 1, 1)))


class Decoder(nn.Module):
    """Logits, and the features of every level on the way up, finest first; the last is the encoder's output."""

    widths: Sequence[int]
    num_classes: int
    norm: str
    axis_name: str | None
    remat: bool

    @nn.compact
    def __call__(self, levels: list[jax.Array], train: bool) -> tuple[jax.Array, list[jax.Array]]:
        x = levels[-1]
        rank = x.ndim - 2
        features = [x]
        for i, (skip, width) in enumerate(zip(levels[-2::-1], list(self.widths)[-2::-1], strict=True)):
            # A 2 x 2 transposed convolution of stride 2, with a bias for each corner, as a dense layer: faster on CPU.
            up = depth_to_space(nn.Dense(width * 2**rank, dtype=x.dtype, dot_general=dot_by_image)(x), rank)
            block = conv_block(self.remat)(width, self.norm, self.axis_name, name=f"ConvBlock_{i}")
            x = block(jnp.concatenate([skip, up], -1), train)
            features.insert(0, x)
        # In float32: losses and the teacher's confidence hang on small differences of logits.
        return nn.Dense(self.num_classes, bias_init=background_bias, dtype=jnp.float32)(x), features


class Projector(nn.Module):
    """Two-layer perceptron to unit vectors: (..., features) to (..., dim)."""

    dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.dim)(nn.leaky_relu(nn.Dense(self.dim)(x.astype(jnp.float32))))
        # The floor keeps value and gradient finite for a zero vector.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


class UNet(nn.Module):
    """Encoder-decoder with logits at full resolution and pixel features at one chosen depth.

    Attributes:
      num_classes: number of classes, background included.
      widths: channels of each level, finest first.
      feature_level: level whose features are contrasted: 0 is the last decoder layer, `len(widths) - 1` the
        encoder's output.
      projection_dim: length of the unit vectors that `project` returns.
      norm: `group` or `batch`.
      axis_name: device axis for synchronised batch norm.
      dtype: `float32` or `bfloat16`, of what is computed between image and last features. Parameters, statistics of the
        norm, logits and projections are float32 in either case.
      remat: compute again in the backward pass what convolution blocks hold, for less memory.
    """

    num_classes: int
    widths: Sequence[int] = (16, 32, 64, 128, 256)
    feature_level: int = 1
    projection_dim: int = 64
    norm: str = "group"
    axis_name: str | None = None
    dtype: str = "float32"
    remat: bool = False

    def setup(self):
        if not 0 <= self.feature_level < len(self.widths):
            raise ValueError(
                f"contrast.level={self.feature_level}: choose 0 (full resolution) to "
                f"{len(self.widths) - 1} (the encoder's output)."
            )
        self.encoder = Encoder(self.widths, self.norm, self.axis_name, self.remat)
        self.decoder = Decoder(self.widths, self.num_classes, self.norm, self.axis_name, self.remat)
        self.projector = Projector(self.projection_dim)

    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Segments a batch.

        Args:
          images: (batch, *spatial, channels), each spatial size a multiple of `2 ** (len(widths) - 1)`.
          train: use (and update) the batch's own statistics where the norm has any.

        Returns:
          logits (batch, *spatial, num_classes) in float32, and features
          (batch, *spatial / 2**feature_level, widths[feature_level]).
        """
        factor = 2 ** (len(self.widths) - 1)
        if any(n % factor for n in images.shape[1:-1]):
            raise ValueError(
                f"image size {images.shape[1:-1]} is not a multiple of {factor}, as a U-Net of "
                f"{len(self.widths)} levels needs: change data.patch_size or model.widths."
            )
        logits, features = self.decoder(self.encoder(images.astype(self.dtype), train), train)
        if self.is_initializing():
            self.projector(features[self.feature_level])
        return logits, features[self.feature_level]

    def project(self, features: jax.Array) -> jax.Array:
        """Unit-norm projections: (..., widths[feature_level]) to (..., projection_dim)."""
        return self.projector(features)
