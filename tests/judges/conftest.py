"""The servers that stand in for OpenAI's protocol, one for each test."""

from __future__ import annotations

import pytest

from support.servers import Model, TextModel, serve


@pytest.fixture
def server():
    with serve(Model()) as running:
        yield running


@pytest.fixture
def text_server():
    with serve(TextModel()) as running:
        yield running
