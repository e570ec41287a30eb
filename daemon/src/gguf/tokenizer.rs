//! The tokenizer's metadata, from tokenizer.json and tokenizer_config.json: byte-level BPE, which llama.cpp calls
//! `gpt2`. Its pre-tokenizers are known to llama.cpp by name alone, so only those that are theirs exactly are written.

use crate::examples::{chat_template, read_json, token_text};
use anyhow::{Context, Result, bail};
use ipc::GgufValue;
use model::Config;
use serde_json::Value;
use std::path::Path;

/// llama.cpp's kinds of tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// llama.cpp's names of pre-tokenizers that are a regular expression, and whether merges are ignored for a word that
/// is a token.
const SPLITS: [(&str, bool, &str); 3] = [
    (
        "qwen2",
        false,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "llama-bpe",
        true,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "tekken",
        true,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// `tokenizer.*`.
///
/// # Errors
/// A tokenizer that llama.cpp has no name for, or that does not fit config.json.
pub fn metadata(model_dir: &Path, config: &Config) -> Result<Vec<(String, GgufValue)>> {
    let read = |name: &str| read_json(&model_dir.join(name)).map(Option::unwrap_or_default);
    let json = read("tokenizer.json")?;
    if json.is_null() {
        bail!("{} has no tokenizer.json", model_dir.display());
    }
    let (settings, model_config) = (read("tokenizer_config.json")?, read("config.json")?);
    let pre = pre_tokenizer(&json)?;
    let (tokens, kinds) = tokens(&json, config.decoder.vocab)?;
    let mut metadata = vec![
        ("tokenizer.ggml.model".to_owned(), GgufValue::string("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), GgufValue::string(pre)),
        ("tokenizer.ggml.merges".to_owned(), GgufValue::strings(merges(&json)?)),
    ];
    for kind in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"] {
        let text = token_text(&settings[format!("{kind}_token")]);
        let named = text.and_then(|text| tokens.iter().position(|token| token == text)).map(|id| id as u64);
        let id = named.or_else(|| model_config[format!("{kind}_token_id")].as_u64());
        if let Some(id) = id.filter(|id| *id < tokens.len() as u64) {
            let name = match kind {
                "unk" => "unknown",
                "sep" => "seperator",
                "pad" => "padding",
                kind => kind,
            };
            metadata.push((format!("tokenizer.ggml.{name}_token_id"), GgufValue::U32(id as u32)));
        }
    }
    for (kind, added) in added_tokens(&json, &settings) {
        metadata.push((format!("tokenizer.ggml.add_{kind}_token"), GgufValue::Bool(added)));
    }
    if let Some(template) = chat_template(model_dir)? {
        metadata.push(("tokenizer.chat_template".to_owned(), GgufValue::string(template.default)));
    }
    metadata.push(("tokenizer.ggml.tokens".to_owned(), GgufValue::strings(tokens)));
    metadata.push(("tokenizer.ggml.token_type".to_owned(), GgufValue::i32s(kinds)));
    Ok(metadata)
}

/// llama.cpp's name of the pre-tokenizer, if this is a byte-level BPE that it computes in the same way.
fn pre_tokenizer(json: &Value) -> Result<&'static str> {
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or("none");
    let byte_level = last(&json["pre_tokenizer"], "pretokenizers");
    if kind != "BPE" || model["byte_fallback"] == true || byte_level["type"] != "ByteLevel" {
        bail!("tokenizer.json is no byte-level BPE but {kind} (such as SentencePiece), which is not written here");
    }
    let normalizer = &json["normalizer"];
    let normalized = match normalizer["normalizers"].as_array() {
        Some(list) => list.iter().any(|one| one["type"] != "NFC"),
        None => !normalizer.is_null() && normalizer["type"] != "NFC",
    };
    if normalized || byte_level["add_prefix_space"] == true {
        bail!("tokenizer.json normalizes texts ({normalizer}, add_prefix_space), which llama.cpp would not");
    }
    let splits = match json["pre_tokenizer"]["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([splits @ .., _]) => splits,
        _ => &[],
    };
    let (name, ignore_merges) = match (splits, byte_level["use_regex"] != false) {
        ([], true) => ("gpt-2", false),
        ([digits], true) if digits["type"] == "Digits" && digits["individual_digits"] == true => ("smollm", false),
        ([split], false) if split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] != true => {
            let regex = split["pattern"]["Regex"].as_str().unwrap_or("");
            let known = SPLITS.iter().find(|(_, _, of)| *of == regex);
            known.map(|(name, ignore, _)| (*name, *ignore)).with_context(|| format!("no name for {regex:?}"))?
        }
        _ => bail!("llama.cpp has no name for the pre_tokenizer of tokenizer.json: {}", json["pre_tokenizer"]),
    };
    if ignore_merges != (model["ignore_merges"] == true) {
        bail!("tokenizer.json's ignore_merges is {}, llama.cpp's {name} has {ignore_merges}", model["ignore_merges"]);
    }
    Ok(name)
}

/// The last of a sequence, or the one there is.
fn last<'a>(one: &'a Value, list: &str) -> &'a Value {
    one[list].as_array().and_then(|list| list.last()).unwrap_or(one)
}

/// Text and kind of every token of the vocabulary; places that no token has are filled.
fn tokens(json: &Value, vocab: usize) -> Result<(Vec<String>, Vec<i32>)> {
    let mut tokens: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocab];
    let mut put = |id: &Value, text: &str, kind: i32| -> Result<()> {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab);
        let id = id.with_context(|| {
            format!("token {text:?} of tokenizer.json is outside config.json's vocab_size, {vocab}")
        })?;
        (tokens[id], kinds[id]) = (text.to_owned(), kind);
        Ok(())
    };
    for (text, id) in json["model"]["vocab"].as_object().context("tokenizer.json has no vocab")? {
        put(id, text, NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().context("an added token of tokenizer.json has no content")?;
        let control = added["special"] == true || (text.starts_with("<|") && text.ends_with("|>"));
        put(&added["id"], text, if control { CONTROL } else { USER_DEFINED })?;
    }
    Ok((tokens, kinds))
}

/// `left right` for each merge; tokenizer.json has such texts, or pairs.
fn merges(json: &Value) -> Result<Vec<String>> {
    let merges = json["model"]["merges"].as_array().context("tokenizer.json has no merges")?;
    let text = |merge: &Value| match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
        (Some(text), _) => Some(text.to_owned()),
        // Byte-level tokens hold no spaces.
        (None, Some([left, right])) => Some(format!("{} {}", left.as_str()?, right.as_str()?)),
        _ => None,
    };
    merges.iter().map(|merge| text(merge).with_context(|| format!("tokenizer.json has a merge {merge}"))).collect()
}

/// Whether a first and a last token are added to every text: as the post-processor says, and without one the settings.
fn added_tokens(json: &Value, settings: &Value) -> [(&'static str, bool); 2] {
    let post = &json["post_processor"];
    let processors = post["processors"].as_array().map_or(std::slice::from_ref(post), Vec::as_slice);
    let single = processors.iter().find_map(|one| one["single"].as_array());
    let special = |piece: Option<&Value>| piece.is_some_and(|piece| !piece["SpecialToken"].is_null());
    let by_settings = |key: &str| post.is_null() && settings[key] == true;
    [
        ("bos", single.map_or(by_settings("add_bos_token"), |single| special(single.first()))),
        ("eos", single.map_or(by_settings("add_eos_token"), |single| special(single.last()))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn byte_level(pre_tokenizer: Value, ignore_merges: bool) -> Value {
        json!({
            "normalizer": {"type": "NFC"}, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "added_tokens": [{"id": 5, "content": "<|end|>", "special": false}, {"id": 4, "content": "<s>", "special": true},
                             {"id": 2, "content": "name", "special": false}],
            "model": {"type": "BPE", "byte_fallback": false, "ignore_merges": ignore_merges,
                      "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]}
        })
    }

    fn split(regex: &str) -> Value {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
    }

    #[test]
    fn pre_tokenizers_are_named_only_where_llama_cpp_computes_the_same() {
        let plain = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let digits =
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, plain]});
        let name = |json: &Value| pre_tokenizer(json).map_err(|error| error.to_string());
        assert_eq!(name(&byte_level(plain.clone(), false)), Ok("gpt-2"));
        assert_eq!(name(&byte_level(digits, false)), Ok("smollm"));
        for (pre, ignore_merges, regex) in SPLITS {
            assert_eq!(name(&byte_level(split(regex), ignore_merges)), Ok(pre));
            assert!(name(&byte_level(split(regex), !ignore_merges)).unwrap_err().contains("ignore_merges"), "{pre}");
            assert!(name(&byte_level(split(&regex[1..]), ignore_merges)).unwrap_err().contains("no name"), "{pre}");
        }
        let mut empty = plain.clone();
        empty["pretokenizers"] = json!([]);
        assert_eq!(name(&byte_level(empty, false)), Ok("gpt-2"));
        let mut prefixed = plain.clone();
        prefixed["add_prefix_space"] = true.into();
        assert!(name(&byte_level(prefixed, false)).is_err());
        let mut lower = byte_level(plain.clone(), false);
        lower["normalizer"] = json!({"type": "Lowercase"});
        assert!(name(&lower).unwrap_err().contains("Lowercase"));
        let mut unigram = byte_level(plain, false);
        unigram["model"]["type"] = "Unigram".into();
        assert!(name(&unigram).unwrap_err().contains("Unigram"));
    }

    #[test]
    fn every_place_of_the_vocabulary_has_a_token_and_its_kind() {
        let json = byte_level(Value::Null, false);
        let (tokens, kinds) = tokens(&json, 7).unwrap();
        assert_eq!(tokens, ["a", "b", "name", "ab", "<s>", "<|end|>", "[PAD6]"]);
        assert_eq!(kinds, [NORMAL, NORMAL, USER_DEFINED, NORMAL, CONTROL, CONTROL, UNUSED]);
        let error = super::tokens(&json, 5).unwrap_err().to_string();
        assert!(error.contains("<|end|>") && error.contains("vocab_size, 5"), "{error}");
        assert_eq!(merges(&json).unwrap(), ["a b"]);
        assert_eq!(merges(&json!({"model": {"merges": ["c d"]}})).unwrap(), ["c d"]);
        assert!(merges(&json!({"model": {"merges": [3]}})).is_err());
    }

    #[test]
    fn the_first_and_last_token_are_added_as_the_post_processor_says() {
        let mut json = byte_level(Value::Null, false);
        let settings = json!({"add_bos_token": true});
        assert_eq!(added_tokens(&json, &settings), [("bos", true), ("eos", false)]);
        json["post_processor"] = json!({"type": "ByteLevel"});
        assert_eq!(added_tokens(&json, &settings), [("bos", false), ("eos", false)]);
        let template = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
        json["post_processor"] = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]});
        assert_eq!(added_tokens(&json, &json!({})), [("bos", true), ("eos", false)]);
    }
}
