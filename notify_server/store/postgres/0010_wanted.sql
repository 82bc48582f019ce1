-- An endpoint lives as long as a server has it in its configuration. Every server renews the time of those that it has;
-- one that is past was in no configuration for a while, and is removed. The default is for endpoints that are there.
ALTER TABLE endpoint
    ADD COLUMN wanted_until timestamptz NOT NULL DEFAULT clock_timestamp() + interval '10 minutes';
