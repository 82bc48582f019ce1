-- What the servers that share the record have to know and others must not: the admin_token made by the first of them.
CREATE TABLE secret (name text PRIMARY KEY, value text NOT NULL);
