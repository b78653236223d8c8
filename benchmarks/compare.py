"""bdjax beside PyTorch on the same work, in turn (A B A B), with the ratio of each pair of runs and its spread.

    python benchmarks/compare.py --torch-python /path/to/python --out experiments/results/speed
    python benchmarks/compare.py --victims DIR DIR DIR --only 'until/*' ...     # `bdjax train` wrote them

Workloads are those of `bdjax bench` that the PyTorch side (torch_peer.py) has, `startup` (a new process, caches filled,
until its first training step is over), and `until/DIR` for each victim directory: seconds of I-BAU until the attack
success rate on held-out images is below --goal, both sides from the same weights (exported as `bdjax export` does) and
with the same images; bdjax by the schedule that --ibau asks for, PyTorch by the release's. Both are measured after each
round, outside the time.

Each side is a process of its own, bound to the same cores, with as many threads and, unless --pages small, large pages
of memory (bdjax/cli/_large_pages.py; `bdjax` asks for them itself). Both are started anew for every workload, prepare
it and run it once before anything counts. A side that takes longer than --limit is stopped and the comparison goes on;
where that is PyTorch, and it compiled its networks (on a GPU), it is started once more without compiling, and the row
says so: --compile-limit is how long compiling may take. The results so far are written after each workload, as
compare.json and README.md in --out.
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
ANSWER = "@ "  # how a worker's answers begin; anything else that it prints is passed on


class Gone(Exception):
    """A worker that died, took too long, or has no such workload; the message says it."""


class Late(Gone):
    """A worker that took too long."""


class Worker:
    """One side of one workload."""

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
        """What the worker answers. Raises Gone."""
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
        found = json.loads(line)
        if "refused" in found:
            raise Gone(f"{self.side}: {found['refused']}")
        return found

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
    """This checkout first, so that an interpreter without an installed bdjax finds it."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])}


def _pages(asked: str) -> dict[str, str]:
    """What both sides' C library is told of transparent huge pages."""
    from bdjax.cli import _large_pages

    return {"GLIBC_TUNABLES": f"{_large_pages.TUNABLE}={int(asked == 'large')}"}


# --- what a worker does


def work(side: str, threads: int) -> None:
    """Answer requests from standard input: prepare a workload, then run it once for every {"go"}."""
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
            found: dict[str, Any] = {"seconds": time.perf_counter() - begin}
            if name.startswith("until/"):
                found |= result
            if "prepare" in request:
                found |= {"version": version, "note": note, "check": _check(name, result)}
        except LookupError:
            found = {"refused": "has no such workload"}
        sys.stdout.write(f"{ANSWER}{json.dumps(found)}\n")
        sys.stdout.flush()


def _check(name: str, result: Any) -> float | None:
    """Of triggered images, their mean: it must be the same on both sides."""
    if not name.startswith("trigger/"):
        return None
    import numpy as np

    return float(np.asarray(getattr(result, "cpu", lambda: result)()[:1000]).mean(dtype=float))


def _bdjax_side(threads: int) -> tuple[str, Any]:
    import jax

    from bdjax.bench import workloads
    from bdjax.cli._devices import prepare_jax

    prepare_jax()

    def prepare(request: dict[str, Any]) -> tuple[Any, str]:
        name, given = request["prepare"], request["sizes"]
        sizes = workloads.Sizes(**{**given, "shape": tuple(given["shape"])})
        if name.startswith("until/"):
            return _bdjax_until(request), f"schedule {request['ibau']}"
        job = workloads.job(name, sizes)
        return lambda: jax.block_until_ready(job.run()), ""

    device = jax.devices()[0]
    where = f"{threads} threads" if device.platform == "cpu" else device.device_kind
    return f"jax {jax.__version__}, {where}", prepare


def _bdjax_until(request: dict[str, Any]) -> Any:
    """I-BAU on a victim directory; the first call also writes down for the other side what it needs."""
    import jax
    import numpy as np

    from bdjax import interop
    from bdjax.config import SplitConfig, stage_key
    from bdjax.defenses import ibau
    from bdjax.engine.clock import Clock
    from bdjax.pipelines.artifact import open_artifact
    from bdjax.types import Callback

    directory, goal = Path(request["victim"]), request["goal"]
    config = ibau.Config(
        **{"schedule": "release", "rounds": request["rounds"], "batch_size": 100, "norm_bound": 10.0, **request["ibau"]}
    )
    split = SplitConfig(size=request["clean"], validation=0.0)
    artifact = open_artifact(directory, "ibau", config, split=split, dataset=request["dataset"] or None)
    own = artifact.evaluation
    if request["test"]:
        own.shorten(request["test"])
    problem = Path(request["problem"])
    interop.export_model(directory, "safetensors", problem.with_suffix(".safetensors"))
    np.savez(
        problem, model=artifact.victim.model.name, shape=artifact.victim.model.shape,
        classes=artifact.victim.model.classes, images=own.images,
        labels=own.labels, triggered=own.triggered, wanted=own.wanted, eligible=own.eligible,
        clean_images=own.clean_images, clean_labels=own.clean_labels,
    )  # fmt: skip
    before = own.measure(artifact.victim.variables)

    class Until(Callback):
        def __init__(self) -> None:
            self.clock, self.rounds, self.after = Clock(), 0, before

        def on_round_end(self, step: int, variables: Any, **arrays: Any) -> None:
            jax.block_until_ready(variables)
            with self.clock:
                self.after, self.rounds = own.measure(variables), step
            if self.after["asr"] < goal:
                raise _Reached

    def run() -> dict[str, Any]:
        callback = Until()
        with contextlib.suppress(_Reached):
            ibau.purify(
                config, artifact.victim, artifact.view(callback), stage_key(artifact.experiment.seed, "defense")
            )
        found = {
            "seconds": callback.clock.read()[0],
            "rounds": callback.rounds,
            "reached": callback.after["asr"] < goal,
        }
        return found | {
            "before": (before["acc"], before["asr"]),
            "after": (callback.after["acc"], callback.after["asr"]),
        }

    return run


class _Reached(Exception):
    """The goal is met."""


def _torch_side(threads: int) -> tuple[str, Any]:
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
    """Go through the workloads; write what is known after each."""
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
            own = {**request, "prepare": name, "victim": victims.get(name, "")}
            try:
                row = _startup(options, folder) if name == STARTUP else _compared(own, options, folder)
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
    """Both sides of one workload, in turn; which one begins changes from pair to pair."""
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    ready: dict[str, dict[str, Any]] = {}
    if request["prepare"] == "trigger/blended":
        request["picture"] = _picture(request["sizes"], folder)
    with contextlib.ExitStack() as ended:
        workers = {}
        for side in SIDES:  # one after the other: neither disturbs the other
            workers[side], ready[side] = _ready(side, request, options, folder, ended)
        for turn in range(options.repeats):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                answers[side].append(workers[side].ask({"go": True}, options.limit))
    own, other = (ready[side]["check"] for side in SIDES)
    if own is not None and abs(own - other) > 0.5:
        raise Gone(f"the two sides do not compute the same: {own} and {other}")
    row: dict[str, Any] = {side: [answer["seconds"] for answer in answers[side]] for side in SIDES}
    row |= {f"{side}_{fact}": ready[side][fact] for side in SIDES for fact in ("version", "note")}
    row |= {f"{side}_first": ready[side]["seconds"] for side in SIDES}
    for side in SIDES:
        if "reached" in answers[side][-1]:
            row[f"{side}_found"] = answers[side]
    if "bdjax_found" in row:
        mine, theirs = (row[f"{side}_found"][0]["before"] for side in SIDES)
        if max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) > 0.01:
            raise Gone(f"the two sides do not begin with the same model: {mine} and {theirs} (ACC, ASR)")
    return row | _ratios(row)


def _ready(
    side: str, request: dict[str, Any], options: argparse.Namespace, folder: str, ended: contextlib.ExitStack
) -> tuple[Worker, dict[str, Any]]:
    """A worker that has prepared the workload, and its answer; PyTorch without compiling, if that takes too long."""
    python = {"bdjax": options.jax_python, "torch": options.torch_python}[side]
    cache = str(options.cache.absolute() if options.cache else Path(folder, "cache"))

    def started(compiled: bool, limit: float) -> tuple[Worker, dict[str, Any]]:
        worker = Worker(python, side, options.threads, options.pages, cache)
        ended.callback(worker.end)
        try:
            return worker, worker.ask({**request, "compiled": compiled}, limit)
        except Late:
            worker.end()  # its memory on the device is needed
            raise

    if side == "bdjax" or not options.compile_limit:
        return started(True, options.limit)
    try:
        return started(True, options.compile_limit)
    except Late:
        return started(False, options.limit)


def _startup(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    commands = {
        "bdjax": [options.jax_python, "-m", "bdjax", "_bench", "first-step"],
        "torch": [options.torch_python, str(HERE / "torch_peer.py"), "first-step"],
    }
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder, "startup"))}
    env = {**os.environ, **_path(), **_pages(options.pages), **cache}
    row: dict[str, Any] = {side: [] for side in SIDES}
    for turn in range(options.repeats + 1):  # the first fills caches
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
    """The picture that `blended` mixes in, for the other side."""
    command = [sys.executable, "-c", _DRAW, json.dumps(sizes["shape"]), str(Path(folder, "picture.npy"))]
    subprocess.run(command, check=True, env={**os.environ, **_path()})
    return command[-1]


_DRAW = """
import json, sys
import numpy as np
from bdjax.attacks import blended
from bdjax.types import Model, Task
shape = tuple(json.loads(sys.argv[1]))
task = Task(np.zeros((1, *shape), np.uint8), np.zeros(1, np.int32), Model("none", shape, 10, None, None), None)
np.save(sys.argv[2], np.asarray(blended.prepare(blended.Config(), task, None)["picture"]))
"""


def _fields(given: list[str]) -> dict[str, Any]:
    """["schedule=release", "rounds=3"] as a dictionary; values are JSON where they can be."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--ibau takes FIELD=VALUE, such as schedule=release; got {text!r}.")
        with contextlib.suppress(ValueError):
            found[name] = json.loads(value)
        found.setdefault(name, value)
    return found


def _command() -> str:
    """The command as it was given, without the paths of this machine."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/compare.py", *words])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch and numpy")
    parser.add_argument("--jax-python", default=sys.executable, help="an interpreter with what bdjax needs")
    parser.add_argument("--only", default="", help="names or patterns with commas between; default all")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs of each workload")
    parser.add_argument("--suite", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores of each side")
    parser.add_argument("--pages", choices=("large", "small"), default="large", help="of memory, for both sides")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one answer of a side")
    parser.add_argument("--compile-limit", type=float, default=0, help="seconds for torch.compile; 0: no second start")
    parser.add_argument("--cache", type=Path, help="of bdjax's compiled programs; default an empty one")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="directory of compare.json and README.md")
    parser.add_argument("--victims", nargs="*", default=[], help="victim directories of bdjax, for until/NAME")
    parser.add_argument("--dataset", default="", help="where the victims' data set lies now, if it has moved")
    parser.add_argument("--rounds", type=int, default=5, help="until: rounds of I-BAU at most, on each side")
    parser.add_argument("--goal", type=float, default=0.2, help="until: the attack success rate to come below")
    parser.add_argument("--clean", type=int, default=5000, help="until: the defender's images")
    parser.add_argument("--test", type=int, default=0, help="until: held-out images that are measured; 0: all")
    parser.add_argument(
        "--ibau", nargs="*", default=["schedule=release"], help="until: fields of bdjax's I-BAU, FIELD=VALUE"
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("repeats", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}.")
    return options


# --- how it is told


def line(row: dict[str, Any]) -> str:
    """One workload as text."""
    if "failed" in row:
        return f"{row['name']:36s}not compared: {row['failed']}"
    cells = "   ".join(f"{side} {spread(row[side])} s" for side in SIDES)
    return f"{row['name']:36s}ratio {spread(row['ratios'])}   {cells}"


def spread(values: list[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def markdown(result: dict[str, Any]) -> str:
    """The comparison as a page."""
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
        "Both sides in turn, the one that begins changing from pair to pair, after a run that does not count. Seconds "
        "of one run: median (least to most). Ratio: bdjax / PyTorch of each pair, below 1 where bdjax is faster.",
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
            "`until`: I-BAU until the ASR is below the goal, measured after each round, outside the time; ACC and ASR "
            "in % of the last run.",
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
    left = [row for row in result["rows"] if "failed" in row]
    lines += ["", *(f"- {row['name']}: not compared ({row['failed']})" for row in left)]
    if result["small"]:
        lines += ["", "**Tiny sizes: these numbers mean nothing.**"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
