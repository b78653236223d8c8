# %% [markdown]
# # A defense of your own
#
# A defense is one file with a `Config` and `purify(config, victim, view, key)`. It gets clean images and returns
# variables; it never sees a poisoned image. This one prunes the channels of the last dense layer's inputs that clean
# images activate least, which is the idea of fine-pruning without the tuning.

# %%
from pathlib import Path

import bdjax

source = '''"""Prune: zero the inputs of the last layer that clean images activate least."""

from dataclasses import dataclass

import jax.numpy as jnp

from bdjax.models import head, penultimate
from bdjax.types import DefenderView, Key, Variables, Victim, to_float


@dataclass(frozen=True)
class Config:
    """How much is pruned."""

    share: float = 0.5
    """Share of the features that are set to zero."""


def purify(config: Config, victim: Victim, view: DefenderView, key: Key) -> Variables:
    """Return the variables with the least active features disconnected from the last layer."""
    features = victim.model.apply(victim.variables, to_float(view.images))[1]
    activity = jnp.abs(penultimate(features)).mean(0)
    kept = activity >= jnp.quantile(activity, config.share)
    params = dict(victim.variables["params"])
    params["head"] = {**params["head"], "kernel": head(params) * kept[:, None]}
    cleaned = {**victim.variables, "params": params}
    view.callback.on_round_end(1, cleaned)
    return cleaned
'''
Path("prune.py").write_text(source)

# %%
victim = bdjax.train("badnets", dataset="digits", fit={"epochs": 15})
runs = [bdjax.defend(victim, defense, estimate=False) for defense in ("prune.py", "ibau")]
for run in runs:
    print(f"{run.result['defense']:10s} ACC {run.after['acc']:.3f}  ASR {run.after['asr']:.3f}")

# %%
assert runs[1].after["asr"] < 0.1
