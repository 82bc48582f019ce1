-- What screens and programs ask for: batches by time, by verdict and by api_code, and what fails by reason and host.

CREATE INDEX batch_received ON batch (first_received_at);
CREATE INDEX batch_verdict ON batch (verdict, first_received_at);
CREATE INDEX batch_api_code ON batch (api_code, first_received_at);

-- Only what fails or has failed is in it: a file that is there costs nothing.
CREATE INDEX file_failing ON file (reason, host, state) WHERE reason IS NOT NULL;

-- The latest delivery, so that a batch leads to who sent it and to its request_id.
ALTER TABLE batch ADD COLUMN last_notification INTEGER;
-- As in the caller's header (W3C Trace Context), if there was one.
ALTER TABLE notification ADD COLUMN traceparent TEXT;

-- AUTOINCREMENT: a rejection that is replayed takes its id with it. Otherwise the newest would leave its id to the next
-- one, and whoever replays it once more would take that instead.
CREATE TABLE rejection_kept (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at INTEGER NOT NULL,
    remote_addr TEXT    NOT NULL,
    code        TEXT    NOT NULL,
    detail      TEXT    NOT NULL,
    -- As in the answer.
    request_id  TEXT,
    -- Last, as in notification.
    body        BLOB    NOT NULL
);
INSERT INTO rejection_kept (id, received_at, remote_addr, code, detail, body)
SELECT id, received_at, remote_addr, code, detail, body FROM rejection ORDER BY id;
DROP TABLE rejection;
ALTER TABLE rejection_kept RENAME TO rejection;
