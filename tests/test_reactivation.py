"""Attacks on purified models: who is poisoned, what is learnt, what is written, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perceptron, untrained_task
from numpy.testing import assert_allclose, assert_array_equal

from bdjax import attacks, datasets, registry
from bdjax.attacks import query_reactivation, retuning
from bdjax.config import Experiment
from bdjax.engine import FitConfig, fit
from bdjax.errors import InputError
from bdjax.io import checkpoint
from bdjax.pipelines.artifact import load_model
from bdjax.pipelines.context import Context
from bdjax.pipelines.evaluate import evaluate
from bdjax.pipelines.reactivation import ReactivationRequest, reactivate
from bdjax.pipelines.training import train
from bdjax.types import Backdoor, Poison, ReactivationInputs

KEY = jax.random.key(0)
KEYS = (jax.random.key(1), jax.random.key(2))


def config_of(name, **changes):
    return dataclasses.replace(registry.load("attacks", name).Config(), **changes)


def payload(name, blobs, count=6, anew=False, **changes):
    task = untrained_task(*blobs, perceptron())
    return attacks.payload(name, config_of(name, **changes), task, KEYS, {}, count, anew), task


def test_a_payload_is_drawn_from_the_poisoned_images_that_were_planted(blobs):
    few, task = payload("badnets", blobs, target=1, ratio=0.25)
    whole = attacks.poison("badnets", config_of("badnets", target=1, ratio=0.25), task, KEYS[1], {})
    assert len(few.labels) == 6 and (few.labels == 1).all() and np.isin(few.indices, whole.indices).all()
    at = np.searchsorted(whole.indices, few.indices)
    assert_array_equal(few.images, whole.images[at])


def test_a_payload_leaves_covers_and_images_of_the_target_out(blobs):
    few, task = payload("adaptive_patch", blobs, count=10, target=1, ratio=0.2, cover=0.5)
    assert (task.labels[few.indices] != 1).all() and (few.labels == 1).all()


def test_a_clean_label_payload_is_of_the_target_unless_stamped_anew(blobs):
    few, task = payload("badnets", blobs, target=1, ratio=0.2, labels="clean")
    assert (task.labels[few.indices] == 1).all()
    anew, _ = payload("badnets", blobs, anew=True, target=1, ratio=0.2, labels="clean")
    assert (task.labels[anew.indices] != 1).all() and (anew.labels == 1).all()
    assert (anew.images != task.images[anew.indices]).any((1, 2, 3)).all()


def test_a_payload_larger_than_what_there_is_is_refused(blobs):
    with pytest.raises(InputError, match=r"attack.count=60, but there are 50 poisoned images"):
        payload("badnets", blobs, count=60, target=1, ratio=0.25)


def test_retuning_trains_on_the_share_with_the_payload_in_it(blobs):
    seen = {}

    def fit_(images, labels, key, **options):
        seen.update(images=images, labels=labels, **options)
        return "retuned"

    few, task = payload("badnets", blobs, count=3, target=1, ratio=0.25)
    task = dataclasses.replace(task, fit=fit_)
    config = retuning.Config(count=3, share=0.1, batch_size=8)
    backdoor = Backdoor("badnets", config_of("badnets"), None, {})
    planted = retuning.reactivate(config, ReactivationInputs("purified", {}, "clean", few), backdoor, task, KEY)
    assert planted.variables == "retuned" and seen["start"] == "purified"
    assert len(seen["labels"]) == 20 and seen["recipe"]["batch_size"] == 6 and seen["recipe"]["epochs"] == 5
    assert_array_equal(seen["images"][:3], few.images)
    assert_array_equal(seen["labels"][:3], [1, 1, 1])
    whole = {image.tobytes(): label for image, label in zip(*blobs, strict=True)}
    assert all(whole[i.tobytes()] == label for i, label in zip(seen["images"][3:], seen["labels"][3:], strict=True))


def test_a_share_without_room_for_the_payload_is_refused(blobs):
    few, task = payload("badnets", blobs, count=4, target=1, ratio=0.25)
    with pytest.raises(InputError, match="4 poisoned images do not fit among 4"):
        retuning.reactivate(
            retuning.Config(count=4, share=0.02),
            ReactivationInputs(None, {}, None, few),
            Backdoor("a", None, None, {}),
            task,
            KEY,
        )


@pytest.fixture(scope="module")
def trained(blobs):
    return fit(perceptron(), *blobs, FitConfig(epochs=20, batch_size=40, learning_rate=1e-2), KEY)


def test_phi_equals_its_formula_and_stays_within_its_budget():
    layers = {name: np.asarray(value) for name, value in query_reactivation._layers(KEY, (64, 5, 5, 5, 64)).items()}
    images = np.random.default_rng(0).random((3, 8, 8, 1)).astype(np.float32)
    x = images.reshape(3, -1)
    for i in range(4):
        x = x @ layers[f"w{i}"] + layers[f"b{i}"]
        x = np.tanh(x) if i == 3 else np.maximum(x, 0)
    config = query_reactivation.Config(hidden=5, budget=0.3)
    out = query_reactivation.perturb(config, jnp.asarray(images), layers)
    assert_allclose(out, np.clip(images + 0.3 * x.reshape(images.shape), 0, 1), atol=1e-6)
    big = {name: 100 * value for name, value in layers.items()}
    change = np.abs(query_reactivation.perturb(config, jnp.asarray(images), big) - images)
    assert change.max() <= 0.3 + 1e-6 and change.max() > 0.25


def test_phi_moves_the_purified_model_to_the_retuned_ones_answers_and_not_the_clean_model(blobs, trained):
    """The retuned model calls everything 1: Φ must find what makes the purified one say so, within its budget."""
    images, labels = blobs
    target = jax.tree.map(jnp.copy, trained)
    target["params"]["head"]["kernel"] = trained["params"]["head"]["kernel"].at[:, 1].add(4.0)
    poison = Poison(np.arange(100), images[:100], np.ones(100, np.int32))
    config = query_reactivation.Config(
        count=100, hidden=32, epochs=30, batch_size=50, budget=0.5, distillation=5.0, learning_rate=0.02, clip=1.0
    )
    task = untrained_task(images, labels, perceptron())
    clean = perceptron().init(jax.random.key(9))  # knows nothing: its term cannot keep Φ down
    defended = ReactivationInputs(trained, {"retuning": target}, clean, poison)
    planted = query_reactivation.reactivate(config, defended, Backdoor("a", None, None, {}), task, KEY)
    assert planted.variables is trained

    def divergence(x):
        teacher = jax.nn.softmax(perceptron().logits(target, jnp.asarray(images, jnp.float32) / 255))
        student = jax.nn.log_softmax(perceptron().logits(trained, x))
        return float((teacher * (jnp.log(teacher) - student)).sum(-1).mean())

    plain = jnp.asarray(images, jnp.float32) / 255
    changed = query_reactivation.perturb(config, plain, planted.arrays)
    assert divergence(changed) < 0.5 * divergence(plain)


@pytest.mark.parametrize(
    ("module", "changes", "match"),
    [
        (retuning, {"count": 0}, "count must be at least 1, got 0"),
        (retuning, {"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        (query_reactivation, {"hidden": 0}, "hidden must be at least 1, got 0"),
        (query_reactivation, {"budget": 0.0}, "budget must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(module, changes, match):
    with pytest.raises(InputError, match=match):
        module.Config(**changes)


@pytest.fixture(scope="module")
def planted(blobs_npz, tmp_path_factory):
    """A victim and a clean model on the blobs."""
    from bdjax.engine import parallel

    root = tmp_path_factory.mktemp("models")
    with parallel.using(1):
        for attack in ("badnets", "clean", "wanet"):
            config = config_of(attack, target=1, ratio=0.25)
            experiment = Experiment(attack, None, blobs_npz, "cnn", attack_config=config, fit=FitConfig(8, 20))
            train(experiment, root / attack, Context(1))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["badnets", "wanet"])
def test_both_reactivations_write_a_result_and_a_model_that_evaluate_reads(planted, attack, tmp_path):
    small = {"retuning": {"share": 0.25, "epochs": 2}, "query_reactivation": {"count": 20, "hidden": 8, "epochs": 2}}
    earlier = {"retuning": config_of("retuning", **small["retuning"])}
    for name, changes in small.items():
        out = tmp_path / name
        config = config_of(name, **changes)
        request = ReactivationRequest(planted / attack, name, config, earlier=earlier, clean_model=planted / "clean")
        found = reactivate(request, out, Context(1))
        assert json.loads((out / "result.json").read_text()) == found
        assert found["metric"] == {"retuning": "R-ASR"}.get(name, "Q-ASR") and found["n_asr"] < found["n_test"] == 40
        again = evaluate(out / "model")  # by the plain trigger: Φ has not changed the weights
        expected = found["after" if name == "retuning" else "before"]
        assert again["asr"] == expected["asr"] and again["acc"] == expected["acc"]
        assert evaluate(planted / attack)["asr"] == found["before"]["asr"]
        assert checkpoint.read_manifest(out / "model")["reactivation"]["name"] == name


@pytest.mark.slow
def test_the_clean_model_is_attacked_alike_and_trained_where_there_is_none(planted, tmp_path):
    config = retuning.Config(share=0.25, epochs=1)
    context = Context(1, store=tmp_path / "victims")
    request = ReactivationRequest(planted / "badnets", "retuning", config)
    found = reactivate(request, context=context)
    with_model = dataclasses.replace(request, clean_model=planted / "clean")
    given = reactivate(with_model, context=Context(1))
    assert found["clean_after"] == given["clean_after"] and found["after"] == given["after"]
    alone = reactivate(dataclasses.replace(with_model, attack_clean_model=False), context=Context(1))
    assert alone["after"] == given["after"] and alone["clean_before"] is alone["clean_after"] is None
    assert len(list((tmp_path / "victims").glob("[0-9a-f]*"))) == 1


@pytest.mark.slow
def test_what_cannot_be_reactivated_is_refused(planted, tmp_path, blobs):
    with pytest.raises(InputError, match="badnets is no re-activation attack. Choose from query_react"):
        reactivate(ReactivationRequest(planted / "badnets", "badnets"))
    task = untrained_task(*blobs, perceptron())
    with pytest.raises(InputError, match="Use `bdjax reactivate DIR retuning`"):
        attacks.plant("retuning", retuning.Config(), task, KEY)
    bare = tmp_path / "bare"
    manifest = {k: v for k, v in checkpoint.read_manifest(planted / "badnets").items() if k not in ("files", "format")}
    model = load_model(manifest, planted / "badnets", datasets.load(manifest["dataset"]["spec"]))
    checkpoint.write_model(bare, manifest, model[1], {})
    with pytest.raises(InputError, match="has no trigger: there is nothing to re-activate"):
        reactivate(ReactivationRequest(bare, "retuning"))
    other = Experiment("clean", None, manifest["dataset"]["spec"], "small_vgg", fit=FitConfig(1, 20))
    train(other, tmp_path / "other", Context(1))
    with pytest.raises(InputError, match="its model is small_vgg, that of .* is cnn"):
        reactivate(ReactivationRequest(planted / "badnets", "retuning", clean_model=tmp_path / "other"))
    with pytest.raises(InputError, match="holds no clean model but a victim one .badnets."):
        reactivate(ReactivationRequest(planted / "badnets", "retuning", clean_model=planted / "badnets"))


@pytest.mark.slow
def test_the_command_attacks_again_and_prints_both_lines(planted, tmp_path, capsys):
    from bdjax import cli

    out = tmp_path / "again"
    cli.main([
        "reactivate", str(planted / "badnets"), "query_reactivation", "--clean-model", str(planted / "clean"),
        "--devices", "1", "--attack.count", "20", "--attack.hidden", "8", "--attack.epochs", "1", "--retuning.share",
        "0.25", "--out", str(out), "--json",
    ])  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])
    assert found["earlier"]["retuning"]["share"] == 0.25 and found["config"]["count"] == 20
    assert "Q-ASR" in said[1] and said[2].startswith("purified") and said[3].startswith("clean model")
    assert f"{100 * found['after']['asr']:.2f}" == said[2].split()[-1]
    with pytest.raises(SystemExit):
        cli.main(["reactivate", str(planted / "badnets"), "retuning", "--out", str(out)])
    assert "holds a result already" in capsys.readouterr().err
