"""Saves and restores a training with Orbax: the last states, for going on, and the best on val, for use.

    WORKDIR/checkpoints/last/STEP     the two last ones, so that one is left if the other is damaged
    WORKDIR/checkpoints/best/STEP     the one with the best val Dice

Each holds the state as arrays and a JSON `meta`: config, preprocessing recipe, shapes, and what the loop remembers.
Orbax writes under a temporary name and renames, so a half-written checkpoint is never taken for a whole one.

Where there are several processes all must call `save`, `newest` and `restore`. Process 0 alone touches the files, and
tells the others: each for itself might take another checkpoint for the newest good one. `steps` and `meta` are for it.
"""

import functools
import hashlib
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from sscl_jax import parallel
from sscl_jax.train_state import TrainState

# Orbax tells every step of its work, and every error with its traceback before it raises it. We say what matters.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one kind, `last` or `best`, of a training."""

    def __init__(self, workdir: Path, kind: str):
        _hush()
        self.folder = Path(os.path.abspath(workdir)) / "checkpoints" / kind

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2 if self.folder.name == "last" else 1,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a host copy of the state (NumPy leaves) and JSON values under the state's step.

        Raises:
          OSError: nothing could be written (disk full, no permission); earlier checkpoints stay as they are.
        """
        parallel.from_main(lambda: self._save(state, meta))

    def _save(self, state: TrainState, meta: dict[str, Any]) -> None:
        step, tree = int(state.step), _to_tree(state)
        if step in self.steps():  # a resumed run evaluates the same step again
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(tree),
            meta=ocp.args.JsonSave({**meta, "shapes": _shapes(tree), "digest": _digest(tree)}),
        )
        try:
            if not self._manager.save(step, args=arguments):
                raise RuntimeError(f"a later one exists: {self.steps()}")
        except Exception as error:  # Orbax and tensorstore raise ValueError for a full disk
            reason = "no space left on device" if "No space left" in str(error) else _first_line(error)
            raise OSError(
                f"{self.folder}: checkpoint {step} could not be written ({reason}). Free some space "
                "or choose another --workdir, then run the same command again: it goes on from the last one."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON values saved with a checkpoint."""
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments).meta

    def drop_later(self, step: int) -> bool:
        """Removes checkpoints of later steps than the one that a training goes on from; whether there were any."""
        return parallel.from_main(lambda: self._drop_later(step))

    def _drop_later(self, step: int) -> bool:
        later = [each for each in self.steps() if each > step]
        for each in later:
            shutil.rmtree(self.folder / str(each))
        if later:
            del self._manager  # it has read the folder
        return bool(later)

    def tidy(self) -> None:
        """Removes what a save left that was killed; for a training, when no other runs in its folder."""
        if parallel.is_main_process():
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and JSON values of the newest checkpoint that has readable ones; None if there is no checkpoint.

        Raises:
          OSError: there are checkpoints but none can be read.
        """
        return parallel.from_main(self._newest)

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        found = self.steps()
        for step in reversed(found):
            try:
                meta = self.meta(step)
            except Exception:
                if self._changed(found):
                    return self._newest()
                continue
            if "shapes" in meta:
                return step, meta
        self._refuse_if_any(found)
        return None

    def _changed(self, found: list[int]) -> bool:
        """Whether a training has saved since, and so removed what was found."""
        del self._manager  # it has read the folder
        return self.steps() != found

    def restore(self, target: TrainState, set_aside: bool = True) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as NumPy arrays, with its JSON values; None if there is none.

        A damaged one is passed over with a warning, and the one before it taken.

        Args:
          target: a state of the wanted shapes.
          set_aside: also rename a damaged one to `damaged-KIND-STEP`, so that a training can save that step anew.

        Raises:
          ValueError: the checkpoint is of another architecture or label set; the differences are listed.
          OSError: there are checkpoints but none can be read.
        """
        return parallel.from_main(lambda: self._restore(target, set_aside))

    def _restore(self, target: TrainState, set_aside: bool) -> tuple[TrainState, dict[str, Any]] | None:
        found = self.steps()
        for step in reversed(found):
            try:
                meta = self.meta(step)
                shapes = meta["shapes"]
            except Exception as error:
                if not set_aside and self._changed(found):
                    return self._restore(target, set_aside)
                self._pass_over(step, error, set_aside)
                continue
            tree = _to_tree(target)
            _check_shapes(shapes, _shapes(tree), self.folder / str(step))
            try:
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(tree))
                restored = self._manager.restore(step, args=arguments).state
                if _digest(restored) != meta["digest"]:  # Orbax itself does not notice a flipped bit
                    raise ValueError("its content is not what was saved")
            except Exception as error:
                if not set_aside and self._changed(found):
                    return self._restore(target, set_aside)
                self._pass_over(step, error, set_aside)
                continue
            return flax.serialization.from_state_dict(target, restored), meta
        self._refuse_if_any(found)
        return None

    def _refuse_if_any(self, found: list[int]) -> None:
        if found:
            raise OSError(
                f"{self.folder}: none of the checkpoints {found} can be read: train anew in another --workdir, or "
                "delete the folder."
            )

    def _pass_over(self, step: int, error: Exception, set_aside: bool) -> None:
        aside = self.folder.parent / f"damaged-{self.folder.name}-{step}"
        told = f"; it is set aside as {aside.name}" if set_aside else ""
        warnings.warn(
            f"{self.folder / str(step)} cannot be read ({_first_line(error)}){told}; the one before it is used.",
            stacklevel=6,
        )
        if set_aside:
            if aside.exists():  # of the same step, which was saved anew since
                shutil.rmtree(aside)
            os.replace(self.folder / str(step), aside)
            del self._manager  # likewise


@functools.cache
def _hush() -> None:
    """Once one array could not be read or written, those after it report to an event loop that Orbax has closed."""
    unraisable, uncaught = sys.unraisablehook, sys.excepthook
    told = "Event loop is closed"
    sys.unraisablehook = lambda args: None if str(args.exc_value) == told else unraisable(args)
    sys.excepthook = lambda kind, error, trace: None if str(error) == told else uncaught(kind, error, trace)


def _to_tree(state: TrainState) -> dict[str, Any]:
    """Nested dictionaries of arrays; Orbax takes no NumPy scalars, so those become arrays of rank 0."""
    return jax.tree.map(np.asarray, flax.serialization.to_state_dict(state))


def _shapes(tree: dict[str, Any]) -> dict[str, list[int]]:
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: list(leaf.shape) for name, leaf in flat.items()}


def _digest(tree: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flax.traverse_util.flatten_dict(tree, sep="/").items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _check_shapes(saved: dict[str, list[int]], wanted: dict[str, list[int]], path: Path) -> None:
    names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if own := [name for name in names if "/" not in name]:  # fields of the state itself, no arrays of a network
        raise ValueError(
            f"{path} was saved by another version of sscl_jax (differs in: {', '.join(own)}). Use the version that "
            "run.json of the training names, or train anew in another --workdir."
        )
    if names:
        lines = [f"{n}: saved {saved.get(n, 'absent')}, wanted {wanted.get(n, 'absent')}" for n in names]
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise ValueError(
            f"{path} is of another network or label set than the config asks for, or of another version of sscl_jax. "
            f"{'; '.join(lines[:5])}{more}. "
            "Use the config it was trained with, or another --workdir."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
