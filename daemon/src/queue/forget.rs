//! Provenance: which generation holds an example, and forgetting it.
//!
//! What is to be forgotten, and what is to be trained again for it, is written down first ([`Queue::begin_forget`]), then files and
//! live weights go back to a generation before it, then the rest is queued again ([`Queue::finish_forget`]). A daemon that ends in
//! between finds the note at its next start, and knows by the files whether the second step was done ([`Queue::reconcile`]).

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{Queue, QueueError, RECORD, Record, now_ms, number, record, set_number};
use crate::protocol::Scoring;

/// Before every example that waits for its first time: i64 has room for 2^57 more below.
pub(super) const AGAIN: i64 = -9_000_000_000_000_000_000;
/// Whether the live weights hold an example that no generation holds.
const UNSYNCED: &str = "(generation IS NULL AND state IN ('training', 'trained', 'skipped'))";

/// What is to be forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forget {
    /// These examples, by id.
    Examples(Vec<String>),
    /// All that came from a source.
    Source(String),
}

/// Where forgetting goes back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The generation.
    pub generation: u64,
    /// Its cursor.
    pub cursor: u64,
    /// The generation that the files are now.
    pub current: u64,
    /// Generations after it that the live weights hold.
    pub undone: Vec<u64>,
}

/// What forgetting would come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Examples that are forgotten.
    pub examples: u64,
    /// Generations that were the first to hold one of them.
    pub generations: Vec<u64>,
    /// Whether live weights hold one that no generation does.
    pub unsynced: bool,
}

impl Queue {
    /// What forgetting would come to.
    ///
    /// # Errors
    /// SQLite's.
    pub fn plan_forget(&self, what: &Forget) -> Result<Plan, QueueError> {
        self.write(|transaction| {
            note(transaction, what)?;
            let noted = "FROM examples WHERE number IN (SELECT number FROM forgetting)";
            let count = |condition: &str| {
                transaction.query_row(&format!("SELECT count(*) {noted} {condition}"), [], |row| row.get::<_, i64>(0))
            };
            let (examples, unsynced) = (count("")? as u64, count(&format!("AND {UNSYNCED}"))? > 0);
            let held = format!("SELECT DISTINCT generation {noted} AND generation IS NOT NULL");
            let generations = generations(transaction, &held)?;
            clear(transaction)?;
            Ok(Plan { examples, generations, unsynced })
        })
    }

    /// Writes down what is forgotten and what is trained again for it; how many of the latter.
    ///
    /// # Errors
    /// SQLite's.
    pub fn begin_forget(&self, what: &Forget, base: &Base) -> Result<u64, QueueError> {
        self.write(|transaction| {
            note(transaction, what)?;
            let sql = |condition: &str| {
                format!(
                    "INSERT INTO forgetting SELECT number, 1 FROM examples WHERE {condition}
                     AND state IN ('training', 'trained', 'skipped', 'rolled_back')
                     AND number NOT IN (SELECT number FROM forgetting)"
                )
            };
            let mut again = transaction.execute(&sql(UNSYNCED), [])?;
            for generation in &base.undone {
                again += transaction.execute(&sql("generation = ?1"), [*generation as i64])?;
            }
            let (generation, cursor, current) = (base.generation as i64, base.cursor as i64, base.current as i64);
            transaction.execute("INSERT INTO forget_to VALUES (?1, ?2, ?3)", params![generation, cursor, current])?;
            Ok(again as u64)
        })
    }

    /// Takes the note back: nothing was rolled back for it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn cancel_forget(&self) -> Result<(), QueueError> {
        self.write(|transaction| Ok(clear(transaction)?))
    }

    /// Records that files and live weights are at a generation with this cursor and step, which holds nothing of what is noted.
    /// What was trained after it waits again, in the same order and before all else, and steps are counted on from there: as if what is
    /// forgotten had never come.
    ///
    /// # Errors
    /// SQLite's.
    pub fn finish_forget(&self, cursor: u64, step: u64) -> Result<(), QueueError> {
        self.write(|transaction| Ok(finish(transaction, cursor, step)?))
    }

    /// Forgets what the weights do not hold.
    ///
    /// # Errors
    /// SQLite's.
    pub fn forget_unheld(&self, what: &Forget) -> Result<(), QueueError> {
        self.write(|transaction| {
            note(transaction, what)?;
            erase(transaction)?;
            Ok(clear(transaction)?)
        })
    }

    /// The first of these generations that was the first to hold an example which is forgotten.
    ///
    /// # Errors
    /// SQLite's.
    pub fn holds_forgotten(&self, of: &[u64]) -> Result<Option<u64>, QueueError> {
        let sql = "SELECT DISTINCT generation FROM examples WHERE state = 'forgotten' AND generation IS NOT NULL";
        let forgotten = self.read(|connection| generations(connection, sql))?;
        Ok(of.iter().copied().find(|generation| forgotten.contains(generation)))
    }

    /// The examples that a generation was the first to hold, in the order of training.
    ///
    /// # Errors
    /// SQLite's.
    pub fn made(&self, generation: u64) -> Result<Vec<Record>, QueueError> {
        self.read(|connection| {
            let cursor = number(connection, "synced_cursor")?;
            let sql = format!("SELECT {RECORD} FROM examples WHERE generation = ?1 ORDER BY seq");
            let mut statement = connection.prepare_cached(&sql)?;
            statement.query_map([generation as i64], |row| record(row, cursor))?.collect()
        })
    }

    /// The tokens of an example; `None` for one that is not known, or forgotten.
    ///
    /// # Errors
    /// SQLite's.
    pub fn scoring(&self, id: &str) -> Result<Option<Scoring>, QueueError> {
        Ok(self.work(id)?.map(|work| Scoring { ids: work.ids, spans: work.spans }).filter(|of| !of.ids.is_empty()))
    }
}

/// Does at a start what was noted before the end of the last daemon: true if the files had gone back for it.
pub(super) fn catch_up(
    transaction: &Transaction<'_>,
    generation: u64,
    cursor: u64,
    step: u64,
) -> rusqlite::Result<bool> {
    let noted = transaction
        .query_row("SELECT base, cursor, current FROM forget_to", [], |row| {
            Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64, row.get::<_, i64>(2)? as u64))
        })
        .optional()?;
    let Some((base, base_cursor, current)) = noted else { return Ok(false) };
    // A rollback makes the next generation, unless it is to the one that the files are.
    let expected = if base == current { current } else { current + 1 };
    if (generation, cursor) == (expected, base_cursor) {
        tracing::warn!(
            "what was being forgotten when the daemon ended is forgotten; what came after it is trained again"
        );
        return finish(transaction, cursor, step).map(|()| true);
    }
    tracing::warn!("the daemon ended before it could forget what it was asked to: ask again");
    clear(transaction).map(|()| false)
}

/// Writes down what is to be forgotten.
fn note(connection: &Connection, what: &Forget) -> rusqlite::Result<()> {
    clear(connection)?;
    let (column, values) = match what {
        Forget::Source(source) => ("source", std::slice::from_ref(source)),
        Forget::Examples(ids) => ("id", ids.as_slice()),
    };
    let mut statement = connection.prepare(&format!(
        "INSERT OR IGNORE INTO forgetting SELECT number, 0 FROM examples WHERE {column} = ?1 AND state <> 'forgotten'"
    ))?;
    values.iter().try_for_each(|value| statement.execute([value]).map(drop))
}

fn clear(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM forgetting", [])?;
    connection.execute("DELETE FROM forget_to", []).map(drop)
}

fn generations(connection: &Connection, sql: &str) -> rusqlite::Result<Vec<u64>> {
    let mut statement = connection.prepare(sql)?;
    statement.query_map([], |row| Ok(row.get::<_, i64>(0)? as u64))?.collect()
}

fn finish(transaction: &Transaction<'_>, cursor: u64, step: u64) -> rusqlite::Result<()> {
    erase(transaction)?;
    let first: Option<i64> =
        transaction.query_row("SELECT min(place) FROM examples WHERE state = 'queued'", [], |row| row.get(0))?;
    let end = first.unwrap_or(AGAIN).min(AGAIN);
    let last = number(transaction, "next_seq")?;
    transaction.execute(
        "UPDATE examples SET state = 'queued', place = ?1 + seq, seq = NULL, step = NULL, loss = NULL, reason = NULL,
             finished_ms = NULL, generation = NULL
         WHERE number IN (SELECT number FROM forgetting WHERE again = 1)",
        [end - last],
    )?;
    set_number(transaction, "synced_cursor", cursor as i64)?;
    set_number(transaction, "next_step", step as i64 + 1)?;
    clear(transaction)
}

/// What is noted has no tokens from now on.
fn erase(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction
        .execute(
            "UPDATE examples SET state = 'forgotten', ids = x'', spans = '[]', reason = 'forgotten on request', finished_ms = ?1
             WHERE number IN (SELECT number FROM forgetting WHERE again = 0)",
            [now_ms()],
        )
        .map(drop)
}
