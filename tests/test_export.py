"""An exported network gives the same masks, without sscl_jax."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sscl_jax import evaluate, experiment, export
from sscl_jax.data.recipe import Recipe

PATCHES = {"2-D": (16, 32), "3-D": (8, 16, 16)}


def network(patch, dtype="float32"):
    config = base.get_config("supervised")
    fields = {
        "model.dtype": dtype,
        "data.patch_size": patch,
        "model.widths": (8, 16, 16),
        "augment.flip": (False,) * len(patch),
    }
    config.update_from_flattened_dict(fields)
    recipe = Recipe(label_values=(0, 1, 4), class_names=("background", "a", "b"))
    state = experiment.make_state(config, 3, 2)
    variables = experiment.network_variables(state, "teacher")
    model = experiment.make_model(config, 3)
    return experiment.Network(
        model, variables, recipe, config, {"channels": 2, "digest": "0123abcd"}, Path("best/7"), "teacher"
    )


def mask_of(patch, model, variables=None):
    """Mask by a sliding window over an image larger than the patch."""
    image = np.random.default_rng(0).standard_normal((9, 40, 35, 2), np.float32)
    return np.argmax(evaluate.make_predictor(model, patch)(variables, image), -1)


def assert_same(trained, patch, call):
    """`call` gives the probabilities of any number of windows, and by that the same mask."""
    for count in (1, 3):
        windows = np.random.default_rng(count).standard_normal((count, *patch, 2), np.float32)
        expected = jax.nn.softmax(trained.model.apply(trained.variables, windows)[0])
        np.testing.assert_allclose(call(windows), expected, atol=1e-5)
    stand_in = SimpleNamespace(num_classes=3, apply=lambda _, windows: (jnp.log(call(windows)),))
    expected = mask_of(patch, trained.model, trained.variables)
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(mask_of(patch, stand_in), expected)


@pytest.fixture(params=PATCHES.values(), ids=PATCHES.keys())
def patch(request):
    return request.param


def test_stablehlo_gives_the_same_mask(patch, tmp_path):
    trained = network(patch)
    path = export.export_network(trained, tmp_path / "out", "stablehlo")
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert set(exported.platforms) == set(export.PLATFORMS)
    assert_same(trained, patch, exported.call)


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_network_in_bfloat16(form, tmp_path):
    """StableHLO computes as it was trained, ONNX in float32."""
    half, full, patch = network((16, 32), "bfloat16"), network((16, 32)), (16, 32)
    windows = np.random.default_rng(0).standard_normal((3, *patch, 2), np.float32)
    if form == "onnx":
        pytest.importorskip("jax2onnx", reason="the extra 'onnx' is not installed")
        onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
        session = onnxruntime.InferenceSession(export.export_network(half, tmp_path, form).read_bytes())
        (found,) = session.run(None, {"windows": windows})
        wanted, atol = full, 1e-5
    else:
        data = export.export_network(half, tmp_path, form).read_bytes()
        found, wanted, atol = jax.export.deserialize(bytearray(data)).call(windows), half, 2e-2
    np.testing.assert_allclose(found, jax.nn.softmax(wanted.model.apply(wanted.variables, windows)[0]), atol=atol)


def test_what_belongs_around_the_model_is_told(tmp_path):
    export.export_network(network((16, 32)), tmp_path)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"]["shape"] == ["n", 16, 32, 2] and facts["output"]["shape"] == ["n", 16, 32, 3]
    assert Recipe.from_dict(facts["recipe"]).label_values == (0, 1, 4)


def test_onnx_gives_the_same_mask(patch, tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx", reason="the extra 'onnx' is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    trained = network(patch)
    session = onnxruntime.InferenceSession(export.export_network(trained, tmp_path, "onnx").read_bytes())

    def call(windows):
        return session.run(None, {"windows": np.asarray(windows)})[0]

    monkeypatch.setattr(jax, "jit", lambda function: function)  # nothing of ONNX can be traced
    assert_same(trained, patch, call)


def test_another_network_or_half_a_one_is_never_left_there(tmp_path, monkeypatch):
    trained = network((16, 32))
    export.export_network(trained, tmp_path)
    moved = dataclasses.replace(trained, path=Path("moved/7"))  # the same again: nothing to lose
    before = export.export_network(moved, tmp_path).read_bytes()
    for other in ({"name": "student"}, {"meta": {"channels": 2, "digest": "4567cdef"}}):  # trained anew in its place
        with pytest.raises(ValueError, match="model.json is of another network, or of another version"):
            export.export_network(dataclasses.replace(trained, **other), tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export.export_network(trained, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
    assert (tmp_path / "model.stablehlo").read_bytes() == before


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "load_networks", lambda *_: {"teacher": network((16, 32))})
    export.main(["--checkpoint=run", f"--output={tmp_path / 'out'}"])
    assert capsys.readouterr().out == f"best/7, teacher: {tmp_path / 'out' / 'model.stablehlo'}\n"
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: --output=.*file cannot be written .*: choose another folder"):
        export.main(["--checkpoint=run", f"--output={tmp_path / 'file'}"])


def test_onnx_without_its_converter_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sscl_jax\[onnx\]'"):
        export.export_network(network((16, 32)), tmp_path, "onnx")
