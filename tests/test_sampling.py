import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sscl_jax.data import sampling
from sscl_jax.data.prepared import Case
from sscl_jax.data.recipe import Grid
from sscl_jax.data.sampling import Pool, assign_roles, canvas_shape, sample_order


def case(index, patient, split="train", shape=(3, 8, 10), has_label=True):
    grid = Grid(shape, np.eye(4), shape, (1.0, 1.0, 1.0))
    fields = {
        "index": index,
        "case_id": f"{patient}_{index}",
        "patient_id": patient,
        "split": split,
        "grid": grid,
        "has_label": has_label,
        "source": "x.nii.gz",
    }
    return Case(**{field.name: fields[field.name] for field in dataclasses.fields(Case) if field.name in fields})


SPLITS = ("train", "val", "test")


def dataset(cases):
    order = {split: list(dict.fromkeys(c.patient_id for c in cases if c.split == split)) for split in SPLITS}
    return SimpleNamespace(name="toy", cases=cases, patients=order, path=Path("toy"))


COHORT = [case(2 * i + frame, f"p{i}") for i in range(6) for frame in range(2)] + [case(12, "v0", "val")]
# Cases of no use to a decision, and a test patient.
HELD_OUT = [case(13, "v1", "val", has_label=False), case(14, "t0", "test"), case(15, "t1", "test", has_label=False)]


def patients(cases):
    return {c.patient_id for c in cases}


def test_roles_are_disjoint_in_patients_and_take_the_first():
    roles = assign_roles(dataset(COHORT + HELD_OUT[:1]), 2)
    assert patients(roles.labeled) == {"p0", "p1"} and len(roles.labeled) == 4
    assert patients(roles.unlabeled) == {"p2", "p3", "p4", "p5"} and len(roles.unlabeled) == 8
    assert patients(roles.val) == {"v0"} and not roles.test and not roles.left_out
    assert patients(assign_roles(dataset(COHORT), -1).labeled) == {f"p{i}" for i in range(6)}


def test_only_cases_with_a_label_are_measured():
    roles = assign_roles(dataset(COHORT + HELD_OUT), 2)
    assert [c.index for c in roles.val] == [12] and [c.index for c in roles.test] == [14]
    parts = [patients(p) for p in (roles.labeled, roles.unlabeled, roles.val, roles.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 8


def test_the_first_are_the_first_of_the_split_s_list_who_have_a_label():
    toy = dataset([dataclasses.replace(c, has_label=c.patient_id != "p4") for c in COHORT])
    toy.patients["train"] = ["p4", "p5", "p0", "p3", "p1", "p2"]
    roles = assign_roles(toy, 2)
    assert patients(roles.labeled) == {"p5", "p0"} and patients(roles.unlabeled) == {"p1", "p2", "p3", "p4"}
    with pytest.raises(ValueError, match="toy has 5 training patients"):
        assign_roles(toy, 6)


@pytest.mark.parametrize("number", [0, 7, -2])
def test_impossible_numbers_of_patients(number):
    with pytest.raises(ValueError, match=rf"labeled_patients={number}.*choose 1 to 6"):
        assign_roles(dataset(COHORT), number)


@pytest.mark.parametrize("seed", [-1, 0, 5])
def test_who_is_labelled_does_not_depend_on_the_masks_of_others(seed):
    chosen = patients(assign_roles(dataset(COHORT), 2, seed).labeled)
    without = [dataclasses.replace(c, has_label=c.patient_id in chosen or c.split == "val") for c in COHORT]
    roles = assign_roles(dataset(without), 2, seed)
    assert patients(roles.labeled) == chosen
    assert [c.case_id for c in roles.unlabeled] == [c.case_id for c in assign_roles(dataset(COHORT), 2, seed).unlabeled]


def test_seeds_choose_different_patients():
    assert len({frozenset(patients(assign_roles(dataset(COHORT), 2, s).labeled)) for s in range(8)}) > 1


def test_an_unlabelled_frame_of_a_labelled_patient_is_left_out_and_told():
    cases = [dataclasses.replace(c, has_label=c.index != 1) for c in COHORT]
    roles = assign_roles(dataset(cases), 1)
    assert [c.index for c in roles.labeled] == [0] and [c.index for c in roles.left_out] == [1]
    assert "p0" not in patients(roles.unlabeled)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 20))
def test_every_sample_comes_once_in_each_pass(seed, batch, size):
    steps = -(-3 * size // batch)
    stream = np.concatenate([sample_order(seed, 1, step, batch, size) for step in range(steps)])
    for first in range(0, 3 * size, size):
        assert sorted(stream[first : first + size]) == list(range(size))


def test_the_order_of_a_step_depends_on_nothing_before_it():
    order = [sample_order(7, 1, step, 4, 10).tolist() for step in range(12)]
    sampling._shuffled.cache_clear()
    assert [sample_order(7, 1, step, 4, 10).tolist() for step in reversed(range(12))] == order[::-1]
    passes = np.concatenate(order)[:40].reshape(4, 10)
    assert len({tuple(row) for row in passes}) == 4  # shuffled anew for each pass


def test_order_depends_on_seed_and_stream():
    orders = {tuple(sample_order(seed, stream, 0, 20, 20)) for seed in (0, 1) for stream in (0, 1)}
    assert len(orders) == 4


class Volumes(SimpleNamespace):
    """A data set of volumes whose voxels say where they are."""

    def __init__(self, shapes, channels=1):
        super().__init__(channels=channels, opened=[])
        self.cases = [case(i, f"p{i}", shape=shape) for i, shape in enumerate(shapes)]

    def image(self, index):
        shape = self.cases[index].grid.shape
        values = 1000.0 * index + np.arange(np.prod(shape)).reshape(*shape, 1)
        return (values + 0.25 * np.arange(self.channels)).astype(np.float32)

    def label(self, index):
        self.opened.append(index)
        return (self.image(index)[..., 0] % 5).astype(np.uint8)


def test_slices_lie_centred_on_the_canvas():
    volumes = Volumes([(3, 7, 10), (2, 9, 4)])
    canvas = canvas_shape(volumes.cases, (4, 4))
    assert canvas == (9, 10)
    pool = Pool(volumes, volumes.cases, canvas, labeled=True)
    assert len(pool.samples) == 5
    batch = pool.batch(np.array([2, 3]))
    np.testing.assert_array_equal(batch["image"][0, 1:8, :, 0], volumes.image(0)[2, :, :, 0])
    np.testing.assert_array_equal(batch["image"][0, [0, 8], :, 0], volumes.image(0)[2].min())
    np.testing.assert_array_equal(batch["image"][1, :, 3:7, 0], volumes.image(1)[0, :, :, 0])
    np.testing.assert_array_equal(batch["label"][1, :, 3:7], volumes.label(1)[0])
    assert not batch["label"][1, :, :3].any()
    np.testing.assert_array_equal(batch["extent"], [[7, 10], [9, 4]])
    np.testing.assert_allclose(batch["depth"], [[2.5 / 3] * 2, [0.5 / 2] * 2], rtol=1e-6)
    assert pool.names(np.array([2, 3])) == ["p0_0", "p1_1"]


def test_a_smaller_canvas_takes_the_centre():
    volumes = Volumes([(1, 7, 10)])
    batch = Pool(volumes, volumes.cases, (5, 4), labeled=False).batch(np.array([0]))
    np.testing.assert_array_equal(batch["image"][0, ..., 0], volumes.image(0)[0, 1:6, 3:7, 0])
    np.testing.assert_array_equal(batch["extent"], [[5, 4]])


def test_every_channel_is_read():
    volumes = Volumes([(1, 3, 4)], channels=2)
    batch = Pool(volumes, volumes.cases, (3, 4), labeled=False).batch(np.array([0]))
    np.testing.assert_array_equal(batch["image"], volumes.image(0))


def test_each_channel_is_surrounded_by_its_own_minimum():
    volumes = Volumes([(1, 3, 4)], channels=2)
    for canvas in ((5, 4), (3, 5, 4)):
        batch = Pool(volumes, volumes.cases, canvas, labeled=False).batch(np.array([0]))
        np.testing.assert_array_equal(batch["image"].reshape(-1, 5, 4, 2)[0, 0], np.full((4, 2), [0, 0.25]))


def test_volumes_for_rank_three():
    volumes = Volumes([(3, 4, 5), (2, 6, 5)])
    pool = Pool(volumes, volumes.cases, canvas_shape(volumes.cases, (2, 2, 2)), labeled=True)
    batch = pool.batch(np.array([1]))
    assert batch["image"].shape == (1, 3, 6, 5, 1) and batch["label"].shape == (1, 3, 6, 5)
    np.testing.assert_array_equal(batch["image"][0, :2], volumes.image(1))
    np.testing.assert_array_equal(batch["depth"], [[0, 1]])


def test_an_unlabelled_pool_never_opens_a_label():
    volumes = Volumes([(3, 7, 10)])
    batch = Pool(volumes, volumes.cases, (8, 10), labeled=False).batch(np.arange(3))
    assert "label" not in batch and not volumes.opened
