//! The durable queue: what was acknowledged is on disk, in one SQLite file (WAL, synchronous FULL).
//!
//! An example is `queued` until it is handed out; then it gets its `seq` and its step number, in one transaction, and
//! is `training` until the trainer's answer makes it `trained`, `skipped` (a gate) or `failed`. `refused` is an
//! example that became impossible while it waited (`max_tokens` was lowered), or was withdrawn. `rolled_back` is one whose effect was
//! taken back on request, `quarantined` one of those whose effect was taken back by the guard, `forgotten` one that was to leave no trace.
//!
//! What the files hold is said by the checkpoint's cursor alone. After a trainer's restart, [`Queue::replay`] gives
//! what was handed out after that cursor, in the same order, in the same batches, with the same step numbers.
//!
//! **Order.** The effective priority of an example is its priority plus one for each minute that it has waited, so
//! that nothing waits for ever. As all wait at the same rate, the order never changes while they wait:
//! place = enqueued_ms - priority * 60000, smallest first, and an index on it is enough.

mod forget;
mod schema;
mod take;
mod types;

#[cfg(test)]
mod tests;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use serde::Serialize;

pub use forget::{Base, Forget, Plan};
pub use types::{Added, Batch, Idempotency, NewExample, Record, State};

use crate::protocol::ExampleResult;

/// Waiting this long lifts an example by one priority, in ms.
pub const AGEING_MS: i64 = 60_000;
/// Finished examples that stay to be asked about.
const FINISHED_KEPT: i64 = 20_000;
/// How long an idempotency key is remembered, in ms: 24 h.
const IDEMPOTENCY_MS: i64 = 24 * 3_600_000;

/// Why the queue could not do something.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// SQLite failed.
    #[error("queue {}: {source}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The file system is full.
    #[error(
        "queue {}: no room on its file system ({free} bytes free): free some; it goes on by itself then",
        path.display()
    )]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Bytes that are free for this user.
        free: u64,
    },
    /// The file is damaged.
    #[error(
        "queue {}: damaged ({reason}); no example in it was touched. Restore it from a copy, or move it away to start \
         with an empty queue: what was trained is in the model directory",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite found.
        reason: String,
    },
    /// The file was written by a newer apollod.
    #[error("queue {}: schema {version}, this apollod knows {known}: use the newer one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: usize,
        /// The newest that is known.
        known: usize,
    },
    /// No room.
    #[error("the queue is full: {waiting} wait, {wanted} more were posted, {capacity} may wait")]
    Full {
        /// How many wait.
        waiting: u64,
        /// How many were to be added.
        wanted: u64,
        /// How many may wait.
        capacity: u64,
    },
    /// An idempotency key was used again for something else.
    #[error("the Idempotency-Key {0:?} was used before with another body")]
    KeyReused(String),
}

impl QueueError {
    /// What SQLite said of this file.
    fn of(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error() {
            Some(error) if no_room(error) => {
                let folder = path.parent().unwrap_or(Path::new("/"));
                let free = rustix::fs::statvfs(folder).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
                Self::NoRoom { path, free }
            }
            _ => Self::Sqlite { path, source },
        }
    }
}

/// Whether a file could not grow: the database or its log, or the index of the log, which is another kind of error.
fn no_room(error: &rusqlite::ffi::Error) -> bool {
    error.code == ErrorCode::DiskFull || error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
}

/// What can go wrong within a transaction, where the file has no name yet.
enum Fault {
    Sqlite(rusqlite::Error),
    Queue(QueueError),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<QueueError> for Fault {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

/// The queue. One process at a time has it open for writing in earnest: the supervisor.
pub struct Queue {
    path: PathBuf,
    connection: Mutex<Connection>,
    capacity: u64,
}

#[cfg(test)]
impl Queue {
    /// Lets the file grow no more, or again. SQLite then says what it says of a full disk.
    pub fn allow_growth(&self, allowed: bool) {
        let connection = self.lock();
        let pages: i64 = match allowed {
            true => 1 << 30,
            false => connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap(),
        };
        connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).unwrap();
    }
}

impl Queue {
    /// Opens the queue, made if it is not there, folder included: for its owner alone, as it holds what was posted.
    ///
    /// # Errors
    /// [`QueueError`]: not openable, damaged, or of a newer version.
    pub fn open(path: &Path, capacity: u64) -> Result<Self, QueueError> {
        if let Some(folder) = path.parent() {
            // What goes wrong here, opening says with the file's name.
            let _ = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        }
        Ok(Self { path: path.to_owned(), connection: Mutex::new(schema::open(path)?), capacity })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic in another thread left no transaction open: rusqlite rolls back on drop.
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Runs `work` in a transaction that is on disk when this returns.
    fn write<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T, Fault>) -> Result<T, QueueError> {
        let mut connection = self.lock();
        let write = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        };
        write().map_err(|fault| match fault {
            Fault::Sqlite(error) => QueueError::of(&self.path, error),
            Fault::Queue(error) => error,
        })
    }

    fn read<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, QueueError> {
        work(&self.lock()).map_err(|error| QueueError::of(&self.path, error))
    }

    /// How many examples may wait.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Adds all the examples or none. `answer` makes the status and body that the idempotency key, if there is one,
    /// will answer with from now on, out of the new ids.
    ///
    /// # Errors
    /// [`QueueError::Full`], [`QueueError::KeyReused`] or SQLite's.
    pub fn add(
        &self,
        examples: &[NewExample],
        idempotency: Option<&Idempotency>,
        answer: impl FnOnce(&[String]) -> (u16, String),
    ) -> Result<Added, QueueError> {
        let now = now_ms();
        self.write(|transaction| {
            if let Some(before) = idempotency.map(|key| remembered(transaction, key)).transpose()?.flatten() {
                return Ok(before);
            }
            let waiting = count(transaction, State::Queued)?;
            let wanted = examples.len() as u64;
            if waiting + wanted > self.capacity {
                return Err(QueueError::Full { waiting, wanted, capacity: self.capacity }.into());
            }
            let ids = examples
                .iter()
                .map(|example| insert(transaction, example, now))
                .collect::<rusqlite::Result<Vec<String>>>()?;
            if let Some(Idempotency { key, body }) = idempotency {
                let (status, text) = answer(&ids);
                transaction
                    .execute("DELETE FROM idempotency WHERE created_ms < ?1", [now.saturating_sub(IDEMPOTENCY_MS)])?;
                transaction.execute(
                    "INSERT INTO idempotency (key, body, status, answer, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![key, body.as_slice(), status, text, now],
                )?;
            }
            Ok(Added::New(ids))
        })
    }

    /// What an idempotency key answered before, so that a repeated request need not be read again.
    ///
    /// # Errors
    /// [`QueueError::KeyReused`] when the body was another; SQLite's.
    pub fn before(&self, idempotency: &Idempotency) -> Result<Option<Added>, QueueError> {
        self.write(|transaction| remembered(transaction, idempotency))
    }

    /// What is known about an example; `None` for an unknown id, or one that finished so long ago that it was dropped.
    ///
    /// # Errors
    /// SQLite's.
    pub fn get(&self, id: &str) -> Result<Option<Record>, QueueError> {
        self.read(|connection| {
            let cursor = number(connection, "synced_cursor")?;
            let sql = format!("SELECT {RECORD} FROM examples WHERE id = ?1");
            connection.query_row(&sql, [id], |row| record(row, cursor)).optional()
        })
    }

    /// The examples of a job, in the order of its steps.
    ///
    /// # Errors
    /// SQLite's.
    pub fn job(&self, job: &str) -> Result<Vec<Record>, QueueError> {
        self.read(|connection| {
            let cursor = number(connection, "synced_cursor")?;
            let sql = format!("SELECT {RECORD} FROM examples WHERE job = ?1 ORDER BY number");
            let mut statement = connection.prepare_cached(&sql)?;
            statement.query_map([job], |row| record(row, cursor))?.collect()
        })
    }

    /// How many examples are in each state.
    ///
    /// # Errors
    /// SQLite's.
    pub fn counts(&self) -> Result<Vec<(State, u64)>, QueueError> {
        let found: std::collections::HashMap<String, u64> = self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT state, count(*) FROM examples GROUP BY state")?;
            let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)? as u64)))?;
            rows.collect()
        })?;
        Ok(State::ALL.into_iter().map(|state| (state, found.get(state.name()).copied().unwrap_or(0))).collect())
    }

    /// How many examples count as trained and came after `cursor`.
    ///
    /// # Errors
    /// SQLite's.
    pub fn trained_after(&self, cursor: u64) -> Result<u64, QueueError> {
        self.read(|connection| {
            let mut statement = connection
                .prepare_cached("SELECT count(*) FROM examples WHERE seq > ?1 AND state IN ('trained', 'skipped')")?;
            statement.query_row([cursor as i64], |row| Ok(row.get::<_, i64>(0)? as u64))
        })
    }

    /// When the last sync ended, in ms since 1970; `None` when there was none yet.
    ///
    /// # Errors
    /// SQLite's.
    pub fn last_sync_ms(&self) -> Result<Option<i64>, QueueError> {
        self.read(|connection| Ok(Some(number(connection, "last_sync_ms")?).filter(|ms| *ms > 0)))
    }

    /// The highest weight version that an example was trained to; 0 without one.
    ///
    /// # Errors
    /// SQLite's.
    pub fn weight_version(&self) -> Result<u64, QueueError> {
        let sql = "SELECT MAX(weight_version) FROM examples";
        let highest: Option<i64> = self.read(|connection| connection.query_row(sql, [], |row| row.get(0)))?;
        Ok(highest.unwrap_or_default() as u64)
    }

    /// Records the trainer's answer to a step.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_trained(
        &self,
        results: &[ExampleResult],
        weight_version: u64,
        skipped: Option<&str>,
    ) -> Result<(), QueueError> {
        let state = if skipped.is_some() { State::Skipped } else { State::Trained };
        let now = now_ms();
        self.write(|transaction| {
            let mut statement = transaction.prepare_cached(
                "UPDATE examples SET state = ?2, loss = ?3, weight_version = ?4, reason = ?5, finished_ms = ?6
                 WHERE seq = ?1",
            )?;
            for result in results {
                let (seq, version) = (result.seq as i64, weight_version as i64);
                statement.execute(params![seq, state.name(), result.loss, version, skipped, now])?;
            }
            Ok(())
        })
    }

    /// Records that a step could not be done: its examples are not tried again.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_failed(&self, step: u64, reason: &str) -> Result<(), QueueError> {
        self.write(|transaction| {
            transaction.execute(
                "UPDATE examples SET state = 'failed', reason = ?2, finished_ms = ?3
                 WHERE step = ?1 AND state IN ('training', 'trained', 'skipped')",
                params![step as i64, reason, now_ms()],
            )?;
            Ok(())
        })
    }

    /// Records that a generation with this cursor is on disk, and drops what finished long ago, but for what a generation was the
    /// first to hold that is not older than the `oldest` that can be restored.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_synced(
        &self,
        generation: u64,
        cursor: u64,
        oldest: impl FnOnce() -> Option<u64>,
    ) -> Result<(), QueueError> {
        self.write(|transaction| {
            set_number(transaction, "synced_cursor", cursor as i64)?;
            set_number(transaction, "last_sync_ms", now_ms())?;
            hold(transaction, generation, cursor)?;
            let last: i64 =
                transaction.query_row("SELECT coalesce(max(number), 0) FROM examples", [], |row| row.get(0))?;
            let first: i64 =
                transaction.query_row("SELECT coalesce(min(number), 0) FROM examples", [], |row| row.get(0))?;
            if last - first < FINISHED_KEPT {
                return Ok(());
            }
            // Without knowledge of the history nothing of it goes.
            let oldest = oldest().map_or(0, |generation| generation as i64);
            transaction.execute(
                "DELETE FROM examples WHERE state NOT IN ('queued', 'training') AND coalesce(seq, 0) <= ?1
                 AND number < ?2 AND coalesce(generation, -1) < ?3",
                params![cursor as i64, last - FINISHED_KEPT, oldest],
            )?;
            Ok(())
        })
    }

    /// Records that files and live weights are back at a cursor: what was handed out after it is not replayed.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_rolled_back(&self, generation: u64, cursor: u64) -> Result<u64, QueueError> {
        self.write(|transaction| Ok(roll_back(transaction, generation, cursor)?))
    }

    /// Records that what was trained after a cursor, up to a seq, harmed the model and was taken back, and that training is
    /// paused until [`Queue::record_resumed`]; gives how many examples. What was handed out later is still to be replayed.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_quarantined(&self, cursor: u64, applied: u64, reason: &str, pause: &str) -> Result<u64, QueueError> {
        self.write(|transaction| {
            set_pause(transaction, Some(pause))?;
            let changed = transaction.execute(
                "UPDATE examples SET state = 'quarantined', reason = ?3
                 WHERE seq > ?1 AND seq <= ?2 AND state IN ('training', 'trained', 'skipped')",
                params![cursor as i64, applied as i64, reason],
            )?;
            Ok(changed as u64)
        })
    }

    /// Records why training is paused until somebody looks.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_paused(&self, reason: &str) -> Result<(), QueueError> {
        self.write(|transaction| Ok(set_pause(transaction, Some(reason))?))
    }

    /// Records that training goes on.
    ///
    /// # Errors
    /// SQLite's.
    pub fn record_resumed(&self) -> Result<(), QueueError> {
        self.write(|transaction| Ok(set_pause(transaction, None)?))
    }

    /// Why training is paused, by [`Queue::record_quarantined`] or [`Queue::record_paused`].
    ///
    /// # Errors
    /// SQLite's.
    pub fn pause(&self) -> Result<Option<String>, QueueError> {
        self.read(|connection| connection.query_row("SELECT reason FROM pause", [], |row| row.get(0)).optional())
    }

    /// Refuses what waits, of one source or all of it, but for what is trained again because something else was forgotten; gives how many
    /// examples.
    ///
    /// # Errors
    /// SQLite's.
    pub fn withdraw(&self, source: Option<&str>) -> Result<u64, QueueError> {
        self.write(|transaction| {
            let withdrawn = transaction.execute(
                "UPDATE examples SET state = 'refused', reason = 'withdrawn on request', finished_ms = ?2
                 WHERE state = 'queued' AND (?1 IS NULL OR source = ?1) AND place > ?3",
                params![source, now_ms(), forget::AGAIN],
            )?;
            Ok(withdrawn as u64)
        })
    }

    /// Examples in a state, those that came last first, at most `limit`.
    ///
    /// # Errors
    /// SQLite's.
    pub fn in_state(&self, state: State, limit: u64) -> Result<Vec<Record>, QueueError> {
        self.read(|connection| {
            let cursor = number(connection, "synced_cursor")?;
            let sql = format!("SELECT {RECORD} FROM examples WHERE state = ?1 ORDER BY number DESC LIMIT ?2");
            let mut statement = connection.prepare_cached(&sql)?;
            statement.query_map(params![state.name(), limit as i64], |row| record(row, cursor))?.collect()
        })
    }

    /// Takes in what a trainer says at its start, and gives the number of examples rolled back.
    ///
    /// A cursor behind the one that a generation has already reached means that somebody rolled the files back while
    /// this queue did not look (offline, or the trainer died between the rollback and its answer): what was handed
    /// out after the cursor is then not replayed. Steps and seqs never restart below what the files hold. What the
    /// files hold was trained, also if the daemon ended before it could write that down.
    ///
    /// # Errors
    /// SQLite's.
    pub fn reconcile(&self, generation: u64, cursor: u64, step: u64) -> Result<u64, QueueError> {
        self.write(|transaction| {
            for (name, held) in [("next_seq", cursor), ("next_step", step)] {
                let next = number(transaction, name)?.max(held as i64 + 1);
                set_number(transaction, name, next)?;
            }
            let forgot = forget::catch_up(transaction, generation, cursor, step)?;
            let behind = (cursor as i64) < number(transaction, "synced_cursor")? && !forgot;
            let rolled_back = if behind { roll_back(transaction, generation, cursor)? } else { 0 };
            set_number(transaction, "synced_cursor", cursor as i64)?;
            transaction.execute(
                "UPDATE examples SET state = 'trained', reason = ?2, finished_ms = ?3
                 WHERE state = 'training' AND seq <= ?1",
                params![cursor as i64, "its outcome could not be written down; the files hold its step", now_ms()],
            )?;
            hold(transaction, generation, cursor)?;
            Ok(rolled_back)
        })
    }
}

/// What no generation has held so far is held by this one, up to its cursor.
fn hold(transaction: &Transaction<'_>, generation: u64, cursor: u64) -> rusqlite::Result<()> {
    let sql = "UPDATE examples SET generation = ?1
               WHERE generation IS NULL AND seq <= ?2 AND state IN ('trained', 'skipped')";
    transaction.execute(sql, params![generation as i64, cursor as i64]).map(drop)
}

fn roll_back(transaction: &Transaction<'_>, generation: u64, cursor: u64) -> rusqlite::Result<u64> {
    let reason = format!("rolled back to generation {generation}");
    let changed = transaction.execute(
        "UPDATE examples SET state = 'rolled_back', reason = ?2
         WHERE seq > ?1 AND state NOT IN ('failed', 'refused', 'quarantined', 'forgotten')",
        params![cursor as i64, reason],
    )?;
    set_number(transaction, "synced_cursor", cursor as i64)?;
    Ok(changed as u64)
}

fn set_pause(transaction: &Transaction<'_>, reason: Option<&str>) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM pause", [])?;
    if let Some(reason) = reason {
        transaction.execute("INSERT INTO pause (reason) VALUES (?1)", [reason])?;
    }
    Ok(())
}

fn remembered(transaction: &Transaction<'_>, idempotency: &Idempotency) -> Result<Option<Added>, Fault> {
    let found: Option<(Vec<u8>, u16, String)> = transaction
        .query_row("SELECT body, status, answer FROM idempotency WHERE key = ?1", [&idempotency.key], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .optional()?;
    match found {
        None => Ok(None),
        Some((body, status, answer)) if body == idempotency.body => Ok(Some(Added::Before(status, answer))),
        Some(_) => Err(QueueError::KeyReused(idempotency.key.clone()).into()),
    }
}

fn insert(transaction: &Transaction<'_>, example: &NewExample, now: i64) -> rusqlite::Result<String> {
    let id = new_id();
    let spans: Vec<[usize; 2]> = example.spans.iter().map(|span| [span.start, span.end]).collect();
    let blob: Vec<u8> = example.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let decision: usize = example.spans.iter().map(ExactSizeIterator::len).sum();
    transaction
        .prepare_cached(
            "INSERT INTO examples (id, state, place, priority, weight, lr, tags, source, job, ids, spans, tokens,
                 decision, enqueued_ms)
             VALUES (?1, 'queued', ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        )?
        .execute(params![
            id,
            now - i64::from(example.priority) * AGEING_MS,
            example.priority,
            example.weight,
            example.lr,
            to_json(&example.tags),
            example.source,
            example.job,
            blob,
            to_json(&spans),
            example.ids.len() as i64,
            decision as i64,
            now,
        ])?;
    Ok(id)
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("lists of words and numbers are JSON")
}

fn count(connection: &Connection, state: State) -> rusqlite::Result<u64> {
    let mut statement = connection.prepare_cached("SELECT count(*) FROM examples WHERE state = ?1")?;
    statement.query_row([state.name()], |row| Ok(row.get::<_, i64>(0)? as u64))
}

fn number(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.prepare_cached("SELECT value FROM numbers WHERE name = ?1")?.query_row([name], |row| row.get(0))
}

fn set_number(connection: &Connection, name: &str, value: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("UPDATE numbers SET value = ?2 WHERE name = ?1")?.execute(params![name, value])?;
    Ok(())
}

const RECORD: &str = "id, state, tokens, decision, weight, priority, tags, source, seq, step, loss, weight_version, \
                      reason, enqueued_ms, finished_ms";

fn record(row: &Row<'_>, cursor: i64) -> rusqlite::Result<Record> {
    let state: String = row.get(1)?;
    let state = state.parse().map_err(|()| rusqlite::Error::InvalidColumnName(format!("state {state:?}")))?;
    let whole = |column| row.get::<_, Option<i64>>(column).map(|value| value.map(|value| value as u64));
    let seq: Option<i64> = row.get(8)?;
    let tags: String = row.get(6)?;
    Ok(Record {
        id: row.get(0)?,
        state,
        tokens: row.get::<_, i64>(2)? as u64,
        decision_tokens: row.get::<_, i64>(3)? as u64,
        weight: row.get(4)?,
        priority: row.get(5)?,
        tags: serde_json::from_str(&tags).unwrap_or_default(),
        source: row.get(7)?,
        seq: whole(8)?,
        step: whole(9)?,
        loss: row.get(10)?,
        weight_version: whole(11)?.filter(|_| state != State::Queued),
        reason: row.get(12)?,
        in_files: state == State::Trained && seq.is_some_and(|seq| seq <= cursor),
        enqueued_at: rfc3339(row.get(13)?),
        finished_at: row.get::<_, Option<i64>>(14)?.map(rfc3339),
    })
}

/// Milliseconds since 1970 as RFC 3339.
pub fn rfc3339(ms: i64) -> String {
    chrono::DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// 26 characters: 12 hexadecimal digits of the time in ms, so that ids sort by arrival, and 14 random ones.
pub fn new_id() -> String {
    use std::hash::{BuildHasher, Hasher};
    // Keyed by the system's random numbers; ids need to be distinct, not secret.
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("{:012x}{:014x}", now_ms(), random >> 8)
}
