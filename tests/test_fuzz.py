"""Files damaged by `benchmarks/fuzz.py`, read as `prepare` and `predict` do; the command runs thousands."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from sscl_jax.data import nifti

_SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[1] / "benchmarks" / "fuzz.py")
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_damaged_files_are_refused_in_one_line_or_read_as_nibabel_reads_them(seed, tmp_path):
    seen = set()
    for number in range(120):
        case = fuzz.make_case(seed, number)
        outcome, findings = fuzz.run_case(case, tmp_path)
        assert not findings, (number, case.told, findings)
        seen.add((case.how, outcome))
    assert {how for how, _ in seen} == set(fuzz.DAMAGES)
    assert {outcome for _, outcome in seen} == {"read", "refused"}


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("_affine", lambda right: lambda header: right(header) * 2, "voxels of"),
        ("_affine", lambda right: lambda header: right(header) @ np.diag([1, -1, 1, 1]), "directions"),
        ("check_affine", lambda right: lambda path, affine: affine, "affine [["),
        ("check_label", lambda right: lambda path, array: right(path, array) * 0, "voxels differ"),
        ("check_image", lambda right: lambda path, array, *more: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_fault_in_the_reader_is_found(name, wrong, found, tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, name, wrong(getattr(nifti, name)))
    cases = (case for n in range(1000) if (case := fuzz.make_case(11, n)).how == "field of geometry")
    assert any(found in finding for case in cases for finding in fuzz.run_case(case, tmp_path)[1])
