-- Named blocks, read by notify_server/store/sql.py.

-- name: action
INSERT INTO action (at, who, what, filter, files) VALUES ($1, $2, $3, $4, $5);

-- name: batches
SELECT id FROM batch
WHERE id = ANY($1::bigint[])
    AND verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at)
ORDER BY id
FOR UPDATE;

-- name: acknowledgement
INSERT INTO acknowledgement (at, who, note) VALUES ($1, $2, $3) RETURNING id;

-- name: batches_acknowledge
UPDATE batch SET acknowledged_at = greatest($1, completed_at), acknowledgement = $2 WHERE id = ANY($3::bigint[]);

-- name: rejections
INSERT INTO acknowledgement (at, who, note, rejection)
SELECT $1, $2, $3, id FROM rejection WHERE id = ANY($4::bigint[])
ON CONFLICT (rejection) DO NOTHING;

-- name: group_of_reason
SELECT count(*), max(id) FROM file WHERE reason = $1 AND host = $2 AND state = $3 AND id > $4;

-- name: group_reported
SELECT count(*), max(id) FROM file
WHERE $1 = '' AND state = $3 AND host = $2 AND id > $4 AND state <> 'pending' AND state <> 'available';

-- name: group_known
SELECT last_file FROM acknowledgement WHERE reason = $1 AND host = $2 AND state = $3;

-- name: group_acknowledge
INSERT INTO acknowledgement (at, who, note, reason, host, state, last_file) VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (reason, host, state)
DO UPDATE SET at = excluded.at, who = excluded.who, note = excluded.note, last_file = excluded.last_file;

-- name: samples
INSERT INTO history (step, at, server, sample)
SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[])
ON CONFLICT (step, at, server) DO UPDATE SET sample = excluded.sample;

-- name: samples_prune
DELETE FROM history
USING unnest($1::bigint[], $2::bigint[]) AS bound (step, before)
WHERE history.step = bound.step AND history.at < bound.before;

-- Pruning

-- name: prune_actions
DELETE FROM action WHERE id <= (SELECT max(id) FROM (SELECT id FROM action ORDER BY id LIMIT $1) AS oldest) AND at < $2;

-- name: prune_acknowledgements
DELETE FROM acknowledgement
WHERE id = ANY(ARRAY(SELECT id FROM acknowledgement WHERE at < $1 ORDER BY at LIMIT $2));
