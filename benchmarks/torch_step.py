"""The training step against the same step written in PyTorch.

    pip install -e '.[bench]'
    python benchmarks/torch_step.py [--images=4+4] [--size=128] [--dtype=bfloat16] [--check]

The PyTorch side shares nothing with `sscl_jax` but the config: same network, views, losses, optimiser and teacher, in
some forms. *eager* is what one finds in the field: NCHW, float32, one module after the other. *compiled* is the
strongest we know: channels last, torch.compile, fused AdamW, and bfloat16 autocast on a GPU (not on a CPU, where the
JAX step is float32 unless `--dtype` says otherwise). *autocast*, on a GPU alone, is eager with channels last and
bfloat16. All have the batch on the device, and what `parallel.keep_memory` does for JAX. All sides take turns in one
process, on as many threads as this process may use, so that a machine that slows down slows all of them; a side that
fails is left out. Last comes the time that the FLOPs of the JAX step take at the rate of a large matmul, or its bytes
at that of a large copy, whichever is more; with much of them in caches, as on a CPU, the step may take less. `--check`
compares losses, gradients and updates, no times.
"""

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from common import (
    CLASSES,
    Program,
    add_options,
    describe_compilation,
    describe_rates,
    device_memory,
    labeled_and_unlabeled,
    machine_rates,
    make_batch,
    on_devices,
    set_sizes,
)
from ml_collections import ConfigDict
from torch import Tensor, nn

from configs import base
from sscl_jax import experiment, parallel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=labeled_and_unlabeled, default="4+4", help="of a step")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a view")
    add_options(parser)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled form, whose first step takes long")
    parser.add_argument(
        "--processor", action="store_true", help="processor time, for a busy machine (on one core of it)"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory on a CPU too, each side in its own process")
    parser.add_argument("--check", action="store_true", help="compare results, not times")
    args = parser.parse_args()
    parallel.keep_memory()  # both sides take theirs from malloc
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")  # of a GPU: jax shares it, and asks at its first use
    if args.check:
        check()
        return
    try:
        config = make_config(args.images, args.size, args.dtype)
    except ValueError as error:
        parser.error(str(error))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as peers have it

    gpu = DEVICE.type == "cuda"
    sides = ["jax", "torch, eager", *["torch, autocast"] * gpu, *["torch, compiled"] * (not args.eager)]
    memory: dict[str, float] = {}
    for side in sides if args.memory and not gpu else ():  # while this process is small
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory[side] = process.submit(peak_memory, side, config, threads).result()
    burst = args.burst or (10 if gpu else 1)  # one step alone would measure how fast a GPU can be called
    clock = time.process_time if args.processor else time.perf_counter
    runs: dict[str, Callable[[int], Any]] = {}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.repeats + 1):
        for side in list(times):
            try:
                if side not in runs:
                    runs[side] = make_side(side, config)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                for count in (burst,) if turn else (1, burst):  # the first compiles, the second does not count either
                    start = clock()
                    runs[side](count)
                    times[side].append((clock() - start) / count)
                    print(f"turn {turn}, {side}: {1e3 * times[side][-1]:.1f} ms", file=sys.stderr, flush=True)
                if gpu:
                    memory[side] = device_memory() if side == "jax" else torch.cuda.max_memory_allocated() / 2**30
            except Exception as error:
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                print(f"{side} is left out: {type(error).__name__}: {reason[:200]}", flush=True)
                del times[side]

    images = f"{args.images[0]} + {args.images[1]} images of {args.size} x {args.size}"
    print(
        f"{images}, {CLASSES} classes, {jax.devices()[0].device_kind}, {threads} threads, jax {jax.__version__}, ",
        end="",
    )
    print(f"torch {torch.__version__}, {args.repeats} turns of {burst} steps")
    print(f"jax in {args.dtype}; torch in float32" + (", but autocast and compiled in bfloat16" if gpu else ""))
    if gpu:
        exact = {True: "TF32", False: "float32"}
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        print(f"float32: torch does convolutions in {exact[convolutions]}, matmuls in {exact[products]}, ", end="")
        print(f"as it comes; jax does both in {jax.config.jax_default_matmul_precision or 'TF32, as it comes'}")
        print("memory: of jax the most since its start, of torch the most of its last turn, with other sides' weights")
    print(describe_compilation(), end="")
    print(f"{'':16}{'median':>11}{'least':>11}{'most':>11}{'first call':>12}{'memory':>10}   time to that of jax")
    for side, (first, _, *seconds) in times.items():
        numbers = (statistics.median(seconds), min(seconds), max(seconds))
        print(f"{side:16}" + "".join(f"{1e3 * n:8.2f} ms" for n in numbers) + f"{first:10.1f} s", end="")
        print(f"{memory[side]:6.2f} GiB" if memory else f"{'':10}", end="")
        if "jax" in times and len(seconds) > 1:
            ratios = [a / b for a, b in zip(seconds, times["jax"][2:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"   {middle:.2f} (quartiles {low:.2f} to {high:.2f})", end="")
        print(flush=True)
    if "jax" in times:
        rates, copied = machine_rates(args.repeats, args.burst, clock)
        program, median = runs["jax"].program, statistics.median(times["jax"][2:])
        arithmetic, traffic = program.flops / rates[args.dtype], program.bytes / copied
        least = max(arithmetic, traffic)
        print(describe_rates(rates, copied))
        print(
            f"the jax step is {program.flops / 1e9:.1f} GFLOP and {program.bytes / 1e9:.2f} GB, at these rates ", end=""
        )
        print(f"{1e3 * least:.2f} ms (arithmetic {1e3 * arithmetic:.2f}, memory {1e3 * traffic:.2f}): ", end="")
        print(f"{100 * least / median:.0f} % of the time it takes")


def make_config(images: tuple[int, int], size: int, dtype: str) -> ConfigDict:
    """The default method, at its defaults but for the sizes."""
    config = base.get_config().copy_and_resolve_references()
    config.model.dtype = dtype
    set_sizes(config, images, size)
    return config


class JaxSide:
    """Takes steps of `sscl_jax` and waits for the last."""

    def __init__(self, config: ConfigDict):
        state = parallel.replicate(experiment.make_state(config, CLASSES, channels=1))
        batch = on_devices(parallel.shard(make_batch(config)))
        self.program = Program(experiment.make_step(config, CLASSES), state, batch)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            result = self.program()
        jax.block_until_ready(result)


class TorchSide:
    """Takes steps of PyTorch and waits for the last."""

    def __init__(self, side: str, config: ConfigDict):
        autocast = DEVICE.type == "cuda" and side != "torch, eager"
        self.step, self.batch = TorchStep(config, side == "torch, compiled", autocast), torch_batch(make_batch(config))

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.step(*self.batch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()


def make_side(side: str, config: ConfigDict) -> JaxSide | TorchSide:
    return JaxSide(config) if side == "jax" else TorchSide(side, config)


def peak_memory(side: str, config: ConfigDict, threads: int) -> float:
    """GiB that three steps take on a CPU beyond what the libraries do."""
    parallel.keep_memory()
    torch.set_num_threads(threads)
    before = parallel.peak_memory()
    make_side(side, config)(3)
    return parallel.peak_memory() - before


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


def segmentation_loss(logits: Tensor, labels: Tensor, weight: Tensor, rescuing: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, mean Dice loss of background and the classes of the batch, and the least Dice of these."""
    ce = (F.cross_entropy(logits, labels, reduction="none") * weight).mean()
    reference = F.one_hot(labels, CLASSES).movedim(-1, 1)
    probs, weight = logits.softmax(1), weight[:, None]
    overlap = (weight * probs * reference).sum((0, 2, 3))
    total = (weight * (probs + reference)).sum((0, 2, 3))
    background = torch.arange(CLASSES, device=logits.device) == 0  # `held[0] = True` would make a GPU wait
    held = ((weight * reference).sum((0, 2, 3)) > 0) | background
    dice = (2 * overlap + 1) / (total + 1)
    loss = torch.where(dice > 0.5, 1 - dice, 0.5 - 0.5 * (2 * dice).log()) if rescuing else 1 - dice
    return ce, (loss * held).sum() / held.sum(), torch.where(held, dice, 1.0).min().detach()


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
    low, high = map(math.log, options.scale)
    zoom = torch.exp(low + (high - low) * uniform[1])
    tangent = (2 * uniform[2] - 1) * options.shear
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, cos * tangent - sin, sin, sin * tangent + cos]).view(2, 2, batch).movedim(2, 0)
    theta = F.pad(matrix / zoom[:, None, None], (0, 1))
    grid = F.affine_grid(theta, [batch, 1, rows, columns], align_corners=False)
    nodes = torch.randn(batch, 2, -(-rows // 32) + 1, -(-columns // 32) + 1, device=image.device)
    bend = F.interpolate(nodes, (rows, columns), mode="bicubic", align_corners=True) * options.elastic
    return grid + torch.stack([bend[:, 0] * (2 / columns), bend[:, 1] * (2 / rows)], -1)


def weak_intensity(image: Tensor, contrast: float, brightness: float, gamma: float) -> Tensor:
    """Contrast, gamma and brightness, drawn for each image."""

    def around_one(strength):
        return ((2 * torch.rand(image.shape[0], 1, 1, 1, device=image.device) - 1) * math.log1p(strength)).exp()

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

    def __init__(self, config: ConfigDict, compiled: bool, autocast: bool):
        self.config, self.compiled, self.autocast = config, compiled, autocast
        self.memory_format = torch.channels_last if compiled or autocast else torch.contiguous_format
        self.student = TorchUNet(config.model.widths, config.contrast.level, config.model.projection_dim)
        self.student.to(DEVICE, memory_format=self.memory_format)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay,
            fused=compiled,
        )  # fmt: skip
        self.step = 0
        if compiled:
            for name in ("views", "teach", "mix", "loss"):
                setattr(self, name, torch.compile(getattr(self, name)))

    def __call__(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            weak, strong, labels, inside = self.views(image, labels)
            probs, features = self.teach(weak)
            true = F.one_hot(labels, CLASSES).movedim(-1, 1).float()
            strong, query_probs, query_inside = self.mix(strong, true, probs, inside)
        terms = self.loss(strong, labels, inside[len(labels) :], query_probs, query_inside, probs, features)
        weight = {name: self.ramp(config[name]) for name in ("contrast", "pseudo_label")}
        loss = (terms["sup_ce"] + terms["sup_dice"]) / 2 + weight["contrast"] * terms["con"]
        loss = loss + weight["pseudo_label"] * terms["pl_competence"] * (terms["pl_ce"] + terms["pl_dice"]) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.optimizer.clip_norm)
        self.optimizer.step()
        self.follow(min(config.teacher.decay, 1 - 1 / (self.step + 1)))
        self.step += 1
        return {name: value.detach() for name, value in (terms | {"loss": loss, "grad_norm": norm}).items()}

    def ramp(self, term: ConfigDict) -> float:
        """Sigmoid ramp-up of a weight."""
        steps = self.config.ramp * self.config.steps
        done = min(self.step / steps, 1.0) if steps else 1.0
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
        """The teacher's probabilities and features of the unlabelled images."""
        with self.precision():
            logits, features = self.teacher(self.layout(weak[self.config.data.labeled_batch :]))
        return logits.softmax(1), features

    def mix(self, strong: Tensor, true: Tensor, probs: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CutMix of unlabelled images, in pairs or with labelled ones: all views, and of the unlabelled the targets."""
        number, options = self.config.data.labeled_batch, self.config.augment
        count, _, rows, columns = probs.shape
        low, high = options.cutmix_area
        uniform = torch.rand(5, count, 1, device=probs.device)
        side = (low + (high - low) * uniform[0]).sqrt()

        def span(size, place):
            length, pixels = (side * size).floor(), torch.arange(size, device=probs.device)
            start = (place * (size - length + 1)).floor()
            return (pixels >= start) & (pixels < start + length)

        box = span(rows, uniform[1])[:, :, None] & span(columns, uniform[2])[:, None]
        box = box & (uniform[3] < options.cutmix_probability)[:, None]
        place = torch.arange(count, device=probs.device)
        partner, given = place ^ 1, place * number // count
        coin = uniform[4] < options.cutmix_labeled

        def pasted(labeled, unlabeled):
            ones = (1,) * (unlabeled.ndim - 1)
            source = torch.where(coin.view(count, *ones), labeled[given], unlabeled[partner])
            return torch.where(box.view(count, *ones[2:], rows, columns), source, unlabeled)

        mixed = pasted(strong[:number], strong[number:])
        return torch.cat([strong[:number], mixed]), pasted(true, probs), pasted(inside[:number], inside[number:])

    def loss(
        self, strong: Tensor, labels: Tensor, inside: Tensor,
        query_probs: Tensor, query_inside: Tensor, probs: Tensor, teacher_features: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The terms of the loss, unweighted; all but views and labels are of the unlabelled images."""
        config, number = self.config, len(labels)
        options = config.contrast
        with self.precision():
            logits, features = self.student(self.layout(strong))
        ce, dice, competence = segmentation_loss(
            logits[:number], labels, torch.ones_like(labels, dtype=torch.float32), rescuing=True
        )
        confidence, target = query_probs.max(1)
        sure = (confidence >= config.pseudo_label.threshold) & query_inside
        pl_ce, pl_dice, _ = segmentation_loss(logits[number:], target, sure.float(), rescuing=False)

        index, drawn, valid = draw(query_probs, query_inside, options.level, options.num_queries, options.threshold)
        queries = self.student.project(features[number:], index)
        with torch.no_grad():
            index, key_drawn, key_valid = draw(probs, inside, options.level, options.num_keys, options.threshold)
            keys = self.teacher.project(teacher_features, index)
        both, same = valid[:, None] & key_valid, drawn[:, None] == key_drawn
        con = info_nce(queries, keys, both & same, both & ~same, options.temperature)
        return {
            "sup_ce": ce, "sup_dice": dice, "pl_ce": pl_ce, "pl_dice": pl_dice, "pl_competence": competence, "con": con
        }  # fmt: skip

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
        return image.contiguous(memory_format=self.memory_format)

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
    """One step of both sides from the same weights, with still views and all pixels drawn: equal to rounding.

    Without CutMix, and with images that it replaces altogether, by others without labels or by those with.
    """
    config = make_config((2, 4), 32, "float32")
    for name in ("rotate", "shear", "elastic", "spread", "weak_contrast", "weak_brightness", "weak_gamma", "contrast",
                 "brightness", "gamma", "bias", "noise", "blur", "cutmix_probability"):  # fmt: skip
        config.augment[name] = 0.0
    config.augment.scale = config.augment.cutmix_area = (1.0, 1.0)
    config.contrast.num_queries = config.contrast.num_keys = 16 * 16  # all there are
    config.contrast.threshold = config.pseudo_label.threshold = 0.4
    config.ramp = 0.0
    config.optimizer.warmup_steps = 0
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
    for probability, labeled, compiled in ((0.0, 0.0, False), (1.0, 0.0, False), (1.0, 1.0, False), (0.0, 0.0, True)):
        config.augment.cutmix_probability, config.augment.cutmix_labeled = probability, labeled
        after, metrics = experiment.make_step(config, CLASSES)(parallel.replicate(state), parallel.shard(batch))
        after = parallel.to_host(after)
        means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}

        other = TorchStep(config, compiled, autocast=False)
        other.step = 10
        more = load_parameters(other.student, student)
        assert more == 3 * sum(config.model.widths[:-1]) == load_parameters(other.teacher, teacher)
        image, labels = torch_batch(batch)
        with torch.no_grad():
            theirs = other.student(other.layout(image))[0].movedim(1, -1).cpu().numpy()
        np.testing.assert_allclose(theirs, logits, atol=1e-4)
        print(f"torch, {'compiled' if compiled else 'eager'}, CutMix {probability:g}, with labelled images {labeled:g}")
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
    flat, wanted = (torch.cat([p.detach().cpu().flatten() for p in side]) for side in (found, reference.parameters()))
    error = float((flat - wanted).norm() / wanted.norm())
    print(f"  {name:10} relative difference {error:.1e}")
    assert error < 1e-3


if __name__ == "__main__":
    main()
