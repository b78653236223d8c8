"""`bdjax audit`: detect a backdoor in a model and its target class."""

import json
from dataclasses import dataclass
from pathlib import Path

from bdjax.cli._devices import run_context
from bdjax.cli._options import DeviceFlags
from bdjax.cli._output import print_remarks, say
from bdjax.cli._parsing import first_argument, parse_flags
from bdjax.text import parse_names

ORDER = 41
USAGE = (
    "DIR [--clean-data D] [--methods A,B] [--A.FIELD ..] [--size N] [--budget SECONDS] [--reference DIR,DIR] "
    "[--out DIR]"
)
SUMMARY = "detect a backdoor in the model in DIR, and its target class"


@dataclass
class Flags(DeviceFlags):
    """Flags of `bdjax audit`."""

    clean_data: str | None = None
    """Data set of labelled clean images: digits, npz:PATH, folder:PATH or tfds:NAME; the test split is used. Default:
    the data set that the model was trained on. Without one (an imported model), or with none, only the detectors run
    that need no images."""
    methods: str = ""
    """Comma-separated names of detectors; default: additive and patch; without images leaves, mm_bd and synthetic. age,
    baeraser, neural_cleanse and universal run on request: they take long, or accuse clean models too often. The fields
    of a named detector are flags: --methods additive --additive.sources each."""
    size: int | None = None
    """Number of clean images to use; default: 1,000, or all if there are fewer. 100 are enough."""
    budget: float | None = None
    """Seconds after which no further detector is started; default: all run."""
    level: float | None = None
    """Level of the verdict, in (0, 0.3]: the largest p-value, corrected for the number of detectors, that convicts.
    Default: 0.05, and 0.03 without images."""
    reference: str = ""
    """Comma-separated directories of at least two clean models of the same kind and data set. Each class is then
    compared with itself in those models, which is more reliable than a comparison with the other classes."""
    seed: int = 0
    """Seed of the choice of images and of the methods' random numbers."""
    out: Path | None = None
    """Directory of audit.json and audit.png, where existing ones are replaced; default: DIR-audit."""


def _named_configs(argv: list[str]) -> dict[str, type]:
    """Config classes of the installed detectors that --methods names, by name."""
    from bdjax import registry
    from bdjax.config import config_of

    joined = " ".join(argv).replace("--methods=", "--methods ").split()
    value = joined[joined.index("--methods") + 1] if "--methods" in joined[:-1] else ""
    return {name: config_of("detectors", name) for name in parse_names(value) if name in registry.names("detectors")}


def main(argv: list[str]) -> None:
    """Run the command with the arguments that follow its name."""
    directory = Path(first_argument("audit", argv))
    configs = _named_configs(argv[1:])
    options = parse_flags("audit", (str(directory),), argv[1:], Flags, **configs)
    from bdjax.io import checkpoint
    from bdjax.pipelines.audit import AuditSettings, audit
    from bdjax.reports import audit as report

    settings = AuditSettings(
        options.seed, {name: getattr(options, name) for name in configs}, level=options.level, budget=options.budget
    )
    with run_context(options) as context:
        result, arrays = audit(
            directory, parse_names(options.methods), dataset=options.clean_data, size=options.size, settings=settings,
            references=[Path(path) for path in parse_names(options.reference)], context=context,
            say=lambda name, finding: say(f"{name}: {report.sentence(finding)}"),
        )  # fmt: skip
        out = options.out or directory.with_name(f"{directory.name}-audit")
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out / "audit.json", json.dumps(result, indent=1) + "\n")
        report.draw(result, arrays, out / "audit.png")
    say(report.table(result))
    print_remarks(result)
    say(f"evidence: {out / 'audit.json'}, {out / 'audit.png'}")
    if options.json:
        say(json.dumps(result))
