-- Named blocks, read by notify_server/store/sql.py. Each returns one row: a JSON array of arrays.

-- name: actions
SELECT json_agg(json_build_array(id, at, who, what, filter, files) ORDER BY id DESC)::text
FROM (SELECT * FROM action WHERE id < :before ORDER BY id DESC LIMIT :limit) AS found;

-- name: acknowledgement
SELECT json_agg(json_build_array(at, who, note))::text FROM acknowledgement WHERE id = :id;

-- name: rejections
SELECT json_agg(json_build_array(rejection, at, who, note))::text
FROM acknowledgement
WHERE rejection = ANY(ARRAY(SELECT value::bigint FROM json_array_elements_text(CAST(:ids AS json))));

-- name: history
SELECT json_agg(json_build_array(at, sample) ORDER BY at)::text
FROM history WHERE step = :step AND at >= :since;
