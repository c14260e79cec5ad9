"""One command for all data sets: `sscl-prepare NAME ...` is `python -m data_prep.NAME ...`."""

import importlib
import sys
from pathlib import Path

HELPERS = ("__init__", "__main__", "common")


def names() -> dict[str, str]:
    """The preparers and the check, with the first line of what each says of itself."""
    files = [p for p in sorted(Path(__file__).parent.glob("*.py")) if p.stem not in HELPERS]
    return {p.stem: p.read_text(encoding="utf-8").split("\n", 1)[0].strip('"') for p in files}


def main() -> None:
    """Hands the other arguments to the command that the first one names."""
    known = names()
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print("usage: sscl-prepare NAME ...   (sscl-prepare NAME --help tells the rest)\n")
        print("\n".join(f"  {name:8} {line}" for name, line in known.items()))
        sys.exit(0 if sys.argv[1:] else 2)
    name = sys.argv.pop(1)
    if name not in known:
        sys.exit(f"error: no data set {name!r}: choose one of {', '.join(known)}.")
    from data_prep import common

    common.run(importlib.import_module(f"data_prep.{name}").main)


if __name__ == "__main__":
    main()
