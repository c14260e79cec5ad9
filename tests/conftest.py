"""Fixtures that several files share: one tiny data set, and steps that are compiled once."""

import json
import os
from importlib.metadata import version

# Before jax is imported. The claims of equal bits are for the CPU. Optimised code takes XLA four times as long to
# compile, and pays only in programs that run for longer than these. An XLA that does not know a flag aborts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = ["--xla_backend_optimization_level=0"]
if [int(part) for part in version("jaxlib").split(".")[:2]] < [0, 12]:
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # nothing in the home of who runs the tests
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS])

# Each worker of pytest-xdist keeps to one core: XLA's threads, as many as it sees cores, wait busily for one another,
# and two processes that do so on the same cores are slower together than one after the other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """As many workers as there are cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


@pytest.fixture(scope="session")
def phantom_scans(tmp_path_factory):
    """Raw phantoms in ACDC's layout: 4 training patients, 1 val, 1 test."""
    from data_prep import phantom

    folder = tmp_path_factory.mktemp("phantom") / "scans"
    phantom.generate(folder, patients=4, val=1, test=1)
    return folder


@pytest.fixture(scope="session")
def phantom_data(phantom_scans):
    """The prepared dataset of `phantom_scans`, at 6 mm so that slices are about 32 x 32."""
    from data_prep import acdc

    output = phantom_scans.parent / "prepared"
    acdc.prepare(phantom_scans, output, spacing=6.0)
    return output


def tiny(path, method="anatomical_pl", **fields):
    """A config small enough for a test; `fields` as in {"optimizer.learning_rate": 1}."""
    from configs import base

    config = base.get_config(method)
    config.update_from_flattened_dict({
        "data.path": str(path), "data.labeled_patients": 2, "data.patch_size": (32, 32),
        "data.labeled_batch": 2, "data.unlabeled_batch": 2,
        "model.widths": (8, 16, 16), "model.projection_dim": 8,
        "optimizer.warmup_steps": 5, "optimizer.learning_rate": 1e-2,
        "contrast.num_queries": 4, "contrast.num_keys": 4, "contrast.threshold": 0.5, "contrast.cells": 2,
        "pseudo_label.threshold": 0.5,
        "steps": 120, "ramp": 1 / 12, "log_every": 10, "save_every": 25, "eval.every": 40,
    } | fields)  # fmt: skip
    return config


@pytest.fixture(scope="session")
def tiny_config(phantom_data):
    """`tiny` on the prepared phantoms: `tiny_config(method, **fields)`."""

    def make(method="anatomical_pl", **fields):
        return tiny(phantom_data, method, **fields)

    return make


@pytest.fixture(scope="module")
def compiled_once():
    """Trainings of one config share what they compile, within one file; apart from time that changes nothing."""
    from sscl_jax import config_fields, evaluate, experiment

    def once(function, key):
        results = {}

        def remembered(*args):
            name = key(*args)
            if name not in results:
                results[name] = function(*args)
            return results[name]

        return remembered

    def by_config(config, *others):
        fields = {n: v for n, v in config_fields.flat_config(config).items() if n not in config_fields.FREE_FIELDS}
        return json.dumps([fields, others])

    def by_model(config, *others):
        return json.dumps([str(config.model), config.contrast.level, config.data.patch_size, config.seed, others])

    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "make_step", once(experiment.make_step, by_config))
    patch.setattr(experiment, "make_state", once(experiment.make_state, by_model))
    patch.setattr(evaluate, "make_predictor", once(evaluate.make_predictor, lambda *args: args))
    yield
    patch.undo()
