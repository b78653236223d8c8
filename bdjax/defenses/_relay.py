"""A watch before another: what it is told goes on."""

from typing import Any

from bdjax.types import Scores, Variables, Watch


class Relay(Watch):
    """Hands everything on to `watch`; a subclass changes what it means to."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def tick(self, stage: str, done: int, total: int) -> None:
        """Pass progress on."""
        self._watch.tick(stage, done, total)

    def observe(self, step: int, variables: Variables, **arrays: Any) -> None:
        """Pass the variables on, and what is shown beside them."""
        self._watch.observe(step, variables, **arrays)

    def recall(self, step: int, **values: Any) -> None:
        """Pass on what was observed before a run was killed."""
        self._watch.recall(step, **values)

    def judge(self, scores: Scores) -> None:
        """Pass a verdict on."""
        self._watch.judge(scores)

    def estimate(self, left: Any) -> None:
        """Pass an estimate of success on."""
        self._watch.estimate(left)
