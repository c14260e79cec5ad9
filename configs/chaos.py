"""CHAOS, abdominal MR (T2-SPIR): liver, kidneys and spleen; about 12 training patients with masks, 4 val, 4 test.

python -m data_prep.chaos --input=DIR --modality=t2 --output=data/chaos_t2
python -m sscl_jax.main --config=configs/chaos.py --workdir=runs/chaos_t2

For CT or T1, prepare with --modality=ct or t1 and add --config.data.path=data/chaos_ct or data/chaos_t1. No figures:
we do not have the scans.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 160 x 160 at 1.5 mm, 3 labelled patients.

    No flips: the right kidney and the left one are different classes.
    """
    config = base.get_config(method)
    config.data.path = "data/chaos_t2"
    config.data.labeled_patients = 3
    config.data.patch_size = (160, 160)
    return config
