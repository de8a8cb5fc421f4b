"""The key-value store by which several processes have met: words, no arrays, and no device."""

import contextlib
import sys
import time
from collections.abc import Callable

ERRORS = (RuntimeError,)  # JAX's, of a store that cannot be reached, or of a key that is late


class Store:
  """What JAX's coordination service keeps at process 0 for all.

  Attributes:
    rank, size: this process, and how many there are.
  """

  def __init__(self, client, rank: int, size: int):
    self._client, self.rank, self.size = client, rank, size

  def get(self, key: str) -> str | None:
    """The value, None if there is none yet."""
    try:
      return self._client.key_value_try_get(key)
    except ERRORS as error:
      if "NOT_FOUND" in str(error):
        return None
      raise

  def put_once(self, key: str, value: str) -> None:
    """Sets the value unless it is set."""
    try:
      self._client.key_value_set(key, value)
    except ERRORS as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def wait(self, key: str, seconds: float) -> str:
    """The value, as soon as there is one; one of ERRORS after so many seconds."""
    return self._client.blocking_key_value_get(key, int(1000 * seconds))

  def last_out(self, key: str, seconds: float) -> None:
    """Process 0 keeps the store: it waits for so long that the others have said they leave."""
    with contextlib.suppress(*ERRORS):
      if self.rank:
        self.put_once(f"{key}/{self.rank}", "")
        return
      until = time.monotonic() + seconds
      for rank in range(1, self.size):
        self.wait(f"{key}/{rank}", max(0.001, until - time.monotonic()))
      time.sleep(0.2)  # Their last call is answered, and they are gone.


def store() -> Store | None:
  """The store of this run; None if this process is alone."""
  # JAX does not show the client elsewhere.
  module = sys.modules.get("jax._src.distributed")
  state = module and module.global_state
  if not state or state.client is None or state.num_processes == 1:
    return None
  return Store(state.client, state.process_id, state.num_processes)


_told = 0  # Verdicts so far: processes count alike.


def from_main(decide: Callable[[], str], seconds: float) -> str:
  """What process 0's `decide()` says, told to all; nobody waits longer than so many seconds.

  A collective on the devices would do, too, but is not made for waiting. `decide` must not raise.
  """
  global _told
  _told += 1
  shared = store()
  if shared is None:
    return decide()
  key = f"umd/from_main/{_told}"
  if shared.rank == 0:
    shared.put_once(key, decide() or " ")  # No empty values: some versions take them for none.
  return shared.wait(key, seconds).strip()
