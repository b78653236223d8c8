"""Measure a model directory: accuracy and attack success rate."""

from dataclasses import replace
from pathlib import Path

from bdjax.io import checkpoint
from bdjax.pipelines import plausibility
from bdjax.pipelines.artifact import check_same_dataset
from bdjax.pipelines.opening import EvaluationSource, open_recorded
from bdjax.pipelines.results import EvaluationResult


def evaluate(directory: Path, source: EvaluationSource | None = None) -> EvaluationResult:
    """Measure accuracy and ASR of a model directory, on its own data set or on another one of its shape.

    Args:
      directory: of a victim, an imported or purified model, or a run (then its purified model).
      source: another data set; an imported model needs one, and for an ASR the attack that it is measured with.

    Returns:
      The rates with the numbers of images.

    Raises:
      InputError: for a damaged directory and for data that do not fit.
    """
    source, directory = source or EvaluationSource(), checkpoint.model_directory(directory)
    artifact = open_recorded(directory, source)
    if source.dataset is not None:
        artifact = replace(artifact, held_out=False)
    elif not artifact.imported:
        check_same_dataset(artifact.manifest, artifact.data, directory)
    evaluation, data = artifact.evaluation, artifact.data
    clean, triggered = evaluation.predictions(artifact.victim.variables)
    without_attack = artifact.imported and source.attack is None
    remarks = plausibility.about(data, artifact.manifest, directory, clean, evaluation.labels, evaluation.targets)
    return {
        "directory": str(directory),
        "kind": artifact.manifest["kind"],
        "attack": None if without_attack else artifact.experiment.attack,
        "dataset": data.name,
        "n_test": len(evaluation.images),
        "n_asr": int(evaluation.eligible.sum()),
        **evaluation.rates(clean, triggered),
        "data": remarks["data"],
        "warnings": remarks["warnings"],
    }
