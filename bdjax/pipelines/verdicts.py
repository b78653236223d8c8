"""Judgements beside the rates of a cleaned model: the estimate without the trigger, the score, a detection's truth."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.config import stage_key
from bdjax.defenses import _success as success
from bdjax.engine import parallel
from bdjax.engine.callbacks import Recorder
from bdjax.metrics import score
from bdjax.pipelines.artifact import ModelArtifact
from bdjax.pipelines.context import Context
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.results import Rates
from bdjax.types import DefenderView, Scores, Variables


def estimate(
    artifact: ModelArtifact, cleaned: Variables, view: DefenderView, recorder: Recorder, context: Context
) -> dict[str, Any] | None:
    """Estimate the attack success rate without the trigger, by triggers recovered from the model before and after.

    Args:
      artifact: the model before the defense.
      cleaned: variables of the cleaned model.
      view: the defender's images, with validation images.
      recorder: of the defense: its own estimate is taken if it made one, and its detection says which classes to
        recover triggers for.
      context: devices, progress.

    Returns:
      The estimate as JSON values; None without validation images.
    """
    if view.validation is None:
        return None
    if recorder.estimated is not None:
        estimated: dict[str, Any] = recorder.estimated.plain()
        return estimated
    scores = recorder.scores
    key = jax.random.fold_in(stage_key(artifact.experiment.seed, "defense"), 1)
    validation = view.validation
    view = replace(view, callback=Recorder(context.tick), trigger=None)
    with parallel.using(context.devices):
        labels = success.most_suspicious(scores) if scores else success.suspicious(artifact.victim, view, key)
        before = success.recover(artifact.victim, labels, view, jax.random.fold_in(key, 1))
        return success.estimate(before, artifact.victim, cleaned, view, validation, jax.random.fold_in(key, 2)).plain()


def beside(clean: Rates | None, before: Rates, after: Rates) -> dict[str, Any]:
    """AGE's score of a defense, from the rates of a model trained without poison.

    Args:
      clean: rates of that model; None: there is none.
      before: of the victim.
      after: of the cleaned model.

    Returns:
      {"clean": the rates, "score": in [0, 1]}; None for what cannot be had.
    """
    if clean is None or before["asr"] is None:
        return {"clean": clean, "score": None}
    value = float(score(*(jnp.float32(rate) for rate in (after["asr"], before["asr"], after["acc"], clean["acc"]))))
    return {"clean": clean, "score": value if value == value else None}


def verdict(scores: Scores, attack: str | None, evaluation: Evaluation) -> dict[str, Any]:
    """A detection beside the truth.

    Args:
      scores: of the detector.
      attack: name of the attack that the model was trained with; None: unknown.
      evaluation: knows the attack's targets.

    Returns:
      The scores as JSON values, with "truth"; None where it is not known.
    """
    truth = {"poisoned": attack != "clean", "targets": [] if attack == "clean" else evaluation.targets}
    return {**scores.plain(), "truth": None if attack is None else truth}
