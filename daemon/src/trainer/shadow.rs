//! The shadow check: the daemon's own forward pass against the server's, on one short prompt.
//!
//! Equal bytes in the exported memory do not prove that the server computes with them: it may have copied, quantized
//! or reordered its weights, or be another server. Equal log-probabilities do. The server is asked over its socket
//! (`score`) where it offers that, and else over HTTP: for the log-probabilities of the prompt (vLLM's
//! `prompt_logprobs`), or, where there are none (llama.cpp), for that of the most likely next token after each of its
//! beginnings.

use anyhow::{Result, anyhow};
use compute::Device;
use ipc::{Attachment, Control, ControlError};
use model::{Cache, Model};
use serde_json::{Value, json};
use std::time::Duration;
use weight_map::Dtype;

/// Log-probabilities that are compared.
const COMPARED: usize = 16;
/// Longest wait for an answer over HTTP: the first one of a server may compile its kernels.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of it.
#[derive(Debug, PartialEq)]
pub enum Finding {
    /// The server computes with the exported bytes; the figures.
    Agrees(String),
    /// There is no way to ask the server; what to do.
    NoWay(String),
}

/// Why weights must not be written.
#[derive(Debug)]
pub enum Failure {
    /// The server does not answer, or not yet.
    NoAnswer(String),
    /// It computes something else, or answers nonsense.
    Differs(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Differs(error)
    }
}

/// Compares the server with `model`, whose weights are the live ones. The cache is emptied.
pub fn check<D: Device>(
    model: &Model<D>,
    cache: &mut Cache<D>,
    attachment: &Attachment,
    url: Option<&str>,
) -> Result<Finding, Failure> {
    let ids = prompt(model.config().decoder.vocab, model.positions().min(cache.capacity()));
    let tolerance = Tolerance::of(model);
    if attachment.controls().contains(&Control::Score) {
        let theirs = attachment.score(&ids).map_err(|error| match error {
            ControlError::Babble { .. } => Failure::Differs(error.into()),
            _ => Failure::NoAnswer(format!("the shadow check: {error}")),
        })?;
        return compare(&model.logprobs(cache, &ids), &theirs, &tolerance);
    }
    let Some(url) = url else {
        return Ok(Finding::NoWay(
            "not made: only bytes were compared. Set server.url to compare the server's log-probabilities too, if its \
             completions API takes token ids and gives them"
                .into(),
        ));
    };
    let server = Http::open(url)?.map_err(cannot_be_asked)?;
    match server.prompt_logprobs(&ids)? {
        Ok(theirs) => compare(&model.logprobs(cache, &ids), &theirs, &tolerance),
        Err(_) => {
            let mut theirs = Vec::new();
            for end in 1..ids.len() {
                theirs.push(server.greedy_logprob(&ids[..end])?.map_err(cannot_be_asked)?);
            }
            compare(&greedy_logprobs(model, cache, &ids), &theirs, &tolerance)
        }
    }
}

/// An operator who names a server to ask wants it asked.
fn cannot_be_asked(reason: String) -> Failure {
    Failure::Differs(anyhow!(
        "the shadow check is not possible at server.url: {reason}. Nothing was written. Give the URL of a completions API \
         that takes token ids and gives log-probabilities, or leave server.url out to train without the check"
    ))
}

/// A fixed prompt from the middle of the vocabulary: special tokens are at its ends.
fn prompt(vocab: usize, positions: usize) -> Vec<u32> {
    let (first, span) = (vocab / 8, (vocab / 2).max(1));
    (0..(COMPARED + 1).min(positions)).map(|i| (first + (i * 7919 + 17) % span) as u32).collect()
}

/// The log-probability of the most likely token after each beginning of `ids`, the whole left out.
fn greedy_logprobs<D: Device>(model: &Model<D>, cache: &mut Cache<D>, ids: &[u32]) -> Vec<f32> {
    cache.clear();
    let largest = |logits: Vec<f32>| {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        -logits.iter().map(|logit| f64::from(logit - top).exp()).sum::<f64>().ln() as f32
    };
    ids[..ids.len() - 1].iter().map(|id| largest(model.next_logits(cache, &[*id]))).collect()
}

/// How far two correct forward passes may be apart, in nats.
#[derive(Debug, PartialEq)]
struct Tolerance {
    mean: f32,
    largest: f32,
}

impl Tolerance {
    /// Servers compute in the dtype of their weights, and bf16 keeps 8 bits of every activation. The demo model under
    /// transformers, 41 prompts, worst mean and worst difference: 0.039 and 0.23 in bf16, 0.005 and 0.024 in f16, 1e-5
    /// at most in f32. Rows of one k_proj in another order give 0.35 and 1.1, weights rounded to 4 bits 0.67 and 1.3.
    /// Weights rounded to 8 bits give 0.035 and 0.19: these cannot be told from bf16 by their answers.
    fn of<D: Device>(model: &Model<D>) -> Tolerance {
        match model.weights().iter().all(|weight| model.device().dtype(weight) == Dtype::F32) {
            true => Tolerance { mean: 1e-3, largest: 1e-2 },
            false => Tolerance { mean: 0.1, largest: 1.0 },
        }
    }
}

fn compare(ours: &[f32], theirs: &[f32], tolerance: &Tolerance) -> Result<Finding, Failure> {
    let differences: Vec<f32> = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).collect();
    let n = differences.len();
    let mean = differences.iter().sum::<f32>() / n as f32;
    let largest = differences.iter().copied().fold(0.0, f32::max);
    let Tolerance { mean: mean_max, largest: largest_max } = tolerance;
    // A difference that is not a number is not within anything.
    if mean <= *mean_max && largest <= *largest_max && ours.len() == theirs.len() {
        return Ok(Finding::Agrees(format!(
            "{n} log-probabilities within {largest:.1e} of the server's, {mean:.1e} on average"
        )));
    }
    Err(Failure::Differs(anyhow!(
        "the server's log-probabilities are not those of the weights that it exported: {n} tokens differ by {mean:.3} on \
         average and {largest:.3} at most, allowed are {mean_max} and {largest_max}. The live weights equal the model \
         directory's, tensor by tensor, so the server computes with other bytes: a copy, quantized or transformed \
         weights, or another model behind server.url. Nothing was written"
    )))
}

/// An OpenAI-compatible API.
struct Http<'a> {
    agent: ureq::Agent,
    url: &'a str,
    model: String,
}

/// An answer, or why this server cannot give it.
type Given<T> = Result<T, String>;

impl Http<'_> {
    /// Asks for the model's name.
    fn open(url: &str) -> Result<Given<Http<'_>>, Failure> {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .new_agent();
        let url = url.trim_end_matches('/');
        let place = format!("{url}/v1/models");
        let answer = read(&place, agent.get(&place).call())?;
        Ok(answer.and_then(|body| match body["data"][0]["id"].as_str() {
            Some(model) => Ok(Http { agent, url, model: model.to_owned() }),
            None => Err(format!("{place} names no model")),
        }))
    }

    /// Of all ids but the first.
    fn prompt_logprobs(&self, ids: &[u32]) -> Result<Given<Vec<f32>>, Failure> {
        let answer = self.complete(ids, &json!({ "prompt_logprobs": 0 }))?;
        Ok(answer.and_then(|choice| {
            let of =
                |position: usize| choice["prompt_logprobs"][position][ids[position].to_string()]["logprob"].as_f64();
            let logprobs: Option<Vec<f32>> = (1..ids.len()).map(|i| of(i).map(|logprob| logprob as f32)).collect();
            logprobs.ok_or_else(|| "it gives no log-probabilities of prompts".into())
        }))
    }

    /// Of the most likely token after `ids`.
    fn greedy_logprob(&self, ids: &[u32]) -> Result<Given<f32>, Failure> {
        let answer = self.complete(ids, &json!({}))?;
        Ok(answer.and_then(|choice| {
            let logprobs = &choice["logprobs"];
            // As OpenAI's completions have them, or, from llama.cpp, as its chat completions do.
            let first = logprobs["token_logprobs"][0].as_f64().or_else(|| logprobs["content"][0]["logprob"].as_f64());
            let missing = || format!("{}/v1/completions gives no log-probabilities", self.url);
            first.map(|logprob| logprob as f32).ok_or_else(missing)
        }))
    }

    /// The first choice.
    fn complete(&self, ids: &[u32], more: &Value) -> Result<Given<Value>, Failure> {
        let mut body = json!({ "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1 });
        body.as_object_mut()
            .into_iter()
            .for_each(|fields| fields.extend(more.as_object().cloned().unwrap_or_default()));
        let place = format!("{}/v1/completions", self.url);
        let answer = read(&place, self.agent.post(&place).send_json(body))?;
        Ok(answer.map(|body| body["choices"][0].clone()))
    }
}

/// A server that is not up yet is waited for; one that says no has said so.
fn read(place: &str, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Given<Value>, Failure> {
    let no_answer =
        |why: String| Failure::NoAnswer(format!("the shadow check at server.url: {place} does not answer: {why}"));
    let mut answer = answer.map_err(|error| no_answer(error.to_string()))?;
    match answer.status().as_u16() {
        200..=299 => {}
        status @ (429 | 500..=599) => return Err(no_answer(format!("HTTP {status}"))),
        status => return Ok(Err(format!("{place} answers HTTP {status}"))),
    }
    Ok(answer.body_mut().read_json().map_err(|error| format!("{place} gives no JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    /// A server that answers each request by its path and body with a status and a body; its URL.
    fn server(answer: impl Fn(&str, Value) -> (u16, Value) + Send + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut request, mut length) = (String::new(), 0);
                reader.read_line(&mut request).unwrap();
                for line in reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
                    if let Some((name, value)) = line.split_once(": ")
                        && name.eq_ignore_ascii_case("content-length")
                    {
                        length = value.parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let path = request.split(' ').nth(1).unwrap();
                let (status, body) = answer(path, serde_json::from_slice(&body).unwrap_or_default());
                let body = body.to_string();
                let head =
                    format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                reader.get_mut().write_all((head + &body).as_bytes()).unwrap();
            }
        });
        url
    }

    fn named(path: &str) -> Option<(u16, Value)> {
        (path == "/v1/models").then(|| (200, json!({ "data": [{ "id": "m" }] })))
    }

    #[test]
    fn log_probabilities_of_a_prompt_are_read_as_vllm_gives_them() {
        let url = server(|path, body| {
            named(path).unwrap_or_else(|| {
                assert_eq!((&body["model"], &body["prompt"], &body["max_tokens"]), (&json!("m"), &json!([5, 7, 9]), &json!(1)));
                assert_eq!(body["prompt_logprobs"], 0);
                let of = |logprob: f64| json!({ "logprob": logprob, "rank": 3, "decoded_token": "x" });
                (200, json!({ "choices": [{ "prompt_logprobs": [null, { "7": of(-1.5) }, { "1": of(-0.1), "9": of(-2.5) }] }] }))
            })
        });
        let http = Http::open(&url).unwrap().unwrap();
        assert_eq!(http.prompt_logprobs(&[5, 7, 9]).unwrap(), Ok(vec![-1.5, -2.5]));
    }

    #[test]
    fn a_server_without_them_is_asked_for_its_most_likely_token() {
        let url = server(|path, body| {
            named(path).unwrap_or_else(|| match body["prompt_logprobs"].is_null() {
                false => (400, json!({ "error": "unknown field" })),
                true => (200, json!({ "choices": [{ "logprobs": { "token_logprobs": [-0.75] } }] })),
            })
        });
        let http = Http::open(&url).unwrap().unwrap();
        assert!(http.prompt_logprobs(&[5, 7]).unwrap().is_err());
        assert_eq!(http.greedy_logprob(&[5]).unwrap(), Ok(-0.75));
        let url = server(|path, _| {
            let found = json!({ "logprobs": { "content": [{ "id": 7, "logprob": -0.5 }] } });
            named(path).unwrap_or((200, json!({ "choices": [found] })))
        });
        assert_eq!(Http::open(&url).unwrap().unwrap().greedy_logprob(&[5]).unwrap(), Ok(-0.5));
    }

    #[test]
    fn a_server_that_is_not_up_yet_is_waited_for_and_one_that_says_no_is_not() {
        let starting = server(|_, _| (503, json!({})));
        assert!(matches!(Http::open(&starting), Err(Failure::NoAnswer(why)) if why.contains("HTTP 503")));
        assert!(matches!(Http::open("http://127.0.0.1:1"), Err(Failure::NoAnswer(_))));
        let other = server(|_, _| (404, json!({})));
        assert!(Http::open(&other).unwrap().is_err_and(|why| why.contains("HTTP 404")));
    }

    #[test]
    fn differences_beyond_the_tolerance_are_refused_with_their_size() {
        let tolerance = Tolerance { mean: 0.05, largest: 0.5 };
        let found = compare(&[-1.0, -2.0], &[-1.03, -2.0], &tolerance).unwrap();
        assert!(
            matches!(&found, Finding::Agrees(text) if text.starts_with("2 log-probabilities within 3.0e-2")),
            "{found:?}"
        );
        for theirs in [[-1.0, -2.2], [-1.6, -2.0], [f32::NAN, -2.0]] {
            let Err(Failure::Differs(error)) = compare(&[-1.0, -2.0], &theirs, &tolerance) else {
                panic!("{theirs:?}")
            };
            assert!(error.to_string().contains("computes with other bytes"), "{error}");
        }
        let Err(Failure::Differs(error)) = compare(&[-1.0, -2.0], &[-1.0, -4.5], &tolerance) else { panic!() };
        assert!(error.to_string().contains("1.250 on average and 2.500 at most"), "{error}");
    }

    #[test]
    fn the_prompt_avoids_the_ends_of_the_vocabulary() {
        for vocab in [16, 1280, 151_936] {
            let ids = prompt(vocab, 512);
            assert_eq!(ids.len(), 17);
            assert!(ids.iter().all(|&id| id as usize >= vocab / 8 && (id as usize) < vocab * 3 / 4), "{ids:?}");
        }
        assert_eq!(prompt(1280, 2).len(), 2);
    }
}
