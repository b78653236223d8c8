"""The public Python API: everything that the command line does, as functions that return objects.

    victim = bdjax.train("badnets", dataset="digits", attack_config={"target": 3})
    cleaned = bdjax.defend(victim, "ibau")
    cleaned.after["asr"], cleaned.figure

Results are written to directories as by the command line, and a finished one is read instead of made again. Configs are
given as instances or as dictionaries of their fields; names of methods are those that `bdjax list` prints.
"""

from bdjax.api.checks import audit, evaluate, purify, reactivate
from bdjax.api.objects import Audit, Model, Purification, Run
from bdjax.api.runs import defend, load_dataset, load_model, run, train
from bdjax.pipelines.opening import EvaluationSource

__all__ = [
    "Audit", "EvaluationSource", "Model", "Purification", "Run", "audit", "defend", "evaluate", "load_dataset",
    "load_model", "purify", "reactivate", "run", "train",
]  # fmt: skip
