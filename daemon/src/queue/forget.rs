//! Forgetting: examples whose effect is taken back, while those that came after them are trained again.
//!
//! What is to be forgotten is written down first ([`Queue::begin_forget`]), then files and live weights go back to a generation before
//! it, then the rest is queued again ([`Queue::finish_forget`]). A daemon that ends in between finds the note at its next start, and
//! knows by the files' cursor whether the second step was done ([`Queue::reconcile`]).

use rusqlite::{Connection, Transaction, params};

use super::{Queue, QueueError, RECORD, Record, now_ms, number, record, set_number};
use crate::protocol::Scoring;

/// Before every example that waits for its first time: i64 has room for 2^57 more below.
const AGAIN: i64 = -9_000_000_000_000_000_000;

/// What is to be forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forget {
    /// These examples, by id.
    Examples(Vec<String>),
    /// All that came from a source.
    Source(String),
}

/// What forgetting would come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Examples that are forgotten.
    pub examples: u64,
    /// The first of them that the weights may hold; `None` when they hold none.
    pub first_seq: Option<u64>,
}

impl Queue {
    /// What forgetting would come to, now that the files are at `cursor`.
    ///
    /// # Errors
    /// SQLite's.
    pub fn plan_forget(&self, what: &Forget, cursor: u64) -> Result<Plan, QueueError> {
        self.write(|transaction| {
            let examples = note(transaction, what)?;
            // What was rolled back may be held again, where a rollback was undone by another.
            let first: Option<i64> = transaction.query_row(
                "SELECT min(seq) FROM examples WHERE number IN (SELECT number FROM forgetting)
                 AND (state IN ('training', 'trained', 'skipped') OR (state = 'rolled_back' AND seq <= ?1))",
                [cursor as i64],
                |row| row.get(0),
            )?;
            transaction.execute("DELETE FROM forgetting", [])?;
            Ok(Plan { examples, first_seq: first.map(|seq| seq as u64) })
        })
    }

    /// How many examples will be trained again when the files go back to `cursor`.
    ///
    /// # Errors
    /// SQLite's.
    pub fn begin_forget(&self, what: &Forget, cursor: u64) -> Result<u64, QueueError> {
        self.write(|transaction| {
            note(transaction, what)?;
            let again: i64 = transaction.query_row(
                "SELECT count(*) FROM examples WHERE seq > ?1 AND state IN ('training', 'trained', 'skipped')
                 AND number NOT IN (SELECT number FROM forgetting)",
                [cursor as i64],
                |row| row.get(0),
            )?;
            Ok(again as u64)
        })
    }

    /// Takes the note back: nothing was rolled back for it.
    ///
    /// # Errors
    /// SQLite's.
    pub fn cancel_forget(&self) -> Result<(), QueueError> {
        self.write(|transaction| Ok(transaction.execute("DELETE FROM forgetting", []).map(drop)?))
    }

    /// Records that files and live weights are at a generation with this cursor and step, which holds nothing of what is noted.
    /// What was handed out after it waits again, in the same order and before all else, and steps are counted on from there: as if what is
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
            Ok(erase(transaction)?)
        })
    }

    /// The examples that were handed out after one seq, up to another, and trained or skipped, in that order.
    ///
    /// # Errors
    /// SQLite's.
    pub fn handed_out(&self, after: u64, to: u64) -> Result<Vec<Record>, QueueError> {
        self.read(|connection| {
            let cursor = number(connection, "synced_cursor")?;
            let sql = format!(
                "SELECT {RECORD} FROM examples WHERE seq > ?1 AND seq <= ?2 AND state IN ('trained', 'skipped') ORDER BY seq"
            );
            let mut statement = connection.prepare_cached(&sql)?;
            statement.query_map([after as i64, to as i64], |row| record(row, cursor))?.collect()
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

/// Does at a start what was noted before the end of the last daemon: true if there was anything.
pub(super) fn catch_up(transaction: &Transaction<'_>, cursor: u64, step: u64) -> rusqlite::Result<bool> {
    let first: Option<i64> = transaction.query_row(
        "SELECT min(seq) FROM examples WHERE number IN (SELECT number FROM forgetting)
         AND state IN ('training', 'trained', 'skipped', 'rolled_back')",
        [],
        |row| row.get(0),
    )?;
    match first {
        None => Ok(false),
        Some(first) if first as u64 > cursor => {
            tracing::warn!(
                "what was being forgotten when the daemon ended is forgotten; what came after it is trained again"
            );
            finish(transaction, cursor, step).map(|()| true)
        }
        Some(_) => {
            tracing::warn!("the daemon ended before it could forget what it was asked to: ask again");
            transaction.execute("DELETE FROM forgetting", []).map(|_| true)
        }
    }
}

/// Writes down what is to be forgotten; how many examples.
fn note(connection: &Connection, what: &Forget) -> rusqlite::Result<u64> {
    connection.execute("DELETE FROM forgetting", [])?;
    let noted = match what {
        Forget::Source(source) => connection.execute(
            "INSERT INTO forgetting SELECT number FROM examples WHERE source = ?1 AND state <> 'forgotten'",
            [source],
        )?,
        Forget::Examples(ids) => {
            let mut statement = connection.prepare(
                "INSERT OR IGNORE INTO forgetting SELECT number FROM examples WHERE id = ?1 AND state <> 'forgotten'",
            )?;
            let mut noted = 0;
            for id in ids {
                noted += statement.execute([id])?;
            }
            noted
        }
    };
    Ok(noted as u64)
}

fn finish(transaction: &Transaction<'_>, cursor: u64, step: u64) -> rusqlite::Result<()> {
    erase(transaction)?;
    let first: Option<i64> =
        transaction.query_row("SELECT min(place) FROM examples WHERE state = 'queued'", [], |row| row.get(0))?;
    let end = first.unwrap_or(AGAIN).min(AGAIN);
    let last = number(transaction, "next_seq")?;
    transaction.execute(
        "UPDATE examples SET state = 'queued', place = ?2 + seq, seq = NULL, step = NULL, loss = NULL, reason = NULL,
             finished_ms = NULL
         WHERE seq > ?1 AND state IN ('training', 'trained', 'skipped')",
        params![cursor as i64, end - last],
    )?;
    set_number(transaction, "synced_cursor", cursor as i64)?;
    set_number(transaction, "next_step", step as i64 + 1)
}

/// What is noted has no tokens from now on.
fn erase(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute(
        "UPDATE examples SET state = 'forgotten', ids = x'', spans = '[]', reason = 'forgotten on request', finished_ms = ?1
         WHERE number IN (SELECT number FROM forgetting)",
        [now_ms()],
    )?;
    transaction.execute("DELETE FROM forgetting", []).map(drop)
}
