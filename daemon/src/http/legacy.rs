//! The interface of the earlier system, for its clients: `POST /train` and `GET /status/{job_id}`.
//!
//! A job is `max_steps` steps in all, one sample each, cycling through the samples; without `max_steps` each sample is
//! trained once. `input` becomes the user's message and `expected_output` the assistant's. A `rationale` says why that
//! output is right: where the model's template has a place for reasoning it goes there, as the `reasoning_content`
//! that the model will then produce before its answer; elsewhere it is left out, because a rationale written into the
//! answer would be served as part of it. The answer to the request says which was done.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::examples::{full, idempotency};
use super::{App, Problem, blocking};
use crate::examples::Templates;
use crate::queue::{Added, NewExample, Record, State as ExampleState, new_id};

/// Tokens of all steps of a job that repeats its samples. Each step is an example in the queue, so that a short body could
/// otherwise become queue.capacity copies of a long example.
const JOB_TOKENS_MAX: u64 = 1 << 24;

struct TrainingData {
    samples: Vec<Sample>,
    learning_rate: Option<f64>,
    max_steps: Option<u64>,
}

struct Sample {
    input: String,
    expected_output: String,
    rationale: Option<String>,
}

impl TrainingData {
    /// Reads a body field by field, so that a refusal names the one at fault.
    fn parse(body: &[u8]) -> Result<Self, Problem> {
        let body: Value = serde_json::from_slice(body).map_err(|error| {
            Problem::new(400, "body", format!("not JSON: {error}")).with("line", error.line().into())
        })?;
        let top = object(&body, "the body", &["training_data"])?;
        let data = object(required(top, "", "training_data")?, "training_data", &["samples", "config"])?;
        let samples = match required(data, "training_data.", "samples")? {
            Value::Array(samples) => samples.iter().enumerate().map(sample).collect::<Result<_, _>>()?,
            _ => return Err(field("training_data.samples", "must be a list".into())),
        };
        let none = Map::new();
        let config = match given(data, "config") {
            Some(config) => object(config, "training_data.config", &["learning_rate", "max_steps"])?,
            None => &none,
        };
        let wrong = |key: &str, what: &str| field(&format!("training_data.config.{key}"), format!("must be {what}"));
        let learning_rate = given(config, "learning_rate")
            .map(|lr| lr.as_f64().ok_or_else(|| wrong("learning_rate", "a number")))
            .transpose()?;
        let max_steps = given(config, "max_steps")
            .map(|steps| steps.as_u64().ok_or_else(|| wrong("max_steps", "a whole number above 0")))
            .transpose()?;
        Ok(Self { samples, learning_rate, max_steps })
    }
}

fn sample((index, sample): (usize, &Value)) -> Result<Sample, Problem> {
    let place = format!("training_data.samples[{index}]");
    let sample = object(sample, &place, &["input", "expected_output", "rationale"])?;
    let text = |key: &str, value: &Value| {
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| field(&format!("{place}.{key}"), "must be text".into()))
    };
    let must = |key: &str| text(key, required(sample, &format!("{place}."), key)?);
    Ok(Sample {
        input: must("input")?,
        expected_output: must("expected_output")?,
        rationale: given(sample, "rationale").map(|value| text("rationale", value)).transpose()?,
    })
}

/// An object all of whose keys are known.
fn object<'a>(value: &'a Value, place: &str, known: &[&str]) -> Result<&'a Map<String, Value>, Problem> {
    let Value::Object(object) = value else { return Err(field(place, "must be an object".into())) };
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(object),
        Some(key) => {
            let name = if place == "the body" { key.clone() } else { format!("{place}.{key}") };
            Err(field(&name, format!("unknown field; {}", crate::config::hint(key, known))))
        }
    }
}

fn required<'a>(object: &'a Map<String, Value>, prefix: &str, key: &str) -> Result<&'a Value, Problem> {
    object.get(key).ok_or_else(|| field(&format!("{prefix}{key}"), "missing".into()))
}

/// A value that is there and not null.
fn given<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// What a body of `POST /train` asks for.
pub struct Job {
    samples: Vec<NewExample>,
    steps: usize,
    /// What is done with the samples' rationales.
    rationale: &'static str,
}

impl Job {
    /// Reads a body, for a queue in which `capacity` examples may wait.
    ///
    /// # Errors
    /// A [`Problem`] that names the field.
    pub fn read(templates: &Templates, capacity: u64, body: &[u8]) -> Result<Job, Problem> {
        let TrainingData { samples: posted, learning_rate: lr, max_steps } = TrainingData::parse(body)?;
        let samples = prepare(templates, &posted, learning_rate(lr)?)?;
        let steps = max_steps.unwrap_or(samples.len() as u64);
        let of_steps = |detail| Err(field("training_data.config.max_steps", detail));
        if steps == 0 || steps > capacity {
            return of_steps(format!("must lie in 1..={capacity} (queue.capacity), is {steps}"));
        }
        let rationale = match (posted.iter().any(|sample| sample.rationale.is_some()), templates.renders_reasoning()) {
            (false, _) => "none given",
            (true, true) => "learned as reasoning before the answer",
            (true, false) => "left out: the model's template has no place for reasoning",
        };
        let job = Job { samples, steps: steps as usize, rationale };
        let tokens = job.tokens();
        if job.steps > job.samples.len() && tokens > JOB_TOKENS_MAX {
            return of_steps(format!(
                "{steps} steps of these samples come to {tokens} tokens, and a job may have {JOB_TOKENS_MAX}: lower it, or \
                 post the rest as another job"
            ));
        }
        Ok(job)
    }

    /// How many steps it has.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The tokens of all its steps.
    pub fn tokens(&self) -> u64 {
        let of = |samples: &[NewExample]| samples.iter().map(|sample| sample.ids.len() as u64).sum::<u64>();
        let (rounds, rest) = (self.steps / self.samples.len(), self.steps % self.samples.len());
        rounds as u64 * of(&self.samples) + of(&self.samples[..rest])
    }

    /// The example of each step.
    fn examples(&self) -> impl Iterator<Item = &NewExample> {
        self.samples.iter().cycle().take(self.steps)
    }
}

/// `POST /train`
pub async fn train(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = body?;
    let idempotency = idempotency(&headers, "/train", &body)?;
    blocking(move || {
        let job = Job::read(&app.templates, app.queue.capacity(), &body)?;
        let (id, steps) = (new_id(), job.steps());
        let of_job = |example: &NewExample| NewExample { job: Some(id.clone()), ..example.clone() };
        let examples: Vec<NewExample> = job.examples().map(of_job).collect();
        let answer = json!({ "job_id": id, "status": "queued", "max_steps": steps, "rationale": job.rationale });
        let added = app.queue.add(&examples, idempotency.as_ref(), |_| (202, answer.to_string()));
        match added.map_err(|error| full(error, &app.supervisor.status()))? {
            Added::New(_) => {
                app.supervisor.wake();
                Ok((StatusCode::ACCEPTED, Json(answer)).into_response())
            }
            Added::Before(_, text) => {
                Ok((StatusCode::ACCEPTED, [(header::CONTENT_TYPE, "application/json")], text).into_response())
            }
        }
    })
    .await
}

/// `GET /status/{job_id}`
pub async fn status(State(app): State<App>, Path(job): Path<String>) -> Result<Json<Value>, Problem> {
    let records = {
        let job = job.clone();
        blocking(move || app.queue.job(&job)).await?
    };
    if records.is_empty() {
        return Err(Problem::new(404, "unknown-job", format!("no job {job:?}, or it finished long ago")));
    }
    let done: Vec<&Record> = records.iter().filter(|record| record.state.is_final()).collect();
    let losses: Vec<Option<f32>> =
        done.iter().filter(|record| record.seq.is_some()).map(|record| record.loss).collect();
    let learned = |record: &&&Record| matches!(record.state, ExampleState::Trained | ExampleState::Skipped);
    let failed = done.iter().find(|record| !learned(record) && record.state != ExampleState::Forgotten);
    let state = match (done.len() == records.len(), failed.is_some(), records.iter().any(|r| r.seq.is_some())) {
        (true, true, _) => "failed",
        (true, false, _) => "completed",
        (false, _, true) => "running",
        (false, _, false) => "queued",
    };
    Ok(Json(json!({
        "job_id": job,
        "status": state,
        "step": done.len(),
        "max_steps": records.len(),
        "loss": losses.last(),
        "loss_history": losses,
        "error": failed.and_then(|record| record.reason.clone()),
    })))
}

fn learning_rate(lr: Option<f64>) -> Result<Option<f32>, Problem> {
    let Some(lr) = lr else { return Ok(None) };
    if lr > 0.0 && lr < 1.0 {
        return Ok(Some(lr as f32));
    }
    Err(field("training_data.config.learning_rate", format!("must lie in (0, 1), is {lr}")))
}

/// All samples as examples; a job is taken whole or not at all.
fn prepare(templates: &Templates, samples: &[Sample], lr: Option<f32>) -> Result<Vec<NewExample>, Problem> {
    if samples.is_empty() {
        return Err(field("training_data.samples", "empty: there is nothing to learn".into()));
    }
    let prepare = |(index, sample): (usize, &Sample)| {
        let mut answer = json!({ "role": "assistant", "content": sample.expected_output });
        if let (Some(rationale), true) = (&sample.rationale, templates.renders_reasoning()) {
            answer["reasoning_content"] = rationale.as_str().into();
        }
        let posted = json!({ "messages": [{ "role": "user", "content": sample.input }, answer] });
        let (example, prepared) = templates
            .prepare(&posted)
            .map_err(|refusal| field(&format!("training_data.samples[{index}]"), refusal.to_string()))?;
        Ok(NewExample {
            ids: prepared.ids,
            spans: prepared.spans,
            weight: example.weight,
            priority: 0,
            tags: Vec::new(),
            source: Some("POST /train".into()),
            lr,
            job: None,
        })
    };
    samples.iter().enumerate().map(prepare).collect()
}

fn field(name: &str, reason: String) -> Problem {
    Problem::new(400, "field", format!("{name}: {reason}")).with("field", name.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::tiny_model;

    /// What a job of one sample with this many steps is refused for.
    fn refusal(steps: u64, sample: &str) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        tiny_model::write(dir.path(), tiny_model::CHATML);
        let templates = Templates::load(dir.path(), 1 << 20).unwrap();
        let data = json!({"samples": [{"input": sample, "expected_output": "y"}], "config": {"max_steps": steps}});
        let body = json!({ "training_data": data }).to_string();
        let job = Job::read(&templates, 1_000_000, body.as_bytes());
        job.map(|job| assert_eq!(job.examples().count() as u64, steps)).err().map(|problem| format!("{problem:?}"))
    }

    #[test]
    fn a_short_body_cannot_become_many_copies_of_a_long_example() {
        let long = "x".repeat(100_000);
        assert_eq!(refusal(100, &long), None);
        assert_eq!(refusal(100_000, "short"), None);
        let refused = refusal(1000, &long).unwrap();
        assert!(refused.contains("max_steps") && refused.contains("a job may have 16777216"), "{refused}");
        // What is not repeated is as long as its body.
        assert_eq!(refusal(1, &long), None);
    }
}
