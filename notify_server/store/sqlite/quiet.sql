-- Named blocks, read by notify_server/store/sql.py.

-- name: clock
SELECT ready_at, away_ms FROM quiet_clock;

-- name: clock_set
INSERT INTO quiet_clock (id, ready_at, away_ms) VALUES (1, ?, ?)
ON CONFLICT (id) DO UPDATE SET ready_at = excluded.ready_at, away_ms = excluded.away_ms;

-- The clock did not run before the watch began.
-- name: begin
UPDATE arrival SET quiet_since = ?;

-- name: come
UPDATE arrival SET received_at = :received_at, quiet_since = max(quiet_since, :quiet_since), told_at = NULL
WHERE api_code = :api_code;

-- name: insert
INSERT INTO arrival (api_code, received_at, quiet_since) VALUES (:api_code, :received_at, :quiet_since);

-- name: trim
DELETE FROM arrival WHERE api_code IN (SELECT api_code FROM arrival ORDER BY quiet_since DESC LIMIT -1 OFFSET ?);

-- name: arrivals
SELECT api_code, received_at, quiet_since, told_at FROM arrival;

-- name: told
UPDATE arrival SET told_at = ? WHERE api_code = ?;
