"""Plan, queue, store and service of the voting: properties first, no HTTP."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pairs.decoding import decode_image
from dedpo_diffusion.voting.plan import Plan, disagreement, pull, uniform
from dedpo_diffusion.voting.queue import GAP, LEASE_SECONDS, SKIP, Asked, Event, VoteQueue
from dedpo_diffusion.voting.service import Refusal, VoteService
from dedpo_diffusion.voting.store import Store
from support.pictures import picture

IDS = [f"p{k}" for k in range(30)]
KINDS = {3: "TIFF", 5: "JPEG", 6: "WEBP", 7: "BMP"}
DESIGN = {"dataset": "d0", "seed": 0, "order": "random", "floor": 0.2, "repeats": 0.05, "overlap": 0.2, "judges": {}}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Session:
    """Votes in memory, as the service makes them, with every event kept."""

    def __init__(self, plan, clock=None):
        self.plan, self.clock, self.events = plan, clock or Clock(), []
        self.queue = VoteQueue(plan, self.clock)

    def vote(self, rater, answer, asked=None):
        asked = asked or self.queue.upcoming(rater)[0]
        self._add(rater, asked, "vote", answer, self.plan.swapped(rater, asked.pair, again=asked.again), 1.0, None)
        return asked

    def undo(self, rater):
        last = self.queue.last(rater)
        asked = Asked(self.queue.number[last.pair_id], last.again)
        self._add(rater, asked, "undo", None, None, None, last.number)
        return asked

    def _add(self, rater, asked, kind, answer, swapped, seconds, undoes):
        event = Event(len(self.events) + 1, rater, self.plan.ids[asked.pair], asked.again, kind, answer, swapped, seconds, "", undoes)
        self.queue.apply(event)
        self.events.append(event)

    def vote_all(self, rater, answer="left"):
        asked = []
        while self.queue.upcoming(rater):
            asked.append(self.vote(rater, answer))
        return asked


# ---- the plan


@given(st.lists(st.one_of(st.text(), st.integers()), min_size=1, max_size=4))
def test_a_draw_lies_strictly_between_0_and_1(parts):
    assert 0 < uniform(*parts) < 1


def test_the_order_does_not_depend_on_the_order_of_the_dataset():
    weights = np.linspace(0.2, 1, len(IDS))
    for w in (None, weights):
        plan = Plan(IDS, seed=3, weights=w, overlap=0.5)
        back = Plan(IDS[::-1], seed=3, weights=None if w is None else w[::-1], overlap=0.5)
        assert [plan.ids[i] for i in plan.order] == [back.ids[i] for i in back.order]
        assert plan.shared == back.shared[::-1]
        assert [plan.swapped("anna", i) for i in range(30)] == [back.swapped("anna", i) for i in range(30)][::-1]
        assert [plan.order[place] for place in plan.place] == list(range(30))
    assert Plan(IDS, seed=3).order == Plan(IDS, seed=3).order != Plan(IDS, seed=4).order


def test_sides_and_shares_are_what_the_settings_say():
    """Each share of 4000 hashes lies within 4 standard errors of its probability."""
    n = 4000
    plan = Plan([str(k) for k in range(n)], seed=1, repeats=0.05, overlap=0.2)
    shares = {
        0.5: [plan.swapped("anna", i) for i in range(n)],
        0.5 + 1e-9: [plan.swapped("anna", i) == plan.swapped("ben", i) for i in range(n)],
        0.2: plan.shared,
        0.05: [plan.repeat_is_due("anna", i) for i in range(n)],
    }
    for p, found in shares.items():
        assert abs(np.mean(found) - p) < 4 * np.sqrt(p * (1 - p) / n)
    assert all(plan.swapped("anna", i) != plan.swapped("anna", i, again=True) for i in range(n))


def test_disagreement_of_one_judge_and_of_several():
    """One judge: 1 - |2 g - 1|. Two judges 0.2 and 0.9: 0.7. Floor 0.2 turns 0.7 into 0.2 + 0.8 * 0.7 = 0.76."""
    np.testing.assert_allclose(disagreement(np.array([[0.0, 0.5, 0.9]])), [0, 1, 0.2])
    np.testing.assert_allclose(disagreement(np.array([[0.2, 0.5], [0.9, 0.5]])), [0.7, 0])
    np.testing.assert_allclose(pull(np.array([0.7, 0, 1]), 0.2), [0.76, 0.2, 1])


def test_propensity_is_weight_times_the_first_key_not_asked():
    plan = Plan(IDS, seed=0, weights=np.linspace(0.1, 1, 30))
    for end in (1, 7, 29):
        tau, asked = plan.keys[plan.order[end]], plan.order[:end]
        p = plan.propensity(asked, end)
        np.testing.assert_allclose(p, np.minimum(1, plan.weights[asked] * tau))
        assert (plan.keys[asked] < tau).all()
    assert (plan.propensity(plan.order, 30) == 1).all()
    assert Plan(IDS, seed=0).propensity([1, 2], 5) is None


def test_propensities_undo_the_choice_of_pairs_and_the_plain_mean_does_not():
    """400 seeds, 200 pairs, 60 asked; z is likelier 1 where judges disagree. Bounds: 4 standard errors of the 400 means."""
    rng = np.random.default_rng(0)
    d = rng.uniform(size=200) ** 2
    z = (rng.uniform(size=200) < 0.2 + 0.7 * d).astype(float)
    weights, n = pull(d, 0.2), 60
    weighted, plain = [], []
    for seed in range(400):
        plan = Plan([str(k) for k in range(200)], seed=seed, weights=weights)
        asked = plan.order[:n]
        weighted.append(np.sum(z[asked] / plan.propensity(asked, n)) / 200)
        plain.append(z[asked].mean())
    for means, unbiased in ((weighted, True), (plain, False)):
        error = abs(np.mean(means) - z.mean()) / (np.std(means) / np.sqrt(len(means)))
        assert (error < 4) if unbiased else (error > 20)


# ---- the queue

WHAT = ["left", "right", "tie", "skip", "undo", "look", "late", "wait"]
HOW_OFTEN = [0.2, 0.2, 0.1, 0.1, 0.08, 0.12, 0.12, 0.08]


def naive_fresh(session, rater):
    """The first pair of the order that may be asked, found by looking at everything."""
    standing = {(e.rater, session.queue.number[e.pair_id]): e for e in session.queue.votes() if not e.again}
    for pair in session.plan.order:
        others = [e for (who, number), e in standing.items() if number == pair and who != rater and e.answer != SKIP]
        holder, until = session.queue._leases.get(pair, (rater, 0.0))
        leased = holder != rater and until > session.clock()
        if (rater, pair) not in standing and (session.plan.shared[pair] or not (others or leased)):
            return Asked(pair, False)
    return None


def naive_progress(session, rater):
    votes, plan = session.queue.votes(), session.plan
    labelled = {e.pair_id for e in votes if e.answer != SKIP and not e.again}
    own = [e for e in votes if e.rater == rater]
    left = [i for i, p in enumerate(plan.ids) if p not in {e.pair_id for e in own} and (plan.shared[i] or p not in labelled)]
    answered, skipped = sum(e.answer != SKIP for e in own), sum(e.answer == SKIP for e in own)
    return {
        "answered": answered, "skipped": skipped, "total": len(left) + answered + skipped, "labelled": len(labelled), "pairs": len(IDS),
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_the_state_is_a_replay_and_equals_what_looking_at_everything_finds(seed):
    rng, seen = np.random.default_rng(seed), {}
    session = Session(Plan(IDS, seed=seed, repeats=0.3, overlap=0.3))
    for rater, what in zip(rng.choice(["anna", "ben"], 120), rng.choice(WHAT, 120, p=HOW_OFTEN), strict=True):
        items = session.queue.upcoming(rater)
        if what == "wait":
            session.clock.now += LEASE_SECONDS
        elif what == "look":
            seen.setdefault(rater, items[:1])
        elif what == "undo":
            if session.queue.last(rater) is not None:
                session.undo(rater)
        elif what == "late":  # the answer to a page that was left open, maybe on a pair that others have answered since
            for asked in seen.pop(rater, []):
                if session.queue.standing(rater, asked) is None and session.queue.may_answer(rater, asked):
                    session.vote(rater, "left", asked)
        elif items:
            session.vote(rater, what)
        items, fresh = session.queue.upcoming(rater), naive_fresh(session, rater)
        if not session.queue._person(rater).undone:
            assert items[:1] == [fresh] or (items[0].again if items else fresh is None)
        for who in ("anna", "ben"):
            assert session.queue.progress(who) == naive_progress(session, who)
    again = VoteQueue(session.plan, session.clock)
    for event in session.events:
        again.apply(event)
    assert again.votes() == session.queue.votes() and again.labels == session.queue.labels and again.undone == session.queue.undone
    for rater in ("anna", "ben"):
        assert again.progress(rater) == session.queue.progress(rater)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0]))
def test_undo_goes_back_to_the_first_answer_and_forward_the_same_way(seed, repeats):
    session, asked = Session(Plan(IDS, seed=seed, repeats=repeats)), []
    for answer in np.random.default_rng(seed).choice(["left", "right", "tie", "skip"], 50, p=[0.4, 0.3, 0.2, 0.1]):
        items = session.queue.upcoming("anna")
        if not items:
            break
        asked.append(session.vote("anna", answer))
        if answer != "skip":
            assert [asked[-1], *session.queue.upcoming("anna")[:1]] == items
    for k, back in reversed(list(enumerate(asked))):
        assert session.undo("anna") == back
        upcoming = session.queue.upcoming("anna")
        assert upcoming[0] == back and upcoming[1:2] == (asked[k + 1 : k + 2] or upcoming[1:2])
    assert session.queue.last("anna") is None and session.queue.labels == {} and session.queue.progress("anna")["total"] == len(IDS)
    assert [session.vote("anna", "left") for _ in asked] == asked


def test_an_undone_pair_comes_back_before_an_earlier_one_and_then_goes_to_others():
    session = Session(Plan(IDS, seed=0))
    session.queue.upcoming("ben")  # holds places 0 and 1
    third = session.vote("anna", "left")
    session.vote("cleo", "left", Asked(session.plan.order[0], False))
    session.vote("cleo", "left", Asked(session.plan.order[1], False))
    assert session.queue.upcoming("ben")[0].pair not in session.plan.order[:3]
    session.undo("cleo")  # place 1 is open again, and comes before anna's
    session.clock.now = LEASE_SECONDS
    session.undo("anna")
    assert session.queue.upcoming("anna")[0] == third and third.pair == session.plan.order[2]
    session.clock.now = 2 * LEASE_SECONDS
    assert [asked.pair for asked in session.queue.upcoming("ben")] == session.plan.order[1:3]


def test_one_rater_is_asked_every_pair_once():
    session = Session(Plan(IDS, seed=0, overlap=0.3))
    assert [asked.pair for asked in session.vote_all("anna")] == session.plan.order
    assert session.queue.upcoming("anna") == [] and session.queue.progress("anna")["total"] == len(IDS)


def test_two_raters_share_the_overlap_and_nothing_else():
    session = Session(Plan(IDS, seed=0, overlap=0.3))
    asked = {"anna": [], "ben": []}
    while any(session.queue.upcoming(rater) for rater in asked):
        for rater in asked:  # both look, then both answer
            session.queue.upcoming(rater)
        for rater, mine in asked.items():
            if session.queue.upcoming(rater):
                mine.append(session.vote(rater, "left").pair)
    both = set(asked["anna"]) & set(asked["ben"])
    assert both == {i for i in range(30) if session.plan.shared[i]} and 0 < len(both) < 30
    assert set(asked["anna"]) | set(asked["ben"]) == set(range(30))
    assert min(len(set(mine) - both) for mine in asked.values()) > 5
    for mine in asked.values():
        assert len(mine) == len(set(mine))


def test_a_skip_leaves_the_pair_to_others_and_is_not_asked_again():
    session = Session(Plan(IDS, seed=0))
    skipped = [asked.pair for asked in session.vote_all("anna", SKIP)]
    assert sorted(skipped) == list(range(30)) and session.queue.labels == {}
    assert [asked.pair for asked in session.vote_all("ben")] == session.plan.order
    assert session.queue.progress("anna") == {"answered": 0, "skipped": 30, "total": 30, "labelled": 30, "pairs": 30}


def test_a_lease_keeps_a_pair_for_ten_minutes():
    session = Session(Plan(IDS, seed=0))
    first, second = session.queue.upcoming("anna")
    assert [asked.pair for asked in session.queue.upcoming("ben")] == session.plan.order[2:4]
    session.clock.now = LEASE_SECONDS - 1
    assert session.queue.upcoming("cleo")[0].pair == session.plan.order[4]
    session.clock.now = LEASE_SECONDS
    assert session.queue.upcoming("dora") == [first, second]
    session.vote("anna", "left", first)  # late, but what a person said is kept
    assert session.queue.upcoming("dora")[0] == second and session.queue.upcoming("anna")[0].pair not in (first.pair, second.pair)


def test_hidden_repetitions_come_late_once_and_never_for_a_skip():
    session = Session(Plan([f"p{k}" for k in range(400)], seed=0, repeats=0.3))
    asked = [session.vote("anna", SKIP if k % 7 == 0 else "left") for k in range(400)]
    repeats = [k for k, item in enumerate(asked) if item.again]
    assert abs(len(repeats) / 400 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 400)
    assert len({asked[k].pair for k in repeats}) == len(repeats)
    for k in repeats:
        first = asked.index(Asked(asked[k].pair, False))
        assert k - first >= GAP and first % 7 != 0
    always = Session(Plan(IDS, seed=0, repeats=1.0))
    assert [always.vote("anna", "tie").again for _ in range(GAP + 2)] == [False] * GAP + [True, True]


def test_a_repetition_is_not_asked_when_its_first_answer_is_undone():
    session = Session(Plan(IDS, seed=0, repeats=1.0))
    asked = [session.vote("anna", "left") for _ in range(GAP + 1)]
    assert asked[-1] == Asked(asked[0].pair, True)
    for _ in asked:
        session.undo("anna")
    assert not session.queue.may_answer("anna", asked[-1])
    assert session.vote("anna", SKIP) == asked[0]
    assert not session.queue.may_answer("anna", asked[-1])


def test_events_that_do_not_follow_each_other_are_refused():
    session = Session(Plan(IDS, seed=0))
    asked = session.vote("anna", "left")
    with pytest.raises(ValueError, match="twice"):
        session.vote("anna", "right", asked)
    with pytest.raises(ValueError, match="not the last answer"):
        session._add("anna", asked, "undo", None, None, None, 7)


def test_the_next_item_is_found_without_looking_at_every_pair():
    """Two raters answer 2000 of 50,000 pairs: places looked at, counted, stay proportional to the answers."""

    class Counted(list):
        looks = 0

        def __getitem__(self, k):
            Counted.looks += 1
            return super().__getitem__(k)

    session = Session(Plan([str(k) for k in range(50_000)], seed=0, repeats=0.05, overlap=0.2))
    session.plan.order = Counted(session.plan.order)
    for k in range(2000):
        session.vote("ab"[k % 2], "left")
        if k % 50 == 0:
            session.undo("ab"[k % 2])
    assert Counted.looks < 40 * 2000


# ---- the store


def test_events_come_back_as_they_were_stored(tmp_path):
    store = Store(tmp_path, "human", DESIGN)
    one = store.append(rater="Ünal 2", pair_id="p1", again=False, kind="vote", answer="left", swapped=True, seconds=1.25)
    two = store.append(rater="Ünal 2", pair_id="p1", again=False, kind="undo", undoes=1)
    assert (one.number, two.number, two.undoes) == (1, 2, 1) and one.time <= two.time and one.time.endswith("+00:00")
    assert store.events() == [one, two]
    session, secret = store.session, store.secret
    store.close()
    again = Store(tmp_path, "human", DESIGN)
    assert again.events() == [one, two] and (again.session, again.secret) == (session, secret)
    again.close()
    other = Store(tmp_path, "other", DESIGN)
    assert other.session != session and other.secret != secret and other.events() == []
    other.close()


def test_stored_events_cannot_be_changed_or_removed(tmp_path):
    store = Store(tmp_path, "human", DESIGN)
    store.append(rater="a", pair_id="p1", again=False, kind="vote", answer="left", swapped=True, seconds=1.0)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        store.append(rater="a", pair_id="p1", again=False, kind="vote", answer="up", swapped=True, seconds=1.0)
    with sqlite3.connect(store.path) as other:
        for text in ("DELETE FROM events", "UPDATE events SET answer = 'right'"):
            with pytest.raises(sqlite3.IntegrityError, match="only ever appended"):
                other.execute(text)
    other.close()
    assert [event.answer for event in store.events()] == ["left"]
    store.close()


def begin(folder, design):
    """A store with one vote."""
    store = Store(folder, "human", design)
    store.append(rater="a", pair_id="p1", again=False, kind="vote", answer="left", swapped=True, seconds=1.0)
    store.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0 (now 1)"),
        ({"order": "disagreement", "judges": {"clip": "aa"}}, "order random (now disagreement), judges none (now clip)"),
        ({"floor": 0.3, "repeats": 0.0, "overlap": 1.0}, "floor 0.2 (now 0.3), repeats 0.05 (now 0.0), overlap 0.2 (now 1.0)"),
        ({"dataset": "d1"}, "other pairs than the dataset holds now"),
    ],
)
def test_another_design_is_refused_by_name(tmp_path, change, words):
    Store(tmp_path, "human", DESIGN | change).close()  # without votes it may still change
    begin(tmp_path, DESIGN)
    with pytest.raises(UserError, match="give another --name") as refused:
        Store(tmp_path, "human", DESIGN | change)
    assert words in str(refused.value)
    Store(tmp_path, "human", DESIGN).close()  # the refusal let go of the file


def test_changed_judge_labels_are_told_from_another_judge(tmp_path):
    design = DESIGN | {"order": "disagreement", "judges": {"clip": "aa", "hps": "bb"}}
    begin(tmp_path, design)
    with pytest.raises(UserError, match=r"begun with labels/hps.parquet as it was then"):
        Store(tmp_path, "human", design | {"judges": {"clip": "aa", "hps": "cc"}})
    with pytest.raises(UserError, match=r"judges clip hps \(now clip\)"):
        Store(tmp_path, "human", design | {"judges": {"clip": "aa"}})


def test_a_store_is_open_once_and_must_be_a_store(tmp_path):
    store = Store(tmp_path, "human", DESIGN)
    with pytest.raises(UserError, match="open in another `dedpo vote`"):
        Store(tmp_path, "human", DESIGN)
    store.close()
    Store(tmp_path, "human", DESIGN).close()
    (tmp_path / "votes" / "text.sqlite").write_text("no database, but long enough to look like one\n" * 99)
    with pytest.raises(UserError, match="cannot be read as votes"):
        Store(tmp_path, "text", DESIGN)


# ---- the service


@pytest.fixture
def service(tmp_path):
    with PairWriter(tmp_path) as writer:
        for k, pair_id in enumerate(IDS):
            other = b"no image" if k == 4 else picture(2 * k + 1, format=KINDS.get(k, "PNG"))
            writer.add(Pair(pair_id, f"prompt of {pair_id}", picture(2 * k), other))
    store = Store(tmp_path, "human", DESIGN)
    yield VoteService(PairReader(tmp_path), Plan(IDS, seed=0, repeats=0.3, overlap=0.2), store)
    store.close()


def restarted(service):
    return VoteService(service.reader, service.plan, service.store)


def test_an_answer_sent_twice_is_stored_once_and_another_is_refused(service):
    item = service.state("anna")["item"]
    once = service.vote("anna", item["ticket"], "left", 1.0)
    for server in (service, restarted(service)):
        assert server.vote("anna", item["ticket"], "left", 2.0) == once
        with pytest.raises(Refusal, match="answered already, with left") as refused:
            server.vote("anna", item["ticket"], "tie", 1.0)
        assert refused.value.status == 409
    assert len(service.store.events()) == 1 and once["progress"]["answered"] == 1 and once["can_undo"]


def test_a_ticket_from_before_a_restart_still_counts(service):
    service = VoteService(service.reader, Plan(IDS, seed=0), service.store)
    states = {rater: service.state(rater) for rater in ("anna", "ben", "cleo")}
    for rater in reversed(states):  # nobody has voted, so the new server knows none of them, nor who saw what
        after = restarted(service).vote(rater, states[rater]["item"]["ticket"], "left", 1.0)
        assert after["progress"]["answered"] == 1
    assert [event.rater for event in service.store.events()] == ["cleo", "ben", "anna"]
    assert len({event.pair_id for event in service.store.events()}) == 3
    shown = service.state("anna")["item"]["ticket"]
    assert restarted(service).image(shown, "left") == service.image(shown, "left") != service.image(shown, "right")


def test_tickets_belong_to_their_rater_and_cannot_be_made_up(service):
    ticket = service.state("anna")["item"]["ticket"]
    for rater, text in (("ben", ticket), ("anna", "0" * 20), ("anna", ""), ("anna", "../" + ticket)):
        with pytest.raises(Refusal, match="unknown") as refused:
            service.vote(rater, text, "left", 1.0)
        assert refused.value.status == 404
    assert service.store.events() == []


def test_vote_undo_vote_keeps_the_second_answer(service):
    first = service.state("anna")["item"]
    service.vote("anna", first["ticket"], "left", 1.0)
    undone = service.undo("anna")
    assert undone["item"] == first and undone["undone"] and not undone["can_undo"] and undone["progress"]["answered"] == 0
    assert restarted(service).state("anna")["item"] == first
    assert service.undo("anna")["undone"] is False
    service.vote("anna", first["ticket"], "right", 1.0)
    assert [event.answer for event in service.snapshot()[0]] == ["right"] and service.snapshot()[1] == 1
    assert [event.kind for event in service.store.events()] == ["vote", "undo", "vote"]


def test_images_are_the_files_own_bytes_or_png_or_refused(service):
    for k in range(len(IDS)):
        ticket = service._ticket("anna", Asked(k, False))
        sides = ("right", "left") if service.plan.swapped("anna", k) else ("left", "right")
        assert service.image(ticket, sides[0]) == (picture(2 * k), "image/png")
        if k == 4:
            with pytest.raises(Refusal, match="row 4 image_1: the image cannot be decoded") as refused:
                service.image(ticket, sides[1])
            assert refused.value.status == 404
            continue
        data, kind = service.image(ticket, sides[1])
        if k == 3:
            assert kind == "image/png" and decode_image(data, "here").tobytes() == decode_image(picture(7), "here").tobytes()
        else:
            assert data == picture(2 * k + 1, format=KINDS.get(k, "PNG")) and kind == f"image/{KINDS.get(k, 'png').lower()}"
