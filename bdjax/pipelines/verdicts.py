"""What is said of a cleaned model beside its own rates: an estimate without the trigger, a score, an audit's truth."""

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
from bdjax.pipelines.evaluation import Evaluation
from bdjax.pipelines.victim import Context
from bdjax.types import DefenderView, Scores, Variables


def estimate(
    artifact: ModelArtifact, cleaned: Variables, view: DefenderView, seen: Recorder, context: Context
) -> dict[str, Any] | None:
    """What is left of the attack by triggers recovered from the model; None without images to judge by.

    Args: seen: what the defense showed at work: its own estimate is taken, and its verdict says where to look.
    """
    if view.validation is None:
        return None
    if seen.estimated is not None:
        return seen.estimated.plain()
    found = seen.scores
    key = jax.random.fold_in(stage_key(artifact.experiment.seed, "defense"), 1)
    callback = Recorder(context.tick)
    own, judged = replace(view, callback=callback, trigger=None), view.validation
    with parallel.using(context.devices):
        labels = success.most_suspicious(found) if found else success.suspicious(artifact.victim, own, key)
        before = success.recover(artifact.victim, labels, own, jax.random.fold_in(key, 1))
        return success.estimate(before, artifact.victim, cleaned, own, judged, jax.random.fold_in(key, 2)).plain()


def beside(clean: dict[str, Any] | None, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """{"clean", "score"}: the rates of a model trained without poison, and AGE's score; None without one."""
    if clean is None or before["asr"] is None:
        return {"clean": clean, "score": None}
    value = float(score(*(jnp.float32(rate) for rate in (after["asr"], before["asr"], after["acc"], clean["acc"]))))
    return {"clean": clean, "score": value if value == value else None}


def verdict(found: Scores, attack: str | None, evaluation: Evaluation) -> dict[str, Any]:
    """What an audit found, and the truth; None where that is not known."""
    truth = {"poisoned": attack != "clean", "targets": [] if attack == "clean" else evaluation.targets}
    return {**found.plain(), "truth": None if attack is None else truth}
