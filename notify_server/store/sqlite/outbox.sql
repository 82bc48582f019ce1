-- Named blocks, read by notify_server/store/sql.py.

-- name: verdict_batches
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE id IN (SELECT value FROM json_each(?)) AND last_event IS NOT verdict;

-- name: verdict_written
UPDATE batch SET revision = revision + 1, last_event = verdict, last_verdict = verdict
WHERE id IN (SELECT value FROM json_each(?));

-- name: missing
SELECT
    batch, oss_object_name, state, reason, http_status, attempts,
    (SELECT started_at FROM attempt WHERE attempt.file = file.id ORDER BY id DESC LIMIT 1),
    vendor_request_id
FROM file
WHERE batch = ? AND state <> 'available'
ORDER BY oss_object_name
LIMIT ?;

-- name: event_insert
INSERT INTO event (key, type, batch, revision, occurred_at, payload)
VALUES (?, ?, ?, ?, ?, CAST(? AS TEXT));

-- name: forward_insert
INSERT INTO forward (event, endpoint, batch, next_attempt_at) VALUES (?, ?, ?, ?);

-- name: had_problem
SELECT 1 FROM forward
WHERE batch = :batch AND endpoint = :endpoint
    AND (SELECT type FROM event WHERE event.id = forward.event) <> 'batch.expiring'
    AND (state = 'delivered' OR state = 'pending' AND id IN (SELECT value FROM json_each(:sending)))
LIMIT 1;

-- A delivery that is under way is left: its outcome decides.
-- name: supersede
UPDATE forward SET state = 'superseded', next_attempt_at = NULL
WHERE batch = :batch AND endpoint = :endpoint AND state = 'pending' AND event < :event
    AND id NOT IN (SELECT value FROM json_each(:sending))
    AND (SELECT type FROM event WHERE event.id = forward.event)
        IN ('batch.at_risk', 'batch.complete', 'batch.incomplete');

-- name: retrying
UPDATE batch SET retrying = 1 WHERE id IN (SELECT value FROM json_each(?)) AND retrying = 0;

-- name: at_risk_candidates
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE retrying = 1 AND at_risk_at IS NULL AND first_received_at <= ? AND verdict = 'pending'
ORDER BY first_received_at
LIMIT ?;

-- name: retrying_files
SELECT attempts, max(next_attempt_at), min(next_attempt_at), max(reason IS NOT NULL)
FROM file
WHERE batch = ? AND state = 'pending'
GROUP BY attempts;

-- name: at_risk_written
UPDATE batch SET revision = revision + 1, last_event = 'at_risk', at_risk_at = ? WHERE id = ?;

-- name: not_retrying
UPDATE batch SET retrying = 0 WHERE id = ?;

-- name: endpoints
SELECT name, types, api_codes, delay_ms, recoveries FROM endpoint ORDER BY name;

-- name: endpoint_set
INSERT INTO endpoint (name, types, api_codes, delay_ms, recoveries) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (name) DO UPDATE
SET types = excluded.types,
    api_codes = excluded.api_codes,
    delay_ms = excluded.delay_ms,
    recoveries = excluded.recoveries;

-- name: endpoint_remove
DELETE FROM endpoint WHERE name = ?;

-- name: endpoint_cancel
UPDATE forward SET state = 'cancelled', next_attempt_at = NULL WHERE endpoint = ? AND state = 'pending';

-- name: endpoint_states
SELECT name, stopped_at, stopped_reason, failures, first_failed_at, last_success_at FROM endpoint ORDER BY name;

-- name: endpoint_state
SELECT name, stopped_at, stopped_reason, failures, first_failed_at, last_success_at FROM endpoint WHERE name = ?;

-- name: endpoint_health
UPDATE endpoint
SET failures = ?, first_failed_at = ?, last_success_at = ?, stopped_at = ?, stopped_reason = ?
WHERE name = ?;

-- name: endpoint_pending
SELECT count(*) FROM (SELECT 1 FROM forward WHERE endpoint = ? AND state = 'pending' LIMIT 1000000);

-- name: claim
SELECT
    forward.id, event.id, event.key, event.type, forward.endpoint, forward.batch, event.revision, event.occurred_at,
    CAST(event.payload AS BLOB), forward.attempts, batch.batch_id
FROM forward
CROSS JOIN event ON event.id = forward.event
LEFT JOIN batch ON batch.id = forward.batch
WHERE forward.endpoint = :endpoint AND forward.state = 'pending' AND forward.next_attempt_at <= :now
    AND (SELECT stopped_at IS NULL FROM endpoint WHERE name = :endpoint)
    AND NOT EXISTS (
        SELECT 1 FROM forward AS older
        WHERE older.batch = forward.batch AND older.endpoint = forward.endpoint AND older.state = 'pending'
            AND older.event < forward.event
    )
ORDER BY forward.next_attempt_at
LIMIT :most;

-- name: next_at
SELECT min(next_attempt_at) FROM forward
WHERE endpoint = :endpoint AND state = 'pending' AND next_attempt_at > :now
    AND (SELECT stopped_at IS NULL FROM endpoint WHERE name = :endpoint);

-- name: record
UPDATE forward
SET state = ?, attempts = ?, next_attempt_at = ?, last_status = ?, last_error = ?, last_response = ?, delivered_at = ?
WHERE id = ? AND state = 'pending';

-- name: record_superseded
UPDATE forward SET state = 'superseded', next_attempt_at = NULL
WHERE id = ? AND state = 'pending' AND batch IS NOT NULL
    AND (SELECT type FROM event WHERE event.id = forward.event)
        IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
    AND EXISTS (
        SELECT 1 FROM forward AS newer
        JOIN event ON event.id = newer.event
        WHERE newer.batch = forward.batch AND newer.endpoint = forward.endpoint AND newer.event > forward.event
            AND newer.state IN ('pending', 'delivered')
            AND event.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
    );

-- name: record_attempt
INSERT INTO forward_attempt (forward, started_at, status, error, total_ms) VALUES (?, ?, ?, ?, ?);

-- name: attempts_trim
DELETE FROM forward_attempt
WHERE forward = :forward
    AND id < (SELECT id FROM forward_attempt WHERE forward = :forward ORDER BY id DESC LIMIT 1 OFFSET :others);

-- Of a batch only the newest event that supersedes others, among the types that the endpoint subscribes to.
-- name: replay_events
SELECT
    event.id, event.batch,
    (SELECT id FROM forward WHERE forward.event = event.id AND forward.endpoint = :endpoint
        AND forward.batch IS event.batch ORDER BY id DESC LIMIT 1),
    (SELECT state FROM forward WHERE forward.event = event.id AND forward.endpoint = :endpoint
        AND forward.batch IS event.batch ORDER BY id DESC LIMIT 1)
FROM event
LEFT JOIN batch ON batch.id = event.batch
WHERE event.occurred_at >= :since AND event.occurred_at < :until
    AND event.type IN (SELECT value FROM json_each(:types))
    -- Tests, and the failures of the endpoint itself, were not for it.
    AND event.type <> 'test.ping'
    AND (event.batch IS NOT NULL OR json_extract(event.payload, '$.data.endpoint') IS NOT :endpoint)
    AND (
        :api_codes = '[]'
        OR batch.api_code IN (SELECT value FROM json_each(:api_codes))
        OR event.batch IS NULL
        -- An event of no batch is for everybody, but for batch.late.
        AND coalesce(json_extract(event.payload, '$.data.api_code'), :api_codes) IN (
            SELECT value FROM json_each(:api_codes) UNION ALL SELECT :api_codes
        )
    )
    AND NOT (
        event.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
        AND EXISTS (
            SELECT 1 FROM event AS newer
            WHERE newer.batch = event.batch AND newer.revision > event.revision
                AND newer.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
                AND newer.type IN (SELECT value FROM json_each(:types))
        )
    )
ORDER BY event.id;

-- name: replay_again
UPDATE forward
SET state = 'pending', attempts = 0, next_attempt_at = ?, delivered_at = NULL
WHERE id = ?;

-- Of each batch the newest delivered event, if it is a problem and the batch is not complete. That files end soon is a
-- warning, which nothing ends.
-- name: open_problems
SELECT CAST(event.payload AS BLOB)
FROM (
    SELECT max(forward.event) AS event FROM forward
    JOIN event ON event.id = forward.event AND event.type <> 'batch.expiring'
    WHERE endpoint = ? AND state = 'delivered' AND forward.batch IS NOT NULL
    GROUP BY forward.batch
) AS newest
JOIN event ON event.id = newest.event
JOIN batch ON batch.id = event.batch
WHERE event.type IN ('batch.incomplete', 'batch.at_risk', 'batch.late', 'batch.short')
    AND (
        batch.verdict <> 'complete'
        OR EXISTS (SELECT 1 FROM expectation WHERE expectation.batch = batch.id AND expectation.state = 'short')
    )
ORDER BY batch.batch_id
LIMIT 500;

-- Pruning

-- name: prune_attempts_of
DELETE FROM forward_attempt WHERE forward IN (SELECT id FROM forward WHERE batch = ?);

-- name: prune_forwards_of
DELETE FROM forward WHERE batch = ?;

-- name: prune_events_of
DELETE FROM event WHERE batch = ?;

-- name: prune_plain
SELECT id FROM event WHERE occurred_at < ? AND batch IS NULL ORDER BY occurred_at LIMIT ?;

-- name: prune_plain_attempts
DELETE FROM forward_attempt
WHERE forward IN (SELECT id FROM forward WHERE batch IS NULL AND event IN (SELECT value FROM json_each(?)));

-- name: prune_plain_forwards
DELETE FROM forward WHERE batch IS NULL AND event IN (SELECT value FROM json_each(?));

-- name: prune_plain_events
DELETE FROM event WHERE id IN (SELECT value FROM json_each(?));
