-- More of an answer: the storage vendor's id of the request and code of its error, further header fields (a JSON
-- object); when the signed address ends; and what is remarkable about the file and no reason to fail (a JSON list).
ALTER TABLE file ADD COLUMN vendor_request_id text;
ALTER TABLE file ADD COLUMN vendor_code text;
ALTER TABLE file ADD COLUMN expires_at bigint;
ALTER TABLE file ADD COLUMN headers text;
ALTER TABLE file ADD COLUMN flags text;
ALTER TABLE attempt ADD COLUMN vendor_request_id text;
ALTER TABLE attempt ADD COLUMN vendor_code text;

CREATE OR REPLACE VIEW file_result AS
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
       to_char(timestamp 'epoch' + file.verified_at * interval '1 ms', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
           AS verified_at,
       file.vendor_request_id,
       file.vendor_code,
       to_char(timestamp 'epoch' + file.expires_at * interval '1 ms', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
           AS expires_at
FROM file
JOIN batch ON batch.id = file.batch;
