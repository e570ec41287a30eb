//! The queue's tables, and the steps that bring an older file to them.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::QueueError;

/// Each entry brings the file from version i to version i + 1. Entries are never changed, only added.
const MIGRATIONS: [&str; 3] = [
    "
    CREATE TABLE examples (
        number         INTEGER PRIMARY KEY,            -- order of arrival
        id             TEXT    NOT NULL UNIQUE,
        state          TEXT    NOT NULL,
        place          INTEGER NOT NULL,               -- enqueued_ms - priority * 60000: smallest goes first
        priority       INTEGER NOT NULL,
        weight         REAL    NOT NULL,
        lr             REAL,
        tags           TEXT    NOT NULL,               -- JSON list
        source         TEXT,
        job            TEXT,
        ids            BLOB    NOT NULL,               -- u32, little-endian
        spans          TEXT    NOT NULL,               -- JSON list of [start, end]
        tokens         INTEGER NOT NULL,               -- all
        decision       INTEGER NOT NULL,               -- of these, decision tokens
        enqueued_ms    INTEGER NOT NULL,
        seq            INTEGER UNIQUE,
        step           INTEGER,
        loss           REAL,
        weight_version INTEGER,
        reason         TEXT,
        finished_ms    INTEGER
    ) STRICT;
    CREATE INDEX waiting ON examples (place, number) WHERE state = 'queued';
    CREATE INDEX by_state ON examples (state);
    CREATE INDEX by_job ON examples (job, number) WHERE job IS NOT NULL;
    CREATE TABLE idempotency (
        key         TEXT    PRIMARY KEY,
        body        BLOB    NOT NULL,                  -- BLAKE3 of the request
        status      INTEGER NOT NULL,
        answer      TEXT    NOT NULL,
        created_ms  INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE numbers (
        name        TEXT    PRIMARY KEY,               -- next_seq, next_step, synced_cursor, last_sync_ms
        value       INTEGER NOT NULL
    ) STRICT;
    INSERT INTO numbers VALUES ('next_seq', 1), ('next_step', 1), ('synced_cursor', 0), ('last_sync_ms', 0);
",
    "
    CREATE TABLE pause (
        reason      TEXT    NOT NULL                   -- one row while the guard has stopped training
    ) STRICT;
",
    "
    ALTER TABLE examples ADD COLUMN generation INTEGER; -- the sync that first wrote its effect
    UPDATE examples SET generation = 0 WHERE state IN ('trained', 'skipped')
        AND seq <= (SELECT value FROM numbers WHERE name = 'synced_cursor');
    CREATE INDEX by_generation ON examples (generation) WHERE generation IS NOT NULL;
    CREATE INDEX by_source ON examples (source) WHERE source IS NOT NULL;
    CREATE TABLE forgetting (
        number      INTEGER PRIMARY KEY,               -- of an example
        again       INTEGER NOT NULL                   -- 0: it is to be forgotten; 1: it is to be trained again
    ) STRICT;
    CREATE TABLE forget_to (
        base        INTEGER NOT NULL,                  -- one row: the generation to go back to,
        cursor      INTEGER NOT NULL,                  -- its cursor,
        current     INTEGER NOT NULL                   -- and the generation of the files before that
    ) STRICT;
",
];

/// Opens or makes the file, checks it and brings it to the current version.
pub(super) fn open(path: &Path) -> Result<Connection, QueueError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    make_private(path);
    let of = |source| QueueError::of(path, source);
    let mut connection = Connection::open_with_flags(path, flags).map_err(of)?;
    connection.busy_timeout(std::time::Duration::from_secs(10)).map_err(of)?;
    let corrupt = |reason: String| QueueError::Corrupt { path: path.into(), reason };
    let of = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => corrupt(error.to_string()),
        _ => QueueError::of(path, error),
    };
    connection.pragma_update(None, "journal_mode", "WAL").map_err(of)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(of)?;
    let health: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(of)?;
    if health != "ok" {
        return Err(corrupt(health));
    }
    migrate(&mut connection, path).map_err(|error| match error {
        Migration::Sqlite(error) => of(error),
        Migration::Newer(version) => QueueError::Newer { path: path.into(), version, known: MIGRATIONS.len() },
    })?;
    Ok(connection)
}

/// Makes a file that is not there yet for its owner alone; SQLite gives its log and the log's index the same mode. What
/// goes wrong here, opening says.
fn make_private(path: &Path) {
    let _ = File::options().write(true).create_new(true).mode(0o600).open(path);
}

enum Migration {
    Sqlite(rusqlite::Error),
    Newer(usize),
}

impl From<rusqlite::Error> for Migration {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), Migration> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: usize = transaction.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))? as usize;
    let Some(missing) = MIGRATIONS.get(version..) else { return Err(Migration::Newer(version)) };
    for step in missing {
        transaction.execute_batch(step)?;
    }
    if !missing.is_empty() {
        tracing::info!("queue {}: schema {version} -> {}", path.display(), MIGRATIONS.len());
        transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
    }
    transaction.commit()?;
    Ok(())
}
