"""The steps of a journey, in order."""

from __future__ import annotations

from collections.abc import Iterator

from dedpo_diffusion.journey import costs
from dedpo_diffusion.journey.journal import Step
from dedpo_diffusion.journey.plan import Route, merge_steps, pair_steps, people_steps, train_steps, verdict_steps
from dedpo_diffusion.journey.rounds import further_steps


def steps(route: Route, known: costs.Known) -> Iterator[Step]:
    """Every step, one after the other; `known` tells what the earlier ones have made, so take each when those before it are done."""
    s = route.settings
    yield from pair_steps(route, known)
    yield from people_steps(route, known)
    for method in s.methods:
        yield from merge_steps(route, known, method)
    for method in s.methods:
        yield from train_steps(route, known, method)
    if s.rounds > 1:
        yield from further_steps(route, known)
    else:
        yield from verdict_steps([(route, method) for method in s.methods], known)
