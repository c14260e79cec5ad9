"""Trains on a data set larger than memory, and tells how much memory that takes.

    python benchmarks/large.py --data=data/acdc --gib=20 --steps=300

The data set is made of a prepared one: its training cases are listed again and again, without their labels, each time
at another place of one sparse file, which takes no room on the disk. To the training it is as any other of that
size.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sscl_jax.data.prepared import open_prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="prepared dataset, with a cache")
    parser.add_argument("--config", default="acdc", help="module below configs/")
    parser.add_argument("--gib", type=float, default=20.0, help="size of the images, GiB")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    try:
        open_prepared(args.data)  # makes the cache, if it is not there
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        shutil.copytree(args.data, large)
        cases = enlarge(large, int(args.gib * 2**30))
        size = (large / "cache" / "images.f32").stat().st_size
        print(f"{cases} cases, {size / 2**30:.1f} GiB of images", flush=True)
        command = [sys.executable, "-m", "sscl_jax.main", f"--config=configs/{args.config}.py"]
        command += [f"--workdir={folder}/run", f"--config.data.path={large}", f"--config.steps={args.steps}"]
        command += [f"--config.eval.every={args.steps}", "--config.data.device_memory=0"]
        start = time.monotonic()
        if status := subprocess.run(command).returncode:  # it has said why
            sys.exit(status)
        facts = json.loads((Path(folder) / "run" / "run.json").read_text())
        print(f"peak memory {facts['peak_memory_gib']:.2f} GiB, {time.monotonic() - start:.0f} s")


def enlarge(dataset: Path, size: int) -> int:
    """Repeats training cases of a prepared dataset until its images take `size` bytes; returns the number of cases."""
    path = dataset / "cache" / "index.json"
    index = json.loads(path.read_text())
    end = index["bytes"]["images.f32"]
    repeated, metadata = [], json.loads((dataset / "metadata.json").read_text())
    train = [case for case in index["cases"] if case["split"] == "train"]
    while end < size:
        for case in train:
            name = f"copy{len(repeated)}"
            place = {"case_id": name, "patient_id": name, "image_offset": end // 4, "has_label": False}
            repeated.append({**case, **place})
            metadata["patients"]["train"].append(name)
            d, h, w = case["shape"]
            end += 4 * d * h * w * case["channels"]
    # The order of the cases is by split.
    others = [case for case in index["cases"] if case["split"] != "train"]
    index["cases"], index["bytes"]["images.f32"] = train + repeated + others, end
    path.write_text(json.dumps(index))
    (dataset / "metadata.json").write_text(json.dumps(metadata))
    with open(dataset / "cache" / "images.f32", "r+b") as file:
        file.truncate(end)
    return len(index["cases"])


if __name__ == "__main__":
    main()
