"""What the Redis store does inside Redis, as Lua scripts: each is one atomic step.

A fleet is six keys in one cluster slot:

- `entries`, a hash: key → `<version>:<value>`
- `names`, a sorted set of the keys, all at score 0, so that a prefix is a range and no pattern
- `expires`, a sorted set: key → Unix milliseconds
- `changes`, a stream: id `<version>-0`, fields `p` (the version before it), `k` (key), `v` (value, absent if gone)
- `revision`, the last version
- `birth`, when the store was made, by Redis' clock in microseconds

Redis' own expiry is not used: it happens in silence and out of order. Each script first takes out the entries whose
time is up by Redis' clock, and logs that like any other change. `p` chains the changes, so a reader sees by itself
when the stream was trimmed or lost under it.

A version is the last one plus one, or Redis' clock in microseconds if that is more: so it goes on rising even after a
restart that lost everything (Lua's doubles hold it exactly until the year 2255).

Each script is told the birth of the store that its caller knows. Where another one is found, the store has lost what it
held, and nothing is done. All reply with the birth that they found, then their result.
"""

from __future__ import annotations

KEY_NAMES = ("entries", "names", "expires", "changes", "revision", "birth")
"""The KEYS of every script, in order."""
KEPT_CHANGES = 1024

_PRELUDE = """
local entries, names, expires, changes, revision = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)

local birth = redis.call('GET', KEYS[6])
if not birth then
  birth = string.format('%.0f', now_us)
  redis.call('SET', KEYS[6], birth)
end
local known = table.remove(ARGV, 1)

local function last_version()
  return tonumber(redis.call('GET', revision) or '0')
end

local function change(key, value)
  local last = last_version()
  local version = math.max(last + 1, now_us)
  local id = string.format('%.0f', version)
  local previous = string.format('%.0f', last)
  redis.call('SET', revision, id)
  if value then
    redis.call('HSET', entries, key, id .. ':' .. value)
    redis.call('ZADD', names, 0, key)
    redis.call('XADD', changes, 'MAXLEN', '~', KEPT, id .. '-0', 'p', previous, 'k', key, 'v', value)
  else
    redis.call('HDEL', entries, key)
    redis.call('ZREM', names, key)
    redis.call('ZREM', expires, key)
    redis.call('XADD', changes, 'MAXLEN', '~', KEPT, id .. '-0', 'p', previous, 'k', key)
  end
  return version
end

local function live_for(key, ttl_ms)
  if ttl_ms == '' then
    redis.call('ZREM', expires, key)
  else
    redis.call('ZADD', expires, now_ms + ttl_ms, key)
  end
end

for _, key in ipairs(redis.call('ZRANGEBYSCORE', expires, '-inf', now_ms)) do
  change(key, nil)
end
""".replace("KEPT", str(KEPT_CHANGES))
_SAME = _PRELUDE + "if known ~= '' and known ~= birth then return {birth} end\n"

GET = _SAME + "return {birth, redis.call('HGET', entries, ARGV[1])}"
"""ARGV: key. Returns `<version>:<value>` or nil."""

LIST = (
    _SAME
    + """
local found = redis.call('ZRANGEBYLEX', names, '[' .. ARGV[1], '[' .. ARGV[1] .. '\\255')
local reply = {birth, last_version()}
for _, key in ipairs(found) do
  reply[#reply + 1] = key
  reply[#reply + 1] = redis.call('HGET', entries, key)
end
return reply
"""
)
"""ARGV: prefix. Returns the revision, then key and `<version>:<value>` of each entry. (UTF-8 has no byte 255.)"""

WRITE = (
    _SAME
    + """
local key, expected, operation, value, ttl_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local held = redis.call('HGET', entries, key)
local current = held and string.match(held, '^%d+') or '0'
if expected ~= '' and expected ~= current then return {birth, -1} end
if operation == 'put' then
  local version = change(key, value)
  live_for(key, ttl_ms)
  return {birth, version}
end
if current == '0' then return {birth, 0} end
return {birth, change(key, nil)}
"""
)
"""ARGV: key, expected version or '', 'put' or 'delete', value, ttl in ms or ''. Returns -1 on a conflict."""

TOUCH = (
    _SAME
    + """
if redis.call('HEXISTS', entries, ARGV[1]) == 0 then return {birth, 0} end
live_for(ARGV[1], ARGV[2])
return {birth, 1}
"""
)
"""ARGV: key, ttl in ms. Returns whether the key is there."""

TICK = (
    _SAME
    + """
local next = redis.call('ZRANGE', expires, 0, 0, 'WITHSCORES')
return {birth, last_version(), next[2] and next[2] - now_ms or -1}
"""
)
"""Returns the revision and the milliseconds until the next expiry, -1 without one."""

RESTORE = (
    _PRELUDE
    + """
if tonumber(birth) <= tonumber(known) then return {birth, 0} end
local made = 0
for n = 1, #ARGV, 2 do
  if redis.call('HEXISTS', entries, ARGV[n]) == 0 then
    change(ARGV[n], ARGV[n + 1])
    made = made + 1
  end
end
redis.call('SET', KEYS[6], known)
return {known, made}
"""
)
"""ARGV: key and value of each entry. What is not there is made, and the store is again the one that it was, unless it
is one that is older still. Returns how many were made."""
