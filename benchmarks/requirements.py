"""Which Python packages the measurements of a GPU need and its machine lacks; for machines without a network.

    python benchmarks/requirements.py                                            on the machine with the GPU
    python benchmarks/requirements.py --installed=FILE --python=3.12             elsewhere: FILE is its `pip list`

It prints requirements, one a line, as pip reads them. The second form also knows what the missing packages need
themselves, if they are installed where it runs, and prints the versions of there:

    python benchmarks/requirements.py --installed=FILE --python=3.12 > missing.txt
    pip download --no-deps --only-binary=:all: --python-version=3.12 -r missing.txt -d wheels

Then, on the machine with the GPU: pip install --no-index --no-deps --target=site wheels/*.whl, and PYTHONPATH=site.
JAX's CUDA plugin is not among them: a machine with a GPU should have that of its driver.
"""

import argparse
import importlib.metadata
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # pip has a copy
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

_PROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"
_TESTS = ("pytest",)  # of the tests, only those that run on a GPU


def needed(peers: bool = True) -> list[str]:
    """Requirements of the package and of the tests that run on a GPU.

    Args:
      peers: whether PyTorch and transformers are among them, without which their sides are left out.
    """
    project = tomllib.loads(_PROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    tests = [text for text in extras["test"] if Requirement(text).name in _TESTS]
    return [*project["dependencies"], *tests, *(extras["hf"] if peers else [])]


def missing(requirements: Iterable[str], installed: dict[str, str], python: str = "") -> list[str]:
    """The requirements that are not installed, with all that they need, each once.

    Args:
      installed: {name of a package: its version, or "" if that is not known, which any requirement takes}.
      python: version that the packages are for, such as 3.12; "": this one.
    Returns: requirements as pip reads them, NAME==VERSION for packages that this environment has.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"} if python else {}
    found, to_check = {}, [(Requirement(text), "") for text in requirements]
    while to_check:
        requirement, extra = to_check.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not applies(requirement, environment | {"extra": extra}):
            continue
        version = installed.get(name)
        if version is not None and (not version or requirement.specifier.contains(version, prereleases=True)):
            continue  # what it needs came with it
        found[name] = str(requirement).partition(";")[0].strip()
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if requirement.specifier.contains(here.version, prereleases=True):
            found[name] = f"{name}=={here.version.partition('+')[0]}"
        for text in here.requires or ():
            to_check += [(Requirement(text), of) for of in ("", *requirement.extras)]
    return sorted(found.values())


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    """Whether the requirement's marker holds in an environment."""
    return requirement.marker is None or requirement.marker.evaluate(environment)


def missing_here() -> list[str]:
    """The requirements of the package and of its tests on a GPU that this environment lacks."""
    return missing(needed(peers=False), installed_here())


def installed_here() -> dict[str, str]:
    """{name: version} of the packages of this environment."""
    return {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions() if d.name}


def installed_in(listing: str) -> dict[str, str]:
    """{name: version} of a `pip list`, a `pip freeze` or names alone, one package a line."""
    lines = re.findall(r"(?m)^([A-Za-z0-9][\w.-]*?)(?:(?:==|[ \t]+)(\d\S*))?(?:[ \t].*)?$", listing)
    return {canonicalize_name(name): version for name, version in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", help="`pip list` of the machine with the GPU; by default this environment")
    parser.add_argument("--python", default="", help="its Python, such as 3.12; by default this one")
    arguments = parser.parse_args()
    path = arguments.installed
    installed = installed_in(pathlib.Path(path).read_text()) if path else installed_here()
    lines = missing(needed(), installed, arguments.python)
    print("\n".join(lines) or "nothing is missing", file=sys.stdout if lines else sys.stderr)


if __name__ == "__main__":
    main()
