"""Commands sbatch and squeue that run job arrays on this machine, one task after the other."""

import os
import stat
import sys
from pathlib import Path

_SBATCH = """#!{python}
import re, subprocess, sys
from pathlib import Path

state = Path({state!r})
script, options = sys.argv[-1], sys.argv[1:-1]
if (state / "refuse").exists():
    sys.exit("sbatch: error: invalid partition specified: nowhere")
number = 100 + len(list(state.glob("*.job")))
dependencies = [i for o in options if o.startswith("--dependency=afterany:") for i in o.partition(":")[2].split(":")]
last = re.search(r"^#SBATCH --array=0-(\\d+)", Path(script).read_text(), re.M)[1]
(state / f"{{number}}.job").write_text(script + " after " + " ".join(dependencies))
words = [sys.executable, {runner!r}, {state!r}, str(number), script, last, *dependencies]
subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(f"{{number}};cluster")
"""

_RUNNER = """
import os, subprocess, sys, time
from pathlib import Path

state, number, script, last, *dependencies = sys.argv[1:]
while not all(Path(state, f"{d}.done").exists() for d in dependencies):
    time.sleep(0.05)
for task in range(int(last) + 1):
    lost = Path(state, "lose-one")
    if lost.exists():
        lost.unlink()
        continue
    subprocess.run(["bash", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)})
Path(state, f"{number}.done").touch()
"""

_SQUEUE = """#!{python}
import sys
from pathlib import Path

ids = sys.argv[-1].partition("=")[2].split(",")
known = [i for i in ids if Path({state!r}, f"{{i}}.job").exists()]
if not known:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
print(*[i for i in known if not Path({state!r}, f"{{i}}.done").exists()], sep="\\n")
"""


def install(folder: Path, monkeypatch) -> Path:
    """Put the commands first on the PATH; return the folder of their state: N.job, N.done, and `lose-one`, `refuse`."""
    (state := folder / "state").mkdir()
    (programs := folder / "bin").mkdir()
    (runner := folder / "runner.py").write_text(_RUNNER)
    for name, source in (("sbatch", _SBATCH), ("squeue", _SQUEUE)):
        path = programs / name
        path.write_text(source.format(python=sys.executable, state=str(state), runner=str(runner)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return state
