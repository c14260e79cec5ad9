"""Weak and strong views of an image, in pure JAX: one geometric warp, then intensity changes.

Every function works on one example of any rank (2-D slice or 3-D patch); callers `jax.vmap` over
the batch with one key per example. All are deterministic in their key and can be jitted.

The *canvas* is the fixed-size array an image is stored in: the image covers `extent` pixels of it,
starts at `floor((shape - extent) / 2)`, and the rest is padding. A warp is a field of coordinates:
for each output pixel its position in the canvas, in pixels, with centres at integers. A pixel
covers half a pixel on each side of its centre, so a canvas axis spans [-0.5, n - 0.5].
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Pixels between the nodes of the elastic field.
ELASTIC_SPACING = 32.0
# Radius of the blur kernel in pixels: 7 taps, which hold 95 % of a Gaussian up to sigma 1.5.
BLUR_RADIUS = 3
# Chance that the strong view gets each of: bias field, blur, noise.
STRONG_PROBABILITY = 0.5
# Intensity ranges below this count as constant.
MIN_RANGE = 1e-6


def random_coordinates(
    key: jax.Array,
    *,
    shape: tuple[int, ...],
    extent: jax.Array,
    patch: tuple[int, ...],
    rotate: float,
    scale: tuple[float, float],
    shear: float,
    elastic: float | tuple[float, ...],
    flip: tuple[bool, ...],
    spread: float,
    focus: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws one random warp: crop, flip, rotation, zoom, shear and elastic in a single field.

    The source position of the output pixel o (counted from the patch centre) is
    `centre + zoom^-1 · R · S · F · o + u(o)`: F flips, S shears and R rotates in the plane of the
    last two axes, u is a smooth random field. With all strengths zero and `spread=0` it is exactly
    the centred crop (an image that lacks an odd number of pixels has one more of the padding before it than behind it);
    with `spread` alone it is a crop at whole pixels (no interpolation blur).

    Args:
      key: random key.
      shape: spatial shape of the canvas.
      extent: (rank,) size of the image in the canvas, in pixels.
      patch: spatial shape of the output.
      rotate: largest angle, degrees; uniform in [-rotate, rotate].
      scale: (low, high) zoom, both > 0, the same for all axes, log-uniform; above 1 magnifies.
      shear: largest shear (tangent of the angle); uniform in [-shear, shear].
      elastic: standard deviation of the displacement in pixels, one number or one for each axis.
        The field is a cubic B-spline with a node every 32 pixels.
      flip: for each axis, whether to flip it with probability 0.5.
      spread: in [0, 1]; the patch centre is that of the image plus, for each axis, a normal
        (sd 0.5, truncated to [-1, 1]) times `spread * max(0, extent - patch) / 2`.
      focus: pixel (rank,) of the canvas that becomes the patch centre, and whether it does, () bool; as far as the
        patch does not leave the image for it. See `random_foreground`.

    Returns:
      (*patch, rank) float32 coordinates in the canvas.

    Raises:
      ValueError: when `shape`, `patch` and `flip` differ in length.
    """
    rank = len(patch)
    if not len(shape) == len(flip) == rank:
        raise ValueError(f"shape {shape}, patch {patch} and flip {flip} must have one entry for each axis")
    key_scalars, key_shift, key_field = jax.random.split(key, 3)
    size = jnp.asarray(patch, jnp.float32)
    extent = jnp.asarray(extent, jnp.float32)

    shift = 0.5 * jax.random.truncated_normal(key_shift, -2.0, 2.0, (rank,))
    lead, room = _lead(shape, extent), jnp.maximum(extent - size, 0.0)
    shift = shift * spread * room / 2.0
    start = jnp.floor(lead + (extent - size) / 2.0 + shift)
    if focus is not None:
        pixel, wanted = focus
        focused = jnp.where(room > 0, jnp.clip(pixel - jnp.floor(size / 2.0), lead, lead + room), start)
        start = jnp.where(wanted, focused, start)
    centre = start + (size - 1.0) / 2.0

    # One draw for all scalars: each call of the generator costs some 0.3 s of compilation on a CPU.
    uniform = jax.random.uniform(key_scalars, (3 + rank,))
    angle = jnp.deg2rad(_between(uniform[0], -rotate, rotate))
    zoom = jnp.exp(_between(uniform[1], jnp.log(scale[0]), jnp.log(scale[1])))
    tangent = _between(uniform[2], -shear, shear)
    flipped = (uniform[3:] < 0.5) & jnp.asarray(flip)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # R · S for the last two axes: [[cos, -sin], [sin, cos]] · [[1, tangent], [0, 1]].
    matrix = jnp.eye(rank)
    if rank > 1:
        plane = jnp.array([[cos, cos * tangent - sin], [sin, sin * tangent + cos]])
        matrix = matrix.at[-2:, -2:].set(plane)
    matrix = matrix / zoom * jnp.where(flipped, -1.0, 1.0)

    # Sums of broadcast products and not a matmul, which some devices round to TF32 or bfloat16.
    offsets = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2 for n in patch), indexing="ij", sparse=True)
    moved = [sum(matrix[a, b] * offsets[b] for b in range(rank)) + centre[a] for a in range(rank)]
    bend = _smooth_field(key_field, patch, (ELASTIC_SPACING,) * rank, rank)
    return jnp.stack(moved, axis=-1) + bend * jnp.asarray(elastic, jnp.float32)


def random_foreground(
    key: jax.Array, label: jax.Array, num_classes: int, probability: float
) -> tuple[jax.Array, jax.Array]:
    """Draws a pixel of a labelled structure: its class evenly among those there are, then a pixel of it evenly.

    A small organ is so seen as often as a large one, as nnU-Net does (Isensee et al., 2021).

    Args:
      key: random key.
      label: (*shape) of an integer type, 0 is background.
      num_classes: number of classes, background included.
      probability: of drawing at all.

    Returns:
      pixel (rank,) int32, and whether it counts, () bool: False with 1 - `probability`, and where all is background.
    """
    shape = label.shape
    key_chosen, key_class, key_row, key_pixel = jax.random.split(key, 4)
    rows = jnp.asarray(label).reshape(shape[0], -1)
    # Pixels of each class in each row first, so that random numbers are needed for one row and not for a volume.
    counts = jnp.stack([jnp.sum(rows == c, axis=1) for c in range(1, num_classes)])
    present = jnp.any(counts > 0, axis=1)
    chosen = jax.random.categorical(key_class, jnp.where(present, 0.0, -jnp.inf))
    row = jax.random.categorical(key_row, jnp.log(counts[chosen].astype(jnp.float32)))
    scores = jax.random.uniform(key_pixel, (rows.shape[1],))
    column = jnp.argmax(jnp.where(rows[row] == chosen + 1, scores, -1.0))
    pixel = jnp.stack([row, *jnp.unravel_index(column, shape[1:])])
    wanted = jnp.any(present) & jax.random.bernoulli(key_chosen, probability)
    return pixel.astype(jnp.int32), wanted


def resample(image: jax.Array, coords: jax.Array, fill: float | jax.Array) -> jax.Array:
    """Samples an image at coordinates by linear interpolation.

    Args:
      image: (*shape, C).
      coords: (*patch, rank) positions in pixels; see `random_coordinates`.
      fill: value outside the canvas, or (C,) one for each channel. Outside is more than half a pixel beyond the
        outermost centres (within that half pixel the edge value holds, as it does for labels).

    Returns:
      (*patch, C) in the dtype of `image`, or float32 where that is an integer type.
    """
    shape = image.shape[:-1]
    limit, zero = jnp.asarray(shape, jnp.float32) - 1.0, jnp.zeros(())
    clipped = jnp.clip(coords, 0.0, limit)
    low = jnp.floor(clipped)
    weight = clipped - low
    low = low.astype(jnp.int32)
    pixels = jnp.asarray(image).reshape(-1, image.shape[-1])
    strides = _strides(shape)

    lower = [low[..., a] * strides[a] for a in range(len(shape))]
    upper = [jnp.minimum(low[..., a] + 1, shape[a] - 1) * strides[a] for a in range(len(shape))]
    total = jnp.zeros((), jnp.float32)
    for corner in itertools.product((0, 1), repeat=len(shape)):
        index, share = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
        for axis, bit in enumerate(corner):
            index = index + (upper[axis] if bit else lower[axis])
            share = share * (weight[..., axis] if bit else 1.0 - weight[..., axis])
        # The indices were clipped above, so the gather need not check them again.
        value = pixels.at[index].get(mode="promise_in_bounds")
        total = total + share[..., None] * value
    return jnp.where(_within(coords, zero, limit)[..., None], total, fill).astype(total.dtype)


def resample_labels(labels: jax.Array, coords: jax.Array) -> jax.Array:
    """Samples labels at coordinates: the nearest pixel, 0 outside the canvas.

    Args:
      labels: (*shape) of an integer type.
      coords: (*patch, rank) positions in pixels; see `random_coordinates`.

    Returns:
      (*patch) in the dtype of `labels`.
    """
    limit, zero = jnp.asarray(labels.shape, jnp.float32) - 1.0, jnp.zeros(())
    nearest = jnp.floor(jnp.clip(coords, 0.0, limit) + 0.5).astype(jnp.int32)
    strides = _strides(labels.shape)
    index = sum(nearest[..., a] * strides[a] for a in range(labels.ndim))
    value = jnp.asarray(labels).reshape(-1).at[index].get(mode="promise_in_bounds")
    return jnp.where(_within(coords, zero, limit), value, 0).astype(labels.dtype)


def normalised_position(coords: jax.Array, shape: tuple[int, ...], extent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where coordinates lie in the image: 0 at its first edge, 1 at its last, for each axis.

    Args:
      coords: (*patch, rank) positions in the canvas, pixels.
      shape: spatial shape of the canvas.
      extent: (rank,) size of the image in the canvas, pixels.

    Returns:
      position: (*patch, rank) float32 in [0, 1], clipped outside the image.
      inside: (*patch) bool, true in the image and false in padding or outside the canvas.
    """
    extent = jnp.asarray(extent, jnp.float32)
    lead = _lead(shape, extent)
    position = jnp.clip((coords - lead + 0.5) / extent, 0.0, 1.0)
    return position, _within(coords, lead, lead + extent - 1.0)


def weak_intensity(key: jax.Array, image: jax.Array, *, contrast: float, brightness: float, gamma: float) -> jax.Array:
    """Mild intensity changes, drawn for each channel; the identity when all strengths are 0.

    Args:
      key: random key.
      image: (*patch, C) float, z-scored.
      contrast: c >= 0; distances from the mean are multiplied by a log-uniform in [1/(1+c), 1+c].
      brightness: standard deviation of the added constant.
      gamma: g >= 0; intensities, rescaled to [0, 1] by their minimum and maximum, are raised to a
        log-uniform power in [1/(1+g), 1+g] and scaled back.

    Returns:
      (*patch, C) float, finite for finite input, also where the image is constant.
    """
    key_uniform, key_normal = jax.random.split(key)
    channels = image.shape[-1]
    spatial = tuple(range(image.ndim - 1))
    uniform = jax.random.uniform(key_uniform, (2 * channels,))
    factor = _around_one(uniform[:channels], contrast)
    power = _around_one(uniform[channels:], gamma)
    offset = brightness * jax.random.normal(key_normal, (channels,))

    low = jnp.min(image, spatial)
    span = jnp.maximum(jnp.max(image, spatial) - low, MIN_RANGE)
    mean = jnp.mean(image, spatial)
    curved = low + span * ((image - low) / span) ** power
    return (curved - mean) * factor + mean + offset


def strong_intensity(
    key: jax.Array,
    image: jax.Array,
    *,
    contrast: float,
    brightness: float,
    gamma: float,
    bias: float,
    noise: float,
    blur: float,
) -> jax.Array:
    """Strong intensity changes: `weak_intensity`, then bias field, blur and noise.

    Contrast, brightness and gamma are always drawn; bias field, blur and noise are applied with
    probability 0.5 each, independently. The identity when all strengths are 0.

    Args:
      key: random key.
      image: (*patch, C) float, z-scored.
      contrast: see `weak_intensity`.
      brightness: see `weak_intensity`.
      gamma: see `weak_intensity`.
      bias: standard deviation of the logarithm of a smooth field, common to all channels, that
        multiplies the intensities above the minimum (so that an empty background stays as it is).
      noise: largest standard deviation of Gaussian noise, in standard deviations of the image;
        uniform in [0, noise].
      blur: largest sigma of a Gaussian blur over all axes, pixels, uniform in [0, blur]. The kernel
        has 7 taps, so above 1.5 it is narrower than its sigma says. The edge is replicated.

    Returns:
      (*patch, C) float, finite for finite input, also where the image is constant.
    """
    key_weak, key_uniform, key_field, key_noise = jax.random.split(key, 4)
    patch, spatial = image.shape[:-1], tuple(range(image.ndim - 1))
    uniform = jax.random.uniform(key_uniform, (5,))
    # A change not applied is one of strength 0: under vmap a branch would compute both sides.
    applied = (uniform[:3] < STRONG_PROBABILITY).astype(jnp.float32)

    image = weak_intensity(key_weak, image, contrast=contrast, brightness=brightness, gamma=gamma)
    low = jnp.min(image, spatial)
    field = _smooth_field(key_field, patch, tuple(max(n / 2.0, 1.0) for n in patch), 1)
    image = low + (image - low) * jnp.exp(applied[0] * bias * field)

    image = gaussian_blur(image, applied[1] * blur * uniform[3])

    level = applied[2] * noise * uniform[4] * jnp.std(image, spatial)
    return image + level * _normal(key_noise, image.shape)


def gaussian_blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blurs (*patch, C) over its spatial axes by 7 taps; `sigma` in pixels, 0 is the identity."""
    taps = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = jnp.exp(-0.5 * (taps / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = weights / jnp.sum(weights)
    for axis in range(image.ndim - 1):
        size = image.shape[axis]
        margin = [(BLUR_RADIUS, BLUR_RADIUS) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = jnp.pad(image, margin, mode="edge")
        shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(taps)))
        image = functools.reduce(jnp.add, (w * s for w, s in zip(weights, shifted, strict=True)))
    return image


def cutmix_mask(key: jax.Array, patch: tuple[int, ...], area: tuple[float, float]) -> jax.Array:
    """Draws a random box, for CutMix (Yun et al., arXiv 1905.04899).

    Args:
      key: random key.
      patch: spatial shape.
      area: (low, high) in [0, 1]; the fraction of the patch in the box is uniform between them
        (up to the rounding of the sides to whole pixels).

    Returns:
      (*patch) bool, true in the box, which lies inside the patch. Its sides, as fractions of those
      of the patch, have ratios in [1/2, 2].
    """
    rank = len(patch)
    uniform = jax.random.uniform(key, (1 + 2 * rank,))
    side = _between(uniform[0], *area) ** (1.0 / rank)
    stretch = math.log(2.0) * (uniform[1 : 1 + rank] - 0.5)
    stretch = stretch - jnp.mean(stretch)
    # A large box is stretched less, so that no side exceeds the patch and the area is as drawn.
    room = -jnp.log(side) / jnp.maximum(jnp.max(stretch), 1e-6)
    sides = side * jnp.exp(stretch * jnp.clip(room, 0.0, 1.0))
    size = jnp.asarray(patch, jnp.float32)
    sides = jnp.minimum(jnp.round(sides * size), size)
    starts = jnp.floor(uniform[1 + rank :] * (size - sides + 1.0))
    starts = jnp.minimum(starts, size - sides)

    mask = jnp.ones(patch, bool)
    for axis, n in enumerate(patch):
        line = jnp.arange(n, dtype=jnp.float32)
        covered = (line >= starts[axis]) & (line < starts[axis] + sides[axis])
        mask = mask & covered.reshape([-1 if a == axis else 1 for a in range(rank)])
    return mask


def _lead(shape: tuple[int, ...], extent: jax.Array) -> jax.Array:
    """(rank,) first pixel of the image in the canvas."""
    return jnp.floor((jnp.asarray(shape, jnp.float32) - extent) / 2.0)


def _within(coords: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """(*patch) whether coordinates lie on the pixels `first` to `last`."""
    return jnp.all((coords >= first - 0.5) & (coords < last + 0.5), axis=-1)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Distance between neighbours along each axis of an array in C order, in items."""
    return [math.prod(shape[a + 1 :]) for a in range(len(shape))]


def _between(uniform: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """Takes uniform numbers in [0, 1) to [low, high]."""
    return low + uniform * (high - low)


def _around_one(uniform: jax.Array, strength: float) -> jax.Array:
    """Takes uniform numbers in [0, 1) to log-uniform ones in [1/(1+strength), 1+strength]."""
    return jnp.exp((2.0 * uniform - 1.0) * jnp.log1p(strength))


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers, drawn flat: XLA compiles that many times faster than the shape."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def _smooth_field(key: jax.Array, patch: tuple[int, ...], spacing: tuple[float, ...], channels: int) -> jax.Array:
    """(*patch, channels) Gaussian field of mean 0 and sd 1: a cubic B-spline of independent nodes.

    `spacing` is the distance between nodes in pixels, for each axis. The matrices that take nodes
    to pixels are constants, so that the field costs a few small matmuls.
    """
    bases = [_spline_basis(n, step) for n, step in zip(patch, spacing, strict=True)]
    field = _normal(key, (channels, *(basis.shape[1] for basis in bases)))
    for basis in bases:
        # Contracts the first spatial axis and puts it last: after all turns they are in order.
        field = jnp.tensordot(field, basis, axes=((1,), (1,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(field, 0, -1)


def _spline_basis(size: int, spacing: float) -> np.ndarray:
    """(size, nodes) cubic B-spline weights, of unit norm for each pixel to keep variance 1."""
    nodes = math.ceil((size - 1) / spacing) + 3
    distance = np.abs(np.arange(size)[:, None] / spacing - (np.arange(nodes)[None] - 1))
    weights = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
