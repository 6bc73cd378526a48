"""A pair dataset with answers of every kind, the answers that a tool's users add, and Argilla's client without a server."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from dedpo_diffusion.core.records import Pair, Votes
from dedpo_diffusion.labels.files import aggregate, read_labels, read_votes, vote_names, write_labels, write_votes
from dedpo_diffusion.pairs.dataset import PairReader, PairWriter
from dedpo_diffusion.pipelines import main
from support.pictures import picture

VOTES = [  # pair, label_0, votes, rater
    (0, 1.0, 1, "ann@example.org"),
    (0, 0.0, 1, "bob"),
    (1, 0.5, 1, "ann@example.org"),
    (2, 0.0, 3, None),
    (2, 1.0, 2, None),
    (3, 0.25, 1, None),
    (4, 0.0, 1, "bob"),
]
CHOSEN = {0: "left", 1: "right", 2: "tie", 3: "skip", 4: "left", 5: "right", 6: "tie", 7: "left"}
WINS = {"left": 1.0, "tie": 0.5, "right": 0.0}


def make_pairs(folder: Path, count: int = 8, *, answers: bool = True) -> Path:
    """Pairs whose ids and prompts need quoting, with VOTES."""
    with PairWriter(folder) as writer:
        for k in range(count):
            prompt = f'a "large" circle, {k}\nälter; <b>' if k % 2 else f"plain {k}"
            writer.add(Pair(f"own-{k} ü", prompt, picture(2 * k), picture(2 * k + 1), {"model": f"m{k % 2}", "seed": k, "share": k / 4}))
    if answers:
        ids = [f"own-{k} ü" for k, *_ in VOTES]
        votes = Votes(ids, np.array([v[1] for v in VOTES]), np.array([v[2] for v in VOTES]), [v[3] for v in VOTES])
        write_votes(folder, "human", votes)
        write_labels(folder, "human", aggregate(votes))
    return folder


def state(folder: Path) -> dict[str, Any]:
    """Every pair by its id: prompt, both images, and what people said, sorted."""
    said: dict[str, list[tuple]] = {}
    if "human" in vote_names(folder):
        votes = read_votes(folder, "human")
        for pair_id, label, number, rater in zip(votes.pair_id, votes.label_0.tolist(), votes.votes.tolist(), votes.rater, strict=True):
            said.setdefault(pair_id, []).append((label, number, rater or ""))
    return {p.pair_id: (p.prompt, p.image_0, p.image_1, sorted(said.get(p.pair_id, []))) for p in PairReader(folder).iter_pairs()}


def labels(folder: Path) -> dict[str, float]:
    found = read_labels(folder, "human")
    return dict(zip(found.pair_id, found.label_0.tolist(), strict=True))


def export(pairs: Path, to: str, out: Path, *options: str) -> Path:
    assert main(["pairs", "export", str(pairs), "--to", to, "--out", str(out), *options]) == 0
    return out


def ingest(source: Path, out: Path, *options: str, format: str = "auto") -> dict[str, int]:
    """Ingest and return the counts."""
    assert main(["ingest", format, str(source), "--out", str(out), *options]) == 0
    return json.loads((out / "ingest.json").read_text(encoding="utf-8"))["counts"]


def noted(counts: dict[str, int]) -> dict[str, int]:
    return {name.removeprefix("noted: "): number for name, number in counts.items() if name.startswith("noted: ")}


def with_answers(before: dict[str, Any], left_is: dict[str, str], people: tuple[str, ...]) -> dict[str, Any]:
    """What a dataset must hold when `people` have each chosen as CHOSEN says."""
    after = {}
    for k, (pair_id, (prompt, image_0, image_1, said)) in enumerate(before.items()):
        wins = WINS.get(CHOSEN[k])
        label = None if wins is None else wins if left_is[pair_id] == "image_0" else 1 - wins
        after[pair_id] = (prompt, image_0, image_1, sorted([*said, *((label, 1, who) for who in people if label is not None)]))
    return after


def label_studio_task(number: int, task: dict[str, Any], people: tuple[Any, ...], choice: str) -> dict[str, Any]:
    """A task as Label Studio exports it, annotated alike by everybody; what the documentation of its JSON shows."""
    annotations = [
        {
            "id": 1000 * (number + 1) + k,
            "completed_by": who,
            "result": [
                {
                    "value": {"choices": [choice]},
                    "id": "Dx_aB91ISN",
                    "from_name": "choice",
                    "to_name": "prompt",
                    "type": "choices",
                    "origin": "manual",
                }
            ],
            "was_cancelled": False,
            "ground_truth": False,
            "created_at": "2026-03-09T22:16:08.728353Z",
            "updated_at": "2026-03-09T22:16:08.728378Z",
            "draft_created_at": None,
            "lead_time": 4.288,
            "prediction": {},
            "result_count": 1,
            "task": number + 1,
        }
        for k, who in enumerate(people)
    ]
    return {
        "id": number + 1,
        "annotations": annotations,
        "file_upload": "c0ffee00-tasks.json",
        "drafts": [],
        "predictions": [],
        "data": task["data"],
        "meta": {},
        "created_at": "2026-03-09T21:52:49.513742Z",
        "updated_at": "2026-03-09T22:16:08.746926Z",
        "inner_id": number + 1,
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "total_predictions": 0,
        "project": 83,
        "updated_by": 10,
    }


class _Me(BaseHTTPRequestHandler):
    """The one thing that Argilla's client asks before it reads and writes files: who am I?"""

    def do_GET(self) -> None:
        user = {"id": "00000000-0000-0000-0000-000000000001", "username": "owner", "role": "owner", "first_name": "o", "last_name": None}
        body = json.dumps(user | {"inserted_at": "2026-01-01T00:00:00", "updated_at": "2026-01-01T00:00:00"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def argilla_client(argilla: Any):
    """The real client, logged in to a server that knows its user and no more."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Me)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield argilla.Argilla(api_url=f"http://127.0.0.1:{server.server_port}", api_key="key")
    finally:
        server.shutdown()
        server.server_close()
