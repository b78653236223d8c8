"""The comparison of solvers: what it computes, against plain computations on a small problem, and its command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import cli
from bdjax.attacks import badnets
from bdjax.config import Experiment, SplitConfig
from bdjax.defenses import ibau
from bdjax.engine import FitConfig
from bdjax.errors import InputError
from bdjax.pipelines.defend import DefenseRequest, defend, resolve_defense
from bdjax.pipelines.solver_comparison import ComparisonRequest, compare
from bdjax.pipelines.training import train
from bdjax.reports import solvers as report

pytestmark = pytest.mark.slow

CONFIG = ibau.Config(schedule="release", batch_size=8, norm_bound=2.0)
SPLIT = SplitConfig(size=16)


@pytest.fixture(scope="module")
def planted(blobs_npz, tmp_path_factory):
    attack = badnets.Config(target=0)
    experiment = Experiment(
        "badnets", None, blobs_npz, "cnn", attack_config=attack, fit=FitConfig(epochs=2, batch_size=16)
    )
    return train(experiment, tmp_path_factory.mktemp("victims") / "victim")


@pytest.fixture(scope="module")
def result(planted):
    solvers = ("none", "fixed_point", "minres", "lu")
    return compare(ComparisonRequest(planted, solvers, (3, 12), CONFIG, SPLIT, rounds=(3,), repeats=1))


def row(result, solver, iterations=3):
    (found,) = [r for r in result["rows"] if r["solver"] == solver and r["iterations"] == iterations]
    return found


def test_reference_is_dense_and_tight(result):
    reference = result["problem"]["reference"]
    assert reference["method"] in ("dense, refined in float64", "dense, float64")
    assert reference["residual"] < 1e-8
    assert reference["eigenvalue_min"] < 0 < reference["eigenvalue_max"]
    assert result["problem"]["n_hessian"] == 8 and result["problem"]["n_outer"] == 8
    np.testing.assert_allclose(result["problem"]["perturbation_norm"], 2.0, rtol=1e-5)


def test_errors_are_against_the_reference(result):
    """Leaving the indirect term away is an error of exactly one in that term; a dense float32 solve has nearly none."""
    assert row(result, "none")["relative_error_indirect"] == pytest.approx(1, abs=1e-6)
    assert np.isnan(row(result, "none")["cosine_indirect"])
    assert row(result, "lu")["relative_error"] < 0.05 and row(result, "lu")["cosine"] > 0.999
    assert row(result, "minres", 12)["residual"] < row(result, "minres", 3)["residual"] <= 1


def test_products_and_rounds(result):
    assert row(result, "fixed_point")["products"] == 2 and row(result, "fixed_point", 12)["products"] == 11
    assert row(result, "lu")["products"] == result["problem"]["dimension"]
    assert "acc" not in row(result, "minres", 12)
    for name in ("none", "fixed_point", "minres"):
        assert 0 <= row(result, name)["acc"] <= 1 and 0 <= row(result, name)["asr"] <= 1
        assert row(result, name)["round"] == "finished"


def test_a_round_is_the_defense_itself(result, planted):
    """ACC and ASR of a row are those of `bdjax defend` with that solver and one round."""

    config = dataclasses.replace(CONFIG, rounds=1, solver="minres", solver_iterations=3)
    found = defend(DefenseRequest(planted, "ibau", config, SPLIT), planted.parent / "defended")
    assert found["after"]["acc"] == row(result, "minres")["acc"]
    assert found["after"]["asr"] == row(result, "minres")["asr"]


def test_problem_is_that_of_the_first_step(blobs):
    """g and E of the problem, by hand: cross-entropy of the first batch, one image of it patched in E."""
    from bdjax import models
    from bdjax.types import DefenderView, Victim, to_float

    images, labels = blobs
    model = models.create("cnn", images.shape[1:], int(labels.max()) + 1)
    variables = model.init(jax.random.key(0))
    view = DefenderView(images[:20], labels[:20])
    problem = ibau.problem(CONFIG, Victim(model, variables), view, jax.random.key(3))
    g, outer = problem.build(model, problem.arrays)
    delta = problem.delta * 0.5

    def entropy(x):
        return -jax.nn.log_softmax(model.logits(variables, x))[jnp.arange(8), labels[:8]].mean()

    x = to_float(images[:8])
    expected = -entropy(x + delta) + CONFIG.penalty * (delta**2).sum()
    np.testing.assert_allclose(g(delta, variables["params"]), expected, rtol=1e-5)
    patched = [entropy(x.at[i].add(delta[0])) for i in range(8)]
    assert np.min(np.abs(np.array(patched) - float(outer(delta, variables["params"])))) < 1e-5


def test_a_solver_in_a_file_is_run_and_hashed(planted, tmp_path):
    """The release's fixed point, written in a file, gives what the named one gives; other content, another hash."""

    own = tmp_path / "mine.py"
    own.write_text(
        "import jax\n\n\ndef solve(matvec, b):\n    u = jax.tree.map(lambda x: 0.1 * x, b)\n    for _ in range(2):\n"
        "        u = jax.tree.map(lambda x, h, r: x - 0.1 * (h - r), u, matvec(u), b)\n    return u\n"
    )
    named = dataclasses.replace(CONFIG, rounds=1, solver_iterations=3)
    config = dataclasses.replace(named, solver=str(own))
    results = [
        defend(DefenseRequest(planted, "ibau", c, SPLIT), tmp_path / str(i)) for i, c in enumerate((named, config))
    ]
    assert results[0]["after"] == results[1]["after"] and results[0]["config_hash"] != results[1]["config_hash"]
    request = DefenseRequest(planted, "ibau", config, SPLIT)
    before = resolve_defense(request).directory_in(tmp_path)
    own.write_text(own.read_text() + "# another\n")
    assert resolve_defense(request).directory_in(tmp_path) != before
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="empty.py defines no solve"):
        dataclasses.replace(CONFIG, solver=str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("solvers", "iterations", "words"),
    [
        (("cgg",), (5,), "cgg.*Known"),
        (("cg:x",), (5,), "cg:x.*number"),
        (("cg",), (0,), "at least 1, got 0"),
        (("nystrom",), (5,), "ridge > 0"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_computed(solvers, iterations, words, tmp_path):
    with pytest.raises(InputError, match=words):  # the directory does not even exist
        compare(ComparisonRequest(tmp_path / "none", solvers, iterations))


def test_command_writes_table_picture_and_json(planted, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [
        "solvers", str(planted), "--solvers", "none,fixed_point", "--iterations", "2", "--out", str(out), "--json",
        "--defense.batch-size", "8", "--split.size", "16", "--repeats", "1", "--no-rounds",
    ]  # fmt: skip
    cli.main(argv)
    printed = capsys.readouterr().out
    assert "fixed_point" in printed and "eigenvalues of H" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads((out / "solvers.json").read_text())
    assert (out / "solvers.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit) as refused:
        cli.main(argv)
    assert refused.value.code == 2 and "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*argv, "--iterations", "five", "--force"])
    assert "'five'" in capsys.readouterr().err


def test_table_and_picture_show_every_row(result, tmp_path):
    text = report.table(result)
    for name in ("none", "fixed_point", "minres"):
        assert name in text
    assert report.draw(result, tmp_path / "x.png").stat().st_size > 10_000
