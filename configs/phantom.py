"""Short-axis cardiac phantoms that `data_prep.phantom` draws: the whole tool in minutes, with no data of one's own.

python -m data_prep.phantom --output=data/phantom_scans
python -m data_prep.acdc --input=data/phantom_scans --output=data/phantom --spacing=3
python -m sscl_jax.main --config=configs/phantom.py --workdir=runs/phantom
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 48 x 48 at 3 mm, 2 labelled patients, a narrower network; three slices without label for each with one.

    A short ramp, since on phantoms one over the whole training did worse (docs/ablation.md); wide rotations, as in
    `configs/acdc.py`.
    """
    config = base.get_config(method)
    config.data.path = "data/phantom"
    config.data.labeled_patients = 2
    config.data.patch_size = (48, 48)
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 6
    config.model.widths = (16, 32, 64, 128)
    config.augment.rotate = 60.0
    config.steps = 1500
    config.ramp = 0.2
    config.eval.every = 500
    config.eval.largest_component = "foreground"
    config.eval.test = True
    config.save_every = 250
    return config
