#!/usr/bin/env bash
# Gathers in carry/ (ignored by git) what a machine without a network lacks: wheels and images.
#   experiments/accelerator/prepare.sh SET.npz [PYTHON_VERSION]
# SET.npz is a data set as bdjax/datasets/npz.py reads it; PYTHON_VERSION is the other machine's (default 3.12).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
python=${BDJAX_PYTHON:-python3}
carry=$here/carry
limit=$((60 * 1024 * 1024)) # bytes of the tree and of carry/ together
[ $# -ge 1 ] || { sed -n '2,4p' "${BASH_SOURCE[0]}" >&2; exit 2; }
version=${2:-3.12}

pinned() { # the pin of a package in constraints.txt, for Python 3.12 and newer where it says so
  grep -E "^$1==" "$root/constraints.txt" | grep -v 'python_version < ' | head -n 1 | cut -d ';' -f 1
}

mkdir -p "$carry/wheels"
rm -f "$carry"/wheels/*.whl "$carry/images.npz"
# the first five are missing there; the rest is for a machine whose own are out of pyproject.toml's range
names=(jaxopt dm-pix tyro docstring-parser typeguard flax optax chex orbax-checkpoint)
pins=()
for name in "${names[@]}"; do pins+=("$(pinned "$name")"); done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest "$carry/wheels" "${pins[@]}"
PYTHONPATH="$here/.." "$python" -m accelerator.images pack "$1" "$carry/images.npz"
(cd "$root" && git describe --always --dirty --abbrev=40) > "$carry/commit.txt" # a copied tree does not say it

tree=$(cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -n 1 | cut -f 1)
carried=$(du -sb "$carry" | cut -f 1)
echo "tree $tree bytes, carry $carried bytes, limit $limit"
[ $((tree + carried)) -le "$limit" ] || { echo "too large: give a smaller set" >&2; exit 1; }
