"""The training step against the same step written in PyTorch.

    pip install -e '.[bench]'
    python benchmarks/torch_step.py [--images=4+4] [--size=128] [--check]

The PyTorch side shares nothing with `sscl_jax` but the config: same network, views, losses, optimiser and teacher, in
two forms. *eager* is what one finds in the field: NCHW, float32, one module after the other. *compiled* is the
strongest we know: channels last, torch.compile, fused AdamW, and bfloat16 autocast on a GPU (not on a CPU, where the
JAX step is float32 too). All sides take turns in one process, on as many threads as this process may use, so
that a machine that slows down slows all of them. `--check` compares losses, gradients and updates instead of times.
"""

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from ml_collections import ConfigDict
from torch import Tensor, nn

from configs import base
from sscl_jax import experiment, parallel

CLASSES = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDES = ("jax", "torch, eager", "torch, compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="4+4", help="labelled + unlabelled images of a step")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a view")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled form, whose first step takes long")
    parser.add_argument(
        "--processor", action="store_true", help="processor time, for a busy machine (on one core of it)"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, each side in a process of its own")
    parser.add_argument("--check", action="store_true", help="compare results, not times")
    args = parser.parse_args()
    if args.check:
        check()
        return
    sizes = (*map(int, args.images.split("+")), args.size)
    config = make_config(*sizes)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as peers have it

    sides, memory = SIDES[:2] if args.eager else SIDES, {}
    for side in sides if args.memory else ():  # while this process is small
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory[side] = process.submit(peak_memory, side, sizes, threads).result()
    steps = {side: make_side(side, config) for side in sides}
    clock = time.process_time if args.processor else time.perf_counter
    first = {side: seconds(clock, step) for side, step in steps.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, step in steps.items():
            times[side].append(seconds(clock, step))

    device = jax.devices()[0].device_kind
    print(f"{args.images} images of {args.size} x {args.size}, {CLASSES} classes, {device}, ", end="")
    print(f"{threads} threads, jax {jax.__version__}, torch {torch.__version__}, {args.repeats} rounds")
    print(f"{'':16}{'median':>9}{'least':>9}{'most':>9}{'first call':>12}{'memory':>10}   time to that of jax")
    for side in sides:
        ratios = [a / b for a, b in zip(times[side], times["jax"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        numbers = (statistics.median(times[side]), min(times[side]), max(times[side]))
        print(f"{side:16}" + "".join(f"{1e3 * n:6.0f} ms" for n in numbers), end="")
        print(f"{first[side]:10.1f} s" + (f"{memory[side]:6.2f} GiB" if memory else f"{'':10}"), end="")
        print(f"   {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


def make_config(labeled: int, unlabeled: int, size: int) -> ConfigDict:
    """The default method, at its defaults but for the sizes."""
    config = base.get_config().copy_and_resolve_references()
    config.data.labeled_batch, config.data.unlabeled_batch = labeled, unlabeled
    config.data.patch_size = (size, size)
    config.augment.foreground = 0.0  # an image is as large as a view, so there is nothing to choose
    return config


def make_batch(config: ConfigDict) -> dict[str, dict[str, np.ndarray]]:
    """Noise with discs of the classes 1, 2 and 3 in one another, as the step takes them."""
    random = np.random.RandomState(0)
    size = config.data.patch_size
    rows, columns = np.ogrid[: size[0], : size[1]]

    def part(count):
        centres = random.uniform(0.3, 0.7, (2, count, 1, 1)) * size[0]
        radius = np.hypot(rows - centres[0], columns - centres[1]) / size[0]
        label = np.select([radius < 0.08, radius < 0.14, radius < 0.25], [3, 2, 1], 0).astype(np.uint8)
        image = (label + 0.5 * random.randn(*label.shape))[..., None].astype(np.float32)
        extent = np.tile(np.float32(size), (count, 1))
        return {"image": image, "label": label, "extent": extent, "depth": np.tile(np.float32([0, 1]), (count, 1))}

    labeled, unlabeled = part(config.data.labeled_batch), part(config.data.unlabeled_batch)
    del unlabeled["label"]
    return {"labeled": labeled, "unlabeled": unlabeled}


def make_side(side: str, config: ConfigDict) -> Callable[[], Any]:
    """A function that takes one step and waits for it."""
    batch = make_batch(config)
    if side == "jax":
        step, batch = experiment.make_step(config, CLASSES), parallel.shard(batch)
        state = parallel.replicate(experiment.make_state(config, CLASSES, channels=1))

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            return jax.block_until_ready((state, metrics))[1]

        return run

    torch_step = TorchStep(config, compiled=side == "torch, compiled")

    def run_torch():
        tensors = torch_batch(batch)
        metrics = torch_step(*tensors)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return metrics

    return run_torch


def seconds(clock: Callable[[], float], function: Callable[[], Any]) -> float:
    start = clock()
    function()
    return clock() - start


def peak_memory(side: str, sizes: tuple[int, int, int], threads: int) -> float:
    """GiB that three steps take beyond what the libraries do; of the device, where it tells."""
    torch.set_num_threads(threads)
    before = parallel.peak_memory()
    step = make_side(side, make_config(*sizes))
    for _ in range(3):
        step()
    if side != "jax" and DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    stats = jax.local_devices()[0].memory_stats() if side == "jax" else None
    return stats["peak_bytes_in_use"] / 2**30 if stats else parallel.peak_memory() - before


# The same step in PyTorch.


class Block(nn.Sequential):
    """Two convolutions, each with group norm and a leaky ReLU."""

    def __init__(self, before: int, width: int):
        groups = max(n for n in range(1, 9) if width % n == 0)
        super().__init__(*(
            layer
            for channels in (before, width)
            for layer in (
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.GroupNorm(groups, width, eps=1e-6),
                nn.LeakyReLU(0.01, inplace=True),
            )
        ))  # fmt: skip


class TorchUNet(nn.Module):
    """U-Net with a projector, as peers write it: (batch, 1, rows, columns) to logits and the features of one level."""

    def __init__(self, widths: tuple[int, ...], level: int, dim: int):
        super().__init__()
        self.level = level
        pairs = list(zip(widths, widths[1:], strict=False))[::-1]
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.merge = nn.ModuleList(Block(2 * fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(widths[0], CLASSES, 1)
        self.projector = nn.Sequential(nn.Linear(widths[level], dim), nn.LeakyReLU(0.01), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        features = [x]
        for up, merge, skip in zip(self.up, self.merge, levels[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
            features.insert(0, x)
        return self.head(x).float(), features[self.level].float()

    def project(self, features: Tensor, index: Tensor) -> Tensor:
        """Unit vectors of the pixels `index` (batch, n): (batch, channels, ...) to (batch * n, dim)."""
        flat = features.flatten(2).transpose(1, 2)
        taken = flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))
        return F.normalize(self.projector(taken.flatten(0, 1)), dim=-1)


def segmentation_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and soft Dice over the batch, of background and the classes that it holds."""
    ce = (F.cross_entropy(logits, labels, reduction="none") * weight).mean()
    reference = F.one_hot(labels, CLASSES).movedim(-1, 1)
    probs, weight = logits.softmax(1), weight[:, None]
    overlap = (weight * probs * reference).sum((0, 2, 3))
    total = (weight * (probs + reference)).sum((0, 2, 3))
    held = (weight * reference).sum((0, 2, 3)) > 0
    held[0] = True
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return ce, (dice * held).sum() / held.sum()


def draw(probs: Tensor, inside: Tensor, level: int, count: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `count` confident pixels of each class of each image: index (batch, n), class and validity (batch * n)."""
    confidence, anatomy = F.avg_pool2d(probs, 2**level).flatten(2).max(1)
    middle = slice(2**level // 2, None, 2**level)
    eligible = (confidence >= threshold) & inside[:, middle, middle].flatten(1)
    classes = torch.arange(CLASSES, device=probs.device)
    member = eligible[:, None] & (anatomy[:, None] == classes[:, None])
    score = torch.where(member, torch.rand_like(confidence)[:, None], -1.0)
    best, index = score.topk(min(count, score.shape[-1]), dim=2)
    drawn = classes[:, None].expand_as(best)
    return index.flatten(1), drawn.flatten(), best.flatten() >= 0


def info_nce(queries: Tensor, keys: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Mean over the queries that have both; each positive competes with the negatives alone."""
    scores = queries @ keys.T / temperature
    log_negatives = scores.masked_fill(~negative, -1e30).logsumexp(1, keepdim=True)
    number = positive.sum(1)
    valid = (number > 0) & negative.any(1)
    terms = F.softplus(log_negatives - scores).masked_fill(~(positive & valid[:, None]), 0.0)
    return (terms.sum(1) / number.clamp(min=1)).sum() / valid.sum().clamp(min=1)


def random_warp(image: Tensor, options: ConfigDict) -> Tensor:
    """One affine and elastic warp of each image, as grid_sample takes it: (batch, rows, columns, 2), x and y."""
    batch, _, rows, columns = image.shape
    uniform = torch.rand(3, batch, device=image.device)
    angle = torch.deg2rad((2 * uniform[0] - 1) * options.rotate)
    low, high = np.log(options.scale)
    zoom = torch.exp(low + (high - low) * uniform[1])
    tangent = (2 * uniform[2] - 1) * options.shear
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, cos * tangent - sin, sin, sin * tangent + cos]).view(2, 2, batch).movedim(2, 0)
    theta = F.pad(matrix / zoom[:, None, None], (0, 1))
    grid = F.affine_grid(theta, [batch, 1, rows, columns], align_corners=False)
    nodes = torch.randn(batch, 2, -(-rows // 32) + 1, -(-columns // 32) + 1, device=image.device)
    bend = F.interpolate(nodes, (rows, columns), mode="bicubic", align_corners=True) * options.elastic
    return grid + bend.movedim(1, -1) * torch.tensor([2 / columns, 2 / rows], device=image.device)


def weak_intensity(image: Tensor, contrast: float, brightness: float, gamma: float) -> Tensor:
    """Contrast, gamma and brightness, drawn for each image."""

    def around_one(strength):
        return ((2 * torch.rand(image.shape[0], 1, 1, 1, device=image.device) - 1) * np.log1p(strength)).exp()

    low, high = image.amin((2, 3), True), image.amax((2, 3), True)
    span, mean = (high - low).clamp(min=1e-6), image.mean((2, 3), True)
    curved = low + span * ((image - low) / span) ** around_one(gamma)
    return (curved - mean) * around_one(contrast) + mean + brightness * torch.randn_like(mean)


def strong_intensity(image: Tensor, options: ConfigDict) -> Tensor:
    """The same, then bias field, blur and noise, each in half of the images."""
    batch, _, rows, columns = image.shape
    image = weak_intensity(image, options.contrast, options.brightness, options.gamma)
    applied = (torch.rand(3, batch, 1, 1, 1, device=image.device) < 0.5).float()
    strength = torch.rand(2, batch, 1, 1, 1, device=image.device)

    low = image.amin((2, 3), True)
    nodes = torch.randn(batch, 1, 5, 5, device=image.device)
    field = F.interpolate(nodes, (rows, columns), mode="bicubic", align_corners=True)
    image = low + (image - low) * (applied[0] * options.bias * field).exp()

    sigma = (applied[1] * options.blur * strength[0]).view(batch, 1).clamp(min=1e-3)
    taps = torch.arange(-3, 4, device=image.device)
    kernel = (-0.5 * (taps / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum(1, True)).view(batch, 1, 7, 1)
    image = F.pad(image, (3, 3, 3, 3), mode="replicate").transpose(0, 1)
    image = F.conv2d(F.conv2d(image, kernel, groups=batch), kernel.transpose(2, 3), groups=batch).transpose(0, 1)

    level = applied[2] * options.noise * strength[1] * image.std((2, 3), keepdim=True)
    return image + level * torch.randn_like(image)


class TorchStep:
    """Student, teacher and optimiser, and a step of them: images and labels to metrics."""

    def __init__(self, config: ConfigDict, compiled: bool):
        self.config, self.compiled = config, compiled
        self.autocast = compiled and DEVICE.type == "cuda"
        self.student = TorchUNet(config.model.widths, config.contrast.level, config.model.projection_dim).to(DEVICE)
        if compiled:
            self.student.to(memory_format=torch.channels_last)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay,
            fused=compiled,
        )  # fmt: skip
        self.step = 0
        self.random = np.random.default_rng(0)
        if compiled:
            self.views = torch.compile(self.views)
            self.teach = torch.compile(self.teach)
            self.loss = torch.compile(self.loss)

    def __call__(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            weak, strong, labels, inside = self.views(image, labels)
            probs, features = self.teach(weak)
            true = F.one_hot(labels, CLASSES).movedim(-1, 1).float()
            strong, query_probs, query_inside = self.mix(strong, probs, inside)
        terms = self.loss(strong, labels, true, inside, query_probs, query_inside, probs, features)
        weight = {name: self.ramp(config[name]) for name in ("contrast", "pseudo_label")}
        loss = (terms["sup_ce"] + terms["sup_dice"]) / 2 + weight["contrast"] * terms["con"]
        loss = loss + weight["pseudo_label"] * (terms["pl_ce"] + terms["pl_dice"]) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.optimizer.clip_norm)
        self.optimizer.step()
        self.follow(min(config.teacher.decay, 1 - 1 / (self.step + 1)))
        self.step += 1
        return {name: value.detach() for name, value in (terms | {"loss": loss, "grad_norm": norm}).items()}

    def ramp(self, term: ConfigDict) -> float:
        """Sigmoid ramp-up of a weight."""
        done = min(self.step / term.ramp_steps, 1.0) if term.ramp_steps else 1.0
        return term.weight * float(np.exp(-5 * (1 - done) ** 2))

    def views(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weak and strong views, labels, and which pixels lie inside the image, through one warp."""
        options = self.config.augment
        grid = random_warp(image, options)
        inside = (grid.abs() <= 1).all(-1)
        lowest = image.amin((1, 2, 3), keepdim=True)
        warped = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        warped = torch.where(inside[:, None], warped, lowest)
        number = len(labels)
        nearest = F.grid_sample(labels[:, None].float(), grid[:number], "nearest", "border", align_corners=False)
        found = torch.where(inside[:number], nearest[:, 0], 0.0).long()
        weak = weak_intensity(warped, options.weak_contrast, options.weak_brightness, options.weak_gamma)
        return weak, strong_intensity(warped, options), found, inside

    def teach(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities of the unlabelled images, and its features of all."""
        with self.precision():
            logits, features = self.teacher(self.layout(weak))
        return logits[self.config.data.labeled_batch :].softmax(1), features

    def mix(self, strong: Tensor, probs: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CutMix in pairs of unlabelled images."""
        number, options = self.config.data.labeled_batch, self.config.augment
        count, _, rows, columns = probs.shape
        box = torch.zeros(count, rows, columns, dtype=torch.bool, device=probs.device)
        low, high = options.cutmix_area
        for one in box:
            if self.random.random() < options.cutmix_probability:
                side = np.sqrt(self.random.uniform(low, high))
                height, width = int(side * rows), int(side * columns)
                top, left = self.random.integers(rows - height + 1), self.random.integers(columns - width + 1)
                one[top : top + height, left : left + width] = True
        partner = torch.arange(count, device=probs.device) ^ 1
        mixed = [
            torch.where(box.view(count, *(1,) * (x.ndim - 3), rows, columns), x[partner], x)
            for x in (strong[number:], probs, inside[number:])
        ]
        return torch.cat([strong[:number], mixed[0]]), mixed[1], torch.cat([inside[:number], mixed[2]])

    def loss(
        self, strong: Tensor, labels: Tensor, true: Tensor, inside: Tensor,
        query_probs: Tensor, query_inside: Tensor, probs: Tensor, teacher_features: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms of the loss, unweighted."""
        config, number = self.config, len(labels)
        options = config.contrast
        with self.precision():
            logits, features = self.student(self.layout(strong))
        ce, dice = segmentation_loss(logits[:number], labels, torch.ones_like(labels, dtype=torch.float32))
        confidence, target = query_probs.max(1)
        sure = (confidence >= config.pseudo_label.threshold) & query_inside[number:]
        pl_ce, pl_dice = segmentation_loss(logits[number:], target, sure.float())

        index, drawn, valid = draw(
            torch.cat([true, query_probs]), query_inside, options.level, options.num_queries, options.threshold
        )
        queries = self.student.project(features, index)
        with torch.no_grad():
            index, key_drawn, key_valid = draw(
                torch.cat([true, probs]), inside, options.level, options.num_keys, options.threshold
            )
            keys = self.teacher.project(teacher_features, index)
        both, same = valid[:, None] & key_valid, drawn[:, None] == key_drawn
        con = info_nce(queries, keys, both & same, both & ~same, options.temperature)
        return {"sup_ce": ce, "sup_dice": dice, "pl_ce": pl_ce, "pl_dice": pl_dice, "con": con}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """The teacher's moving average."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        if self.compiled:
            torch._foreach_lerp_(teacher, student, 1 - decay)
            return
        for old, new in zip(teacher, student, strict=True):
            old.lerp_(new, 1 - decay)

    def layout(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.compiled else image.contiguous()

    def precision(self):
        return torch.autocast(DEVICE.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()


def torch_batch(batch: dict[str, dict[str, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Images (labelled first) in NCHW, and labels."""
    image = np.concatenate([part["image"] for part in batch.values()])
    return torch.from_numpy(image).movedim(-1, 1).to(DEVICE), torch.from_numpy(batch["labeled"]["label"]).to(DEVICE)


# Do both sides the same?


def load_parameters(network: TorchUNet, params: dict[str, Any], corners: Callable = np.mean) -> int:
    """Copies the parameters of the linen network (or their gradient); returns how many more it has.

    A dense layer before depth-to-space has a bias for each corner of the 2 x 2 pixels, a transposed convolution one
    for all: `corners` makes one of them.
    """
    encoder, decoder, projector = (params[name] for name in ("encoder", "decoder", "projector"))
    values: list[np.ndarray] = []

    def block(tree):
        for i in range(2):
            norm = tree[f"Normalise_{i}"]["GroupNorm_0"]
            values.extend([tree[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1), norm["scale"], norm["bias"]])

    ups = len(network.up)
    for i in range(ups + 1):
        block(encoder[f"ConvBlock_{i}"])
    for i in range(ups):
        kernel, bias = decoder[f"Dense_{i}"]["kernel"], decoder[f"Dense_{i}"]["bias"]
        kernel = kernel.reshape(len(kernel), 2, 2, -1).transpose(0, 3, 1, 2)
        values.extend([kernel, corners(bias.reshape(4, -1), axis=0)])
    for i in range(ups):
        block(decoder[f"ConvBlock_{i}"])
    head = decoder[f"Dense_{ups}"]
    values.extend([head["kernel"].T[..., None, None], head["bias"]])
    for i in (1, 0):  # the inner layer is made second
        values.extend([projector[f"Dense_{i}"]["kernel"].T, projector[f"Dense_{i}"]["bias"]])
    with torch.no_grad():
        for own, value in zip(network.parameters(), values, strict=True):
            assert own.shape == value.shape, (own.shape, value.shape)
            own.copy_(torch.from_numpy(np.array(value)))
    return sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(own.numel() for own in network.parameters())


def check() -> None:
    """One step of both sides from the same weights, with still views and all pixels drawn: equal to rounding."""
    config = make_config(2, 4, 32)
    for name in ("rotate", "shear", "elastic", "spread", "weak_contrast", "weak_brightness", "weak_gamma", "contrast",
                 "brightness", "gamma", "bias", "noise", "blur", "cutmix_probability"):  # fmt: skip
        config.augment[name] = 0.0
    config.augment.scale = (1.0, 1.0)
    config.contrast.num_queries = config.contrast.num_keys = 16 * 16  # all there are
    config.contrast.threshold = config.pseudo_label.threshold = 0.4
    config.contrast.ramp_steps = config.pseudo_label.ramp_steps = config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 1e6  # the norm is not the same, since there are more biases on one side

    # Weights that are neither zero nor one, and a teacher that is not the student.
    random = np.random.RandomState(0)

    def shaken(path, leaf):
        up = "decoder" in str(path) and "Dense" in str(path) and leaf.ndim == 1 and leaf.size > CLASSES
        times = 4 if up else 1  # the same bias in all corners
        return leaf + np.tile(0.1 * random.randn(leaf.size // times), times).reshape(leaf.shape).astype(np.float32)

    state = parallel.to_host(experiment.make_state(config, CLASSES, channels=1))
    student, teacher = (jax.tree.map_with_path(shaken, tree) for tree in (state.student, state.teacher))
    state = state.replace(step=np.int32(10), student=student, teacher=teacher)
    batch = make_batch(config)
    images = np.concatenate([part["image"] for part in batch.values()])
    model = experiment.make_model(config, CLASSES)
    logits = jax.jit(lambda x: model.apply({"params": student}, x)[0])(images)
    after, metrics = experiment.make_step(config, CLASSES)(parallel.replicate(state), parallel.shard(batch))
    after = parallel.to_host(after)
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}

    for compiled in (False, True):
        other = TorchStep(config, compiled)
        other.step, other.autocast = 10, False
        more = load_parameters(other.student, student)
        assert more == 3 * sum(config.model.widths[:-1]) == load_parameters(other.teacher, teacher)
        image, labels = torch_batch(batch)
        with torch.no_grad():
            theirs = other.student(other.layout(image))[0].movedim(1, -1).cpu().numpy()
        np.testing.assert_allclose(theirs, logits, atol=1e-4)
        print(f"torch, {'compiled' if compiled else 'eager'}")
        print(f"  parameters {sum(p.numel() for p in other.student.parameters())}, and {more} corner biases in jax")
        print(f"  logits agree to {np.abs(theirs - logits).max():.1e}")
        for name, value in other(image, labels).items():
            if name != "grad_norm":
                print(f"  {name:10} {means[name]:.6f}  {float(value):.6f}")
                np.testing.assert_allclose(float(value), means[name], rtol=1e-4)

        # The first moment of Adam is a tenth of the gradient; a bias of all corners has the sum of theirs.
        moments = [other.optimizer.state[p]["exp_avg"] for p in other.student.parameters()]
        compare("gradient", moments, after.opt_state[1][0].mu, np.sum)
        compare("student", other.student.parameters(), after.student, np.mean)
        compare("teacher", other.teacher.parameters(), after.teacher, np.mean)


def compare(name: str, found: Iterable[Tensor], params: dict[str, Any], corners: Callable) -> None:
    """Relative difference of all parameters together; they follow the gradient's sign at first, hence no less."""
    reference = TorchUNet(base.get_config().model.widths, base.get_config().contrast.level, 64)
    load_parameters(reference, params, corners)
    wanted = torch.cat([p.flatten() for p in reference.parameters()])
    error = float((torch.cat([p.flatten() for p in found]).cpu() - wanted).norm() / wanted.norm())
    print(f"  {name:10} relative difference {error:.1e}")
    assert error < 1e-3


if __name__ == "__main__":
    main()
