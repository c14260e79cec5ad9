"""What a preparation has done so far, by case, so that one that was killed goes on where it was.

The files lie beside the folder to be made, in `.NAME.partial-cases`, until that is whole. The name of each is a digest
of all that decides its content: what the files of the case hold, how they are read, the recipe, the code. So what has
changed is made again, and preparations that run at the same time, or the workers of one on many machines, can share the
folder. A file gets its name when it is whole, and ends with the SHA-256 of what is before.
"""

import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

_DIGEST = hashlib.sha256().digest_size


def folder_beside(output: Path) -> Path:
    """Folder of what is kept for the dataset `output`."""
    place = Path(output).resolve()  # where it is a link, beside what that leads to
    return place.parent / f".{place.name}.partial-cases"


@contextmanager
def removed_when_done(folder: Path) -> Iterator[Path]:
    """Makes `folder`; removes it at the end, unless that is an exception, or another preparation is at work in it."""
    with _locked(folder) as lock:
        yield folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the last one removes it
        except OSError:
            pass
        if folder.is_symlink():  # someone else's
            return
        with suppress(OSError):
            for path in folder.iterdir():
                if path.name != "lock":  # last, so that until all is gone who comes waits
                    path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> IO[str]:
    """A file in `folder` that this process shares a lock of, as far as the file system has locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder was removed by another preparation, which came to its end
            lock = open(folder / "lock", "a")
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                    return lock
            lock.close()


def digest(case: Any, *others: Any) -> str:
    """sha256 (hex) of the fields of `case`, its readers among them, of `others`, and of the code that prepares."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    code = [_code(str(path)) for path in sorted(Path(__file__).parent.glob("*.py"))]
    text = json.dumps([type(case), fields, others, code], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, set):
        return "set"  # in which a reader notes what it has told
    if inspect.ismethod(value):
        return [value.__func__, value.__self__]
    name = getattr(value, "__qualname__", "<")
    file = getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", None)  # none in a notebook
    if "<" not in name and file:
        return [value.__module__, name, _code(file)]
    text = repr(value)
    # An address tells nothing apart: another function may lie there next. What has one is never taken again.
    return uuid.uuid4().hex if " at 0x" in text else text


@functools.cache
def _code(path: str) -> str:
    """sha256 (hex) of a source file: between two releases the version of the package stays as it is."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write(path: Path, content: Callable[[IO[bytes]], Any]) -> None:
    """Makes a file, and its folder, by `content(file)`; under its name it appears whole."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "x+b") as file:
                content(file)
                file.seek(0)
                file.write(hashlib.file_digest(file, "sha256").digest())
            return os.replace(partial, path)
        except FileNotFoundError:
            continue  # the folder was removed by another preparation, which came to its end
        finally:
            partial.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Makes the .npz file `path`, as `write` does."""
    write(path, lambda file: np.savez(file, **arrays))


def read(path: Path) -> bytes:
    """The content that `write` gave to a file. Raises OSError, ValueError: it is not there, or not whole."""
    if not is_whole(path):
        raise ValueError(f"{path} is not whole")
    return path.read_bytes()[:-_DIGEST]


def is_whole(path: Path) -> bool:
    """Whether `path` is there with all that was written to it: power may have failed as it was."""
    digest, end = hashlib.sha256(), b""
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                end += block
                digest.update(end[:-_DIGEST])
                end = end[-_DIGEST:]
    except OSError:
        return False
    return end == digest.digest()
