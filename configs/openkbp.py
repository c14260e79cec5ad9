"""Head and neck CT of OpenKBP, in 3-D: 5 labelled patients, the others of train without labels.

python -m data_prep.msd --input=DIR --output=data/openkbp
python -m sscl_jax.main --config=configs/openkbp.py --workdir=runs/openkbp

DIR holds scans that you converted to NIfTI (OpenKBP's own files are CSV; there is no command for that here), in the
layout of the Medical Segmentation Decathlon, with a `splits.json`.

71.5 % mean Dice on val, supervised 71.4 % (with a ramp of 600 steps, the default before, 72.0 %, in 43 minutes on one
core of an AMD EPYC with AVX-512). The unlabelled scans brought nothing here that could be told from chance; all 55
labels come to 74.6 % in as many steps. With `anatomical_pl` and without `pseudo_label.competence` the unlabelled
scans did harm: see docs/ablation.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(method: str = "pseudo_label") -> ConfigDict:
    """Patches of 48 x 48 x 48 at 3 x 4.7 x 4.7 mm (144 x 225 x 225 mm, about a head with its neck); sized for a CPU.

    No flips, since the left and the right parotid are different labels. Patches come from nearer the centre than
    elsewhere, since half of a slice is the air around the patient.
    """
    config = base.get_config(method)
    config.data.path = "data/openkbp"
    config.data.labeled_patients = 5
    config.data.patch_size = (48, 48, 48)
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 2
    config.model.widths = (8, 16, 32, 64)
    config.augment.flip = (False, False, False)
    config.augment.spread = 0.8
    config.steps = 2000
    config.eval.every = 500
    config.eval.final_overlap = 0.25
    config.eval.largest_component = "class"  # every organ is in one piece
    config.save_every = 50
    return config
