"""Capacity planning: what caches cost and save on machines that are described, not at hand.

    model          bytes of a token's cache, parameters, size of a calibration
    measurements   the numbers that a plan computes with, each with its source
    workload       who asks what and when: traces, clients that ask again and again, conversations that come and go
    storage        tiers with byte budgets, and the links to them
    engine         an engine, event by event
    simulation     conversations and engines on one clock
    policies       what can be done with a cache between turns
    planning       a plan file: its policies run, its sweep, its results
    report         tables and charts

Nothing here needs torch.
"""

from .planning import Plan, load_plan, run_plan

__all__ = ["Plan", "load_plan", "run_plan"]
