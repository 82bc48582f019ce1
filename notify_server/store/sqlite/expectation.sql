-- Named blocks, read by notify_server/store/sql.py.

-- name: clock
SELECT ready_at, away_ms FROM ready_clock;

-- name: clock_set
INSERT INTO ready_clock (id, ready_at, away_ms) VALUES (1, ?, ?)
ON CONFLICT (id) DO UPDATE SET ready_at = excluded.ready_at, away_ms = excluded.away_ms;

-- name: any_limit
SELECT 1 FROM expectation WHERE due_at IS NOT NULL LIMIT 1;

-- name: any
SELECT 1 FROM expectation LIMIT 1;

-- name: any_unmatched
SELECT EXISTS (SELECT 1 FROM expectation INDEXED BY expectation_unmatched WHERE batch IS NULL);

-- name: arrivals
SELECT id, batch_id, api_code, deliveries <= 1 AND first_received_at = last_received_at
FROM batch
WHERE id IN (SELECT value FROM json_each(?))
ORDER BY first_received_at, id;

-- name: named
SELECT expectation.*
FROM json_each(?) AS arrived
CROSS JOIN batch ON batch.id = arrived.value
CROSS JOIN expectation ON expectation.batch_id = batch.batch_id AND expectation.api_code = batch.api_code
WHERE expectation.batch IS NULL AND expectation.batch_id IS NOT NULL
ORDER BY expectation.id;

-- name: unnamed
SELECT * FROM expectation WHERE api_code = ? AND batch IS NULL AND batch_id IS NULL ORDER BY id LIMIT ?;

-- name: matched
SELECT batch FROM expectation WHERE batch IN (SELECT value FROM json_each(?));

-- name: match
UPDATE expectation SET batch = ?, matched_by = ?, due_at = ? WHERE id = ?;

-- name: known
SELECT * FROM expectation WHERE reference = ? AND api_code = ?;

-- name: insert
INSERT INTO expectation (
    reference, api_code, batch_id, files, keys, notify_by, verdict_by, state, matched_by, batch, created_at, away_ms,
    due_at
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: batch_named
SELECT id FROM batch WHERE batch_id = ? AND api_code = ?;

-- Batches are matched in the order of their arrival: none before the last one that was matched so is free.
-- name: free_batches
SELECT id FROM batch INDEXED BY batch_api_code
WHERE api_code = :api_code
    AND first_received_at >= max(:since, coalesce((
        SELECT last.first_received_at
        FROM (
            SELECT batch FROM expectation
            WHERE api_code = :api_code AND batch_id IS NULL AND batch IS NOT NULL
            ORDER BY id DESC
            LIMIT 1
        ) AS ordered
        JOIN batch AS last ON last.id = ordered.batch
    ), 0))
    AND NOT EXISTS (SELECT 1 FROM expectation WHERE expectation.batch = batch.id)
ORDER BY first_received_at
LIMIT 1;

-- name: judged
SELECT expectation.*, batch.files
FROM json_each(?) AS settled
CROSS JOIN expectation ON expectation.batch = settled.value
CROSS JOIN batch ON batch.id = expectation.batch
WHERE expectation.state <> 'met' AND batch.verdict <> 'pending'
ORDER BY expectation.id;

-- name: names
SELECT oss_object_name FROM file WHERE batch = ?;

-- name: outcome
UPDATE expectation SET state = ?, due_at = NULL WHERE id = ?;

-- Its next event is written although the verdict is the same.
-- name: rescued
UPDATE batch SET last_event = NULL WHERE id = ?;

-- name: next_revision
UPDATE batch SET revision = revision + 1 WHERE id = ? RETURNING batch_id, revision;

-- name: due
SELECT * FROM expectation WHERE due_at <= ? ORDER BY due_at LIMIT ?;

-- name: in_inbox
SELECT DISTINCT batch_id, api_code FROM notification
WHERE id > coalesce((SELECT id FROM notification WHERE expanded_at IS NOT NULL ORDER BY id DESC LIMIT 1), 0);

-- name: at_risk
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE id = ? AND verdict = 'pending' AND at_risk_at IS NULL;

-- name: remove
DELETE FROM expectation WHERE id = ?;

-- Pruning

-- name: prune_of
DELETE FROM expectation WHERE batch = ?;

-- name: prune_unmatched
DELETE FROM expectation
WHERE id IN (SELECT id FROM expectation INDEXED BY expectation_unmatched WHERE created_at < ? AND batch IS NULL AND due_at IS NULL LIMIT ?);
