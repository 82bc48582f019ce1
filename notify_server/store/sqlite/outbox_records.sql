-- Named blocks, read by notify_server/store/sql.py. Each returns one row: a JSON array of arrays.
-- `:delivery_array`, `:delivery_rows` and `:gate_array` stand for the blocks of that name.

-- name: events
SELECT json_group_array(json_array(id, key, type, revision, payload))
FROM (
    SELECT event.id, event.key, event.type, event.revision, event.payload
    FROM event
    LEFT JOIN batch ON batch.id = event.batch
    WHERE event.id > :after
        AND event.type IN (SELECT value FROM json_each(:types))
        AND (:api_code = '' OR coalesce(batch.api_code, json_extract(event.payload, '$.data.api_code')) = :api_code)
    ORDER BY event.id
    LIMIT :limit
) AS found;

-- name: last_event
SELECT coalesce(max(id), 0) FROM event;

-- name: delivery_array
json_group_array(json_array(id, endpoint, event, key, type, batch, batch_id, revision, occurred_at, state, attempts, next_attempt_at, last_status,
    last_error, last_response, delivered_at));

-- name: delivery_rows
SELECT
    forward.id, forward.endpoint, forward.event, event.key, event.type, forward.batch, batch.batch_id,
    event.revision, event.occurred_at, forward.state, forward.attempts, forward.next_attempt_at,
    forward.last_status, forward.last_error, forward.last_response, forward.delivered_at
FROM forward
JOIN event ON event.id = forward.event
LEFT JOIN batch ON batch.id = forward.batch;

-- name: gate_array
json_group_array(json_array(id, batch_id, api_code, verdict, revision, files, available, unavailable, blocked, upload_failed, pending,
    first_received_at, completed_at, at_risk_at, last_event,
    (SELECT reference FROM expectation WHERE expectation.batch = gated.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = gated.id ORDER BY expectation.id LIMIT 1)));

-- name: deliveries
SELECT :delivery_array
FROM (
    :delivery_rows
    WHERE forward.endpoint = :endpoint AND forward.id < :before AND (:state = '' OR forward.state = :state)
    ORDER BY forward.id DESC
    LIMIT :limit
) AS found;

-- name: delivery
SELECT :delivery_array
FROM (
    :delivery_rows
    WHERE forward.id = :id
) AS found;

-- name: of_batch
SELECT :delivery_array
FROM (
    :delivery_rows
    WHERE forward.batch = :batch
    ORDER BY forward.id
    LIMIT 100
) AS found;

-- name: payload
SELECT payload FROM event WHERE id = :id;

-- name: attempts
SELECT json_group_array(json_array(started_at, status, error, total_ms))
FROM (SELECT started_at, status, error, total_ms FROM forward_attempt WHERE forward = :id ORDER BY id) AS found;

-- name: waiting
SELECT json_group_array(
    json_object('name', name, 'pending', pending, 'oldest_at', oldest_at, 'failures', failures, 'stopped_at', stopped_at)
)
FROM (
    SELECT
        name, failures, stopped_at,
        (SELECT count(*) FROM forward WHERE forward.endpoint = endpoint.name AND state = 'pending') AS pending,
        (
            SELECT event.occurred_at FROM event
            WHERE event.id = (SELECT min(event) FROM forward WHERE forward.endpoint = endpoint.name AND state = 'pending')
        ) AS oldest_at
    FROM endpoint
    ORDER BY name
) AS found;

-- name: gate
SELECT :gate_array
FROM (
    SELECT * FROM batch
    WHERE batch_id = :batch_id AND (:api_code = '' OR api_code = :api_code)
    ORDER BY api_code
    LIMIT 2
) AS gated;

-- name: gate_of
SELECT :gate_array
FROM batch AS gated
WHERE id = :id;

-- name: missing
SELECT json_group_array(json_array(
    batch, oss_object_name, state, reason, http_status, attempts, last_attempt_at, vendor_request_id
))
FROM (
    SELECT
        batch, oss_object_name, state, reason, http_status, attempts,
        (SELECT started_at FROM attempt WHERE attempt.file = file.id ORDER BY id DESC LIMIT 1) AS last_attempt_at,
        vendor_request_id
    FROM file
    WHERE batch = :id AND state <> 'available'
    ORDER BY oss_object_name
    LIMIT :limit
) AS found;

-- name: ending
SELECT json_group_array(json_array(oss_object_name, expires_at, flags))
FROM file
WHERE batch = :id AND state IN ('pending', 'available') AND (expires_at > :now OR flags LIKE '%"deleted_on:%')
    AND (SELECT ends_at IS NOT NULL OR expiring_at IS NOT NULL FROM batch WHERE id = :id);

-- name: at_risk
SELECT json_array(
    (SELECT min(next_attempt_at) FROM file WHERE batch = :id AND state = 'pending'),
    (SELECT payload FROM event WHERE batch = :id AND type = 'batch.at_risk' ORDER BY revision DESC LIMIT 1)
);
