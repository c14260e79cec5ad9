"""What the commands share: how they describe themselves, and options in either spelling."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m module`; its help shows the description, the module's docstring, as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder that an option names, and its parents; an OSError says which option to change."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}={folder} cannot be written ({error.strerror}): choose another folder.") from error


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses `argv`, or the command line if it is None; `--skip-bad` is taken for `--skip_bad`."""
    return parser.parse_args(underscored(sys.argv[1:] if argv is None else argv))


def underscored(words: Sequence[str]) -> list[str]:
    """Arguments with the hyphens in the names of options made underscores."""
    return [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
