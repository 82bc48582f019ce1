-- Named blocks, read by notify_server/store/sql.py. The row of the clock is locked before those of arrivals.

-- name: clock_begin
INSERT INTO quiet_clock (id, ready_at, away_ms) VALUES (1, $1, 0) ON CONFLICT (id) DO NOTHING RETURNING id;

-- name: clock_lock
SELECT ready_at, away_ms FROM quiet_clock FOR UPDATE;

-- name: clock_set
UPDATE quiet_clock SET ready_at = $1, away_ms = $2;

-- The clock did not run before the watch began.
-- name: begin
UPDATE arrival SET quiet_since = $1;

-- The time on the clock is that of expect.clock.ReadyClock.at; $3 and $4 are its limits.
-- name: come
INSERT INTO arrival (api_code, received_at, quiet_since)
SELECT
    fresh.api_code,
    fresh.received_at,
    coalesce((
        SELECT CASE
            WHEN fresh.received_at - ready_at BETWEEN $3::bigint AND $4::bigint THEN fresh.received_at
            ELSE ready_at
        END - away_ms
        FROM quiet_clock
    ), fresh.received_at)
FROM unnest($1::text[], $2::bigint[]) AS fresh (api_code, received_at)
ORDER BY fresh.api_code
ON CONFLICT (api_code) DO UPDATE SET
    received_at = excluded.received_at, quiet_since = greatest(arrival.quiet_since, excluded.quiet_since), told_at = NULL
-- A row that was inserted, and not updated, has no xmax.
RETURNING xmax = 0;

-- name: insert
INSERT INTO arrival (api_code, quiet_since) SELECT unnest($1::text[]), $2 ON CONFLICT (api_code) DO NOTHING;

-- name: trim
DELETE FROM arrival WHERE api_code = ANY(ARRAY(SELECT api_code FROM arrival ORDER BY quiet_since DESC OFFSET $1));

-- name: arrivals
SELECT api_code, received_at, quiet_since, told_at FROM arrival;

-- name: inbox
SELECT DISTINCT api_code FROM notification WHERE expanded_at IS NULL;

-- A notification that was merged meanwhile has ended the silence.
-- name: told
UPDATE arrival SET told_at = $4
FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS silent (api_code, received_at, quiet_since)
WHERE arrival.api_code = silent.api_code AND arrival.told_at IS NULL
    AND arrival.received_at IS NOT DISTINCT FROM silent.received_at AND arrival.quiet_since = silent.quiet_since
RETURNING arrival.api_code;
