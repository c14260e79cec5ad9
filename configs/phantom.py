"""Short-axis cardiac phantoms that `data_prep.phantom` draws: the whole tool in minutes, with no data of one's own.

python -m data_prep.phantom --output=data/phantom_scans
python -m data_prep.acdc --input=data/phantom_scans --output=data/phantom --spacing=2.5
python -m sscl_jax.main --config=configs/phantom.py --workdir=runs/phantom
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 64 x 64 at 2.5 mm, 2 labelled patients, a narrower network."""
    config = base.get_config(method)
    config.data.path = "data/phantom"
    config.data.labeled_patients = 2
    config.data.patch_size = (64, 64)
    config.model.widths = (16, 32, 64, 128)
    config.steps = 1000
    config.eval.every = 250
    config.save_every = 250
    config.eval.largest_component = True
    config.eval.test = True
    return config
