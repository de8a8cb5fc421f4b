"""Weights from a server on this machine: whole, broken, absent, slow; and from the cache."""

import hashlib
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from umd.weights import download
from umd.weights.download import INCEPTION, Remote, find

CONTENTS = np.random.default_rng(0).bytes(700_001)
DIGEST = hashlib.sha256(CONTENTS).hexdigest()
WRONG = b"x" * len(CONTENTS)


class Server(ThreadingHTTPServer):
  """Serves `answer(handler)`, counts requests, and may hold answers back until told."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.requests, self.answer, self.open = 0, whole, threading.Event()
    self.open.set()

  def remote(self, **changes):
    fields = dict(name="w.pth", url=f"http://127.0.0.1:{self.server_port}/w.pth")
    return Remote(**fields | dict(sha256=DIGEST, size=len(CONTENTS)) | changes)


class Handler(BaseHTTPRequestHandler):
  def do_GET(self):
    self.server.requests += 1
    self.server.open.wait(10)
    self.server.answer(self)

  def log_message(self, *args):
    pass


def send(handler, body, length=None):
  handler.send_response(200)
  if length is not None:
    handler.send_header("Content-Length", str(length))
  handler.end_headers()
  handler.wfile.write(body)


def whole(handler):
  send(handler, CONTENTS, len(CONTENTS))


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("no_proxy", "*")
  running = Server()
  thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
  thread.start()
  yield running
  running.open.set()
  running.shutdown()
  running.server_close()
  thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The cache's folder, not made yet."""
  monkeypatch.setenv("UMD_CACHE", str(tmp_path / "deep" / "cache"))
  return tmp_path / "deep" / "cache"


def remedies(remote, target):
  """A pattern of what every message about a download names, in any order."""
  parts = [remote.url, str(target), "by hand", "UMD_CACHE", "give its path"]
  return "".join(f"(?=.*{re.escape(part)})" for part in parts)


def test_a_file_is_downloaded_once_and_is_whole(server, cache):
  lines, remote = [], server.remote()
  for _ in range(2):
    path = find(remote, progress=lines.append)
    assert path == str(cache / "w.pth")
    assert Path(path).read_bytes() == CONTENTS
  assert server.requests == 1
  assert [p.name for p in cache.iterdir()] == ["w.pth"]
  assert remote.url in lines[0] and "0.7 MB" in lines[0]
  assert re.fullmatch(r"w\.pth: 100 %, 0\.7 of 0\.7 MB, [0-9.]+ MB/s", lines[-1])


def test_a_cached_file_needs_no_network(cache):
  cache.mkdir(parents=True)
  (cache / "w.pth").write_bytes(CONTENTS)
  lines = []
  remote = Remote("w.pth", "http://127.0.0.1:9/w.pth", DIGEST, len(CONTENTS))
  assert find(remote, progress=lines.append) == str(cache / "w.pth")
  assert lines == []


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("UMD_CACHE", raising=False)
  assert download.folder() == f"{tmp_path}/.cache/umd"
  monkeypatch.setenv("UMD_CACHE", "")
  assert download.folder() == f"{tmp_path}/.cache/umd"
  monkeypatch.setenv("UMD_CACHE", "~/there")
  assert download.folder() == f"{tmp_path}/there"
  monkeypatch.setenv("UMD_CACHE", "gs://bucket/there")
  with pytest.raises(ValueError, match="UMD_CACHE='gs://bucket/there' must be a folder"):
    download.folder()


def broken_off(handler):
  send(handler, CONTENTS[:1000], len(CONTENTS))


def silent_end(handler):
  send(handler, CONTENTS[:1000])


UNREACHABLE = {
  "404": (lambda h: h.send_error(404), "HTTP Error 404"),
  "truncated": (broken_off, "ended after 1000 of 700001 bytes|IncompleteRead"),
  "truncated, of unknown length": (silent_end, "ended after 1000 of 700001 bytes"),
  "hung up": (lambda h: h.connection.shutdown(socket.SHUT_RDWR), "RemoteDisconnected|reset"),
}


@pytest.mark.parametrize("answer, reason", UNREACHABLE.values(), ids=UNREACHABLE)
def test_what_cannot_be_had_is_one_error_with_remedies(server, cache, answer, reason):
  server.answer, remote = answer, server.remote()
  with pytest.raises(FileNotFoundError, match=remedies(remote, cache / "w.pth")) as error:
    find(remote, progress=lambda line: None)
  assert re.search(reason, str(error.value))
  assert list(cache.iterdir()) == []


UNLIKE = {
  "contents": (lambda h: send(h, WRONG, len(WRONG)), "SHA-256 [0-9a-f]{64}.*expected " + DIGEST),
  "endless": (lambda h: send(h, CONTENTS + b"x"), "more than the expected 700001"),
}


@pytest.mark.parametrize("answer, reason", UNLIKE.values(), ids=UNLIKE)
def test_what_is_not_as_published_is_one_error_with_remedies(server, cache, answer, reason):
  server.answer, remote = answer, server.remote()
  with pytest.raises(ValueError, match=remedies(remote, cache / "w.pth")) as error:
    find(remote, progress=lambda line: None)
  assert re.search(reason, str(error.value))
  assert list(cache.iterdir()) == []


def test_no_connection_is_an_error_at_once(cache, monkeypatch):
  monkeypatch.setenv("no_proxy", "*")
  with socket.socket() as unused:  # Bound but not listening: nobody else gets the port.
    unused.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{unused.getsockname()[1]}/w.pth"
    remote = Remote("w.pth", url, DIGEST, len(CONTENTS))
    with pytest.raises(FileNotFoundError, match=remedies(remote, cache / "w.pth")) as error:
      find(remote, progress=lambda line: None)
  assert "refused" in str(error.value)


def test_a_server_that_does_not_answer_is_given_up(server, cache, monkeypatch):
  monkeypatch.setattr(download, "TIMEOUT", 0.2)
  server.open.clear()
  with pytest.raises(FileNotFoundError, match=r"TimeoutError|timed out"):
    find(server.remote(), progress=lambda line: None)
  assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_reported_and_replaced(server, cache):
  cache.mkdir(parents=True)
  (cache / "w.pth").write_bytes(CONTENTS[:1000])
  lines = []
  assert Path(find(server.remote(), progress=lines.append)).read_bytes() == CONTENTS
  assert re.search(r"damaged: it has SHA-256 .* \(1000 bytes\), expected.*again", lines[0])
  (cache / "w.pth").write_bytes(WRONG)
  server.answer = UNREACHABLE["404"][0]
  with pytest.raises(FileNotFoundError, match=r"damaged: it has SHA-256.*404"):
    find(server.remote(), progress=lines.append)
  # What is there is left to whoever wants to look at it.
  assert (cache / "w.pth").read_bytes() == WRONG


def test_a_path_is_used_if_it_is_the_file(server, cache, tmp_path, monkeypatch):
  (tmp_path / "mine.pth").write_bytes(CONTENTS)
  remote = server.remote()
  assert find(remote, str(tmp_path / "mine.pth")) == str(tmp_path / "mine.pth")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert find(remote, "~/mine.pth") == str(tmp_path / "mine.pth")
  (tmp_path / "mine.pth").write_bytes(WRONG)
  found = hashlib.sha256(WRONG).hexdigest()
  with pytest.raises(ValueError, match=rf"mine\.pth' is not w\.pth.*{found}.*{DIGEST}.*http"):
    find(remote, str(tmp_path / "mine.pth"))
  with pytest.raises(FileNotFoundError, match=r"no\.pth': there is no such file.*http"):
    find(remote, str(tmp_path / "no.pth"))
  assert server.requests == 0 and not cache.exists()


def test_two_downloads_at_once_do_not_meet(server, cache):
  server.open.clear()
  found, lines = [], []
  ask = lambda: found.append(find(server.remote(), progress=lines.append))
  threads = [threading.Thread(target=ask) for _ in range(2)]
  for thread in threads:
    thread.start()
  while server.requests < 2:
    threads[0].join(0.01)
  assert len(list(cache.iterdir())) == 2  # Each writes a file of its own.
  server.open.set()
  for thread in threads:
    thread.join()
  assert found == [str(cache / "w.pth")] * 2
  assert [p.name for p in cache.iterdir()] == ["w.pth"]
  assert (cache / "w.pth").read_bytes() == CONTENTS


def test_until_a_download_is_whole_there_is_no_file_of_that_name(server, cache, monkeypatch):
  """As a killed process would leave it."""
  monkeypatch.setattr(download, "PROGRESS_EVERY", 0)
  seen = []
  look = lambda line: seen.append([(p.name, p.stat().st_ino) for p in cache.iterdir()])
  path = find(server.remote(), progress=look)
  assert len(seen) > 3
  assert all(len(files) == 1 and files[0][0].endswith(".part") for files in seen)
  assert seen[-1][0][1] == os.stat(path).st_ino  # Renamed, for a copy could be half done.


def test_a_folder_that_cannot_be_made_is_an_error_before_the_network(server, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("UMD_CACHE", str(tmp_path / "file" / "cache"))
  with pytest.raises(FileNotFoundError, match=remedies(server.remote(), tmp_path / "file/cache")):
    find(server.remote(), progress=lambda line: None)
  assert server.requests == 0


def test_downloads_go_through_the_proxy_of_the_environment(server, cache, monkeypatch):
  monkeypatch.delenv("no_proxy")
  monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
  asked = []
  server.answer = lambda handler: (asked.append(handler.path), whole(handler))
  remote = server.remote(url="http://weights.invalid/w.pth")
  assert Path(find(remote, progress=lambda line: None)).read_bytes() == CONTENTS
  assert asked == [remote.url]


def test_inceptions_name_tells_its_checksum():
  """PyTorch's convention: the last part of the name is the first eight digits."""
  assert INCEPTION.url.endswith("/" + INCEPTION.name)
  assert re.fullmatch(r"[0-9a-f]{64}", INCEPTION.sha256)
  assert INCEPTION.name.endswith(f"-{INCEPTION.sha256[:8]}.pth")
