"""What the Redis journal does inside Redis, as Lua scripts: each is one atomic step of `core.answers`.

All keys begin with `tandem:{<fleet>}:answers:`, so they are in one cluster slot:

- `a:<name>`, a hash: tenant, fp (fingerprint), number, created, born, owner, voided, state, count (of entries), size
- `l:<name>`, a stream: the log, ids `1-0`, `2-0` …, field `e`, and `o` (owner) with what an owner let it go with
- `o:<incarnation>`, expires by itself: the gateway lives
- `w:<name>`, expires by itself: somebody waits for news
- `news`, a short stream: the names of answers that somebody waits for and that have changed, field `n`
- `expires`, `order` and `t:<tenant>`, sorted sets of names: by expiry and by age (of all, of each tenant)
- `bytes`, a hash: tenant → bytes, and those of all under the empty name

A log is answered as the lengths of its entries, in a line, and all of them as one string: a reply of many thousand
entries would take the client longer to read than to use.

Time is Redis' own. Redis' expiry of answers is only for a fleet that is no more: each script first takes out what is
too old, so that the bytes are counted right.
"""

from __future__ import annotations

from tandem.core.answers import OVERHEAD

_SLACK_MS = 3_600_000
_NEWS_KEPT = 1000
"""A gateway that is further behind hears of a change when it next looks by itself."""

_PRELUDE = """
local P = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function drop(name)
  local held = redis.call('HMGET', P .. 'a:' .. name, 'tenant', 'size')
  redis.call('DEL', P .. 'a:' .. name, P .. 'l:' .. name, P .. 'w:' .. name)
  redis.call('ZREM', P .. 'expires', name)
  redis.call('ZREM', P .. 'order', name)
  if held[1] then
    redis.call('ZREM', P .. 't:' .. held[1], name)
    if redis.call('HINCRBY', P .. 'bytes', held[1], -held[2]) <= 0 then redis.call('HDEL', P .. 'bytes', held[1]) end
    redis.call('HINCRBY', P .. 'bytes', '', -held[2])
  end
end

local function keep(name, ms)
  redis.call('ZADD', P .. 'expires', now + ms, name)
  local tenant = redis.call('HGET', P .. 'a:' .. name, 'tenant')
  for _, key in ipairs({'a:' .. name, 'l:' .. name, 'expires', 'order', 'bytes', 't:' .. tenant}) do
    redis.call('PEXPIRE', P .. key, ms + SLACK)
  end
end

local function grow(name, size, tenant_limit, total_limit)
  local tenant = redis.call('HGET', P .. 'a:' .. name, 'tenant')
  redis.call('HINCRBY', P .. 'a:' .. name, 'size', size)
  redis.call('HINCRBY', P .. 'bytes', tenant, size)
  redis.call('HINCRBY', P .. 'bytes', '', size)
  local function over(field, limit, names)
    while tonumber(redis.call('HGET', P .. 'bytes', field) or '0') > limit do
      local oldest = redis.call('ZRANGE', P .. names, 0, 0)[1]
      if not oldest then return end
      drop(oldest)
    end
  end
  over(tenant, tenant_limit, 't:' .. tenant)
  over('', total_limit, 'order')
end

local function lives(owner)
  return redis.call('EXISTS', P .. 'o:' .. string.match(owner, '^[^:]*')) == 1
end

local function tell(name)
  if redis.call('EXISTS', P .. 'w:' .. name) == 1 then
    redis.call('XADD', P .. 'news', 'MAXLEN', '~', NEWS_KEPT, '*', 'n', name)
    redis.call('PEXPIRE', P .. 'news', SLACK)
  end
end

local function own(name, owner, lease_ms, open_ms)
  redis.call('HSET', P .. 'a:' .. name, 'owner', owner, 'state', 'open')
  redis.call('SET', P .. 'o:' .. string.match(owner, '^[^:]*'), 1, 'PX', lease_ms)
  keep(name, open_ms)
  tell(name)
end

local function with_log(reply, name, after)
  local lengths, entries = {}, {}
  for at, entry in ipairs(redis.call('XRANGE', P .. 'l:' .. name, string.format('%d-0', after + 1), '+')) do
    lengths[at], entries[at] = #entry[2][2], entry[2][2]
  end
  reply[#reply + 1] = table.concat(lengths, ' ')
  reply[#reply + 1] = table.concat(entries)
  return reply
end

for _, name in ipairs(redis.call('ZRANGEBYSCORE', P .. 'expires', '-inf', now, 'LIMIT', 0, 1000)) do drop(name) end
""".replace("SLACK", str(_SLACK_MS)).replace("NEWS_KEPT", str(_NEWS_KEPT))

CLAIM = (
    _PRELUDE
    + """
local name, tenant, fingerprint, number, created, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local lease_ms, open_ms, tenant_limit, total_limit = ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local a = P .. 'a:' .. name
local held = redis.call('HMGET', a, 'fp', 'state', 'owner', 'number', 'created', 'born')
if held[1] and held[1] ~= fingerprint then return {'mismatch', '', 0, '', '', ''} end
local voided = ''
if held[1] and held[2] == 'void' then
  voided = held[3]
  tell(name)
  drop(name)
  held[1] = false
end
if not held[1] then
  redis.call('HSET', a, 'tenant', tenant, 'fp', fingerprint, 'number', number, 'created', created,
    'born', owner, 'voided', voided, 'count', 0, 'size', 0)
  redis.call('ZADD', P .. 'order', now, name)
  redis.call('ZADD', P .. 't:' .. tenant, now, name)
  redis.call('HSETNX', P .. 'bytes', '', 0)
  own(name, owner, lease_ms, open_ms)
  grow(name, OVERHEAD, tenant_limit, total_limit)
  return {'owned', number, created, owner, '', ''}
end
local standing = held[2] == 'done' and 'done' or 'joined'
if held[2] == 'free' or (held[2] == 'open' and not lives(held[3])) then
  own(name, owner, lease_ms, open_ms)
  standing = 'owned'
end
return with_log({standing, held[4], held[5], held[6]}, name, 0)
""".replace("OVERHEAD", str(OVERHEAD))
)
"""ARGV: name, tenant, fingerprint, number, created, owner, lease in ms, life while open in ms, bytes of a tenant, bytes
of all. Returns the standing, number, created, born, then the log."""

TAKE = (
    _PRELUDE
    + """
local name, before, owner, lease_ms, open_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local held = redis.call('HMGET', P .. 'a:' .. name, 'owner', 'state')
if not held[1] or held[1] ~= before or held[2] == 'done' or held[2] == 'void' then return {0} end
if held[2] == 'open' and lives(before) then return {0} end
own(name, owner, lease_ms, open_ms)
return {1}
"""
)
"""ARGV: name, owner before, owner, lease in ms, life while open in ms. Returns whether it was taken."""

APPEND = (
    _PRELUDE
    + """
local name, owner, place, entry, state = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local lease_ms, life_ms, tenant_limit, total_limit = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local a = P .. 'a:' .. name
local held = redis.call('HMGET', a, 'owner', 'state', 'count', 'voided')
if not held[1] then return {'gone'} end
local count, id = tonumber(held[3]), string.format('%d-0', place)
if held[1] ~= owner or held[2] ~= 'open' then
  local there = (held[1] == owner and place <= count) or (state == 'void' and held[4] == owner)
  if not there and place <= count then
    local entry = redis.call('XRANGE', P .. 'l:' .. name, id, id)[1]
    there = entry and entry[2][4] == owner
  end
  return {there and 'written' or 'fenced'}
end
if place > count + 1 then
  drop(name)
  return {'gone'}
end
redis.call('HSET', a, 'state', state)
if place == count + 1 then
  if state == 'free' then
    redis.call('XADD', P .. 'l:' .. name, id, 'e', entry, 'o', owner)
  else
    redis.call('XADD', P .. 'l:' .. name, id, 'e', entry)
  end
  redis.call('HSET', a, 'count', place)
end
redis.call('SET', P .. 'o:' .. string.match(owner, '^[^:]*'), 1, 'PX', lease_ms)
keep(name, life_ms)
tell(name)
if place == count + 1 then grow(name, #entry, tenant_limit, total_limit) end
return {redis.call('EXISTS', a) == 1 and 'written' or 'gone'}
"""
)
"""ARGV: name, owner, place, entry, state, lease in ms, life from now in ms, bytes of a tenant, bytes of all."""

RESTART = (
    _PRELUDE
    + """
local name, owner = ARGV[1], ARGV[2]
local a = P .. 'a:' .. name
local held = redis.call('HMGET', a, 'owner', 'state', 'size', 'tenant')
if not held[1] or held[1] ~= owner or held[2] ~= 'open' then return {0} end
local freed = held[3] - OVERHEAD
redis.call('DEL', P .. 'l:' .. name)
redis.call('HSET', a, 'born', owner, 'count', 0, 'size', OVERHEAD)
redis.call('HINCRBY', P .. 'bytes', held[4], -freed)
redis.call('HINCRBY', P .. 'bytes', '', -freed)
tell(name)
return {1}
""".replace("OVERHEAD", str(OVERHEAD))
)
"""ARGV: name, owner. Returns whether the log is empty now."""

NEWS = (
    _PRELUDE
    + """
local name, after, want_ms = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local held = redis.call('HMGET', P .. 'a:' .. name, 'state', 'owner', 'born')
if not held[1] then return {} end
redis.call('SET', P .. 'w:' .. name, 1, 'PX', want_ms)
local alive = held[1] == 'open' and lives(held[2])
return with_log({held[1], held[2], alive and 1 or 0, held[3]}, name, after)
"""
)
"""ARGV: name, number of entries that are known, how long somebody wants it in ms. Returns nothing if it is not kept,
else state, owner, whether it lives, born, then what is new."""
