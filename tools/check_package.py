"""Builds the sdist, builds the wheel from it, and uses the wheel as a stranger would.

    python tools/check_package.py

The wheel is installed into a new environment outside the repository, with no compiler and nothing
else of this machine on PATH, without extras: so it shows what the core needs and that it is there.
Fails at the first thing that does not hold. Reads PIP_ARGS.
"""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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


def needed_glibc(shown: str) -> str:
    """The oldest glibc that a wheel runs with, from what `auditwheel show` says of it."""
    platform = re.search(r'platform tag:\s+"manylinux_(\d+)_(\d+)_\w+"', " ".join(shown.split()))
    if platform is None:
        sys.exit("the wheel fits no manylinux platform: auditwheel says why above")
    return f"the wheel needs glibc {platform[1]}.{platform[2]} or later"


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

        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=outside)
        if sys.platform == "linux":
            print(needed_glibc(run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=outside)))

        venv.create(outside / "venv", with_pip=True)
        scripts = outside / "venv" / "bin"
        python = scripts / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        arguments = ("--only-binary", ":all:", "-c", constraints)
        options = shlex.split(os.environ.get("PIP_ARGS", ""))
        run(*pip, *arguments, *options, wheel, cwd=outside, path=scripts)
        output = run(python, ROOT / "tools" / "check_wheel.py", cwd=outside, path=scripts)
        if str(scripts.parent) not in output:
            sys.exit("it was not the installed package that ran")
        run(scripts / "fedmap-sparse", "info", cwd=outside, path=scripts)
    print("the package holds what it should, and works without a compiler")


if __name__ == "__main__":
    main()
