"""What the Redis store does inside Redis, as Lua scripts: each is one atomic step.

A fleet is nine keys in one cluster slot:

- `entries`, a hash: key → `<version>:<value>`
- `names`, a sorted set of the keys, all at score 0, so that a prefix is a range and no pattern
- `expires`, a sorted set: key → Unix milliseconds
- `changes`, a stream: id `<version>-0`, fields `p` (the version before it), `k` (key), `v` (value, absent if gone)
- `revision`, the last version
- `birth`, a random id: which store this is
- `home`, the birth with which this Redis began; another one if an older store was put back into it
- `past`, a sorted set of the births whose place this store has taken, at most `KEPT_BIRTHS`
- `restored`, a hash of what was put back: key → version; and in two fields that are no keys, `\\ncursor`, the last
  version that the one who did it had seen, and `\\nuntil`, Unix milliseconds until which one who saw more may correct

Redis' own expiry is not used: it happens in silence and out of order. Each script first takes out the entries whose
time is up by Redis' clock, and logs that like any other change. `p` chains the changes, so a reader sees by itself
when the stream was trimmed or lost under it.

A version is the last one plus one, or Redis' clock in microseconds if that is more: so it goes on rising after a
restart that lost everything, also where the clock is behind, for who puts back says what he has seen (Lua's doubles
hold it exactly until the year 2255).

Each script is told the birth of the store that its caller knows, and a new random one, for Redis' own random numbers
are the same in each script. Where a birth is found that is not the known one and has not taken its place, the store
has lost what it held, and nothing is done. All reply with the birth that they found, whether they did their work, and
then their result. No clock is asked which of two stores is the older: an empty one may be on a machine whose clock is
behind.
"""

from __future__ import annotations

KEY_NAMES = ("entries", "names", "expires", "changes", "revision", "birth", "home", "past", "restored")
"""The KEYS of every script, in order."""
KEPT_CHANGES = 1024
KEPT_BIRTHS = 64
CORRECTED_MS = 300_000
"""For so long one who has seen more may correct what another one put back."""

_PRELUDE = """
local entries, names, expires, changes, revision = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)

local home, past, restored = KEYS[7], KEYS[8], KEYS[9]
local known, fresh = table.remove(ARGV, 1), table.remove(ARGV, 1)
local birth = redis.call('GET', KEYS[6])
if not birth then
  birth = fresh
  redis.call('SET', KEYS[6], birth)
  redis.call('SET', home, birth)
end
local superseded = redis.call('ZSCORE', past, known)

local function mark(name)
  return tonumber(redis.call('HGET', restored, '\\n' .. name) or '-1')
end

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
_SAME = _PRELUDE + "if known ~= '' and known ~= birth and not superseded then return {birth, 0} end\n"

GET = _SAME + "return {birth, 1, redis.call('HGET', entries, ARGV[1])}"
"""ARGV: key. Returns `<version>:<value>` or nil."""

LIST = (
    _SAME
    + """
local found = redis.call('ZRANGEBYLEX', names, '[' .. ARGV[1], '[' .. ARGV[1] .. '\\255')
local correctable = now_ms <= mark('until') and mark('cursor') or -1
local before = table.concat(redis.call('ZRANGE', past, 0, -1), ',')
local reply = {birth, 1, last_version(), redis.call('GET', home) or '', correctable, before}
for _, key in ipairs(found) do
  reply[#reply + 1] = key
  reply[#reply + 1] = redis.call('HGET', entries, key)
end
return reply
"""
)
"""ARGV: prefix. Returns the revision, the home, the cursor with which the store was put back if that may still be
corrected, else -1, the past births, then key and `<version>:<value>` of each entry. (UTF-8 has no byte 255.)"""

WRITE = (
    _SAME
    + """
local key, expected, operation, value, ttl_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local held = redis.call('HGET', entries, key)
local current = held and string.match(held, '^%d+') or '0'
if expected ~= '' and expected ~= current then return {birth, 1, -1} end
if operation == 'put' then
  local version = change(key, value)
  live_for(key, ttl_ms)
  return {birth, 1, version}
end
if current == '0' then return {birth, 1, 0} end
return {birth, 1, change(key, nil)}
"""
)
"""ARGV: key, expected version or '', 'put' or 'delete', value, ttl in ms or ''. Returns -1 on a conflict."""

TOUCH = (
    _SAME
    + """
if redis.call('HEXISTS', entries, ARGV[1]) == 0 then return {birth, 1, 0} end
live_for(ARGV[1], ARGV[2])
return {birth, 1, 1}
"""
)
"""ARGV: key, ttl in ms. Returns whether the key is there."""

TICK = (
    _SAME
    + """
local next = redis.call('ZRANGE', expires, 0, 0, 'WITHSCORES')
return {birth, 1, last_version(), next[2] and next[2] - now_ms or -1}
"""
)
"""Returns the revision and the milliseconds until the next expiry, -1 without one."""

RESTORE = (
    (
        _PRELUDE
        + """
local known_home = table.remove(ARGV, 1)
local cursor = tonumber(table.remove(ARGV, 1))
local births = tonumber(table.remove(ARGV, 1))
local is_gap = birth == redis.call('GET', home)
local holds_nothing = #ARGV == births
if superseded or is_gap and (known == birth or holds_nothing) then return {birth, 0, 0} end
if known == birth and (holds_nothing or known_home == redis.call('GET', home)
    or now_ms > mark('until') or cursor <= mark('cursor')) then return {birth, 0, 0} end

-- The chain of changes is broken: all watches list again.
redis.call('SET', revision, string.format('%.0f', math.max(last_version() + 1, cursor + 1, now_us)))

local corrects = known == birth
local superseding = {[known] = true}
for n = 1, births do
  superseding[ARGV[n]] = true
  corrects = corrects or ARGV[n] == birth and not holds_nothing
end

local made, held, put_back, mine = 0, {}, {}, corrects or is_gap
if is_gap then
  redis.call('DEL', restored)
elseif corrects then
  local before = redis.call('HGETALL', restored)
  for n = 1, #before, 2 do
    local current = redis.call('HGET', entries, before[n])
    local same = current and string.match(current, '^%d+') == before[n + 1]
    put_back[before[n]] = same and 'still' or 'changed since'
  end
end
for n = births + 1, #ARGV, 2 do
  local key, value = ARGV[n], ARGV[n + 1]
  local current = redis.call('HGET', entries, key)
  local differs = current and string.match(current, '^%d+:(.*)$') ~= value
  held[key] = true
  if not current and not put_back[key] or differs and put_back[key] == 'still' then
    change(key, value)
    made = made + 1
  end
  if mine and redis.call('HEXISTS', entries, key) == 1 and (not current or put_back[key] == 'still') then
    redis.call('HSET', restored, key, string.match(redis.call('HGET', entries, key), '^%d+'))
  end
end
for key, how in pairs(put_back) do
  if how == 'still' and not held[key] then
    change(key, nil)
    redis.call('HDEL', restored, key)
    made = made + 1
  end
end
if mine then
  redis.call('HSET', restored, '\\ncursor', string.format('%.0f', cursor))
  redis.call('HSET', restored, '\\nuntil', string.format('%.0f', now_ms + CORRECTED))
end

if mine then
  superseding[birth] = true
  birth = known
  redis.call('SET', KEYS[6], birth)
end
for gone in pairs(superseding) do
  if gone ~= birth then redis.call('ZADD', past, now_us, gone) end
end
redis.call('ZREM', past, birth)
redis.call('ZREMRANGEBYRANK', past, 0, -BIRTHS - 1)
return {birth, 1, made}
"""
    )
    .replace("CORRECTED", str(CORRECTED_MS))
    .replace("BIRTHS", str(KEPT_BIRTHS))
)
"""ARGV: the home and the last version that the keeper has seen, how many births its store took the place of, these
births, then key and value of each entry that it holds. Returns how many entries were changed.

- A gap, which is a store that nothing was put back into, gets what is not there, and becomes the known store again.
- The known store, put back by one who had seen less: what he put back and nobody has changed since becomes what the
  better informed one holds, or goes if that one holds it no more; what neither put back nor is there is made.
- A store that was put back although the known one had taken its place before (it was once a gap itself): the same,
  and it becomes the known store.
- Another store that was put back gets what is not there, and takes the place of the known one.
- Where the known store's place was taken already, nothing is done. Who holds nothing neither fills a gap nor corrects.
"""
