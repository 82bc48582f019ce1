-- The latest notification of each api_code, for [alert] quiet and the metrics. What the columns are for stands in
-- SQLite's migration of this name.

CREATE TABLE quiet_clock (
    id       bigint PRIMARY KEY CHECK (id = 1),
    ready_at bigint NOT NULL,
    away_ms  bigint NOT NULL
);

CREATE TABLE arrival (
    api_code    text COLLATE "C" PRIMARY KEY,
    received_at bigint,
    quiet_since bigint NOT NULL,
    told_at     bigint
);

-- One seek for each api_code, however many batches there are.
INSERT INTO arrival (api_code, received_at, quiet_since)
WITH RECURSIVE known (api_code) AS (
    (SELECT api_code FROM batch ORDER BY api_code LIMIT 1)
    UNION ALL
    SELECT (
        SELECT batch.api_code FROM batch WHERE batch.api_code > known.api_code ORDER BY batch.api_code LIMIT 1
    ) FROM known
    WHERE known.api_code IS NOT NULL
), latest AS (
    SELECT
        api_code,
        (SELECT max(first_received_at) FROM batch WHERE batch.api_code = known.api_code) AS received_at
    FROM known
    WHERE api_code IS NOT NULL
    LIMIT 1000
)
SELECT api_code, received_at, received_at FROM latest;
