-- Named blocks, read by notify_server/store/reading/evidence.py. Every answer is one JSON value.

-- The deliveries of a batch, back from the latest: no index is worth its cost on the path of callbacks.
-- name: deliveries
SELECT json_group_array(json_array(id, received_at, remote_addr, signature, request_id, files))
FROM (
    SELECT walked.*
    FROM batch
    CROSS JOIN (SELECT * FROM notification WHERE id <= :last ORDER BY id DESC LIMIT :most) AS walked
    WHERE batch.id = :id AND walked.batch_id = batch.batch_id AND walked.api_code = batch.api_code
    LIMIT :limit
);

-- name: body
SELECT CAST(body AS BLOB) FROM notification WHERE id = :id;

-- name: last
SELECT last_notification FROM batch WHERE id = :id;

-- name: attempts
SELECT json_group_array(json_array(
    file, started_at, method, url, http_status, reason, dns_ms, connect_ms, tls_ms, first_byte_ms, total_ms,
    remote_addr, vendor_request_id, vendor_code
))
FROM (SELECT * FROM attempt WHERE file IN (SELECT value FROM json_each(:files)) ORDER BY file, id);
