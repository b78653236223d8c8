"""Targeted unlearning: smallest perturbations of known models, suspicious classes, the split, the unlearning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quarters import Seen, clean_images, rolled, victim

from bdjax.defenses import _smallest, _targeted_search
from bdjax.defenses import targeted_unlearning as method
from bdjax.detectors import additive
from bdjax.engine import parallel
from bdjax.errors import InputError
from bdjax.types import DefenderView, Model, Victim

KEY = jax.random.key(3)
QUICK = method.Config(rounds=2, steps=3, search_steps=4, refresh_steps=2, batch_size=16, starts=2)


class Rounds(Seen):
    """Stores the reports of all rounds, and the scores."""

    def __init__(self):
        super().__init__()
        self.rounds, self.scores = [], None

    def on_detection(self, scores):
        self.scores = scores

    def on_round_end(self, step, variables, **arrays):
        super().on_round_end(step, variables, **arrays)
        self.rounds.append((step, variables, arrays))


def linear(weights):
    """logits = the image, flattened, times `weights`."""

    def apply(variables, images, train=False, keys=None, axis_name=None):
        flat = images.reshape(len(images), -1)
        return flat @ variables["params"]["weights"], {"flat": flat}, {}

    variables = {"params": {"weights": jnp.asarray(weights, jnp.float32)}, "batch_stats": {}}
    return Victim(Model("linear", (4, 4, 1), weights.shape[1], None, apply), variables)


def test_the_smallest_perturbation_of_a_linear_model_is_its_weight_vector():
    """Logits (0, w·x): class 0 leads by −w·x, so δ is along w, and its norm the lead of most images over ‖w‖."""
    weights = np.full(16, -1.0, np.float32)
    weights[[3, 7, 8]] = 4.0, 2.0, 4.0
    artifact = linear(np.stack([np.zeros(16, np.float32), weights], 1))
    images = np.random.default_rng(0).uniform(0.4, 0.6, (40, 4, 4, 1)).astype(np.float32)
    lead = -images.reshape(40, -1) @ weights
    assert (lead > 0).all()
    start = _smallest.zero_perturbations(artifact.model, 2.0)
    perturbations = _smallest.search(
        artifact.model, artifact.variables, images, np.zeros(40, np.int32), start, 120, 40, 2.0, KEY
    )
    delta = np.asarray(perturbations.deltas[1]).ravel()
    norm = np.linalg.norm(weights)
    assert delta @ weights / np.linalg.norm(delta) / norm > 0.9  # pixels are clipped to [0, 1]
    assert np.quantile(lead, 0.5) / norm < perturbations.radii[1] < 1.3 * np.quantile(lead, _smallest._SUCCESS) / norm
    assert perturbations.radii[0] == 2.0  # no image of another class: nothing to reach


def test_the_class_with_the_back_door_is_nearest_and_only_it_is_suspicious():
    config = additive.Config(largest_radius=0.5)
    for planted in (True, False):
        callback = Seen()
        view = dataclasses.replace(clean_images(), callback=callback)
        scores = additive.detect(config, victim(planted), view, KEY)
        assert scores.poisoned is planted
        if planted:
            assert scores.target == 1 and callback.arrays["perturbation_labels"][0] == 1
            delta = np.asarray(callback.arrays["perturbation"][0])[..., 0]
            assert np.unravel_index(np.abs(delta).argmax(), delta.shape) == (0, 0)  # where the back door looks


def test_an_all_to_all_back_door_is_found_by_a_perturbation_to_any_class():
    artifact, view = rolled()
    goals = np.array([0, 1, 2, _smallest.ANY], np.int32)
    start = _smallest.Perturbations(goals, jnp.zeros((4, 4, 4, 1)), np.full(4, 2.0, np.float32))
    perturbations = _smallest.search(
        artifact.model, artifact.variables, view.images, view.labels, start, 60, 30, 2.0, KEY
    )
    assert perturbations.radii[3] < 0.6 * perturbations.radii[:3].min()
    delta = np.abs(np.asarray(perturbations.deltas[3]).ravel())
    assert delta.argmax() == 0


def test_groups_of_classes_give_the_result_of_all_together(monkeypatch):
    artifact, view = victim(True), clean_images()
    inputs = (
        artifact.model,
        artifact.variables,
        view.images,
        view.labels,
        _smallest.zero_perturbations(artifact.model, 1.0),
    )
    together = _smallest.search(*inputs, 6, 8, 1.0, KEY)
    monkeypatch.setattr(_smallest, "_MAX_IMAGES", 16)  # two classes at a time, the last group is padded
    grouped = _smallest.search(*inputs, 6, 8, 1.0, KEY)
    np.testing.assert_allclose(grouped.radii, together.radii, rtol=1e-5)
    np.testing.assert_allclose(grouped.deltas, together.deltas, atol=1e-5)


def test_four_devices_search_as_one():
    artifact, view = victim(True), clean_images()
    inputs = (
        artifact.model,
        artifact.variables,
        view.images,
        view.labels,
        _smallest.zero_perturbations(artifact.model, 1.0),
    )
    one = _smallest.search(*inputs, 3, 8, 1.0, KEY)
    with parallel.using(4):
        four = _smallest.search(*inputs, 3, 8, 1.0, KEY)
    np.testing.assert_allclose(four.radii, one.radii, rtol=1e-5)
    np.testing.assert_allclose(four.deltas, one.deltas, atol=1e-4)


def test_the_back_door_is_closed_and_the_images_are_still_recognised():
    artifact, callback = victim(True), Rounds()
    view = dataclasses.replace(clean_images(), callback=callback)
    config = dataclasses.replace(method.Config(), largest_radius=0.5, learning_rate=0.5)
    cleaned = method.purify(config, artifact, view, KEY)
    images = np.asarray(view.images, np.float32) / 255
    triggered = images.copy()
    triggered[:, 0, 0] = 0.4  # the smallest perturbation that works is 0.16
    others = view.labels != 1

    def rate(variables, x, labels):
        return float((np.asarray(artifact.model.logits(variables, x)).argmax(-1) == labels).mean())

    assert rate(artifact.variables, triggered[others], 1) > 0.9
    assert rate(cleaned, triggered[others], 1) < 0.1
    assert rate(cleaned, images, view.labels) >= rate(artifact.variables, images, view.labels) - 0.1
    assert callback.scores.poisoned and callback.scores.target == 1
    radius = [float(arrays["radius"]) for _, _, arrays in callback.rounds if "radius" in arrays]
    assert radius[-1] > 2 * radius[0] or radius[0] >= 1


def test_one_image_is_too_few():
    view = clean_images()
    single = dataclasses.replace(view, images=view.images[:1], labels=view.labels[:1])
    with pytest.raises(InputError, match=r"got 1 clean images; it needs two.*--size"):
        additive.detect(additive.Config(), victim(True), single, KEY)
    with pytest.raises(InputError, match="clean images to learn from; it needs two.*split.size"):
        method.purify(QUICK, victim(True), single, KEY)


def test_a_view_is_split_by_class_and_by_key():
    labels = np.repeat(np.arange(5, dtype=np.int32), [40, 20, 10, 2, 1])
    view = DefenderView(np.arange(73, dtype=np.uint8).reshape(73, 1, 1, 1), labels)
    training, validation = view.split(0.8, KEY)
    assert np.bincount(training.labels, minlength=5).tolist() == [32, 16, 8, 1, 1]
    assert np.bincount(validation.labels, minlength=5).tolist() == [8, 4, 2, 1, 0]
    both = np.concatenate([training.images, validation.images]).ravel()
    assert sorted(both.tolist()) == list(range(73))
    assert not np.array_equal(view.split(0.8, jax.random.key(4))[0].images, training.images)
    single = DefenderView(view.images[:3], np.arange(3, dtype=np.int32))  # one image per class: one is still held out
    assert [len(part.labels) for part in single.split(0.9, KEY)] == [2, 1]


def test_the_suspicious_classes_share_the_starts():
    radii = np.array([1.0, 0.2, 0.3, 1.0], np.float32)
    perturbations = _smallest.Perturbations(np.arange(4, dtype=np.int32), jnp.ones((4, 4, 4, 1)), radii)
    settings = _targeted_search.Search(starts=4)
    suspicious = _targeted_search._suspicious_classes(settings, perturbations)
    assert suspicious.tolist() == [1, 2]
    started = _targeted_search._initial_perturbations(4, perturbations, suspicious, np.zeros(0, np.int32), KEY)
    assert started.goals.tolist() == [1, 2, 1, 2]
    np.testing.assert_array_equal(started.deltas[:2], perturbations.deltas[:2])  # the others are random
    np.testing.assert_allclose(_smallest.l2_norms(started.deltas[2:]).ravel(), [0.06, 0.09], rtol=1e-5)
    unsuspicious = perturbations._replace(radii=np.array([1.0, 0.9, 0.95, 1.0], np.float32))
    assert _targeted_search._suspicious_classes(settings, unsuspicious).tolist() == []
    started = _targeted_search._initial_perturbations(2, unsuspicious, np.zeros(0, np.int32), np.array([3]), KEY)
    assert started.goals.tolist() == [
        3,
        _smallest.ANY,
    ]  # no class is suspicious: the fallback class, and any other class


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "defense.rounds must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "defense.learning_rate must be positive"),
        ({"enlarged": 0.9}, "defense.enlarged must be at least 1"),
        ({"patched_fraction": 0.0}, r"defense.patched_fraction must be in \(0, 1\]"),
        ({"threshold": 1.0}, r"defense.threshold must be in \(0, 1\)"),
        ({"distillation": 1.5}, r"defense.distillation must be in \[0, 1\]"),
    ],
)
def test_refused_values(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(QUICK, **change)
