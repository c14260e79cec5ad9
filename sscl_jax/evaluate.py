"""Segments whole volumes and measures them, by case, on the native grid, in millimetres.

python -m sscl_jax.evaluate --checkpoint=runs/acdc --split=val
python -m sscl_jax.evaluate --predictions=DIR --references=DIR
"""

import contextlib
import csv
import functools
import itertools
import math
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from sscl_jax import cli, metrics, parallel
from sscl_jax.data import formats, nifti
from sscl_jax.data import recipe as recipes
from sscl_jax.data.prepared import Case, PreparedDataset, open_prepared
from sscl_jax.data.sampling import Pool
from sscl_jax.models import UNet

Predictor = Callable[[Any, np.ndarray], np.ndarray]

# Cases are segmented in two threads; those whose probabilities are more numbers than this (512 MiB), one at a time.
LARGE = 2**27
_one_large = threading.Lock()


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of evenly spaced windows that cover [0, size), with `overlap` (a share of the patch) where it can."""
    if size <= patch:
        return [0]
    stride = max(patch * (1 - overlap), 1)
    count = int(np.ceil((size - patch) / stride)) + 1
    return [int(start) for start in np.round(np.linspace(0, size - patch, count))]


def gaussian_window(patch: Sequence[int]) -> np.ndarray:
    """Weights (*patch) of a window's pixels, greatest in its centre (sigma = patch / 8) and nowhere 0."""
    weights = np.ones(())
    for n in patch:
        x = (np.arange(n) - (n - 1) / 2) / (n / 8)
        weights = np.multiply.outer(weights, np.exp(-0.5 * x**2))
    return np.maximum(weights, 1e-3).astype(np.float32)


def make_predictor(model: UNet, patch: tuple[int, ...], overlap: float = 0.5, batch: int = 8) -> Predictor:
    """Builds `predict(variables, image) -> probabilities`, by a sliding window of the size trained on.

    The window keeps normalisation statistics as they were in training, and one compiled shape serves every volume.

    Args:
      model: the network.
      patch: window, (H, W) for slices or (D, H, W).
      overlap: least overlap of neighbouring windows, in [0, 1); at most a window starts at each place.
      batch: windows in one call.

    Returns:
      A function of the model's variables and an image (D, H, W, C), giving probabilities (D, H, W, classes) float32.
    """

    @jax.jit
    def forward(variables, windows):
        return jax.nn.softmax(model.apply(variables, windows)[0])

    rank = len(patch)
    window = (1,) * (3 - rank) + tuple(patch)
    weights = gaussian_window(patch).reshape(window)[..., None]

    def predict(variables: Any, image: np.ndarray) -> np.ndarray:
        shape = image.shape[:3]
        before = [max(0, p - n) // 2 for p, n in zip(window, shape, strict=True)]
        inside = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
        padded = np.empty((*map(max, window, shape), image.shape[3]), image.dtype)
        padded[:] = image.min(axis=(0, 1, 2))
        padded[inside] = image
        image = padded
        starts = [window_starts(n, p, overlap) for n, p in zip(image.shape[:3], window, strict=True)]
        total = np.zeros((*image.shape[:3], model.num_classes), np.float32)
        norm = np.zeros((*image.shape[:3], 1), np.float32)
        places = [
            tuple(slice(s, s + p) for s, p in zip(corner, window, strict=True)) for corner in itertools.product(*starts)
        ]
        for first in range(0, len(places), batch):
            chosen = places[first : first + batch]
            windows = np.stack([image[place] for place in chosen]).reshape(-1, *patch, image.shape[-1])
            # A full batch always: a shorter last one would be compiled anew.
            windows = np.pad(windows, [(0, batch - len(chosen))] + [(0, 0)] * (rank + 1))
            probs = np.asarray(forward(variables, windows))
            for place, part in zip(chosen, probs[: len(chosen)], strict=True):
                total[place] += weights * part.reshape(*window, -1)
                norm[place] += weights
        return total[inside] / norm[inside]

    return predict


class CaseResult(NamedTuple):
    """What one network made of one case.

    Attributes:
      case: the case.
      prediction: (X, Y, Z) uint8, classes on the native grid.
      metrics: compared with the native label, in mm.
      sure: voxels of the foreground (of prediction or label), how many of them would give a pseudo-label, and for how
        many of those it would be right; before any part is left out as not the largest.
    """

    case: Case
    prediction: np.ndarray
    metrics: metrics.CaseMetrics
    sure: tuple[int, int, int]


def keep_largest_component(classes: np.ndarray, of: str) -> np.ndarray:
    """Leaves out what lies apart: (X, Y, Z) to the same. Voxels hang together that touch, be it at a corner.

    Args:
      classes: class indices.
      of: `none` leaves all; `class` leaves of each class its largest part; `foreground` first leaves the largest part
        of all classes together. That is for parts of one organ: what looks like one of them elsewhere may be larger
        than the part itself.
    """

    def largest(mask: np.ndarray) -> np.ndarray:
        parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
        return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else mask

    if of == "none":
        return classes
    kept = np.where(largest(classes > 0), classes, 0) if of == "foreground" else classes
    result = np.zeros_like(classes)
    for c in np.unique(kept[kept > 0]):
        result[largest(kept == c)] = c
    return result


def segment(
    predict: Predictor,
    variables: Any,
    image: np.ndarray,
    grid: recipes.Grid,
    recipe: recipes.Recipe,
    largest_component: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Segments one prepared image.

    Args:
      predict: from `make_predictor`.
      variables: of the network.
      image: (D, H, W, C), prepared.
      grid: links it to its file.
      recipe: by which it was prepared.
      largest_component: see `keep_largest_component`.

    Returns:
      Classes (X, Y, Z) uint8 on the native grid, and the probability of the most probable one.
    """
    voxels = max(math.prod(image.shape[:3]), math.prod(grid.native_shape))
    with _one_large if voxels * len(recipe.label_values) > LARGE else contextlib.nullcontext():
        probs = recipes.to_native(predict(variables, image), grid, recipe)
        classes, confidence = np.argmax(probs, axis=-1).astype(np.uint8), np.max(probs, axis=-1)
        del probs
    return keep_largest_component(classes, largest_component), confidence


def evaluate_cases(
    predict: Predictor,
    variables: Any,
    dataset: PreparedDataset,
    cases: Sequence[Case],
    largest_component: str,
    threshold: float = 0.0,
) -> list[CaseResult]:
    """Segments and measures cases that have a label; `threshold`: least confidence of a pseudo-label.

    Where there are several processes they share the work: all must call this, and all get all results.
    """

    def measure(case: Case) -> list[np.ndarray]:
        image, label = dataset.image(case.index), dataset.native_label(case.index)
        classes, confidence = segment(predict, variables, image, case.grid, dataset.recipe, largest_component="none")
        foreground = (classes > 0) | (label > 0)
        sure = foreground & (confidence >= threshold)
        right = sure & (classes == label)
        prediction = keep_largest_component(classes, largest_component)
        measured = metrics.case_metrics(prediction, label, dataset.num_classes, case.grid.native_spacing)
        return [prediction, np.array([foreground.sum(), sure.sum(), right.sum()]), *vars(measured).values()]

    results = []
    for case, (prediction, counts, *measured) in zip(cases, parallel.in_shares(measure, cases), strict=True):
        foreground, sure, right = counts.tolist()
        results.append(CaseResult(case, prediction, metrics.CaseMetrics(*measured), (foreground, sure, right)))
    return results


@functools.partial(jax.jit, static_argnums=0)  # compiled once for student and teacher, val and test
def _features(model: Any, variables: Any, images: jax.Array) -> jax.Array:
    return model.apply(variables, images)[1]


def pixel_features(
    model: UNet, variables: Any, pool: Pool, num_classes: int, per_class: int = 2000, batch: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Features of single pixels of labelled images, with their classes.

    Args:
      model: the network; features are those of its `feature_level`, before the projection.
      variables: its variables.
      pool: labelled samples, on a canvas of the size trained on.
      num_classes: number of classes.
      per_class: at most so many pixels of each class, drawn with a fixed seed.
      batch: images in one call.

    Returns:
      Features (N, channels) float32 and classes (N,), for `metrics.compactness_separability`.
    """
    step = 2**model.feature_level
    centre = (slice(None), *(slice(step // 2, None, step),) * len(pool.canvas))
    features, labels = [], []
    for first in range(0, len(pool.samples), batch):
        # A full batch always, as in the sliding window: the last one takes some samples twice.
        part = pool.batch(np.arange(first, first + batch) % len(pool.samples))
        label = part["label"][centre].ravel()
        inside = np.flatnonzero(np.random.RandomState(first).rand(label.size) < np.where(label > 0, 1.0, 0.02))
        features.append(np.asarray(_features(model, variables, part["image"])).reshape(label.size, -1)[inside])
        labels.append(label[inside])
    x, y = np.concatenate(features), np.concatenate(labels)
    order = np.random.RandomState(0).permutation(len(y))
    chosen = np.concatenate([order[y[order] == c][:per_class] for c in range(num_classes)])
    return x[chosen], y[chosen]


CASE_COLUMNS = (
    "network", "case", "patient", "class", "dice", "jaccard", "hd95_mm", "assd_mm", "counted", "flagged",
)  # fmt: skip


def write_case_table(
    path: Path,
    rows: Sequence[tuple[str, str, str, metrics.CaseMetrics]],
    class_names: Sequence[str],
) -> None:
    """Writes `CASE_COLUMNS` for each class of each (network, case id, patient id, metrics)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CASE_COLUMNS)
        for *names, m in rows:
            for c, name in enumerate(class_names[1:]):
                values = (f"{v[c]:.6g}" for v in (m.dice, m.jaccard, m.hd95, m.assd))
                writer.writerow([*names, name, *values, int(m.counted[c]), int(m.flagged[c])])


def mask_pairs(predictions: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """(case id, prediction, reference) of two folders, paired by relative path.

    Masks are of any format that `predict` reads from one file. A reference may carry one of `formats.MASK_ENDINGS`
    behind the scan's name. Every reference needs a prediction; predictions without a reference, and scans that lie
    beside references, are passed over, which is told, and so are hidden files.

    Raises:
      FileNotFoundError: a folder is missing or empty, or files lack a partner; names them.
      ValueError: two files have one name, as a.nii and a.nii.gz, or two references one prediction.
    """

    def masks(folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder.")
        files = sorted(p for p in folder.rglob("[!.]*") if p.name.lower().endswith(formats.SUFFIXES) and p.is_file())
        if not files:
            raise FileNotFoundError(f"{folder}: no mask there ({', '.join(formats.SUFFIXES)}).")
        named: dict[str, Path] = {}
        for path in files:
            first = named.setdefault(str(path.relative_to(folder).with_name(formats.stem(path))), path)
            if first != path:
                raise ValueError(f"{path}: has the name of {first}: remove one of them.")
        return named

    predicted, found = masks(predictions), masks(references)
    scan_of = {name: formats.without_mask_ending(name) for name in found}
    # Where one scan lies beside its reference, all that are not named as references are scans.
    with_scans = {path.parent for name, path in found.items() if scan_of[name] != name and scan_of[name] in found}
    scans = {name: path for name, path in found.items() if scan_of[name] == name and path.parent in with_scans}
    if scans:
        print(
            f"passed over: {len(scans)} scans beside references, such as {next(iter(scans.values()))}", file=sys.stderr
        )
    pairs, used = [], set()
    for name, path in found.items():
        if name in scans:
            continue
        # A mask of p1_0000, as nnU-Net names the only channel of p1, is called so as well.
        names = [scan_of[name], f"{scan_of[name]}_0000"]
        names = [*names, name] if path.parent in with_scans else [name, *names]
        partner = next((each for each in names if each in predicted), None)
        if partner is None:
            raise FileNotFoundError(f"{path}: {predictions} has no prediction {scan_of[name]}.nii.gz for it.")
        if partner in used:
            raise ValueError(f"{path}: another reference is of {predicted[partner]} too: keep one of them.")
        pairs.append((partner, predicted[partner], path))
        used.add(partner)
    extra = sorted(predicted.keys() - used)
    if taken := [name for name in extra if name in scans]:
        told = f"{scans[taken[0]]} is taken for its scan, as others there are: name its reference {taken[0]}_gt"
        raise FileNotFoundError(f"{predicted[taken[0]]}: {told}.")
    if extra:
        told = f"{len(extra)} of {len(predicted)} predictions have no reference in {references}, such as"
        print(f"warning: not measured: {told} {predicted[extra[0]]}", file=sys.stderr)
    return pairs


def evaluate_folders(predictions: Path, references: Path) -> tuple[list[str], list[str], list[metrics.CaseMetrics]]:
    """Measures masks against reference masks on disk; warns of values that predictions alone have.

    Returns:
      Case ids; class names (the label values, of all files, in ascending order); metrics by case.

    Raises:
      FileNotFoundError: see `mask_pairs`.
      ValueError: a pair differs in shape or geometry, or a file is not a label map.
    """
    pairs = mask_pairs(predictions, references)
    predicted_values, values = (
        {0}.union(*(np.unique(formats.read_label(pair[i])[0]).tolist() for pair in pairs)) for i in (1, 2)
    )
    if unknown := sorted(predicted_values - values):
        told = f"{predictions}: label values {', '.join(map(str, unknown))} are in no reference, so their Dice is 0"
        print(f"warning: {told}: if they stand for other values there, map them", file=sys.stderr)
    ordered = sorted(predicted_values | values)
    if len(ordered) > recipes.MAX_CLASSES:
        raise ValueError(
            f"{references} and {predictions}: {len(ordered)} different label values; is one of the files an image? Put "
            "masks alone there."
        )
    if len(ordered) < 2:
        raise ValueError(f"{references}: all masks are empty: there is nothing to measure.")
    results = []
    for _, predicted, reference in pairs:
        (p, p_affine), (r, r_affine) = formats.read_label(predicted), formats.read_label(reference)
        if p.shape != r.shape:
            raise ValueError(f"{predicted}: shape {p.shape}, but {reference} has {r.shape}: put both on one grid.")
        spacing = tuple(voxel_sizes(r_affine).tolist())
        if apart := nifti.grids_apart(p.shape, p_affine, r_affine):
            raise ValueError(f"{predicted}: not the same grid as {reference}, up to {apart:.3g} mm away from it.")
        p, r = (recipes.map_labels(array, ordered) for array in (p, r))
        results.append(metrics.case_metrics(p, r, len(ordered), spacing))
    return [name for name, *_ in pairs], [str(v) for v in ordered], results


def evaluate_split(network: Any, split: str, data: str | None) -> tuple[list[CaseResult], str]:
    """Measures a loaded network on a split of the data it was trained with; results and a title.

    Raises:
      ValueError: the data are not those of the training, or the split has no case with a label.
    """
    dataset = open_prepared(Path(data or network.config.data.path))
    if dataset.fingerprint != network.meta["fingerprint"]:
        raise ValueError(
            f"{data or network.config.data.path} is not the prepared dataset that {network.path} was trained with: "
            "its splits may differ. Give it with --data."
        )
    cases = [case for case in dataset.cases if case.split == split and case.has_label]
    if not cases:
        raise ValueError(f"{dataset.name}: no case with a label in the {split} split.")
    config = network.config
    predict = make_predictor(network.model, tuple(config.data.patch_size), config.eval.final_overlap)
    results = evaluate_cases(predict, network.variables, dataset, cases, config.eval.largest_component)
    return results, heading(network, split, cases)


def heading(network: Any, split: str, cases: Sequence[Case]) -> str:
    """What a table is about: split, network, step, method; checkpoint and cases on a second line."""
    config = network.config
    title = f"{split}, {network.name}, step {network.path.name} ({config.method}, seed {config.seed})"
    return f"{title}\n{network.path}, {len(cases)} cases: {', '.join(case.case_id for case in cases)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `sscl-evaluate`."""
    from sscl_jax import experiment  # imported here: folders of masks need no checkpoint, nor what reads them

    parser = cli.make_parser("sscl_jax.evaluate", __doc__)
    parser.add_argument("--checkpoint", help="--workdir of a training: measure its student and teacher")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="split to measure (default val)")
    parser.add_argument("--kind", default="best", choices=["best", "last"], help="which checkpoint (default best)")
    parser.add_argument("--data", help="the prepared dataset, where it is not at the config's data.path any more")
    parser.add_argument("--predictions", help="folder of masks: measure them against --references")
    parser.add_argument("--references", help="folder of reference masks; files pair by name")
    parser.add_argument("--csv", help="also write one row for each case and class to this file")
    args = cli.parse(parser, argv)
    folders = args.predictions, args.references
    if bool(args.checkpoint) == any(folders) or any(folders) != all(folders):
        parser.error("give either --checkpoint, or --predictions and --references")
    parallel.keep_memory()
    try:
        rows: list[tuple[str, str, str, metrics.CaseMetrics]] = []
        classes: Sequence[str] = ()
        if args.checkpoint:
            for name, network in experiment.load_networks(Path(args.checkpoint), args.kind).items():
                results, title = evaluate_split(network, args.split, args.data)
                classes = network.recipe.class_names
                summary = metrics.summarise([r.metrics for r in results])
                print(metrics.format_table(summary, classes[1:], title) + "\n")
                rows += [(name, r.case.case_id, r.case.patient_id, r.metrics) for r in results]
        else:
            names, classes, measured = evaluate_folders(Path(args.predictions), Path(args.references))
            title = f"{args.predictions} against {args.references}"
            print(metrics.format_table(metrics.summarise(measured), classes[1:], title))
            rows = [("predictions", name, "", m) for name, m in zip(names, measured, strict=True)]
        if args.csv:
            write_case_table(Path(args.csv), rows, classes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
