-- Named blocks, read by notify_server/store/sql.py. `:rows` stands for as many parenthesised rows of parameters as
-- there are, so that one statement carries a whole group: the sqlite3 module gives up Python's lock at every step of a
-- statement, and beside a busy event loop getting it back can cost 5 ms. For the same reason reads that return many
-- rows return them as one JSON value.

-- name: accept
INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, traceparent, body)
SELECT column1, column2, column3, column4, column5, column6, column7, column8, CAST(column9 AS TEXT)
FROM (VALUES :rows)
WHERE column1 IS NOT NULL;

-- name: nonce_purge
DELETE FROM nonce WHERE expires_at < ?;

-- name: nonce_consume
INSERT OR IGNORE INTO nonce (key, expires_at) VALUES (?, ?);

-- name: reject
INSERT INTO rejection (received_at, remote_addr, code, detail, body, request_id)
SELECT * FROM (VALUES :rows) WHERE column1 IS NOT NULL;

-- name: rejection_replayed
DELETE FROM rejection WHERE id = ?;

-- name: rejection_size
SELECT count(*), coalesce(sum(length(body)), 0) FROM rejection;

-- name: rejection_newest
SELECT max(id) FROM rejection;

-- name: rejection_oldest
SELECT id, length(body) FROM rejection ORDER BY id LIMIT ?;

-- name: rejection_delete_through
DELETE FROM rejection WHERE id <= ?;

-- The inbox is expanded in the order of its ids, so what is left is its tail: found from the end, without an index.
-- name: inbox_start
SELECT coalesce((SELECT id FROM notification WHERE expanded_at IS NOT NULL ORDER BY id DESC LIMIT 1), 0);

-- name: inbox_files
SELECT coalesce(sum(files), 0) FROM notification WHERE id > ?;

-- name: inbox_end
SELECT coalesce(max(id), 0) FROM notification;

-- name: inbox
SELECT id, body, received_at, remote_addr, request_id, files, traceparent
FROM notification
WHERE id > ? AND id <= ?
ORDER BY id
LIMIT ?;

-- name: inbox_done
WITH done (id) AS (VALUES :rows)
UPDATE notification SET expanded_at = ? FROM done WHERE notification.id = done.id;

-- name: batch_of_discarded
SELECT batch.id
FROM notification
JOIN batch ON batch.batch_id = notification.batch_id AND batch.api_code = notification.api_code
WHERE notification.id = ? AND batch.expanding = notification.id;

-- name: batch_not_expanding
UPDATE batch SET expanding = NULL WHERE id = ?;

-- name: batch_insert
INSERT OR IGNORE INTO batch (batch_id, api_code, first_received_at, last_received_at)
SELECT * FROM (VALUES :rows) WHERE column1 IS NOT NULL;

-- name: batch_find
WITH wanted (batch_id, api_code) AS (VALUES :rows)
SELECT json_group_array(json_array(batch.id, batch.files, batch.batch_id, batch.api_code, batch.probed_again_at))
FROM wanted
CROSS JOIN batch ON batch.batch_id = wanted.batch_id AND batch.api_code = wanted.api_code;

-- A batch that had its verdict has none again while its files have changed.
-- name: batch_expanded
WITH merged (
    id, pending, available, unavailable, blocked, upload_failed, expanding, last, received_at, reopens, notification,
    probed_again_at, ends_at
) AS (VALUES :rows)
UPDATE batch
SET files = files + merged.pending + merged.available + merged.unavailable + merged.blocked + merged.upload_failed,
    pending = batch.pending + merged.pending,
    available = batch.available + merged.available,
    unavailable = batch.unavailable + merged.unavailable,
    blocked = batch.blocked + merged.blocked,
    upload_failed = batch.upload_failed + merged.upload_failed,
    expanding = merged.expanding,
    deliveries = deliveries + merged.last,
    last_notification = merged.notification,
    probed_again_at = merged.probed_again_at,
    ends_at = coalesce(min(batch.ends_at, merged.ends_at), batch.ends_at, merged.ends_at),
    first_received_at = min(first_received_at, merged.received_at),
    last_received_at = max(last_received_at, merged.received_at),
    completed_at = CASE WHEN merged.reopens THEN NULL ELSE completed_at END,
    verdict = CASE WHEN merged.reopens THEN 'pending' ELSE verdict END
FROM merged
WHERE batch.id = merged.id;

-- name: files_existing
SELECT json_group_array(json_array(id, oss_object_name, target_url, reported_status, state))
FROM file
WHERE batch = ? AND oss_object_name IN (SELECT value FROM json_each(?));

-- name: files_insert
INSERT INTO file (
    batch, oss_object_name, target_url, host, reported_status, state, reason, next_attempt_at, verified_at, expires_at
)
SELECT * FROM (VALUES :rows) WHERE column1 IS NOT NULL;

-- name: file_replace
UPDATE file
SET target_url = ?,
    host = ?,
    reported_status = ?,
    state = ?,
    reason = ?,
    next_attempt_at = ?,
    verified_at = ?,
    expires_at = ?,
    attempts = 0,
    http_status = NULL,
    content_length = NULL,
    content_type = NULL,
    etag = NULL,
    last_modified = NULL,
    final_url = NULL,
    remote_addr = NULL,
    elapsed_ms = NULL,
    vendor_request_id = NULL,
    vendor_code = NULL,
    headers = NULL,
    flags = NULL
WHERE id = ?;

-- name: recheck_find
SELECT json_group_array(json_array(id, batch, host, state))
FROM file
WHERE id IN (SELECT value FROM json_each(?)) AND state <> 'upload_failed' AND host <> '' AND reason IS NOT 'invalid_url';

-- name: recheck_files
UPDATE file
SET state = 'pending',
    reason = NULL,
    attempts = 0,
    next_attempt_at = ?,
    http_status = NULL,
    content_length = NULL,
    content_type = NULL,
    etag = NULL,
    last_modified = NULL,
    final_url = NULL,
    remote_addr = NULL,
    elapsed_ms = NULL,
    verified_at = NULL,
    vendor_request_id = NULL,
    vendor_code = NULL,
    headers = NULL,
    flags = NULL
WHERE id IN (SELECT value FROM json_each(?));

-- name: recheck_batches
WITH moved (id, available, unavailable, blocked) AS (VALUES :rows)
UPDATE batch
SET pending = batch.pending + moved.available + moved.unavailable + moved.blocked,
    available = batch.available - moved.available,
    unavailable = batch.unavailable - moved.unavailable,
    blocked = batch.blocked - moved.blocked,
    verdict = 'pending',
    completed_at = NULL
FROM moved
WHERE batch.id = moved.id;

-- Every host with pending files after the given one, and when its first is due: a seek of file_due for each host, never
-- a walk over its files.
-- name: due_hosts
WITH RECURSIVE pending_host (host) AS (
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > :after ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > pending_host.host ORDER BY host LIMIT 1)
    FROM pending_host
    WHERE pending_host.host IS NOT NULL
    LIMIT :limit
)
SELECT json_group_array(
    json_array(
        host,
        (SELECT min(next_attempt_at) FROM file WHERE state = 'pending' AND file.host = pending_host.host)
    )
)
FROM pending_host
WHERE host IS NOT NULL;

-- What waits for longer than any schedule says: a seek of file_due for each host.
-- name: late_files
WITH RECURSIVE pending_host (host) AS (
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > '' ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > pending_host.host ORDER BY host LIMIT 1)
    FROM pending_host
    WHERE pending_host.host IS NOT NULL
)
SELECT json_group_array(json_array(id, host))
FROM (
    SELECT file.id, file.host
    FROM pending_host CROSS JOIN file INDEXED BY file_due
        ON file.host = pending_host.host AND file.state = 'pending' AND file.next_attempt_at > :beyond
    LIMIT :limit
);

-- name: late_files_due
UPDATE file SET next_attempt_at = ? WHERE id IN (SELECT value FROM json_each(?));

-- name: late_deliveries_due
UPDATE forward SET next_attempt_at = ?
WHERE endpoint IN (SELECT name FROM endpoint) AND state = 'pending' AND next_attempt_at > ?;

-- name: claim
-- Those that are due at the same time as :id come first, for themselves: comparing both columns at once, SQLite would
-- walk over all of them again.
SELECT json_group_array(json_array(id, batch, target_url, attempts, oss_object_name, expires_at, next_attempt_at))
FROM (
    SELECT * FROM (
        SELECT id, batch, target_url, attempts, oss_object_name, expires_at, next_attempt_at
        FROM file
        WHERE state = 'pending' AND host = :host AND next_attempt_at = :due AND id > :id
        ORDER BY id
        LIMIT :most
    )
    UNION ALL
    SELECT * FROM (
        SELECT id, batch, target_url, attempts, oss_object_name, expires_at, next_attempt_at
        FROM file
        WHERE state = 'pending' AND host = :host AND next_attempt_at > :due AND next_attempt_at <= :now
        ORDER BY next_attempt_at
        LIMIT :most
    )
    LIMIT :most
);

-- name: record_files
WITH result (
    id, state, reason, attempts, next_attempt_at, http_status, content_length, content_type, etag, last_modified,
    final_url, remote_addr, elapsed_ms, verified_at, vendor_request_id, vendor_code, headers, flags
) AS (VALUES :rows)
UPDATE file
SET state = result.state,
    reason = result.reason,
    attempts = result.attempts,
    next_attempt_at = result.next_attempt_at,
    http_status = result.http_status,
    content_length = result.content_length,
    content_type = result.content_type,
    etag = result.etag,
    last_modified = result.last_modified,
    final_url = result.final_url,
    remote_addr = result.remote_addr,
    elapsed_ms = result.elapsed_ms,
    verified_at = result.verified_at,
    vendor_request_id = result.vendor_request_id,
    vendor_code = result.vendor_code,
    headers = result.headers,
    flags = result.flags
FROM result
WHERE file.id = result.id;

-- name: record_attempts
INSERT INTO attempt (
    file, started_at, method, url, http_status, reason, dns_ms, connect_ms, tls_ms, first_byte_ms, total_ms, remote_addr,
    vendor_request_id, vendor_code
)
SELECT * FROM (VALUES :rows) WHERE column1 IS NOT NULL;

-- name: attempts_trim
WITH bound (file, oldest) AS (
    SELECT value, (SELECT id FROM attempt WHERE attempt.file = value ORDER BY id DESC LIMIT 1 OFFSET :others)
    FROM json_each(:files)
)
DELETE FROM attempt
WHERE id IN (
    SELECT attempt.id FROM bound CROSS JOIN attempt ON attempt.file = bound.file AND attempt.id < bound.oldest
);

-- name: record_batches
WITH settled (id, available, unavailable, blocked) AS (VALUES :rows)
UPDATE batch
SET pending = batch.pending - settled.available - settled.unavailable - settled.blocked,
    available = batch.available + settled.available,
    unavailable = batch.unavailable + settled.unavailable,
    blocked = batch.blocked + settled.blocked
FROM settled
WHERE batch.id = settled.id;

-- name: verdicts
WITH changed (id) AS (VALUES :rows)
UPDATE batch
SET verdict = CASE WHEN available = files THEN 'complete' ELSE 'incomplete' END,
    completed_at = ?
FROM changed
WHERE batch.id = changed.id AND verdict = 'pending' AND pending = 0 AND expanding IS NULL
RETURNING
    batch.id, batch_id, api_code, verdict, files, available, first_received_at, completed_at,
    (SELECT request_id FROM notification WHERE notification.id = last_notification),
    (SELECT traceparent FROM notification WHERE notification.id = last_notification);

-- name: backlog
SELECT coalesce(sum(pending), 0) FROM batch;

-- name: heartbeat
INSERT INTO heartbeat (id, checked_at) VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET checked_at = excluded.checked_at;

-- name: prune_batches
SELECT id FROM batch WHERE completed_at < ? AND expanding IS NULL ORDER BY completed_at LIMIT ?;

-- name: prune_files
SELECT id, state, (SELECT count(*) FROM attempt WHERE attempt.file = file.id) FROM file WHERE batch = ? LIMIT ?;

-- name: prune_attempts_of
DELETE FROM attempt WHERE file IN (SELECT value FROM json_each(?));

-- name: prune_files_of
DELETE FROM file WHERE id IN (SELECT value FROM json_each(?));

-- name: prune_counted
UPDATE batch
SET files = files - ?,
    available = available - ?,
    unavailable = unavailable - ?,
    blocked = blocked - ?,
    upload_failed = upload_failed - ?
WHERE id = ?;

-- name: prune_batch
DELETE FROM batch WHERE id = ? AND files = 0;

-- Oldest first and only from the front, so that it costs what it deletes.
-- name: prune_notifications
DELETE FROM notification
WHERE id <= (SELECT max(id) FROM (SELECT id FROM notification ORDER BY id LIMIT :limit))
    AND received_at < :before
    AND expanded_at IS NOT NULL;

-- name: prune_rejections
DELETE FROM rejection
WHERE id <= (SELECT max(id) FROM (SELECT id FROM rejection ORDER BY id LIMIT :limit)) AND received_at < :before;
