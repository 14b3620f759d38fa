"""The changes of a task's state as Lua scripts, which Redis runs one at a time: each happens whole or not at all.

Keys, after a prefix: ``task:ID`` (hash) and ``segments:ID`` (list) are the record; ``queue`` (stream, group
``workers``) holds one message per task that has not ended; ``waiting``, ``running`` and ``ended`` (sorted sets of ids)
are the states; ``owner:HASH`` (sorted set) and ``open:HASH`` (set) are a key's tasks; ``hooks`` and ``trash`` (sorted
sets, by due time) are what is left to do for tasks that ended. Every change is published on ``changed``.

A script that is sent twice, because its answer was lost, changes nothing the second time. A task may be forgotten
between any two calls: only ``submit`` makes a record, and every other script looks whether it is there before it
writes to it. Keys are computed from the prefix, so a Redis Cluster cannot run these.
"""

GROUP = "workers"
NOBODY = "released"  # consumer that holds the messages of tasks that were given back

_PRELUDE = """
local p = KEYS[1]
local id = ARGV[1]
local t = p .. 'task:' .. id
local function clock() local now = redis.call('TIME'); return now[1] + now[2] / 1e6 end
local function stamp(at) return string.format('%.6f', at or clock()) end
local function status() return redis.call('HGET', t, 'status') end
local function holds(token) return redis.call('HGET', t, 'attempt') == token and status() == 'running' end
local function tell() redis.call('PUBLISH', p .. 'changed', id) end
local function tally(name, by) redis.call('HINCRBYFLOAT', p .. 'counters', name, by or 1) end
local function hold(consumer, ...)
  redis.call('XCLAIM', p .. 'queue', 'workers', consumer, 0, redis.call('HGET', t, 'message'), ...)
  redis.call('ZADD', p .. 'beats', stamp(), id)
end
local function close(how, words)
  local about = redis.call('HMGET', t, 'owner', 'message', 'webhook')
  redis.call('HSET', t, 'status', how, 'error', words, 'ended', stamp(), 'live', 0)
  redis.call('XACK', p .. 'queue', 'workers', about[2])
  redis.call('XDEL', p .. 'queue', about[2])
  redis.call('ZREM', p .. 'waiting', id)
  redis.call('ZREM', p .. 'running', id)
  redis.call('ZREM', p .. 'beats', id)
  redis.call('SREM', p .. 'open:' .. about[1], id)
  redis.call('ZADD', p .. 'ended', stamp(), id)
  if about[3] ~= '' then redis.call('ZADD', p .. 'hooks', 0, id) end
  tally(how)
  tell()
end
"""

SCRIPTS = {
    # ARGV: id, owner, spec, webhook, most open tasks, idempotency key ("" = none), print of the request, seconds kept
    "submit": """
if redis.call('EXISTS', t) == 1 then return {'queued', id} end
local again = p .. 'again:' .. ARGV[6]
if ARGV[6] ~= '' then
  local seen = redis.call('HMGET', again, 'task', 'print')
  if seen[1] and redis.call('EXISTS', p .. 'task:' .. seen[1]) == 1 then
    return {seen[2] == ARGV[7] and 'known' or 'conflict', seen[1]}
  end
end
local open = p .. 'open:' .. ARGV[2]
if redis.call('SCARD', open) >= tonumber(ARGV[5]) then return {'full', ''} end
local message = redis.call('XADD', p .. 'queue', '*', 'task', id)
redis.call('HSET', t, 'id', id, 'owner', ARGV[2], 'spec', ARGV[3], 'webhook', ARGV[4], 'message', message,
  'status', 'queued', 'created', stamp(), 'attempt', 0)
redis.call('ZADD', p .. 'waiting', stamp(), id)
redis.call('ZADD', p .. 'owner:' .. ARGV[2], stamp(), id)
redis.call('SADD', open, id)
if ARGV[6] ~= '' then
  redis.call('HSET', again, 'task', id, 'print', ARGV[7])
  redis.call('EXPIRE', again, ARGV[8])
end
tally('submitted')
tell()
return {'queued', id}
""",
    # ARGV: -, consumer, idle milliseconds. Gives the consumer the oldest message that nobody has attended to for so
    # long; returns its id and task. (As XAUTOCLAIM, which in Redis 6.2 gives up after ten messages that are attended.)
    "reclaim": """
local found = redis.call('XPENDING', p .. 'queue', 'workers', 'IDLE', ARGV[3], '-', '+', 1)[1]
if not found then return nil end
local message = redis.call('XCLAIM', p .. 'queue', 'workers', ARGV[2], ARGV[3], found[1])[1]
if not message then
  redis.call('XACK', p .. 'queue', 'workers', found[1])
  return nil
end
return {message[1], message[2][2]}
""",
    # ARGV: id, message, most tasks that may run, lease in seconds. Returns the new token; nil where so many run, which
    # leaves the task and offers its message again, or for a message that is no longer or was never the task's own.
    "claim": """
local state = status()
if (state ~= 'queued' and state ~= 'running') or redis.call('HGET', t, 'message') ~= ARGV[2] then
  redis.call('XACK', p .. 'queue', 'workers', ARGV[2])
  redis.call('XDEL', p .. 'queue', ARGV[2])
  tally('duplicates')
  return nil
end
local own, from = tonumber(redis.call('ZSCORE', p .. 'beats', id) or 0), clock() - ARGV[4]
local others = redis.call('ZCOUNT', p .. 'beats', stamp(from), '+inf') - (own >= from and 1 or 0)
if others >= tonumber(ARGV[3]) then
  redis.call('XCLAIM', p .. 'queue', 'workers', 'released', 0, ARGV[2], 'IDLE', math.ceil(ARGV[4] * 1000), 'JUSTID')
  return nil
end
if state == 'running' then
  tally('reclaimed')
  tally('frames_repeated', redis.call('HGET', t, 'live') or 0)
end
redis.call('HSETNX', t, 'started', stamp())
redis.call('HSET', t, 'status', 'running', 'live', 0)
redis.call('ZREM', p .. 'waiting', id)
redis.call('ZADD', p .. 'running', stamp(), id)
redis.call('ZADD', p .. 'beats', stamp(), id)
local token = redis.call('HINCRBY', t, 'attempt', 1)
tell()
return token
""",
    # ARGV: id, token, consumer, live frames, number of segments before them. Returns whether the task is the caller's.
    "beat": """
if not holds(ARGV[2]) then return 0 end
hold(ARGV[3], 'JUSTID')
local is_now = redis.call('LLEN', p .. 'segments:' .. id) == tonumber(ARGV[5])  -- a beat may come after its commit
if is_now and redis.call('HGET', t, 'live') ~= ARGV[4] then
  redis.call('HSET', t, 'live', ARGV[4])
  tell()
end
return 1
""",
    # ARGV: id, token, consumer, number of segments before, segment, busy seconds, 1 = the last, frames
    "commit": """
local kept = p .. 'segments:' .. id
local before = tonumber(ARGV[4])
if not holds(ARGV[2]) then return 0 end
if redis.call('LLEN', kept) == before + 1 and redis.call('LINDEX', kept, -1) == ARGV[5] then return 1 end
if redis.call('LLEN', kept) ~= before then return 0 end
redis.call('RPUSH', kept, ARGV[5])
redis.call('HSET', t, 'live', 0, 'failures', 0, 'error', '', 'spoken', ARGV[7])
redis.call('HINCRBYFLOAT', t, 'busy_s', ARGV[6])
hold(ARGV[3], 'JUSTID')
tally('segments')
tally('frames', ARGV[8])
tally('busy_s', ARGV[6])
tell()
return 1
""",
    # ARGV: id, token, object of the result ("" = the segments), its bytes
    "finish": """
if status() == 'done' and redis.call('HGET', t, 'attempt') == ARGV[2] then return 1 end
if not holds(ARGV[2]) then return 0 end
redis.call('HSET', t, 'result', ARGV[3], 'result_bytes', ARGV[4])
close('done', '')
return 1
""",
    # ARGV: id, token, why
    "fail": """
if not holds(ARGV[2]) then return 0 end
close('failed', ARGV[3])
return 1
""",
    # ARGV: id, token, idle milliseconds that the message is given, 1 = counts as a failure, why
    "release": """
if not holds(ARGV[2]) then return 0 end
if ARGV[4] == '1' then tally('frames_repeated', redis.call('HGET', t, 'live')) end
redis.call('HSET', t, 'status', 'queued', 'live', 0, 'error', ARGV[5])
redis.call('HINCRBY', t, 'attempt', 1)
if ARGV[4] == '1' then redis.call('HINCRBY', t, 'failures', 1) end
hold('released', 'IDLE', ARGV[3], 'JUSTID')
redis.call('ZREM', p .. 'running', id)
redis.call('ZREM', p .. 'beats', id)
redis.call('ZADD', p .. 'waiting', redis.call('HGET', t, 'created'), id)
tally(ARGV[4] == '1' and 'retried' or 'yielded')
tell()
return 1
""",
    # ARGV: id, seconds until its audio is removed. A worker that still speaks learns of it by its next beat.
    "cancel": """
local state = status()
if state == 'queued' or state == 'running' then
  redis.call('HINCRBY', t, 'attempt', 1)
  close('cancelled', '')
  redis.call('ZADD', p .. 'trash', stamp(clock() + ARGV[2]), id)
end
return state
""",
    # ARGV: id
    "forget": """
local owner = redis.call('HGET', t, 'owner')
if owner then redis.call('ZREM', p .. 'owner:' .. owner, id) end
redis.call('DEL', t, p .. 'segments:' .. id)
for _, name in ipairs({'ended', 'trash', 'hooks'}) do redis.call('ZREM', p .. name, id) end
return 1
""",
    # ARGV: set, seconds that the id is hidden from others. Returns an id that is due, or nil.
    "due": """
local found = redis.call('ZRANGEBYSCORE', p .. ARGV[1], '-inf', stamp(), 'LIMIT', 0, 1)[1]
if not found then return nil end
redis.call('ZADD', p .. ARGV[1], stamp(clock() + ARGV[2]), found)
return found
""",
    # ARGV: id. Counts an attempt to deliver a webhook; returns 0 for a task that is not there.
    "try_hook": """
if not status() then return 0 end
return redis.call('HINCRBY', t, 'hook_tries', 1)
""",
    # ARGV: owner, most per minute. Returns 0, or the seconds until the next minute where the limit is reached.
    "allow": """
local at = clock()
local minute = p .. 'minute:' .. id .. ':' .. math.floor(at / 60)
if redis.call('INCR', minute) == 1 then redis.call('EXPIRE', minute, 120) end
if tonumber(redis.call('GET', minute)) <= tonumber(ARGV[2]) then return 0 end
return math.ceil(60 - at % 60)
""",
    # ARGV: set, member, seconds: a sign of life that ends by itself
    "alive": """
redis.call('ZREMRANGEBYSCORE', p .. ARGV[1], '-inf', stamp())
redis.call('ZADD', p .. ARGV[1], stamp(clock() + ARGV[3]), ARGV[2])
return 1
""",
    # ARGV: owner, stream, most streams of the owner, seconds. Counts a new stream; 0 where the owner has too many
    "enter": """
local own = p .. 'streams:' .. id
redis.call('ZREMRANGEBYSCORE', own, '-inf', stamp())
if not redis.call('ZSCORE', own, ARGV[2]) and redis.call('ZCARD', own) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', own, stamp(clock() + ARGV[4]), ARGV[2])
redis.call('ZADD', p .. 'streams', stamp(clock() + ARGV[4]), ARGV[2])
return 1
""",
    # ARGV: id. Whether a task has ended, and no worker may still write for it
    "at_rest": """
local state = status()
local ended = state == 'done' or state == 'failed' or state == 'cancelled'
return ended and not redis.call('ZSCORE', p .. 'trash', id) and 1 or 0
""",
    # ARGV: id, lease in seconds. Counts of streams, streams that wait and tasks that a living worker runs; the rank of
    # the id among all running ones, by the time of their claim
    "room": """
local from = clock()
local rank = redis.call('ZRANK', p .. 'running', id)
local function since(name, at) return redis.call('ZCOUNT', p .. name, stamp(at), '+inf') end
return {since('streams', from), since('impatient', from), since('beats', from - ARGV[2]), rank or -1}
""",
}
SCRIPTS = {name: _PRELUDE + body for name, body in SCRIPTS.items()}
