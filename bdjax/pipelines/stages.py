"""Stages of a cell after its defense: re-activation attacks and comparisons of hypergradient solvers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdjax.defenses import ibau
from bdjax.pipelines.context import Context
from bdjax.pipelines.reactivation import ReactivationRequest, reactivate
from bdjax.pipelines.solver_comparison import DEFAULT, ComparisonRequest, compare


@dataclass(frozen=True)
class Reactivation:
    """A re-activation attack on the model that the cell gave back; its record is a ReactivationResult."""

    attack: str
    """Name of an attack with `reactivate`."""
    config: Any = None
    """Its Config; None: the defaults."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """Configs of the re-activation attacks that come before it, by name; default their defaults."""
    attack_clean_model: bool = False
    """Also attack a model that was trained without poison, for comparison."""

    @property
    def name(self) -> str:
        """The attack's."""
        return self.attack

    def run(self, model: Path, seed: int, context: Context) -> Mapping[str, Any]:
        """Attack the model in a directory. See :class:`bdjax.pipelines.experiment_options.Stage`.

        Args:
          model: directory of the run or of the victim.
          seed: of the attack.
          context: devices, progress, the store of clean models.

        Returns:
          The rates before and after.
        """
        request = ReactivationRequest(
            model, self.attack, self.config, seed, self.earlier, attack_clean_model=self.attack_clean_model
        )
        return reactivate(request, context=context)


@dataclass(frozen=True)
class SolverComparison:
    """Hypergradient solvers side by side on the victim of a cell without a defense."""

    solvers: tuple[str, ...] = DEFAULT
    """Names of solvers, each with an optional `:RIDGE`."""
    iterations: tuple[int, ...] = (5, 20)
    """Values of K, iterations of a solver."""
    config: ibau.Config = field(default_factory=lambda: ibau.Config(schedule="release"))
    """I-BAU's."""
    rounds: tuple[int, ...] | None = None
    """Values of K at which one round of I-BAU is measured, too; None: all of them."""
    test_size: int = 0
    """Measure on the first so many held-out images; 0: all."""

    @property
    def name(self) -> str:
        """The name of the stage."""
        return "solvers"

    def run(self, model: Path, seed: int, context: Context) -> Mapping[str, Any]:
        """Compare the solvers. See :class:`bdjax.pipelines.experiment_options.Stage`.

        Args:
          model: directory of the victim.
          seed: of the cell, which is the victim's, too.
          context: devices, progress.

        Returns:
          The comparison (:func:`bdjax.pipelines.solver_comparison.compare`).
        """
        request = ComparisonRequest(
            model, self.solvers, self.iterations, self.config, rounds=self.rounds, test_size=self.test_size
        )
        return compare(request, context)
