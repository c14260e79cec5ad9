"""Left atrium 2018 in a size for a CPU: 12 of its volumes suffice, 1 of 8 labelled; coarser voxels, a smaller network.

python -m data_prep.la2018 --input=DIR --output=data/la_1.25mm --spacing=1.25
python -m sscl_jax.main --config=configs/la_cpu.py --workdir=runs/la

20 minutes on one core of an AMD EPYC with AVX-512: Dice 85.6 % on val; supervised, 6 minutes, 83.0 %. With 2 labelled
the other volumes cost a little (87.2 for 87.9 %), all 8 labelled come to 89.4 % (docs/ablation.md).
"""

from ml_collections import ConfigDict

from configs import la


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """Blocks of 32 x 64 x 64 voxels at 1.25 mm (40 x 80 x 80 mm, most of a volume), otherwise `configs/la.py`."""
    config = la.get_config(method)
    config.data.path = "data/la_1.25mm"
    config.data.labeled_patients = 1
    config.data.patch_size = (32, 64, 64)
    config.data.labeled_batch = 1
    config.data.unlabeled_batch = 2
    config.model.widths = (8, 16, 32, 64)
    config.steps = 1200
    config.eval.every = 600
    config.save_every = 100
    return config
