"""p-values of an audit: exact under their null, Holm and several outliers against cases solved by hand."""

import numpy as np
import pytest
from scipy import stats

from bdjax.metrics import Prior, clopper_pearson, holm, model_p_value, outlier_p_values, outliers, reference_p_values

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [5, 10, 43])
def test_p_values_are_uniform_when_no_class_is_special(classes):
    p_values = np.stack([outlier_p_values(row) for row in 3 + 0.2 * RNG.normal(size=(3000, classes))])
    assert stats.kstest(p_values[:, 0], "uniform").pvalue > 0.01
    models = np.array([model_p_value(row) for row in p_values])
    small = models[models < 0.3]  # where Bonferroni's bound is exact
    assert stats.kstest(small / 0.3, "uniform").pvalue > 0.01
    assert len(small) / len(models) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("freedom", [4, 30])
def test_p_values_with_a_prior_are_uniform_when_the_variance_follows_it(freedom):
    """The variance of each model is drawn from the prior, a scaled inverse chi-squared distribution."""
    deviations = 0.2 * np.sqrt(freedom / RNG.chisquare(freedom, size=(4000, 1)))
    rows = 1 + deviations * RNG.normal(size=(4000, 10))
    p_values = np.array([outlier_p_values(row, Prior(0.2, freedom))[0] for row in rows])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    shifted = rows.copy()
    shifted[:, 0] += 1
    assert outlier_p_values(shifted[0], Prior(0.2, 30))[0] < outlier_p_values(shifted[0], Prior(0.6, 30))[0]


def test_the_p_value_of_a_class_is_that_of_a_t_test_of_one_value():
    values = np.array([0.1, -0.2, 0.3, 0.0, 2.0])
    others = values[:4]
    t = (2.0 - others.mean()) / (others.std(ddof=1) * np.sqrt(1 + 1 / 4))
    np.testing.assert_allclose(outlier_p_values(values)[4], stats.t.sf(t, 3), rtol=1e-9)


def test_values_that_are_missing_or_equal_or_too_few_accuse_nobody():
    assert (outlier_p_values(np.ones(6)) > 0.3).all() and (outlier_p_values(np.array([1.0, 2.0, 9.0])) == 1).all()
    with_nan = outlier_p_values(np.array([0.1, np.nan, -0.2, 0.3, 0.0, 2.0]))
    np.testing.assert_allclose(with_nan[[0, 2, 3, 4, 5]], outlier_p_values(np.array([0.1, -0.2, 0.3, 0.0, 2.0])))
    assert with_nan[1] == 1 and model_p_value(np.array([])) == 1


def test_two_equal_outliers_do_not_hide_each_other():
    values = np.concatenate([np.linspace(-0.1, 0.1, 10), [3.0, 3.01]])
    assert model_p_value(outlier_p_values(values)) > 0.01  # one test alone misses them
    assert outliers(values, 0.01, 3) == (11, 10)
    assert outliers(values[:10], 0.01, 3) == ()


def test_clean_models_are_rarely_given_an_outlier():
    accused = [bool(outliers(row, 0.05, 2)) for row in RNG.normal(size=(2000, 10))]
    assert 0.03 < np.mean(accused) < 0.11  # up to two tests at 0.05


def test_reference_models_remove_the_differences_between_classes():
    """Classes differ, models differ in scale: neither matters, and p-values are uniform; an outlier is found."""
    classes = RNG.normal(size=10) * 2
    accused, p_values = 0, []
    for _ in range(1500):
        rows = classes + 0.3 * RNG.normal(size=(6, 10)) + RNG.normal(size=(6, 1))
        p_values.append(reference_p_values(rows[0], rows[1:])[3])
        accused += model_p_value(reference_p_values(rows[0], rows[1:])) <= 0.05
    assert stats.kstest(p_values, "uniform").statistic < 0.06  # the median centres only about
    assert 0.02 < accused / 1500 < 0.08
    rows[0, int(np.argmin(classes))] += 3  # far from being the largest class
    p_values = reference_p_values(rows[0], rows[1:])
    assert p_values.argmin() == np.argmin(classes) and model_p_value(p_values) < 1e-4
    assert model_p_value(outlier_p_values(rows[0])) > 0.05  # without references it is hidden


def test_holm_against_a_case_solved_by_hand():
    """Sorted 0.01, 0.02, 0.04, 0.5 times 4, 3, 2, 1; the largest so far."""
    assert holm({"a": 0.04, "b": 0.01, "c": 0.5, "d": 0.02}) == pytest.approx(
        {"a": 0.08, "b": 0.04, "c": 0.5, "d": 0.06}
    )
    assert holm({"a": 0.03, "b": 0.025, "c": 0.9}) == pytest.approx({"a": 0.075, "b": 0.075, "c": 0.9})
    assert holm({}) == {}


def test_clopper_pearson_against_its_closed_form():
    low, high = clopper_pearson(0, 20)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert clopper_pearson(3, 20)[0] == pytest.approx(stats.beta.ppf(0.025, 3, 18))
