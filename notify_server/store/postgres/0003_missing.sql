-- Files of all batches by a state other than pending and available, which have indexes of their own or are most files.
-- Two comparisons, because PostgreSQL takes no order from an index that it seeks by IN.
CREATE INDEX file_missing ON file (state, id) WHERE state <> 'pending' AND state <> 'available';
