//! Decision spans of a conversation, found in the model's own rendering of it.
//!
//! For a decision at message i: the context is messages[..i] rendered with the generation prompt, exactly what the
//! server's model would see; the decision is what the rendering of messages[..=i] adds, through the end-of-turn
//! token: a trained answer must also stop. What the template writes after that token belongs to the next turn.
//! Both renderings are tokenized, and the first must be a prefix of the second token by token: otherwise the model
//! would be taught an answer to a prompt that it never gets, and the example is refused.

use std::ops::Range;

use serde_json::Value;

use super::{Prepared, Refusal, Templates};

impl Templates {
    /// Renders `messages` (which end with the last decision) and finds the span of each decision.
    pub(super) fn chat(
        &self,
        messages: &[Value],
        decisions: &[usize],
        tools: Option<&Value>,
    ) -> Result<Prepared, Refusal> {
        let mut ids = self.render(messages, tools, false)?;
        // The last first: it says how long the example is, and every decision of one that is too long would be rendered
        // twice, a time that grows as its square.
        let mut spans = Vec::with_capacity(decisions.len());
        for &index in decisions.iter().rev() {
            spans.push(self.decision_span(messages, index, tools, &ids)?);
            self.check_length(spans[0].end)?;
        }
        spans.reverse();
        ids.truncate(spans.last().map_or(0, |span| span.end));
        Ok(Prepared { ids, spans })
    }

    fn decision_span(
        &self,
        messages: &[Value],
        index: usize,
        tools: Option<&Value>,
        ids: &[u32],
    ) -> Result<Range<usize>, Refusal> {
        let refuse = |reason: String| Refusal::of(format!("messages[{index}]"), reason);
        let context = self.render(&messages[..index], tools, true)?;
        if context.is_empty() {
            return Err(refuse("nothing comes before it: the first decision token needs something to follow".into()));
        }
        if let Some(at) = first_difference(&context, ids) {
            return Err(refuse(format!(
                "the chat template renders the conversation up to this answer differently with and without the answer \
                 (first at token {at}: {:?} against {:?}), so what would be learned is not what the server asks",
                self.tokens.decode_all(&context[at..context.len().min(at + 8)]),
                self.tokens.decode_all(&ids[at.min(ids.len())..ids.len().min(at + 8)]),
            )));
        }
        let last = index + 1 == messages.len();
        let through = if last { ids.to_vec() } else { self.render(&messages[..=index], tools, false)? };
        let answer = through.get(context.len()..).unwrap_or_default();
        let ends_turn = |id: &u32| self.tokens.eos.contains(id);
        let end =
            answer.iter().rposition(ends_turn).or_else(|| answer.iter().rposition(|id| self.tokens.is_special(*id)));
        let Some(end) = end else {
            return Err(refuse(
                "the chat template ends it with no end-of-turn token, so it could not learn to stop".into(),
            ));
        };
        let span = context.len()..context.len() + end + 1;
        if first_difference(&through[..span.end], ids).is_some() {
            return Err(refuse(
                "the chat template renders this answer differently once the conversation goes on; \
                 post it as an example of its own"
                    .into(),
            ));
        }
        Ok(span)
    }

    /// Renders and tokenizes; the template has already written the special tokens.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, Refusal> {
        let Some(template) = &self.template else {
            let reason = "the model has no chat template (tokenizer_config.json or chat_template.jinja); \
                          post context and decision instead";
            return Err(Refusal::of("messages", reason));
        };
        let text = template
            .render(messages, tools, add_generation_prompt)
            .map_err(|reason| Refusal::of("messages", format!("chat template: {reason}")))?;
        self.tokens.encode(&text, false)
    }
}

/// Where `ids` first differs from `prefix`; `None` when `prefix` is one.
fn first_difference(prefix: &[u32], ids: &[u32]) -> Option<usize> {
    (0..prefix.len()).find(|&at| ids.get(at) != Some(&prefix[at]))
}

#[cfg(test)]
mod tests {
    use super::super::tiny_model::{self, CHATML, IM_END, IM_START};
    use super::*;
    use serde_json::json;

    fn templates(template: &str) -> (tempfile::TempDir, Templates) {
        let dir = tempfile::tempdir().unwrap();
        tiny_model::write(dir.path(), template);
        let templates = Templates::load(dir.path(), 10_000).unwrap();
        (dir, templates)
    }

    /// Writes the last message as it is and those before in capitals.
    const LAST_DIFFERS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}{{ m.content | upper }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn two_answers(first: &str, second: &str) -> Value {
        json!({"messages": [
            {"role": "system", "content": ""}, {"role": "assistant", "content": first, "weight": 1},
            {"role": "user", "content": "B"}, {"role": "assistant", "content": second, "weight": 1}]})
    }

    fn shown(templates: &Templates, prepared: &Prepared) -> Vec<String> {
        prepared.spans.iter().map(|span| templates.tokens.decode_all(&prepared.ids[span.clone()])).collect()
    }

    #[test]
    fn the_decision_is_the_answer_through_its_end_of_turn_token() {
        let (_dir, templates) = templates(CHATML);
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
        let (_, prepared) = templates.prepare(&json!({ "messages": messages })).unwrap();
        assert_eq!(shown(&templates, &prepared), ["Yo<|im_end|>"]);
        assert_eq!(prepared.ids.last(), Some(&IM_END), "the newline after the turn is not kept");
        let prompt = templates.render_prompt(&messages.as_array().unwrap()[..1]).unwrap();
        assert_eq!(prepared.ids[..prepared.spans[0].start], prompt);
        assert_eq!(templates.tokens.decode_all(&prompt), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(prompt[0], IM_START);
    }

    #[test]
    fn several_decisions_are_several_spans_of_one_rendering() {
        let (_dir, templates) = templates(CHATML);
        let messages = json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "one", "weight": 1},
            {"role": "user", "content": "b"}, {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "three", "weight": 1}]);
        let (_, prepared) = templates.prepare(&json!({ "messages": messages })).unwrap();
        assert_eq!(shown(&templates, &prepared), ["one<|im_end|>", "three<|im_end|>"]);
    }

    #[test]
    fn an_empty_think_block_that_only_the_answer_has_belongs_to_the_decision() {
        // As Qwen3's template does for the last answer.
        let (_dir, templates) = templates(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        );
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
        let (_, prepared) = templates.prepare(&json!({ "messages": messages })).unwrap();
        assert_eq!(shown(&templates, &prepared), ["<think>\n\n</think>\n\nYo<|im_end|>"]);
    }

    #[test]
    fn a_prompt_that_is_no_prefix_of_the_conversation_is_refused() {
        let (_dir, templates) = templates(
            "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        );
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
        let refusal = templates.prepare(&json!({ "messages": messages })).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("messages[1]"));
        assert!(refusal.reason.contains("differently with and without"), "{refusal}");
    }

    #[test]
    fn an_earlier_answer_that_is_rendered_differently_later_is_refused() {
        let (_dir, templates) = templates(LAST_DIFFERS);
        let refusal = templates.prepare(&two_answers("one", "two")).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("messages[1]"));
        assert!(refusal.reason.contains("once the conversation goes on"), "{refusal}");
    }

    /// Every decision is rendered twice, so a long body with many of them would keep the daemon busy for hours.
    #[test]
    fn what_is_too_long_is_refused_before_every_decision_was_looked_at() {
        let (_dir, templates) = templates(LAST_DIFFERS);
        let refusal = templates.prepare(&two_answers("one", &"long".repeat(3000))).unwrap_err();
        assert!(refusal.reason.contains("at most 10000 are taken"), "{refusal}");
    }

    #[test]
    fn what_the_template_raises_is_the_reason() {
        let (_dir, templates) = templates("{{ raise_exception('roles must alternate') }}");
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
        let refusal = templates.prepare(&json!({ "messages": messages })).unwrap_err();
        assert!(refusal.reason.contains("roles must alternate"), "{refusal}");
    }

    #[test]
    fn an_answer_without_end_of_turn_token_is_refused() {
        let (_dir, templates) = templates(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        );
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
        let refusal = templates.prepare(&json!({ "messages": messages })).unwrap_err();
        assert!(refusal.reason.contains("no end-of-turn token"), "{refusal}");
    }
}
