"""Compare bdjax with PyTorch on the same workloads, in alternation (A B A B), by the ratio of each pair of runs.

    python benchmarks/compare.py --torch-python /path/to/python --out experiments/results/speed
    python benchmarks/compare.py --victims DIR DIR DIR --only 'until/*' ...     # directories of `bdjax train`

The workloads are those of `bdjax bench` that torch_peer.py implements; `startup`, the time from the start of a new
process with filled caches to its first training step; and `until/DIR` for each victim directory, the seconds of I-BAU
until the attack success rate on held-out images is below --goal. For the latter, both sides use the same weights
(written by `bdjax export`) and images; bdjax uses the schedule in --ibau, PyTorch the release's. Both are measured
after each round, which does not count.

Each side is a separate process, bound to the same cores, with the same number of threads and, unless --pages small,
large pages of memory (bdjax/cli/_large_pages.py; the `bdjax` command requests them itself). Both are restarted for
every workload, and its first run does not count. A side that takes longer than --limit is stopped and the comparison
continues with the next workload. If PyTorch takes longer than --compile-limit with compiled networks (on a GPU), it is
restarted without compilation, which the row states. Results are written after each workload, as compare.json and
README.md in --out.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIDES = ("bdjax", "torch")
STARTUP = "startup"
HERE = Path(__file__).parent
ANSWER = "@ "  # prefix of a worker's answers; its other output is passed on


class Gone(Exception):
    """A worker ended, took too long, or does not have the workload; the message states which."""


class Late(Gone):
    """A worker took too long."""


class Worker:
    """The process of one side for one workload."""

    def __init__(self, python: str, side: str, threads: int, pages: str, cache: str) -> None:
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45", "JAX_COMPILATION_CACHE_DIR": cache, **_pages(pages)}
        self.side = side
        self._process = subprocess.Popen(
            [python, __file__, "--worker", side, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **memory, **_path()},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._lines.put(line[len(ANSWER) :])
            else:
                sys.stderr.write(f"{self.side}: {line}")
        self._lines.put(None)

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """Send a request and return the worker's answer. Raises Gone."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            raise Late(f"{self.side}: longer than {limit:g} s") from None
        if line is None:
            raise Gone(f"{self.side}: ended early (its message is above)")
        result = json.loads(line)
        if "refused" in result:
            raise Gone(f"{self.side}: {result['refused']}")
        return result

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()


def _path() -> dict[str, str]:
    """Return the PYTHONPATH with this checkout first, for interpreters without an installed bdjax."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])}


def _pages(size: str) -> dict[str, str]:
    """Return the setting of the C library for transparent huge pages, for both sides."""
    from bdjax.cli import _large_pages

    return {"GLIBC_TUNABLES": f"{_large_pages.TUNABLE}={int(size == 'large')}"}


# --- worker processes


def work(side: str, threads: int) -> None:
    """Answer requests from standard input: prepare a workload, then run it once per {"go"}."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    version, prepare = {"bdjax": _bdjax_side, "torch": _torch_side}[side](threads)
    run: Any = None
    name = note = ""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                name = request["prepare"]
                run, note = prepare(request)
            begin = time.perf_counter()
            result = run()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - begin}
            if name.startswith("until/"):
                answer |= result
            if "prepare" in request:
                answer |= {"version": version, "note": note, "check": _check(name, result)}
        except LookupError:
            answer = {"refused": "has no such workload"}
        sys.stdout.write(f"{ANSWER}{json.dumps(answer)}\n")
        sys.stdout.flush()


def _check(name: str, result: Any) -> float | None:
    """Return the mean of triggered images, which must be the same on both sides; None for other workloads."""
    if not name.startswith("trigger/"):
        return None
    import numpy as np

    return float(np.asarray(getattr(result, "cpu", lambda: result)()[:1000]).mean(dtype=float))


def _bdjax_side(threads: int) -> tuple[str, Any]:
    """Return the version and the function that prepares a workload, for bdjax."""
    import jax

    from bdjax.bench import workloads
    from bdjax.cli._devices import prepare_jax

    prepare_jax()

    def prepare(request: dict[str, Any]) -> tuple[Any, str]:
        name, values = request["prepare"], request["sizes"]
        sizes = workloads.Sizes(**{**values, "shape": tuple(values["shape"])})
        if name.startswith("until/"):
            return _bdjax_until(request), f"schedule {request['ibau']}"
        job = workloads.job(name, sizes)
        return lambda: jax.block_until_ready(job.run()), ""

    device = jax.devices()[0]
    where = f"{threads} threads" if device.platform == "cpu" else device.device_kind
    return f"jax {jax.__version__}, {where}", prepare


def _bdjax_until(request: dict[str, Any]) -> Any:
    """Return a function that runs I-BAU on a victim, and write the weights and images for the PyTorch side."""
    import jax
    import numpy as np

    from bdjax import interop
    from bdjax.config import SplitConfig, stage_key
    from bdjax.defenses import ibau
    from bdjax.engine.clock import Clock
    from bdjax.pipelines.opening import EvaluationSource, open_artifact
    from bdjax.types import Callback

    directory, goal = Path(request["victim"]), request["goal"]
    config = ibau.Config(
        **{"schedule": "release", "rounds": request["rounds"], "batch_size": 100, "norm_bound": 10.0, **request["ibau"]}
    )
    split = SplitConfig(size=request["clean"], validation=0.0)
    source = EvaluationSource(request["dataset"] or None)
    artifact = open_artifact(directory, "ibau", config, split=split, source=source)
    evaluation = artifact.evaluation
    if request["test"]:
        evaluation.shorten(request["test"])
    problem = Path(request["problem"])
    interop.export_model(directory, "safetensors", problem.with_suffix(".safetensors"))
    np.savez(
        problem, model=artifact.victim.model.name, shape=artifact.victim.model.shape,
        classes=artifact.victim.model.classes, images=evaluation.images,
        labels=evaluation.labels, triggered=evaluation.triggered, goals=evaluation.goals, eligible=evaluation.eligible,
        clean_images=evaluation.clean_images, clean_labels=evaluation.clean_labels,
    )  # fmt: skip
    before = evaluation.measure(artifact.victim.variables)

    class StopAtGoal(Callback):
        def __init__(self) -> None:
            self.clock, self.rounds, self.after = Clock(), 0, before

        def on_round_end(self, step: int, variables: Any, **arrays: Any) -> None:
            jax.block_until_ready(variables)
            with self.clock:
                self.after, self.rounds = evaluation.measure(variables), step
            if self.after["asr"] < goal:
                raise _Reached

    def run() -> dict[str, Any]:
        callback = StopAtGoal()
        with contextlib.suppress(_Reached):
            ibau.purify(
                config, artifact.victim, artifact.view(callback), stage_key(artifact.experiment.seed, "defense")
            )
        return {
            "seconds": callback.clock.read()[0],
            "rounds": callback.rounds,
            "reached": callback.after["asr"] < goal,
            "before": (before["acc"], before["asr"]),
            "after": (callback.after["acc"], callback.after["asr"]),
        }

    return run


class _Reached(Exception):
    """The goal has been reached."""


def _torch_side(threads: int) -> tuple[str, Any]:
    """Return the version and the function that prepares a workload, for PyTorch."""
    import torch_peer

    version = torch_peer.begin(threads)

    def prepare(request: dict[str, Any]) -> tuple[Any, str]:
        torch_peer.compiling = request.get("compiled", True)
        if request["prepare"].startswith("until/"):
            return torch_peer.until(request["problem"], request["rounds"], request["goal"])
        return torch_peer.job(request["prepare"], SimpleNamespace(**request["sizes"], picture=request["picture"]))

    return version, prepare


# --- the comparison


def main() -> None:
    """Compare all workloads, and write the results after each."""
    options = _options()
    if options.worker:
        return work(options.worker, options.threads)
    from bdjax import bench

    known = [*(name for name in bench.NAMES if name != STARTUP), STARTUP]
    known += [f"until/{Path(victim).name}" for victim in options.victims]
    names = bench.chosen(options.only, known)
    victims = {f"until/{Path(victim).name}": victim for victim in options.victims}
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        request = {"sizes": _sizes(options), "picture": "", "problem": str(Path(folder, "problem.npz"))}
        request |= {name: getattr(options, name) for name in ("rounds", "goal", "dataset", "clean", "test")}
        request["ibau"] = _fields(options.ibau)
        for name in names:
            of_name = {**request, "prepare": name, "victim": victims.get(name, "")}
            try:
                row = _startup(options, folder) if name == STARTUP else _compared(of_name, options, folder)
            except Gone as error:
                row = {"failed": str(error)}
            rows.append({"name": name, **row})
            facts = {
                "cores": os.cpu_count(),
                "threads": options.threads,
                "pages": options.pages,
                "small": options.small,
                "suite": options.suite,
            }
            facts |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "xla_flags": os.environ.get("XLA_FLAGS", "")}
            result = {"kind": "comparison", **facts, "command": _command(), "rows": rows}
            (options.out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
            (options.out / "README.md").write_text(markdown(result))
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()


def _compared(request: dict[str, Any], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run both sides of one workload in alternation; the first side changes from pair to pair."""
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    ready: dict[str, dict[str, Any]] = {}
    if request["prepare"] == "trigger/blended":
        request["picture"] = _picture(request["sizes"], folder)
    with contextlib.ExitStack() as ended:
        workers = {}
        for side in SIDES:  # one after the other, so that neither disturbs the other
            workers[side], ready[side] = _ready(side, request, options, folder, ended)
        for turn in range(options.repeats):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                answers[side].append(workers[side].ask({"go": True}, options.limit))
    ours, theirs = (ready[side]["check"] for side in SIDES)
    if ours is not None and abs(ours - theirs) > 0.5:
        raise Gone(f"the two sides do not compute the same: {ours} and {theirs}")
    row: dict[str, Any] = {side: [answer["seconds"] for answer in answers[side]] for side in SIDES}
    row |= {f"{side}_{fact}": ready[side][fact] for side in SIDES for fact in ("version", "note")}
    row |= {f"{side}_first": ready[side]["seconds"] for side in SIDES}
    for side in SIDES:
        if "reached" in answers[side][-1]:
            row[f"{side}_found"] = answers[side]
    if "bdjax_found" in row:
        ours, theirs = (row[f"{side}_found"][0]["before"] for side in SIDES)
        if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 0.01:
            raise Gone(f"the two sides do not begin with the same model: {ours} and {theirs} (ACC, ASR)")
    return row | _ratios(row)


def _ready(
    side: str, request: dict[str, Any], options: argparse.Namespace, folder: str, ended: contextlib.ExitStack
) -> tuple[Worker, dict[str, Any]]:
    """Start a worker and prepare the workload; PyTorch without compilation if that takes too long."""
    python = {"bdjax": options.jax_python, "torch": options.torch_python}[side]
    cache = str(options.cache.absolute() if options.cache else Path(folder, "cache"))

    def start(compiled: bool, limit: float) -> tuple[Worker, dict[str, Any]]:
        worker = Worker(python, side, options.threads, options.pages, cache)
        ended.callback(worker.end)
        try:
            return worker, worker.ask({**request, "compiled": compiled}, limit)
        except Late:
            worker.end()  # frees its memory on the device
            raise

    if side == "bdjax" or not options.compile_limit:
        return start(True, options.limit)
    try:
        return start(True, options.compile_limit)
    except Late:
        return start(False, options.limit)


def _startup(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Time the start of a process of each side up to its first training step."""
    commands = {
        "bdjax": [options.jax_python, "-m", "bdjax", "_bench", "first-step"],
        "torch": [options.torch_python, str(HERE / "torch_peer.py"), "first-step"],
    }
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "startup"))}
    env = {**os.environ, **_path(), **_pages(options.pages), **cache}
    row: dict[str, Any] = {side: [] for side in SIDES}
    for turn in range(options.repeats + 1):  # the first turn fills caches
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            begin = time.perf_counter()
            try:
                subprocess.run(commands[side], env=env, check=True, timeout=options.limit, capture_output=True)
            except (subprocess.SubprocessError, OSError) as error:
                raise Gone(f"{side}: {error}") from None
            if turn:
                row[side].append(time.perf_counter() - begin)
            else:
                row[f"{side}_first"] = time.perf_counter() - begin
    return row | _ratios(row)


def _ratios(row: dict[str, Any]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(row["bdjax"], row["torch"], strict=True)]
    return {"ratios": ratios, "ratio": statistics.median(ratios)}


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    from bdjax.bench import workloads

    return dataclasses.asdict(workloads.SMALL if options.small else workloads.SUITES[options.suite])


def _picture(sizes: dict[str, Any], folder: str) -> str:
    """Save the picture of the blended trigger for the PyTorch side, and return its path."""
    command = [sys.executable, "-c", _SAVE_PICTURE, json.dumps(sizes["shape"]), str(Path(folder, "picture.npy"))]
    subprocess.run(command, check=True, env={**os.environ, **_path()})
    return command[-1]


_SAVE_PICTURE = """
import json, sys
import numpy as np
from bdjax.attacks import blended
from bdjax.types import Model, Task
shape = tuple(json.loads(sys.argv[1]))
task = Task(np.zeros((1, *shape), np.uint8), np.zeros(1, np.int32), Model("none", shape, 10, None, None), None)
np.save(sys.argv[2], np.asarray(blended.prepare(blended.Config(), task, None)["picture"]))
"""


def _fields(flags: list[str]) -> dict[str, Any]:
    """Parse ["schedule=release", "rounds=3"] to a dictionary; values that are valid JSON are decoded."""
    fields: dict[str, Any] = {}
    for text in flags:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--ibau takes FIELD=VALUE, such as schedule=release; got {text!r}.")
        with contextlib.suppress(ValueError):
            fields[name] = json.loads(value)
        fields.setdefault(name, value)
    return fields


def _command() -> str:
    """Return the command line without absolute paths."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/compare.py", *words])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch and numpy")
    parser.add_argument("--jax-python", default=sys.executable, help="an interpreter with what bdjax needs")
    parser.add_argument("--only", default="", help="comma-separated names or patterns; default all")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs of each workload")
    parser.add_argument("--suite", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores of each side")
    parser.add_argument("--pages", choices=("large", "small"), default="large", help="memory pages of both sides")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one answer of a side")
    parser.add_argument("--compile-limit", type=float, default=0, help="seconds for torch.compile; 0: no second start")
    parser.add_argument("--cache", type=Path, help="directory of bdjax's compilation cache; default an empty one")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="directory of compare.json and README.md")
    parser.add_argument("--victims", nargs="*", default=[], help="victim directories of bdjax, for until/NAME")
    parser.add_argument("--dataset", default="", help="data set of the victims, if it has moved")
    parser.add_argument("--rounds", type=int, default=5, help="until: largest number of rounds of I-BAU")
    parser.add_argument("--goal", type=float, default=0.2, help="until: attack success rate to reach")
    parser.add_argument("--clean", type=int, default=5000, help="until: the defender's images")
    parser.add_argument("--test", type=int, default=0, help="until: held-out images for measuring; 0: all")
    parser.add_argument(
        "--ibau", nargs="*", default=["schedule=release"], help="until: fields of bdjax's I-BAU, FIELD=VALUE"
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("repeats", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}.")
    return options


# --- report


def line(row: dict[str, Any]) -> str:
    """Format one workload as a line of text."""
    if "failed" in row:
        return f"{row['name']:36s}not compared: {row['failed']}"
    cells = "   ".join(f"{side} {spread(row[side])} s" for side in SIDES)
    return f"{row['name']:36s}ratio {spread(row['ratios'])}   {cells}"


def spread(values: list[float]) -> str:
    """Format values as median (minimum to maximum)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def markdown(result: dict[str, Any]) -> str:
    """Format the comparison as a page of Markdown."""
    compared = [row for row in result["rows"] if "ratio" in row]
    versions = sorted({row[f"{side}_version"] for row in compared for side in SIDES if f"{side}_version" in row})
    lines = [
        "# bdjax beside PyTorch",
        "",
        f"`{result['command']}`",
        "",
        f"{'; '.join(versions)}; {result['cores']} cores, each side bound to the same {result['threads']}; "
        f"{result['pages']} pages of memory; "
        f"{'XLA_FLAGS ' + result['xla_flags'] if result['xla_flags'] else 'no XLA_FLAGS'}; {result['date']}.",
        "Both sides alternate, after a first run that does not count; the side that starts changes from pair to pair. "
        "Seconds of one run: median (minimum to maximum). Ratio: bdjax / PyTorch of each pair, below 1 where bdjax is "
        "faster.",
        "",
        "| workload | ratio | bdjax, s | PyTorch, s | n | PyTorch ran |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in compared:
        cells = [spread(row[key]) for key in ("ratios", *SIDES)]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {len(row['ratios'])} | {row.get('torch_note', '')} |")
    until = [row for row in compared if "bdjax_found" in row]
    if until:
        lines += [
            "",
            "`until`: I-BAU until the ASR is below the goal, measured after each round (not timed); ACC and ASR in % "
            "of the last run.",
            "",
            "| victim | side | seconds | rounds | reached | ACC before → after | ASR before → after |",
            "|---|---|--:|--:|---|--:|--:|",
        ]
    for row in until:
        for side in SIDES:
            last = row[f"{side}_found"][-1]
            rates = [f"{100 * a:.2f} → {100 * b:.2f}" for a, b in zip(last["before"], last["after"], strict=True)]
            reached = sum(answer["reached"] for answer in row[f"{side}_found"])
            cells = [
                row["name"],
                side,
                spread(row[side]),
                str(last["rounds"]),
                f"{reached} of {len(row[side])}",
                *rates,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    failed = [row for row in result["rows"] if "failed" in row]
    lines += ["", *(f"- {row['name']}: not compared ({row['failed']})" for row in failed)]
    if result["small"]:
        lines += ["", "**Tiny sizes: these numbers mean nothing.**"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
