"""ACDC in a size for a CPU: coarser slices, of which more steps can be made in less time; one labelled patient of 70.

python -m data_prep.acdc --input=DIR --output=data/acdc_3mm --spacing=3
python -m sscl_jax.main --config=configs/acdc_cpu.py --workdir=runs/acdc_1

25 minutes on one core of an AMD EPYC with AVX-512, other work beside it: mean Dice 77.6 % on val; with a ramp of 500
steps, the default before, 82.2 %; supervised 71.0 %. On held-out patients, over three draws: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import acdc


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Slices of 64 x 64 at 3 mm, otherwise `configs/acdc.py`."""
    config = acdc.get_config(method)
    config.data.path = "data/acdc_3mm"
    config.data.labeled_patients = 1
    config.data.patch_size = (64, 64)
    config.steps = 6000
    config.eval.every = 2000
    return config
