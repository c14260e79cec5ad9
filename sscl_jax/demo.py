"""The main job on data it makes itself, in minutes: draw phantoms, prepare them, train twice, compare.

    python -m sscl_jax.demo [--workdir=runs/demo]

The two trainings see the same two labelled patients and differ in one thing: the second also learns from the
patients without labels. Every step is a command of its own, and printed before it is run.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from sscl_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the commands one after the other; stops at the first that fails, with its exit status."""
    parser = cli.make_parser("sscl_jax.demo", __doc__)
    parser.add_argument("--workdir", default="runs/demo", help="folder for data and trainings (default runs/demo)")
    workdir = cli.parse(parser, argv).workdir
    commands = [
        ["-m", "data_prep.phantom", f"--output={workdir}/scans"],
        [
            "-m",
            "data_prep.acdc",
            f"--input={workdir}/scans",
            f"--output={workdir}/prepared",
            "--spacing=3",
        ],
    ]
    methods = ("supervised", "anatomical_pl")
    for method in methods:
        commands.append([
            "-m", "sscl_jax.main", f"--config=configs/phantom.py:{method}", f"--workdir={workdir}/{method}",
            f"--config.data.path={workdir}/prepared",
        ])  # fmt: skip
    commands.append(["-m", "sscl_jax.compare", *(f"{workdir}/{m}" for m in methods), "--split=test"])
    # The second training finds compiled what it shares with the first.
    environment = {"JAX_COMPILATION_CACHE_DIR": f"{workdir}/compiled"} | os.environ
    for command in commands:
        print(f"\n$ python {shlex.join(command)}", flush=True)
        if status := subprocess.run([sys.executable, *command], env=environment).returncode:
            sys.exit(status)
    print("\nCurves and pictures of each: " + ", ".join(f"{workdir}/{method}/report.html" for method in methods))


if __name__ == "__main__":
    main()
