//! Names of modules in the lists of JSON files: which are not quantised, which have an adapter.

use gdn::Projection;

use super::checkpoint::{fused_name, part_names};

/// A string of a JSON text, with its quotes: where it begins and ends.
fn strings(text: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut start = None;
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match (byte, start) {
            (b'"', None) => start = Some(at),
            (b'"', Some(first)) if !escaped => {
                found.push((first, at + 1));
                start = None;
            }
            _ => {}
        }
        escaped = start.is_some() && byte == b'\\' && !escaped;
    }
    found
}

/// Whether a string is an element of a list: what comes before and after it says so.
fn is_element(text: &str, (start, end): (usize, usize)) -> bool {
    text[..start].trim_end().ends_with(['[', ',']) && text[end..].trim_start().starts_with([',', ']'])
}

/// The module of a list's element, without what comes before its name.
fn ends_with(text: &str, (start, end): (usize, usize), module: &str) -> bool {
    let string = &text[start + 1..end - 1];
    string.strip_suffix(module).is_some_and(|rest| rest.is_empty() || rest.ends_with(['.', '*']))
}

/// Every element that names a whole projection becomes two, of its parts.
pub(super) fn separated(text: &str) -> String {
    let mut result = String::new();
    let mut done = 0;
    for place in strings(text) {
        let whole = |p: &Projection| is_element(text, place) && ends_with(text, place, fused_name(*p));
        let Some(projection) = Projection::ALL.into_iter().find(whole) else { continue };
        let (start, end) = place;
        let before = text[..start].trim_end().len();
        let prefix = &text[start..end - 1 - fused_name(projection).len()];
        let [first, second] = part_names(projection);
        result += &text[done..start];
        result += &format!("{prefix}{first}\",{gap}{prefix}{second}\"", gap = &text[before..start]);
        done = end;
    }
    result + &text[done..]
}

/// The inverse: two elements in a row that name the parts become one.
pub(super) fn joined(text: &str) -> String {
    let mut result = String::new();
    let mut done = 0;
    for pair in strings(text).windows(2) {
        let [first, second] = [pair[0], pair[1]];
        let string = |(start, end): (usize, usize)| &text[start..end - 1];
        let parts = |p: &Projection| {
            let names = part_names(*p);
            let prefixes = [first, second].map(|place| string(place).len());
            is_element(text, first)
                && is_element(text, second)
                && text[first.1..second.0].trim() == ","
                && ends_with(text, first, names[0])
                && ends_with(text, second, names[1])
                && string(first)[..prefixes[0] - names[0].len()]
                    == string(second)[..prefixes[1] - names[1].len()]
        };
        let Some(projection) = Projection::ALL.into_iter().find(parts) else { continue };
        let prefix = &string(first)[..string(first).len() - part_names(projection)[0].len()];
        result += &text[done..first.0];
        result += &format!("{prefix}{}\"", fused_name(projection));
        done = second.1;
    }
    result + &text[done..]
}

/// Whether a text still speaks of whole projections.
pub(super) fn names_a_whole(text: &str) -> bool {
    Projection::ALL.into_iter().any(|projection| text.contains(fused_name(projection)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_modules() {
        let text = r#"{
  "quantization_config": {"ignore": ["lm_head", "model.layers.0.linear_attn.in_proj_ba"], "x": "in_proj_ba",
    "modules_to_not_convert": [
      "model.layers.0.linear_attn.in_proj_qkvz",
      "\"in_proj_qkvz", "my_in_proj_ba"
    ]},
  "in_proj_qkvz": ["in_proj_qkvz"]
}"#;
        let wanted = r#"{
  "quantization_config": {"ignore": ["lm_head", "model.layers.0.linear_attn.in_proj_b", "model.layers.0.linear_attn.in_proj_a"], "x": "in_proj_ba",
    "modules_to_not_convert": [
      "model.layers.0.linear_attn.in_proj_qkv",
      "model.layers.0.linear_attn.in_proj_z",
      "\"in_proj_qkvz", "my_in_proj_ba"
    ]},
  "in_proj_qkvz": ["in_proj_qkv","in_proj_z"]
}"#;
        assert_eq!(separated(text), wanted);
        assert_eq!(joined(wanted), text);
        assert!(names_a_whole(wanted) && !names_a_whole("[]"));
        assert_eq!(joined(r#"["a.in_proj_b", "b.in_proj_a"]"#), r#"["a.in_proj_b", "b.in_proj_a"]"#);
        for broken in ["", "\"", "\"\\\"", "[\"in_proj_ba", "\"in_proj_ba\""] {
            assert_eq!(separated(broken), broken);
        }
    }
}
