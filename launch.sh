#!/usr/bin/env bash
# Installs bdjax into a virtual environment if necessary, then runs it:
#   ./launch.sh demo | test [--all | --slow] | any bdjax command
#   BDJAX_PYTHON=/path/to/python    interpreter (default: the newest from 3.11)
#   BDJAX_VENV=/path                virtual environment (default: .venv)
#   BDJAX_EXTRAS=cuda13             extras of pyproject.toml to install
#   BDJAX_TEST_WORKERS=4            test processes (default: one per core, at most 8)
# In a Slurm array, `sweep` runs the shard of the array task.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${BDJAX_VENV:-$here/.venv}

usable() { "$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != ($2))" >/dev/null 2>&1; }

find_python() { # prints the newest Python from 3.11; versions of pyenv count even if none is selected
  local minor candidate
  for minor in 14 13 12 11; do
    for candidate in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python python3; do
      if usable "$candidate" "3, $minor"; then
        echo "$candidate"
        return
      fi
    done
  done
  echo "bdjax needs Python 3.11 or newer with venv (Debian: apt install python3-venv); set BDJAX_PYTHON to one." >&2
  exit 2
}

quietly() { # quietly COMMAND...: runs the command and prints its output only if it fails
  local log status=0
  log=$(mktemp)
  "$@" > "$log" 2>&1 || status=$?
  [ "$status" = 0 ] || cat "$log" >&2
  rm -f "$log"
  return "$status"
}

install() { # install EXTRAS: installs bdjax, once for each state of pyproject.toml and constraints.txt
  local checksum stamp="$venv/.installed-${1:-base}"
  checksum=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ] && return
  if [ ! -x "$venv/bin/python" ]; then
    local python=${BDJAX_PYTHON:-$(find_python)}
    echo "launch.sh: creating $venv with $python ($("$python" --version 2>&1))" >&2
    quietly "$python" -m venv "$venv"
  fi
  echo "launch.sh: installing bdjax${1:+[$1]} into $venv" >&2
  quietly "$venv/bin/python" -m pip install --disable-pip-version-check \
    --constraint "$here/constraints.txt" --editable "$here${1:+[$1]}"
  echo "$checksum" > "$stamp"
}

run_tests() { # run_tests ARGUMENTS...: checks lint, format and types, then runs pytest, one process per core
  local tier=() bin="$venv/bin" cores
  cores=$(getconf _NPROCESSORS_ONLN)
  case "${1:-}" in
    --all) shift ;;
    --slow) tier=(-m slow) && shift ;;           # without lint and types, which the fast tier checks
    "") tier=(-m "not slow") ;;
  esac
  if [ "${tier[*]:-}" != "-m slow" ]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
  fi
  exec "$bin/python" -m pytest --numprocesses "${BDJAX_TEST_WORKERS:-$((cores < 8 ? cores : 8))}" --dist loadscope \
    --durations 10 --durations-min 1 ${tier[@]+"${tier[@]}"} "$@"
}

extras=${BDJAX_EXTRAS:-}
if [ "${1:-}" = test ]; then
  install "test${extras:+,$extras}"
  shift
  cd "$here"
  run_tests "$@"
fi
install "$extras"
if [ "${1:-}" = sweep ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  set -- "$@" --shard "$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-1}"
fi
exec "$venv/bin/bdjax" "$@"
