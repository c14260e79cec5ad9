"""ACDC cine cardiac MRI: 70 training patients, few of them labelled; 10 val, 20 test.

python -m data_prep.acdc --input=DIR --output=data/acdc --spacing=2
python -m sscl_jax.main --config=configs/acdc.py --workdir=runs/acdc

82 minutes on one core of an AMD EPYC with AVX-512, much other work beside it: mean Dice 89.0 % on val. With the
defaults before it was 88.5 %, supervised 89.0 % in 20 minutes: with 7 labelled patients the others bring nothing, and
with 3 hardly anything, 85.0 % for 84.5 % in 6,000 steps (docs/results.md). With one, see `configs/acdc_cpu.py`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 96 x 96 at 2 mm, 7 labelled patients.

    No flips, since right and left ventricle are not mirror images; but wide rotations, since the short-axis plane lies
    differently in each scan, and the right ventricle anywhere from below the left one to above it.
    """
    config = base.get_config(method)
    config.data.path = "data/acdc"
    config.data.labeled_patients = 7
    config.data.patch_size = (96, 96)
    config.augment.rotate = 60.0
    config.steps = 10000
    config.eval.every = 2500
    config.eval.largest_component = "foreground"
    config.save_every = 250
    return config
