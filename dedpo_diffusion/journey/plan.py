"""What the steps of a journey are: propose or ingest, validate, label, vote, calibrate, merge, train, export, sample, score, compare.

Every step is an ordinary stage with its ordinary command line; only the simulated people of Shapes are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.recipes import recipe_files
from dedpo_diffusion.journey import costs
from dedpo_diffusion.journey.journal import Step
from dedpo_diffusion.sampling.strength_folders import PREFIX, strength_folder
from dedpo_diffusion.settings import AlignSettings

SHAPES = "shapes"
EVALUATION_SEED = 1_000_000  # far from the seeds of the proposed pairs


def taken_up(pairs: str | None) -> bool:
    """Whether these pairs are a pair dataset already, which no stage need make."""
    return pairs is not None and (Path(pairs) / "pairs").is_dir()


def listed(option: str, values: Sequence[Any]) -> list[str]:
    """An option that takes a list, repeated as `dedpo compare` takes it."""
    return [part for value in values for part in (f"--{option}+", str(value))]


def recipe_file(recipe: str) -> Path:
    """The training recipe: a file, or the name of one that is carried along.

    Raises:
        UserError: there is none of this name.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    carried = recipe_files().get(recipe.removesuffix(".yaml"))
    if carried is not None:
        return carried
    raise UserError(f"recipe {recipe}: no such file, and no recipe of that name is carried along (sdxl_lora.yaml is one)")


@dataclass(frozen=True)
class Route:
    """Where everything of a journey, or of one of its rounds from the second on, lies, and how its settings become options."""

    settings: AlignSettings
    number: int = 1

    @property
    def folder(self) -> Path:
        """Where a round keeps what is its own."""
        return self.settings.out if self.number == 1 else self.settings.out / "rounds" / str(self.number)

    @property
    def pairs(self) -> Path:
        """The pair dataset: of a further round, all pairs so far."""
        if self.number > 1:
            return self.folder / "data"
        return Path(str(self.settings.pairs)) if taken_up(self.settings.pairs) else self.settings.out / "data"

    def own(self, name: str) -> str:
        """The name of a file that is made in the pair dataset; in one of the user's it bears the journey's name too."""
        return f"{self.settings.out.resolve().name}-{name}" if self.number == 1 and taken_up(self.settings.pairs) else name

    def arm(self, method: str) -> str:
        """The name of a method's LoRA."""
        return method if self.number == 1 else f"{method}-round-{self.number}"

    def run(self, method: str) -> Path:
        """The run folder of a method."""
        return self.settings.out / "runs" / self.arm(method)

    def step(self, name: str) -> str:
        """The name of a step of this round."""
        return name if self.number == 1 else f"{name}, round {self.number}"

    def label(self, name: str) -> Path:
        """A label file."""
        return self.pairs / "labels" / f"{name}.parquet"

    def targets(self, method: str) -> Path:
        """The report of a method's targets."""
        return self.pairs / "targets" / f"{self.own(method)}.json"

    def lora(self, method: str) -> Path:
        """The LoRA of a method."""
        return self.settings.out / f"{self.arm(method)}.safetensors"

    def samples(self, arm: str) -> Path:
        """The sample folder of the base or a method; of several strengths it holds a folder each."""
        return self.settings.out / "samples" / arm

    def prompts(self, kind: str) -> tuple[str, int | None]:
        """(source, limit) of the prompts that pairs are "proposed" for, or of the "evaluation"."""
        s = self.settings
        given, limit = (s.prompts, s.limit) if kind == "proposed" else (s.eval_prompts, s.eval_limit)
        return (str(s.out / f"prompts-{kind}.txt"), None) if given == SHAPES else (str(given), limit)

    def judges(self) -> dict[str, str]:
        """The judges' specifications by the names of their label files."""
        found: dict[str, str] = {}
        for spec in self.settings.judges:
            name = spec.partition("=")[0]
            number = sum(held.startswith(name) for held in found) + 1
            found[name if number == 1 else f"{name}-{number}"] = spec
        return found

    def device(self) -> list[str]:
        """--device of the stages that take any."""
        return [] if self.settings.device is None else ["--device", self.settings.device]

    def model(self) -> list[str]:
        """--model, the architecture of a single file, and what it predicts."""
        s = self.settings
        told = {"model": s.model, "model_config": s.model_config, "model_prediction": s.model_prediction}
        return [part for name, value in told.items() if value is not None for part in (f"--{name}", value)]

    def sampler(self) -> list[str]:
        """How images are sampled: what the settings say, and else what the stages take by themselves."""
        s = self.settings
        options = {"steps": s.sampler_steps, "guidance": s.guidance, "size": s.size, "batch": s.batch, "dtype": s.dtype}
        return [part for name, value in options.items() if value is not None for part in (f"--{name}", f"{value}")] + self.device()


def existing(*paths: str | Path | None) -> tuple[Path, ...]:
    """Those that are files or folders here, and no names of a set or a hub."""
    return tuple(Path(path) for path in paths if path is not None and Path(path).exists())


# ---- pairs and labels


def pair_steps(route: Route, known: costs.Known) -> Iterator[Step]:
    """Pairs, looked at and labelled by judges."""
    s, data = route.settings, route.pairs
    argv: tuple[str, ...]
    if s.prompts is not None:
        source, limit = route.prompts("proposed")
        options = ["--prompts", source, "--out", str(data), "--seed", str(s.seed), "--images_per_prompt", str(s.images_per_prompt)]
        options += [] if limit is None else ["--limit", str(limit)]
        argv = (*route.model(), *options, *route.sampler())
        yield Step(
            "propose", "propose", argv, existing(source), (data / "pairs",), (data,), redo="refuse", resumes=True, whole=True,
            free=("--batch", "--device"), cost=costs.propose(route.settings, known),
        )  # fmt: skip
    elif not taken_up(s.pairs):
        argv = (s.format, str(s.pairs), "--out", str(data))
        yield Step(
            "ingest", "ingest", argv, existing(s.pairs), (data / "pairs",), (data,), redo="refuse", resumes=True, whole=True,
            cost="reads every image once, and copies it",
        )  # fmt: skip
    report = s.out / "validate.json"
    made = (report, report.with_suffix(".html"))
    inputs = (data / "pairs",)
    yield Step("validate", "validate", (str(data), "--out", str(report)), inputs, (report,), made, cost=f"decodes {known.images()}")
    yield from label_steps(route, known, data)


def label_steps(route: Route, known: costs.Known, data: Path) -> Iterator[Step]:
    """The judges' labels of a pair dataset."""
    judges, inputs = route.judges(), (data / "pairs",)
    together = [spec for name, spec in judges.items() if not spec.startswith("http=")]
    apart = {name: spec for name, spec in judges.items() if spec.startswith("http=")}  # a server names itself, so it is given a name
    for name, specs in {"": together, **{name: [spec] for name, spec in apart.items()}}.items():
        if specs:
            argv = (str(data), "--with", *specs, *(["--name", name] if name else []), *route.device())
            names = [name] if name else [held for held in judges if held not in apart]
            outputs = tuple(data / "labels" / f"{made}.parquet" for made in names)
            yield Step(
                route.step(f"label {name}".strip()), "label", argv, inputs, outputs, outputs, redo="stage", resumes=True,
                free=("--device",), cost=f"{known.images()}, looked at by {' and '.join(specs)}",
            )  # fmt: skip


def people_steps(route: Route, known: costs.Known) -> Iterator[Step]:
    """People's answers: asked for in the page, or the simulated people's."""
    s, data = route.settings, route.pairs
    human = route.label("human")
    argv: tuple[str, ...]
    if s.people == "simulated":
        argv = ("--share", f"{s.human_share:g}", "--seed", str(s.seed))
        yield Step("human", "human", argv, (data / "pairs",), (human,), (human,), cost=f"about {known.labels()} answers, in seconds")
    elif s.votes:
        argv = (str(data), "--until", str(s.votes), "--open", "true")
        votes = (data / "votes" / "human.sqlite",)
        yield Step(
            "vote", "vote", argv, (data / "pairs",), (human,), votes, redo="stage", resumes=True, free=("--until", "--open"),
            cost=f"{s.votes} answers of people, about 5 seconds each",
        )  # fmt: skip


# ---- targets


def merge_steps(route: Route, known: costs.Known, method: str) -> Iterator[Step]:
    """Targets by one method; for adapted, first the judge that people teach, or, with too few labels to teach one, by method tuned."""
    from dedpo_diffusion.labels.adaptation import LEAST

    named, by, cost, labels = list(route.judges()), method, "seconds", known.labels()
    if method == "adapted" and (labels or LEAST) >= LEAST:
        step = calibrate_step(route, known)
        yield step
        named = [route.own("adapt")]
    elif method == "adapted":
        by, cost = "tuned", f"seconds; {labels} labels are too few to teach a judge ({LEAST}), so the method is tuned"
    chosen = ["--judge", *named] if len(named) == 1 else ["--judges", ",".join(named)]
    if method == "human_only" and len(named) != 1:
        named, chosen = [], []
    argv = (str(route.pairs), "--method", by, *chosen, "--name", route.own(method))
    report = route.targets(method)
    made_files = tuple(report.with_suffix(suffix) for suffix in (".parquet", ".json", ".png"))
    inputs = (route.pairs / "pairs", route.label("human"), *map(route.label, named))
    yield Step(route.step(f"merge {method}"), "merge", argv, inputs, made_files[:2], made_files, cost=cost)


def calibrate_step(route: Route, known: costs.Known) -> Step:
    """The judge that people teach."""
    judges, data = list(route.judges()), route.pairs
    inputs = (data / "pairs", route.label("human"), *map(route.label, judges))
    argv = (str(data), "--judges", *judges, "--method", "adapt", "--name", route.own("adapt"), "--seed", str(route.settings.seed))
    made = tuple(route.label(route.own("adapt")).with_suffix(suffix) for suffix in (".parquet", ".json", ".png"))
    return Step(
        route.step("calibrate"), "calibrate", argv, inputs, made[::3], made, cost=f"statistics of {known.images()}, once; then seconds"
    )


# ---- LoRAs


def train_steps(route: Route, known: costs.Known, method: str, start: Path | None = None) -> Iterator[Step]:
    """One LoRA: everything but the targets is the same for all methods. It goes on from the LoRA `start`."""
    s, run, lora = route.settings, route.run(method), route.lora(method)
    recipe = recipe_file(str(s.recipe))
    options = ["--data.pairs", str(route.pairs), "--data.targets", route.own(method), "--data.cache", str(route.folder / "cache")]
    options += [] if start is None else ["--lora.start", str(start)]
    options += ["--out", str(run), "--seed", str(s.seed)]
    options += [] if s.steps is None else ["--optim.steps", str(s.steps)]
    options += ["--device", "cpu"] if s.device == "cpu" else []
    options += [part for name, value in s.training.items() for part in (f"--{name}", str(value))]
    inputs = (route.pairs / "pairs", route.targets(method).with_suffix(".parquet"), recipe, *existing(s.model, start))
    yield Step(
        route.step(f"train {method}"), "train", ("--config", str(recipe), *route.model(), *options), inputs,
        (run / "settings.yaml",), (run,), resumes=True, cost=costs.train(s, recipe, known, first=method == s.methods[0]),
    )  # fmt: skip
    argv = (str(run), "--out", str(lora))
    yield Step(route.step(f"export {method}"), "export", argv, (run / "checkpoints",), (lora,), (lora,), cost="a LoRA file")


def verdict_steps(loras: Sequence[tuple[Route, str]], known: costs.Known, best: Callable[[], int] = lambda: 0) -> Iterator[Step]:
    """Images of the base and every LoRA at every strength, their scores, the comparison, and one LoRA at its best strength: the `best`,
    which is asked for when the comparison is there."""
    yield from compare_steps(loras, known, loras[0][0].settings.out)
    route, method = loras[best()]
    s, out = route.settings, route.settings.out
    if len(s.strengths) > 1:
        aligned, run, results = out / "aligned.safetensors", route.run(method), out / "results.json"
        argv = (str(run), "--out", str(aligned), "--strength", "best", "--results", str(results), "--arm", route.arm(method))
        made = (aligned, out / "README.md")
        yield Step("export best", "export", argv, (run / "checkpoints", results), (aligned,), made, cost="a LoRA file, best at strength 1")


def compare_steps(loras: Sequence[tuple[Route, str]], known: costs.Known, folder: Path, name: str = "") -> Iterator[Step]:
    """Images of the base and of LoRAs (round and method), their scores, and the comparison, which is written into `folder`."""
    route = loras[0][0]
    s, folders = route.settings, list[Path]()
    arms = {"base": None, **{where.arm(method): where.lora(method) for where, method in loras}}
    for arm, lora in arms.items():
        step = sample_step(route, known, arm, lora)
        folders += [path for path in step.outputs]
        yield step
    told = tuple(path.parent / name for path in folders for name in ("identity.json", "settings.yaml"))
    places = [str(route.samples(arm)) for arm in arms]
    scores = tuple(path.parent / "scores.parquet" for path in folders)
    images = costs.evaluation_images(s, known)
    cost = f"{costs.times(images, len(folders))} images, looked at by {' and '.join(s.scorers)}"
    argv = (*places, "--with", *s.scorers, *route.device())
    yield Step(f"score{name}", "score", argv, told, scores, redo="stage", resumes=True, free=("--device",), cost=cost)
    report, results = folder / "report.html", folder / "results.json"
    reports = [where.targets(method) for where, method in loras]
    options = ["--primary", s.held_out[0], *listed("held_out", s.held_out)] if s.held_out else []
    options += listed("runs", [where.run(method) for where, method in loras])
    options += listed("targets", reports)
    made: tuple[Path, ...] = (report, results, folder / "contact_sheet.png", folder / "frontier.png")
    inputs = (*scores, *told, *reports)
    yield Step(
        f"compare{name}", "compare", (*places, "--out", str(report), "--seed", str(s.seed), *options), inputs, made[:2], made,
        cost="a minute, and a page of about as many megabytes as its pictures",
    )  # fmt: skip


def sample_step(route: Route, known: costs.Known, arm: str, lora: Path | None) -> Step:
    """The images of the base, or of a LoRA at all strengths in one run."""
    s, out = route.settings, route.samples(arm)
    source, limit = route.prompts("evaluation")
    options = ["--prompts", source, "--out", str(out), "--seeds", str(s.eval_seeds), "--seed", str(EVALUATION_SEED + s.seed)]
    options += [] if limit is None else ["--limit", str(limit)]
    images = costs.evaluation_images(s, known)
    made: tuple[Path, ...] = (out,)
    adapter: list[str] = []
    if lora is not None:
        adapter = [
            "--lora",
            str(lora),
            "--strength",
            *(strength_folder(strength).removeprefix(PREFIX) for strength in s.strengths),
        ]
        made = tuple(out / strength_folder(strength) for strength in s.strengths) if len(s.strengths) > 1 else made
        images = costs.times(images, len(s.strengths))
    inputs = (*existing(source, s.model), *([] if lora is None else [lora]))
    step = Step(
        f"sample {arm}", "sample", (*route.model(), *adapter, *options, *route.sampler()), inputs,
        tuple(folder / "index.parquet" for folder in made), made, resumes=True, free=("--batch", "--device"),
        cost=f"{images} images of {s.sampler_steps or 50} steps; {costs.disk_of_images(s, images)}",
    )  # fmt: skip
    return replace(step, free=(*step.free, "--strength")) if len(s.strengths) > 1 else step
