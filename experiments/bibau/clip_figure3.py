"""BI-BAU, Figure 3: BadNets and BadCLIP on CLIP, cleaned by fine-tuning, CleanCLIP and BI-BAU; R-ASR after retuning.

    python experiments/bibau/clip_figure3.py --dataset npz:tiny_imagenet32.npz --scale cpu --seeds 0 1 2 --out runs/clip

A dual encoder is trained on captions of a labelled set with poisoned pairs, and is measured by zero-shot classification
of the test images. Each defense gets clean pairs of the training set; its result is then retuned with a few poisoned
pairs. It writes a line of results.jsonl per defense and seed, and table.md; finished steps are kept.

At the paper's scale (ViT-B/32 with OpenAI's weights, 500,000 pairs of CC3M for the attack, 50,000 for the defenses, and
ImageNet's validation set) the steps are commands, on one GPU with 40 GB or more (docs/clip.md has the memory):

    bdjax clip import ViT-B-32.safetensors --out runs/clean
    bdjax clip attack runs/clean clip_badnets --pairs pairs:cc3m/train.csv --target banana --fit.epochs 5 \
        --fit.learning-rate 1e-5 --fit.warmup 50 --out runs/victim
    bdjax clip defend runs/victim bibau_clip --pairs pairs:cc3m/train.csv --size 50000 --test folder:imagenet \
        --templates imagenet_templates.txt --out runs/purified
    bdjax clip reactivate runs/purified --test folder:imagenet --out runs/reactivated

Time: the scale smoke takes about two minutes on two CPU cores; cpu takes hours for a data set of 50,000 images.
To expect: the paper prints a figure alone. In its text CleanCLIP has R-ASR 42.70 % with BadNets and ASR 92.12 % with
BadCLIP; BI-BAU is low on both, with little loss of zero-shot accuracy.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from bdjax import models
from bdjax.engine.contrastive import PairFitConfig
from bdjax.models import ClipConfig
from bdjax.types import Callback
from bdjax.vision_language import artifact, methods, training
from bdjax.vision_language.attacks.clip_badnets import Config as BadnetsConfig
from bdjax.vision_language.defending import DefendRequest, EvaluationOptions, RetuningConfig, defend, reactivate
from bdjax.vision_language.measuring import measure_of

DEFENSES = ("finetune", "cleanclip", "bibau_clip")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    model: ClipConfig
    merges: int
    templates: str
    fit: PairFitConfig
    attack: BadnetsConfig
    pairs: int
    """Clean pairs of the defender."""
    defense: dict[str, dict[str, Any]]
    """Fields of each defense's Config."""
    retuning: RetuningConfig


SCALES = {
    "smoke": Scale(
        dataclasses.replace(models.PRESETS["tiny"], context=16), 60, "plain",
        PairFitConfig(30, 64, 2e-3, 50),
        BadnetsConfig(0.1, size=6, content="fixed", place="corner"), 500,
        {"finetune": {"epochs": 10, "learning_rate": 5e-4}, "cleanclip": {"epochs": 10, "learning_rate": 5e-4},
         "bibau_clip": {"epochs": 10, "learning_rate": 5e-4, "steps": 5, "step_size": 8.0, "fisher_pairs": 256}},
        RetuningConfig(100, 5, 5, 64, 5e-4),
    ),
    "cpu": Scale(
        ClipConfig((32, 32, 3), "vit", 96, (4,), 3, 8, 64, 2, 2, 16, 514, 64), 700, "cifar",
        PairFitConfig(20, 128, 1e-3, 500, augment="crop_flip"),
        BadnetsConfig(0.02, size=6, content="fixed", place="corner"), 5000,
        {"finetune": {"epochs": 5, "learning_rate": 2e-4}, "cleanclip": {"epochs": 5, "learning_rate": 2e-4},
         "bibau_clip": {"epochs": 5, "learning_rate": 2e-4, "steps": 5, "step_size": 8.0, "fisher_pairs": 512}},
        RetuningConfig(1000, 5, 5, 128, 2e-4),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of the experiment."""

    dataset: str = "digits"
    """Labelled data set whose training images get captions: digits, npz:PATH, folder:PATH, tfds:NAME."""
    scale: Literal["smoke", "cpu"] = "smoke"
    """smoke: digits; cpu: a set of 50,000 small images."""
    target: str = ""
    """Name of the target class; default: the fourth."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training, defense and retuning."""
    defenses: tuple[str, ...] = DEFENSES
    """Defenses to compare."""
    epochs: int = 0
    """Epochs of the training; 0: those of the scale."""
    test_images: int = 0
    """Largest number of test images; 0: all."""
    out: Path = Path("runs/clip_figure3")
    """Directory of the results."""


def main(options: Options) -> None:
    """Run what is not finished yet."""
    for seed in options.seeds:
        victim = _victim(options, seed)
        for defense in options.defenses:
            _cell(options, victim, defense, seed)
    _write_table(options)


def _victim(options: Options, seed: int) -> Path:
    """Train the backdoored dual encoder of a seed, unless it is there."""
    directory, scale = options.out / f"victim-{seed}", SCALES[options.scale]
    if directory.exists():
        return directory
    options.out.mkdir(parents=True, exist_ok=True)
    fit = dataclasses.replace(scale.fit, epochs=options.epochs or scale.fit.epochs)
    target = options.target or _fourth_class(options.dataset)
    request = training.TrainRequest(
        f"captions:{options.dataset}", scale.model, scale.templates, merges=scale.merges, attack="clip_badnets",
        attack_config=scale.attack, target=target, fit=fit, seed=seed,
    )  # fmt: skip
    training.train(request, directory, _Log(options.out / "progress.log", f"victim {seed}"))
    dual = artifact.open_dual(directory)
    result = measure_of(dual, most=options.test_images)(dual.variables)
    _append(options, {"seed": seed, "defense": "none", "after": dataclasses.asdict(result)})
    return directory


def _cell(options: Options, victim: Path, defense: str, seed: int) -> None:
    """Clean the victim, retune the result, and record both."""
    scale, purified = SCALES[options.scale], options.out / f"{defense}-{seed}"
    again = options.out / f"{defense}-{seed}-retuned"
    if again.exists():
        return
    evaluation = EvaluationOptions(images=options.test_images)
    config = methods.load("defenses", defense).Config(**scale.defense[defense])
    log = _Log(options.out / "progress.log", f"{defense} {seed}")
    record = purified.with_suffix(".json")
    if not purified.exists():
        request = DefendRequest(victim, defense, config, size=scale.pairs, seed=seed, evaluation=evaluation)
        record.write_text(json.dumps(defend(request, purified, log)))
    result = json.loads(record.read_text())
    retuned = reactivate(purified, scale.retuning, again, seed, evaluation)
    _append(options, {**result, "retuned": retuned["after"], "poisoned_pairs": scale.retuning.poisoned})


class _Log(Callback):
    """Writes the mean losses of each epoch to a file."""

    def __init__(self, path: Path, label: str) -> None:
        self._path, self._label = path, label

    def on_round_end(self, step: int, variables: Any, **arrays: Any) -> None:
        """Append a line."""
        values = {name: round(float(value), 4) for name, value in arrays.items() if getattr(value, "size", 1) == 1}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{self._label} epoch {step} {json.dumps(values)}\n")


def _fourth_class(dataset: str) -> str:
    from bdjax.vision_language.pairs import labelled

    return labelled(dataset).classes[3]


def _append(options: Options, line: dict[str, Any]) -> None:
    with open(options.out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _write_table(options: Options) -> None:
    """Write the mean and the values of all seeds."""
    lines = [json.loads(line) for line in (options.out / "results.jsonl").read_text().splitlines()]
    rows = ["| defense | seeds | top-1 | top-5 | ASR | R-ASR |", "|---|---|---|---|---|---|"]
    for defense in ("none", *options.defenses):
        chosen = [line for line in lines if line["defense"] == defense]
        columns = [[line["after"][name] for line in chosen] for name in ("top1", "top5", "asr")]
        columns.append([line["retuned"]["asr"] for line in chosen if "retuned" in line])
        rows.append(f"| {defense} | {len(chosen)} | " + " | ".join(map(_mean, columns)) + " |")
    head = f"{options.dataset}, scale {options.scale}, n = {lines[0]['after']['n']} test images, in per cent\n\n"
    (options.out / "table.md").write_text(head + "\n".join(rows) + "\n")


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * sum(values) / len(values):.1f} ({each})"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
