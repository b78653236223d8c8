"""The helpers of defenses with their own training steps, and common properties of NAD, FT-SAM and SAU."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose
from tuned import KEY, VICTIM, view_of

from bdjax import models
from bdjax.defenses import _tuning, ft_sam, nad, sau
from bdjax.engine import parallel
from bdjax.engine.optimizer import direction
from bdjax.errors import InputError
from bdjax.types import Victim


@pytest.mark.parametrize(
    ("wanted", "total", "devices", "expected"),
    [(256, 500, 1, (2, 250)), (64, 500, 1, (8, 62)), (256, 20, 1, (1, 20)), (256, 5, 4, (1, 4)), (8, 7, 2, (1, 6))],
)
def test_an_epoch_is_divided_into_equal_batches(wanted, total, devices, expected):
    with parallel.using(devices):
        number, size = _tuning.equal_batches(wanted, total)
    assert (number, size) == expected
    assert size % devices == 0 and number * size <= total and size <= max(wanted, devices)


def test_fewer_images_than_devices_are_refused():
    with parallel.using(4), pytest.raises(InputError, match="3 images cannot be split over 4 devices"):
        _tuning.equal_batches(64, 3)


GRADIENTS = ([1.0, 0.5], [0.1, -3.0], [-0.2, 0.1])


@pytest.mark.parametrize(
    ("name", "expected"),  # of PyTorch 2.13: Adam(amsgrad=True), SGD(momentum=0.9, nesterov=True)
    [
        ("amsgrad", [[0.9, -2.1], [0.825919, -2.0376081], [0.7822379, -1.9915055]]),
        ("nesterov", [[0.81, -2.095], [0.71, -1.5655], [0.667, -1.37795]]),
    ],
)
def test_optimisers_equal_those_of_pytorch(name, expected):
    params = jnp.array([1.0, -2.0])
    rule = direction(name, 0.9)
    state = rule.init(params)
    for gradient, after in zip(GRADIENTS, expected, strict=True):
        update, state = rule.update(jnp.array(gradient), state)
        params = params - 0.1 * update
        assert_allclose(params, after, rtol=1e-5)


QUICK = {
    nad: {"teacher_epochs": 1, "epochs": 1, "batch_size": 20},
    ft_sam: {"epochs": 2, "batch_size": 20},
    sau: {"epochs": 1, "batch_size": 20, "steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("module", QUICK, ids=lambda m: m.__name__.rpartition(".")[2])
def test_four_devices_agree_with_one(blobs, module):
    def run(devices):
        with parallel.using(devices):
            return module.purify(module.Config(**QUICK[module]), VICTIM, view_of(blobs), KEY)

    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), run(1), run(4))


@pytest.mark.slow
@pytest.mark.parametrize("module", QUICK, ids=lambda m: m.__name__.rpartition(".")[2])
def test_real_networks_and_their_statistics_are_updated(blobs, module):
    model = models.create("small_vgg", (8, 8, 1), 4)
    victim = Victim(model, model.init(KEY))
    out = module.purify(module.Config(**QUICK[module]), victim, view_of(blobs), KEY)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(out))
    moved = [
        bool((a != b).any())
        for a, b in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (out, victim.variables)), strict=True)
    ]
    assert all(moved) if module is not sau else not any(moved)


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        (nad, {"epochs": 0}, "defense.epochs must be at least 1, got 0"),
        (nad, {"betas": ()}, r"defense.betas must be one or more numbers, each zero or more, got \(\)"),
        (nad, {"rates": (0.1, 0.0, 1.0)}, "defense.rates must be one or more positive numbers"),
        (nad, {"begins": (1, 2, 3)}, "defense.begins must be epochs in ascending order from 0"),
        (nad, {"begins": (0, 5)}, "defense.begins has 2 entries and defense.rates 3"),
        (nad, {"layers": ("block1",)}, "defense.layers has 1 entries and defense.betas 3"),
        (nad, {"momentum": 1.0}, r"defense.momentum must be in \[0, 1\), got 1.0"),
        (ft_sam, {"half_period": 0}, "defense.half_period must be at least 1, got 0"),
        (ft_sam, {"rho": -1.0}, "defense.rho must be zero or more, got -1.0"),
        (ft_sam, {"smoothing": 1.0}, r"defense.smoothing must be in \[0, 1\), got 1.0"),
        (sau, {"bound": 0.0}, "defense.bound must be positive, got 0.0"),
        (sau, {"beta_shared": -1.0}, "defense.beta_shared must be zero or more, got -1.0"),
        (sau, {"steps": 0}, "defense.steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(module, changes, said):
    with pytest.raises(InputError, match=said):
        module.Config(**changes)
