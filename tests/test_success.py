"""The estimate of the remaining ASR without the trigger, and the automatic choice of a defense by it."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quarters import Seen, clean_images, victim

from bdjax import registry
from bdjax.defenses import _smallest, _success, auto
from bdjax.defenses._guard import split_off
from bdjax.errors import InputError

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def view():
    return split_off(clean_images(), 0.25, KEY)


@pytest.fixture(scope="module")
def before(view):
    return _success.recover(victim(True), np.array([1, 0], np.int32), view, KEY)


def estimate(before, cleaned, view):
    return _success.estimate(before, victim(True), cleaned, view, view.validation, KEY)


def test_both_forms_of_trigger_find_the_pixel_of_the_back_door(before):
    for trigger in (before.additive[0], (before.masks * before.patterns)[0]):
        assert np.unravel_index(np.abs(trigger[..., 0]).argmax(), (4, 4)) == (0, 0)
    assert before.sizes[0, 0] < before.sizes[0, 1] and before.sizes[1, 0] < before.sizes[1, 1]


def test_the_estimate_is_high_for_the_victim_and_low_without_the_back_door(before, view):
    artifact, clean = victim(True), victim(False)
    unchanged = estimate(before, artifact.variables, view)
    row = next(row for row in unchanged.flips if row.form == "additive" and row.label == 1)
    assert row.before == row.after > 0.8 and unchanged.rate >= row.after
    assert row.n == (view.validation.labels != 1).sum()
    removed = estimate(before, clean.variables, view)
    of_target = [row for row in removed.flips if row.label == 1]
    assert {row.form for row in of_target} == {"additive", "patch"}
    assert removed.rate > 0.5  # the other class is natural and as easy to reach as before
    assert all(row.after < 0.2 and row.anew == 0 and row.size_anew > 1.5 * row.size for row in of_target)
    assert set(removed.plain()) == {"rate", "flips"}
    assert removed.rate == max(max(row.after, row.anew) for row in removed.flips)


def test_the_most_suspicious_classes_are_the_nearest(view):
    assert _success.suspicious(victim(True), view, KEY).tolist() == [1, _smallest.ANY]
    scores = SimpleNamespace(classes=np.array([0.5, np.nan, 3.0, 2.5, 2.9, 2.8], np.float32), poisoned=True)
    assert _success.most_suspicious(scores).tolist() == [2, 4, 5, _smallest.ANY]  # three at most
    scores.classes[3:] = 2.65, 2.55, 1.0
    assert _success.most_suspicious(scores).tolist() == [2, 3, _smallest.ANY]  # above 1 + 0.8 (3 - 1)
    scores.poisoned = False
    assert _success.most_suspicious(scores).tolist() == [2, 3, 4, 5, 0, _smallest.ANY]  # judged clean: all but class 1


class Rounds(Seen):
    def __init__(self):
        super().__init__()
        self.rows, self.remaining = [], None

    def on_estimate(self, estimated):
        self.remaining = estimated

    def on_round_end(self, step, variables, **arrays):
        self.rows.append({"step": step, **{k: float(v) for k, v in arrays.items() if jnp.ndim(v) == 0}})


def methods(monkeypatch, **results):
    """Replace defenses by stubs: each returns the given parameters."""
    real = registry.load

    def load(kind, name):
        if name not in results:
            return real(kind, name)
        return SimpleNamespace(Config=lambda: None, purify=lambda config, artifact, view, key: results[name])

    monkeypatch.setattr(registry, "load", load)
    return auto.Config(methods=tuple(results))


def test_auto_stops_at_the_first_that_passes_and_reports_every_try(monkeypatch, view):
    artifact, healed = victim(True), victim(False)
    scarred = {**healed.variables, "params": {"head": {"kernel": healed.variables["params"]["head"]["kernel"] * 0}}}
    tried = methods(monkeypatch, nothing=artifact.variables, ruin=scarred, heal=healed.variables, never=None)
    callback = Rounds()
    cleaned = auto.purify(tried, artifact, dataclasses.replace(view, callback=callback), KEY)
    np.testing.assert_array_equal(cleaned["params"]["head"]["kernel"], healed.variables["params"]["head"]["kernel"])
    rows = [row for row in callback.rows if "tried" in row]
    assert [row["tried"] for row in rows] == [0, 1, 2]
    assert rows[0]["estimated_rate"] > 0.8 and rows[2]["estimated_rate"] < 0.2
    assert any(row.get("rolled_back_to") == 0 for row in callback.rows)  # what was ruined is the victim again
    assert callback.rows[-1]["chosen"] == 2 and callback.remaining.rate == pytest.approx(rows[2]["estimated_rate"])
    assert [row["step"] for row in callback.rows] == list(range(1, len(callback.rows) + 1))


def test_auto_returns_the_best_when_none_passes(monkeypatch, view):
    artifact = victim(True)
    weaker = jax.tree.map(lambda p: p * 0.9, artifact.variables)
    tried = methods(monkeypatch, first=artifact.variables, second=weaker)
    callback = Rounds()
    auto.purify(tried, artifact, dataclasses.replace(view, callback=callback), KEY)
    rates = [row["estimated_rate"] for row in callback.rows if "tried" in row]
    assert len(rates) == 2 and min(rates) > 0.1
    assert callback.rows[-1]["chosen"] == int(np.argmin(rates))


@pytest.mark.parametrize(("name", "message"), [("auto", "defense.methods has auto"), ("universal", "removes none")])
def test_auto_refuses_what_cleans_nothing_by_itself(name, message):
    with pytest.raises(InputError, match=message):
        auto.Config(methods=(name,))


def test_auto_judges_few_images_by_themselves(monkeypatch):
    few = clean_images()
    few = dataclasses.replace(few, images=few.images[:20], labels=few.labels[:20], callback=Rounds())
    healed = victim(False).variables
    auto.purify(methods(monkeypatch, heal=healed), victim(True), few, KEY)
    assert [row["tried"] for row in few.callback.rows if "tried" in row] == [0]
    assert few.callback.rows[-1]["chosen"] == 0
