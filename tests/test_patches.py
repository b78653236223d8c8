"""The smallest patches: at the pixel of the backdoor, unchanged when no patch succeeds, chosen by their area."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quarters import clean_images, rolled, victim

from bdjax.defenses import _patches, _smallest, _targeted_search
from bdjax.defenses._batch import images_per_goal
from bdjax.engine import parallel

KEY = jax.random.key(5)
SETTINGS = _targeted_search.Search(steps=40, refresh_steps=4, largest_radius=0.5)


def search(artifact, view, goals, steps=_patches.STEPS, start=None):
    goals = np.asarray(goals, np.int32)
    return _patches.search(artifact.model, artifact.variables, view.images, view.labels, goals, steps, KEY, start)


def test_the_patch_of_the_back_door_is_one_bright_pixel():
    patches = search(victim(True), clean_images(), [1, 0])
    mask, pattern = np.asarray(patches.masks[0])[..., 0], np.asarray(patches.patterns[0])[..., 0]
    assert np.unravel_index(mask.argmax(), mask.shape) == (0, 0) and pattern[0, 0] > 0.5
    assert patches.areas[0] == pytest.approx(mask.sum(), abs=1e-4)
    assert patches.areas[0] < 0.6 * patches.areas[1]  # class 0 needs three pixels of its own


def test_the_given_patch_is_returned_when_no_patch_succeeds():
    artifact, view = victim(True), clean_images()
    view = dataclasses.replace(view, labels=np.full(80, 1, np.int32))  # no image of another class than the goal's
    start = _patches.Patches(
        np.array([1], np.int32), jnp.full((1, 4, 4, 1), 0.3), jnp.full((1, 4, 4, 1), 0.7), np.array([4.8], np.float32)
    )
    patches = search(artifact, view, [1], 5, start)
    np.testing.assert_array_equal(patches.masks, np.full((1, 4, 4, 1), 0.3, np.float32))
    np.testing.assert_array_equal(patches.patterns, np.full((1, 4, 4, 1), 0.7, np.float32))
    assert patches.areas.tolist() == [16]
    assert search(artifact, view, [1], 5).masks.max() == 0  # an empty mask when none was given


def test_patches_of_one_goal_start_at_different_patterns():
    patterns = _patches._initial_latent(victim(True).model, np.array([0, 0, 2], np.int32), KEY)["pattern"]
    assert not patterns[0].any() and patterns[1].any() and not patterns[2].any()


def test_four_devices_search_as_one():
    one = search(victim(True), clean_images(), [1, _smallest.ANY], 6)
    with parallel.using(4):
        four = search(victim(True), clean_images(), [1, _smallest.ANY], 6)
    np.testing.assert_allclose(four.masks, one.masks, atol=1e-5)
    np.testing.assert_allclose(four.areas, one.areas, rtol=1e-5)


def test_a_class_with_a_small_patch_is_suspicious_even_where_no_perturbation_is_near(monkeypatch):
    artifact, view = victim(True), clean_images()
    everywhere = _smallest.zero_perturbations(artifact.model, 1.0)  # all classes equally far in the L2 norm
    monkeypatch.setattr(_targeted_search, "search_all_classes", lambda *_: everywhere)
    found = _targeted_search.TargetedSearch(SETTINGS, artifact, view, KEY, "a test")
    assert found.goal == 1 and set(found.patches.goals.tolist()) == {1} == set(found.perturbations.goals.tolist())


@pytest.mark.parametrize(
    ("largest", "goals", "expected"), [(24, 4, 24), (24, 10, 24), (24, 20, 12), (24, 43, 6), (24, 200, 5), (3, 200, 3)]
)
def test_many_goals_share_the_images_of_a_step(largest, goals, expected):
    assert images_per_goal(largest, goals) == expected


def test_of_an_all_to_all_back_door_the_patch_to_any_class_is_the_smallest():
    artifact, view = rolled()
    targeted = _targeted_search.TargetedSearch(SETTINGS, artifact, view, KEY, "a test")
    assert targeted.goal == _smallest.ANY and targeted.patches.goals.tolist() == [_smallest.ANY] * 2
    for mask in np.asarray(targeted.patches.masks)[..., 0]:
        assert np.unravel_index(mask.argmax(), mask.shape) == (0, 0)  # the pixel that moves all labels on
    assert (
        targeted.draw_target_images(KEY, (2, 2)) is not None
    )  # of the nearest class, which some perturbations lead to


def test_all_patches_lead_to_the_suspicious_class_until_no_small_trigger_remains():
    artifact, view = victim(True), clean_images()
    targeted = _targeted_search.TargetedSearch(SETTINGS, artifact, view, KEY, "a test")
    assert targeted.goal == targeted.scores.target == 1 and targeted.patches.goals.tolist() == [1, 1]
    assert targeted.trigger_count == 6 and not targeted.is_exhausted
    before = targeted.patches
    targeted.refresh(victim(False).variables, KEY)
    large = targeted._areas > SETTINGS.largest_patch * 16
    np.testing.assert_array_equal(
        np.asarray(targeted.patches.masks)[large], np.asarray(before.masks)[large]
    )  # too large to be unlearned
    assert targeted.is_exhausted == (targeted.relative_radius >= 1 and bool(large.all()))


def test_triggers_replace_or_add_and_are_enlarged():
    artifact, view = victim(True), clean_images()
    targeted = _targeted_search.TargetedSearch(SETTINGS, artifact, view, KEY, "a test")
    kept_fractions, deltas = targeted.triggers(1.5)
    assert kept_fractions.shape == (6, 4, 4, 1) and deltas.shape == (6, 4, 4, 1)
    assert (kept_fractions[:4] == 1).all()
    mask = np.minimum(1.5 * np.asarray(targeted.patches.masks), 1)
    np.testing.assert_allclose(kept_fractions[4:], 1 - mask, atol=1e-6)
    np.testing.assert_allclose(deltas[4:], mask * np.asarray(targeted.patches.patterns), atol=1e-6)
    alone = dataclasses.replace(SETTINGS, patches=0)
    assert _targeted_search.TargetedSearch(alone, artifact, view, KEY, "a test").triggers(1.5)[0].shape == (4, 4, 4, 1)
