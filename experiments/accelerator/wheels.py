"""Packages that bdjax needs and this Python lacks, from wheels that were carried along; no network is asked.

    python -m accelerator.wheels FOLDER TARGET

A wheel of FOLDER is unpacked into TARGET when its distribution is missing here, or is not within the range that
pyproject.toml gives. So wheels of what the machine should have (flax, optax, Orbax) may lie beside the others.
"""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def needed(folder: Path, root: Path = ROOT) -> list[Path]:
    """The wheels in `folder` of distributions that are missing here or out of pyproject.toml's range."""
    wheels = {canonicalize_name(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}
    with (root / "pyproject.toml").open("rb") as file:
        listed = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    ranges = {canonicalize_name(requirement.name): requirement.specifier for requirement in listed}
    chosen = []
    for name, path in wheels.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            chosen.append(path)
            continue
        if name in ranges and version not in ranges[name]:
            chosen.append(path)
    return chosen


def install(wheels: list[Path], target: Path) -> None:
    """Unpack wheels into `target` without their requirements. Raises CalledProcessError when pip refuses one."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *map(str, wheels)]
    if wheels:
        subprocess.run(command, check=True)


if __name__ == "__main__":
    install(needed(Path(sys.argv[1])), Path(sys.argv[2]))
