"""Attack, defense and re-activation at the papers' scale, as far as minutes allow.

Each trains a victim, purifies it and measures it on held-out images, by the functions behind `bdjax train`, `bdjax
defend` and `bdjax reactivate`. Seconds are the library's own: without compiling and measuring, with each epoch's
checkpoint.
"""

import time
from pathlib import Path
from typing import Any

import jax

from accelerator.records import Run, SkipStep
from bdjax import datasets, interop
from bdjax.attacks import badnets, retuning
from bdjax.cli._devices import prepare_jax
from bdjax.config import Experiment, SplitConfig
from bdjax.defenses import age as age_
from bdjax.defenses import baeraser as baeraser_
from bdjax.defenses import bibau as bibau_
from bdjax.defenses import ibau as ibau_
from bdjax.engine import FitConfig
from bdjax.io import checkpoint
from bdjax.pipelines.context import Context
from bdjax.pipelines.defend import DefenseRequest, defend
from bdjax.pipelines.reactivation import ReactivationRequest, reactivate
from bdjax.pipelines.training import train

SEEDS = (0, 1, 2)
SMALL = FitConfig(epochs=2, batch_size=40)
_TAKEN = ("acc", "asr")


def ibau(run: Run) -> None:
    """I-BAU's Table 1, BadNets on CIFAR-10: small_vgg, 50 epochs, three seeds (experiments/ibau/table1.py).

    A seed that would take longer than is left is not begun.
    """
    fit, model = (SMALL, "cnn") if run.smoke else (FitConfig(epochs=50), "small_vgg")
    config = (
        ibau_.Config(schedule="release", rounds=1, batch_size=50) if run.smoke else ibau_.Config(schedule="release")
    )
    split = SplitConfig(source="test", size=100 if run.smoke else 5000, order="given", validation=0.0)
    longest = 0.0
    for seed in SEEDS[:1] if run.smoke else SEEDS:
        if longest > run.left():
            run.record("seed left out", seed=seed, reason=f"{run.left():.0f} s are left, one takes {longest:.0f}")
            continue
        begin = time.perf_counter()
        experiment = _experiment(run, model, fit, split, "ibau", config, seed)
        victim = _trained(run, experiment)
        _defended(run, victim, experiment)
        _export(run, victim, f"{model}-badnets-{seed}")
        longest = time.perf_counter() - begin


def bibau(run: Run) -> None:
    """BI-BAU (U) on resnet18 in bfloat16, then the retuning attack on what it purified (experiments/bibau/table2.py).

    10 epochs of training for the paper's 200, 6 of unlearning for its 20: these numbers are not the paper's.
    """
    fit = FitConfig(10, 128, "sgd", 0.1, 0.9, 5e-4, "cosine", "crop_flip", "bfloat16")
    config = bibau_.Config(procedure="paper", variant="untargeted", epochs=6)
    model, split, again = "resnet18", SplitConfig(source="train", size=2500, validation=0.0), retuning.Config()
    if run.smoke:
        fit, model, split = (
            FitConfig(2, 40, precision="bfloat16"),
            "cnn",
            SplitConfig(source="train", size=50, validation=0.0),
        )
        config = bibau_.Config(procedure="paper", variant="untargeted", epochs=1, batch_size=25, steps=1)
        again = retuning.Config(share=0.1, epochs=1)
    attack = badnets.Config(target=0, ratio=0.1, size=1 if run.smoke else 3, margin=0, exclude_target=False)
    experiment = _experiment(run, model, fit, split, "bibau", config, attack=attack)
    victim = _trained(run, experiment)
    purified = _defended(run, victim, experiment)
    begin = time.perf_counter()
    # retuning reads no clean model: the victim in its place spares the training of one
    request = ReactivationRequest(purified, "retuning", again, clean_model=victim, attack_clean_model=False)
    found = reactivate(request)
    facts = {name: found[name] for name in ("n_test", "n_asr", "metric")}
    run.record("retuning", seed=0, before=_rates(found["before"]), after=_rates(found["after"]), **facts,
               seconds=found["seconds"]["attack"], compile_seconds=found["seconds"]["compile"],
               wall_seconds=time.perf_counter() - begin)  # fmt: skip


def age(run: Run) -> None:
    """AGE without backdoor knowledge on resnet18_imagenet, ten epochs of training (experiments/age/table1.py)."""
    fit = FitConfig(10, 128, "sgd", 0.1, 0.9, 5e-4, "cosine", "crop_flip")
    model, split = "resnet18_imagenet", SplitConfig(source="test", size=512, order="stratified", validation=0.0)
    if run.smoke:
        fit, model, split = SMALL, "cnn", SplitConfig(source="test", size=50, order="stratified", validation=0.0)
    experiment = _experiment(run, model, fit, split, "age", age_.Config())
    _defended(run, _trained(run, experiment), experiment)


def baeraser(run: Run) -> None:
    """BAERASER on the victim that the step `ibau` trained with seed 0. Raises SkipStep without it."""
    fit, model = (SMALL, "cnn") if run.smoke else (FitConfig(epochs=50), "small_vgg")
    split = SplitConfig(source="test", size=100 if run.smoke else 2500, validation=0.0)
    config = baeraser_.Config()
    if run.smoke:
        config = baeraser_.Config(epochs=1, steps=1, thresholds=(0.5,), iterations=2, samples=2, hidden=8, noise_size=4)
    experiment = _experiment(run, model, fit, split, "baeraser", config)
    victim = _directory(run, experiment)
    if not (victim / "manifest.json").exists():
        raise SkipStep("there is no victim: the step ibau did not finish its first seed")
    _defended(run, victim, experiment)


def _experiment(
    run: Run, model: str, fit: FitConfig, split: SplitConfig, defense: str, config: Any, seed: int = 0,
    attack: Any = None,
) -> Experiment:  # fmt: skip
    prepare_jax()
    return Experiment(
        "badnets", defense, run.dataset(), model, seed, attack or badnets.Config(), config, fit, split
    )  # fmt: skip


def _directory(run: Run, experiment: Experiment) -> Path:
    kind = f"{experiment.model}-{experiment.fit.precision}-target{experiment.attack_config.target}"
    return run.work / "victims" / f"{kind}-{experiment.seed}"


def _trained(run: Run, experiment: Experiment) -> Path:
    """The victim's directory, trained now; records what that took and the time of a transfer of its images."""
    begin = time.perf_counter()
    data = datasets.load(experiment.dataset)
    loading, begin = time.perf_counter() - begin, time.perf_counter()
    jax.block_until_ready(jax.device_put(data.x_train))
    transfer, begin = time.perf_counter() - begin, time.perf_counter()
    victim = train(experiment, _directory(run, experiment), Context(1), data)
    seconds = checkpoint.read_manifest(victim)["seconds"]
    steps = experiment.fit.epochs * (len(data.x_train) // experiment.fit.batch_size)
    run.record(
        "training", model=experiment.model, seed=experiment.seed, attack=experiment.attack,
        epochs=experiment.fit.epochs, precision=experiment.fit.precision, n_train=len(data.x_train), steps=steps,
        seconds=seconds["attack"], compile_seconds=seconds["compile"], loading_seconds=loading,
        transfer_seconds=transfer, wall_seconds=time.perf_counter() - begin,
    )  # fmt: skip
    return victim


def _defended(run: Run, victim: Path, experiment: Experiment) -> Path:
    """The run's directory, whose purified model is in it; records the rates and what it took."""
    begin = time.perf_counter()
    assert experiment.defense
    directory = run.work / "runs" / f"{run.step}-{experiment.seed}"
    request = DefenseRequest(victim, experiment.defense, experiment.defense_config, experiment.split)
    result = defend(request, directory, Context(1))
    facts = {name: result[name] for name in ("model", "seed", "defense", "n_test", "n_asr", "n_defender")}
    memory = {name: result[name] for name in ("peak_memory_bytes", "peak_memory_of")}
    run.record(
        "defense", **facts, before=_rates(result["before"]), after=_rates(result["after"]), **memory,
        seconds=result["seconds"]["defense"],
        compile_seconds=result["seconds"]["compile"] - _compiled(victim), wall_seconds=time.perf_counter() - begin,
    )  # fmt: skip
    for name in ("result.json", "metrics.jsonl"):
        target = run.keep / "runs" / directory.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((directory / name).read_bytes())
    return directory


def _compiled(victim: Path) -> float:
    """Seconds of compiling that the victim's training took; a result counts them in."""
    return checkpoint.read_manifest(victim)["seconds"]["compile"]


def _export(run: Run, victim: Path, name: str) -> None:
    """Keep the victim's weights, small enough to come back."""
    target = run.keep / "weights" / f"{name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    interop.export_model(victim, "safetensors", target)


def _rates(measured: Any) -> dict[str, float]:
    return {name: float(measured[name]) for name in _TAKEN}
