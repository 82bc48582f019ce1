-- Named blocks, read by notify_server/store/sql.py.

-- name: note
UPDATE batch SET ends_at = min(coalesce(ends_at, :at), :at) WHERE id = :batch AND expiring_at IS NULL;

-- name: near
SELECT
    id, batch_id, api_code, verdict, last_verdict, revision + 1, files, pending, available, unavailable, blocked,
    upload_failed, first_received_at, completed_at,
    (SELECT reference FROM expectation WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1),
    (SELECT CASE WHEN matched_by = 'batch_id' THEN expectation.files END FROM expectation
        WHERE expectation.batch = batch.id ORDER BY expectation.id LIMIT 1)
FROM batch
WHERE ends_at <= ? AND ends_at IS NOT NULL AND expiring_at IS NULL AND expanding IS NULL
ORDER BY ends_at
LIMIT ?;

-- name: files
SELECT json_group_array(json_array(oss_object_name, expires_at, flags))
FROM file
WHERE batch = ? AND state IN ('pending', 'available') AND (expires_at > ? OR flags LIKE '%"deleted_on:%');

-- name: written
UPDATE batch SET revision = revision + 1, expiring_at = ? WHERE id = ?;

-- name: later
UPDATE batch SET ends_at = ? WHERE id = ?;
