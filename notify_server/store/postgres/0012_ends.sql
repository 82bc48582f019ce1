-- `ends_at`: no address or object of the batch ends earlier (Unix ms), NULL when none ends; found again when it is near.
-- `expiring_at`: when batch.expiring was written.
ALTER TABLE batch ADD COLUMN ends_at bigint;
ALTER TABLE batch ADD COLUMN expiring_at bigint;

UPDATE batch SET ends_at = found.ends_at
FROM (SELECT batch, min(expires_at) AS ends_at FROM file WHERE expires_at IS NOT NULL GROUP BY batch) AS found
WHERE batch.id = found.batch;

CREATE INDEX batch_ends ON batch (ends_at) WHERE ends_at IS NOT NULL AND expiring_at IS NULL;
