-- The latest notification of each api_code, for [alert] quiet and the metrics.

-- The clock of [alert] quiet, which stands still while no server is ready: one row, written every second.
CREATE TABLE quiet_clock (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    ready_at INTEGER NOT NULL,
    away_ms  INTEGER NOT NULL
);

CREATE TABLE arrival (
    -- Or a pattern of [alert] quiet of which no notification has come yet: received_at is NULL.
    api_code    TEXT    PRIMARY KEY,
    received_at INTEGER,
    -- The same on quiet_clock, and when batch.late was written since.
    quiet_since INTEGER NOT NULL,
    told_at     INTEGER
) WITHOUT ROWID;

-- One seek for each api_code, however many batches there are.
INSERT INTO arrival (api_code, received_at, quiet_since)
WITH RECURSIVE known (api_code) AS (
    SELECT min(api_code) FROM batch
    UNION ALL
    SELECT (SELECT min(api_code) FROM batch WHERE batch.api_code > known.api_code) FROM known
    WHERE known.api_code IS NOT NULL
    LIMIT 1000
), latest AS (
    SELECT
        api_code,
        (SELECT max(first_received_at) FROM batch WHERE batch.api_code = known.api_code) AS received_at
    FROM known
    WHERE api_code IS NOT NULL
)
SELECT api_code, received_at, received_at FROM latest;
