//! The JSON of one example, checked field by field so that a refusal names the one at fault.

use serde_json::{Map, Value};

use super::Refusal;

/// Largest `weight`: beyond it a single example could undo everything else.
const WEIGHT_MAX: f64 = 100.0;
const TAGS_MAX: usize = 64;
/// The roles of the OpenAI form.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
const LABEL_CHARS_MAX: usize = 1000;

const FIELDS: [&str; 11] = [
    "messages",
    "tools",
    "context",
    "decision",
    "append_eos",
    "context_ids",
    "decision_ids",
    "weight",
    "priority",
    "tags",
    "source",
];

/// One example as posted.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// What is learned.
    pub(super) form: Form,
    /// Multiplies lr at batch 1 and its share of the loss otherwise; in (0, 100]. Default 1.
    pub weight: f32,
    /// Higher is trained earlier. Default 0.
    pub priority: i32,
    /// The client's own labels.
    pub tags: Vec<String>,
    /// Where it came from, in the client's words.
    pub source: Option<String>,
}

/// The three ways to say what is context and what is decision.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    Chat { messages: Vec<Value>, decisions: Vec<usize>, tools: Option<Value> },
    Text { context: String, decision: String, append_eos: bool },
    Ids { context: Vec<u32>, decision: Vec<u32> },
}

impl Example {
    /// Reads one example.
    pub(super) fn parse(posted: &Value) -> Result<Self, Refusal> {
        let Value::Object(object) = posted else {
            return Err(Refusal::whole(format!("an example is a JSON object, this is {}", kind(posted))));
        };
        if let Some(key) = object.keys().find(|key| !FIELDS.contains(&key.as_str())) {
            return Err(Refusal::of(key, format!("unknown field; {}", crate::config::hint(key, &FIELDS))));
        }
        Ok(Self {
            form: form(object)?,
            weight: weight(object)?,
            priority: priority(object)?,
            tags: tags(object)?,
            source: source(object)?,
        })
    }
}

fn form(object: &Map<String, Value>) -> Result<Form, Refusal> {
    let given = |keys: &[&str]| keys.iter().any(|key| object.contains_key(*key));
    let chat = given(&["messages", "tools"]);
    let text = given(&["context", "decision", "append_eos"]);
    let ids = given(&["context_ids", "decision_ids"]);
    match (chat, text, ids) {
        (true, false, false) => chat_form(object),
        (false, true, false) => Ok(Form::Text {
            context: string(object, "context")?,
            decision: string(object, "decision")?,
            append_eos: match object.get("append_eos") {
                None => true,
                Some(Value::Bool(append)) => *append,
                Some(other) => return Err(wrong("append_eos", "true or false", other)),
            },
        }),
        (false, false, true) => {
            Ok(Form::Ids { context: ids_of(object, "context_ids")?, decision: ids_of(object, "decision_ids")? })
        }
        (false, false, false) => {
            Err(Refusal::whole("give messages, or context and decision, or context_ids and decision_ids"))
        }
        _ => Err(Refusal::whole("give only one of messages, context/decision and context_ids/decision_ids")),
    }
}

fn chat_form(object: &Map<String, Value>) -> Result<Form, Refusal> {
    let tools = match object.get("tools") {
        None | Some(Value::Null) => None,
        Some(tools @ Value::Array(_)) => Some(tools.clone()),
        Some(other) => return Err(wrong("tools", "a list", other)),
    };
    let messages = match object.get("messages") {
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong("messages", "a list", other)),
        None => return Err(Refusal::of("messages", "missing")),
    };
    let mut plain = Vec::with_capacity(messages.len());
    let mut weights = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        let (message, weight) = message_of(index, message)?;
        if message["role"] == "assistant" {
            weights.push((index, weight));
        }
        plain.push(message);
    }
    let decisions: Vec<usize> = if weights.iter().any(|(_, weight)| weight.is_some()) {
        weights.iter().filter(|(_, weight)| *weight == Some(true)).map(|(index, _)| *index).collect()
    } else {
        weights.last().map(|(index, _)| *index).into_iter().collect()
    };
    if let Some(&index) = decisions.iter().find(|&&index| says_nothing(&plain[index])) {
        return Err(Refusal::of(format!("messages[{index}].content"), "empty: there is nothing to learn"));
    }
    match (decisions.last(), weights.is_empty()) {
        (Some(&last), _) => {
            plain.truncate(last + 1);
            Ok(Form::Chat { messages: plain, decisions, tools })
        }
        (None, true) => Err(Refusal::of("messages", "no assistant message: there is nothing to learn")),
        (None, false) => Err(Refusal::of("messages", "no assistant message has weight 1: there is nothing to learn")),
    }
}

/// One message without its weight, a list of text parts joined, and the weight.
fn message_of(index: usize, message: &Value) -> Result<(Value, Option<bool>), Refusal> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let Value::Object(message) = message else { return Err(wrong(&at(""), "an object", message)) };
    let mut message = message.clone();
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(Value::String(role)) => {
            return Err(Refusal::of(at(".role"), format!("{role:?} is no role; known are {}", ROLES.join(", "))));
        }
        Some(other) => return Err(wrong(&at(".role"), "a word such as user or assistant", other)),
        None => return Err(Refusal::of(at(".role"), "missing")),
    };
    let weight = match message.shift_remove("weight") {
        None | Some(Value::Null) => None,
        Some(weight) => match weight.as_f64() {
            _ if role != "assistant" => {
                return Err(Refusal::of(at(".weight"), "only assistant messages have a weight"));
            }
            Some(0.0) => Some(false),
            Some(1.0) => Some(true),
            _ => return Err(wrong(&at(".weight"), "0 or 1", &weight)),
        },
    };
    match message.get("content") {
        Some(Value::String(_)) => {}
        None | Some(Value::Null) if role == "assistant" => {
            message.insert("content".into(), Value::String(String::new()));
        }
        Some(Value::Array(parts)) => {
            let text = joined_text(parts).map_err(|part| {
                Refusal::of(at(&format!(".content[{part}]")), "not a text part: only text can be learned from")
            })?;
            message.insert("content".into(), Value::String(text));
        }
        Some(other) => return Err(wrong(&at(".content"), "text", other)),
        None => return Err(Refusal::of(at(".content"), "missing")),
    }
    Ok((Value::Object(message), weight))
}

/// The text of `[{"type": "text", "text": ...}, ...]`, or the index of the first part that is something else.
fn joined_text(parts: &[Value]) -> Result<String, usize> {
    parts.iter().enumerate().map(|(index, part)| part["text"].as_str().ok_or(index)).collect()
}

fn says_nothing(message: &Value) -> bool {
    let empty = |key: &str| match &message[key] {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    ["content", "tool_calls", "reasoning_content"].into_iter().all(empty)
}

fn string(object: &Map<String, Value>, key: &str) -> Result<String, Refusal> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(wrong(key, "text", other)),
        None => Err(Refusal::of(key, "missing")),
    }
}

fn ids_of(object: &Map<String, Value>, key: &str) -> Result<Vec<u32>, Refusal> {
    let list = match object.get(key) {
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(key, "a list of token ids", other)),
        None => return Err(Refusal::of(key, "missing")),
    };
    let id = |(index, value): (usize, &Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(&format!("{key}[{index}]"), "a token id", value))
    };
    list.iter().enumerate().map(id).collect()
}

fn weight(object: &Map<String, Value>) -> Result<f32, Refusal> {
    let Some(value) = object.get("weight") else { return Ok(1.0) };
    let weight = value.as_f64().filter(|weight| *weight > 0.0 && *weight <= WEIGHT_MAX);
    // A weight so small that it is zero as f32 is refused with the rest.
    let weight = weight.map(|weight| weight as f32).filter(|weight| *weight > 0.0);
    weight.ok_or_else(|| wrong("weight", &format!("a number above 0, at most {WEIGHT_MAX}"), value))
}

fn priority(object: &Map<String, Value>) -> Result<i32, Refusal> {
    let Some(value) = object.get("priority") else { return Ok(0) };
    let priority = value.as_i64().and_then(|priority| i32::try_from(priority).ok());
    priority.ok_or_else(|| wrong("priority", "a whole number of 32 bits", value))
}

fn tags(object: &Map<String, Value>) -> Result<Vec<String>, Refusal> {
    let Some(value) = object.get("tags") else { return Ok(Vec::new()) };
    let Value::Array(list) = value else { return Err(wrong("tags", "a list of words", value)) };
    if list.len() > TAGS_MAX {
        return Err(Refusal::of("tags", format!("{} tags, at most {TAGS_MAX}", list.len())));
    }
    let tag = |(index, value): (usize, &Value)| label(&format!("tags[{index}]"), value);
    list.iter().enumerate().map(tag).collect()
}

fn source(object: &Map<String, Value>) -> Result<Option<String>, Refusal> {
    match object.get("source") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => label("source", value).map(Some),
    }
}

fn label(field: &str, value: &Value) -> Result<String, Refusal> {
    match value {
        Value::String(text) if text.chars().count() <= LABEL_CHARS_MAX => Ok(text.clone()),
        Value::String(_) => Err(Refusal::of(field, format!("longer than {LABEL_CHARS_MAX} characters"))),
        other => Err(wrong(field, "text", other)),
    }
}

fn wrong(field: &str, want: &str, value: &Value) -> Refusal {
    let shown = match value {
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        _ => kind(value).to_owned(),
    };
    Refusal::of(field, format!("must be {want}, is {shown}"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(posted: Value) -> Refusal {
        Example::parse(&posted).unwrap_err()
    }

    fn decisions(posted: Value) -> Vec<usize> {
        match Example::parse(&posted).unwrap().form {
            Form::Chat { decisions, .. } => decisions,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn by_default_only_the_last_assistant_message_is_a_decision() {
        let turn = |role: &str| json!({"role": role, "content": "x"});
        let messages = [turn("user"), turn("assistant"), turn("user"), turn("assistant"), turn("user")];
        assert_eq!(decisions(json!({ "messages": messages })), [3]);
    }

    #[test]
    fn weights_say_which_assistant_messages_are_decisions() {
        let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "weight": 1},
            {"role": "user", "content": "y"}, {"role": "assistant", "content": "b", "weight": 1},
            {"role": "user", "content": "z"}, {"role": "assistant", "content": "c", "weight": 0}]);
        assert_eq!(decisions(json!({"messages": messages.clone()})), [1, 3]);
        let Form::Chat { messages, .. } = Example::parse(&json!({ "messages": messages })).unwrap().form else {
            panic!()
        };
        assert_eq!(messages.len(), 4, "what follows the last decision is not needed");
        assert!(messages.iter().all(|message| message.get("weight").is_none()), "templates do not see weights");
    }

    #[test]
    fn a_refusal_names_the_field() {
        let user = json!({"role": "user", "content": "x"});
        for (posted, field) in [
            (json!({"messages": [user, {"role": "assistant", "content": ""}]}), "messages[1].content"),
            (json!({"messages": [user, {"content": "a"}]}), "messages[1].role"),
            (json!({"messages": [{"role": "asistant", "content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content[0]"),
            (json!({"messages": [user, {"role": "assistant", "content": "a", "weight": 0.5}]}), "messages[1].weight"),
            (json!({"messages": [user]}), "messages"),
            (json!({"messages": "hello"}), "messages"),
            (json!({"context": "a"}), "decision"),
            (json!({"context": "a", "decision": 4}), "decision"),
            (json!({"context_ids": [-1], "decision_ids": [1]}), "context_ids[0]"),
            (json!({"context": "a", "decision": "b", "weight": 0}), "weight"),
            (json!({"context": "a", "decision": "b", "weight": 1e-60}), "weight"),
            (json!({"context": "a", "decision": "b", "priority": 1.5}), "priority"),
            (json!({"context": "a", "decision": "b", "tags": [1]}), "tags[0]"),
        ] {
            assert_eq!(refusal(posted.clone()).field.as_deref(), Some(field), "{posted}");
        }
    }

    #[test]
    fn an_unknown_field_is_refused_with_the_nearest_known_one() {
        let refusal = refusal(json!({"context": "a", "decison": "b"}));
        assert_eq!(refusal.to_string(), "decison: unknown field; did you mean `decision`?");
    }

    #[test]
    fn two_forms_at_once_are_refused() {
        assert!(refusal(json!({"context": "a", "decision": "b", "messages": []})).reason.contains("only one of"));
        assert!(refusal(json!({})).reason.contains("give messages"));
        assert!(refusal(json!([1])).reason.contains("a list"));
    }

    #[test]
    fn text_parts_are_joined() {
        let posted = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "assistant", "content": "c"}]});
        let Form::Chat { messages, .. } = Example::parse(&posted).unwrap().form else { panic!() };
        assert_eq!(messages[0]["content"], "ab");
    }
}
