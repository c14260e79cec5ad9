"""Every field of a training, once, with its unit. The other configs change only what differs.

A method is a config: `get_config("anatomical")` is this file with the weights of one row of `METHODS`. On the command
line the method stands behind a colon:

    python -m sscl_jax.main --config=configs/acdc.py:supervised --workdir=runs/acdc_supervised

The paper (Xiang et al., arXiv 2105.12924) is known to us by its abstract; every number here is our choice.
"""

from ml_collections import ConfigDict

REGION = {
    "contrast.weight": 0.1,
    "contrast.sampler": "region",
    "contrast.num_queries": 8,
    "contrast.num_keys": 8,
}

# What each method switches on; fields as in `get_config`. 8 pixels of each of 16 cells are as many as 32 of 4 classes.
# Beside pseudo-labels an anatomical contrast of 0.1 did a little worse than none, and 0.03 did not (docs/ablation.md).
METHODS: dict[str, dict] = {
    "supervised": {},
    "mean_teacher": {"consistency.weight": 1.0},
    "region": REGION,
    "anatomical": {"contrast.weight": 0.1, "contrast.sampler": "anatomical"},
    "pseudo_label": {"pseudo_label.weight": 1.0},
    "region_pl": REGION | {"pseudo_label.weight": 1.0},
    "anatomical_pl": {
        "contrast.weight": 0.03,
        "contrast.sampler": "anatomical",
        "pseudo_label.weight": 1.0,
    },
}


def get_config(method: str = "anatomical_pl") -> ConfigDict:
    """The defaults, with the terms of one method switched on."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}.")
    config = ConfigDict()
    config.method = method  # name of the method, for tables
    config.seed = 0  # of initial weights, sample order, views and drawn pixels
    config.steps = 3000  # optimiser steps
    config.ramp = 1.0  # share of the steps over which the weights of the unlabelled terms rise (sigmoid); 0: none

    config.data = ConfigDict()
    config.data.path = ""  # folder that a data_prep command wrote
    config.data.labeled_patients = 7  # training patients whose labels are used; -1 = all who have one
    config.data.labeled_fraction = 0.0  # above 0: this share of the training patients instead, rounded down, at least 1
    config.data.labeled_seed = -1  # -1: the first of the split's list; >= 0: drawn with this seed
    config.data.patch_size = (128, 128)  # pixels, (H, W) or (D, H, W)
    config.data.labeled_batch = 4  # labelled images in a step, over all devices
    config.data.unlabeled_batch = 4  # unlabelled images in a step, over all devices
    config.data.device_memory = 2.0  # GiB of each device for training images; more than that stay on disk

    config.model = ConfigDict()
    config.model.widths = (16, 32, 64, 128, 256)  # channels of each level, finest first
    config.model.norm = "group"  # group | batch (synchronised over devices)
    config.model.projection_dim = 64  # length of the contrasted vectors
    config.model.dtype = "float32"  # float32 | bfloat16, of convolutions; parameters and losses stay float32
    config.model.remat = False  # compute again in the backward pass instead of keeping: less memory, more time

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3  # peak, AdamW
    config.optimizer.warmup_steps = 100  # linear from 0; then cosine to 0
    config.optimizer.weight_decay = 1e-4  # of AdamW
    config.optimizer.clip_norm = 1.0  # greatest global norm of the gradient

    config.teacher = ConfigDict()
    config.teacher.decay = 0.99  # of the moving average, reached by min(decay, 1 - 1 / (t + 1))
    config.teacher.scope = "network"  # network | encoder (the rest is copied from the student)

    config.contrast = ConfigDict()
    config.contrast.weight = 0.0  # final weight of the term; 0 = off
    config.contrast.sampler = "anatomical"  # anatomical | region | both (the mean of the two losses)
    config.contrast.level = 1  # U-Net level contrasted: 0 full resolution ... last: encoder output
    config.contrast.temperature = 0.1  # of InfoNCE; lower: more weight on the hardest negatives
    config.contrast.num_queries = 32  # student's pixels for each image and class (or cell)
    config.contrast.num_keys = 32  # teacher's pixels for each image and class (or cell)
    config.contrast.threshold = 0.9  # least confidence of a pixel's class (anatomical)
    config.contrast.positives = "pixels"  # pixels | means (anatomical)
    config.contrast.cells = 4  # R of the R x R grid (region)
    config.contrast.partitions = 4  # S parts of a volume (region)
    config.contrast.labeled = False  # True: labelled images give queries and keys too, not only in CutMix's boxes

    config.consistency = ConfigDict()
    config.consistency.weight = 0.0  # final weight of the term; 0 = off

    config.pseudo_label = ConfigDict()
    config.pseudo_label.weight = 0.0  # final weight of the term; 0 = off
    config.pseudo_label.threshold = 0.9  # least confidence of a pseudo-label
    config.pseudo_label.competence = True  # weight times the least soft Dice of a class on the labels

    config.augment = ConfigDict()
    config.augment.rotate = 20.0  # degrees, either way
    config.augment.scale = (0.8, 1.25)  # zoom
    config.augment.shear = 0.1  # tangent of the angle, either way
    config.augment.elastic = 3.0  # pixels, standard deviation
    config.augment.flip = (False, False)  # axes along which anatomy may be mirrored
    config.augment.spread = 1.0  # 0: patches from the centre; 1: from the whole image
    config.augment.foreground = 1 / 3  # share of the labelled patches centred on a pixel of a class, drawn evenly
    config.augment.weak_contrast = 0.1  # weak view (teacher): factor within 1 / (1 + c) ... 1 + c
    config.augment.weak_brightness = 0.1  # deviation of an added constant; 1 is the body's (mr), half the window (ct)
    config.augment.weak_gamma = 0.1  # exponent within 1 / (1 + g) ... 1 + g
    config.augment.contrast = 0.5  # strong view (student), as weak_contrast
    config.augment.brightness = 0.3  # as weak_brightness
    config.augment.gamma = 0.5  # as weak_gamma
    config.augment.bias = 0.3  # standard deviation of the log of a smooth field
    config.augment.noise = 0.2  # greatest standard deviation, of the image's own
    config.augment.blur = 1.5  # greatest sigma, pixels
    config.augment.cutmix_probability = 1.0  # for each unlabelled image, of getting a box of another image
    config.augment.cutmix_labeled = 0.5  # probability that this is a labelled image, and not an unlabelled one
    config.augment.cutmix_area = (0.1, 0.5)  # share of the patch

    config.eval = ConfigDict()
    config.eval.every = 500  # steps between evaluations on val
    config.eval.overlap = 0.1  # of neighbouring windows during training
    config.eval.final_overlap = 0.5  # of neighbouring windows in the final tables
    config.eval.select = "teacher"  # whom val measures during training, to decide which checkpoint is best
    config.eval.largest_component = "none"  # none | class (keep its largest part) | foreground (then of each class too)
    config.eval.test = False  # measure the test split at the end

    config.log_every = 50  # steps between rows of metrics.csv
    config.save_every = 500  # steps between checkpoints

    config.update_from_flattened_dict(METHODS[method])
    return config.lock()
