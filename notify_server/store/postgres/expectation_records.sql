-- Named blocks, read by notify_server/store/sql.py. Each returns one row: a JSON array of arrays.
-- `:expectation_array` and `:expectation_rows` stand for the blocks of that name.

-- name: expectation_array
json_agg(json_build_array(
    id, reference, api_code, batch_id, files, state, matched_by, notify_by, verdict_by, created_at, batch, verdict,
    listed
));

-- name: expectation_rows
SELECT
    expectation.id, reference, expectation.api_code, expectation.batch_id, expectation.files, expectation.state, matched_by,
    notify_by + coalesce((SELECT ready_clock.away_ms FROM ready_clock), 0) - expectation.away_ms AS notify_by,
    verdict_by + coalesce((SELECT ready_clock.away_ms FROM ready_clock), 0) - expectation.away_ms AS verdict_by,
    created_at, expectation.batch, batch.verdict, batch.files AS listed
FROM expectation
LEFT JOIN batch ON batch.id = expectation.batch;

-- name: expectations
SELECT :expectation_array
FROM (
    :expectation_rows
    WHERE expectation.id < :before:conditions
    ORDER BY expectation.id DESC
    LIMIT :limit
) AS found;

-- name: expectation
SELECT :expectation_array
FROM (
    :expectation_rows
    WHERE expectation.id = :id
) AS found;

-- name: expected
SELECT :expectation_array
FROM (
    :expectation_rows
    WHERE expectation.batch_id = :batch_id AND expectation.batch IS NULL
        AND (:api_code::text = '' OR expectation.api_code = :api_code)
    ORDER BY expectation.id
    LIMIT 2
) AS found;

-- name: of_batch
SELECT :expectation_array
FROM (
    :expectation_rows
    WHERE expectation.batch = :batch
    ORDER BY expectation.id
    LIMIT 100
) AS found;

-- name: counts
SELECT json_agg(json_build_object('state', state, 'number', number))
FROM (
    SELECT open.state, (SELECT count(*) FROM (
        SELECT FROM expectation WHERE expectation.state = open.state LIMIT 100000
    ) AS found) AS number
    FROM (VALUES ('waiting'), ('late'), ('short')) AS open (state)
) AS counted;

-- name: arrivals
SELECT json_agg(json_build_array(api_code, received_at, told_at))
FROM (
    SELECT api_code, received_at, told_at FROM arrival ORDER BY received_at DESC NULLS LAST, api_code LIMIT 1000
) AS latest;
