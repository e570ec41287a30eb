//! The other bodies that clients post: a job of the earlier system's (`POST /train`) down to tokens, and the embedded engine's
//! completions down to the prompt.

use std::sync::OnceLock;

use apollod::examples::Templates;
use apollod::http::Job;
use serde_json::json;

use super::examples::{MAX_TOKENS, both_templates};
use crate::Target;

/// Examples that may wait, and so steps of a job.
const CAPACITY: u64 = 10_000;

fn templates() -> &'static [Templates; 2] {
    static TEMPLATES: OnceLock<[Templates; 2]> = OnceLock::new();
    TEMPLATES.get_or_init(both_templates)
}

/// A body of `POST /train`. The first byte says which of two templates; one of them renders a rationale.
pub const JOB: Target = Target {
    name: "train_job",
    accepts: |input| {
        let Some((how, body)) = input.split_first() else { return false };
        let Ok(job) = Job::read(&templates()[usize::from(how & 1)], CAPACITY, body) else { return false };
        assert!((1..=CAPACITY as usize).contains(&job.steps()), "{} steps", job.steps());
        assert!(job.tokens() <= (job.steps() * MAX_TOKENS) as u64, "{} tokens", job.tokens());
        true
    },
    seeds: || {
        let whole = json!({"training_data": {
            "samples": [
                {"input": "2+2=", "expected_output": "4", "rationale": "count"},
                {"input": "h\u{e4}?", "expected_output": "ja", "rationale": null},
            ],
            "config": {"learning_rate": 1e-5, "max_steps": 10},
        }});
        let bare = json!({"training_data": {"samples": [{"input": "a", "expected_output": "b"}]}});
        let many = json!({"training_data": {"samples": [{"input": "a", "expected_output": "b"}], "config": {"max_steps": CAPACITY}}});
        let body = |how: u8, body: serde_json::Value| [&[how], body.to_string().as_bytes()].concat();
        vec![body(1, whole.clone()), body(0, whole), body(0, bare), body(0, many)]
    },
    words: &[
        "{\"training_data\":{",
        "\"samples\":[",
        "{\"input\":\"",
        "\"expected_output\":\"",
        "\"rationale\":\"",
        "\"config\":{",
        "\"learning_rate\":1e-5",
        "\"max_steps\":10",
        "18446744073709551615",
        "null",
        "<|im_end|>",
        "</think>",
    ],
};

/// A body of the engine's. The first byte says which of two templates, and whether it is a chat.
pub const PROMPT: Target = Target {
    name: "engine_prompt",
    accepts: |input| {
        let Some((how, body)) = input.split_first() else { return false };
        let (templates, chat) = (&templates()[usize::from(how & 1)], how & 2 == 0);
        let Ok(ids) = apollod::engine::prompt(templates, MAX_TOKENS, body, chat) else { return false };
        assert!(!ids.is_empty() && ids.len() < MAX_TOKENS && ids.iter().all(|id| *id < 259), "{ids:?}");
        true
    },
    seeds: || {
        let chat = json!({"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "h\u{e4}?"}],
            "temperature": 0.5, "top_p": 0.9, "seed": 7, "max_completion_tokens": 9, "stream": true});
        let text = json!({"prompt": "2+2=", "max_tokens": 4, "temperature": 0});
        let body = |how: u8, body: &serde_json::Value| [&[how], body.to_string().as_bytes()].concat();
        vec![body(0, &chat), body(1, &chat), body(2, &text), body(3, &text)]
    },
    words: &[
        "\"messages\":[",
        "{\"role\":\"user\",\"content\":\"",
        "{\"role\":\"assistant\",\"content\":\"",
        "\"prompt\":\"",
        "\"temperature\":",
        "\"top_p\":",
        "\"seed\":",
        "\"max_tokens\":",
        "\"max_completion_tokens\":",
        "\"stream\":true",
        "1e999",
        "<|im_start|>",
        "\\ud83d\\ude00",
    ],
};
