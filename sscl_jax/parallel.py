"""Devices and hosts. The only file that says pmap."""

import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AXIS = "devices"


def initialise_hosts(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, distributed: bool = False
) -> None:
    """Joins the processes of a training, when there are several.

    Without arguments jax finds the others itself under SLURM and Open MPI.

    Args:
      coordinator: `host:port` of process 0, where jax cannot find it.
      num_processes: number of processes, with `coordinator`.
      process_id: number of this process, with `coordinator`.
      distributed: let jax find the others itself wherever it can, as on a slice of a TPU pod.
    """
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--coordinator={coordinator} needs --num_processes (is {num_processes}) and --process_id "
                f"(is {process_id}) from 0 to num_processes - 1."
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
        return
    several = int(os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if several or pod or distributed:
        jax.distributed.initialize()


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that a training that goes on need not compile them again.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 keeps none. Without a home that can
    be written to, none is kept either. Each machine has a folder of its own, since a home may be shared by machines
    whose processors differ.
    """
    chosen, enabled = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if chosen or not enabled:
        return
    caches = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not caches.is_absolute():  # there is no home
        return
    folder = caches / "sscl_jax" / (platform.node() or "machine")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def agreed(value: int) -> int:
    """The greatest of the values that the processes give; all of them must ask at the same step."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def is_main_process() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def peak_memory() -> float:
    """Greatest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def local_slice(global_batch: int) -> slice:
    """The part of the global batch that this process feeds to its devices.

    Raises:
      ValueError: the devices cannot share the batch equally.
    """
    devices = jax.device_count()
    if global_batch % devices:
        raise ValueError(
            f"a batch of {global_batch} does not divide over {devices} devices: set data.labeled_batch and "
            f"data.unlabeled_batch to multiples of {devices}."
        )
    size = global_batch // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def shard(batch: Any) -> Any:
    """Splits the leading axis of every array over this process's devices: (b, ...) to (devices, b / devices, ...)."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def parallel_step(
    step: Callable[[Any, Any], tuple[Any, Any]],
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Maps `step(state, batch)` over the devices: state and metrics are the same on all, the batch is split.

    The state is donated. It has no leading device axis, neither before nor after.
    """
    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=(0,))


def replicate(tree: Any) -> Any:
    """Copies a tree to every device of this process, laid out as the step returns its state.

    Any other layout would make the second call compile the step a second time.
    """
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(to_host(tree), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def to_host(tree: Any) -> Any:
    """Copies a replicated tree to NumPy arrays on the host."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0) if isinstance(x, jax.Array) else x), tree)
