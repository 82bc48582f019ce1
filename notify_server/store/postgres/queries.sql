-- Named blocks, read by notify_server/store/sql.py. Groups of rows come as one array for each column.
-- Rows are locked in this order, so that nodes do not wait for each other in a circle: batches by id, files by id,
-- leases.

-- Nodes and their leases. "Alive" is by the server's clock alone.

-- name: node_register
INSERT INTO node (id, name, alive_until, roles)
VALUES (nextval('node_id'), $1, clock_timestamp() + $2::float8 * interval '1 second', $3)
RETURNING id;

-- A dead node never revives: it registers again, under another id.
-- name: node_renew
UPDATE node SET alive_until = clock_timestamp() + $2::float8 * interval '1 second'
WHERE id = $1 AND alive_until > clock_timestamp()
RETURNING id;

-- name: node_leave
DELETE FROM node WHERE id = $1;

-- name: nodes_alive
SELECT id, roles FROM node WHERE alive_until > clock_timestamp() ORDER BY id;

-- Their names, and the seconds until their leases end.
-- name: nodes_named
SELECT name, ceil(extract(epoch FROM alive_until - clock_timestamp()))::int
FROM node
WHERE alive_until > clock_timestamp()
ORDER BY id;

-- name: leases_leave
DELETE FROM lease WHERE node = $1;

-- The node is a condition too: a lease that has changed hands meanwhile must stay.
-- name: leases_sweep
DELETE FROM lease
USING (
    SELECT held.file, held.node FROM lease AS held
    WHERE NOT EXISTS (SELECT FROM node WHERE node.id = held.node AND node.alive_until > clock_timestamp())
) AS dead
WHERE lease.file = dead.file AND lease.node = dead.node;

-- name: nodes_sweep
DELETE FROM node WHERE alive_until < clock_timestamp() - interval '1 hour';

-- Acceptance and refusal

-- name: accept
INSERT INTO notification (batch_id, api_code, received_at, remote_addr, signature, request_id, files, traceparent, body)
SELECT batch_id, api_code, received_at, remote_addr, signature, request_id, files, traceparent, body
FROM unnest(
    $1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::text[], $9::text[]
) WITH ORDINALITY AS delivery (
    batch_id, api_code, received_at, remote_addr, signature, request_id, files, traceparent, body, place
)
ORDER BY place
RETURNING id;

-- In the order of their keys, so that two nodes which are given the same ones do not wait for each other in a circle.
-- name: nonces_consume
INSERT INTO nonce AS known (key, expires_at)
SELECT key, expires_at FROM unnest($1::text[], $2::bigint[]) AS fresh (key, expires_at) ORDER BY key COLLATE "C"
ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at WHERE known.expires_at < $3
RETURNING key;

-- name: session_end
INSERT INTO nonce (key, expires_at) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING;

-- name: nonces_purge
DELETE FROM nonce
WHERE key = ANY(ARRAY(
    SELECT key FROM nonce WHERE expires_at < $1 ORDER BY expires_at LIMIT 10000 FOR UPDATE SKIP LOCKED
));

-- name: secret_keep
INSERT INTO secret (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING;

-- name: secret
SELECT value FROM secret WHERE name = $1;

-- name: rejections_replayed
DELETE FROM rejection WHERE id = ANY($1::bigint[]) RETURNING id;

-- name: reject
INSERT INTO rejection (received_at, remote_addr, code, detail, body, request_id)
SELECT received_at, remote_addr, code, detail, body, request_id
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[]) WITH ORDINALITY
    AS refused (received_at, remote_addr, code, detail, body, request_id, place)
ORDER BY place;

-- A walk over the kept rejections, which are bounded; reading the length of a body does not read the body.
-- name: rejections_bound
DELETE FROM rejection
WHERE id <= (
    SELECT max(id)
    FROM (
        SELECT id, count(*) OVER latest AS number, sum(length(body)) OVER latest AS bytes
        FROM rejection
        WINDOW latest AS (ORDER BY id DESC)
    ) AS kept
    WHERE number > $1 OR bytes > $2
);

-- The inbox

-- From an id on: expanded rows stay in the index until the table is vacuumed, and would be walked over.
-- name: inbox
SELECT id, body, received_at, remote_addr, request_id, files, traceparent
FROM notification
WHERE expanded_at IS NULL AND id >= $1
ORDER BY id
LIMIT $2;

-- name: inbox_waits
SELECT EXISTS (SELECT FROM notification WHERE expanded_at IS NULL AND id >= $1);

-- name: inbox_still
SELECT id FROM notification WHERE id = ANY($1::bigint[]) AND expanded_at IS NULL;

-- name: inbox_done
UPDATE notification SET expanded_at = $2 WHERE id = ANY($1::bigint[]) AND expanded_at IS NULL RETURNING id;

-- name: batch_of_discarded
SELECT batch.id
FROM notification
JOIN batch ON batch.batch_id = notification.batch_id AND batch.api_code = notification.api_code
WHERE notification.id = $1 AND batch.expanding = notification.id
FOR NO KEY UPDATE OF batch;

-- name: batch_not_expanding
UPDATE batch SET expanding = NULL WHERE id = $1;

-- Only one node expands, so no other adds a batch.
-- name: batches_insert
INSERT INTO batch (
    batch_id, api_code, first_received_at, last_received_at, deliveries, files, pending, available, unavailable,
    blocked, upload_failed, expanding, last_notification, ends_at
)
SELECT
    batch_id, api_code, received_at, received_at, CASE WHEN last THEN 1 ELSE 0 END,
    pending + available + unavailable + blocked + upload_failed,
    pending, available, unavailable, blocked, upload_failed, expanding, notification, ends_at
FROM unnest(
    $1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
    $9::boolean[], $10::bigint[], $11::bigint[], $12::bigint[]
) WITH ORDINALITY AS fresh (
    batch_id, api_code, pending, available, unavailable, blocked, upload_failed, expanding, last, received_at,
    notification, ends_at, place
)
ORDER BY place
RETURNING id, batch_id, api_code;

-- A look-up of each instead of a join, which for many might walk over all batches in their order.
-- name: batches_named
SELECT id, batch_id, api_code, probed_again_at FROM batch
WHERE id = ANY(ARRAY(
    SELECT (SELECT id FROM batch WHERE batch.batch_id = wanted.batch_id AND batch.api_code = wanted.api_code)
    FROM unnest($1::text[], $2::text[]) AS wanted (batch_id, api_code)
))
ORDER BY id
FOR NO KEY UPDATE;

-- name: batches_lock
SELECT id FROM batch WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- A batch loses its verdict while its files have changed.
-- name: batches_expanded
UPDATE batch
SET files = files + merged.pending + merged.available + merged.unavailable + merged.blocked + merged.upload_failed,
    pending = batch.pending + merged.pending,
    available = batch.available + merged.available,
    unavailable = batch.unavailable + merged.unavailable,
    blocked = batch.blocked + merged.blocked,
    upload_failed = batch.upload_failed + merged.upload_failed,
    expanding = merged.expanding,
    deliveries = deliveries + CASE WHEN merged.last THEN 1 ELSE 0 END,
    last_notification = merged.notification,
    probed_again_at = merged.probed_again_at,
    ends_at = least(batch.ends_at, merged.ends_at),
    first_received_at = least(first_received_at, merged.received_at),
    last_received_at = greatest(last_received_at, merged.received_at),
    completed_at = CASE WHEN merged.reopens THEN NULL ELSE completed_at END,
    verdict = CASE WHEN merged.reopens THEN 'pending' ELSE verdict END
FROM unnest(
    $1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::boolean[],
    $9::bigint[], $10::boolean[], $11::bigint[], $12::bigint[], $13::bigint[]
) AS merged (
    id, pending, available, unavailable, blocked, upload_failed, expanding, last, received_at, reopens, notification,
    probed_again_at, ends_at
)
WHERE batch.id = merged.id;

-- A look-up of each, for the same reason.
-- name: files_existing
SELECT batch, id, oss_object_name, target_url, reported_status, state FROM file
WHERE id = ANY(ARRAY(
    SELECT (SELECT id FROM file WHERE file.batch = wanted.batch AND file.oss_object_name = wanted.name)
    FROM unnest($1::bigint[], $2::text[]) AS wanted (batch, name)
))
ORDER BY id
FOR NO KEY UPDATE;

-- name: files_replace
UPDATE file
SET target_url = fresh.target_url,
    host = fresh.host,
    reported_status = fresh.reported_status,
    state = fresh.state,
    reason = fresh.reason,
    next_attempt_at = fresh.next_attempt_at,
    verified_at = fresh.verified_at,
    expires_at = fresh.expires_at,
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
FROM unnest(
    $1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::bigint[]
) AS fresh (id, target_url, host, reported_status, state, reason, next_attempt_at, verified_at, expires_at)
WHERE file.id = fresh.id;

-- Results in flight for these files are out of date. The lease stays until they have ended.
-- name: leases_restart
UPDATE lease SET restarted = true WHERE file = ANY($1::bigint[]);

-- Recheck

-- name: batches_of
SELECT batch FROM file WHERE id = ANY($1::bigint[]);

-- name: recheck_find
SELECT id, batch, host, state
FROM file
WHERE id = ANY($1::bigint[]) AND state <> 'upload_failed' AND host <> '' AND reason IS DISTINCT FROM 'invalid_url'
ORDER BY id
FOR NO KEY UPDATE;

-- name: recheck_files
UPDATE file
SET state = 'pending',
    reason = NULL,
    attempts = 0,
    next_attempt_at = $2,
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
WHERE id = ANY($1::bigint[]);

-- name: recheck_batches
UPDATE batch
SET pending = batch.pending + moved.available + moved.unavailable + moved.blocked,
    available = batch.available - moved.available,
    unavailable = batch.unavailable - moved.unavailable,
    blocked = batch.blocked - moved.blocked,
    verdict = 'pending',
    completed_at = NULL
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) AS moved (id, available, unavailable, blocked)
WHERE batch.id = moved.id;

-- Due files

-- Every host with pending files after the given one, and when its first is due: one seek of file_due for each host,
-- never a walk over its files.
-- name: due_hosts
WITH RECURSIVE pending_host (host) AS (
    (SELECT host FROM file WHERE state = 'pending' AND host > $1 ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > pending_host.host ORDER BY host LIMIT 1)
    FROM pending_host
    WHERE pending_host.host IS NOT NULL
)
SELECT
    host,
    (
        SELECT next_attempt_at FROM file
        WHERE state = 'pending' AND file.host = pending_host.host
        ORDER BY next_attempt_at LIMIT 1
    ) AS next_attempt_at
FROM pending_host
WHERE host IS NOT NULL
LIMIT $2;

-- What waits for longer than any schedule says: a seek of file_due for each host. What another node works on is skipped.
-- name: late_files_due
WITH RECURSIVE pending_host (host) AS (
    (SELECT host FROM file WHERE state = 'pending' AND host > '' ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT host FROM file WHERE state = 'pending' AND host > pending_host.host ORDER BY host LIMIT 1)
    FROM pending_host
    WHERE pending_host.host IS NOT NULL
),
late (id) AS (
    SELECT late_of_host.id
    FROM pending_host CROSS JOIN LATERAL (
        SELECT id FROM file
        WHERE state = 'pending' AND file.host = pending_host.host AND next_attempt_at > $1
        LIMIT $3
    ) AS late_of_host
    LIMIT $3
),
locked (id) AS (
    SELECT id FROM file
    WHERE id = ANY(ARRAY(SELECT id FROM late)) AND next_attempt_at > $1
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE file SET next_attempt_at = $2
WHERE id = ANY(ARRAY(SELECT id FROM locked))
RETURNING id, host;

-- name: late_deliveries_due
UPDATE forward SET next_attempt_at = $1
WHERE endpoint = ANY(ARRAY(SELECT name FROM endpoint)) AND state = 'pending' AND next_attempt_at > $2;

-- For all hosts at once; for each, from behind the position to which this node has claimed before, so that held files
-- are not read again and again. Files that another node is claiming at this moment are skipped. The SELECT may have
-- missed a lease committed since it began; a lease is taken over only from the dead node with which the SELECT has seen
-- it. One row at least: whether this node is alive.
-- name: claim
WITH me AS MATERIALIZED (
    SELECT EXISTS (SELECT FROM node WHERE id = $6 AND alive_until > clock_timestamp()) AS alive
),
due AS MATERIALIZED (
    SELECT found.*, wanted.place, (SELECT lease.node FROM lease WHERE lease.file = found.id) AS dead
    FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) WITH ORDINALITY
        AS wanted (host, n, after_time, after_id, place)
    CROSS JOIN LATERAL (
        SELECT id, batch, host, target_url, attempts, oss_object_name, expires_at, next_attempt_at
        FROM file
        WHERE state = 'pending'
            AND file.host = wanted.host
            AND next_attempt_at <= $5
            AND (next_attempt_at, id) > (wanted.after_time, wanted.after_id)
            -- A look-up of one lease for each file instead of a join, which might read all leases.
            AND (
                SELECT lease.node = ANY(ARRAY(SELECT node.id FROM node WHERE alive_until > clock_timestamp()))
                FROM lease
                WHERE lease.file = file.id
            ) IS NOT TRUE
        ORDER BY next_attempt_at, id
        LIMIT wanted.n
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS found
    WHERE (SELECT alive FROM me)
),
claimed AS (
    INSERT INTO lease (file, node, taken_from)
    SELECT id, $6, dead FROM due
    ON CONFLICT (file) DO UPDATE SET node = excluded.node, restarted = false, taken_from = excluded.taken_from
    WHERE lease.node = excluded.taken_from
    RETURNING file
)
SELECT
    me.alive, due.next_attempt_at, due.id, due.batch, due.host, due.target_url, due.attempts, due.oss_object_name,
    due.expires_at
FROM me
LEFT JOIN (due JOIN claimed ON claimed.file = due.id) ON true
ORDER BY due.place, due.next_attempt_at, due.id;

-- name: release
DELETE FROM lease WHERE file = ANY($1::bigint[]) AND node = $2;

-- name: leases_unknown
DELETE FROM lease WHERE node = $1 AND file <> ALL($2::bigint[]);

-- Record

-- Locks the rows to be written, in the one order, and ends the claims that this node still has. A row of each file has
-- its state, one of each ended claim whether its file was reset since: a reset has locked the batch, and the DELETE
-- sees everything committed until it reached the row.
-- name: record_begin
WITH locked_batch AS MATERIALIZED (
    SELECT id FROM batch WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE
),
locked AS MATERIALIZED (
    SELECT id, state FROM file
    WHERE id = ANY($2::bigint[]) AND (SELECT count(*) FROM locked_batch) >= 0
    ORDER BY id
    FOR NO KEY UPDATE
),
ended AS (
    DELETE FROM lease
    WHERE file = ANY(ARRAY(SELECT id FROM locked))
        AND node = $3
        AND EXISTS (SELECT FROM node WHERE node.id = $3 AND node.alive_until > clock_timestamp())
    RETURNING file, restarted
)
SELECT id, state, NULL::boolean AS restarted FROM locked
UNION ALL
SELECT file, NULL, restarted FROM ended;

-- The latest requests of each file are kept, including those just written.
-- name: record_files
WITH trimmed AS (
    DELETE FROM attempt
    WHERE id = ANY(ARRAY(
        SELECT old.id
        FROM unnest($1::bigint[]) AS recorded (file)
        CROSS JOIN LATERAL (
            SELECT id FROM attempt WHERE attempt.file = recorded.file ORDER BY id DESC OFFSET $19
        ) AS old
    ))
)
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
FROM unnest(
    $1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::text[],
    $9::text[], $10::text[], $11::text[], $12::text[], $13::float8[], $14::bigint[], $15::text[], $16::text[],
    $17::text[], $18::text[]
) AS result (
    id, state, reason, attempts, next_attempt_at, http_status, content_length, content_type, etag, last_modified,
    final_url, remote_addr, elapsed_ms, verified_at, vendor_request_id, vendor_code, headers, flags
)
WHERE file.id = result.id;

-- Counts the settled files, and returns the verdicts that are due then; with nothing settled only those. A batch with
-- pending files has no verdict, so one returned with a verdict has just got it.
-- name: batches_settled
UPDATE batch
SET pending = batch.pending - settled.files,
    available = batch.available + settled.available,
    unavailable = batch.unavailable + settled.unavailable,
    blocked = batch.blocked + settled.blocked,
    verdict = CASE
        WHEN batch.pending > settled.files OR expanding IS NOT NULL THEN 'pending'
        WHEN batch.available + settled.available = batch.files THEN 'complete'
        ELSE 'incomplete'
    END,
    completed_at = CASE WHEN batch.pending > settled.files OR expanding IS NOT NULL THEN NULL ELSE $5::bigint END
FROM (
    SELECT id, available, unavailable, blocked, available + unavailable + blocked AS files
    FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) AS each (id, available, unavailable, blocked)
) AS settled
WHERE batch.id = settled.id
    AND (settled.files > 0 OR verdict = 'pending' AND pending = 0 AND expanding IS NULL)
RETURNING
    batch.id, batch_id, api_code, verdict, batch.files, batch.available, first_received_at, completed_at,
    CASE WHEN verdict <> 'pending' THEN
        (SELECT request_id FROM notification WHERE notification.id = last_notification)
    END,
    CASE WHEN verdict <> 'pending' THEN
        (SELECT traceparent FROM notification WHERE notification.id = last_notification)
    END;

-- Housekeeping

-- A batch with pending files has no verdict.
-- name: backlog
SELECT
    (SELECT coalesce(sum(files), 0) FROM notification WHERE expanded_at IS NULL)
    + (SELECT coalesce(sum(pending), 0) FROM batch WHERE verdict = 'pending');

-- name: heartbeat
INSERT INTO heartbeat (id, checked_at) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET checked_at = excluded.checked_at;

-- As many of the oldest batches as have about this many files.
-- name: prune_batches
SELECT id, completed_at FROM batch
WHERE completed_at < $1
    AND expanding IS NULL
    AND id = ANY(ARRAY(
        SELECT id
        FROM (
            SELECT id, sum(files + 1) OVER (ORDER BY completed_at ROWS UNBOUNDED PRECEDING) - files AS through
            FROM (
                SELECT id, files, completed_at FROM batch
                WHERE completed_at < $1 AND expanding IS NULL
                ORDER BY completed_at
                LIMIT $2
            ) AS oldest
        ) AS counted
        WHERE through <= $2
    ))
ORDER BY id
FOR UPDATE;

-- name: prune_files
SELECT id, batch, state, (SELECT count(*) FROM attempt WHERE attempt.file = found.id)
FROM (
    SELECT file.id, file.batch, file.state
    FROM unnest($1::bigint[]) AS wanted (batch)
    CROSS JOIN LATERAL (SELECT id, batch, state FROM file WHERE file.batch = wanted.batch LIMIT $2) AS file
    LIMIT $2
) AS found;

-- name: prune_attempts_of
DELETE FROM attempt WHERE file = ANY($1::bigint[]);

-- name: prune_files_of
DELETE FROM file WHERE id = ANY($1::bigint[]);

-- name: prune_batches_of
DELETE FROM batch
USING unnest($1::bigint[], $2::bigint[]) AS gone (id, files)
WHERE batch.id = gone.id AND batch.files = gone.files
RETURNING batch.id;

-- name: prune_counted
UPDATE batch
SET files = files - $2,
    available = available - $3,
    unavailable = unavailable - $4,
    blocked = blocked - $5,
    upload_failed = upload_failed - $6
WHERE id = $1;

-- Oldest first and only from the front, so that the cost is that of the deleted rows.
-- name: prune_notifications
DELETE FROM notification
WHERE id <= (SELECT max(id) FROM (SELECT id FROM notification ORDER BY id LIMIT $2) AS oldest)
    AND received_at < $1
    AND expanded_at IS NOT NULL;

-- name: prune_rejections
DELETE FROM rejection
WHERE id <= (SELECT max(id) FROM (SELECT id FROM rejection ORDER BY id LIMIT $2) AS oldest) AND received_at < $1;
