"""Voting over real HTTP: the command in a process of its own, and a client that sends what the page sends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx

from conftest import picture
from dedpo_diffusion.pairs import PairWriter
from dedpo_diffusion.records import Pair

PAIRS = 40


def make_pairs(folder, count=PAIRS, size=(8, 8)):
    """Pairs that a client can tell by their prompts."""
    with PairWriter(folder) as writer:
        for k in range(count):
            writer.add(Pair(f"p{k}", f"prompt of p{k}", picture(2 * k, size), picture(2 * k + 1, size)))
    return folder


@contextmanager
def command(folder, *options):
    """The real command on a free port; yields the process, with the address it printed as `url`. Killed at the end if need be."""
    line = [sys.executable, "-m", "dedpo_diffusion.pipelines.vote", str(folder), "--port", "0", *options]
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
