-- Submissions that a notification is expected for.

-- The clock of their limits stands still while no server is ready: one row, written every second while a limit is open.
CREATE TABLE ready_clock (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    ready_at INTEGER NOT NULL,
    away_ms  INTEGER NOT NULL
);

CREATE TABLE expectation (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    reference  TEXT    NOT NULL,
    api_code   TEXT    NOT NULL,
    batch_id   TEXT,
    files      INTEGER,
    -- A JSON list, NULL when the number of files alone is known.
    keys       TEXT,
    notify_by  INTEGER NOT NULL,
    verdict_by INTEGER NOT NULL,
    state      TEXT    NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'late', 'short', 'met')),
    matched_by TEXT    CHECK (matched_by IN ('batch_id', 'order')),
    batch      INTEGER REFERENCES batch (id),
    created_at INTEGER NOT NULL,
    -- Outages before created_at, and the next limit on the clock, which is a time without the outages before it.
    away_ms    INTEGER NOT NULL,
    due_at     INTEGER,
    UNIQUE (reference, api_code)
);

CREATE INDEX expectation_due ON expectation (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX expectation_named ON expectation (batch_id, api_code) WHERE batch_id IS NOT NULL;
CREATE INDEX expectation_unnamed ON expectation (api_code, id) WHERE batch IS NULL AND batch_id IS NULL;
CREATE INDEX expectation_ordered ON expectation (api_code, id) WHERE batch IS NOT NULL AND batch_id IS NULL;
CREATE INDEX expectation_batch ON expectation (batch) WHERE batch IS NOT NULL;
CREATE INDEX expectation_state ON expectation (state);
CREATE INDEX expectation_unmatched ON expectation (created_at) WHERE batch IS NULL;
