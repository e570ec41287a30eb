//! Hugging Face chat templates: Jinja as `apply_chat_template` runs it, with its additions.
//!
//! Blocks are trimmed on both sides; `raise_exception`, `strftime_now` and a `tojson` like Python's `json.dumps` with
//! `ensure_ascii=False` exist; the special tokens are variables; Python's string and dict methods work; a
//! `{% generation %}` block renders as its content.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter};

use super::TextError;
use super::tokens::{read_json, token_text};

const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"];

/// Widest indent of `tojson`, in spaces; a line of a deep value has many.
const INDENT_MAX: usize = 64;

/// A model's chat template with its special tokens.
pub(super) struct ChatTemplate {
    default: String,
    /// The template for conversations with tools, where there is one of its own.
    tool_use: Option<String>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Reads chat_template.jinja, or else tokenizer_config.json's `chat_template`; `None` when there is neither.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, TextError> {
        let Some(Source { origin, default, tool_use }) = source(dir)? else { return Ok(None) };
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_tokens = SPECIAL_TOKENS
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), token_text(&config[name])?.to_owned())))
            .collect();
        let template =
            Self { default: plain_jinja(&default), tool_use: tool_use.as_deref().map(plain_jinja), special_tokens };
        for text in std::iter::once(&template.default).chain(&template.tool_use) {
            environment().template_from_str(text).map_err(|error| TextError::Content {
                path: origin.clone(),
                reason: format!("the chat template does not parse: {error:#}"),
            })?;
        }
        Ok(Some(template))
    }

    /// Whether the template mentions `reasoning_content`.
    pub(super) fn renders_reasoning(&self) -> bool {
        self.default.contains("reasoning_content")
    }

    /// The conversation as text.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let text = match (tools, &self.tool_use) {
            (Some(_), Some(tool_use)) => tool_use,
            _ => &self.default,
        };
        let variables = Jinja::from_serialize(&Variables { messages, tools, add_generation_prompt });
        let special = Jinja::from_iter(self.special_tokens.iter().cloned());
        let environment = environment();
        let template = environment.template_from_str(text).map_err(|error| error.to_string())?;
        template.render(context! { ..variables, ..special }).map_err(|error| {
            // The detail of `raise_exception` is the template author's own message.
            error.detail().map_or_else(|| error.to_string(), str::to_owned)
        })
    }
}

#[derive(Serialize)]
struct Variables<'a> {
    messages: &'a [Value],
    tools: Option<&'a Value>,
    add_generation_prompt: bool,
}

/// A model's templates as they are written.
pub struct Source {
    origin: PathBuf,
    /// The one for all conversations.
    pub default: String,
    tool_use: Option<String>,
}

/// What chat_template.jinja says, or else tokenizer_config.json's `chat_template`; `None` when there is neither.
pub fn source(dir: &Path) -> Result<Option<Source>, TextError> {
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(default) => Ok(Some(Source { origin: path, default, tool_use: None })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let origin = dir.join("tokenizer_config.json");
            let config = read_json(&origin)?.unwrap_or_default();
            let templates = of_config(&config["chat_template"]);
            Ok(templates.map(|(default, tool_use)| Source { origin, default, tool_use }))
        }
        Err(source) => Err(TextError::Read { path, source }),
    }
}

/// `chat_template` is a text, or a list of named ones.
fn of_config(template: &Value) -> Option<(String, Option<String>)> {
    if let Some(text) = template.as_str() {
        return Some((text.to_owned(), None));
    }
    let named = template.as_array()?;
    let find = |name: &str| {
        named.iter().find(|entry| entry["name"] == name).and_then(|entry| entry["template"].as_str()).map(str::to_owned)
    };
    let first = || named.first().and_then(|entry| entry["template"].as_str()).map(str::to_owned);
    Some((find("default").or_else(first)?, find("tool_use")))
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(&format))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))?;
        Ok(text)
    });
    environment.add_filter("tojson", tojson);
    environment
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn tojson(value: &Jinja, _positional: Rest<Jinja>, options: Kwargs) -> Result<Jinja, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if indent > Some(INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson indents by {INDENT_MAX} at most")));
    }
    let bad = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(bad)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)).map_err(bad)?;
        }
    }
    let text = String::from_utf8(bytes).expect("serde_json writes UTF-8");
    Ok(Jinja::from_safe_string(text))
}

/// Python's separators: a space after each comma and colon.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Replaces Hugging Face's `{% generation %}` and `{% endgeneration %}`, which mark what a trainer's mask covers, by
/// a block that does nothing and keeps their whitespace control.
fn plain_jinja(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(open) = rest.find("{%") {
        let inside = open + 2;
        let Some(length) = rest[inside..].find("%}") else { break };
        let tag = &rest[inside..inside + length];
        let name = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..inside]);
        match name {
            "generation" => out.push_str(&tag.replace(name, "if true")),
            "endgeneration" => out.push_str(&tag.replace(name, "endif")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &rest[inside + length + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(config: Value) -> ChatTemplate {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::load(dir.path()).unwrap().unwrap()
    }

    fn render(text: &str, messages: Value) -> Result<String, String> {
        template(json!({"chat_template": text, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})).render(
            messages.as_array().unwrap(),
            None,
            false,
        )
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let text = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(text, json!([{"content": "a"}, {"content": "b"}])).unwrap(), "a\nb\n");
    }

    #[test]
    fn special_tokens_are_variables() {
        assert_eq!(render("{{ bos_token }}x{{ eos_token }}{{ pad_token }}", json!([])).unwrap(), "<s>x</s>");
    }

    #[test]
    fn tojson_does_not_indent_without_bound() {
        let refusal = render("{{ messages | tojson(indent=9999999999999) }}", json!([])).unwrap_err();
        assert!(refusal.contains("64 at most"), "{refusal}");
    }

    #[test]
    fn a_tag_that_is_its_own_end_is_refused() {
        assert_eq!(plain_jinja("{%}{{ a }}"), "{%}{{ a }}");
        assert_eq!(plain_jinja("{%}{% generation %}"), "{%}{% generation %}");
        assert_eq!(plain_jinja("{%- generation %}{% endgeneration -%}"), "{%- if true %}{% endif -%}");
    }

    #[test]
    fn tojson_writes_as_python_does_and_keeps_the_order_of_keys() {
        let messages = json!([{"z": 1, "a": ["<ü>", null, true]}]);
        let out = render("{{ messages[0] | tojson }}", messages.clone()).unwrap();
        assert_eq!(out, r#"{"z": 1, "a": ["<ü>", null, true]}"#);
        let out = render("{{ messages[0].a | tojson(indent=2) }}", messages).unwrap();
        assert_eq!(out, "[\n  \"<ü>\",\n  null,\n  true\n]");
    }

    #[test]
    fn python_methods_work() {
        let text = "{{ messages[0].content.strip().split('|')[1] }}{{ messages[0].get('none', 'x') }}";
        assert_eq!(render(text, json!([{"content": "  a|b "}])).unwrap(), "bx");
    }

    #[test]
    fn a_generation_block_renders_as_its_content() {
        let text = "{% generation %}\n  {{- messages[0].content }}\n{%- endgeneration %}.";
        assert_eq!(render(text, json!([{"content": "a"}])).unwrap(), "a.");
    }

    #[test]
    fn strftime_now_formats_and_refuses_bad_formats() {
        let year = render("{{ strftime_now('%Y') }}", json!([])).unwrap();
        assert!(year.len() == 4 && year.parse::<u32>().is_ok(), "{year}");
        assert!(render("{{ strftime_now('%!') }}", json!([])).unwrap_err().contains("bad format"));
    }

    #[test]
    fn a_list_of_named_templates_has_a_default() {
        let list = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        let template = template(json!({ "chat_template": list }));
        assert_eq!(template.render(&[], None, false).unwrap(), "D");
        assert_eq!(template.render(&[], Some(&json!([{}])), false).unwrap(), "T");
    }

    #[test]
    fn a_file_of_its_own_goes_before_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"chat_template": "config"}"#).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
        assert_eq!(template.render(&[], None, false).unwrap(), "file");
    }

    #[test]
    fn a_template_that_does_not_parse_is_refused_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), "{% for %}").unwrap();
        let Err(error) = ChatTemplate::load(dir.path()) else { panic!("taken") };
        assert!(error.to_string().contains("chat_template.jinja: the chat template does not parse"), "{error}");
    }
}
