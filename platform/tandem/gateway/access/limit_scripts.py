"""What the shared limits do inside Redis, as Lua scripts: each is one atomic step. The arithmetic is that of
`core/rate_limit.py`, in whole tokens and milliseconds.

A tenant is five keys, and all tenants of a fleet share a sixth, in one cluster slot:

- `born`, a string: when the first gateway found these keys empty. If it changes, Redis has lost its data.
- `state`, a hash: `used1 … used3`, `debt1 … debt3` of the three windows (requests, input, output tokens), `held`
- `1`, `2`, `3`, lists of `<slot>:<amount>`, oldest first: what was used in which quarter of a second
- `running`, a sorted set: `<name>:<expected output>` → when its lease ends, Unix milliseconds

All but `born` expire when a tenant is idle. A request whose gateway died leaves `running` when its lease ends.
"""

from __future__ import annotations

import hashlib

from tandem.core.rate_limit import SLOT_S, SLOTS, SPAN_S

KEY_NAMES = ("state", "1", "2", "3", "running")
"""KEYS[2] … KEYS[6] of every script, in order; KEYS[1] is `born`."""

_PRELUDE = """
local state, running = KEYS[2], KEYS[6]
local clock = redis.call('TIME')
local now = tonumber(ARGV[1]) or (clock[1] * 1000 + math.floor(clock[2] / 1000))
local limits = {tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])}
local lease = tonumber(ARGV[5])

local function number(value) return string.format('%.0f', value) end

local born = redis.call('GET', KEYS[1])
if not born then
  born = number(clock[1] * 1000000 + clock[2])
  redis.call('SET', KEYS[1], born)
end

local function parse(entry)
  local slot, amount = string.match(entry, '^(%d+):(.+)$')
  return tonumber(slot), tonumber(amount)
end

local function book(window, amount, slot)
  if amount == 0 then return end
  window.used = window.used + amount
  local last = redis.call('LINDEX', window.list, -1)
  if last then
    local newest, before = parse(last)
    if newest >= slot then
      redis.call('LSET', window.list, -1, number(newest) .. ':' .. number(before + amount))
      return
    end
  end
  redis.call('RPUSH', window.list, number(slot) .. ':' .. number(amount))
end

-- Forget what is over a minute old; pay debts from the room that this makes, at the time it was made.
local function advance(window)
  local gone = math.floor(now / SLOT_MS) - SLOTS
  local first = redis.call('LINDEX', window.list, 0)
  while first do
    local slot, amount = parse(first)
    if slot > gone then return end
    redis.call('LPOP', window.list)
    window.used = window.used - amount
    local paid = math.min(window.debt, window.limit - window.used)
    if paid > 0 then
      window.debt = window.debt - paid
      book(window, paid, slot + SLOTS)
    end
    first = redis.call('LINDEX', window.list, 0)
  end
  window.used, window.debt = 0, 0
end

local function open(kind)
  if not limits[kind] then return nil end
  local known = redis.call('HMGET', state, 'used' .. kind, 'debt' .. kind)
  local window = {kind = kind, list = KEYS[2 + kind], limit = limits[kind],
                  used = tonumber(known[1] or '0'), debt = tonumber(known[2] or '0')}
  advance(window)
  return window
end

local function debit(window, amount)
  local slot = math.floor(now / SLOT_MS)
  if amount < 0 then
    local paid = math.min(window.debt, -amount)
    window.debt = window.debt - paid
    book(window, amount + paid, slot)
    return
  end
  local booked = math.min(amount, math.max(0, window.limit - window.used))
  window.debt = window.debt + amount - booked
  book(window, booked, slot)
end

local function wait_for(window, cost)
  local need = window.used + window.debt + math.min(cost, window.limit) - window.limit
  if need <= 0 then return 0 end
  local turns = 0
  if window.used > 0 then turns = math.max(0, math.ceil(need / window.used) - 1) end
  need = need - turns * window.used
  local found = math.floor(now / SLOT_MS)
  local freed = 0
  for _, entry in ipairs(redis.call('LRANGE', window.list, 0, -1)) do
    local slot, amount = parse(entry)
    found = slot
    freed = freed + amount
    if freed >= need then break end
  end
  return (found + SLOTS * (turns + 1)) * SLOT_MS - now
end

local function reset_of(window)
  local last = redis.call('LINDEX', window.list, -1)
  if not last then return 0 end
  local turns = window.limit > 0 and math.ceil(window.debt / window.limit) or 0
  return (parse(last) + SLOTS * (turns + 1)) * SLOT_MS - now
end

local held = tonumber(redis.call('HGET', state, 'held') or '0')

local function expected_of(member) return tonumber(string.match(member, ':(%d+)$')) end

local function expire_leases()
  local gone = redis.call('ZRANGEBYSCORE', running, '-inf', now)
  for _, member in ipairs(gone) do
    redis.call('ZREM', running, member)
    held = math.max(0, held - expected_of(member))
  end
end

local function keep(windows)
  local longest = lease
  for kind = 1, 3 do
    local window = windows[kind]
    if window then
      local turns = window.limit > 0 and math.ceil(window.debt / window.limit) or 0
      local ttl = (turns + 1) * SLOTS * SLOT_MS + 1000
      redis.call('PEXPIRE', window.list, number(ttl))
      redis.call('HSET', state, 'used' .. kind, number(window.used), 'debt' .. kind, number(window.debt))
      longest = math.max(longest, ttl)
    end
  end
  redis.call('HSET', state, 'held', number(held))
  redis.call('PEXPIRE', state, number(longest + 1000))
  redis.call('PEXPIRE', running, number(lease + 1000))
end
""".replace("SLOT_MS", str(int(SLOT_S * 1000))).replace("SLOTS", str(SLOTS))
"""ARGV of every script: Unix milliseconds or '' for Redis' own clock; the three limits per minute ('' = none); how
long a lease is, in milliseconds. Each script returns `born` first."""

TAKE = (
    _PRELUDE
    + """
local concurrency, input, member = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
expire_leases()
local costs, windows = {1, input, 1}, {}
local short, wait = 0, 0
for kind = 1, 3 do
  local window = open(kind)
  windows[kind] = window
  if window then
    local this = wait_for(window, costs[kind])
    if kind == 3 and this == 0 and window.limit - window.used - window.debt - held <= 0 then this = SPAN_MS end
    if this > wait then short, wait = kind, this end
  end
end
if short == 0 and concurrency and redis.call('ZCARD', running) >= concurrency then short = 4 end
if short == 0 then
  if windows[1] then debit(windows[1], 1) end
  if windows[2] then debit(windows[2], input) end
  redis.call('ZADD', running, now + lease, member)
  held = held + expected_of(member)
end
keep(windows)
local reply = {born, short, wait}
for kind = 1, 3 do
  local window = windows[kind]
  local left = window and window.limit - window.used - window.debt or 0
  if kind == 3 then left = left - held end
  reply[2 + 2 * kind] = math.max(0, left)
  reply[3 + 2 * kind] = window and reset_of(window) or 0
end
return reply
""".replace("SPAN_MS", str(int(SPAN_S * 1000)))
)
"""ARGV[6 …]: concurrency or '', input tokens, member of `running`. Returns born, 0 (granted) or the number of the limit
without room (4 = concurrency), milliseconds to wait, then left and milliseconds until it is full, for each window."""

SETTLE = (
    _PRELUDE
    + """
local member = ARGV[9]
expire_leases()
if member ~= '' and redis.call('ZREM', running, member) == 1 then held = math.max(0, held - expected_of(member)) end
local windows = {}
for kind = 1, 3 do
  windows[kind] = open(kind)
  if windows[kind] then debit(windows[kind], tonumber(ARGV[5 + kind])) end
end
keep(windows)
return {born}
"""
)
"""ARGV[6 …]: requests, input and output tokens to debit, member of `running` that is over or ''."""

RESTORE = (
    _PRELUDE
    + """
local windows = {}
for kind = 1, 3 do windows[kind] = open(kind) end
local found = {{}, {}, {}}
for index = 6, #ARGV, 3 do
  local kind, age, amount = tonumber(ARGV[index]), tonumber(ARGV[index + 1]), tonumber(ARGV[index + 2])
  local window = windows[kind]
  if window and age < 0 then
    window.debt = window.debt + amount
  elseif window then
    local slot = math.floor(now / SLOT_MS) - age
    found[kind][slot] = (found[kind][slot] or 0) + amount
    window.used = window.used + amount
  end
end
for kind = 1, 3 do
  local window = windows[kind]
  if window then
    local amounts, slots = found[kind], {}
    for _, entry in ipairs(redis.call('LRANGE', window.list, 0, -1)) do
      local slot, amount = parse(entry)
      amounts[slot] = (amounts[slot] or 0) + amount
    end
    for slot in pairs(amounts) do slots[#slots + 1] = slot end
    table.sort(slots)
    redis.call('DEL', window.list)
    for _, slot in ipairs(slots) do redis.call('RPUSH', window.list, number(slot) .. ':' .. number(amounts[slot])) end
  end
end
keep(windows)
return {born}
""".replace("SLOT_MS", str(int(SLOT_S * 1000)))
)
"""ARGV[6 …]: of what Redis does not know, number of the limit, slots ago (-1: a debt), amount; and so on. It is
counted from when it was used."""

RENEW = (
    _PRELUDE
    + """
expire_leases()
for index = 6, #ARGV do
  if redis.call('ZADD', running, now + lease, ARGV[index]) == 1 then held = held + expected_of(ARGV[index]) end
end
redis.call('HSET', state, 'held', number(held))
redis.call('PEXPIRE', running, number(lease + 1000))
redis.call('PEXPIRE', state, number(math.max(redis.call('PTTL', state), lease + 1000)))
return {born}
"""
)
"""ARGV[6 …]: members of `running` whose leases begin anew."""

SHA = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (TAKE, SETTLE, RESTORE, RENEW)
}
