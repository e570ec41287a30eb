//! Handing examples out: new ones in order of place, and those to be replayed as they were.

use std::ops::Range;

use rusqlite::{OptionalExtension, Row, params};

use super::{Batch, Queue, QueueError, now_ms, number, set_number};
use crate::protocol::Work;

const WORK: &str = "number, id, ids, spans, weight, lr, job, seq, step";

/// A row of the table as it is handed out.
struct Waiting {
    number: i64,
    work: Work,
    lr: Option<f32>,
    job: Option<String>,
    step: Option<i64>,
}

impl Queue {
    /// Hands out the next step's examples, at most `limit`, and gives them their seq and step number, durably.
    /// Examples of one step share their lr; an example of a job is alone in its step. `None` when none waits.
    ///
    /// # Errors
    /// SQLite's.
    pub fn take(&self, limit: usize) -> Result<Option<Batch>, QueueError> {
        self.write(|transaction| {
            let sql = format!("SELECT {WORK} FROM examples WHERE state = 'queued' ORDER BY place, number LIMIT ?1");
            let mut statement = transaction.prepare_cached(&sql)?;
            let mut chosen: Vec<Waiting> = Vec::new();
            for row in statement.query_map([limit.max(1) as i64], waiting)? {
                let row = row?;
                let joins = chosen.first().is_none_or(|first| {
                    first.job.is_none() && row.job.is_none() && first.lr.map(f32::to_bits) == row.lr.map(f32::to_bits)
                });
                if !joins {
                    break;
                }
                chosen.push(row);
            }
            let Some(first) = chosen.first() else { return Ok(None) };
            let lr = first.lr;
            let step = number(transaction, "next_step")?;
            let seq = number(transaction, "next_seq")?;
            let mut update = transaction
                .prepare_cached("UPDATE examples SET state = 'training', seq = ?2, step = ?3 WHERE number = ?1")?;
            let mut examples = Vec::with_capacity(chosen.len());
            for (row, seq) in chosen.into_iter().zip(seq..) {
                update.execute(params![row.number, seq, step])?;
                examples.push(Work { seq: seq as u64, ..row.work });
            }
            set_number(transaction, "next_step", step + 1)?;
            set_number(transaction, "next_seq", seq + examples.len() as i64)?;
            Ok(Some(Batch { step: step as u64, lr, examples }))
        })
    }

    /// The first step that was handed out after `cursor` and has to be trained again: with the same step number and
    /// the same examples in the same order. `None` when there is none.
    ///
    /// # Errors
    /// SQLite's.
    pub fn replay(&self, cursor: u64) -> Result<Option<Batch>, QueueError> {
        let sql = format!(
            "SELECT {WORK} FROM examples WHERE state IN ('training', 'trained', 'skipped') AND step =
                 (SELECT step FROM examples WHERE seq > ?1 AND state IN ('training', 'trained', 'skipped')
                  ORDER BY seq LIMIT 1)
             ORDER BY seq"
        );
        let rows: Vec<Waiting> = self.read(|connection| {
            let mut statement = connection.prepare_cached(&sql)?;
            statement.query_map([cursor as i64], waiting)?.collect()
        })?;
        let Some(first) = rows.first() else { return Ok(None) };
        let (step, lr) = (first.step.unwrap_or_default() as u64, first.lr);
        Ok(Some(Batch { step, lr, examples: rows.into_iter().map(|row| row.work).collect() }))
    }

    /// An example as it would be handed out; `None` for an unknown id.
    ///
    /// # Errors
    /// SQLite's.
    pub(super) fn work(&self, id: &str) -> Result<Option<Work>, QueueError> {
        self.read(|connection| {
            let sql = format!("SELECT {WORK} FROM examples WHERE id = ?1");
            Ok(connection.query_row(&sql, [id], waiting).optional()?.map(|row| row.work))
        })
    }

    /// Refuses what waits and is longer than `max_tokens`, which the operator may have lowered since; gives how many.
    ///
    /// # Errors
    /// SQLite's.
    pub fn refuse_longer_than(&self, max_tokens: usize) -> Result<u64, QueueError> {
        self.write(|transaction| {
            let refused = transaction.execute(
                "UPDATE examples SET state = 'refused', finished_ms = ?2,
                     reason = tokens || ' tokens, at most ' || ?1 || ' are taken now (train.max_tokens)'
                 WHERE state = 'queued' AND tokens > ?1",
                params![max_tokens as i64, now_ms()],
            )?;
            Ok(refused as u64)
        })
    }
}

fn waiting(row: &Row<'_>) -> rusqlite::Result<Waiting> {
    let blob: Vec<u8> = row.get(2)?;
    let spans: String = row.get(3)?;
    let spans: Vec<[usize; 2]> = serde_json::from_str(&spans)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(3, rusqlite::types::Type::Text, Box::new(error)))?;
    let work = Work {
        seq: row.get::<_, Option<i64>>(7)?.unwrap_or_default() as u64,
        id: row.get(1)?,
        ids: blob.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(),
        spans: spans.into_iter().map(|[start, end]| Range { start, end }).collect(),
        weight: row.get(4)?,
    };
    Ok(Waiting { number: row.get(0)?, work, lr: row.get(5)?, job: row.get(6)?, step: row.get(8)? })
}
