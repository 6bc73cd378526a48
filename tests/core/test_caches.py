"""Folders of caches: listed with what they are of, in use while a process says so, removed whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dedpo_diffusion.core import caches
from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.pipelines import cache as stage


@pytest.fixture
def root(tmp_path):
    """Two caches, one not finished, and things that are none."""
    for name in ("aa", "bb"):
        (tmp_path / name).mkdir()
        caches.describe(tmp_path / name, {"pairs": f"/data/{name}", "model": "shapes"})
        (tmp_path / name / "data").write_bytes(bytes(2_000_000))
    (tmp_path / "aa" / "index.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    yield tmp_path
    caches.release()


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_list_says_name_size_data_set_model_and_state(root, capsys):
    os.utime(root / "bb" / "about.json", (0, 86400 * 365))
    assert stage.main(["--folder", str(root)]) == 0
    words = said(capsys)
    assert "4.0 MB in 2 caches" in words and "aa 2.0 MB last used 20" in words
    assert "bb 2.0 MB last used 1971-01-01 pairs /data/bb, model shapes, not finished" in words
    assert "other" not in words and "in use" not in words
    (root / "aa" / "about.json").unlink()
    assert stage.main(["--folder", str(root)]) == 0
    assert "made by an earlier version" in said(capsys)


def test_removing_frees_what_it_says_and_nothing_else(root, capsys):
    assert stage.main(["--folder", str(root), "--remove", "aa"]) == 0
    assert "removed aa: 2.0 MB" in said(capsys)
    assert not (root / "aa").exists() and (root / "bb").is_dir() and (root / "other").is_dir()
    assert stage.main(["--folder", str(root), "--remove_all", "true"]) == 0
    assert [path.name for path in sorted(root.iterdir()) if not path.name.startswith(".")] == ["file", "other"]
    assert stage.main(["--folder", str(root)]) == 0
    assert "no caches" in said(capsys)


@pytest.mark.parametrize(
    ("more", "words"), [(["--remove", "cc"], "no cache 'cc'"), (["--remove", "aa", "--remove_all", "true"], "not both")]
)
def test_mistakes_remove_nothing(root, capsys, more, words):
    assert stage.main(["--folder", str(root), *more]) == 2
    assert words in said(capsys)
    assert (root / "aa").is_dir() and (root / "bb").is_dir()


HOLD = """
import sys
from pathlib import Path
from dedpo_diffusion.core import caches
caches.take_up(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_what_a_process_uses_stays_until_it_ends_even_by_a_kill(root, capsys):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root / "aa")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert stage.main(["--folder", str(root), "--remove_all", "true"]) == 2
        words = said(capsys)
        assert "removed bb" in words and "aa is in use by a run; remove it when that has ended" in words
        assert (root / "aa" / "data").is_file() and not (root / "bb").exists()
        assert stage.main(["--folder", str(root)]) == 0
        assert "in use" in said(capsys)
    finally:
        process.kill()
        process.communicate()
    assert not caches.in_use(root / "aa")
    assert stage.main(["--folder", str(root), "--remove_all", "true"]) == 0


def test_two_users_of_one_cache_both_count_and_release_ends_ones_own(root):
    caches.take_up(root / "aa")
    caches.take_up(root / "aa")
    assert caches.in_use(root / "aa") and not caches.in_use(root / "bb")
    with pytest.raises(UserError, match="in use"):
        caches.remove(root / "aa")
    with caches.released():
        pass
    assert caches.remove(root / "aa") > 2_000_000


def test_a_use_is_noted(root):
    os.utime(root / "aa" / "about.json", (0, 0))
    os.utime(root / "aa" / "index.json", (0, 0))
    caches.take_up(root / "aa")
    assert caches.list_caches(root)[0].used > 1e9


def test_the_users_folder(monkeypatch):
    monkeypatch.delenv("DEDPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert caches.user_root() == Path("/somewhere/dedpo_diffusion")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caches.user_root() == Path.home() / ".cache" / "dedpo_diffusion"
    monkeypatch.setenv("DEDPO_CACHE", "/here")
    assert caches.user_root() == Path("/here")
