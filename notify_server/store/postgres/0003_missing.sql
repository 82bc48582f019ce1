-- Files of all batches by a state other than pending and available, which have indexes of their own or are most files.
CREATE INDEX file_missing ON file (state, id) WHERE state IN ('unavailable', 'blocked', 'upload_failed');
