-- What wrk sends: the arguments behind "--" are METHOD, PATH and the file of a BODY ("-": none), once or more; in turns.
-- "{n}" in a path is another name each time. The token is in the environment.
local requests, turn, number = {}, 0, 0
local stamp = os.time() .. "-" .. tostring(requests):sub(-8)

function init(args)
  local headers = {["Authorization"] = "Bearer " .. os.getenv("MP_ACCESS_TOKEN")}
  for first = 1, #args, 3 do
    local body = nil
    if args[first + 2] ~= "-" then
      local file = assert(io.open(args[first + 2], "rb"))
      body = file:read("*a")
      file:close()
    end
    local typed = {["Authorization"] = headers["Authorization"]}
    typed["Content-Type"] = args[first] == "POST" and "application/json" or "application/octet-stream"
    table.insert(requests, {args[first], args[first + 1], body and typed or headers, body})
  end
end

function request()
  turn = turn % #requests + 1
  number = number + 1
  local chosen = requests[turn]
  local path = chosen[2]:gsub("{n}", stamp .. "-" .. number)
  return wrk.format(chosen[1], path, chosen[3], chosen[4])
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
