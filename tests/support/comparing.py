"""Results of a comparison put together by hand, for tests of words."""

from __future__ import annotations

from dedpo_diffusion.evaluation.comparison.intervals import Interval
from dedpo_diffusion.labels.warnings import holm


def interval(mean, half=0.01):
    """A known mean and half width; p such that it is below 0.05 where the interval leaves out 0."""
    return Interval(mean, mean - half, mean + half, 0.001 if abs(mean) > half else 0.5)


def gains(**means: float | Interval) -> dict[str, dict]:
    """`by_scorer` of an arm: a mean by scorer, its interval 0.01 to either side."""
    found = {name: mean if isinstance(mean, Interval) else interval(mean) for name, mean in means.items()}
    corrected = holm([entry.p for entry in found.values()])
    return {
        name: {
            "gain_over_base": entry.as_dict() | {"p": entry.p, "p_holm": float(p)},
            "win_rate_vs_base": {"mean": 0.5, "ci": [0.4, 0.6]},
            "n": 100,
        }
        for (name, entry), p in zip(found.items(), corrected, strict=True)
    }


def results(roles: dict[str, str], primary: str, *, categories=None, spread=None, **arms: dict[str, dict]) -> dict:
    """Results with a base and some arms.

    Args:
        roles: by scorer; its first letter will do: m(ade_labels), h(eld_out), u(nknown).
        primary: the scorer of the verdict.
        categories, spread: by arm, as in results.json.
        arms: their `by_scorer`.
    """
    full = {role[0]: role for role in ("made_labels", "held_out", "unknown")}
    zero = gains(**dict.fromkeys(roles, Interval(0.0, 0.0, 0.0, 1.0)))
    made = {}
    for name, entry in {"base": zero, **arms}.items():
        of_primary = {key: value for key, value in entry.get(primary, {}).items() if key != "n"}
        more = {"categories": (categories or {}).get(name, {}), "spread": (spread or {}).get(name, {}), "people": None, "warnings": []}
        made[name] = {"by_scorer": entry, **of_primary, **more}
    scorers = {
        name: {"version": f"{name}-1", "kind": "people" if name == "people" else "scorer", "role": full[r[0]]} for name, r in roles.items()
    }
    for facts in scorers.values():
        facts["held_out"] = facts["role"] == "held_out"
    return {"n_prompts": 60, "primary": primary, "base": "base", "scorers": scorers, "arms": made, "differences": {}}


def narrowed(**means: float) -> dict[str, dict]:
    """`spread` of an arm: a change of diversity by embedder, its interval 0.01 to either side."""
    return {name: {"version": "1", "diversity": None, "diversity_minus_base": interval(mean).as_dict()} for name, mean in means.items()}
