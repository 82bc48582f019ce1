-- A reference that the server checks costs a look-up and a lock for each row: 12 of the 17 µs that a new file takes, 11
-- of the 14 of an attempt. The store alone writes and deletes these rows, in transactions that hold the batch (and, for
-- attempts, the file) they are about, and a file goes with its attempts.
ALTER TABLE file DROP CONSTRAINT file_batch_fkey;
ALTER TABLE attempt DROP CONSTRAINT attempt_file_fkey;

-- Bodies too large for their page go out of the row as small as they can be: a notification of 100 files costs half
-- the CPU to write, and marking it as expanded does not write its body again. The rest stays as it was written.
ALTER TABLE notification SET (toast_tuple_target = 128);
DO $$
BEGIN
    -- From PostgreSQL 14 on, and where it was built with it. As text: an older one could not read it.
    IF EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) THEN
        EXECUTE 'ALTER TABLE notification ALTER COLUMN body SET COMPRESSION lz4';
    END IF;
END
$$;

-- `attempt` and `notification` are one table each, not one a month. What is kept is a batch with all that belongs to
-- it, from its verdict on: attempts of one batch may be of two months, a recheck adds to an old one, and a month that is
-- dropped would take what still counts, or stay for a month too long. It would save little: files and batches, most of
-- the bytes, have to be deleted row by row anyway, at 5 µs of the server's a row, which is what writing one costs. And
-- it would cost where it hurts: attempts are sought by their file, which no month is known of, in every partition. With
-- four of them trimming takes 3.2 µs a file instead of 1.5, listing a file's attempts 65 µs instead of 25; with
-- thirteen 7 and 165. An id alone, by which deliveries are marked as expanded, would be unique in its month only.
