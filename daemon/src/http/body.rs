//! A request body as a list of examples: one JSON object, an array of them, or JSONL.

use serde_json::Value;

use super::Problem;

/// One example of a body, or what is wrong with its line.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its place among the examples, from 0.
    pub index: usize,
    /// Its line, from 1, when the body is JSONL.
    pub line: Option<usize>,
    /// The JSON, or why the line is none.
    pub value: Result<Value, String>,
}

/// Splits a body. JSONL is recognised by its content type, or when the body is not one JSON value but its first line
/// is one.
///
/// # Errors
/// A [`Problem`] when the body as a whole is no JSON, or holds no example.
pub fn items(content_type: Option<&str>, body: &[u8]) -> Result<Vec<Item>, Problem> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Problem::new(400, "body", format!("not UTF-8 at byte {}", error.valid_up_to())))?;
    let said_lines = content_type.is_some_and(|t| ["ndjson", "jsonl", "jsonlines"].iter().any(|name| t.contains(name)));
    let items = if said_lines {
        lines(text)
    } else {
        match serde_json::from_str(text) {
            Ok(Value::Array(list)) => {
                let item = |(index, value)| Item { index, line: None, value: Ok(value) };
                list.into_iter().enumerate().map(item).collect()
            }
            Ok(one) => vec![Item { index: 0, line: None, value: Ok(one) }],
            Err(_) if looks_like_lines(text) => lines(text),
            Err(error) => {
                let detail = format!("not JSON: {error}");
                return Err(Problem::new(400, "body", detail).with("line", error.line().into()));
            }
        }
    };
    if items.is_empty() {
        return Err(Problem::new(400, "body", "no example in the body"));
    }
    Ok(items)
}

fn lines(text: &str) -> Vec<Item> {
    let filled = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let item = |(index, (number, line)): (usize, (usize, &str))| Item {
        index,
        line: Some(number + 1),
        value: serde_json::from_str(line).map_err(|error| format!("not JSON: {error}")),
    };
    filled.enumerate().map(item).collect()
}

fn looks_like_lines(text: &str) -> bool {
    let mut filled = text.lines().filter(|line| !line.trim().is_empty());
    let first_is_object = filled.next().is_some_and(|line| matches!(serde_json::from_str(line), Ok(Value::Object(_))));
    first_is_object && filled.next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn values(content_type: Option<&str>, body: &str) -> Vec<Option<Value>> {
        items(content_type, body.as_bytes()).unwrap().into_iter().map(|item| item.value.ok()).collect()
    }

    #[test]
    fn an_object_an_array_and_lines_are_told_apart() {
        let (a, b) = (Some(json!({"a": 1})), Some(json!({"b": 2})));
        assert_eq!(values(None, "{\"a\":\n1}"), vec![a.clone()]);
        assert_eq!(values(Some("application/json"), r#"[{"a": 1}, {"b": 2}]"#), [a.clone(), b.clone()]);
        assert_eq!(values(None, "{\"a\":1}\n\n{\"b\":2}\n"), [a.clone(), b.clone()]);
        assert_eq!(values(Some("application/x-ndjson"), "{\"a\":1}"), vec![a]);
        assert_eq!(values(Some("application/jsonl; charset=utf-8"), "oops\n{\"b\":2}"), [None, b]);
    }

    #[test]
    fn a_bad_line_is_named_by_its_number_in_the_file() {
        let items = items(None, b"{\"a\":1}\n\n{\"b\":\n{\"c\":3}").unwrap();
        let bad: Vec<_> = items.iter().filter(|item| item.value.is_err()).map(|item| (item.index, item.line)).collect();
        assert_eq!(bad, [(1, Some(3))]);
    }

    #[test]
    fn a_body_without_examples_is_a_problem() {
        for body in ["", "[]", "\n\n", "{\"a\":", "hello"] {
            assert!(items(None, body.as_bytes()).is_err(), "{body:?}");
        }
        assert!(items(None, &[0xff]).is_err());
    }
}
