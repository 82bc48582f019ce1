-- Events, and their deliveries to endpoints.

-- `last_event` is the type of the batch's newest event among at_risk, complete and incomplete, without `batch.`;
-- `last_verdict` the verdict of the newest event that had one.
ALTER TABLE batch ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batch ADD COLUMN last_event TEXT;
ALTER TABLE batch ADD COLUMN last_verdict TEXT;
ALTER TABLE batch ADD COLUMN at_risk_at INTEGER;
-- 1 when an attempt at one of its files failed: only these can be at risk, so only these are looked at every second.
ALTER TABLE batch ADD COLUMN retrying INTEGER NOT NULL DEFAULT 0;
CREATE INDEX batch_retrying ON batch (first_received_at) WHERE retrying = 1 AND at_risk_at IS NULL AND verdict = 'pending';

CREATE TABLE event (
    -- AUTOINCREMENT: callers keep the last id that they have seen, so none may be used again.
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    key         TEXT    NOT NULL UNIQUE,
    type        TEXT    NOT NULL,
    batch       INTEGER REFERENCES batch (id),
    revision    INTEGER NOT NULL DEFAULT 0,
    occurred_at INTEGER NOT NULL,
    payload     TEXT    NOT NULL
);

CREATE UNIQUE INDEX event_batch ON event (batch, revision) WHERE batch IS NOT NULL;
CREATE INDEX event_occurred ON event (occurred_at);

CREATE TABLE forward (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    event           INTEGER NOT NULL REFERENCES event (id),
    endpoint        TEXT    NOT NULL,
    -- The event's, so that the deliveries of a batch are found without it.
    batch           INTEGER,
    state           TEXT    NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'delivered', 'failed', 'superseded', 'cancelled')),
    attempts        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at INTEGER,
    last_status     INTEGER,
    last_error      TEXT,
    last_response   TEXT,
    delivered_at    INTEGER
);

CREATE INDEX forward_due ON forward (endpoint, next_attempt_at) WHERE state = 'pending';
CREATE INDEX forward_endpoint ON forward (endpoint, id);
CREATE INDEX forward_batch ON forward (batch, endpoint) WHERE batch IS NOT NULL;
CREATE INDEX forward_event ON forward (event) WHERE batch IS NULL;

CREATE TABLE forward_attempt (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    forward    INTEGER NOT NULL REFERENCES forward (id),
    started_at INTEGER NOT NULL,
    status     INTEGER,
    error      TEXT,
    total_ms   REAL    NOT NULL
);

CREATE INDEX forward_attempt_forward ON forward_attempt (forward);

-- The endpoints that are configured. `types` and `api_codes` are JSON lists.
CREATE TABLE endpoint (
    name            TEXT    PRIMARY KEY,
    types           TEXT    NOT NULL,
    api_codes       TEXT    NOT NULL,
    delay_ms        INTEGER NOT NULL DEFAULT 0,
    recoveries      INTEGER NOT NULL DEFAULT 0,
    stopped_at      INTEGER,
    stopped_reason  TEXT,
    failures        INTEGER NOT NULL DEFAULT 0,
    first_failed_at INTEGER,
    last_success_at INTEGER
);
