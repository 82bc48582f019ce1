-- Actions of people: one row for each recheck, replay, prune, acknowledgement, stop, start, test or deletion.
CREATE TABLE action (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    at     INTEGER NOT NULL,
    -- The channel and the caller: `page 192.0.2.7`, `api 192.0.2.7`, `command root`.
    who    TEXT    NOT NULL,
    what   TEXT    NOT NULL,
    -- A JSON object: the filter or the subject.
    filter TEXT    NOT NULL,
    -- How many files (or rows, deliveries) the action changed, NULL when it changes none.
    files  INTEGER
);

-- An acknowledgement of incomplete batches (they refer to it), of a rejection, or of a group of failing files.
CREATE TABLE acknowledgement (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    at        INTEGER NOT NULL,
    who       TEXT    NOT NULL,
    note      TEXT    NOT NULL,
    rejection INTEGER UNIQUE,
    -- The group; files with an id above last_file are new. An empty reason is that of files reported FAILED.
    reason    TEXT,
    host      TEXT,
    state     TEXT,
    last_file INTEGER,
    UNIQUE (reason, host, state)
);

CREATE INDEX acknowledgement_at ON acknowledgement (at);

ALTER TABLE batch ADD COLUMN acknowledged_at INTEGER;
ALTER TABLE batch ADD COLUMN acknowledgement INTEGER;

-- A verdict after the acknowledgement is new.
CREATE INDEX batch_attention ON batch (first_received_at)
WHERE verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at);

-- The activity charts: a sample of a minute (kept for a day) or of ten (kept for a week) of each server.
CREATE TABLE history (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    step   INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    server TEXT    NOT NULL,
    -- A JSON object.
    sample TEXT    NOT NULL,
    UNIQUE (step, at, server)
);

-- By host too, so that a page of a state and a host seeks its files.
DROP INDEX file_missing;
CREATE INDEX file_missing ON file (state, host) WHERE state <> 'pending' AND state <> 'available';
