"""Builds the sdist, builds the wheel from it, and uses the wheel as a stranger would.

    python tools/check_package.py

The wheel is installed into a new environment outside the repository, with no compiler and nothing
else of this machine on PATH, without extras: so it shows what the core needs and that it is there.
Fails at the first thing that does not hold. Reads PIP_ARGS.
"""

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import sys, torch, fedmap_sparse as fs
from fedmap_sparse.experiments import data, models, partition

model = models.build("mlp", (1, 28, 28), 10)
params = fs.flatten(model)
eligible = params.layout.initial_mask()
masks = [
    fs.ops.magnitude_mask(params.prunable, eligible.nnz // 10, within=eligible, backend=backend)
    for backend in ("reference", "cpu")
]
assert masks[0] == masks[1] and masks[0].nnz == eligible.nnz // 10
packed = fs.ops.pack(params.prunable, masks[1])
assert packed.numel() == masks[1].nnz
loaded = data.load()
assert len(partition.iid(loaded.train.labels, 10)) == 10
print(f"fedmap_sparse {fs.__version__} at {fs.__file__}: {len(loaded.train)} training images")
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """The command's output; with ``path``, that folder is all of PATH."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if path is not None:
        env["PATH"] = str(path)
    print("$", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"failed with exit status {done.returncode}")
    return done.stdout


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def require(archive: Path, wanted: set[str], present: set[str]) -> None:
    if absent := sorted(wanted - present):
        sys.exit(f"{archive.name} lacks {', '.join(absent)}")
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB, {len(present)} files")


def main() -> None:
    constraints = ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", outside / "dist", ROOT, cwd=outside)
        (sdist,) = (outside / "dist").glob("*.tar.gz")
        (wheel,) = (outside / "dist").glob("*.whl")

        files = tracked()
        package = {name for name in files if name.startswith("fedmap_sparse/")}
        sources = {name for name in files if name.startswith(("csrc/", "tests/", "docs/"))}
        with tarfile.open(sdist) as archive:
            present = {name.partition("/")[2] for name in archive.getnames()}
        require(sdist, package | sources | {"pyproject.toml", "setup.py", "LICENSE"}, present)
        with zipfile.ZipFile(wheel) as archive:
            present = set(archive.namelist())
        require(wheel, package, present)
        if strangers := {n.split("/")[0] for n in present if ".dist-info/" not in n} - {
            "fedmap_sparse"
        }:
            sys.exit(f"{wheel.name} installs {', '.join(sorted(strangers))} besides the package")

        venv.create(outside / "venv", with_pip=True)
        scripts = outside / "venv" / "bin"
        python = scripts / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        arguments = ("--only-binary", ":all:", "-c", constraints)
        options = shlex.split(os.environ.get("PIP_ARGS", ""))
        run(*pip, *arguments, *options, wheel, cwd=outside, path=scripts)
        output = run(python, "-c", SMOKE, cwd=outside, path=scripts)
        if str(scripts.parent) not in output:
            sys.exit("it was not the installed package that ran")
        run(scripts / "fedmap-sparse", "info", cwd=outside, path=scripts)
    print("the package holds what it should, and works without a compiler")


if __name__ == "__main__":
    main()
