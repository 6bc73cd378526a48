"""Votes on two models' images, blind: what `dedpo vote BASE ARM` opens, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import VoteSettings
from dedpo_diffusion.voting.opening import Voting, is_new, voting_name

if TYPE_CHECKING:
    from dedpo_diffusion.voting.export import Export
    from dedpo_diffusion.voting.samples import SamplePairs
    from dedpo_diffusion.voting.service import VoteService

DESIGN = ("seed", "repeats", "overlap")


def read_samples(base: Path, arm: Path) -> SamplePairs:
    """Two sample folders as pairs; UserError where they are not paired, or cannot be shown blind."""
    from dedpo_diffusion.evaluation.comparison.samples import images_digest, read_index
    from dedpo_diffusion.voting.samples import SamplePairs, match_samples

    base_rows, arm_rows = read_index(base), read_index(arm)
    matched = match_samples(base, base_rows, arm, arm_rows)
    return SamplePairs(base, arm, matched, (images_digest(base, base_rows), images_digest(arm, arm_rows)))


@contextmanager
def open_samples(settings: VoteSettings) -> Iterator[Voting]:
    """The voting on two sample folders as it stands, ready to be served; a new one where there is none."""
    from dedpo_diffusion.voting import sample_export as verdict
    from dedpo_diffusion.voting.plan import Plan
    from dedpo_diffusion.voting.server import PageHooks
    from dedpo_diffusion.voting.service import VoteService
    from dedpo_diffusion.voting.store import Store

    (base, arm), name = settings.folders, voting_name(settings)
    if is_new(settings):
        check_name(arm, name)
    reader = read_samples(base, arm)
    keys, _ = reader.keys(settings.seed)
    plan = Plan(reader.ids(), seed=settings.seed, keys=keys, repeats=settings.repeats, overlap=settings.overlap)
    design: dict[str, Any] = {"images": reader.fingerprint(), **{key: getattr(settings, key) for key in DESIGN}}
    with closing(Store(arm, name, design)) as store:
        check_name(arm, name, store.session)
        service = VoteService(reader, plan, store)
        hooks = PageHooks(
            {"dataset": "Two models", "blind": True}, lambda: verdict.summary(service, reader),
            lambda: export_blind(settings, service, reader),
        )  # fmt: skip
        yield Voting(service, hooks, greeting(settings, service, reader), lambda: write_votes(settings, service, reader))


def check_name(arm: Path, name: str, session: str | None = None) -> None:
    """The vote file of this name is made by this voting, or is not there; UserError otherwise. `session` is None for a new voting."""
    from dedpo_diffusion.evaluation.comparison.people import votes_session
    from dedpo_diffusion.labels.files import named_file

    path = named_file(arm, "votes", name)
    if path.is_file() and (session is None or votes_session(path) != session):
        raise UserError(f"{path} is there already, made by another voting; give another --name, which keeps both")


def greeting(settings: VoteSettings, service: VoteService, reader: SamplePairs) -> list[str]:
    """What is asked, and what becomes of it."""
    now, same = service.session(), len(reader.identical)
    left_out = f"; {same} more of identical images are ties without being asked" if same else ""
    return [
        f"{now['pairs']} pairs of {len(set(service.prompts))} prompts, every prompt once before any comes again{left_out}",
        f"{now['votes']} votes by {len(now['raters'])} people so far, kept in {service.store.path}",
        f"Ctrl-C stops and writes {service.store.path.with_suffix('.parquet')}; each answer is saved at once",
    ]


def export(settings: VoteSettings, service: VoteService, reader: SamplePairs) -> tuple[Export, list[dict[str, Any]]]:
    """Write the vote file; what may be said to everybody, and the answers.

    Raises:
        UserError: there is no vote yet, or another voting made a file of that name.
    """
    from dedpo_diffusion.evaluation.comparison import people
    from dedpo_diffusion.voting.export import Export
    from dedpo_diffusion.voting.sample_export import summary, to_answers

    (base, arm), name, session = settings.folders, voting_name(settings), service.store.session
    answers = to_answers(service, reader)
    if not any(answer["rater"] for answer in answers):
        raise UserError("there is no vote yet, so there is nothing to write")
    check_name(arm, name, session)
    metadata = {"base_images": reader.digests[0], "arm_images": reader.digests[1], "base": base.resolve().name, "session": session}
    design = {key: getattr(settings, key) for key in DESIGN}
    path = people.write_votes(arm, name, answers, {**metadata, "design": design})
    return Export(path, len({answer["file"] for answer in answers}), summary(service, reader)["sentences"]), answers


def export_blind(settings: VoteSettings, service: VoteService, reader: SamplePairs) -> Export:
    """Write the vote file for the page; a trouble whose words may name a folder is said where the server runs alone."""
    try:
        return export(settings, service, reader)[0]
    except UserError as error:
        if not service.session()["votes"]:
            raise
        say(f"the votes were not written: {error}")
        raise UserError("the vote file could not be written; the answers themselves are safe") from error


def write_votes(settings: VoteSettings, service: VoteService, reader: SamplePairs) -> Path | None:
    """Write the vote file and say what it holds; who is ahead only where that was asked for. None where nobody has voted."""
    base, arm = settings.folders
    if not service.session()["votes"] and not settings.export_only:
        older = service.store.path.with_suffix(".parquet")
        say("there are no votes, so nothing was written" + (f"; {older} is of votes undone since" if older.is_file() else ""))
        return None
    done, answers = export(settings, service, reader)
    say(f"wrote {done.path}: {done.labels} pairs judged")
    for sentence in done.sentences:
        say(sentence)
    named = "" if settings.name is None else f" --name {settings.name}"
    if settings.export_only:
        say(outcome(base.resolve().name, arm.resolve().name, answers))
    else:
        say(f"who is ahead is not said here, so that voting can continue; this says it: dedpo vote {base} {arm}{named} --export_only true")
    say(f"beside the scores: dedpo compare {base} {arm} --out report.html")
    return done.path


def outcome(base: str, arm: str, answers: Sequence[dict[str, Any]]) -> str:
    """How often people preferred the arm, in words: the gain and the win rate that `dedpo compare` makes of this vote file.

    Args:
        base, arm: names of the models.
        answers: rows of the vote file.
    """
    import numpy as np

    from dedpo_diffusion.evaluation.comparison.arms import counted
    from dedpo_diffusion.evaluation.comparison.intervals import rate_interval
    from dedpo_diffusion.evaluation.comparison.people import as_votes
    from dedpo_diffusion.evaluation.comparison.preferences import judge

    rows = list({answer["file"]: answer for answer in answers}.values())
    judged = judge(as_votes(answers, rows))
    if judged is None:
        return "People: no pair is judged; all answers are repetitions."
    prompts = np.array([rows[row]["prompt"] for row in judged.rows])
    asked, ties = len(set(prompts.tolist())), float(np.mean(judged.wins == 0.5))
    tied = f"ties counted as half ({ties:.1%} of the pairs are ties)"
    if asked < 2:
        won = f"{arm} wins {np.mean(judged.wins):.1%} of {counted(len(prompts), 'pair')} of one prompt"
        return f"People: {won}, {tied}; one prompt says nothing about others, so there is no interval."
    share, wins = rate_interval(judged.preferred, prompts), rate_interval(judged.wins, prompts)
    words = (
        f"{arm} is {'better' if share.mean > 0.5 else 'worse'} than {base}"
        if share.excludes(0.5)
        else f"{arm} and {base} cannot be told apart"
    )
    gain = f"gain {2 * share.mean - 1:+.3f} (95 %: {2 * share.low - 1:+.3f} to {2 * share.high - 1:+.3f})"
    return (
        f"People: {words}, {gain}. {arm} wins {wins.mean:.1%} (95 %: {wins.low:.1%} to {wins.high:.1%}) of {len(prompts)} pairs "
        f"of {asked} prompts, {tied}."
    )
