"""Who works on the cases: threads of this process, other processes, or the workers of an Apache Beam pipeline."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

# 0: threads of this process; n: so many processes; a list: the options of an Apache Beam pipeline.
Workers = int | Sequence[str]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def map_ahead(
    function: Callable[[_In], _Out], items: Iterable[_In], workers: Workers = 0, threads: int = 0
) -> Generator[_Out, None, None]:
    """`map` in threads, or in processes: results in order, with only a few more of them made than are taken.

    Without `threads` as many as there are cores do, up to 8, for decompression and resampling release the interpreter's
    lock. Processes need a `function` and `items` that can be pickled. The workers of a pipeline are not used: see
    `spread`.

    Raises:
      OSError: a process was killed.
      What `function` raises.
    """
    processes = workers if isinstance(workers, int) else 0
    number = processes or threads or min(8, max(2, os.cpu_count() or 1))
    with _pool(processes, number) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > number:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that worked on the cases was killed, as is done where memory runs out: run the same command "
                "again, with fewer --processes"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _pool(processes: int, threads: int) -> Executor:
    if not processes:
        return ThreadPoolExecutor(threads)
    # Not forked: a lock that a thread holds at that moment would never be free in the child.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, _start, (list(warnings.filters),))


def _start(filters: list) -> None:
    """Of a process: it warns of what its parent warns of, leaves Ctrl-C to that, and ends with it."""
    warnings.filters[:] = filters  # type: ignore[index]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def spread(function: Callable[[_In], Any], items: Sequence[_In], workers: Workers) -> None:
    """Has the workers of a Beam pipeline, if that is what `workers` are, call `function` on each of `items`.

    `function` keeps its results where all workers see them, and the caller takes them from there. What a worker fails
    at with ValueError or OSError is left to the caller, who tries it again and says why.

    Raises:
      ValueError: Apache Beam is not installed, or does not take these options.
    """
    if isinstance(workers, int) or not items:
        return
    beam = apache_beam()

    def attempt(item: _In) -> None:
        try:
            function(item)
        except (ValueError, OSError):
            pass

    with beam.Pipeline(options=pipeline_options(workers)) as pipeline:
        # Reshuffled, for else one worker may be given all.
        _ = pipeline | beam.Create(items) | beam.Reshuffle() | beam.Map(attempt)


def apache_beam() -> Any:
    """The module. Raises ValueError where it is not installed."""
    try:
        import apache_beam
    except ImportError as error:
        raise ValueError(f"--beam_options needs Apache Beam ({error}): pip install 'sscl_jax[beam]'") from error
    return apache_beam


def pipeline_options(options: Sequence[str]) -> Any:
    """Beam's PipelineOptions of words such as "--runner=DirectRunner"."""
    return apache_beam().options.pipeline_options.PipelineOptions(list(options))
