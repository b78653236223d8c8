#!/usr/bin/env bash
# Everything worth measuring in nine minutes of one accelerator, unattended and without a network (README.md):
#   experiments/accelerator/run.sh --out DIR [--smoke] [--images FILE] [--budget SECONDS] [--only STEP,STEP]
#   BDJAX_PYTHON chooses the interpreter.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${BDJAX_PYTHON:-python3}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
work=$(mktemp -d "${TMPDIR:-/tmp}/bdjax-accelerator.XXXXXX")

finish() { # the run packs its files itself; where it was killed, its note of the output directory is still there
  [ -f "$work/out" ] && "$python" -m accelerator.packing "$(cat "$work/out")" "$work/keep"
  rm -rf "$work"
}
trap finish EXIT
trap 'kill -TERM "$child" 2>/dev/null' TERM INT

"$python" -m accelerator --work "$work" "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the run has packed
  wait "$child"
  code=$?
done
exit "$code"
