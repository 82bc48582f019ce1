-- A stream of different notifications of `files` files each, for wrk: `wrk … -s notification.lua URL -- FILES SALT`.
local sent, head, tail = 0, "", ""

function init(arguments)
    local entries = {}
    for file = 1, tonumber(arguments[1]) do
        local key = string.format("8ZAFUPII49GQN2AB/IMAGE/%d/L2FwdF9jb21tb24vb18xZmRsdXNzNWkx", file * 1234567)
        entries[file] = string.format(
            '{"status":"FINISHED","oss_object_name":"%s","target_url":"https://files.invalid/%s"}', key, key)
    end
    head = '{"batch_id":"b452c50b50614fd697aa6c2b75563de0.' .. arguments[2] .. "."
    tail = '","api_code":"rent.dcentralize.room.add","file_list":[' .. table.concat(entries, ",") .. "]}"
end

function request()
    sent = sent + 1
    return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, head .. sent .. tail)
end

function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        'RESULT {"requests":%d,"seconds":%f,"p50_ms":%f,"p99_ms":%f,"p999_ms":%f,"errors":%d}\n',
        summary.requests, summary.duration / 1e6,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency:percentile(99.9) / 1e3,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
