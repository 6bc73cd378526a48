"""Voting over real HTTP: the command in a process of its own, and a client that sends what the page sends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dedpo_diffusion.core.records import Pair
from dedpo_diffusion.evaluation.comparison.model_votes import open_samples
from dedpo_diffusion.pairs.dataset import PairWriter
from dedpo_diffusion.pipelines.vote import allowed_hosts, listen
from dedpo_diffusion.voting.opening import open_pairs
from dedpo_diffusion.voting.server import create_app
from support.pictures import picture

PAIRS = 40


def make_pairs(folder, count=PAIRS, size=(8, 8)):
    """Pairs that a client can tell by their prompts."""
    with PairWriter(folder) as writer:
        for k in range(count):
            writer.add(Pair(f"p{k}", f"prompt of p{k}", picture(2 * k, size), picture(2 * k + 1, size)))
    return folder


def make_samples(folder, *, prompts=12, each=2, size=(8, 8), same=(), kind="PNG"):
    """A sample folder as `dedpo sample` leaves it, its name in every image's metadata; rows in an order that hangs on the name.

    Pictures hang on the folder's name too, but for those numbered in `same`, which are alike in every folder.
    """
    folder.mkdir(parents=True)
    rows = []
    for number in range(prompts * each):
        pixels = np.random.default_rng([number, 0 if number in same else sum(folder.name.encode())]).integers(0, 256, (*size, 3))
        row = {"file": f"{number:03d}-{folder.name}.{kind.lower()}", "prompt": f"prompt {number // each}", "prompt_index": number // each}
        text = PngInfo()
        text.add_itxt("model", folder.name)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / row["file"], kind, pnginfo=text, icc_profile=folder.name.encode())
        rows.append({**row, "seed": 100 + number})
    order = np.random.default_rng(len(folder.name)).permutation(len(rows))
    pq.write_table(pa.Table.from_pylist([rows[k] for k in order]), folder / "index.parquet")
    return folder


@contextmanager
def command(folder, *options):
    """The real command on a free port; yields the process, with the address it printed as `url`. Killed at the end if need be.

    `folder` is a pair dataset, or a list of two sample folders.
    """
    folders = map(str, folder if isinstance(folder, list) else [folder])
    line = [sys.executable, "-m", "dedpo_diffusion.pipelines.vote", *folders, "--port", "0", *options]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.first = process.stdout.readline()
        if not process.first.startswith("open "):
            raise AssertionError(process.first + process.communicate()[1])
        process.url = process.first.split()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def in_process(settings):
    """The application under uvicorn in a thread; yields the service and the address."""
    opened = open_pairs if len(settings.folders) == 1 else open_samples
    with opened(settings) as voting, listen(settings) as listener:
        log = voting.service.store.path.with_suffix(".log")
        app = create_app(voting.service, voting.hooks, hosts=allowed_hosts(settings), token=None, log=log)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield voting.service, f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def finish(process, number=signal.SIGTERM):
    """Stop the command as a person or a service manager does; its exit code and what it printed."""
    process.send_signal(number)
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(20), process.first + out, err


def client_of(url):
    """A client that sends what the page's browser sends."""
    base = url.partition("?")[0].rstrip("/")
    return httpx.Client(base_url=base, headers={"Origin": base}, timeout=30, verify=False)  # no certificates to load: it is not https


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def connect(url):
    host, port = re.fullmatch(r"http://(.+):(\d+)/.*", url).groups()
    return socket.create_connection((host, int(port)), timeout=20)


def make_ranked(folder, prompts=4, images=4, size=(8, 8), *, keep=lambda prompt, a, b: True):
    """All pairs of so many images to each prompt, as `dedpo propose --pairing all` leaves them, but for those not kept."""
    with PairWriter(folder) as writer:
        for p in range(prompts):
            held = [picture(100 * p + k, size) for k in range(images)]
            for a in range(images):
                for b in range(a + 1, images):
                    if keep(p, a, b):
                        writer.add(Pair(f"p{p}-{a}{b}", f"prompt {p}", held[a], held[b]))
    return folder


def image_numbers(prompts=4, images=4, size=(8, 8)):
    """Which image a file is: (prompt, number) by its bytes."""
    return {picture(100 * p + k, size): (p, k) for p in range(prompts) for k in range(images)}
