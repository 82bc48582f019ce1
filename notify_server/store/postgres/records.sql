-- What is read for people, in one short statement each. Every answer is one row, and what is in it JSON. `:walk` stands
-- for a SELECT along an index, of at most :most rows, and `:walk_keys` for the same of its :keys alone; `:left_out` for
-- what the index cannot seek. `:batch_item`, `:file_item`, `:rejection_item` and `:next` stand for the blocks of that
-- name, `:iso(x)` for a time as ISO text. What else begins with a colon is a parameter.

-- name: batch_item
json_build_object(
    'id', id, 'batch_id', batch_id, 'api_code', api_code, 'verdict', verdict, 'files', files, 'pending', pending,
    'available', available, 'unavailable', unavailable, 'blocked', blocked, 'upload_failed', upload_failed,
    'deliveries', deliveries, 'first_received_at', :iso(first_received_at), 'last_received_at', :iso(last_received_at),
    'completed_at', :iso(completed_at)
);

-- Where the walk ended that found less than was asked for, if it did not come to its own end: in the same statement,
-- so that both are of one moment.
-- name: next
CASE
    WHEN count(*) < CAST(:limit AS bigint)
    THEN (SELECT json_build_array(:keys) FROM (:walk_keys) AS walked LIMIT 1 OFFSET CAST(:most AS bigint) - 1)
END;

-- name: file_item
json_build_object(
    'id', id, 'batch', batch, 'batch_id', batch_id, 'api_code', api_code, 'oss_object_name', oss_object_name,
    'target_url', target_url, 'host', host, 'reported_status', reported_status, 'state', state, 'reason', reason,
    'attempts', attempts, 'next_attempt_at', :iso(next_attempt_at), 'http_status', http_status,
    'content_length', content_length, 'content_type', content_type, 'etag', etag, 'last_modified', last_modified,
    'final_url', final_url, 'remote_addr', remote_addr, 'elapsed_ms', elapsed_ms, 'verified_at', :iso(verified_at),
    'vendor_request_id', vendor_request_id, 'vendor_code', vendor_code, 'expires_at', :iso(expires_at),
    'headers', headers::json, 'flags', coalesce(flags, '[]')::json
);

-- name: rejection_item
json_build_object(
    'id', id, 'received_at', :iso(received_at), 'remote_addr', remote_addr, 'code', code, 'detail', detail,
    'request_id', request_id, 'size', length(body)
);

-- name: totals
SELECT json_build_object(
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
SELECT json_agg(api_code) FROM (SELECT api_code FROM known LIMIT :limit) AS first WHERE api_code IS NOT NULL;

-- name: attention
SELECT json_build_object(
    'batches', (
        SELECT count(*) FROM batch
        WHERE verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at)
    ),
    'rejections', (
        SELECT count(*) FROM rejection
        WHERE NOT EXISTS (SELECT 1 FROM acknowledgement WHERE acknowledgement.rejection = rejection.id)
    )
);

-- name: batches
SELECT json_agg(:batch_item), :next
FROM (SELECT * FROM (:walk LIMIT :most) AS walked WHERE :left_out LIMIT :limit) AS found;

-- name: batches_beginning
SELECT json_agg(:batch_item)
FROM (
    SELECT * FROM batch
    WHERE batch_id >= :text AND (CAST(:beyond AS text) IS NULL OR batch_id < :beyond)
    ORDER BY batch_id, api_code
    LIMIT :limit
) AS found;

-- name: batches_containing
SELECT json_agg(:batch_item)
FROM (
    SELECT * FROM (SELECT * FROM batch ORDER BY id DESC LIMIT :most) AS newest
    WHERE strpos(batch_id, :text) > 0
    LIMIT :limit
) AS found;

-- name: batches_of_request
SELECT json_agg(:batch_item)
FROM (
    SELECT batch.*
    FROM (SELECT batch_id, api_code, request_id FROM notification ORDER BY id DESC LIMIT :most) AS newest
    JOIN batch ON batch.batch_id = newest.batch_id AND batch.api_code = newest.api_code
    WHERE newest.request_id = :text
    LIMIT :limit
) AS found;

-- name: batch
SELECT :batch_item, last_notification, CASE WHEN verdict = 'incomplete' AND acknowledged_at >= completed_at THEN acknowledgement END
FROM batch WHERE id = :id;

-- name: delivery
SELECT json_build_object(
    'id', id, 'received_at', :iso(received_at), 'remote_addr', remote_addr, 'signature', signature,
    'request_id', request_id, 'files', files, 'traceparent', traceparent
)
FROM notification
WHERE id = :id;

-- The page is walked before it is joined: its order is that of the walk.
-- name: files
SELECT json_agg(:file_item), :next
FROM (
    SELECT found.*, batch.batch_id, batch.api_code
    FROM (SELECT * FROM (:walk LIMIT :most) AS walked WHERE :left_out LIMIT :limit) AS found
    JOIN batch ON batch.id = found.batch
    ORDER BY :found_order
) AS shown;

-- name: batch_files
SELECT (
    SELECT json_agg(:file_item)
    FROM (
        SELECT found.*, batch.batch_id, batch.api_code
        FROM (SELECT * FROM file WHERE :conditions ORDER BY :order LIMIT :limit OFFSET :offset) AS found
        JOIN batch ON batch.id = found.batch
        ORDER BY :order
    ) AS shown
), (SELECT count(*) FROM file WHERE :conditions);

-- name: batch_reasons
SELECT json_agg(json_build_object('reason', reason, 'files', files))
FROM (
    SELECT reason, count(*) AS files
    FROM file
    WHERE batch = :batch AND reason IS NOT NULL
    GROUP BY reason
    ORDER BY files DESC, reason
    LIMIT :limit
) AS counted;

-- name: file
SELECT :file_item
FROM (
    SELECT file.*, batch.batch_id, batch.api_code FROM file JOIN batch ON batch.id = file.batch WHERE file.id = :id
) AS found;

-- name: file_count
SELECT count(*) FROM :counted;

-- name: file_total
SELECT CAST(coalesce(sum(:column), 0) AS bigint) FROM batch WHERE :of;

-- A seek in each of the latest batches: an index of all keys would be as large as the keys, which are most of the file.
-- name: files_named
SELECT json_agg(:file_item)
FROM (
    SELECT file.*, latest.batch_id, latest.api_code
    FROM (SELECT id, batch_id, api_code FROM batch ORDER BY id DESC LIMIT :batches) AS latest
    CROSS JOIN LATERAL (
        SELECT * FROM file
        WHERE file.batch = latest.id AND file.oss_object_name >= :text
            AND (CAST(:beyond AS text) IS NULL OR file.oss_object_name < :beyond)
        ORDER BY file.oss_object_name
        LIMIT 1
    ) AS file
    ORDER BY latest.id DESC
    LIMIT :limit
) AS found;

-- name: files_containing
SELECT json_agg(:file_item)
FROM (
    SELECT found.*, batch.batch_id, batch.api_code
    FROM (
        SELECT * FROM (SELECT * FROM file ORDER BY id DESC LIMIT :most) AS newest
        WHERE target_url = :text OR strpos(oss_object_name, :text) > 0 OR strpos(oss_object_name, :source) > 0
        LIMIT :limit
    ) AS found
    JOIN batch ON batch.id = found.batch
    ORDER BY found.id DESC
) AS shown;

-- name: attempts
SELECT json_agg(
    json_build_object(
        'id', id, 'started_at', :iso(started_at), 'method', method, 'url', url, 'http_status', http_status,
        'reason', reason, 'dns_ms', dns_ms, 'connect_ms', connect_ms, 'tls_ms', tls_ms,
        'first_byte_ms', first_byte_ms, 'total_ms', total_ms, 'remote_addr', remote_addr,
        'vendor_request_id', vendor_request_id, 'vendor_code', vendor_code
    )
)
FROM (SELECT * FROM attempt WHERE file = :file ORDER BY id) AS made;

-- name: failures
SELECT json_agg(json_build_object(
    'reason', nullif(reason, ''), 'host', host, 'state', state, 'files', files,
    'new', CASE
        WHEN last_file IS NULL THEN files
        WHEN reason = '' THEN (
            SELECT count(*) FROM file
            WHERE file.state = found.state AND file.host = found.host AND file.id > last_file
                AND file.state <> 'pending' AND file.state <> 'available'
        )
        ELSE (
            SELECT count(*) FROM file
            WHERE file.reason = found.reason AND file.host = found.host AND file.state = found.state
                AND file.id > last_file
        )
    END,
    'acknowledged', CASE WHEN at IS NOT NULL THEN json_build_object('at', :iso(at), 'who', who, 'note', note) END
) ORDER BY files DESC, reason, host, state)
FROM (
    SELECT failing.reason, failing.host, failing.state, files, last_file, at, who, note
    FROM (
        SELECT reason, host, state, count(*) AS files
        FROM file
        WHERE reason IS NOT NULL
        GROUP BY reason, host, state
        UNION ALL
        SELECT '', host, state, count(*)
        FROM file
        WHERE state = 'upload_failed' AND state <> 'pending' AND state <> 'available'
        GROUP BY host, state
        ORDER BY 4 DESC, 1, 2, 3
        LIMIT :limit
    ) AS failing
    LEFT JOIN acknowledgement USING (reason, host, state)
) AS found;

-- name: backlog
SELECT json_agg(json_build_object('host', host, 'pending', pending, 'next_attempt_at', :iso(next_attempt_at)))
FROM (
    SELECT host, count(*) AS pending, min(next_attempt_at) AS next_attempt_at
    FROM file
    WHERE state = 'pending'
    GROUP BY host
    ORDER BY pending DESC, host
    LIMIT :limit
) AS waiting;

-- name: ended_sessions
SELECT json_agg(key) FROM nonce WHERE key >= :first AND key < :end;

-- name: rejections
SELECT json_agg(:rejection_item)
FROM (SELECT * FROM rejection WHERE id < :before ORDER BY id DESC LIMIT :limit) AS found;

-- name: rejections_of_request
SELECT json_agg(:rejection_item) FROM (SELECT * FROM rejection WHERE request_id = :text LIMIT :limit) AS found;

-- name: rejection
SELECT :rejection_item, body FROM rejection WHERE id = :id;

-- name: prunable
SELECT
    (SELECT count(*) FROM batch WHERE completed_at < :completed_before AND expanding IS NULL),
    (SELECT coalesce(sum(files), 0)::bigint FROM batch WHERE completed_at < :completed_before AND expanding IS NULL),
    (SELECT count(*) FROM rejection WHERE received_at < :rejected_before);
