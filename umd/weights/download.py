"""Files of published weights: found on this machine or downloaded, and checked in either case."""

import hashlib
import http.client
import os
import secrets
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from umd.runs.progress import Tell, say

SCHEME = "hf:"
TIMEOUT = 10.0  # Seconds without a byte before a connection counts as dead.
PROGRESS_EVERY = 2.0  # Seconds.
CHUNK = 1 << 17  # Bytes.


class HubFile(NamedTuple):
  """A folder of a repository of the Hugging Face hub.

  Attributes:
    repo: "ORG/REPO".
    subfolder: "SUB/FOLDER", or "".
    revision: a branch, tag or commit, or "".
  """

  repo: str
  subfolder: str
  revision: str


def parse(address: str) -> HubFile:
  """Reads "hf:ORG/REPO[/SUBFOLDER][@REVISION]".

  Raises:
    ValueError: it is written otherwise.
  """
  path, at, revision = address.removeprefix(SCHEME).partition("@")
  parts = path.split("/")
  if not address.startswith(SCHEME) or len(parts) < 2 or not all(parts) or (at and not revision):
    form = "hf:ORG/REPO[/SUBFOLDER][@REVISION]"
    raise ValueError(f"{address!r} is no address on the hub: write {form}.")
  return HubFile("/".join(parts[:2]), "/".join(parts[2:]), revision)


def fetch(address: str, files: Sequence[str]) -> str:
  """Returns the folder of this machine that holds these files of a folder of the hub.

  What the cache holds is taken without asking the hub, so that machines without a network run as
  others do; what it lacks is downloaded.

  Args:
    address: "hf:ORG/REPO[/SUBFOLDER][@REVISION]".
    files: names within that folder; all come from one revision.

  Raises:
    FileNotFoundError: the hub cannot be reached, refuses, or has no such files.
    ValueError: the address is malformed.
  """
  import huggingface_hub
  from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

  place = parse(address)
  where = {"subfolder": place.subfolder or None, "revision": place.revision or None}
  get = lambda file, **options: huggingface_hub.hf_hub_download(
    place.repo, file, **where, **options
  )
  try:
    return _common_folder(address, [get(file, local_files_only=True) for file in files])
  except LocalEntryNotFoundError:
    pass
  except HFValidationError as error:
    raise ValueError(f"{address!r} is no address on the hub: {error}") from None
  try:
    # This asks once, where the download itself would try again for a long time.
    url = huggingface_hub.hf_hub_url(place.repo, files[0], **where)
    huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
    say(f"Downloading {address} to {huggingface_hub.constants.HF_HUB_CACHE}")
    paths = [get(file) for file in files]
  except Exception as error:  # Of the hub, the network, the disk: the library has many.
    raise FileNotFoundError(_explain(address, place, files, error)) from error
  return _common_folder(address, paths)


def _common_folder(address: str, paths: list[str]) -> str:
  folders = {os.path.dirname(path) for path in paths}
  if len(folders) > 1:
    raise FileNotFoundError(f"{address} changed while it was read: run this again.")
  return folders.pop()


def _explain(address: str, place: HubFile, files: Sequence[str], error: Exception) -> str:
  """Returns what went wrong, and what to do about it."""
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


@dataclass(frozen=True)
class Remote:
  """A published file.

  Attributes:
    name: of the file in the cache.
    url: where it is.
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
  """Returns the folder of downloaded weights: $UMD_CACHE if set, else ~/.cache/umd.

  Raises:
    ValueError: $UMD_CACHE is an address, such as gs://bucket, and no folder of this machine.
  """
  chosen = os.environ.get("UMD_CACHE") or os.path.join("~", ".cache", "umd")
  if "://" in chosen:
    raise ValueError(f"UMD_CACHE={chosen!r} must be a folder of this machine.")
  return os.path.abspath(os.path.expanduser(chosen))


def find(remote: Remote, path: str = "", *, progress: Tell = say) -> str:
  """Returns the path of a local copy whose contents are as published.

  That is `path` if given, else the file in `folder()`, downloaded to there if it is missing or
  damaged. A file appears there whole or not at all; any number of processes may do this at once.

  Args:
    remote: what to find.
    path: a local copy to be used instead of the cache.
    progress: prints what happens, and every few seconds how far a download is.

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
  target = os.path.join(folder(), remote.name)
  damaged = ""
  if os.path.isfile(target):
    if not (wrong := _difference(target, remote)):
      return target
    damaged = f"{target} is there but damaged: it {wrong}. "
    progress(f"{damaged}Downloading it again.")
  try:
    _download(remote, target, progress)
  except (OSError, http.client.HTTPException, ValueError) as error:
    kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
    raise kind(
      f"{damaged}Cannot download {remote.url} to {target} ({type(error).__name__}: {error}). Put "
      "the file there by hand, or set UMD_CACHE to a folder that holds it, or give its path."
    ) from error
  return target


def _difference(path: str, remote: Remote) -> str:
  """Returns what distinguishes a file from the published one, "" if nothing does."""
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if digest == remote.sha256:
    return ""
  size = os.path.getsize(path)
  return f"has SHA-256 {digest} ({size} bytes), expected {remote.sha256} ({remote.size} bytes)"


def _download(remote: Remote, target: str, progress: Tell) -> None:
  """Streams the file to a name of its own beside `target` and renames it once it is checked.

  Raises:
    OSError, HTTPException: it could not be had or stored.
    ValueError: it is not what was published.
  """
  os.makedirs(os.path.dirname(target), exist_ok=True)
  opener = urllib.request.build_opener()  # With the proxies of the environment.
  partial = f"{target}.{secrets.token_hex(6)}.part"
  try:
    # The file is opened first: a folder that cannot be written costs no time.
    with open(partial, "xb") as file, opener.open(remote.url, timeout=TIMEOUT) as reply:
      progress(f"Downloading {remote.url} to {target} ({remote.size / 1e6:.1f} MB)")
      size = _copy(reply, file, remote, progress)
    if size < remote.size:
      raise ConnectionError(f"the transfer ended after {size} of {remote.size} bytes")
    if wrong := _difference(partial, remote):
      raise ValueError(f"what the address serves {wrong}")
    os.replace(partial, target)
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def _copy(reply, file, remote: Remote, progress: Tell) -> int:
  """Writes a response to a file; returns its number of bytes, which is never above the expected."""
  size = 0
  start = reported = time.monotonic()
  while chunk := reply.read(CHUNK):
    file.write(chunk)
    size += len(chunk)
    if size > remote.size:
      raise ValueError(f"the address serves more than the expected {remote.size} bytes")
    now = time.monotonic()
    if now - reported >= PROGRESS_EVERY or size == remote.size:
      reported = now
      rate = size / max(now - start, 1e-9) / 1e6
      progress(
        f"{remote.name}: {100 * size // remote.size} %, {size / 1e6:.1f} of "
        f"{remote.size / 1e6:.1f} MB, {rate:.1f} MB/s"
      )
  return size
