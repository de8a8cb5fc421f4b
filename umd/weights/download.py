"""Files of published weights: found on this machine or downloaded, and checked in either case."""

import hashlib
import http.client
import os
import secrets
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from umd.runs.progress import Tell, say

SCHEME = "hf:"


class Place(NamedTuple):
  """A folder of a repository: "ORG/REPO", "" or "SUB/FOLDER", "" or a branch, tag or commit."""

  repo: str
  subfolder: str
  revision: str


def parse(address: str) -> Place:
  """Reads "hf:ORG/REPO[/SUBFOLDER][@REVISION]".

  Raises:
    ValueError: it is written otherwise.
  """
  path, at, revision = address.removeprefix(SCHEME).partition("@")
  parts = path.split("/")
  if not address.startswith(SCHEME) or len(parts) < 2 or not all(parts) or (at and not revision):
    form = "hf:ORG/REPO[/SUBFOLDER][@REVISION]"
    raise ValueError(f"{address!r} is no address on the hub: write {form}.")
  return Place("/".join(parts[:2]), "/".join(parts[2:]), revision)


def fetch(address: str, files: Sequence[str]) -> str:
  """The folder of this machine that holds these files of a folder of the hub.

  What the cache holds is taken without a word to the hub, so that machines without a network run
  as others do; what it lacks is downloaded.

  Args:
    address: "hf:ORG/REPO[/SUBFOLDER][@REVISION]".
    files: names within that folder; all come from one revision.

  Raises:
    FileNotFoundError: the hub cannot be reached (known within `OPENING` seconds), refuses, or has
      no such files.
    ValueError: the address is malformed.
  """
  import huggingface_hub
  from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

  place = parse(address)
  where = {"subfolder": place.subfolder or None, "revision": place.revision or None}
  get = lambda file, **how: huggingface_hub.hf_hub_download(place.repo, file, **where, **how)
  try:
    return _folder(address, [get(file, local_files_only=True) for file in files])
  except LocalEntryNotFoundError:
    pass
  except HFValidationError as error:
    raise ValueError(f"{address!r} is no address on the hub: {error}") from None
  try:
    # Once, and not as long as the library would try.
    url = huggingface_hub.hf_hub_url(place.repo, files[0], **where)
    _within(OPENING, lambda: huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT))
    say(f"Downloading {address} to {huggingface_hub.constants.HF_HUB_CACHE}")
    paths = [get(file) for file in files]
  except Exception as error:  # Of the hub, the network, the disk: the library has many.
    raise FileNotFoundError(_explain(address, place, files, error)) from error
  return _folder(address, paths)


def _folder(address: str, paths: list[str]) -> str:
  folders = {os.path.dirname(path) for path in paths}
  if len(folders) > 1:
    raise FileNotFoundError(f"{address} changed while it was read: run this again.")
  return folders.pop()


def _within(seconds: float, function) -> None:
  """Calls a function; in a thread, for the system's resolver of names knows no timeout.

  Raises:
    TimeoutError: it takes longer.
    Exception: what it raises.
  """
  outcome = []

  def attempt():
    try:
      function()
      outcome.append(None)
    except Exception as error:  # Raised below, in the thread that asked.
      outcome.append(error)

  thread = threading.Thread(target=attempt, daemon=True)
  thread.start()
  thread.join(seconds)
  if not outcome:
    raise TimeoutError(f"no answer within {seconds:.0f} seconds")
  if outcome[0] is not None:
    raise outcome[0]


def _explain(address: str, place: Place, files: Sequence[str], error: Exception) -> str:
  """What went wrong, and what to do about it."""
  from huggingface_hub import constants, errors

  page = f"{constants.ENDPOINT}/{place.repo}"
  needed = " and ".join(files)
  local = f"Or put a folder with {needed} on this machine and give its path."
  log_in = "log in (`hf auth login`, or set HF_TOKEN)"
  if isinstance(error, errors.GatedRepoError):
    return (
      f"{address} is gated: accept its licence at {page} and {log_in} with that account. {local}"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      f"{address}: the hub shows no repository {place.repo!r}. Correct the name or, if it is "
      f"private, {log_in}. {local}"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return f"{address}: {page} has no revision {place.revision!r}. Correct it. {local}"
  if isinstance(error, errors.RemoteEntryNotFoundError):
    inside = f"the folder {place.subfolder!r}" if place.subfolder else "its top folder"
    return f"{address}: {page} lacks {needed} in {inside}. Give another folder or revision. {local}"
  reason = (str(error).splitlines() or [""])[0]
  return (
    f"Cannot download {address} ({type(error).__name__}: {reason}), and {constants.HF_HUB_CACHE} "
    f"does not hold it. Put a folder with {needed} on this machine and give its path; or run this "
    "once where the hub can be reached; or set HF_HOME to a folder whose cache holds it."
  )


TIMEOUT = 10.0  # Seconds without a byte before a connection counts as dead.
OPENING = 20.0  # Seconds for names, connections, redirects and headers together.
PROGRESS_EVERY = 2.0  # Seconds.
CHUNK = 1 << 17  # Bytes.


@dataclass(frozen=True)
class Remote:
  """A published file.

  Attributes:
    name: of the file in the cache.
    url: http or https.
    sha256: of its contents, in hexadecimal digits.
    size: in bytes.
  """

  name: str
  url: str
  sha256: str
  size: int


# Inception of 2015-12-05 as FID uses it (Heusel et al. 2017), converted from TensorFlow's graph by
# pytorch-fid; torch-fidelity publishes the same file.
INCEPTION = Remote(
  "pt_inception-2015-12-05-6726825d.pth",
  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
  "pt_inception-2015-12-05-6726825d.pth",
  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
  95628359,
)


def folder() -> str:
  """The folder of downloaded weights: $UMD_CACHE if set, else ~/.cache/umd.

  Raises:
    ValueError: $UMD_CACHE is an address, such as gs://bucket, and no folder of this machine.
  """
  chosen = os.environ.get("UMD_CACHE") or os.path.join("~", ".cache", "umd")
  if "://" in chosen:
    raise ValueError(f"UMD_CACHE={chosen!r} must be a folder of this machine.")
  return os.path.abspath(os.path.expanduser(chosen))


def find(remote: Remote, path: str = "", *, progress: Tell = say) -> str:
  """The path of a local copy whose contents are as published.

  That is `path` if given, else the file in `folder()`, downloaded to there if it is missing or
  damaged. A file appears there whole or not at all; any number of processes may do this at once.

  Args:
    remote: what to find.
    path: a local copy to be used instead of the cache.
    progress: is told what happens, and every few seconds how far a download is.

  Raises:
    FileNotFoundError: `path` does not exist, or the file could not be downloaded or stored.
    ValueError: `path`, or what the address served, has other contents than published.
  """
  if path:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
      raise FileNotFoundError(
        f"{path!r}: there is no such file. Give the path of {remote.name}, or give none and it is "
        f"taken from {folder()} or downloaded from {remote.url}."
      )
    if wrong := _difference(path, remote):
      raise ValueError(
        f"{path!r} is not {remote.name}: it {wrong}. Download it again from {remote.url}, or give "
        f"no path and it is taken from {folder()} or downloaded."
      )
    return path
  target, damaged = os.path.join(folder(), remote.name), ""
  if os.path.isfile(target):
    if not (wrong := _difference(target, remote)):
      return target
    damaged = f"{target} is there but damaged: it {wrong}. "
    progress(f"{damaged}Downloading it again.")
  try:
    _download(remote, target, progress)
  except (OSError, http.client.HTTPException) as error:  # Of the network or of the disk.
    kind, reason = FileNotFoundError, f"{type(error).__name__}: {error}"
  except ValueError as error:
    kind, reason = ValueError, str(error)
  else:
    return target
  raise kind(
    f"{damaged}Cannot download {remote.url} to {target} ({reason}). Put the file there by hand, "
    "or set UMD_CACHE to a folder that holds it, or give its path."
  )


def _difference(path: str, remote: Remote) -> str:
  """What distinguishes a file from the published one, "" if nothing does."""
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  size = os.path.getsize(path)
  return "" if digest == remote.sha256 else _mismatch(digest, size, remote)


def _mismatch(digest: str, size: int, remote: Remote) -> str:
  return f"has SHA-256 {digest} ({size} bytes), expected {remote.sha256} ({remote.size} bytes)"


def _download(remote: Remote, target: str, progress: Tell) -> None:
  """Streams the file to a name of its own beside `target` and renames it once it is checked.

  Raises:
    OSError, HTTPException: it could not be had or stored.
    ValueError: it is not what was published, or the address is not of http or https.
  """
  if urllib.parse.urlsplit(remote.url).scheme not in ("http", "https"):
    raise ValueError("the address must begin with http:// or https://")
  os.makedirs(os.path.dirname(target), exist_ok=True)
  partial = f"{target}.{secrets.token_hex(6)}.part"
  try:
    # Before the network: a folder that cannot be written costs no time.
    with open(partial, "xb") as file, _open(remote.url) as response:
      progress(f"Downloading {remote.url} to {target} ({remote.size / 1e6:.1f} MB)")
      digest, size = _copy(response, file, remote, progress)
    if size < remote.size:
      raise ConnectionError(f"the transfer ended after {size} of {remote.size} bytes")
    if digest != remote.sha256:
      raise ValueError(f"what the address serves {_mismatch(digest, size, remote)}")
    os.replace(partial, target)
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def _copy(response, file, remote: Remote, progress: Tell) -> tuple[str, int]:
  """(SHA-256, number of bytes) of a response that is written to a file."""
  offered = response.headers.get("Content-Length")
  if offered is not None and offered != str(remote.size):
    raise ValueError(f"the address serves {offered} bytes, expected {remote.size}")
  digest, size, start = hashlib.sha256(), 0, time.monotonic()
  reported = start
  while chunk := response.read(CHUNK):
    digest.update(chunk)
    file.write(chunk)
    size += len(chunk)
    if size > remote.size:
      raise ValueError(f"the address serves more than the expected {remote.size} bytes")
    now = time.monotonic()
    if now - reported >= PROGRESS_EVERY or size == remote.size:
      reported, rate = now, size / max(now - start, 1e-9) / 1e6
      progress(
        f"{remote.name}: {100 * size // remote.size} %, {size / 1e6:.1f} of "
        f"{remote.size / 1e6:.1f} MB, {rate:.1f} MB/s"
      )
  return digest.hexdigest(), size


def _open(url: str):
  """The response to a GET, within `OPENING` seconds.

  In a thread, for the system's resolver of names knows no timeout.
  """
  opener = urllib.request.OpenerDirector()
  for handler in (
    *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
    *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
    # No handlers of ftp, file and data: redirects lead to http and https alone.
    *(urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler),
  ):
    opener.add_handler(handler())
  outcome = []

  def attempt():
    try:
      outcome.append(opener.open(url, timeout=TIMEOUT))
    except Exception as error:  # Raised below, in the thread that asked.
      outcome.append(error)

  thread = threading.Thread(target=attempt, daemon=True)
  thread.start()
  thread.join(OPENING)
  if not outcome:
    raise TimeoutError(f"no answer within {OPENING:.0f} seconds")
  if isinstance(outcome[0], Exception):
    raise outcome[0]
  return outcome[0]
