"""MM-WHS whole hearts, CT or MR, in 3-D: 4 labelled patients, the others of train and the test images without labels.

python -m data_prep.mmwhs --input=DIR --output=data/mmwhs_ct --modality=ct
python -m sscl_jax.main --config=configs/mmwhs.py --workdir=runs/mmwhs_ct

For MR: --modality=mr, and --config.data.path=data/mmwhs_mr. No figures yet: we do not have the scans.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Patches of 96 x 96 x 96 at 1.5 mm, the size of a heart; for a GPU.

    No flips: the heart's left and right sides are different labels.
    """
    config = base.get_config(method)
    config.data.path = "data/mmwhs_ct"
    config.data.labeled_patients = 4
    config.data.patch_size = (96, 96, 96)
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 2
    config.augment.flip = (False, False, False)
    config.steps = 6000
    config.eval.every = 1000
    return config
