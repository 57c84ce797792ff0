"""Names in Redis, one server of version 5 or later (not a cluster: its scripts touch several keys).

    mooncache/segments/<name>   hash: generation, record; expires with the lease
    mooncache/segments          set of all names, so that nobody has to scan a database that holds other things too
    mooncache/changes           channel: a name has another owner, or none

A script is atomic, so each operation is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mooncache import forks
from mooncache.discovery.base import Names, unreachable, where_of
from mooncache.discovery.record import RECORD_BYTES
from mooncache.errors import DiscoveryError

NAMES = "mooncache/segments"
CHANGES = "mooncache/changes"

LISTEN_S = 0.5
"""The time that the listener waits before it looks whether to end: what a close costs at most."""

# KEYS: the name's hash. ARGV: the name, its generation, then what each needs.
PUBLISH = f"""
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then redis.call('DEL', KEYS[1]) end
local holder = redis.call('HGET', KEYS[1], 'generation')
if holder and tonumber(holder) and holder ~= ARGV[2] and ARGV[5] == '' then return holder end
redis.call('HSET', KEYS[1], 'generation', ARGV[2], 'record', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', '{NAMES}', ARGV[1])
if holder ~= ARGV[2] then redis.call('PUBLISH', '{CHANGES}', ARGV[1]) end
return ARGV[2]
"""
REFRESH = """
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then return nil end
local holder = redis.call('HGET', KEYS[1], 'generation')
if holder and not tonumber(holder) then return nil end
if holder == ARGV[2] then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return holder
"""
REMOVE = f"""
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then return end
if redis.call('HGET', KEYS[1], 'generation') == ARGV[2] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', '{CHANGES}', ARGV[1])
end
"""
# KEYS: the set. What has expired leaves it here.
GENERATIONS = """
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local generation = redis.pcall('HGET', KEYS[1] .. '/' .. name, 'generation')
  if generation and type(generation) == 'table' then generation = '' end
  if generation then
    table.insert(found, name)
    table.insert(found, generation)
  else
    redis.call('SREM', KEYS[1], name)
  end
end
return found
"""


# ARGV: the name, the most bytes. Answers 0 for what is no record: of another type, without one, or too long.
FETCH = """
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return nil end
if kind ~= 'hash' then return 0 end
local length = redis.call('HSTRLEN', KEYS[1], 'record')
if length == 0 or length > tonumber(ARGV[2]) then return 0 end
return redis.call('HGET', KEYS[1], 'record')
"""


class Redis(Names):
    """The store of names in Redis, see `stores.open_names`."""

    def __init__(self, parts: SplitResult, lease: float, timeout: float) -> None:
        super().__init__(where_of(parts), lease)
        self._redis = redis.Redis.from_url(
            urlunsplit(parts), socket_timeout=timeout, socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the keeper comes back by itself, and a caller should hear of it soon
            redis_connect_func=_connected,
        )  # fmt: skip

    def _publish(self, name: str, generation: int, record: bytes, *, take: bool) -> int:
        return int(self._run(PUBLISH, name, generation, record, self._lease_ms, "take" if take else ""))

    def _refresh(self, name: str, generation: int) -> int | None:
        holder = self._run(REFRESH, name, generation, self._lease_ms)
        return None if holder is None else int(holder)

    def _remove(self, name: str, generation: int) -> None:
        self._run(REMOVE, name, generation)

    def _fetch(self, name: str) -> bytes | None:
        record = self._run(FETCH, name, RECORD_BYTES)
        if isinstance(record, int):
            raise DiscoveryError(f"what stands under {name!r} at {self.where} is no engine's record")
        return record  # type: ignore[no-any-return]

    def _generations(self) -> dict[str, int]:
        with self._asking():
            found: Any = self._redis.eval(GENERATIONS, 1, NAMES)
        return self._holders(zip(found[::2], found[1::2], strict=True))

    def _listen(self, heard: Callable[[], None]) -> None:
        with self._asking(), self._redis.pubsub() as channel:
            channel.subscribe(CHANGES)
            while not self._closing.is_set():
                if channel.get_message(timeout=LISTEN_S):  # the first says that the subscription holds
                    heard()

    def _disconnect(self) -> None:
        self._redis.close()

    @property
    def _lease_ms(self) -> int:
        return round(self.lease * 1000)

    def _run(self, script: str, name: str, *arguments: Any) -> Any:
        with self._asking():
            return self._redis.eval(script, 1, _key(name), name, *arguments)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise unreachable(self.where, error) from error


def _connected(connection: Any) -> None:
    forks.private(connection._sock)
    connection.on_connect()


def _key(name: str) -> str:
    return f"{NAMES}/{name}"
