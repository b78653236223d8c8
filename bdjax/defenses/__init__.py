"""Defenses: one module a method, each with a `Config` and one function whose name is its kind.

    purify(config, victim, view, key) -> variables

gives back a cleaned model. `view` is all that the defender has: clean images, and a watch that a round
may be shown to. No poisoned image is in reach. A reference method that is given the true trigger as well says
NEEDS_TRIGGER = True.
"""
