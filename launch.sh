#!/usr/bin/env bash
# Sets up what is missing, then runs bdjax:  ./launch.sh demo | test [--all] | any bdjax command
#   BDJAX_PYTHON=/path/to/python chooses the interpreter, BDJAX_VENV=/path the environment (default .venv),
#   BDJAX_EXTRAS=cuda13 adds extras of pyproject.toml. In a Slurm array, `sweep` takes its shard from the task.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${BDJAX_VENV:-$here/.venv}

usable() { "$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != ($2))" >/dev/null 2>&1; }

find_python() { # the newest from 3.12 up, else 3.11; a pyenv that does not select a version still counts
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

quietly() { # quietly COMMAND...: its output is shown only when it fails
  local log status=0
  log=$(mktemp)
  "$@" > "$log" 2>&1 || status=$?
  [ "$status" = 0 ] || cat "$log" >&2
  rm -f "$log"
  return "$status"
}

install() { # install EXTRAS: once for each state of the two files that decide it
  local wanted stamp="$venv/.installed-${1:-base}"
  wanted=$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  if [ ! -x "$venv/bin/python" ]; then
    local python=${BDJAX_PYTHON:-$(find_python)}
    echo "launch.sh: making $venv with $python ($("$python" --version 2>&1))" >&2
    quietly "$python" -m venv "$venv"
  fi
  echo "launch.sh: installing bdjax${1:+[$1]} into $venv" >&2
  quietly "$venv/bin/python" -m pip install --disable-pip-version-check \
    --constraint "$here/constraints.txt" --editable "$here${1:+[$1]}"
  echo "$wanted" > "$stamp"
}

run_tests() { # run_tests ARGUMENTS...: lint, format, types, then pytest in one process a core
  local tier=() bin="$venv/bin" cores
  cores=$(getconf _NPROCESSORS_ONLN)
  case "${1:-}" in
    --all) shift ;;
    --slow) tier=(-m slow) && shift ;;           # the rest alone; lint and types are the fast tier's
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
