-- Named blocks, read by notify_server/store/reading/evidence.py. Every answer is one JSON value.

-- The deliveries of a batch, back from the latest: no index is worth its cost on the path of callbacks.
-- name: deliveries
SELECT json_agg(json_build_array(id, received_at, remote_addr, signature, request_id, files))
FROM (
    SELECT walked.*
    FROM batch
    CROSS JOIN (
        SELECT id, batch_id, api_code, received_at, remote_addr, signature, request_id, files
        FROM notification WHERE id <= CAST(:last AS bigint) ORDER BY id DESC LIMIT CAST(:most AS bigint)
    ) AS walked
    WHERE batch.id = CAST(:id AS bigint) AND walked.batch_id = batch.batch_id AND walked.api_code = batch.api_code
    ORDER BY walked.id DESC
    LIMIT CAST(:limit AS bigint)
) AS found;

-- name: body
SELECT convert_to(body, 'UTF8') FROM notification WHERE id = CAST(:id AS bigint);

-- name: last
SELECT last_notification FROM batch WHERE id = CAST(:id AS bigint);

-- name: attempts
SELECT json_agg(json_build_array(
    file, started_at, method, url, http_status, reason, dns_ms, connect_ms, tls_ms, first_byte_ms, total_ms,
    remote_addr, vendor_request_id, vendor_code
) ORDER BY file, id)
FROM attempt
WHERE file = ANY(ARRAY(SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:files AS json)) AS value));
