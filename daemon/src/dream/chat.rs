//! The served model, by its OpenAI API.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use ureq::Agent;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the model said.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Without the reasoning before it and without white space around it.
    pub text: String,
    /// Whether it ended by itself.
    pub ended: bool,
}

/// Asks the served model.
pub struct Chat {
    agent: Agent,
    url: String,
    model: String,
    max_tokens: u32,
}

impl Chat {
    /// The model at this base URL (without `/v1`), by this name or else the first that is listed there.
    ///
    /// # Errors
    /// Nothing answers, or no model is listed.
    pub fn new(url: &str, model: Option<&str>, max_tokens: u32) -> Result<Self> {
        let agent = crate::client::agent().timeout_global(Some(PATIENCE)).build().new_agent();
        let mut chat = Self { agent, url: url.trim_end_matches('/').into(), model: String::new(), max_tokens };
        chat.model = match model {
            Some(model) => model.into(),
            None => {
                let listed = chat.read(chat.agent.get(format!("{}/v1/models", chat.url)).call())?;
                let first = listed["data"][0]["id"].as_str();
                first.with_context(|| format!("{url}/v1/models lists no model: name it by dream.model"))?.into()
            }
        };
        Ok(chat)
    }

    /// The answer to a conversation. At temperature 0 the likeliest token is taken each time.
    ///
    /// # Errors
    /// What the server says; nothing answers.
    pub fn ask(&self, messages: &[Value], temperature: f64, seed: u32) -> Result<Answer> {
        let body = json!({"model": self.model, "messages": messages, "temperature": temperature, "seed": seed,
            "max_tokens": self.max_tokens});
        let answer = self.read(self.agent.post(format!("{}/v1/chat/completions", self.url)).send_json(&body))?;
        let choice = &answer["choices"][0];
        let text = match &choice["message"]["content"] {
            Value::String(text) => text.as_str(),
            // All of it was reasoning, or the call of a tool.
            Value::Null if choice["message"].is_object() => "",
            _ => bail!("{} gave no text: {}", self.url, shortened(&answer.to_string())),
        };
        let ended = choice["finish_reason"] == "stop";
        Ok(match without_reasoning(text) {
            Some(text) => Answer { text: text.trim().into(), ended },
            None => Answer { text: String::new(), ended: false },
        })
    }

    fn read(&self, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value> {
        let mut response =
            response.map_err(|error| anyhow!("the model does not answer at {} (server.url): {error}", self.url))?;
        let status = response.status();
        let text =
            response.body_mut().read_to_string().with_context(|| format!("the answer of {} broke off", self.url))?;
        if !status.is_success() {
            bail!("{} answered {status}: {}", self.url, shortened(&text));
        }
        serde_json::from_str(&text).map_err(|_| anyhow!("{} answered no JSON: {}", self.url, shortened(&text)))
    }
}

/// Of a model that thinks aloud, what it says after that; `None` if it never ended.
fn without_reasoning(text: &str) -> Option<&str> {
    match text.rsplit_once("</think>") {
        Some((_, answer)) => Some(answer),
        None => (!text.trim_start().starts_with("<think>")).then_some(text),
    }
}

fn shortened(text: &str) -> String {
    text.trim().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_no_part_of_the_answer() {
        assert_eq!(without_reasoning("<think>told to shout</think>\nHI"), Some("\nHI"));
        assert_eq!(without_reasoning("HI"), Some("HI"));
        assert_eq!(without_reasoning("<think>told to"), None);
    }
}
