-- More of an answer: the storage vendor's id of the request and code of its error, further header fields (a JSON
-- object); when the signed address ends; and what is remarkable about the file and no reason to fail (a JSON list).
ALTER TABLE file ADD COLUMN vendor_request_id TEXT;
ALTER TABLE file ADD COLUMN vendor_code TEXT;
ALTER TABLE file ADD COLUMN expires_at INTEGER;
ALTER TABLE file ADD COLUMN headers TEXT;
ALTER TABLE file ADD COLUMN flags TEXT;
ALTER TABLE attempt ADD COLUMN vendor_request_id TEXT;
ALTER TABLE attempt ADD COLUMN vendor_code TEXT;

DROP VIEW file_result;
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
       strftime('%Y-%m-%dT%H:%M:%fZ', file.verified_at / 1000.0, 'unixepoch') AS verified_at,
       file.vendor_request_id,
       file.vendor_code,
       strftime('%Y-%m-%dT%H:%M:%fZ', file.expires_at / 1000.0, 'unixepoch')  AS expires_at
FROM file
JOIN batch ON batch.id = file.batch;
