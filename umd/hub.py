"""Files of the Hugging Face hub, by its own library: its cache, its tokens, its $HF_HOME."""

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from umd.progress import say

SCHEME = "hf:"
TIMEOUT = 10.0  # Seconds without a byte before a connection counts as dead.
OPENING = 15.0  # Seconds for names, connections, redirects and headers together.


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
