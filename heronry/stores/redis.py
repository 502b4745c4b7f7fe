"""States in Redis, for servers on several machines.

- bytes lie in pieces under a name that is drawn, and come before the entry that names them; pieces that no entry names,
  for their server was killed, expire
- entries, order of use and sums change together, in scripts that Redis runs as a whole; a full Redis (`allow-oom`) can
  still be read and emptied
- one clock counts: that of Redis
- Redis should keep what it is given (`maxmemory-policy noeviction`); how much that is, the store decides
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import InputError
from .store import MAX_ABOUT_BYTES, Entry, Key, Outage, StateStore

PIECE = 256 << 20  # bytes; Redis takes 512 MB at a time
UNNAMED = 600  # seconds that pieces without an entry stay
TIMEOUT = 5  # seconds for an answer
PAUSE = 2  # seconds after a failure without another try

# Of an entry `id`: the hash entry:id. Its last use, in microseconds or one more than the largest, is its score in
# `known`, in of:kind/tenant, and in `data` and `about` where it has these.
FUNCTIONS = """
local function number(x) return string.format('%.0f', x) end
local function now()
    local t = redis.call('TIME')
    return t[1] * 1000000 + t[2]
end
local function owner(id) return P..'of:'..string.match(id, '^(.*)/') end
local function touch(id)
    local last = redis.call('ZREVRANGE', P..'known', 0, 0, 'WITHSCORES')[2] or '0'
    local used = number(math.max(now(), last + 1))
    for _, set in ipairs({P..'known', P..'data', P..'about', owner(id)}) do
        redis.call('ZADD', set, 'XX', used, id)
    end
end
local function forget_data(id)
    local e = P..'entry:'..id
    local x = redis.call('HMGET', e, 'blob', 'pieces', 'size')
    redis.call('ZREM', P..'data', id)
    if x[1] and x[1] ~= '' then
        for i = 0, x[2] - 1 do redis.call('UNLINK', P..'blob:'..x[1]..':'..i) end
        redis.call('DECRBY', P..'bytes', x[3])
        redis.call('HSET', e, 'blob', '', 'pieces', 0, 'size', 0, 'digest', '')
    end
end
local function forget(id)
    forget_data(id)
    redis.call('DECRBY', P..'about_bytes', redis.call('HSTRLEN', P..'entry:'..id, 'about'))
    for _, set in ipairs({P..'known', P..'about', owner(id)}) do redis.call('ZREM', set, id) end
    return redis.call('UNLINK', P..'entry:'..id)
end
local function drop_data(id)
    if redis.call('HSTRLEN', P..'entry:'..id, 'about') == 0 then forget(id) else forget_data(id) end
end
local function row(id)
    local e = redis.call('HMGET', P..'entry:'..id, 'blob', 'pieces', 'size', 'digest', 'created', 'about')
    return {id, redis.call('ZSCORE', P..'known', id), unpack(e)}
end
"""
PUT = """
local id, about, size, digest, blob, pieces = unpack(ARGV)
if redis.call('HGET', P..'entry:'..id, 'blob') == blob then return 1 end -- asked again, for the answer was lost
for i = 0, pieces - 1 do
    if redis.call('PERSIST', P..'blob:'..blob..':'..i) == 0 then return 0 end
end
forget(id)
redis.call('HSET', P..'entry:'..id, 'about', about, 'size', size, 'digest', digest, 'blob', blob, 'pieces', pieces,
    'created', number(now()))
for _, set in ipairs({P..'known', owner(id)}) do redis.call('ZADD', set, 0, id) end
if tonumber(size) > 0 then redis.call('ZADD', P..'data', 0, id) end
if #about > 0 then redis.call('ZADD', P..'about', 0, id) end
touch(id)
local function fit(sum, added, most, set, drop)
    local total = redis.call('INCRBY', sum, added)
    while total > tonumber(most) do
        local oldest = redis.call('ZRANGE', set, 0, 0)[1]
        if oldest == id then redis.call('SET', sum, added) return end -- keys of ours were deleted by somebody
        drop(oldest)
        total = tonumber(redis.call('GET', sum))
    end
end
fit(P..'bytes', size, ARGV[7], P..'data', drop_data)
fit(P..'about_bytes', #about, ARGV[8], P..'about', forget)
return 1
"""
FIND = """
if redis.call('EXISTS', P..'entry:'..ARGV[1]) == 0 then return false end
touch(ARGV[1])
return row(ARGV[1])
"""
DROP = """
if redis.call('HGET', P..'entry:'..ARGV[1], 'blob') ~= ARGV[2] then return 0 end
drop_data(ARGV[1])
return 1
"""
DELETE = "return forget(ARGV[1])"
LIST = """
local found = redis.call('ZREVRANGE', P..'of:'..ARGV[1], 0, ARGV[2] - 1)
for i, id in ipairs(found) do found[i] = row(id) end
return found
"""
EXPIRE = """
local function old(set, before, f)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', P..set, '-inf', '('..before)) do
        if string.sub(id, 1, #ARGV[1] + 1) == ARGV[1]..'/' then f(id) end
    end
end
old('data', ARGV[2], drop_data)
old('known', ARGV[3], forget)
"""


def _complete(script: str, prefix: str) -> str:
    """A script as Redis runs it. Only what stores anything needs memory."""
    return f"#!lua{'' if script is PUT else ' flags=allow-oom'}\nlocal P = '{prefix}'\n{FUNCTIONS}{script}"


class RedisStore(StateStore):
    """See `StateStore`. The bounds should be the same for all servers."""

    def __init__(self, url: str, max_bytes: int, max_about_bytes: int = MAX_ABOUT_BYTES, *, prefix: str = "heronry:"):
        """
        Args:
            url: "redis://host:6379/0"; rediss:// for TLS, unix:// for a socket. Redis 7 or later.
            max_bytes: of all states together.
            max_about_bytes: of what is known about them, and about those that are gone.
            prefix: of the names of its keys; each has bounds of its own.

        Raises:
            InputError: redis-py is not installed, or the URL is wrong. A Redis that does not answer is an empty store.
        """
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise InputError("states in Redis need the package redis: pip install 'heronry[serve]'") from error
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))  # after a restart of Redis
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=again)
        except ValueError as error:
            raise InputError(f"the URL of Redis is wrong: {error}") from error
        where = self._redis.connection_pool.connection_kwargs
        super().__init__(f"Redis at {where.get('path') or where.get('host')}", (redis.RedisError, ValueError, _Away))
        self._writing = Outage(f"{self._where} cannot be written", (redis.ResponseError,))  # it is full, or a replica
        self._max_bytes, self._max_about_bytes = max_bytes, max_about_bytes
        self._prefix = prefix
        self._paused_until = 0.0
        self._lost = (redis.ConnectionError, redis.TimeoutError)
        with self._reading:
            self._call(self._redis.ping)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What Redis answers; after a failure nothing is asked for a while, since each question may take seconds."""
        if time.monotonic() < self._paused_until:
            raise _Away
        try:
            return function(*args, **options)
        except self._lost:
            self._paused_until = time.monotonic() + PAUSE
            raise

    def _run(self, script: str, *args: Any) -> Any:
        return self._call(self._redis.register_script(_complete(script, self._prefix)), args=args)

    def put(self, key: Key, data: bytes, about: Mapping[str, Any] | None = None) -> bool:
        text = json.dumps(dict(about)) if about else ""
        if not (data or text) or len(data) > self._max_bytes or len(text) > self._max_about_bytes:
            return False
        blob = secrets.token_hex(16)
        pieces = range(0, len(data), PIECE)
        with self._reading, self._writing:
            for i, start in enumerate(pieces):
                piece = memoryview(data)[start : start + PIECE]
                self._call(self._redis.set, f"{self._prefix}blob:{blob}:{i}", piece, ex=UNNAMED)
            digest = hashlib.sha256(data).hexdigest() if data else ""
            values = (str(key), text, len(data), digest, blob, len(pieces), self._max_bytes, self._max_about_bytes)
            return bool(self._run(PUT, *values))
        return False

    def present(self, keys: Iterable[Key]) -> set[Key]:
        wanted = list(keys)
        with self._reading:
            if wanted:
                uses = self._call(self._redis.zmscore, f"{self._prefix}data", [str(key) for key in wanted])
                return {key for key, used in zip(wanted, uses, strict=True) if used is not None}
        return set()

    def entries(self, kind: str, tenant: str, limit: int = 1000) -> list[Entry]:
        with self._reading:
            return [_entry(row) for row in self._run(LIST, f"{kind}/{tenant}", limit)]
        return []

    def delete(self, key: Key) -> bool:
        with self._reading:
            return bool(self._run(DELETE, str(key)))
        return False

    def expire(self, kind: str, data_before: float, about_before: float) -> None:
        with self._reading:
            self._run(EXPIRE, kind, int(data_before * 1e6), int(about_before * 1e6))

    @property
    def nbytes(self) -> int:
        with self._reading:
            return int(self._call(self._redis.get, f"{self._prefix}bytes") or 0)
        return 0

    def close(self) -> None:
        self._redis.close()

    def _find(self, key: Key) -> tuple[Entry, str] | None:
        row = self._run(FIND, str(key))
        if row is None:
            return None
        blob, pieces = row[2].decode(), int(row[3])
        return _entry(row), f"{blob}:{pieces}" if blob else ""

    def _read(self, place: str) -> bytes | None:
        blob, pieces = place.split(":")
        found = [self._call(self._redis.get, f"{self._prefix}blob:{blob}:{i}") for i in range(int(pieces))]
        return None if None in found else b"".join(found)

    def _drop_data(self, key: Key, place: str) -> bool:
        return bool(self._run(DROP, str(key), place.split(":")[0]))


class _Away(Exception):
    """Redis did not answer a moment ago."""


def _entry(row: list[bytes]) -> Entry:
    name, used, _, _, size, digest, created, about = row
    key = Key.parse(name.decode())
    return Entry(key, json.loads(about or "{}"), int(size), digest.decode(), int(created) / 1e6, float(used) / 1e6)
