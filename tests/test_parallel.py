"""Several processes share work. What they train together is in test_command_line.py."""

import ctypes
import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from sscl_jax import parallel


def work(item):
    """Arrays of every kind that an evaluation gives, of another size for each item."""
    random = np.random.RandomState(item)
    return [
        random.randint(0, 9, (item, 3, 2)).astype(np.uint8),
        np.append(random.randn(2 * item), np.nan) / 3,  # doubles, to the last bit
        random.rand(item) > 0.5,
        np.array(2**40 + item),
    ]


def check():
    for count in range(6):
        shared = parallel.in_shares(work, range(count))
        assert len(shared) == count
        for item, arrays in enumerate(shared):
            for array, expected in zip(arrays, work(item), strict=True):
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # one process in a job of several tasks, without srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # an interactive step
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_processes_that_srun_or_mpirun_started_join(environment, joins, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(parallel, "_join", lambda *args: joined.append(args))
    monkeypatch.setattr(parallel, "_connect", lambda: None)
    parallel.initialise_hosts()
    assert joined == [()] * joins


def check_from_main(index):
    calls = []
    value = np.array([-0.0, np.nan, 1e-40], "f4"), {"step": 3}  # a sum would lose the sign, or flush what is tiny
    array, values = parallel.from_main(lambda: calls.append(index) or value)
    assert (array.tobytes(), values) == (value[0].tobytes(), {"step": 3})

    def fail():
        calls.append(index)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        parallel.from_main(fail)
    assert calls == ([0, 0] if index == 0 else [])


def test_one_process_does_all():
    check()
    check_from_main(0)


@pytest.mark.end_to_end
def test_four_processes_share_none_to_five_items_and_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen([sys.executable, __file__, address, str(i)], env=env, **pipes) for i in range(4)
    ]  # fmt: skip
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        # Whoever came 30 seconds late to what first connects the devices would be given up.
        before, after = said.split("joined\n")
        assert "connected to 3 peer" in before and "connected to 7 peer" in before
        assert "connected" not in after


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again():
    """Page faults of a program with 64 MiB of intermediate results: without `keep_memory` some 16,000 at each call."""
    code = """
        import resource
        import jax, jax.numpy as jnp
        from sscl_jax import parallel

        parallel.keep_memory()
        program, x = jax.jit(lambda x: jnp.outer(x, x) @ x), jnp.arange(4096.0)
        for _ in range(41):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            program(x).block_until_ready()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def median_faults(**more):
        environment = plain | {"JAX_PLATFORMS": "cpu"} | more
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return np.median([int(faults) for faults in run.stdout.split()])

    assert median_faults() < 1000
    assert median_faults(MALLOC_ARENA_MAX="8") > 1000  # the user's own choice stays


@pytest.mark.parametrize("command", ["train", "predict", "evaluate"])
def test_what_computes_keeps_its_memory(command, tmp_path, monkeypatch):
    from configs import phantom
    from sscl_jax import evaluate, predict, train

    class Kept(Exception):
        pass

    def keep_memory():
        raise Kept

    monkeypatch.setattr(parallel, "keep_memory", keep_memory)
    options = [f"--checkpoint={tmp_path}", f"--input={tmp_path}", f"--output={tmp_path}"]
    start = {
        "train": lambda: train.train(phantom.get_config(), tmp_path),
        "predict": lambda: predict.main(options),
        "evaluate": lambda: evaluate.main(options[:1]),
    }[command]
    with pytest.raises(Kept):
        start()


if __name__ == "__main__":
    parallel.initialise_hosts(sys.argv[1], 4, int(sys.argv[2]))
    print("joined", flush=True)
    check()
    check_from_main(int(sys.argv[2]))
    gathered = jax.pmap(lambda x: jax.lax.all_gather(x, parallel.AXIS), parallel.AXIS)(np.ones(2))
    assert gathered.shape == (2, 8)
