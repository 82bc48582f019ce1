-- Named blocks, read by notify_server/store/sql.py. Rows are locked in this order: batches, expectations by id. Who
-- expands, and who registers, holds the advisory lock of expectations before: neither can miss what the other adds.

-- name: clock
SELECT ready_at, away_ms, EXISTS (SELECT FROM expectation WHERE due_at IS NOT NULL) FROM ready_clock;

-- name: clock_start
INSERT INTO ready_clock (id, ready_at, away_ms) VALUES (1, $1, 0)
ON CONFLICT (id) DO UPDATE SET ready_at = excluded.ready_at
WHERE NOT EXISTS (SELECT FROM expectation WHERE due_at IS NOT NULL);

-- name: clock_lock
SELECT ready_at, away_ms FROM ready_clock FOR UPDATE;

-- name: clock_set
UPDATE ready_clock SET ready_at = $1, away_ms = $2;

-- name: any_limit
SELECT EXISTS (SELECT FROM expectation WHERE due_at IS NOT NULL);

-- name: any_unmatched
SELECT EXISTS (SELECT FROM expectation WHERE batch IS NULL);

-- name: arrivals
SELECT id, batch_id, api_code, deliveries <= 1 AND first_received_at = last_received_at
FROM batch
WHERE id = ANY($1::bigint[])
ORDER BY first_received_at, id;

-- name: named
SELECT found.*
FROM unnest($1::bigint[]) AS arrived (id)
JOIN batch ON batch.id = arrived.id
CROSS JOIN LATERAL (
    SELECT * FROM expectation
    WHERE expectation.batch_id = batch.batch_id AND expectation.api_code = batch.api_code
        AND expectation.batch IS NULL AND expectation.batch_id IS NOT NULL
) AS found
ORDER BY found.id;

-- name: unnamed
SELECT found.*
FROM unnest($1::text[], $2::bigint[]) AS wanted (api_code, n)
CROSS JOIN LATERAL (
    SELECT * FROM expectation
    WHERE expectation.api_code = wanted.api_code AND batch IS NULL AND batch_id IS NULL
    ORDER BY id
    LIMIT wanted.n
) AS found;

-- name: matched
SELECT DISTINCT batch FROM expectation WHERE batch = ANY($1::bigint[]);

-- name: match
UPDATE expectation SET batch = fresh.batch, matched_by = fresh.matched_by, due_at = fresh.due_at
FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[]) AS fresh (batch, matched_by, due_at, id)
WHERE expectation.id = fresh.id AND expectation.batch IS NULL;

-- name: known
SELECT found.*
FROM unnest($1::text[], $2::text[]) AS wanted (reference, api_code)
CROSS JOIN LATERAL (
    SELECT * FROM expectation
    WHERE expectation.reference = wanted.reference AND expectation.api_code = wanted.api_code
) AS found;

-- name: insert
INSERT INTO expectation (
    reference, api_code, batch_id, files, keys, notify_by, verdict_by, state, matched_by, batch, created_at, away_ms,
    due_at
)
SELECT reference, api_code, batch_id, files, keys, notify_by, verdict_by, state, matched_by, batch, created_at, away_ms, due_at
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bigint[], $7::bigint[], $8::text[], $9::text[],
    $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[]
) WITH ORDINALITY AS fresh (
    reference, api_code, batch_id, files, keys, notify_by, verdict_by, state, matched_by, batch, created_at, away_ms,
    due_at, place
)
ORDER BY place
RETURNING *;

-- name: batches_named
SELECT batch.id, batch.batch_id, batch.api_code
FROM unnest($1::text[], $2::text[]) AS wanted (batch_id, api_code)
JOIN batch ON batch.batch_id = wanted.batch_id AND batch.api_code = wanted.api_code;

-- Batches are matched in the order of their arrival: none before the last one that was matched so is free.
-- name: free_batches
SELECT id FROM batch
WHERE api_code = $1
    AND first_received_at >= greatest($2::bigint, coalesce((
        SELECT last.first_received_at
        FROM (
            SELECT batch FROM expectation
            WHERE api_code = $1 AND batch_id IS NULL AND batch IS NOT NULL
            ORDER BY id DESC
            LIMIT 1
        ) AS ordered
        JOIN batch AS last ON last.id = ordered.batch
    ), 0))
    AND NOT EXISTS (SELECT FROM expectation WHERE expectation.batch = batch.id)
ORDER BY first_received_at, id
LIMIT $3;

-- name: batches_lock
SELECT id FROM batch WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: any_of
SELECT EXISTS (SELECT FROM expectation WHERE batch = ANY($1::bigint[]) AND state <> 'met');

-- The batches are locked.
-- name: judged
SELECT expectation.*, (SELECT files FROM batch WHERE batch.id = expectation.batch)
FROM expectation
WHERE batch = ANY($1::bigint[]) AND state <> 'met'
    AND (SELECT verdict FROM batch WHERE batch.id = expectation.batch) <> 'pending'
ORDER BY id;

-- name: names
SELECT oss_object_name FROM file WHERE batch = $1;

-- name: outcomes
UPDATE expectation SET state = fresh.state, due_at = NULL
FROM unnest($1::bigint[], $2::text[]) AS fresh (id, state)
WHERE expectation.id = fresh.id;

-- Their next event is written although the verdict is the same.
-- name: rescued
UPDATE batch SET last_event = NULL WHERE id = ANY($1::bigint[]);

-- name: next_revision
UPDATE batch SET revision = revision + 1 WHERE id = $1 RETURNING batch_id, revision;

-- name: due
SELECT id, batch FROM expectation WHERE due_at <= $1 ORDER BY due_at LIMIT $2;

-- What another node works on is left to it.
-- name: due_batches
SELECT id FROM batch WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED;

-- name: due_lock
SELECT * FROM expectation
WHERE id = ANY($1::bigint[]) AND due_at <= $2 AND (batch IS NULL OR batch = ANY($3::bigint[]))
ORDER BY id
FOR NO KEY UPDATE SKIP LOCKED;

-- name: in_inbox
SELECT DISTINCT batch_id, api_code FROM notification WHERE expanded_at IS NULL AND api_code = ANY($1::text[]);

-- name: at_risk
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE id = ANY($1::bigint[]) AND verdict = 'pending' AND at_risk_at IS NULL
ORDER BY id;

-- name: remove
DELETE FROM expectation WHERE id = $1;

-- Pruning

-- name: prune_of
DELETE FROM expectation WHERE batch = ANY($1::bigint[]);

-- name: prune_unmatched
DELETE FROM expectation
WHERE id = ANY(ARRAY(
    SELECT id FROM expectation WHERE created_at < $1 AND batch IS NULL AND due_at IS NULL LIMIT $2
));
