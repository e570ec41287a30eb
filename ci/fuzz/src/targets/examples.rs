//! What clients post, down to tokens: a body of `POST /v1/examples` through splitting, checking, the chat template and
//! the tokenizer; and a model's chat template itself.

use std::sync::OnceLock;

use apollod::examples::Templates;
use serde_json::json;

use super::{with_folder, write};
use crate::Target;

#[allow(dead_code)]
#[path = "../../../../daemon/tests/support/tiny_model.rs"]
mod tiny_model;

pub const MAX_TOKENS: usize = 400;
/// With tools, reasoning, and every message looked at, as larger models write them.
const WITH_TOOLS: &str = "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content.strip().split('</think>')[-1].lstrip('\\n') %}{%- else %}{%- set content = '' %}{%- endif %}{%- if message.role == 'tool' and loop.index0 == 0 %}{{- raise_exception('no tool has been called') }}{%- endif %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.reasoning_content is defined and message.reasoning_content %}{{- '<think>' ~ message.reasoning_content ~ '</think>' }}{%- endif %}{{- content }}{%- for call in message.tool_calls or [] %}{{- call.function.name ~ (call.function.arguments | tojson(indent=2)) }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
const CONTENT_TYPES: [Option<&str>; 2] = [None, Some("application/jsonl")];

/// A body. The first byte says which of two templates and whether the content type says JSONL.
pub const EXAMPLES: Target = Target {
    name: "examples",
    accepts: |input| {
        static TEMPLATES: OnceLock<[Templates; 2]> = OnceLock::new();
        let templates = TEMPLATES.get_or_init(both_templates);
        let Some((how, body)) = input.split_first() else { return false };
        let templates = &templates[usize::from(how & 1)];
        let Ok(items) = apollod::http::items(CONTENT_TYPES[usize::from(how >> 1 & 1)], body) else { return false };
        let mut taken = 0;
        for posted in items.iter().filter_map(|item| item.value.as_ref().ok()) {
            let Ok((example, prepared)) = templates.prepare(posted) else { continue };
            taken += 1;
            assert!(example.weight > 0.0 && example.weight.is_finite(), "weight {}", example.weight);
            assert!(prepared.ids.len() <= MAX_TOKENS && prepared.ids.iter().all(|id| *id < 259), "{:?}", prepared.ids);
            let mut at = 1;
            for span in &prepared.spans {
                assert!(at <= span.start && span.start < span.end, "{:?}", prepared.spans);
                at = span.end;
            }
            assert!(at > 1 && at <= prepared.ids.len(), "{:?} of {} tokens", prepared.spans, prepared.ids.len());
        }
        taken > 0
    },
    seeds: || {
        let call = json!({"function": {"name": "look", "arguments": {"at": ["sky", 3]}}});
        let chat = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hä?"},
            {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "weight": 1}], "weight": 0.5, "priority": -1, "tags": ["t"]});
        let tools = json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": null,
            "reasoning_content": "r", "tool_calls": [call]}], "tools": [{"name": "look"}], "source": "me"});
        let text = json!({"context": "2+2=", "decision": "4", "append_eos": false});
        let ids = json!({"context_ids": [1, 2], "decision_ids": [3]});
        let body = |how: u8, text: String| [&[how], text.as_bytes()].concat();
        vec![
            body(0, chat.to_string()),
            body(1, tools.to_string()),
            body(2, format!("{text}\n\n{ids}\nnot json\n")),
            body(0, json!([text, ids, chat]).to_string()),
            body(1, format!("{chat}\n{tools}\n")),
        ]
    },
    words: &[
        "\"messages\":[",
        "{\"role\":\"user\",\"content\":\"",
        "{\"role\":\"assistant\",\"content\":\"",
        "{\"role\":\"tool\",\"content\":\"",
        "\"weight\":1",
        "\"tool_calls\":[",
        "\"reasoning_content\":",
        "\"tools\":[",
        "\"context\":\"",
        "\"decision\":\"",
        "\"context_ids\":[",
        "\"decision_ids\":[",
        "\"append_eos\":false",
        "<|im_end|>",
        "<|im_start|>",
        "</think>",
        "\\ud83d\\ude00",
        "\\u0000",
    ],
};

/// A model's chat template, which is parsed when the model is loaded. What it does when it runs is its own: it is a program.
pub const TEMPLATE: Target = Target {
    name: "chat_template",
    accepts: |input| {
        with_folder(|folder| {
            tiny_model::write(folder, "");
            write(folder, "chat_template.jinja", input);
            Templates::load(folder, MAX_TOKENS).is_ok()
        })
    },
    seeds: || {
        let rare = "{% generation %}{{ messages[0].content | upper }}{% endgeneration %}{% for m in messages %}{% if loop.last \
                    %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%d %B %Y') }}{{ tools | tojson(indent=4) }}{{ bos_token }}";
        [tiny_model::CHATML, WITH_TOOLS, rare].map(|text| text.as_bytes().to_vec()).into()
    },
    words: &[
        "{%- for",
        "{%- endfor %}",
        "{% if",
        "{% endif %}",
        "{{",
        "}}",
        "{% set x =",
        "{% macro m(a) %}",
        "{% endmacro %}",
        "{% generation %}",
        "{% endgeneration %}",
        "namespace(",
        "raise_exception(",
        "strftime_now(",
        "tojson(indent=",
        "messages",
        "range(",
        "| length",
        ".strip()",
        ".split(",
        "[::-1]",
    ],
};

/// A small one, and one with tools and reasoning.
pub fn both_templates() -> [Templates; 2] {
    [tiny_model::CHATML, WITH_TOOLS].map(templates)
}

fn templates(template: &str) -> Templates {
    with_folder(|folder| {
        tiny_model::write(folder, template);
        Templates::load(folder, MAX_TOKENS).expect("a template that is known")
    })
}
