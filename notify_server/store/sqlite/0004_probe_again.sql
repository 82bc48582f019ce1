-- When the delivery arrived that last had unavailable files of the batch probed again although it changed nothing.
ALTER TABLE batch ADD COLUMN probed_again_at INTEGER;
