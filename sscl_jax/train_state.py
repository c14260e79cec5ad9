"""Everything a training must remember between two steps."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sscl_jax.models import UNet


class TrainState(flax.struct.PyTreeNode):
    """State of a training. Random keys are not in it: they are derived from the seed and the step.

    Attributes:
      step: () int32, number of optimiser steps done.
      seed: () uint32, of all randomness in the steps. Here and not in the program, so that trainings which differ in
        nothing else share what was compiled.
      student: parameters that the optimiser trains, in the groups `encoder`, `decoder` and `projector`.
      teacher: exponential moving average of them; never receives a gradient.
      student_stats: running statistics of the student's batch norm; {} with group norm.
      teacher_stats: their exponential moving average.
      opt_state: state of the optimiser.
    """

    step: jax.Array
    seed: jax.Array
    student: Any
    teacher: Any
    student_stats: Any
    teacher_stats: Any
    opt_state: optax.OptState


def create_train_state(
    model: UNet,
    optimizer: optax.GradientTransformation,
    seed: int,
    patch_size: tuple[int, ...],
    channels: int,
) -> TrainState:
    """A student initialised from `seed`, and a teacher that is a copy of it.

    A copy, not the same buffers: the step donates its state, and a buffer can be donated only once.
    """
    images = jnp.zeros((1, *patch_size, channels))
    variables = jax.jit(model.init)(jax.random.key(seed), images)
    student, stats = variables["params"], variables.get("batch_stats", {})
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        student=student,
        teacher=copy(student),
        student_stats=stats,
        teacher_stats=copy(stats),
        opt_state=optimizer.init(student),
    )
