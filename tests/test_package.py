"""The package as a whole: what importing it pulls in, its version, and what it ships."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedmap_sparse

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str) -> str:
    """Output of ``code`` in a new interpreter that finds this checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pulls_in_torch_and_numpy_alone() -> None:
    # torch and numpy come first: what they pull in themselves is theirs.
    added = python(
        "import sys, numpy, torch\n"
        "before = set(sys.modules)\n"
        "import fedmap_sparse\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(added - sys.stdlib_module_names - {'torch', 'numpy'}))"
    ).split()
    assert added == ["fedmap_sparse"]


def test_import_works_without_what_is_optional() -> None:
    optional = ["triton", "flwr", "nvflare", "matplotlib", "rich", "safetensors", "sklearn"]
    python(f"import sys; sys.modules.update(dict.fromkeys({optional})); import fedmap_sparse")


def test_public_names_are_there() -> None:
    assert sorted(fedmap_sparse.__all__) == sorted(set(fedmap_sparse.__all__))
    for name in fedmap_sparse.__all__:
        assert hasattr(fedmap_sparse, name)


def test_version_has_one_source() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "fedmap_sparse.__version__"
    }
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {fedmap_sparse.__version__}" in citation


def test_core_depends_on_numpy_and_torch() -> None:
    names = [requirement.split(">")[0] for requirement in PYPROJECT["project"]["dependencies"]]
    assert names == ["numpy", "torch"]


def test_constraints_are_within_the_accepted_ranges() -> None:
    pytest.importorskip("packaging", reason="packaging is not installed")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pairs}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    untested = {"flower", "nvflare"}  # not installed by `make`: their own issues pin them
    wanted = [*project["dependencies"]]
    wanted += [r for extra, group in extras.items() if extra not in untested for r in group]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_file_of_data_and_types_is_declared() -> None:
    declared = {
        path
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    built = {".py", ".pyc", ".so"}
    shipped = {
        path
        for path in (ROOT / "fedmap_sparse").rglob("*")
        if path.is_file() and path.suffix not in built
    }
    assert shipped == declared
    assert {"py.typed", "LICENSE"} <= {path.name for path in shipped}
