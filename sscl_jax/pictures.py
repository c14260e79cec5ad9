"""Pictures of what a training made of its cases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, whose backend is the user's
from matplotlib.lines import Line2D

from sscl_jax.data import recipe as recipes
from sscl_jax.data.prepared import PreparedDataset
from sscl_jax.evaluate import CaseResult

COLOURS = (
    "#e6550d", "#31a354", "#3182bd", "#756bb1", "#e7298a", "#e6ab02", "#17becf",
    "#8c564b", "#99d8c9", "#08519c", "#fb9a99", "#bcbd22", "#67000d",
)  # fmt: skip
SLICES = 6  # of a case, at most: evenly spaced over those that hold reference or prediction


def write_overlays(folder: Path, results: Sequence[CaseResult], dataset: PreparedDataset) -> list[Path]:
    """Draws best, median and worst case by mean Dice: slices with reference and prediction as outlines.

    Args:
      folder: where the PNG files go; made if absent, earlier pictures in it are replaced.
      results: evaluated cases.
      dataset: gives images and labels.

    Returns:
      The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    score = [np.nanmean(r.metrics.dice) if r.metrics.counted.any() else np.nan for r in results]
    order = [i for i in np.argsort(score)[::-1] if np.isfinite(score[i])]  # NaN: nothing to find, nothing found
    if not order:
        return []
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    paths = []
    for rank, index in chosen.items():
        paths.append(folder / f"{rank}_{results[index].case.case_id}.png")
        _draw_case(paths[-1], results[index], dataset, f"{rank} of {len(order)} cases")
    return paths


def write_features(path: Path, features: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Draws pixel features on their first two principal axes, coloured by class.

    Args:
      path: PNG file to write.
      features: (N, D), as `evaluate.pixel_features` gives them; directions count, as in the contrast.
      labels: (N,) classes.
      class_names: names of all classes, the background first.
    """
    x = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    x = x - x.mean(axis=0)
    _, sizes, axes = np.linalg.svd(x, full_matrices=False)
    points = x @ axes[:2].T
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for c, name in enumerate(class_names):
        colour = COLOURS[(c - 1) % len(COLOURS)] if c else "#999999"
        axis.plot(*points[labels == c].T, "o", ms=2, alpha=0.3, color=colour)
        axis.plot([], [], "o", ms=5, color=colour, label=plain(name))
    share = sizes**2 / max(np.sum(sizes**2), 1e-12)
    axis.set_xlabel(f"first axis, {100 * share[0]:.0f} % of the variance")
    axis.set_ylabel(f"second axis, {100 * share[1]:.0f} %")
    axis.legend(fontsize=8, frameon=False, loc="best")
    figure.savefig(path, dpi=110)


def plain(name: str) -> str:
    """Text for matplotlib, which would take what stands between two dollar signs for a formula."""
    return name.replace("$", r"\$")


def _draw_case(path: Path, result: CaseResult, dataset: PreparedDataset, title: str) -> None:
    case, recipe = result.case, dataset.recipe
    image = dataset.image(case.index)[..., 0]
    reference = dataset.label(case.index)
    values = recipes.unmap_labels(result.prediction, recipe.label_values)
    prediction = recipes.prepare_label(values, case.grid, recipe)
    found = (reference > 0) | (prediction > 0)
    if not found.any():  # so few voxels that the prepared grid, which may be coarser, shows none
        found = np.ones_like(found)
    shown = np.flatnonzero(found.any((1, 2)))
    shown = shown[np.unique(np.round(np.linspace(0, len(shown) - 1, SLICES)).astype(int))]
    box = _around(found.max(axis=0), margin=12)

    figure = Figure(figsize=(2.6 * len(shown), 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    low, high = np.percentile(image, (1, 99.5))
    for axis, z in zip(axes[0], shown, strict=True):
        axis.imshow(
            image[z][box],
            cmap="gray",
            vmin=low,
            vmax=high,
            aspect=case.grid.spacing[1] / case.grid.spacing[2],
        )
        for c in range(1, dataset.num_classes):
            colour = COLOURS[(c - 1) % len(COLOURS)]
            for mask, style in ((reference, "solid"), (prediction, "dashed")):
                inside = (mask[z] == c)[box]
                if inside.any() and not inside.all():
                    axis.contour(inside, levels=[0.5], colors=[colour], linewidths=1.4, linestyles=style)
        axis.set_title(f"slice {z + 1}/{image.shape[0]}", fontsize=8)
        axis.set_axis_off()
    dice = ", ".join(
        f"{name} {d:.3f}"
        for name, d, n in zip(recipe.class_names[1:], result.metrics.dice, result.metrics.counted, strict=True)
        if n
    )
    spacing = " x ".join(f"{s:.2f}" for s in case.grid.native_spacing)
    figure.suptitle(plain(f"{case.case_id}, {title}: Dice {dice}; voxels {spacing} mm"), fontsize=9)
    names = map(plain, recipe.class_names[1:])
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=n) for i, n in enumerate(names)]
    handles += [Line2D([], [], color="gray", ls=s, label=n) for s, n in (("-", "reference"), ("--", "prediction"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _around(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    """Bounding box of a mask, widened by `margin` pixels."""
    spans = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        spans.append(slice(max(0, hit[0] - margin), hit[-1] + 1 + margin))
    return tuple(spans)
