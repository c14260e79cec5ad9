"""Synapse / BTCV abdominal CT, eight organs, in 2-D: 3 labelled patients, the others of train without labels.

python -m data_prep.synapse --input=RawData --output=data/synapse --eight
python -m sscl_jax.main --config=configs/synapse.py --workdir=runs/synapse

Slices are 2.5 to 5 mm thick, hence 2-D. No figures yet: we do not have the scans.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 224 x 224 at 1.5 mm; for a GPU.

    No flips, since left and right kidney are different labels, and the liver is on the right.
    """
    config = base.get_config(method)
    config.data.path = "data/synapse"
    config.data.labeled_patients = 3
    config.data.patch_size = (224, 224)
    config.data.labeled_batch = 8
    config.data.unlabeled_batch = 8
    config.steps = 10000
    config.eval.every = 2000
    return config
