-- Named blocks, read by notify_server/store/sql.py. Each returns one row: a JSON array of arrays.

-- name: actions
SELECT json_group_array(json_array(id, at, who, what, filter, files))
FROM (SELECT * FROM action WHERE id < :before ORDER BY id DESC LIMIT :limit) AS found;

-- name: acknowledgement
SELECT json_group_array(json_array(at, who, note)) FROM acknowledgement WHERE id = :id;

-- name: rejections
SELECT json_group_array(json_array(rejection, at, who, note))
FROM acknowledgement WHERE rejection IN (SELECT value FROM json_each(:ids));

-- name: history
SELECT json_group_array(json_array(at, sample))
FROM (SELECT at, sample FROM history WHERE step = :step AND at >= :since ORDER BY at) AS found;
