"""The prepared dataset: TFDS ArrayRecord on disk, read through a flat memory-mapped cache.

A prepared dataset is a folder that `tfds.builder_from_directory` opens. One record is one case:

    image          float32 (D, H, W, C)   preprocessed
    label          uint8   (D, H, W)      class indices on the same grid; (0, 0, 0) = no label
    native_label   uint8   (X, Y, Z)      class indices on the file's own grid; (0, 0, 0) = no label
    native_affine  float64 (4, 4)         voxel to world, mm
    native_shape   int64   (3,)
    spacing        float64 (3,)           of the preprocessed grid, mm
    index, case_id, patient_id, source    place in the order, names, file name of the image

and the metadata of the dataset hold the recipe, the patients of every split, and two digests:
`fingerprint` of all that training sees of a dataset apart from its labels (recipe, names, order,
image values), and `inputs` of the files it was made from.

Records are compressed and are not for random access, so the first `open_prepared` decodes them
once to flat files in `<prepared>/cache` that are memory-mapped from then on: a batch is index
arithmetic, and a dataset larger than memory still trains. Labels are in files of their own, which
stay closed until a label is asked for.
"""

import errno
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import json
import mmap
import os
import shutil
import socket
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sscl_jax.data import formats, kept, nifti
from sscl_jax.data import recipe as recipes
from sscl_jax.data.recipe import Grid, Recipe
from sscl_jax.data.workers import Workers, map_ahead, spread

SPLITS = ("train", "val", "test")
FORMAT = 1  # raised when an older prepared folder can no longer be read
CACHE_FILES = {"images.f32": 4, "labels.u8": 1, "native_labels.u8": 1}  # bytes per value
CACHE_OF = ("inputs", "fingerprint")  # the metadata by which a cache is that of a dataset


@dataclass(frozen=True)
class CaseSource:
    """The files of one case, before preprocessing.

    Attributes:
      case_id, patient_id, split: names.
      image_paths: files, or folders, of the image; the channels of the first come first, and so on.
      label_path: file or folder of the mask; None for an unlabelled case.
      read_image: reads one of `image_paths`: (X, Y, Z, C) and affine, as `nifti.read_image` does.
      read_label: reads `label_path`: (X, Y, Z) and affine, as `nifti.read_label` does.
    """

    case_id: str
    patient_id: str
    split: str
    image_paths: tuple[Path, ...]
    label_path: Path | None = None
    read_image: Callable[[Path], tuple] = nifti.read_image
    read_label: Callable[[Path], tuple] = nifti.read_label

    def image(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads all channels: float32 (X, Y, Z, C), and the affine (4, 4).

        Raises:
          ValueError: a file cannot be used, or the files of the channels are not on one grid.
        """
        array, affine, *_ = nifti.read_channels(self.image_paths, self.read_image)
        return array, affine


@dataclass(frozen=True)
class Case:
    """What is known of a prepared case without reading its voxels."""

    index: int
    case_id: str
    patient_id: str
    split: str
    grid: Grid
    has_label: bool
    source: str


class PreparedDataset:
    """A prepared dataset, opened for reading. Made by `open_prepared`.

    Attributes:
      path: the folder.
      recipe: the preprocessing that its cases went through.
      fingerprint: sha256 (hex) of recipe, names, order and image values; labels take no part.
      name: of the source, for example "acdc".
      skipped: why cases of the source were left out, one line a finding.
      patients: ordered patient ids of each split.
      cases: in the order of splits (train, val, test), of `patients`, and of case ids.
    """

    def __init__(self, path: Path, metadata: dict, cache: Path, index: list[dict]):
        self.path = path
        self.recipe = Recipe.from_dict(metadata["recipe"])
        self.fingerprint: str = metadata["fingerprint"]
        self.name: str = metadata["source_name"]
        self.skipped: list[str] = metadata.get("skipped", [])
        self.patients: dict[str, list[str]] = metadata["patients"]
        self.cases = [_case_of(i, entry) for i, entry in enumerate(index)]
        self._cache = cache
        self._index = index
        self._images = np.memmap(cache / "images.f32", dtype=np.float32, mode="r")

    @property
    def num_classes(self) -> int:
        """Classes, the background among them."""
        return len(self.recipe.label_values)

    @property
    def channels(self) -> int:
        """Channels C of every image."""
        return self._index[0]["channels"]

    # The label files are opened by the first label that is read: a training that uses every case
    # as unlabelled never touches them.
    @functools.cached_property
    def _labels(self) -> np.memmap:
        return np.memmap(self._cache / "labels.u8", dtype=np.uint8, mode="r")

    @functools.cached_property
    def _native_labels(self) -> np.memmap:
        return np.memmap(self._cache / "native_labels.u8", dtype=np.uint8, mode="r")

    def image(self, i: int) -> np.ndarray:
        """Image of case `i`: read-only float32 view (D, H, W, C) of the cache."""
        entry = self._index[i]
        shape = (*entry["shape"], entry["channels"])
        # What was read before counts as this process's memory until it is given back; the system still has it cached.
        self._images.base.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
        return _view(self._images, entry["image_offset"], shape)

    def label(self, i: int) -> np.ndarray:
        """Label of case `i` on the prepared grid: read-only uint8 view (D, H, W), classes 0..K-1.

        Raises:
          ValueError: the case has no label.
        """
        entry = self._labelled(i)
        return _view(self._labels, entry["label_offset"], tuple(entry["shape"]))

    def native_label(self, i: int) -> np.ndarray:
        """Label of case `i` on the file's own grid: read-only uint8 view (X, Y, Z), classes 0..K-1.

        Raises:
          ValueError: the case has no label.
        """
        entry = self._labelled(i)
        return _view(self._native_labels, entry["native_offset"], tuple(entry["native_shape"]))

    def _labelled(self, i: int) -> dict:
        if not self.cases[i].has_label:
            raise ValueError(
                f"case {self.cases[i].case_id} has no label: use it as an unlabelled case, or add "
                "its mask and prepare again"
            )
        return self._index[i]


def _view(flat: np.memmap, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return flat[offset : offset + int(np.prod(shape))].reshape(shape)


def _case_of(i: int, entry: dict) -> Case:
    grid = Grid(
        native_shape=tuple(entry["native_shape"]),
        native_affine=np.array(entry["native_affine"], dtype=np.float64),
        shape=tuple(entry["shape"]),
        spacing=tuple(entry["spacing"]),
    )
    names = {key: entry[key] for key in ("case_id", "patient_id", "split", "has_label", "source")}
    return Case(index=i, grid=grid, **names)


# --- Writing --------------------------------------------------------------------------------------


def write_prepared(
    output: Path,
    sources: Sequence[CaseSource],
    recipe: Recipe,
    patients: dict[str, list[str]],
    source_name: str,
    skipped: Sequence[str] = (),
    workers: Workers = 0,
) -> PreparedDataset:
    """Reads and preprocesses the cases of `sources` and writes them to the folder `output`.

    The folder appears under its name only when it is whole: it is written beside it and renamed.
    Called again with the same files, recipe and patients, it leaves the folder as it is. Stopped
    before its end and called again, it takes the cases that were prepared; see `sscl_jax.data.kept`.

    Args:
      output: folder to make.
      sources: the cases, in any order.
      recipe: preprocessing.
      patients: ordered patient ids of each split; the order of "train" is the order in which
        labelled patients are taken. Patients without a case in `sources` are left out.
      source_name: name of the dataset.
      skipped: findings for which cases were left out of `sources`; kept in the metadata.
      workers: who reads and preprocesses; see `sscl_jax.data.workers`.

    Returns:
      The dataset, opened.

    Raises:
      ValueError: a patient is in two splits, a case is listed twice or under another split than its
        patient, there is no case, `output` holds something else, or a file does not fit.
    """
    output = Path(output)
    sources, patients = _ordered(sources, patients)
    recipe_dict = json.loads(json.dumps(recipe.to_dict()))
    files = list(map_ahead(file_digests, sources))
    inputs = _digest_inputs(sources, files, recipe_dict, patients, source_name)
    beside = kept.folder_beside(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        with suppress(OSError), kept.removed_when_done(beside):  # what the check has kept
            pass
        if _made_from(output, inputs):
            print(f"{output}: already prepared from these files, nothing to do")
            return open_prepared(output)
        raise ValueError(_other(output))
    metadata = {
        "format": FORMAT,
        "version": package_version(),
        "source_name": source_name,
        "recipe": recipe_dict,
        "patients": patients,
        "inputs": inputs,
        "skipped": list(skipped),
    }
    cases = []
    for source, digests in zip(sources, files, strict=True):
        name = kept.digest(source, digests, recipe_dict, FORMAT, package_version())
        cases.append((source, recipe, digests, beside / f"{name}.npz"))
    if taken := sum(path.exists() for *_, path in cases):
        print(f"{output}: {taken} of {len(cases)} cases were prepared before, and are taken")
    place = output.resolve()  # where --output is a link, it stays one
    with _told_of(output), kept.removed_when_done(beside):
        spread(_keep, cases, workers)
        if not isinstance(workers, int) and (missing := sum(not path.exists() for *_, path in cases)):
            print(f"{missing} cases are made here: the workers of the pipeline left none of them in {beside}")
        with _partial_folder(place) as partial:
            with closing(map_ahead(_keep, cases, workers)) as paths:
                written = _write_records(partial, sources, paths, metadata, workers)
            try:
                os.rename(written, place)  # the mark of a whole dataset
            except OSError:
                if not _read_metadata(place):  # else another process has done so in the meantime
                    raise
    if not _made_from(place, inputs):
        raise ValueError(_other(output))
    return open_prepared(output)


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """A disk that is full as `folder` is written is told with its name and a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: of ArrayRecord
        told = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        for reason in (*told, "Not enough disk space"):  # the last by TFDS
            if reason in str(error):
                raise OSError(
                    f"{folder} could not be written ({reason}): free some space, then run the same command again; it "
                    "takes what is done"
                ) from error
        raise


def _other(output: Path) -> str:
    """Why `output` is not written: nothing is told to be deleted but what was prepared."""
    if not _read_metadata(output):
        return f"{output} exists and is no prepared data set: choose another --output"
    return f"{output} exists and was not made from these files with these options: delete it or choose another --output"


def _made_from(output: Path, inputs: str) -> bool:
    return output.is_dir() and _read_metadata(output).get("inputs") == inputs


def _ordered(
    sources: Sequence[CaseSource], patients: dict[str, list[str]]
) -> tuple[list[CaseSource], dict[str, list[str]]]:
    """Checks sources against patients; sorts them by split, patient and case id."""
    split_of: dict[str, str] = {}
    for split, ids in patients.items():
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown: the splits are {', '.join(SPLITS)}")
        for patient in ids:
            if split_of.setdefault(patient, split) != split:
                raise ValueError(
                    f"patient {patient} is in two splits, {split_of[patient]} and {split}: leave it in one of them"
                )
    if not sources:
        raise ValueError("there is no case to prepare: check the input folder and the splits")
    seen: set[str] = set()
    for source in sources:
        if split_of.get(source.patient_id) != source.split:
            raise ValueError(
                f"case {source.case_id} is in split {source.split}, but its patient "
                f"{source.patient_id} in {split_of.get(source.patient_id, 'none')}: make them agree"
            )
        if source.case_id in seen:
            raise ValueError(f"case {source.case_id} is listed twice: give every case its own name")
        seen.add(source.case_id)
    present = {source.patient_id for source in sources}
    kept = {split: [p for p in dict.fromkeys(patients.get(split, [])) if p in present] for split in SPLITS}
    place = {patient: n for n, patient in enumerate(p for split in SPLITS for p in kept[split])}
    return sorted(sources, key=lambda s: (place[s.patient_id], s.case_id)), kept


def _digest_inputs(
    sources: list[CaseSource], files: list, recipe: dict, patients: dict[str, list[str]], source_name: str
) -> str:
    """sha256 of the files' contents and of everything else that decides the result."""
    names = [(s.case_id, s.patient_id, s.split, [path.name for path in s.image_paths], *_options(s)) for s in sources]
    text = json.dumps([FORMAT, source_name, recipe, patients, names, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _options(source: CaseSource) -> list[str]:
    """What the readers of a case were told besides its files, such as a voxel size that these do not hold."""
    options = [getattr(source, f.name) for f in fields(source) if f.name not in CaseSource.__dataclass_fields__]
    for reader in (source.read_image, source.read_label):
        if isinstance(reader, functools.partial):
            options += [*reader.args, *(value for _, value in sorted(reader.keywords.items()))]
    # A set is where a reader notes what it has told; files are told of by their contents.
    told = (np.asarray(option).tolist() for option in options if not isinstance(option, set))
    return [repr(value) for value in told if "Path(" not in repr(value)]


def file_digests(source: CaseSource) -> list[str | None]:
    """sha256 of the contents of each image file or folder, and of the mask, None where there is none."""
    paths = (*source.image_paths, source.label_path)
    return [None if path is None else _path_digest(path) for path in paths]


def _path_digest(path: Path) -> str:
    """sha256 of a file, with those in which its header says the voxels are, or of the files of a folder by name."""
    if path.is_dir():
        parts = [(p.name, _path_digest(p)) for p in sorted(path.iterdir()) if p.name[0] != "."]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    own, detached = _file_digest(path), formats.data_files(path)  # which may name the header itself, or a folder
    return hashlib.sha256("".join([own, *map(_file_digest, detached)]).encode()).hexdigest() if detached else own


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare_case(source: CaseSource, recipe: Recipe) -> dict:
    """Reads and preprocesses one case: the fields of its record, without `index`."""
    name = source.image_paths[0]
    array, affine = source.image()
    try:
        grid = recipes.make_grid(array.shape[:3], affine, recipe)
        image = recipes.prepare_image(array, grid, recipe)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    label = native_label = np.zeros((0, 0, 0), dtype=np.uint8)
    if source.label_path is not None:
        values, *_ = source.read_label(source.label_path)
        if values.shape != array.shape[:3]:
            raise ValueError(
                f"{source.label_path} has shape {values.shape}, its image {name} {array.shape[:3]}: they must be equal"
            )
        try:
            native_label = recipes.map_labels(values, recipe.label_values)
            label = recipes.prepare_label(values, grid, recipe)
        except ValueError as error:
            raise ValueError(f"{source.label_path}: {error}") from error
    return {
        "case_id": source.case_id,
        "patient_id": source.patient_id,
        "source": name.name,
        "image": np.ascontiguousarray(image, dtype=np.float32),
        "label": np.ascontiguousarray(label),
        "native_label": np.ascontiguousarray(native_label),
        "native_affine": np.asarray(affine, dtype=np.float64),
        "native_shape": np.asarray(array.shape[:3], dtype=np.int64),
        "spacing": np.asarray(grid.spacing, dtype=np.float64),
    }


def _keep(case: tuple[CaseSource, Recipe, list, Path]) -> Path:
    """Prepares one case, whose files have these digests, to a file, unless a whole one is there; returns the file."""
    source, recipe, digests, path = case
    if not kept.is_whole(path):
        fields = _prepare_case(source, recipe)
        if file_digests(source) != digests:
            raise ValueError(f"{source.image_paths[0]}: changed while it was read: prepare again once all is in place")
        kept.write_arrays(path, fields)
    return path


def _write_records(
    folder: Path, sources: list[CaseSource], paths: Iterator[Path], metadata: dict, workers: Workers
) -> Path:
    """Writes the cases kept in `paths` into `folder`, one of them in memory at a time; returns where it did."""
    from sscl_jax.data.builder import Cases  # here, since reading from the cache does without TFDS

    ids = [(s.case_id, s.patient_id, s.split) for s in sources]
    seen = [metadata["recipe"], metadata["patients"], ids]
    fingerprint = hashlib.sha256(json.dumps(seen, sort_keys=True).encode())

    def read() -> Generator[Path, None, None]:
        channels = None
        progress = tqdm(paths, "preparing", len(sources), unit=" cases", disable=None)
        for source, path in zip(sources, progress, strict=True):
            with np.load(path) as case:
                image = case["image"]
            channels = channels or image.shape[3]
            if image.shape[3] != channels:
                raise ValueError(
                    f"{source.image_paths[0]} has {image.shape[3]} channels, the cases before it {channels}: "
                    "all images must have the same channels"
                )
            fingerprint.update(repr(image.shape).encode())
            fingerprint.update(image.astype("<f4", copy=False).data)
            yield path

    lengths = Counter(source.split for source in sources)
    with closing(read()) as cases:
        builder = Cases(folder, lengths, cases, metadata, workers)
        written = builder.prepare()
        assert next(cases, None) is None, "cases were left over"
    builder.info.metadata["fingerprint"] = fingerprint.hexdigest()
    builder.info.write_to_directory(written)
    return written


def package_version() -> str:
    """Of this package."""
    try:
        return importlib.metadata.version("sscl_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write it in, removed at the end. Removes those of this host that were left."""
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_at_work(left, left.name.removeprefix(prefix).split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    # Not mkdtemp, whose folders nobody else may read.
    folder = target.parent / f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        with open(folder / "lock.new", "w") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.rename(lock.name, folder / "lock")  # only now others look at it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_at_work(folder: Path, pid: str) -> bool:
    """Whether the process lives that made a partial folder: by its lock, since in containers numbers return."""
    try:
        with open(folder / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without them
        pass
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


# --- Reading --------------------------------------------------------------------------------------


def open_prepared(path: Path) -> PreparedDataset:
    """Opens a prepared dataset; the first time, decodes its records to the cache.

    The cache is `<path>/cache`, or a folder under the user's temporary folder where `path` cannot
    be written. A cache that is not whole, or of another dataset, is made again.

    Args:
      path: folder made by `write_prepared`.

    Raises:
      FileNotFoundError: there is no prepared dataset at `path`.
      ValueError: there is one that this version cannot read, or that is damaged.
    """
    path = Path(path)
    metadata = _read_metadata(path)
    if not metadata:
        left = list(path.parent.glob(f".{glob.escape(path.name)}.partial-*")) if path.parent.is_dir() else []
        why = "its preparation was stopped half-way" if left else "nothing was prepared there"
        raise FileNotFoundError(
            f"{path} is not a prepared dataset ({why}): run `python -m data_prep.acdc` or "
            f"`python -m data_prep.folder` with --output {path}"
        )
    if metadata.get("format") != FORMAT or "fingerprint" not in metadata:
        raise ValueError(
            f"{path} has format {metadata.get('format')}, this version reads {FORMAT}: delete it and prepare again"
        )
    places = [path / "cache", _cache_elsewhere(metadata)]
    for cache in places:
        index = _read_index(cache, metadata)
        if index is not None:
            return PreparedDataset(path, metadata, cache, index)
    reason: OSError | None = None
    for cache in places:
        with ExitStack() as stack:
            try:
                cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                partial = stack.enter_context(_partial_folder(cache))
            except OSError as error:
                reason = error  # read-only: try the next place
                continue
            with _told_of(cache):
                _fill_cache(cache, partial, path, metadata)
        index = _read_index(cache, metadata)
        if index is not None:
            return PreparedDataset(path, metadata, cache, index)
        reason = OSError("it was changed while it was made")
    raise ValueError(f"{path}: no place for its cache ({reason}): make one of {places[0]}, {places[1]} writable")


def _read_metadata(path: Path) -> dict:
    """Metadata of the dataset in folder `path`, {} where there is none."""
    try:
        metadata = json.loads((path / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _cache_elsewhere(metadata: dict) -> Path:
    """By all that tells data sets apart: the same files are prepared otherwise by another version."""
    own = json.dumps([metadata[name] for name in ("inputs", "fingerprint", "version")])
    return (
        Path(tempfile.gettempdir())
        / f"sscl_jax-{os.getuid()}"
        / f"cache-{hashlib.sha256(own.encode()).hexdigest()[:32]}"
    )


def _read_index(cache: Path, metadata: dict) -> list[dict] | None:
    """Index of a cache; None if it is absent, of another dataset, or one of its files is cut short."""
    try:
        content = json.loads((cache / "index.json").read_text())
        if any(content.get(name, metadata[name]) != metadata[name] for name in CACHE_OF):  # older ones lack one
            return None
        for name, size in content["bytes"].items():
            if (cache / name).stat().st_size != size:
                print(f"{cache / name} is not {size} bytes long, the cache is made again")
                return None
        return content["cases"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fill_cache(cache: Path, partial: Path, path: Path, metadata: dict) -> None:
    """Decodes the records of the dataset at `path` to flat files below `partial`, renamed to `cache`.

    Processes that do so at the same time each write their own; the first one's is kept.
    """
    new = partial / "new"
    new.mkdir()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(new / name, "wb")) for name in CACHE_FILES}
        cases = [_append_case(files, split, record) for split, record in _records(path)]
    sizes = {name: (new / name).stat().st_size for name in CACHE_FILES}
    content = {name: metadata[name] for name in CACHE_OF} | {"bytes": sizes, "cases": cases}
    (new / "index.json").write_text(json.dumps(content))
    if cache.exists() and _read_index(cache, metadata) is None:
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(cache, partial / "old")  # so that it is never seen half-removed
    try:
        os.rename(new, cache)
    except OSError:
        if _read_index(cache, metadata) is None:
            raise


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """Split and decoded record of every case, in order."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(path))
        lengths = {s: builder.info.splits[s].num_examples for s in SPLITS if s in builder.info.splits}
        with tqdm(desc="decoding", total=sum(lengths.values()), unit=" cases", disable=None) as progress:
            for split, length in lengths.items():
                source = builder.as_data_source(split)
                for i in range(length):
                    yield split, source[i]
                    progress.update()
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: its records cannot be read ({error}): delete it and prepare again") from error


def _append_case(files: dict, split: str, record: dict) -> dict:
    """Appends one decoded record to the open cache files; returns its entry of the index."""
    image = record["image"]
    entry = {
        "case_id": record["case_id"].decode(),
        "patient_id": record["patient_id"].decode(),
        "split": split,
        "source": record["source"].decode(),
        "has_label": record["label"].size > 0,
        "shape": list(image.shape[:3]),
        "channels": image.shape[3],
        "spacing": record["spacing"].tolist(),
        "native_shape": record["native_shape"].tolist(),
        "native_affine": record["native_affine"].tolist(),
        "image_offset": files["images.f32"].tell() // CACHE_FILES["images.f32"],
        "label_offset": files["labels.u8"].tell(),
        "native_offset": files["native_labels.u8"].tell(),
    }
    files["images.f32"].write(image.data)
    files["labels.u8"].write(record["label"].tobytes())
    files["native_labels.u8"].write(record["native_label"].tobytes())
    return entry
