"""Hippocampus MRI of the Medical Segmentation Decathlon, in 3-D: 4 labelled volumes, the others without.

python -m data_prep.msd --input=Task04_Hippocampus --output=data/hippocampus
python -m sscl_jax.main --config=configs/msd_hippocampus.py --workdir=runs/hippocampus

8 to 9 minutes on one core of an AMD EPYC with AVX-512. With 1 labelled volume 78.3 % mean Dice on test, supervised
75.3 % (means of three draws, docs/results.md). With 3 labelled and 3,000 steps, and the defaults before, 85.7 % on val,
supervised 85.1 %; with all 42 labelled 87.3 % in 1,000 steps (docs/ablation.md).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Patches of 32 x 48 x 32 at 1 mm, nearly the whole of a volume (35 x 50 x 35); sized for a CPU.

    No flips: front and back are different labels.
    """
    config = base.get_config(method)
    config.data.path = "data/hippocampus"
    config.data.labeled_patients = 4
    config.data.patch_size = (32, 48, 32)
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 2
    config.model.widths = (8, 16, 32, 64)
    config.augment.flip = (False, False, False)
    config.steps = 1000
    config.eval.every = 250
    config.save_every = 100
    return config
