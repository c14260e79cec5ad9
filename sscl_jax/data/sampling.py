"""Which patients play which part, and which slices make up the batch of a step.

The batch of a step is a pure function of (seed, step): a resumed training sees the data it would have seen.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np

from sscl_jax.data.prepared import Case, PreparedDataset


@dataclasses.dataclass(frozen=True)
class Roles:
    """The part each case plays in a training. Labelled, unlabelled, val and test are disjoint in patients.

    Attributes:
      labeled: training cases whose labels are read.
      unlabeled: training cases whose labels, if any, are never read.
      val: cases for every decision.
      test: cases looked at once, at the end.
      left_out: training cases without a label of a patient who counts as labelled.
    """

    labeled: list[Case]
    unlabeled: list[Case]
    val: list[Case]
    test: list[Case]
    left_out: list[Case]


def assign_roles(dataset: PreparedDataset, labeled_patients: int, labeled_seed: int = -1) -> Roles:
    """Makes the first `labeled_patients` patients of the training split the labelled ones.

    Args:
      dataset: the prepared dataset.
      labeled_patients: number of patients whose labels are used; -1 for all who have one.
      labeled_seed: -1 keeps the order of the split's own list, in which the conventional subsets are the first
        ones; otherwise patients are ordered by a hash of seed and id, so that who else has a label changes nothing.

    Raises:
      ValueError: the number does not fit the patients there are. An empty val or test set is no error.
    """
    train = [case for case in dataset.cases if case.split == "train"]
    with_label = {case.patient_id for case in train if case.has_label}
    order = [patient for patient in dataset.patients["train"] if patient in with_label]
    if labeled_seed >= 0:
        order.sort(key=lambda patient: hashlib.sha256(f"{labeled_seed}/{patient}".encode()).digest())
    if labeled_patients == -1:
        labeled_patients = len(order)
    if not 1 <= labeled_patients <= len(order):
        raise ValueError(
            f"data.labeled_patients={labeled_patients}: {dataset.name} has {len(order)} training patients with "
            f"labels; choose 1 to {len(order)}, or -1 for all."
        )
    chosen = set(order[:labeled_patients])
    return Roles(
        labeled=[case for case in train if case.patient_id in chosen and case.has_label],
        unlabeled=[case for case in train if case.patient_id not in chosen],
        val=[case for case in dataset.cases if case.split == "val" and case.has_label],
        test=[case for case in dataset.cases if case.split == "test" and case.has_label],
        left_out=[case for case in train if case.patient_id in chosen and not case.has_label],
    )


def patients_of_fraction(dataset: PreparedDataset, fraction: float) -> int:
    """How many patients a share of the training patients is: rounded down as published subsets are, at least 1.

    The share is of all training patients, with a label or not, so that it does not depend on the labels of those who
    play the unlabelled part. 5 % of 70 are 3, and 10 % are 7.
    """
    patients = len(dataset.patients["train"])
    return max(1, int(fraction * patients + 1e-9))  # 0.29 * 100 is a little less than 29


def classes_held(dataset: PreparedDataset, cases: list[Case]) -> dict[str, set[int]]:
    """Classes in the prepared label of each case, background left out, by case id; reads the labels.

    Raises:
      ValueError: a label has a class that there is not. JAX would take it for another one and say nothing.
    """
    held = {}
    for case in cases:
        classes = {int(c) for c in np.unique(dataset.label(case.index))}
        if max(classes) >= dataset.num_classes:
            raise ValueError(
                f"case {case.case_id}: its label has class {max(classes)}, but the classes are 0 to "
                f"{dataset.num_classes - 1}: {dataset.path} is damaged, prepare it again."
            )
        held[case.case_id] = classes - {0}
    return held


def identity(dataset: PreparedDataset, roles: Roles) -> dict[str, str]:
    """What a training must find unchanged to go on: `fingerprint`, of all but the labels, and `labels`.

    The second is of who is labelled or val, and of their labels, which it reads; no others are read.
    """
    labels = digest_of_labels(dataset, roles.labeled) + digest_of_labels(dataset, roles.val)
    return {"fingerprint": dataset.fingerprint, "labels": labels}


def digest_of_labels(dataset: PreparedDataset, cases: list[Case]) -> str:
    """sha256 (hex) of the names of cases and of their labels, on both grids."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.case_id}\n".encode())
        digest.update(dataset.label(case.index).data)
        digest.update(dataset.native_label(case.index).data)
    return digest.hexdigest()


def unpredicted(before: dict[str, int], wanted: set[int], predicted: set[int]) -> dict[str, int]:
    """How many evaluations in a row a class of the references was predicted in no case, by class; others are left out.

    Args:
      before: what this function gave at the evaluation before, {} at the first. Classes are text, as JSON wants keys.
      wanted: classes of the references.
      predicted: classes of all predictions of this evaluation.
    """
    return {str(c): before.get(str(c), 0) + 1 for c in sorted(wanted - predicted)}


def sample_order(seed: int, stream: int, step: int, batch: int, size: int) -> np.ndarray:
    """Indices (batch,) in [0, size) of the samples of a step: shuffled passes over all samples, one after another."""
    places = step * batch + np.arange(batch)
    return np.array([_shuffled(seed, stream, int(p // size), size)[p % size] for p in places])


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    # RandomState's stream is frozen, so the order survives an update of NumPy between two halves of a training.
    return np.random.RandomState([seed, stream, epoch]).permutation(size)


class Pool:
    """The samples of some cases: every slice (rank 2) or every volume (rank 3), each on a canvas of one size.

    An image lies centred on the canvas; what surrounds it holds the sample's minimum in each channel.
    """

    def __init__(self, dataset: PreparedDataset, cases: list[Case], canvas: tuple[int, ...], labeled: bool):
        self.dataset = dataset
        self.canvas = canvas
        self.labeled = labeled
        depth = lambda case: case.grid.shape[0] if len(canvas) == 2 else 1  # noqa: E731
        self.samples = [(case, index) for case in cases for index in range(depth(case))]

    def size_in_bytes(self) -> int:
        """Of a batch that holds every sample once."""
        values = 4 * self.dataset.channels + self.labeled
        return len(self.samples) * (math.prod(self.canvas) * values + 4 * (len(self.canvas) + 2))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads samples.

        Returns:
          `image` (n, *canvas, channels) float32; `extent` (n, rank) and `depth` (n, 2) float32, see
          `train_step.draw_views`; `label` (n, *canvas) uint8 if labelled.
        """
        rank, n = len(self.canvas), len(indices)
        result = {
            "image": np.empty((n, *self.canvas, self.dataset.channels), np.float32),
            "extent": np.empty((n, rank), np.float32),
            "depth": np.empty((n, 2), np.float32),
        }
        if self.labeled:
            result["label"] = np.zeros((n, *self.canvas), np.uint8)
        for row, sample in enumerate(indices):
            case, index = self.samples[sample]
            image = self.dataset.image(case.index)
            place: Any
            place, source = _centred(image.shape[3 - rank : 3], self.canvas)
            part: Any = (index, *source) if rank == 2 else source
            values = image[part]
            result["image"][row] = values.min(axis=tuple(range(rank)))
            result["image"][(row, *place)] = values
            result["extent"][row] = [p.stop - p.start for p in place]
            slices = case.grid.shape[0]
            result["depth"][row] = (index + 0.5) / slices if rank == 2 else (0.0, 1.0)
            if self.labeled:
                result["label"][(row, *place)] = self.dataset.label(case.index)[part]
        return result

    def names(self, indices: np.ndarray) -> list[str]:
        """Case ids of samples."""
        return [self.samples[sample][0].case_id for sample in indices]


def canvas_shape(cases: list[Case], patch: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest canvas that holds every image of the cases and a patch."""
    rank = len(patch)
    shapes = np.array([case.grid.shape[3 - rank :] for case in cases] + [patch])
    return tuple(int(n) for n in shapes.max(axis=0))


def _centred(size: tuple[int, ...], canvas: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where on the canvas an image goes, and which part of it (all, unless the canvas is smaller)."""
    place, source = [], []
    for n, m in zip(size, canvas, strict=True):
        kept = min(n, m)
        place.append(slice((m - kept) // 2, (m - kept) // 2 + kept))
        source.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
    return tuple(place), tuple(source)
