"""The sweeps of this folder, and a page of each: `python experiments/run.py [--quick]`."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: The cheap one first, as within claim.toml: a set that is stopped has most to show.
SWEEPS = ("baselines", "claim")
QUICK = ("rounds=4", "seeds=0")


def main() -> int:
    """The worst exit code of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and 4 rounds: minutes")
    parser.add_argument("--out", type=Path, help="default: build/experiments, or -quick")
    args = parser.parse_args()
    out = args.out or Path("build", "experiments-quick" if args.quick else "experiments")
    small = Path("build", "small.npz")
    codes = []
    if not small.exists():
        codes.append(python(HERE / "small_data.py", small))
    for name in SWEEPS:
        words = QUICK if args.quick else ()
        codes.append(fedmap("sweep", HERE / f"{name}.toml", *words, "--out", out / name))
        codes.append(fedmap("report", out / name))
    return max(codes)


def fedmap(*words: str | Path) -> int:
    return python("-m", "fedmap_sparse", *words)


def python(*words: str | Path) -> int:
    return subprocess.run([sys.executable, *map(str, words)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
