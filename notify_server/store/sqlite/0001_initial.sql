-- Times are Unix milliseconds, UTC. Columns follow the platform's document where it has a name for them.

CREATE TABLE notification (
    -- AUTOINCREMENT: an id is never given twice, also when retention has deleted everything. What has been expanded is
    -- told from what has not by the order of ids.
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    batch_id    TEXT    NOT NULL,
    api_code    TEXT    NOT NULL,
    received_at INTEGER NOT NULL,
    remote_addr TEXT    NOT NULL,
    signature   TEXT    NOT NULL,
    request_id  TEXT    NOT NULL,
    files       INTEGER NOT NULL,
    expanded_at INTEGER,
    -- Last, so that the columns before it are read without walking the overflow pages of a large body.
    body        TEXT    NOT NULL
);

CREATE TABLE batch (
    id                INTEGER PRIMARY KEY,
    batch_id          TEXT    NOT NULL,
    api_code          TEXT    NOT NULL,
    first_received_at INTEGER NOT NULL,
    last_received_at  INTEGER NOT NULL,
    deliveries        INTEGER NOT NULL DEFAULT 0,
    verdict           TEXT    NOT NULL DEFAULT 'pending' CHECK (verdict IN ('pending', 'complete', 'incomplete')),
    completed_at      INTEGER,
    -- Files by state, kept with every change of a file: a verdict and a summary cost one row, however large the batch.
    files             INTEGER NOT NULL DEFAULT 0,
    pending           INTEGER NOT NULL DEFAULT 0,
    available         INTEGER NOT NULL DEFAULT 0,
    unavailable       INTEGER NOT NULL DEFAULT 0,
    blocked           INTEGER NOT NULL DEFAULT 0,
    upload_failed     INTEGER NOT NULL DEFAULT 0,
    -- The notification that is half expanded: there is no verdict before its last file is in.
    expanding         INTEGER,
    UNIQUE (batch_id, api_code),
    CHECK (files = pending + available + unavailable + blocked + upload_failed)
);

CREATE INDEX batch_completed ON batch (completed_at) WHERE completed_at IS NOT NULL;

CREATE TABLE file (
    id              INTEGER PRIMARY KEY,
    batch           INTEGER NOT NULL REFERENCES batch (id),
    oss_object_name TEXT    NOT NULL,
    target_url      TEXT,
    host            TEXT    NOT NULL,
    reported_status TEXT    NOT NULL CHECK (reported_status IN ('FINISHED', 'FAILED')),
    state           TEXT    NOT NULL
                    CHECK (state IN ('pending', 'available', 'unavailable', 'blocked', 'upload_failed')),
    reason          TEXT,
    attempts        INTEGER NOT NULL DEFAULT 0,
    next_attempt_at INTEGER,
    http_status     INTEGER,
    content_length  INTEGER,
    content_type    TEXT,
    etag            TEXT,
    last_modified   TEXT,
    final_url       TEXT,
    remote_addr     TEXT,
    elapsed_ms      REAL,
    verified_at     INTEGER,
    UNIQUE (batch, oss_object_name)
);

-- What is due, host by host: hosts take turns, and none can stand before the others.
CREATE INDEX file_due ON file (host, next_attempt_at) WHERE state = 'pending';

CREATE TABLE attempt (
    id            INTEGER PRIMARY KEY,
    file          INTEGER NOT NULL REFERENCES file (id),
    started_at    INTEGER NOT NULL,
    method        TEXT    NOT NULL,
    url           TEXT,
    http_status   INTEGER,
    reason        TEXT,
    dns_ms        REAL,
    connect_ms    REAL,
    tls_ms        REAL,
    first_byte_ms REAL,
    total_ms      REAL    NOT NULL,
    remote_addr   TEXT
);

CREATE INDEX attempt_file ON attempt (file);

CREATE TABLE rejection (
    id          INTEGER PRIMARY KEY,
    received_at INTEGER NOT NULL,
    remote_addr TEXT    NOT NULL,
    code        TEXT    NOT NULL,
    detail      TEXT    NOT NULL,
    body        BLOB    NOT NULL
);

CREATE TABLE nonce (
    key        TEXT    PRIMARY KEY,
    expires_at INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX nonce_expires ON nonce (expires_at);

-- One row, written to find out whether the store can commit.
CREATE TABLE heartbeat (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    checked_at INTEGER NOT NULL
);

CREATE VIEW batch_summary AS
SELECT batch_id,
       api_code,
       verdict,
       files,
       pending,
       available,
       unavailable,
       blocked,
       upload_failed,
       strftime('%Y-%m-%dT%H:%M:%fZ', first_received_at / 1000.0, 'unixepoch') AS first_received_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', completed_at / 1000.0, 'unixepoch')      AS completed_at
FROM batch;

CREATE VIEW file_result AS
SELECT batch.batch_id,
       batch.api_code,
       file.oss_object_name,
       file.target_url,
       file.state,
       file.reason,
       file.http_status,
       file.content_length,
       file.content_type,
       file.attempts,
       strftime('%Y-%m-%dT%H:%M:%fZ', file.verified_at / 1000.0, 'unixepoch') AS verified_at
FROM file
JOIN batch ON batch.id = file.batch;
