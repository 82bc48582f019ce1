-- What is read for people, in one short statement each, on a connection that cannot write. Every answer is one JSON
-- value, because each step of a statement gives up Python's lock and takes it back. `:walk` stands for a SELECT along an
-- index, of at most :most rows, and `:walk_keys` for the same of its :keys alone; `:left_out` for what the index cannot
-- seek. `:batch_item`, `:file_item` and `:next` stand for the blocks of that name, `:iso(x)` for a time as ISO text.
-- Indexes are named, and NOT INDEXED leaves the rowid alone: SQLite would rather sort, or walk over another index, as
-- long as it knows little of what the tables hold.

-- name: batch_item
json_object(
    'id', id, 'batch_id', batch_id, 'api_code', api_code, 'verdict', verdict, 'files', files, 'pending', pending,
    'available', available, 'unavailable', unavailable, 'blocked', blocked, 'upload_failed', upload_failed,
    'deliveries', deliveries, 'first_received_at', :iso(first_received_at), 'last_received_at', :iso(last_received_at),
    'completed_at', :iso(completed_at)
);

-- Where the walk ended that found less than was asked for, if it did not come to its own end: in the same statement,
-- so that both are of one moment.
-- name: next
CASE WHEN count(*) < :limit THEN (SELECT json_array(:keys) FROM (:walk_keys) LIMIT 1 OFFSET :most - 1) END;

-- name: file_item
json_object(
    'id', id, 'batch', batch, 'batch_id', batch_id, 'api_code', api_code, 'oss_object_name', oss_object_name,
    'target_url', target_url, 'host', host, 'reported_status', reported_status, 'state', state, 'reason', reason,
    'attempts', attempts, 'next_attempt_at', :iso(next_attempt_at), 'http_status', http_status,
    'content_length', content_length, 'content_type', content_type, 'etag', etag, 'last_modified', last_modified,
    'final_url', final_url, 'remote_addr', remote_addr, 'elapsed_ms', elapsed_ms, 'verified_at', :iso(verified_at),
    'vendor_request_id', vendor_request_id, 'vendor_code', vendor_code, 'expires_at', :iso(expires_at),
    'headers', json(headers), 'flags', json(coalesce(flags, '[]'))
);

-- name: rejection_item
json_object(
    'id', id, 'received_at', :iso(received_at), 'remote_addr', remote_addr, 'code', code, 'detail', detail,
    'request_id', request_id, 'size', length(body)
);

-- name: totals
SELECT json_object(
    'batches', count(*),
    'batches_pending', count(*) FILTER (WHERE verdict = 'pending'),
    'batches_complete', count(*) FILTER (WHERE verdict = 'complete'),
    'batches_incomplete', count(*) FILTER (WHERE verdict = 'incomplete'),
    'files', coalesce(sum(files), 0),
    'pending', coalesce(sum(pending), 0),
    'available', coalesce(sum(available), 0),
    'unavailable', coalesce(sum(unavailable), 0),
    'blocked', coalesce(sum(blocked), 0),
    'upload_failed', coalesce(sum(upload_failed), 0),
    'rejections', (SELECT count(*) FROM rejection),
    'oldest_pending_at',
    (SELECT :iso(first_received_at) FROM batch WHERE verdict = 'pending' ORDER BY batch.first_received_at LIMIT 1)
)
FROM batch;

-- name: api_codes
WITH RECURSIVE known (api_code) AS (
    SELECT min(api_code) FROM batch
    UNION ALL
    SELECT (SELECT min(batch.api_code) FROM batch WHERE batch.api_code > known.api_code)
    FROM known
    WHERE known.api_code IS NOT NULL
)
SELECT json_group_array(api_code) FROM (SELECT api_code FROM known LIMIT :limit) AS first WHERE api_code IS NOT NULL;

-- name: attention
SELECT json_object(
    'batches', (
        SELECT count(*) FROM batch INDEXED BY batch_attention
        WHERE verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at)
    ),
    'rejections', (
        SELECT count(*) FROM rejection
        WHERE NOT EXISTS (SELECT 1 FROM acknowledgement WHERE acknowledgement.rejection = rejection.id)
    )
);

-- name: batches
SELECT json_group_array(:batch_item), :next
FROM (SELECT * FROM (:walk LIMIT :most) WHERE :left_out LIMIT :limit);

-- name: batches_beginning
SELECT json_group_array(:batch_item)
FROM (
    SELECT * FROM batch
    WHERE batch_id >= :text AND batch_id < :text || char(1114111)
    ORDER BY batch_id, api_code
    LIMIT :limit
);

-- name: batches_containing
SELECT json_group_array(:batch_item)
FROM (
    SELECT * FROM (SELECT * FROM batch NOT INDEXED ORDER BY id DESC LIMIT :most)
    WHERE instr(batch_id, :text)
    LIMIT :limit
);

-- name: batches_of_request
SELECT json_group_array(:batch_item)
FROM (
    SELECT batch.*
    FROM (SELECT * FROM notification NOT INDEXED ORDER BY id DESC LIMIT :most) AS newest
    CROSS JOIN batch ON batch.batch_id = newest.batch_id AND batch.api_code = newest.api_code
    WHERE newest.request_id = :text
    LIMIT :limit
);

-- name: batch
SELECT :batch_item, last_notification, CASE WHEN verdict = 'incomplete' AND acknowledged_at >= completed_at THEN acknowledgement END
FROM batch WHERE id = :id;

-- name: delivery
SELECT json_object(
    'id', id, 'received_at', :iso(received_at), 'remote_addr', remote_addr, 'signature', signature,
    'request_id', request_id, 'files', files, 'traceparent', traceparent
)
FROM notification
WHERE id = :id;

-- name: files
SELECT json_group_array(:file_item), :next
FROM (
    SELECT found.*, batch.batch_id, batch.api_code
    FROM (SELECT * FROM (:walk LIMIT :most) WHERE :left_out LIMIT :limit) AS found
    CROSS JOIN batch NOT INDEXED ON batch.id = found.batch
);

-- name: batch_files
SELECT json_group_array(:file_item), (SELECT count(*) FROM file INDEXED BY sqlite_autoindex_file_1 WHERE :conditions)
FROM (
    SELECT found.*, batch.batch_id, batch.api_code
    FROM (
        SELECT * FROM file INDEXED BY sqlite_autoindex_file_1 WHERE :conditions ORDER BY :order LIMIT :limit OFFSET :offset
    ) AS found
    CROSS JOIN batch NOT INDEXED ON batch.id = found.batch
);

-- name: batch_reasons
SELECT json_group_array(json_object('reason', reason, 'files', files))
FROM (
    SELECT reason, count(*) AS files
    FROM file INDEXED BY sqlite_autoindex_file_1
    WHERE batch = :batch AND reason IS NOT NULL
    GROUP BY reason
    ORDER BY files DESC, reason
    LIMIT :limit
);

-- name: file
SELECT :file_item
FROM (
    SELECT file.*, batch.batch_id, batch.api_code
    FROM file
    CROSS JOIN batch NOT INDEXED ON batch.id = file.batch
    WHERE file.id = :id
);

-- name: file_count
SELECT count(*) FROM :counted;

-- name: file_total
SELECT coalesce(sum(:column), 0) FROM batch WHERE :of;

-- A seek in each of the latest batches: an index of all keys would be as large as the keys, which are most of the file.
-- name: files_named
SELECT json_group_array(:file_item)
FROM (
    SELECT file.*, latest.batch_id, latest.api_code
    FROM (SELECT id, batch_id, api_code FROM batch NOT INDEXED ORDER BY id DESC LIMIT :batches) AS latest
    CROSS JOIN file NOT INDEXED ON file.id = (
        SELECT named.id FROM file AS named
        WHERE named.batch = latest.id
            AND named.oss_object_name >= :text AND named.oss_object_name < :text || char(1114111)
        ORDER BY named.oss_object_name
        LIMIT 1
    )
    LIMIT :limit
);

-- name: files_containing
SELECT json_group_array(:file_item)
FROM (
    SELECT found.*, batch.batch_id, batch.api_code
    FROM (
        SELECT * FROM (SELECT * FROM file NOT INDEXED ORDER BY id DESC LIMIT :most)
        WHERE target_url = :text OR instr(oss_object_name, :text) OR instr(oss_object_name, :source)
        LIMIT :limit
    ) AS found
    CROSS JOIN batch NOT INDEXED ON batch.id = found.batch
);

-- name: attempts
SELECT json_group_array(
    json_object(
        'id', id, 'started_at', :iso(started_at), 'method', method, 'url', url, 'http_status', http_status,
        'reason', reason, 'dns_ms', dns_ms, 'connect_ms', connect_ms, 'tls_ms', tls_ms,
        'first_byte_ms', first_byte_ms, 'total_ms', total_ms, 'remote_addr', remote_addr,
        'vendor_request_id', vendor_request_id, 'vendor_code', vendor_code
    )
)
FROM (SELECT * FROM attempt WHERE file = :file ORDER BY id);

-- name: failures
SELECT json_group_array(json_object(
    'reason', nullif(reason, ''), 'host', host, 'state', state, 'files', files,
    'new', CASE
        WHEN last_file IS NULL THEN files
        WHEN reason = '' THEN (
            SELECT count(*) FROM file INDEXED BY file_missing
            WHERE file.state = found.state AND file.host = found.host AND file.id > last_file
                AND file.state <> 'pending' AND file.state <> 'available'
        )
        ELSE (
            SELECT count(*) FROM file INDEXED BY file_failing
            WHERE file.reason = found.reason AND file.host = found.host AND file.state = found.state
                AND file.id > last_file
        )
    END,
    'acknowledged', json(CASE WHEN at IS NOT NULL THEN json_object('at', :iso(at), 'who', who, 'note', note) END)
))
FROM (
    SELECT failing.reason, failing.host, failing.state, files, last_file, at, who, note
    FROM (
        SELECT reason, host, state, count(*) AS files
        FROM file
        WHERE reason IS NOT NULL
        GROUP BY reason, host, state
        UNION ALL
        SELECT '', host, state, count(*)
        FROM file INDEXED BY file_missing
        WHERE state = 'upload_failed' AND state <> 'pending' AND state <> 'available'
        GROUP BY host
        ORDER BY files DESC, 1, 2, 3
        LIMIT :limit
    ) AS failing
    LEFT JOIN acknowledgement USING (reason, host, state)
    ORDER BY files DESC, 1, 2, 3
) AS found;

-- name: backlog
SELECT json_group_array(json_object('host', host, 'pending', pending, 'next_attempt_at', :iso(next_attempt_at)))
FROM (
    SELECT host, count(*) AS pending, min(next_attempt_at) AS next_attempt_at
    FROM file
    WHERE state = 'pending'
    GROUP BY host
    ORDER BY pending DESC, host
    LIMIT :limit
);

-- name: ended_sessions
SELECT json_group_array(key) FROM nonce WHERE key >= :first AND key < :end;

-- name: rejections
SELECT json_group_array(:rejection_item)
FROM (SELECT * FROM rejection WHERE id < :before ORDER BY id DESC LIMIT :limit);

-- name: rejections_of_request
SELECT json_group_array(:rejection_item) FROM (SELECT * FROM rejection WHERE request_id = :text LIMIT :limit);

-- name: rejection
SELECT :rejection_item, body FROM rejection WHERE id = :id;

-- name: prunable
SELECT
    (SELECT count(*) FROM batch WHERE completed_at < :completed_before AND expanding IS NULL),
    (SELECT coalesce(sum(files), 0) FROM batch WHERE completed_at < :completed_before AND expanding IS NULL),
    (SELECT count(*) FROM rejection WHERE received_at < :rejected_before);
