"""Measure, audit and purify models, and attack purified ones again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdjax import registry
from bdjax.api._common import directory_of, make_config, run_context
from bdjax.api.objects import Audit, Model, Purification, Run
from bdjax.pipelines import audit as auditing
from bdjax.pipelines import purification, reactivation
from bdjax.pipelines.evaluate import evaluate as evaluate_directory
from bdjax.pipelines.opening import EvaluationSource
from bdjax.pipelines.purify_request import PurifyRequest
from bdjax.pipelines.results import EvaluationResult, ReactivationResult
from bdjax.reports import reporter


def evaluate(model: Model | Run | str | Path, source: EvaluationSource | None = None) -> EvaluationResult:
    """Measure accuracy and attack success rate of a model, on its own data set or another of its shape.

    Raises InputError for data that do not fit.
    """
    return evaluate_directory(directory_of(model), source)


def audit(
    model: Model | Run | str | Path,
    detectors: Sequence[str] = (),
    *,
    clean_data: str | None = None,
    size: int | None = None,
    configs: Mapping[str, Any] | None = None,
    seed: int = 0,
    devices: int = 0,
) -> Audit:
    """Ask detectors whether a model is backdoored, and towards which class.

    Args:
      model: the model or its directory.
      detectors: names; none: the default ones.
      clean_data: data set of the clean images; None: the model's own.
      size: number of images; None: 1,000, or all if there are fewer.
      configs: Configs by detector, or their fields.
      seed: draws the images and the detectors' random numbers.
      devices: local devices to use, 0 for all.

    Returns:
      The audit.

    Raises:
      InputError: for a name that is no detector, and for data that do not fit.
    """
    given = {n: make_config(registry.load("detectors", n).Config, config) for n, config in (configs or {}).items()}
    with run_context(devices) as context:
        settings = auditing.AuditSettings(seed, given)
        return Audit(
            *auditing.audit(
                directory_of(model), detectors, dataset=clean_data, size=size, settings=settings, context=context
            )
        )


def purify(
    source: Model | str | Path,
    out: str | Path,
    *,
    clean_data: str | None = None,
    model: str | None = None,
    defense: str = "auto",
    config: Any = None,
    seed: int = 0,
    devices: int = 0,
    **options: Any,
) -> Purification:
    """Audit a suspicious model, clean it, audit and measure the result, and write the weights and a report.

    Args:
      source: a weight file, or a model or its directory.
      out: directory of everything.
      clean_data: data set of the clean images; None: the one that the model was trained on.
      model: of a file: name of the network; None: what the file says.
      defense: name of the defense.
      config: its Config or its fields.
      seed: draws the images and the methods' random numbers.
      devices: local devices to use, 0 for all.
      **options: further fields of :class:`bdjax.pipelines.purify_request.PurifyRequest`.

    Returns:
      The purification.

    Raises:
      InputError: for what cannot work.
    """
    imported = dict(options.pop("import_options", {})) | ({} if model is None else {"model": model})
    request = PurifyRequest(
        source.directory if isinstance(source, Model) else Path(source), defense,
        make_config(registry.load("defenses", defense).Config, config), clean_data, imported, seed=seed, **options,
    )  # fmt: skip
    with run_context(devices, True) as context:
        result = purification.purify(request, Path(out), reporter, context=context)
    return Purification(Path(out), result)


def reactivate(
    model: Model | Run | str | Path,
    attack: str = "retuning",
    *,
    config: Any = None,
    seed: int = 0,
    out: str | Path | None = None,
    root: str | Path = "runs",
    devices: int = 0,
    **options: Any,
) -> ReactivationResult:
    """Attack a purified model again: can its backdoor be brought back?

    Args:
      model: the purified model, its run or their directory.
      attack: name of the re-activation attack.
      config: its Config or its fields.
      seed: of the attack.
      out: directory for the result and the re-activated model; None: nothing is written.
      root: a clean model, to compare with, is kept in root/victims.
      devices: local devices to use, 0 for all.
      **options: further fields of :class:`bdjax.pipelines.reactivation.ReactivationRequest`.

    Returns:
      The rates before and after; the ASR after it is R-ASR or Q-ASR.

    Raises:
      InputError: for what cannot work.
    """
    request = reactivation.ReactivationRequest(
        directory_of(model), attack, make_config(registry.load("attacks", attack).Config, config), seed, **options
    )
    with run_context(devices, store=Path(root) / "victims") as context:
        return reactivation.reactivate(request, Path(out) if out else None, context)
