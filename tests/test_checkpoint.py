import os
import shutil

import jax
import numpy as np
import optax
import pytest

from sscl_jax import checkpoint
from sscl_jax.checkpoint import Checkpoints
from sscl_jax.train_state import TrainState


def make_state(step=0, width=3, stats=None):
    random = np.random.default_rng(step)
    network = lambda: {  # noqa: E731
        "encoder": {"kernel": random.normal(size=(2, width)).astype("f4"), "scale": np.float32(random.normal())},
        "decoder": {"kernel": random.normal(size=(width,)).astype("f4")},
    }
    student = network()
    # Some moments that are not 0.
    optimizer = optax.adamw(1e-3)
    opt_state = jax.tree.map(np.asarray, optimizer.update(network(), optimizer.init(student), student)[1])
    return TrainState(np.int32(step), np.uint32(7), student, network(), stats or {}, stats or {}, opt_state)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of the steps 1, 2 and 3, of which the two last are kept."""
    checkpoints = Checkpoints(tmp_path, "last")
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), {"note": f"step {step}"})
    return tmp_path


def test_round_trip_keeps_every_bit(tmp_path):
    state = make_state(7, stats={"bn": {"mean": np.array([np.pi, -0.0, 1e-40], "f4")}})
    meta = {"config": {"a": [1, 2.5, None, "x"]}, "best": {"step": 3, "dice": 0.1 + 0.2}}
    Checkpoints(tmp_path, "last").save(state, meta)
    target = make_state(0, stats={"bn": {"mean": np.zeros(3, "f4")}})
    restored, found = Checkpoints(tmp_path, "last").restore(target)
    assert_same(restored, state)
    assert {name: found[name] for name in meta} == meta


def test_the_newest_is_restored_and_two_are_kept(saved):
    checkpoints = Checkpoints(saved, "last")
    assert checkpoints.steps() == [2, 3]
    state, meta = checkpoints.restore(make_state())
    assert_same(state, make_state(3))
    assert meta["note"] == "step 3"


def test_best_keeps_one(tmp_path):
    best = Checkpoints(tmp_path, "best")
    best.save(make_state(1), {})
    best.save(make_state(2), {})
    assert best.steps() == [2]


def test_an_empty_folder_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path, "last").restore(make_state()) is None


def test_a_checkpoint_of_another_version_is_told_from_one_of_another_network(tmp_path, monkeypatch):
    tree = checkpoint._to_tree
    with monkeypatch.context() as patch:  # the state before it held the seed
        patch.setattr(checkpoint, "_to_tree", lambda s: {name: v for name, v in tree(s).items() if name != "seed"})
        Checkpoints(tmp_path, "last").save(make_state(1), {})
    with pytest.raises(ValueError, match=r"last/1 was saved by another version of sscl_jax \(differs in: seed\)"):
        Checkpoints(tmp_path, "last").restore(make_state())


def data_file(folder):
    return max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def damage_truncate(folder):
    largest = data_file(folder)
    os.truncate(largest, largest.stat().st_size // 2)


def damage_one_bit(folder):
    largest = data_file(folder)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def damage_no_meta(folder):
    shutil.rmtree(folder / "meta")


def damage_no_state(folder):
    shutil.rmtree(folder / "state")


def damage_empty_meta(folder):
    for path in (folder / "meta").rglob("*"):
        path.write_bytes(b"")


DAMAGES = [damage_truncate, damage_one_bit, damage_no_meta, damage_no_state, damage_empty_meta]


# When one array cannot be read, Orbax closes its event loop while tensorstore still reads the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(saved, damage):
    folder = saved / "checkpoints" / "last"
    damage(folder / "3")
    with pytest.warns(UserWarning, match=r"last/3 cannot be read .* set aside as damaged-last-3"):
        state, meta = Checkpoints(saved, "last").restore(make_state())
    assert_same(state, make_state(2))
    assert meta["note"] == "step 2"
    assert (folder.parent / "damaged-last-3").is_dir()
    # And the training can go on and save that step again.
    checkpoints = Checkpoints(saved, "last")
    checkpoints.save(make_state(3), {})
    assert_same(checkpoints.restore(make_state())[0], make_state(3))


@pytest.mark.filterwarnings("ignore:.*cannot be read.*; it is set aside")
def test_a_step_that_is_damaged_twice(saved):
    for _ in range(2):
        damage_no_meta(saved / "checkpoints" / "last" / "3")
        checkpoints = Checkpoints(saved, "last")
        assert_same(checkpoints.restore(make_state())[0], make_state(2))
        checkpoints.save(make_state(3), {})
    assert_same(checkpoints.restore(make_state())[0], make_state(3))


@pytest.mark.filterwarnings("ignore:.*cannot be read.*; the one before it is used")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_reading_without_training_changes_no_file(saved, damage):
    damage(saved / "checkpoints" / "last" / "3")
    before = {p: p.read_bytes() for p in sorted(saved.rglob("*")) if p.is_file()}
    checkpoints = Checkpoints(saved, "last")
    step, meta = checkpoints.newest()
    assert meta["note"] == f"step {step}"
    assert_same(checkpoints.restore(make_state(), set_aside=False)[0], make_state(2))
    assert {p: p.read_bytes() for p in sorted(saved.rglob("*")) if p.is_file()} == before


def test_all_damaged_is_an_error_that_names_the_remedy(saved):
    for step in (2, 3):
        damage_no_meta(saved / "checkpoints" / "last" / str(step))
    with pytest.raises(OSError, match=r"none of .*\[2, 3\].*delete the folder"):
        Checkpoints(saved, "last").newest()
    with pytest.warns(UserWarning), pytest.raises(OSError, match=r"none of .*\[2, 3\].*delete the folder"):
        Checkpoints(saved, "last").restore(make_state())


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path):
    """Of `best` one is kept, and a training may save the next at any time."""
    for read in (lambda c: c.restore(make_state(), set_aside=False)[0], lambda c: make_state(c.newest()[0])):
        Checkpoints(tmp_path, "best").save(make_state(1), {})
        reader = Checkpoints(tmp_path, "best")
        assert reader.steps() == [1]
        Checkpoints(tmp_path, "best").save(make_state(2), {})
        assert_same(read(reader), make_state(2))
        shutil.rmtree(tmp_path / "checkpoints")


def test_half_written_checkpoints_are_ignored(saved):
    folder = saved / "checkpoints" / "last"
    for name in ("4.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(folder / "3", folder / name)
    checkpoints = Checkpoints(saved, "last")
    assert checkpoints.steps() == [2, 3]
    assert_same(checkpoints.restore(make_state())[0], make_state(3))
    checkpoints.save(make_state(4), {})
    assert_same(checkpoints.restore(make_state())[0], make_state(4))


def test_another_architecture_is_refused_with_the_differences(saved):
    with pytest.raises(ValueError, match=r"another network or label set") as error:
        Checkpoints(saved, "last").restore(make_state(width=5))
    assert "encoder/kernel: saved [2, 3], wanted [2, 5]" in str(error.value)
    with pytest.raises(ValueError, match="student_stats/bn/mean: saved absent, wanted"):
        Checkpoints(saved, "last").restore(make_state(stats={"bn": {"mean": np.zeros(2, "f4")}}))
    assert Checkpoints(saved, "last").steps() == [2, 3]  # nothing was set aside


def test_a_step_that_is_there_is_not_written_again(saved):
    checkpoints = Checkpoints(saved, "last")
    checkpoints.save(make_state(3), {"note": "again"})
    assert checkpoints.restore(make_state())[1]["note"] == "step 3"


def test_an_older_step_cannot_be_saved_after_a_newer_one(saved):
    with pytest.raises(OSError, match="checkpoint 1 could not be written"):
        Checkpoints(saved, "last").save(make_state(1), {})
