-- Named blocks, read by notify_server/store/sql.py.

-- name: action
INSERT INTO action (at, who, what, filter, files) VALUES (?, ?, ?, ?, ?);

-- name: batches
SELECT id FROM batch
WHERE id IN (SELECT value FROM json_each(?))
    AND verdict = 'incomplete' AND (acknowledged_at IS NULL OR acknowledged_at < completed_at);

-- name: acknowledgement
INSERT INTO acknowledgement (at, who, note) VALUES (?, ?, ?);

-- name: batches_acknowledge
UPDATE batch SET acknowledged_at = max(?, completed_at), acknowledgement = ? WHERE id IN (SELECT value FROM json_each(?));

-- name: rejections
INSERT INTO acknowledgement (at, who, note, rejection)
SELECT ?, ?, ?, id FROM rejection WHERE id IN (SELECT value FROM json_each(?))
ON CONFLICT (rejection) DO NOTHING;

-- name: group_of_reason
SELECT count(*), max(id) FROM file INDEXED BY file_failing
WHERE reason = :reason AND host = :host AND state = :state AND id > :after;

-- name: group_reported
SELECT count(*), max(id) FROM file INDEXED BY file_missing
WHERE state = :state AND host = :host AND id > :after AND state <> 'pending' AND state <> 'available';

-- name: group_known
SELECT last_file FROM acknowledgement WHERE reason = :reason AND host = :host AND state = :state;

-- name: group_acknowledge
INSERT INTO acknowledgement (at, who, note, reason, host, state, last_file)
VALUES (:at, :who, :note, :reason, :host, :state, :last_file)
ON CONFLICT (reason, host, state)
DO UPDATE SET at = excluded.at, who = excluded.who, note = excluded.note, last_file = excluded.last_file;

-- name: sample
INSERT INTO history (step, at, server, sample) VALUES (?, ?, ?, ?)
ON CONFLICT (step, at, server) DO UPDATE SET sample = excluded.sample;

-- name: samples_prune
DELETE FROM history WHERE step = ? AND at < ?;

-- Pruning

-- name: prune_actions
DELETE FROM action WHERE id <= (SELECT max(id) FROM (SELECT id FROM action ORDER BY id LIMIT ?)) AND at < ?;

-- name: prune_acknowledgements
DELETE FROM acknowledgement
WHERE id IN (SELECT id FROM acknowledgement INDEXED BY acknowledgement_at WHERE at < ? LIMIT ?);
