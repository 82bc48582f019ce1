-- Named blocks, read by notify_server/store/sql.py.

-- The batches are locked.
-- name: note
UPDATE batch SET ends_at = least(batch.ends_at, noted.at)
FROM unnest($1::bigint[], $2::bigint[]) AS noted (batch, at)
WHERE batch.id = noted.batch AND expiring_at IS NULL;

-- name: any
SELECT EXISTS (SELECT FROM batch WHERE ends_at <= $1 AND ends_at IS NOT NULL AND expiring_at IS NULL);

-- One that another node looks at is left to it.
-- name: near
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE id = ANY(ARRAY(
    SELECT id FROM batch
    WHERE ends_at <= $1 AND ends_at IS NOT NULL AND expiring_at IS NULL AND expanding IS NULL
    ORDER BY ends_at
    LIMIT $2
))
    AND ends_at <= $1 AND expiring_at IS NULL AND expanding IS NULL
ORDER BY id
FOR NO KEY UPDATE SKIP LOCKED;

-- name: files
SELECT batch, oss_object_name, expires_at, flags
FROM file
WHERE batch = ANY($1::bigint[]) AND state IN ('pending', 'available')
    AND (expires_at > $2 OR flags LIKE '%"deleted_on:%');

-- name: written
UPDATE batch SET revision = revision + 1, expiring_at = $2 WHERE id = ANY($1::bigint[]);

-- name: later
UPDATE batch SET ends_at = found.at
FROM unnest($1::bigint[], $2::bigint[]) AS found (batch, at)
WHERE batch.id = found.batch;
