-- Files of all batches by a state other than pending and available, which have indexes of their own or are most files.
CREATE INDEX file_missing ON file (state) WHERE state <> 'pending' AND state <> 'available';
