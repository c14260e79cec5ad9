"""Overlap, surface distances in millimetres, and how well features of the classes separate.

NumPy and SciPy only; nothing here can be jitted. Conventions, the same in every report:

  * Classes are 1..K-1; background (0) is never scored.
  * A class absent from prediction and reference is not counted for that case (values NaN, n falls).
  * A class in only one of the two is counted with Dice 0, Jaccard 0 and both distances equal to the
    image diagonal in mm, and flagged: never 0, never dropped.
  * Surface = mask minus its erosion by the face-connected cross. Outside the image is background,
    so a voxel of the mask on the edge of the image is surface.
  * HD95 = 95th percentile of the distances of both directions pooled together.
  * ASSD = mean of the distances of both directions pooled together.

These are the definitions of MedPy 0.5 (`medpy.metric.binary`: dc, jc, hd95, assd). MedPy up to 0.4
averaged the two directed means in `assd` instead, so older tables may differ slightly in ASSD.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

METRICS = ("dice", "jaccard", "hd95", "assd")


@dataclass(frozen=True)
class CaseMetrics:
    """Metrics of one case; every array has shape (K-1,), entry c-1 is class c."""

    dice: np.ndarray  # 0..1, NaN where not counted
    jaccard: np.ndarray  # 0..1, NaN where not counted
    hd95: np.ndarray  # mm, NaN where not counted
    assd: np.ndarray  # mm, NaN where not counted
    counted: np.ndarray  # bool: the class is in the prediction or in the reference
    flagged: np.ndarray  # bool: the class is in one of them only, distances are the diagonal


@dataclass(frozen=True)
class Summary:
    """Metrics over cases. The keys of the dictionaries are `METRICS`; Dice, Jaccard 0..1, rest mm.

    Standard deviations are over cases and of the population (divided by n, as `numpy.std`).
    """

    mean: dict[str, np.ndarray]  # (K-1,) over the counted cases, NaN where n is 0
    std: dict[str, np.ndarray]  # (K-1,) over the counted cases, NaN where n is 0
    n: np.ndarray  # (K-1,) int, number of cases that count
    flagged: np.ndarray  # (K-1,) int, how many of those are flagged
    overall_mean: dict[str, float]  # mean of `mean` over the classes with n > 0, NaN if none
    overall_std: dict[str, float]  # over cases, of the case's mean over its counted classes
    overall_n: int  # number of cases with at least one counted class
    overall_flagged: int  # sum of `flagged`


def case_metrics(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int, spacing: Sequence[float]
) -> CaseMetrics:
    """Dice, Jaccard, HD95 and ASSD of the classes 1..K-1 of one case.

    Args:
      prediction: class indices 0..K-1, integers, rank 2 or 3, not empty.
      reference: class indices 0..K-1, integers, same shape.
      num_classes: K, background included, at least 2.
      spacing: size of a voxel in mm along each axis of the arrays, positive.

    Returns:
      `CaseMetrics`; the rules for absent classes are at the top of this file.

    Raises:
      ValueError: shapes differ, rank is not 2 or 3, an array is empty, is not of integers or has a
        value outside 0..K-1, `spacing` does not fit, or `num_classes` is below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: needs background and at least one class")
    prediction = _check_classes("prediction", prediction, num_classes)
    reference = _check_classes("reference", reference, num_classes)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape}, reference {reference.shape}:"
            " resample the prediction to the reference's grid first"
        )
    steps = np.asarray(spacing, dtype=np.float64)
    if steps.shape != (prediction.ndim,) or not np.all(np.isfinite(steps) & (steps > 0)):
        raise ValueError(f"spacing is {spacing}: give {prediction.ndim} positive sizes in mm")

    diagonal = float(np.linalg.norm(steps * prediction.shape))
    values = {name: np.full(num_classes - 1, np.nan) for name in METRICS}
    counted = np.zeros(num_classes - 1, dtype=bool)
    flagged = np.zeros(num_classes - 1, dtype=bool)
    boxes = zip(
        ndimage.find_objects(prediction, max_label=num_classes - 1),
        ndimage.find_objects(reference, max_label=num_classes - 1),
        strict=True,
    )
    for i, (predicted_box, reference_box) in enumerate(boxes):
        if predicted_box is None and reference_box is None:
            continue
        counted[i] = True
        if predicted_box is None or reference_box is None:
            flagged[i] = True
            scores = (0.0, 0.0, diagonal, diagonal)
        else:
            # Both masks are background outside this box, and so is the outside of an image, so
            # erosion and distances are the same as on the full image without any padding.
            box = tuple(
                slice(min(p.start, r.start), max(p.stop, r.stop))
                for p, r in zip(predicted_box, reference_box, strict=True)
            )
            scores = _scores(prediction[box] == i + 1, reference[box] == i + 1, steps)
        for name, score in zip(METRICS, scores, strict=True):
            values[name][i] = score
    return CaseMetrics(**values, counted=counted, flagged=flagged)


def summarise(metrics: Sequence[CaseMetrics]) -> Summary:
    """Mean and standard deviation over cases, by class and overall.

    The convention of published tables: by class the mean over the cases that count, then the mean
    of those over the classes with n > 0. The overall standard deviation is over cases, of each
    case's mean over its counted classes.

    Args:
      metrics: one `CaseMetrics` for each case, all with the same number of classes.

    Returns:
      `Summary`. A class with n = 0 has NaN mean and std, and is left out of the overall mean.

    Raises:
      ValueError: no case given, or cases that differ in their number of classes.
    """
    sizes = {case.counted.size for case in metrics}
    if len(sizes) != 1:
        raise ValueError(
            f"{len(metrics)} cases with numbers of foreground classes {sorted(sizes)}:"
            " give at least one case, all with the same classes"
        )
    counted = np.stack([case.counted for case in metrics])  # (cases, K-1)
    mean, std, overall_mean, overall_std = {}, {}, {}, {}
    for name in METRICS:
        table = np.stack([getattr(case, name) for case in metrics])  # (cases, K-1)
        columns = [_mean_std(v[c]) for v, c in zip(table.T, counted.T, strict=True)]
        mean[name], std[name] = np.array(columns).T
        overall_mean[name] = _mean_std(mean[name][counted.any(axis=0)])[0]
        rows = [v[c].mean() for v, c in zip(table, counted, strict=True) if c.any()]
        overall_std[name] = _mean_std(np.array(rows))[1]
    flagged = np.sum([case.flagged for case in metrics], axis=0)
    return Summary(
        mean=mean,
        std=std,
        n=counted.sum(axis=0),
        flagged=flagged,
        overall_mean=overall_mean,
        overall_std=overall_std,
        overall_n=int(counted.any(axis=1).sum()),
        overall_flagged=int(flagged.sum()),
    )


def format_table(summary: Summary, class_names: Sequence[str], title: str) -> str:
    """A plain-text table, one row for each class and the mean in the last row.

    Args:
      summary: from `summarise`.
      class_names: K-1 names of the classes 1..K-1, background left out.
      title: first line, or lines, of the text.

    Returns:
      Lines joined by newlines, without one at the end. Cells are mean ± standard deviation over
      cases; a class with n = 0 is printed as n/a.

    Raises:
      ValueError: the number of names is not K-1.
    """
    if len(class_names) != summary.n.size:
        raise ValueError(
            f"{len(class_names)} class names for {summary.n.size} classes:"
            " give the names of classes 1..K-1, without background"
        )
    header = ["class", "Dice %", "Jaccard %", "HD95 mm", "ASSD mm", "n", "flagged"]

    def row(label: str, mean: list[float], std: list[float], n: int, flagged: int) -> list[str]:
        scales = (100.0, 100.0, 1.0, 1.0)
        cells = [
            f"{m * scale:.2f} ± {s * scale:.2f}" if n else "n/a" for m, s, scale in zip(mean, std, scales, strict=True)
        ]
        return [label, *cells, str(n), str(flagged)]

    rows = [
        row(
            name,
            [summary.mean[m][i] for m in METRICS],
            [summary.std[m][i] for m in METRICS],
            int(summary.n[i]),
            int(summary.flagged[i]),
        )
        for i, name in enumerate(class_names)
    ]
    overall = row(
        "mean",
        [summary.overall_mean[m] for m in METRICS],
        [summary.overall_std[m] for m in METRICS],
        summary.overall_n,
        summary.overall_flagged,
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, overall, strict=True)]
    rule = "  ".join("-" * width for width in widths)

    def line(cells: list[str]) -> str:
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest])

    note = "mean ± standard deviation over n cases; flagged: class in prediction or reference only"
    note += ", scored as Dice 0 and distance = image diagonal"
    return "\n".join([title, note, line(header), rule, *map(line, rows), rule, line(overall)])


def compactness_separability(features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[float, float]:
    """How tight the classes are in feature space and how far apart; both on unit-norm features.

    With u the features divided by their norm and m_c the mean of u over class c:

        compactness  = mean over present classes c of mean_{i in c} cos(u_i, m_c)         in 0..1
        separability = mean over pairs a < b of present classes of 1 - cos(m_a, m_b)      in 0..2

    Higher is better for both. All classes 0..K-1 count, background too, and each weighs the same
    whatever its number of members. A zero vector has cosine 0 with everything.

    Args:
      features: (N, D), finite.
      labels: (N,), integers 0..K-1.
      num_classes: K.

    Returns:
      (compactness, separability). NaN where undefined: compactness with no feature, separability
      with fewer than two classes present.

    Raises:
      ValueError: shapes do not fit, features are not finite, labels are not integers in 0..K-1.
    """
    features = np.asarray(features, dtype=np.float64)
    labels = np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {features.shape} and labels {labels.shape}: give (N, D), (N,)")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: leave those rows out")
    if labels.size == 0:
        return float("nan"), float("nan")
    labels = _check_values("labels", labels, num_classes)

    # Dividing by the largest entry first keeps the squares in the norm from under- or overflowing.
    units = _divide(features, np.abs(features).max(axis=1, initial=0.0, keepdims=True))
    units = _divide(units, np.linalg.norm(units, axis=1, keepdims=True))
    means = np.stack([units[labels == c].mean(axis=0) for c in np.unique(labels)])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    # The mean over members of u . m / |m| is |m|.
    compactness = float(lengths.mean())
    directions = _divide(means, lengths)
    first, second = np.triu_indices(len(means), k=1)
    distances = 1.0 - np.sum(directions[first] * directions[second], axis=1)
    return compactness, _mean_std(distances)[0]


def _scores(prediction: np.ndarray, reference: np.ndarray, spacing: np.ndarray) -> tuple[float, float, float, float]:
    """Dice, Jaccard, HD95 and ASSD (mm) of two masks, neither of them empty."""
    overlap = np.count_nonzero(prediction & reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, reference)]
    to_prediction, to_reference = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    distances = np.concatenate([to_reference[surfaces[0]], to_prediction[surfaces[1]]])
    return (
        2.0 * overlap / total,
        overlap / (total - overlap),
        float(np.percentile(distances, 95)),
        float(distances.mean()),
    )


def _check_classes(name: str, array: np.ndarray, num_classes: int) -> np.ndarray:
    """`array` as int32, checked to be a non-empty image of class indices 0..K-1."""
    array = np.asarray(array)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}: give a non-empty array of rank 2 or 3")
    return _check_values(name, array, num_classes)


def _check_values(name: str, array: np.ndarray, num_classes: int) -> np.ndarray:
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} has type {array.dtype}: give integer class indices")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name} has values {low}..{high}, outside 0..{num_classes - 1}:"
            " map the values in the file to class indices first"
        )
    return array.astype(np.int32, copy=False)


def _mean_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation, NaN (and no warning) for no values."""
    if values.size == 0:
        return float("nan"), float("nan")
    return float(values.mean()), float(values.std())


def _divide(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """rows / lengths, with zero rows left as they are."""
    return rows / np.where(lengths > 0, lengths, 1.0)
