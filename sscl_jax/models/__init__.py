"""The encoder-decoder network and its projection head."""

from sscl_jax.models.unet import UNet

__all__ = ["UNet"]
