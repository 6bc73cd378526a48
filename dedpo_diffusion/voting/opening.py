"""A voting on a pair dataset, opened: the one that is there, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedpo_diffusion.core.console import UserError, say
from dedpo_diffusion.settings import VoteSettings

if TYPE_CHECKING:
    import numpy as np

    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.voting.server import PageHooks
    from dedpo_diffusion.voting.service import VoteService
    from dedpo_diffusion.voting.store import Store


@dataclass(frozen=True)
class Voting:
    """An open voting, and what is its own: on a pair dataset, or on two sample folders.

    Attributes:
        service: votes and images.
        hooks: what the page is told, and writes.
        greeting: what is asked, and what becomes of it.
        finish: writes the votes and says what they are; returns the path, or None where nobody has voted.
    """

    service: VoteService
    hooks: PageHooks
    greeting: Sequence[str]
    finish: Callable[[], Path | None]


def voting_name(settings: VoteSettings) -> str:
    """The voting's name: the one given, or human, or vs-BASE for two sample folders."""
    if settings.name is not None:
        return settings.name
    return "human" if len(settings.folders) == 1 else f"vs-{settings.folders[0].resolve().name}"


def judge_labels(settings: VoteSettings, ids: list[str]) -> tuple[np.ndarray, dict[str, str]]:
    """The judges' labels (J, N) that the order looks at, and the digests of their files.

    Raises:
        UserError: no judge, or one that leaves pairs out.
    """
    import numpy as np

    from dedpo_diffusion.core.files import file_digest
    from dedpo_diffusion.labels.files import CALIBRATED, align, label_names, label_origin, read_labels

    pairs = settings.folders[0]
    calibrated = {name for name in label_names(pairs) if label_origin(pairs, name) == CALIBRATED}
    names = sorted(set(settings.judges) or set(label_names(pairs)) - {voting_name(settings)} - calibrated)
    if not names:
        raise UserError(f"{pairs / 'labels'} holds no judge, which --order disagreement needs; run `dedpo label`, or use random")
    try:
        found = [align(read_labels(pairs, name), ids, folder=pairs, name=name, complete=True) for name in names]
    except UserError as error:
        raise UserError(f"{error}; or name the label files of judges with --judges") from error
    return np.stack(found), {name: file_digest(pairs / "labels" / f"{name}.parquet") for name in names}


@contextmanager
def open_service(settings: VoteSettings) -> Iterator[VoteService]:
    """The voting on a pair dataset as it stands; a new one where there is none."""
    from dedpo_diffusion.pairs.dataset import PairReader
    from dedpo_diffusion.voting.export import check_name
    from dedpo_diffusion.voting.plan import Plan, disagreement, pull
    from dedpo_diffusion.voting.service import VoteService
    from dedpo_diffusion.voting.store import Store

    folder, name = settings.folders[0], voting_name(settings)
    reader = PairReader(folder)
    ids, weights = reader.ids(), None
    judges: dict[str, str] = {}
    if is_new(settings):
        check_name(folder, name)
    if settings.order == "disagreement":
        labels, judges = judge_labels(settings, ids)
        weights = pull(disagreement(labels), settings.floor)
    kept = {key: getattr(settings, key) for key in ("seed", "order", "floor", "repeats", "overlap", "rank")}
    design: dict[str, Any] = {"dataset": reader.fingerprint(), **kept, "judges": judges}
    with closing(Store(folder, name, design)) as store:
        check_name(folder, name, store.session)
        if settings.rank:
            yield open_ranking(settings, reader, store, weights)
            return
        plan = Plan(ids, seed=settings.seed, weights=weights, repeats=settings.repeats, overlap=settings.overlap)
        yield VoteService(reader, plan, store)


def open_ranking(settings: VoteSettings, reader: PairReader, store: Store, weights: np.ndarray | None) -> VoteService:
    """The voting on all images of a prompt at once; what cannot be ranked is told.

    Raises:
        UserError: nothing can be ranked.
    """
    from dedpo_diffusion.voting.plan import Plan
    from dedpo_diffusion.voting.rankings import RankService, find_groups, group_weights

    groups, left_out = find_groups(reader)
    for sentence in left_out:
        say(sentence)
    if not any(group.size > 2 for group in groups):
        raise UserError(
            f"no prompt of {settings.folders[0]} has three images or more whose pairs hang together, so there is nothing to rank; "
            "leave out --rank, or make pairs with `dedpo propose --images_per_prompt 4 --pairing all`"
        )
    pulls = None if weights is None else group_weights(groups, weights)
    plan = Plan([group.name for group in groups], seed=settings.seed, weights=pulls, repeats=settings.repeats, overlap=settings.overlap)
    return RankService(reader, plan, store, groups)


def is_new(settings: VoteSettings) -> bool:
    """Whether this voting is still to begin; UserError where that cannot be, since its votes are to be exported."""
    from dedpo_diffusion.voting.store import store_path

    path = store_path(settings.folders[-1], voting_name(settings))
    if settings.export_only and not path.is_file():
        raise UserError(f"there is no {path}, so nobody has voted yet; run `dedpo vote` without --export_only first")
    return not path.is_file()


@contextmanager
def open_pairs(settings: VoteSettings) -> Iterator[Voting]:
    """The voting on a pair dataset, ready to be served."""
    from dedpo_diffusion.voting import export
    from dedpo_diffusion.voting.server import PageHooks

    folder, name = settings.folders[0], voting_name(settings)
    if (folder / "index.parquet").is_file() and not (folder / "pairs").is_dir():
        raise UserError(f"{folder} is a sample folder, and voting compares two: name the base's first, as in dedpo vote BASE {folder}")
    with open_service(settings) as service:
        hooks = PageHooks(
            {"dataset": folder.resolve().name, "name": name, "order": settings.order},
            lambda: export.summary(service, name), lambda: export.export(service, name),
            "rank.html" if settings.rank else "index.html",
        )  # fmt: skip
        now = service.session()
        greeting = (
            f"{now['pairs']} {'prompts' if settings.rank else 'pairs'} in {settings.order} order; {now['votes']} votes by "
            f"{len(now['raters'])} people so far, kept in {service.store.path}",
            f"Ctrl-C stops and writes {folder / 'labels' / name}.parquet; each answer is saved at once",
        )  # fmt: skip
        yield Voting(service, hooks, greeting, lambda: write_labels(settings, service))


def write_labels(settings: VoteSettings, service: VoteService) -> Path | None:
    """Write vote and label file; None where nobody has voted."""
    from dedpo_diffusion.voting.export import export

    folder, name = settings.folders[0], voting_name(settings)
    if not service.session()["votes"] and not settings.export_only:
        older = folder / "labels" / f"{name}.parquet"
        say("there are no votes, so no labels were written" + (f"; {older} is of votes undone since" if older.is_file() else ""))
        return None
    done = export(service, name)
    say(f"wrote {done.path}: {done.labels} labels, and {folder / 'votes' / done.path.name}")
    for sentence in done.sentences:
        say(sentence)
    return done.path
