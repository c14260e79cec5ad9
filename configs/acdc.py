"""ACDC cine cardiac MRI: 70 training patients, few of them labelled; 10 val, 20 test.

python -m data_prep.acdc --input=DIR --output=data/acdc --spacing=2
python -m sscl_jax.main --config=configs/acdc.py --workdir=runs/acdc
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 96 x 96 at 2 mm, 7 labelled patients. No flips: right and left ventricle are not mirror images."""
    config = base.get_config(method)
    config.data.path = "data/acdc"
    config.data.labeled_patients = 7
    config.data.patch_size = (96, 96)
    config.steps = 3000
    config.eval.every = 750
    config.eval.largest_component = True
    config.save_every = 250
    return config
