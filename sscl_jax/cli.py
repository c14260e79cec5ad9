"""What the commands share: how they describe themselves, and options in either spelling."""

import argparse
import re
import sys
from collections.abc import Sequence


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m module`; its help shows the description, the module's docstring, as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses `argv`, or the command line if it is None; `--skip-bad` is taken for `--skip_bad`."""
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args([re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in words])
