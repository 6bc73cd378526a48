"""The whole journey on your own model, by one command and one file.

    dedpo align --config align.yaml
    dedpo align --config align.yaml --dry_run true

Calls the other stages with their ordinary command lines and prints each, so every line can be typed again. What is done stands in
OUT/journal.json: the same command goes on where it stopped, skips what is current, and does again what hangs on something that changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say, stage
from dedpo_diffusion.core.stopping import Terminated
from dedpo_diffusion.settings import AlignSettings

if TYPE_CHECKING:
    from dedpo_diffusion.journey.costs import Known
    from dedpo_diffusion.journey.journal import Journal, Step
    from dedpo_diffusion.journey.plan import Route

LABEL_FACTS = ("n", "n_human", "agreement", "power", "effective_human_labels")  # of a targets' report, told in results.json
INTERRUPTED, ENDED = 130, 143  # exit codes of a stage


# ---- what is asked for


def check_settings(settings: AlignSettings) -> None:
    """Refuse settings that cannot be meant, before anything is done.

    Raises:
        UserError: it names the setting and what to give.
    """
    _check_source(settings)
    _check_people(settings)
    _check_methods(settings)
    for name, least in (("images_per_prompt", 2), ("eval_seeds", 1), ("votes", 0), ("rounds", 1), ("round_votes", 0), ("seed", 0)):
        if getattr(settings, name) < least:
            raise UserError(f"{name} is {getattr(settings, name)}; give {least} or more")
    _check_rounds(settings)
    if settings.images_per_prompt % 2:
        raise UserError(f"images_per_prompt is {settings.images_per_prompt}; give an even number, as two images make a pair")
    if not settings.strengths or min(settings.strengths) <= 0 or len(set(settings.strengths)) < len(settings.strengths):
        raise UserError("strengths must be different numbers above 0, such as [0.5, 1, 1.5, 2]")
    if not settings.eval_prompts:
        raise UserError("eval_prompts is missing: name the prompts that judge the result, such as parti, or a text file with one a line")
    if not settings.scorers:
        raise UserError("scorers is missing: name what scores the images, such as [pickscore, hps]")
    named = [spec.partition("=")[0] for spec in settings.scorers]
    for name in settings.held_out:
        if name == "http":
            raise UserError("held_out names http, by which a scorer is reached; give the name that its server says (`curl URL` shows it)")
        if name not in named and "http" not in named:
            raise UserError(f"held_out names {name}, which is not among the scorers ({', '.join(named)})")


def _check_source(settings: AlignSettings) -> None:
    if settings.prompts is None and settings.pairs is None:
        raise UserError("give prompts, for which the model proposes pairs, or pairs, a dataset or a source that `dedpo ingest` reads")
    if settings.prompts is not None and settings.pairs is not None:
        raise UserError("prompts and pairs are both given; give prompts to propose pairs, or pairs that there are already")
    for name, limit in (("prompts", "limit"), ("eval_prompts", "eval_limit")):
        if getattr(settings, name) == "shapes" and getattr(settings, limit) is None:
            raise UserError(f"{name} is shapes, which draws as many prompts as are wanted; give {limit}, such as 800")
    if "shapes" in (settings.prompts, settings.eval_prompts) and settings.model != "shapes":
        raise UserError(f"the prompts of shapes are for the embedded model; the model is {settings.model}, so name prompts of your own")


def _check_people(settings: AlignSettings) -> None:
    from dedpo_diffusion.journey.plan import taken_up
    from dedpo_diffusion.labels.files import label_names

    if settings.people == "simulated":
        if settings.model != "shapes":
            raise UserError(f"people: simulated is for the embedded model (model: shapes); the model is {settings.model}")
        if settings.votes:
            raise UserError(f"votes is {settings.votes}, and the people are simulated: they need no page; leave out votes, or people")
        if settings.human_share is None or not 0 < settings.human_share <= 1:
            raise UserError(f"human_share is {settings.human_share}; simulated people label a share of the pairs, above 0 and up to 1")
        return
    if settings.human_share is not None:
        raise UserError("human_share is for people: simulated; of real people give votes, the number of answers")
    nobody = settings.prompts is not None or (taken_up(settings.pairs) and "human" not in label_names(Path(str(settings.pairs))))
    if nobody and not settings.votes and set(settings.methods) != {"naive"}:
        raise UserError("nobody labels these pairs, and merging learns from people; give votes, such as 100, the answers to wait for")


def _check_methods(settings: AlignSettings) -> None:
    from dedpo_diffusion.debias import METHODS
    from dedpo_diffusion.journey.plan import recipe_file

    unknown = [name for name in settings.methods if name not in METHODS]
    if unknown:
        raise UserError(f"there is no method {unknown[0]!r}; known: {', '.join(METHODS)}")
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UserError(f"methods is {settings.methods}; name each way to merge once, the one that you would take first")
    if not settings.judges and set(settings.methods) != {"human_only"}:
        needed = next(name for name in settings.methods if name != "human_only")
        raise UserError(
            f"judges is missing, and method {needed} needs one; name judges, such as [pickscore], or give methods: [human_only]"
        )
    if settings.recipe is None:
        raise UserError("recipe is missing: name the settings of the training, such as sdxl_lora_12gb.yaml")
    import yaml

    told = yaml.safe_load(recipe_file(settings.recipe).read_text(encoding="utf-8")) or {}
    if told.get("weights") == "full":
        raise UserError(f"recipe {settings.recipe} trains the whole UNet, and align makes LoRAs; name a recipe of a LoRA")


def _check_rounds(settings: AlignSettings) -> None:
    if settings.rounds == 1:
        if settings.round_votes:
            raise UserError("round_votes is for rounds: 2 or more; of the first round give votes")
        return
    if settings.prompts is None:
        raise UserError("rounds need prompts, for which each round's LoRA proposes pairs; give prompts in place of pairs, or rounds: 1")
    if len(settings.strengths) < 2:
        raise UserError("rounds compare each LoRA at its best strength; give strengths two numbers or more, or rounds: 1")
    if not 0 < settings.round_drift < math.inf:
        raise UserError(f"round_drift is {settings.round_drift}; give a number above 0")
    if len(settings.methods) > 1:
        raise UserError(f"rounds go on with one LoRA, and methods names {len(settings.methods)}; give one, such as methods: [adapted]")
    if not settings.round_votes and settings.methods[0] not in ("adapted", "naive"):
        raise UserError(
            f"method {settings.methods[0]} takes human labels as a random sample of all pairs, and with round_votes 0 nobody labels those "
            "of further rounds; give methods: [adapted], or round_votes"
        )


def identity_of(settings: AlignSettings) -> dict[str, Any]:
    """What may not change within one folder, as people's work hangs on it; everything else may."""
    names = ["model", "prompts", "pairs", "people"]
    names += ["limit", "images_per_prompt", "seed"] if settings.prompts is not None else []
    return {name: getattr(settings, name) for name in names}


# ---- what is done


def call(main: Any, name: str, *arguments: object) -> None:
    """Run a stage with a command line, and show that line.

    Raises:
        UserError: the stage failed; it has said why.
        KeyboardInterrupt, Terminated: it was stopped.
    """
    import shlex

    argv = [str(argument) for argument in arguments]
    say(f"\n$ dedpo {name} {shlex.join(argv)}")
    code = main(argv)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == ENDED:
        raise Terminated("what was done so far is kept")
    if code:
        raise UserError(f"stage {name} ended with exit code {code}; its message is above")


def perform(step: Step, settings: AlignSettings, route: Route) -> None:
    """Do one step, a stage by its own command line."""
    from dedpo_diffusion.pipelines import STAGES

    if step.stage == "human":
        from dedpo_diffusion.pairs.dataset import PairReader
        from dedpo_diffusion.shapes.people import answer_share

        say("\n# the simulated people of Shapes answer")
        *folder, what, number, _, seed = step.argv
        pairs = Path(folder[0]) if folder else route.pairs
        answer_share(pairs, float(number) if what == "--share" else int(number) / len(PairReader(pairs)), int(seed))
        return
    call(import_module(f"dedpo_diffusion.{STAGES[step.stage][0]}").main, step.stage, *step.argv)
    if step.stage == "vote":
        pairs = Path(step.argv[0])
        wanted = int(step.argv[step.argv.index("--until") + 1])
        check_votes(pairs, wanted, "votes" if pairs == route.pairs else "round_votes")


def check_votes(pairs: Path, wanted: int, option: str) -> None:
    """Stop where the page was closed before there were enough answers.

    Raises:
        UserError: fewer answers than are waited for.
    """
    from dedpo_diffusion.voting.store import read_store, store_path

    file = store_path(pairs, "human")
    events = read_store(file)[1] if file.is_file() else []
    answers = sum(1 if event.kind == "vote" else -1 for event in events)
    if answers < wanted:
        remedy = "the same command goes on asking" + (f"; {option}: {answers} goes on with these" if answers else "")
        raise UserError(f"{answers} of {wanted} answers are there; {remedy}")


def write_shapes_prompts(settings: AlignSettings) -> None:
    """The files with prompts of the embedded model."""
    from dedpo_diffusion.core.files import write_text
    from dedpo_diffusion.shapes.people import drawn_prompts, spread_prompts

    made = {}
    if settings.prompts == "shapes":
        made["proposed"] = drawn_prompts(int(settings.limit or 0), settings.seed)
    if settings.eval_prompts == "shapes":
        made["evaluation"] = spread_prompts(int(settings.eval_limit or 0))
    for kind, prompts in made.items():
        write_text(settings.out / f"prompts-{kind}.txt", "\n".join(prompts) + "\n")


def complete_results(settings: AlignSettings, route: Route, journal: Journal) -> None:
    """Add to results.json what the comparison does not know: the default method, the labels, and the seconds of each stage."""
    from dedpo_diffusion.core.files import write_json

    file = settings.out / "results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    default, loras = settings.methods[0], results["loras"]
    merged = json.loads(route.targets(default).read_text(encoding="utf-8"))
    if settings.rounds > 1:
        from dedpo_diffusion.journey.rounds import curve, draw_curve, last_gain

        results["rounds"] = curve(route, results)
        default = replace(route, number=last_gain(results["rounds"])).arm(default)
        draw_curve(results["rounds"], settings.out / "rounds.png")
    results["default"] = default
    for name, entry in loras.items():
        if name in results["arms"]:
            results["arms"][name] |= {key: entry[key] for key in ("best_strength", "gain_at_best_strength")}
    results["default_minus"] = loras[default]["best_minus"] if default in loras else {}
    results["labels"] = {name: merged.get(name) for name in LABEL_FACTS}
    results["seconds"] = journal.seconds()
    write_json(file, results)


def judged_anew(settings: AlignSettings, route: Route) -> bool:
    """Whether by these settings the rounds end elsewhere than results.json says."""
    if settings.rounds == 1:
        return False
    from dedpo_diffusion.journey.rounds import curve, read_results

    results = read_results(settings.out / "results.json")
    return results.get("rounds") != curve(route, results)


def travel(settings: AlignSettings, route: Route, known: Known, journal: Journal) -> None:
    """Every step that is due, one after the other."""
    from dedpo_diffusion.journey.steps import steps

    for step in steps(route, known):
        found = journal.look(step)
        if not found.due:
            say(f"{step.name}: done already")
            if step.name == "compare" and judged_anew(settings, route):
                complete_results(settings, route, journal)
            continue
        if found.why:
            say(f"\n{step.name}: {found.why}")
        with journal.doing(step, found):
            perform(step, settings, route)
            if step.name == "compare":
                complete_results(settings, route, journal)
        if step.stage == "ingest":
            check_labels(settings, route)


def check_labels(settings: AlignSettings, route: Route) -> None:
    """See that a source that was read has human labels where nobody is asked.

    Raises:
        UserError: it has none.
    """
    if not route.label("human").is_file() and settings.people == "real" and not settings.votes and set(settings.methods) != {"naive"}:
        raise UserError(f"{settings.pairs} has no human labels, and merging learns from people; give votes, such as 100")


# ---- what is told


def rehearse(settings: AlignSettings, route: Route, known: Known) -> None:
    """Print every command with what it will cost, and do nothing."""
    from dedpo_diffusion.journey.steps import steps

    for kind, given in (("proposed", settings.prompts), ("evaluation", settings.eval_prompts)):
        if given == "shapes":
            say(f"# the journey writes {route.prompts(kind)[0]}, prompts of the embedded model, before all else")
    for step in steps(route, known):
        say(f"\n# {step.name}: {step.cost}")
        say("# the simulated people answer; no command" if step.stage == "human" else f"$ {step.line()}")
    say(f"\n# GPU memory of training: {memory_words(settings)}")


def memory_words(settings: AlignSettings) -> str:
    """The GPU memory of training by the recipe, as far as it can be computed."""
    import yaml

    from dedpo_diffusion.core.recipes import recipe_files
    from dedpo_diffusion.evaluation.benchmarks.memory import MODELS, OVERHEAD, by_config
    from dedpo_diffusion.journey.plan import recipe_file

    recipe = recipe_file(str(settings.recipe))
    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if recipe not in recipe_files().values() or told.get("model") not in MODELS:
        return "not known for this recipe"
    if not settings.memory:
        return "--memory true computes it, in a minute or two"
    found = by_config(recipe.stem, stored=bool(told["data"].get("reference_draws")))
    peak = max(found["bytes"]["peak"], found["encoding_bytes"]) + OVERHEAD
    return f"{peak / 2**30:.1f} GiB (computed for {told['model']}, not measured)"


def tell_end(settings: AlignSettings, journal: Journal) -> dict[str, Any]:
    """Say the verdict, and where everything lies; returns the results."""
    out = settings.out
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    say(f"\n{results['verdict']}\n")
    first = results["default"]
    if settings.rounds > 1:
        from dedpo_diffusion.journey.plan import Route
        from dedpo_diffusion.journey.rounds import curve_words

        for line in curve_words(Route(settings), results["rounds"]):
            say(line)
    several = len(settings.strengths) > 1
    for file, what in (
        ("report.html", "the report: open it in a browser"),
        ("frontier.png" if several else "contact_sheet.png", "gain against drift" if several else "the base against the LoRAs"),
        ("results.json", "every figure of the report"),
        (
            "aligned.safetensors" if several else f"{first}.safetensors",
            f"the LoRA by {first}" + (", best at strength 1" if several else ""),
        ),
    ):
        say(f"  {out / file}  {what}")
    say(f"  {journal.seconds()['total']:.0f} s in all")
    return results


def run(settings: AlignSettings) -> dict[str, Any] | None:
    """The whole journey on your own model: pairs, labels, targets, LoRAs, images, verdict."""
    from dedpo_diffusion.journey.costs import known_of
    from dedpo_diffusion.journey.journal import Journal
    from dedpo_diffusion.journey.plan import Route

    check_settings(settings)
    route = Route(settings)
    known = known_of(settings, route.pairs)
    journal = Journal(settings.out, identity_of(settings))
    if settings.dry_run:
        rehearse(settings, route, known)
        return None
    journal.open()
    write_shapes_prompts(settings)
    travel(settings, route, known, journal)
    return tell_end(settings, journal)


FLAGS = {name: name for name in ("judges", "methods", "strengths", "scorers", "held_out")}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return stage(AlignSettings, run, argv, prog="dedpo align", flags=FLAGS)


if __name__ == "__main__":
    raise SystemExit(main())
