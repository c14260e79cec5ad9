"""Damages NIfTI files in every way that it knows, and reads each as `prepare` and `predict` do.

    python benchmarks/fuzz.py --cases=5000 --seed=0

A case is an image and its label, of which one is damaged: header fields, one or several; bits, truncation, extensions,
gzip; claims of giant shapes. It must end in an error that is one line and names the file, or in arrays that agree with
what nibabel alone reads: shape, affine, voxel sizes, voxels; a mask written for the image must then overlay it. What
else happens (another exception, a warning that names no file, a hang, memory) is a finding, printed with the number
that makes it again: --first=NUMBER --cases=1. Exit status 1 if there are any.
"""

import argparse
import functools
import gzip
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from configs import base
from data_prep import common
from sscl_jax import predict
from sscl_jax.data import nifti, prepared
from sscl_jax.data.recipe import Recipe

SHAPE = (8, 7, 5)
SECONDS = 30  # for one case; most take milliseconds
MEMORY = 200 * 2**20  # bytes that a case may take beyond what the process had
RECIPE = Recipe(orientation="SPL", spacing=(None, None, None), label_values=(0, 1, 2), class_names=("a", "b", "c"))


# ------------------------------------------------------------------------------------------------------- damaged files


@functools.cache
def whole(kind: str, image_class: type[nib.Nifti1Image], order: str) -> bytes:
    """A sound file: an image, or its label map, of either version of NIfTI and either byte order."""
    rng = np.random.default_rng(0)
    affine = np.array([[-1.2, 0.4, 0, 30], [0.4, 1.2, 0, -20], [0, 0, 5, 10], [0, 0, 0, 1]])
    array = rng.integers(0, 900, SHAPE) if kind == "image" else rng.integers(0, 3, SHAPE)
    image = image_class(array.astype(np.int16), affine, image_class.header_class(endianness=order))
    image.set_qform(affine, code=1)
    return image.to_bytes()


@dataclass(frozen=True)
class Case:
    """Files of a case.

    Attributes:
      how: key of DAMAGES.
      told: what exactly was done, to which file.
      damaged: its name.
      files: contents, by name: image.nii[.gz] and label.nii[.gz].
    """

    how: str
    told: str
    damaged: str
    files: dict[str, bytes]


def make_case(seed: int, number: int) -> Case:
    """A function of its arguments alone."""
    rng = np.random.default_rng([seed, number])
    image_class = nib.Nifti2Image if rng.random() < 0.2 else nib.Nifti1Image
    order = rng.choice(["<", ">"], p=[0.8, 0.2])
    kind = rng.choice(["image", "label"])
    ending = ".nii.gz" if rng.random() < 0.5 else ".nii"
    files = {name: whole(name, image_class, order) for name in ("image", "label")}
    how, damage = list(DAMAGES.items())[rng.integers(len(DAMAGES))]
    in_stream = ending == ".nii.gz" and rng.random() < 0.5 and damage in (truncate, flip_bits, append)
    content, told = files[kind], ""
    if not in_stream:
        content, told = damage(rng, content, image_class.header_class.template_dtype.newbyteorder(order))
    compressed = content if damage is not_gzip else gzip.compress(content, 1, mtime=0)
    if in_stream:
        compressed, told = damage(rng, compressed, None)
    for name in files:
        files[name] = gzip.compress(files[name], 1, mtime=0) if ending == ".nii.gz" else files[name]
    files[kind] = compressed if ending == ".nii.gz" else content
    what = "gzip stream" if in_stream else image_class.__name__
    files = {name + ending: data for name, data in files.items()}
    return Case(how, f"{kind}{ending}, {what}, {how}: {told}", kind + ending, files)


def one_field(
    rng: np.random.Generator, content: bytes, header: np.dtype, names: Sequence[str] = ()
) -> tuple[bytes, str]:
    name = rng.choice(names or header.names)
    fields = np.frombuffer(content[: header.itemsize], header).copy()
    field = fields[name].reshape(-1) if fields[name].ndim else fields[name]
    place = rng.integers(field.size)
    kind = field.dtype
    if kind.kind == "S":
        fields[name] = rng.bytes(kind.itemsize)
    elif kind.kind == "f":
        odd = [0, -0.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-30, np.finfo(kind).max, 1, -1, rng.normal(0, 1000)]
        field[place] = odd[rng.integers(len(odd))]
    else:
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        odd = [n for n in (0, 1, 2, 3, 7, 8, 16, 64, 100, 1024, low, high - 1) if n <= high] + [rng.integers(low, high)]
        field[place] = odd[rng.integers(len(odd))]
    fields[name] = field.reshape(fields[name].shape)
    return fields.tobytes() + content[header.itemsize :], f"{name}[{place}] = {field.reshape(-1)[place]!r}"


def geometry(rng: np.random.Generator, content: bytes, header: np.dtype) -> tuple[bytes, str]:
    return one_field(
        rng, content, header, [n for n in header.names if re.match("srow|pixdim|[qs]form|quatern|qoff", n)]
    )


def several_fields(rng: np.random.Generator, content: bytes, header: np.dtype) -> tuple[bytes, str]:
    told = []
    for _ in range(rng.integers(2, 7)):
        content, what = one_field(rng, content, header)
        told.append(what)
    return content, ", ".join(told)


def giant_claim(rng: np.random.Generator, content: bytes, header: np.dtype) -> tuple[bytes, str]:
    fields = np.frombuffer(content[: header.itemsize], header).copy()
    most = min(10**5, np.iinfo(fields["dim"].dtype).max)
    rank = rng.integers(3, 8)
    fields["dim"][0][0] = rank
    fields["dim"][0][1 : rank + 1] = [most] * 3 + [rng.choice([1, 4, most])] * (rank - 3)
    return fields.tobytes() + content[header.itemsize :], f"dim = {fields['dim'][0].tolist()}"


def extension(rng: np.random.Generator, content: bytes, header: np.dtype) -> tuple[bytes, str]:
    sizes = [0, 1, 7, 8, 16, 32, 1000, 2**31 - 1, -1, -(2**31)]
    size = sizes[rng.integers(len(sizes))]
    told = np.array(size, header["sizeof_hdr"]).tobytes() + rng.bytes(4)  # its size and code
    return content[: header.itemsize] + b"\1\0\0\0" + told + content[header.itemsize + 12 :], f"of {size} bytes"


def truncate(rng: np.random.Generator, content: bytes, header: np.dtype | None) -> tuple[bytes, str]:
    size = int(rng.integers(len(content)))
    return content[:size], f"{size} of {len(content)} bytes"


def flip_bits(rng: np.random.Generator, content: bytes, header: np.dtype | None) -> tuple[bytes, str]:
    changed = bytearray(content)
    places = rng.integers(len(content) if rng.random() < 0.5 else min(len(content), 400), size=rng.integers(1, 9))
    for place in places:
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed), f"in bytes {sorted(places.tolist())}"


def append(rng: np.random.Generator, content: bytes, header: np.dtype | None) -> tuple[bytes, str]:
    more = [b"\0" * 100, rng.bytes(100), gzip.compress(rng.bytes(100), mtime=0), bomb()]
    which = int(rng.integers(len(more)))
    return content + more[which], ("100 zeros", "100 bytes", "a gzip member", "a gzip member of 64 MiB")[which]


def not_gzip(rng: np.random.Generator, content: bytes, header: np.dtype) -> tuple[bytes, str]:
    return content, "plain, whatever its name says"


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(64 * 2**20), mtime=0)


DAMAGES: dict[str, Callable] = {
    "one field": one_field, "field of geometry": geometry, "several fields": several_fields,
    "giant claim": giant_claim, "extension": extension, "truncated": truncate, "bits flipped": flip_bits,
    "appended": append, "not gzip": not_gzip,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reading

# A network that sees its first class everywhere; prediction is otherwise as users run it.
NETWORK = SimpleNamespace(recipe=RECIPE, config=base.get_config(), variables=None, meta={"channels": 1})


def first_class(variables: None, image: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.array([1, 0, 0], np.float32), (*image.shape[:3], 3))


def run_case(case: Case, folder: Path) -> tuple[str, list[str]]:
    """Reads a case in `folder`: "read" or "refused", and findings."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    image, label = (folder / name for name in case.files)
    damaged = folder / case.damaged
    mask = folder / "mask.nii.gz"
    mask.unlink(missing_ok=True)
    before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, findings = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nifti.quiet_nibabel()
        for read in (read_by_prepare, read_by_predict):
            try:
                refused = read(image, label, mask)
            except (ValueError, FileNotFoundError) as error:
                refused = str(error)
            except Exception as error:
                findings.append(f"{read.__name__}: {type(error).__name__}: {error}")
                continue
            outcomes.append("refused" if refused else "read")
            if refused and (str(damaged) not in refused or "\n" in refused):
                findings.append(f"{read.__name__}: the error does not name the file in one line: {refused!r}")
        if "read" in outcomes:
            try:
                findings += disagreements(damaged, mask if damaged == image and mask.exists() else None)
            except Exception as error:
                findings.append(f"nibabel refuses what was read: {type(error).__name__}: {error}")
    # Preprocessing knows arrays, not files, and warns of a constant one.
    strange = {f"{w.category.__name__}: {w.message}" for w in caught if str(damaged) not in str(w.message)}
    findings += [f"a warning that names no file: {line}" for line in sorted(strange) if "is constant" not in line]
    if time.monotonic() - before > SECONDS:
        findings.append(f"took {time.monotonic() - before:.0f} s")
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    if more > MEMORY:
        findings.append(f"took {more / 2**20:.0f} MiB")
    return "read" if "read" in outcomes else "refused", findings


def read_by_prepare(image: Path, label: Path, mask: Path) -> str:
    """Checks and prepares; returns what it was refused for."""
    source = prepared.CaseSource("case", "patient", "train", (image,), label)
    facts = common.check_case(source, RECIPE.label_values)
    if facts.problems:
        return next((line for line in facts.problems if "\n" in line), facts.problems[0])
    record = prepared._prepare_case(source, RECIPE)
    assert np.isfinite(record["image"]).all() and record["image"].shape[:3] == record["label"].shape
    return ""


def read_by_predict(image: Path, label: Path, mask: Path) -> str:
    """Segments, and reads the label as `evaluate` does."""
    predict.segment_scan(NETWORK, first_class, predict.read_prepared(NETWORK, [image]), mask)  # type: ignore[arg-type]
    nifti.read_label(label)
    return ""


def millimetres(header: nib.Nifti1Header) -> np.ndarray:
    """(4, 4) from the header's unit to mm: nibabel leaves metres and microns as they are."""
    unit = {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)
    return np.diag([unit, unit, unit, 1.0])


@np.errstate(all="ignore")
def disagreements(path: Path, mask: Path | None) -> list[str]:
    """How what the project reads differs from what nibabel alone does."""
    found = []
    if path.name.startswith("image"):
        array, affine, _ = nifti.read_image(path, channels=True)
        array = array[..., 0] if array.shape[3] == 1 else array
    else:
        array, affine = nifti.read_label(path)
    plain = nib.load(path)
    shape = tuple(plain.shape)
    while len(shape) > array.ndim and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (3 - len(shape))
    if array.shape != shape:
        found.append(f"shape {array.shape}, nibabel has {shape}")
    elif not np.allclose(array, np.asanyarray(plain.dataobj).reshape(shape), rtol=1e-5, atol=1e-3):
        found.append("voxels differ from nibabel's")
    expected_affine = millimetres(plain.header) @ plain.affine
    sizes, expected = voxel_sizes(affine), voxel_sizes(expected_affine)
    stored = millimetres(plain.header)[0, 0] * np.abs(plain.header["pixdim"][1:4].astype(float))
    if not (np.isfinite(affine).all() and (sizes > 0).all()):
        found.append(f"affine {affine.tolist()}")
    elif not (np.allclose(sizes, expected, rtol=0.011) or np.allclose(sizes, stored, rtol=0.011)):
        found.append(f"voxels of {sizes} mm, nibabel has {expected} and {stored}")
    elif not np.allclose(affine[:3, :3] / sizes, expected_affine[:3, :3] / expected, atol=1e-4):
        found.append("directions differ from nibabel's")
    elif not np.allclose(affine[:3, 3], expected_affine[:3, 3]):
        found.append("origin differs from nibabel's")
    if mask is not None:
        written = nib.load(mask)
        written_affine = millimetres(written.header) @ written.affine
        if (written.shape + (1, 1))[:3] != (plain.shape + (1, 1))[:3] or not np.array_equal(
            written_affine, expected_affine
        ):
            found.append(f"the mask does not overlay the image: {written.shape}, {written.affine.tolist()}")
    return found


# --------------------------------------------------------------------------------------------------------------- cases


def work(connection: Connection, seed: int, numbers: range) -> None:
    """Runs cases in a process of its own, which may hang or die; sends the number of each, then what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        run_case(make_case(seed, numbers[0]), Path(folder))  # imports, and memory that is there once
        for number in numbers:
            connection.send((number, None))
            connection.send((number, run_case(make_case(seed, number), Path(folder))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="how many (default 5000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    faults = 0
    context = multiprocessing.get_context("spawn")
    number, end = args.first, args.first + args.cases
    while number < end:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, args.seed, range(number, end)))
        process.start()
        theirs.close()
        while number < end:
            try:
                if not ours.poll(SECONDS + 60):  # the first one imports
                    raise TimeoutError
                number, result = ours.recv()
                if result is None:
                    continue
                outcome, findings = result
            except (TimeoutError, EOFError) as error:
                hangs = isinstance(error, TimeoutError)
                outcome, findings = ("hangs", ["it hangs"]) if hangs else ("ends", ["it ends the process"])
            case = make_case(args.seed, number)
            counts[case.how, outcome] += 1
            faults += len(findings)
            for finding in findings:
                print(f"case {number} ({case.told}): {finding}", flush=True)
            number += 1
            if outcome in ("hangs", "ends"):
                break
        process.kill()
        process.join()
    print(f"{'damage':<20}{'read':>8}{'refused':>10}")
    for how in DAMAGES:
        print(f"{how:<20}{counts[how, 'read']:>8}{counts[how, 'refused']:>10}")
    print(f"{args.cases} cases, seed {args.seed}: {faults} findings")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
