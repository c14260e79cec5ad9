"""Devices and hosts. The only file that says pmap."""

import contextlib
import ctypes
import functools
import io
import os
import pickle
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sscl_jax.data import workers

AXIS = "devices"

# In seconds. Of a process that is not heard of for so long, jax takes it that it is dead, and ends the others. At their
# end the others wait for process 0, which draws the pictures.
_join = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=60, shutdown_timeout_seconds=3600)

# Of glibc's malloc.h: no blocks straight from the system (M_MMAP_MAX), one heap, since only that of the main thread can
# grow at will (M_ARENA_MAX), of which nothing is given back (M_TRIM_THRESHOLD).
_KEEP_MEMORY = ((-4, 0), (-8, 1), (-1, -1))


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
        _join(coordinator, num_processes, process_id)
        _connect()
        return
    # Of the step, which srun begins: SLURM_NTASKS is also set for a single process in a job of several tasks.
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if several or pod or distributed:
        _join()
        _connect()


def _connect() -> None:
    """Lets the devices meet while the processes are in step, as they are once each knows of all devices.

    On CPUs one that comes 30 seconds late to what first connects them, since it reads or compiles for longer, is given
    up. Devices are connected in the groups that the collectives below and those of the step need.
    """
    agreed(0)
    jax.block_until_ready(jax.pmap(lambda x: jax.lax.psum(x, AXIS), AXIS)(np.zeros(jax.local_device_count())))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """One of several processes that fails says why and ends, so that the others do not wait for it.

    Left to itself it would wait at its end for the others, which wait for it in their next step.
    """
    try:
        yield
    except BaseException as error:
        together = isinstance(error, SystemExit) and not isinstance(error.code, str)  # done, or stopped by a signal
        if together or not jax.distributed.is_initialized():
            raise
        if is_of_another(error) and not os.environ.get("SSCL_TRACEBACK"):
            reason = " ".join(str(error).removeprefix("error: ").split())
            print(f"error: another process has ended ({reason}): see why, and give the same commands", file=sys.stderr)
        elif isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(5)  # the others may be about to fail for the same reason, and to say so
        os._exit(1)


def is_of_another(error: BaseException) -> bool:
    """Whether an error came of the end of another process; so told on CPU alone, elsewhere jax ends this one."""
    return "Gloo" in str(error)


def keep_memory() -> None:
    """Keeps what this process frees for its next use, where the C library is glibc; call it before anything computes.

    XLA asks for the intermediate results of a step anew each time, on CPU from malloc. By itself, glibc gives blocks
    so large back to the system at once, which then clears every page again: benchmarks/RESULTS.md says what that takes.
    The process holds at least the most that it ever used until it ends. With an environment variable of glibc's own,
    MALLOC_..., nothing is done: whoever set it knows better.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries, and macOS, have no such function
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for option, value in _KEEP_MEMORY:
        mallopt(option, value)


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


def in_shares(function: Callable[[Any], Sequence[np.ndarray]], items: Sequence[Any]) -> list[Sequence[np.ndarray]]:
    """`[function(item) for item in items]`, each process on its share of the items; all get all the results.

    A process works in two threads, so that its devices compute for one item while the host works on another.

    Args:
      function: gives arrays of any number, shape and type, to the bit the same wherever it is called.
      items: the same in all processes; there may be fewer than processes.

    Returns:
      The arrays of every item, in the order of the items.
    """
    count, index = jax.process_count(), jax.process_index()
    share = range(index, len(items), count)
    results = workers.map_ahead(function, [items[i] for i in share], threads=2)
    if count == 1:
        return list(results)
    # Only arrays of one shape can be gathered, and doubles not at all: they travel as the bytes of a file.
    file = io.BytesIO()
    named = {f"{i} {j}": array for i, arrays in zip(share, results, strict=True) for j, array in enumerate(arrays)}
    np.savez_compressed(file, **named)  # type: ignore[arg-type]
    sent = np.frombuffer(file.getvalue(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(sent.size))
    received = multihost_utils.process_allgather(np.pad(sent, (0, sizes.max() - sent.size)))
    gathered: list[list[np.ndarray]] = [[] for _ in items]
    for part, size in zip(received, sizes, strict=True):
        with np.load(io.BytesIO(part[:size].tobytes())) as arrays:
            for name in arrays:
                gathered[int(name.split()[0])].append(arrays[name])
    return list(gathered)


def from_main(function: Callable[[], Any]) -> Any:
    """`function()`, called in process 0 alone; all processes get the result, so that they cannot disagree on it.

    All must ask at the same step. For what several processes might each find otherwise, or do twice: files, say.

    Raises:
      ValueError, OSError: `function` raised it; all raise it, for the same remedy.
    """
    if jax.process_count() == 1:
        return function()
    told: tuple[Any, Exception | None] = None, None
    if is_main_process():
        try:
            told = function(), None
        except (ValueError, OSError) as error:
            told = None, error
    # As bytes, since a sum over the processes, which is how jax tells the others, turns -0.0 into 0.0.
    sent = np.frombuffer(pickle.dumps(told), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.frombuffer(np.int64(sent.size).tobytes(), np.uint8)).view(np.int64)
    received = multihost_utils.broadcast_one_to_all(sent if is_main_process() else np.zeros(size, np.uint8))
    result, failure = told if is_main_process() else pickle.loads(received.tobytes())
    if failure:
        raise failure
    return result


def is_main_process() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory of the host, or of a device, did not suffice."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


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


@functools.partial(jax.pmap, axis_name=AXIS, in_axes=(None, 0))
def gather(samples: Any, indices: jax.Array) -> Any:
    """Rows of every array of `samples`, which each device holds, by the indices of each device; split as by `shard`."""
    return jax.tree.map(lambda x: x[indices], samples)


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
    return jax.device_put(to_host(tree), on_every_device())  # a copy, since the step takes its state's memory over


def on_every_device() -> jax.sharding.Sharding:
    """The layout of an array that each device of this process holds whole."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def to_host(tree: Any) -> Any:
    """Copies a replicated tree to NumPy arrays on the host."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0) if isinstance(x, jax.Array) else x), tree)
