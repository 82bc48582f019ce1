-- Named blocks, read by notify_server/store/sql.py. Rows are locked after those of queries.sql, in this order: batches,
-- endpoints by name, deliveries by id.

-- The batches are locked: they have just got their verdicts.
-- name: verdict_batches
UPDATE batch SET revision = revision + 1, last_event = verdict, last_verdict = verdict
FROM (SELECT id, last_verdict AS previous FROM batch WHERE id = ANY($1::bigint[])) AS before
WHERE batch.id = before.id AND batch.last_event IS DISTINCT FROM batch.verdict
RETURNING
    batch.id, batch_id, api_code, verdict, previous, revision, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1);

-- name: missing
SELECT
    found.batch, found.oss_object_name, found.state, found.reason, found.http_status, found.attempts,
    (SELECT started_at FROM attempt WHERE attempt.file = found.id ORDER BY id DESC LIMIT 1),
    found.vendor_request_id
FROM unnest($1::bigint[]) AS wanted (batch)
CROSS JOIN LATERAL (
    SELECT id, batch, oss_object_name, state, reason, http_status, attempts, vendor_request_id FROM file
    WHERE file.batch = wanted.batch AND state <> 'available'
    ORDER BY oss_object_name
    LIMIT $2
) AS found;

-- name: events_insert
INSERT INTO event (key, type, batch, revision, occurred_at, payload)
SELECT key, type, batch, revision, occurred_at, payload
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[]) WITH ORDINALITY
    AS fresh (key, type, batch, revision, occurred_at, payload, place)
ORDER BY place
RETURNING id, key;

-- name: had_problem
SELECT DISTINCT batch, endpoint FROM forward
WHERE batch = ANY($1::bigint[]) AND endpoint = ANY($2::text[])
    AND (SELECT type FROM event WHERE event.id = forward.event) <> 'batch.expiring'
    AND (state = 'delivered' OR state = 'pending' AND claimed_by IS NOT NULL);

-- A delivery that is under way is left: its outcome decides.
-- name: supersede
UPDATE forward SET state = 'superseded', next_attempt_at = NULL
FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS newer (batch, endpoint, event)
WHERE forward.id = ANY(ARRAY(
        SELECT older.id
        FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS fresh (batch, endpoint, event)
        JOIN forward AS older ON older.batch = fresh.batch AND older.endpoint = fresh.endpoint
        WHERE older.state = 'pending' AND older.event < fresh.event AND older.claimed_by IS NULL
        ORDER BY older.id
        FOR NO KEY UPDATE OF older SKIP LOCKED
    ))
    AND forward.batch = newer.batch AND forward.endpoint = newer.endpoint
    AND (SELECT type FROM event WHERE event.id = forward.event)
        IN ('batch.at_risk', 'batch.complete', 'batch.incomplete');

-- name: forwards_insert
INSERT INTO forward (event, endpoint, batch, next_attempt_at)
SELECT event, endpoint, batch, next_attempt_at
FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[]) WITH ORDINALITY
    AS fresh (event, endpoint, batch, next_attempt_at, place)
ORDER BY place
RETURNING id;

-- name: retrying
UPDATE batch SET retrying = 1 WHERE id = ANY($1::bigint[]) AND retrying = 0;

-- name: at_risk_any
SELECT EXISTS (
    SELECT FROM batch
    WHERE retrying = 1 AND at_risk_at IS NULL AND first_received_at <= $1 AND verdict = 'pending'
);

-- One that another node looks at is left to it.
-- name: at_risk_candidates
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE id = ANY(ARRAY(
    SELECT id FROM batch
    WHERE retrying = 1 AND at_risk_at IS NULL AND first_received_at <= $1 AND verdict = 'pending'
    ORDER BY first_received_at
    LIMIT $2
))
    AND retrying = 1 AND at_risk_at IS NULL AND verdict = 'pending'
ORDER BY id
FOR NO KEY UPDATE SKIP LOCKED;

-- name: retrying_files
SELECT batch, attempts, max(next_attempt_at), min(next_attempt_at), bool_or(reason IS NOT NULL)
FROM file
WHERE batch = ANY($1::bigint[]) AND state = 'pending'
GROUP BY batch, attempts;

-- name: at_risk_written
UPDATE batch SET revision = revision + 1, last_event = 'at_risk', at_risk_at = $2 WHERE id = ANY($1::bigint[]);

-- name: not_retrying
UPDATE batch SET retrying = 0 WHERE id = ANY($1::bigint[]);

-- name: endpoints
SELECT name, types, api_codes, delay_ms, recoveries FROM endpoint ORDER BY name;

-- Servers with the old and the new configuration run side by side while they are restarted one after another, so what
-- only one of them has stays. Of a name that both have, the one that starts decides.
-- name: endpoints_set
INSERT INTO endpoint (name, types, api_codes, delay_ms, recoveries, wanted_until)
SELECT name, types, api_codes, delay_ms, recoveries, clock_timestamp() + $6::float8 * interval '1 second'
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[])
    AS configured (name, types, api_codes, delay_ms, recoveries)
ORDER BY name
ON CONFLICT (name) DO UPDATE
SET types = excluded.types,
    api_codes = excluded.api_codes,
    delay_ms = excluded.delay_ms,
    recoveries = excluded.recoveries,
    wanted_until = excluded.wanted_until;

-- name: endpoints_renew
UPDATE endpoint SET wanted_until = clock_timestamp() + $2::float8 * interval '1 second'
WHERE name = ANY(ARRAY(SELECT name FROM endpoint WHERE name = ANY($1::text[]) ORDER BY name FOR NO KEY UPDATE))
RETURNING name;

-- name: endpoints_unwanted
DELETE FROM endpoint
WHERE name = ANY(ARRAY(
    SELECT name FROM endpoint WHERE wanted_until < clock_timestamp() ORDER BY name FOR UPDATE
))
RETURNING name;

-- name: endpoints_cancel
UPDATE forward SET state = 'cancelled', next_attempt_at = NULL WHERE endpoint = ANY($1::text[]) AND state = 'pending';

-- name: endpoint_states
SELECT name, stopped_at, stopped_reason, failures, first_failed_at, last_success_at FROM endpoint ORDER BY name;

-- name: endpoints_lock
SELECT name, stopped_at, stopped_reason, failures, first_failed_at, last_success_at FROM endpoint
WHERE name = ANY($1::text[])
ORDER BY name
FOR NO KEY UPDATE;

-- name: endpoint_health
UPDATE endpoint
SET failures = $2, first_failed_at = $3, last_success_at = $4, stopped_at = $5, stopped_reason = $6
WHERE name = $1;

-- name: endpoint_pending
SELECT count(*) FROM (SELECT FROM forward WHERE endpoint = $1 AND state = 'pending' LIMIT 1000000) AS waiting;

-- What another node is claiming at this moment is skipped; what a dead node had is free.
-- name: claim
WITH due AS MATERIALIZED (
    SELECT found.id, found.place
    FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS wanted (endpoint, n, place)
    CROSS JOIN LATERAL (
        SELECT forward.id, wanted.place
        FROM forward
        WHERE forward.endpoint = wanted.endpoint AND state = 'pending' AND next_attempt_at <= $3
            AND (
                claimed_by IS NULL
                OR claimed_by <> ALL(ARRAY(SELECT node.id FROM node WHERE alive_until > clock_timestamp()))
            )
            AND NOT EXISTS (
                SELECT FROM forward AS older
                WHERE older.batch = forward.batch AND older.endpoint = forward.endpoint AND older.state = 'pending'
                    AND older.event < forward.event
            )
        ORDER BY next_attempt_at, forward.id
        LIMIT wanted.n
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS found
    WHERE (SELECT stopped_at IS NULL FROM endpoint WHERE name = wanted.endpoint)
        AND EXISTS (SELECT FROM node WHERE node.id = $4 AND alive_until > clock_timestamp())
),
claimed AS (
    UPDATE forward SET claimed_by = $4 FROM due WHERE forward.id = due.id
    RETURNING forward.id, event, forward.endpoint, batch, attempts, due.place, next_attempt_at
)
SELECT
    claimed.id, event.id, event.key, event.type, claimed.endpoint, claimed.batch, event.revision, event.occurred_at,
    event.payload, claimed.attempts, batch.batch_id
FROM claimed
JOIN event ON event.id = claimed.event
LEFT JOIN batch ON batch.id = claimed.batch
ORDER BY claimed.place, claimed.next_attempt_at, claimed.id;

-- name: next_at
SELECT
    endpoint,
    (
        SELECT next_attempt_at FROM forward
        WHERE forward.endpoint = wanted.endpoint AND state = 'pending' AND next_attempt_at > $2
        ORDER BY next_attempt_at LIMIT 1
    )
FROM unnest($1::text[]) AS wanted (endpoint)
WHERE (SELECT stopped_at IS NULL FROM endpoint WHERE name = wanted.endpoint);

-- name: release
UPDATE forward SET claimed_by = NULL WHERE id = ANY($1::bigint[]) AND claimed_by = $2;

-- name: record
UPDATE forward
SET state = result.state,
    attempts = result.attempts,
    next_attempt_at = result.next_attempt_at,
    last_status = result.status,
    last_error = result.error,
    last_response = result.response,
    delivered_at = result.delivered_at,
    claimed_by = NULL
FROM unnest(
    $1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::bigint[]
) AS result (id, state, attempts, next_attempt_at, status, error, response, delivered_at)
WHERE forward.id = result.id AND forward.state = 'pending' AND forward.claimed_by = $9
RETURNING forward.id;

-- name: record_lock
SELECT id FROM forward WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: record_superseded
UPDATE forward SET state = 'superseded', next_attempt_at = NULL
WHERE id = ANY($1::bigint[]) AND state = 'pending' AND batch IS NOT NULL
    AND (SELECT type FROM event WHERE event.id = forward.event)
        IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
    AND EXISTS (
        SELECT FROM forward AS newer
        JOIN event ON event.id = newer.event
        WHERE newer.batch = forward.batch AND newer.endpoint = forward.endpoint AND newer.event > forward.event
            AND newer.state IN ('pending', 'delivered')
            AND event.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
    );

-- name: attempts_trim
DELETE FROM forward_attempt
WHERE id = ANY(ARRAY(
    SELECT old.id
    FROM unnest($1::bigint[]) AS recorded (forward)
    CROSS JOIN LATERAL (
        SELECT id FROM forward_attempt WHERE forward_attempt.forward = recorded.forward ORDER BY id DESC OFFSET $2
    ) AS old
));

-- name: replay_events
SELECT event.id, event.batch, present.id, present.state
FROM event
LEFT JOIN batch ON batch.id = event.batch
LEFT JOIN LATERAL (
    SELECT forward.id, forward.state FROM forward
    WHERE forward.event = event.id AND forward.endpoint = $1 AND forward.batch IS NOT DISTINCT FROM event.batch
    ORDER BY forward.id DESC
    LIMIT 1
) AS present ON true
WHERE event.occurred_at >= $2 AND event.occurred_at < $3
    AND event.type = ANY($4::text[])
    -- Tests, and the failures of the endpoint itself, were not for it.
    AND event.type <> 'test.ping'
    AND (event.batch IS NOT NULL OR event.payload::json -> 'data' ->> 'endpoint' IS DISTINCT FROM $1)
    AND (
        cardinality($5::text[]) = 0
        OR batch.api_code = ANY($5::text[])
        -- An event of no batch is for everybody, but for batch.late.
        OR event.batch IS NULL AND coalesce(event.payload::json -> 'data' ->> 'api_code' = ANY($5::text[]), true)
    )
    AND NOT (
        event.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
        AND EXISTS (
            SELECT FROM event AS newer
            WHERE newer.batch = event.batch AND newer.revision > event.revision
                AND newer.type IN ('batch.at_risk', 'batch.complete', 'batch.incomplete')
                AND newer.type = ANY($4::text[])
        )
    )
ORDER BY event.id;

-- name: replay_again
UPDATE forward
SET state = 'pending', attempts = 0, next_attempt_at = $2, delivered_at = NULL
WHERE id = ANY($1::bigint[]) AND state <> 'pending';

-- name: open_problems
SELECT event.payload
FROM (
    SELECT max(forward.event) AS event FROM forward
    JOIN event ON event.id = forward.event AND event.type <> 'batch.expiring'
    WHERE endpoint = $1 AND state = 'delivered' AND forward.batch IS NOT NULL
    GROUP BY forward.batch
) AS newest
JOIN event ON event.id = newest.event
JOIN batch ON batch.id = event.batch
WHERE event.type IN ('batch.incomplete', 'batch.at_risk', 'batch.late', 'batch.short')
    AND (
        batch.verdict <> 'complete'
        OR EXISTS (SELECT FROM expectation WHERE expectation.batch = batch.id AND expectation.state = 'short')
    )
ORDER BY batch.batch_id
LIMIT 500;

-- Pruning

-- name: prune_attempts_of
DELETE FROM forward_attempt WHERE forward = ANY(ARRAY(SELECT id FROM forward WHERE batch = ANY($1::bigint[])));

-- name: prune_forwards_of
DELETE FROM forward WHERE batch = ANY($1::bigint[]);

-- name: prune_events_of
DELETE FROM event WHERE batch = ANY($1::bigint[]);

-- name: prune_plain
SELECT id FROM event WHERE occurred_at < $1 AND batch IS NULL ORDER BY occurred_at LIMIT $2;

-- name: prune_plain_attempts
DELETE FROM forward_attempt
WHERE forward = ANY(ARRAY(SELECT id FROM forward WHERE batch IS NULL AND event = ANY($1::bigint[])));

-- name: prune_plain_forwards
DELETE FROM forward WHERE batch IS NULL AND event = ANY($1::bigint[]);

-- name: prune_plain_events
DELETE FROM event WHERE id = ANY($1::bigint[]);
