"""2018 Atrial Segmentation Challenge, left atrium in late-gadolinium MRI: 76 training patients, 4 val, 20 test.

python -m data_prep.la2018 --input=DIR --output=data/la
python -m sscl_jax.main --config=configs/la.py --workdir=runs/la

For a GPU; no figures yet. `configs/la_cpu.py` is a smaller one for a CPU.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Blocks of 80 x 112 x 112 voxels at 0.625 mm (slices, rows, columns), 8 labelled patients.

    That is the size of block, the batch and the labelled patients of the papers on this set. No flips: the atrium's
    veins and appendage tell left from right.
    """
    config = base.get_config(method)
    config.data.path = "data/la"
    config.data.labeled_patients = 8
    config.data.patch_size = (80, 112, 112)
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 2
    config.augment.flip = (False, False, False)
    config.steps = 6000
    config.eval.every = 1000
    config.eval.largest_component = "foreground"
    return config
