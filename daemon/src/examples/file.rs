//! Examples in a file, one JSON object a line.

use std::path::Path;

use anyhow::{Context, Result, bail};
use model::Example;
use serde_json::Value;

use super::Templates;

/// Reads a file of examples for the model of a directory, each with the number of its line. Examples of token ids need no
/// tokenizer; others, of `max_tokens` tokens at most, use the model's.
///
/// # Errors
/// What is wrong, with the file and the line.
pub fn read(model_dir: &Path, max_tokens: usize, path: &Path) -> Result<Vec<(usize, Example)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut templates = None;
    let mut examples = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}, line {number}", path.display());
        let json: Value = serde_json::from_str(line).with_context(place)?;
        let (ids, spans) = if json.get("context_ids").is_some() {
            let ids = |key: &str| -> Result<Vec<u32>> {
                serde_json::from_value(json[key].clone()).with_context(|| format!("{}: {key}", place()))
            };
            let (mut all, decision) = (ids("context_ids")?, ids("decision_ids")?);
            let start = all.len();
            all.extend(decision);
            let end = all.len();
            (all, vec![start..end])
        } else {
            if templates.is_none() {
                crate::cli::need_tokenizer(model_dir)?;
                templates = Some(Templates::load(model_dir, max_tokens)?);
            }
            let (_, prepared) = templates.as_ref().expect("just loaded").prepare(&json).with_context(place)?;
            (prepared.ids, prepared.spans)
        };
        examples.push((number, Example::new(ids, spans).with_context(place)?));
    }
    if examples.is_empty() {
        bail!("{} holds no examples", path.display());
    }
    Ok(examples)
}
