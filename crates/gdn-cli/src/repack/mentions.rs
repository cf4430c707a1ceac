//! Names of projections in the JSON files beside the tensors: in lists of modules and as keys. They follow
//! the tensors' names, and everything else in the text stays as it is.

use anyhow::{Context, bail};
use gdn::Projection;
use regex::Regex;
use serde_json::Value;

use super::names::{Names, fused_name, part_names};

/// A text whose names have followed.
pub(super) struct Renamed {
    pub(super) text: String,
    /// Strings that still speak of names that are gone.
    pub(super) left: Vec<String>,
}

/// The text of a JSON file after projections got names of this kind.
///
/// # Errors
/// Where it is no JSON.
pub(super) fn renamed(text: &str, to: Names) -> anyhow::Result<Renamed> {
    rename(text, to, None)
}

/// In which file of a checkpoint a tensor is, if it is in any.
pub(super) type FileOf<'f> = &'f dyn Fn(&str) -> Option<String>;

/// The same for an index: a name follows to one that is in a file, and the index says in which.
pub(super) fn renamed_index(text: &str, to: Names, file_of: FileOf<'_>) -> anyhow::Result<String> {
    Ok(rename(text, to, Some(file_of))?.text)
}

fn rename(text: &str, to: Names, file_of: Option<FileOf<'_>>) -> anyhow::Result<Renamed> {
    let tree = parse(text)?;
    let renamer = Renamer { text, to, file_of };
    let text = format!("{}{}{}", &text[..tree.start], renamer.value(&tree), &text[tree.end..]);
    let mut left = Vec::new();
    parse(&text)?.strings(&mut |string| {
        // Patterns are judged by what they match: `patterns_left`.
        if names_gone(string, to) && (!string.starts_with("re:") || Mention::parse(string).is_some()) {
            left.push(string.to_owned());
        }
    });
    Ok(Renamed { text, left })
}

/// Whether a text holds, as a word of its own, a name that is gone once projections have names of this kind,
/// or a pattern for such.
pub(super) fn names_gone(text: &str, now: Names) -> bool {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.into_iter().any(|word| {
        word == "in_proj_"
            || Projection::ALL.into_iter().any(|projection| match now {
                Names::Separate => word == fused_name(projection),
                Names::Fused => part_names(projection).contains(&word),
            })
    })
}

/// Patterns (`re:…`) that match other modules once these have other names, and do not follow.
pub(super) fn patterns_left(text: &str, to: Names, modules: &[(Vec<String>, Vec<String>)]) -> Vec<String> {
    let mut left = Vec::new();
    let Ok(tree) = parse(text) else { return left };
    tree.strings(&mut |string| {
        let Some(pattern) = string.strip_prefix("re:") else { return };
        // Those that follow as names do.
        if Mention::parse(string).is_some_and(|mention| mention.part.is_none() == (to == Names::Separate)) {
            return;
        }
        let follows = match Regex::new(&format!("^(?:{pattern})")) {
            Err(_) => !pattern.contains("in_proj_"),
            Ok(pattern) => modules.iter().all(|(before, after)| {
                let matched = before.iter().any(|name| pattern.is_match(name));
                after.iter().all(|name| pattern.is_match(name) == matched)
            }),
        };
        if !follows {
            left.push(string.to_owned());
        }
    });
    left
}

/// A string that names a projection, or all of a pattern: `model.layers.0.linear_attn.in_proj_ba.weight`,
/// `*in_proj_ba`.
#[derive(Clone, Copy, PartialEq)]
struct Mention<'a> {
    prefix: &'a str,
    projection: Projection,
    part: Option<usize>,
    rest: &'a str,
}

impl<'a> Mention<'a> {
    fn parse(string: &'a str) -> Option<Self> {
        let at = string.rfind("in_proj_")?;
        let (prefix, rest) = string.split_at(at);
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, rest) = rest.split_at(len);
        let layer =
            prefix.trim_end_matches('.').rsplit(['.', '*', '/', '\\', ':']).next().unwrap_or_default();
        let whole_string = (prefix.is_empty() || prefix.ends_with(['.', '*', '/']))
            && (layer.is_empty() || layer == "linear_attn")
            && (rest.is_empty() || rest.starts_with('.') || rest == "*" || rest == "$");
        if !whole_string {
            return None;
        }
        Projection::ALL.into_iter().find_map(|projection| {
            let part = match part_names(projection).iter().position(|part| *part == name) {
                None if name == fused_name(projection) => None,
                None => return None,
                part => part,
            };
            Some(Self { prefix, projection, part, rest })
        })
    }

    fn of(&self, part: Option<usize>) -> String {
        let name = part.map_or(fused_name(self.projection), |part| part_names(self.projection)[part]);
        format!("{}{name}{}", self.prefix, self.rest)
    }
}

/// An element of a list, or a member of an object.
struct Item {
    /// What is before it, after the bracket or comma.
    gap: String,
    /// Of a list: the element, if it is a string. Of an object: the key.
    name: Option<String>,
    /// With which the name is written, up to its quote, and what follows the name's closing quote.
    after: String,
}

struct Renamer<'t> {
    text: &'t str,
    to: Names,
    file_of: Option<FileOf<'t>>,
}

impl Renamer<'_> {
    /// The text of a value.
    fn value(&self, node: &Node) -> String {
        let (items, open, close) = match &node.kind {
            Kind::Scalar | Kind::Text(_) => return self.text[node.start..node.end].to_owned(),
            Kind::List(elements) => (elements.iter().map(|e| (None, e)).collect::<Vec<_>>(), '[', ']'),
            Kind::Object(members) => (members.iter().map(|(k, v)| (Some(k), v)).collect(), '{', '}'),
        };
        let mut list: Vec<Item> = Vec::new();
        let mut end = node.start + 1;
        for (key, value) in items {
            let start = key.map_or(value.start, |key| key.start);
            let mut gap = &self.text[end..start];
            if let Some(last) = list.last_mut() {
                let Item { after, .. } = last;
                let (before, behind) = gap.split_once(',').unwrap_or((gap, ""));
                *after += before;
                gap = behind;
            }
            let (name, after) = match (key, &value.kind) {
                (Some(key), _) => {
                    (key.string(), format!("{}{}", &self.text[key.end..value.start], self.value(value)))
                }
                (None, Kind::Text(string)) => (Some(string.clone()), String::new()),
                (None, _) => (None, self.value(value)),
            };
            list.push(Item { gap: gap.to_owned(), name, after });
            end = value.end;
        }
        let tail = self.text[end..node.end - 1].to_owned();
        let items = self.items(list);
        let mut result = String::from(open);
        for (number, item) in items.iter().enumerate() {
            result += if number > 0 { "," } else { "" };
            result += &item.gap;
            if let Some(name) = &item.name {
                result += &Value::from(name.as_str()).to_string();
            }
            result += &item.after;
        }
        result + &tail + &close.to_string()
    }

    /// What follows a name that another one became: in an index the file it is in now. `None` where there is
    /// no such name.
    fn after(&self, name: &str, before: &str) -> Option<String> {
        let Some(file_of) = self.file_of else { return Some(before.to_owned()) };
        let (colon, file) = before.split_once('"')?;
        let (_, rest) = file.rsplit_once('"')?;
        Some(format!("{colon}{}{rest}", Value::from(file_of(name)?)))
    }

    fn items(&self, before: Vec<Item>) -> Vec<Item> {
        // What stands between two items of this container.
        let gap = match (before.get(1), before.first()) {
            (Some(second), _) => second.gap.clone(),
            (None, Some(first)) if first.gap.contains('\n') => first.gap.clone(),
            _ => " ".to_owned(),
        };
        let is_sorted = before.len() > 2
            && before.iter().all(|item| item.name.is_some())
            && before.is_sorted_by_key(|item| item.name.clone());
        let names: Vec<Option<String>> = before.iter().map(|item| item.name.clone()).collect();
        let has = |name: &str| names.iter().any(|there| there.as_deref() == Some(name));
        let afters: Vec<String> = before.iter().map(|item| item.after.clone()).collect();
        let mut result: Vec<Item> = Vec::new();
        let mut dropped: Vec<String> = Vec::new();
        for item in before {
            let mention = item.name.as_deref().and_then(Mention::parse);
            match (mention, self.to) {
                (Some(mention), Names::Separate) if mention.part.is_none() => {
                    let parts = [0, 1].map(|part| mention.of(Some(part)));
                    let after = |part: &String| self.after(part, &item.after);
                    let ([first, second], [Some(one), Some(two)]) =
                        (&parts, [after(&parts[0]), after(&parts[1])])
                    else {
                        result.push(item);
                        continue;
                    };
                    if parts.iter().any(|part| has(part)) {
                        result.push(item);
                        continue;
                    }
                    result.push(Item { gap: item.gap, name: Some(first.clone()), after: one });
                    result.push(Item { gap: gap.clone(), name: Some(second.clone()), after: two });
                }
                (Some(mention), Names::Fused) if mention.part.is_some() => {
                    let own = mention.of(mention.part);
                    if let Some(at) = dropped.iter().position(|name| *name == own) {
                        dropped.remove(at);
                        continue;
                    }
                    let at = |part| names.iter().position(|n| n.as_deref() == Some(&mention.of(Some(part))));
                    let whole = mention.of(None);
                    let goes = match (at(0), at(1)) {
                        _ if has(&whole) => false,
                        // A part that the index does not name is there all the same.
                        _ if self.file_of.is_some() => true,
                        (Some(first), Some(second)) => afters[first] == afters[second],
                        _ => false,
                    };
                    let Some(after) = self.after(&whole, &item.after).filter(|_| goes) else {
                        result.push(item);
                        continue;
                    };
                    dropped.push(mention.of(mention.part.map(|part| 1 - part)));
                    result.push(Item { gap: item.gap, name: Some(whole), after });
                }
                _ => result.push(item),
            }
        }
        if is_sorted && result.len() != names.len() {
            // The gaps belong to the places, not to the names.
            let gaps: Vec<String> = result.iter().map(|item| item.gap.clone()).collect();
            result.sort_by_key(|item| item.name.clone());
            result.iter_mut().zip(gaps).for_each(|(item, gap)| item.gap = gap);
        }
        result
    }
}

/// A value in a JSON text, and where it begins and ends.
struct Node {
    start: usize,
    end: usize,
    kind: Kind,
}

enum Kind {
    Scalar,
    Text(String),
    List(Vec<Node>),
    /// Keys, which are strings, and values.
    Object(Vec<(Node, Node)>),
}

impl Node {
    fn string(&self) -> Option<String> {
        match &self.kind {
            Kind::Text(string) => Some(string.clone()),
            _ => None,
        }
    }

    /// Every string in it, keys too.
    fn strings(&self, found: &mut impl FnMut(&str)) {
        match &self.kind {
            Kind::Scalar => {}
            Kind::Text(string) => found(string),
            Kind::List(elements) => elements.iter().for_each(|element| element.strings(found)),
            Kind::Object(members) => members.iter().for_each(|(key, value)| {
                key.strings(found);
                value.strings(found);
            }),
        }
    }
}

/// Deeper than any file that is meant to be read, as serde_json has it.
const DEEPEST: usize = 128;

fn parse(text: &str) -> anyhow::Result<Node> {
    let mut parser = Parser { text, at: 0 };
    let node = parser.value(0)?;
    if parser.next().is_some() {
        bail!("it goes on after its end, at byte {}", parser.at);
    }
    Ok(node)
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
}

impl Parser<'_> {
    /// The next byte that is no space.
    fn next(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let spaces = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        self.at += spaces;
        rest.get(spaces).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.next() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn value(&mut self, depth: usize) -> anyhow::Result<Node> {
        if depth > DEEPEST {
            bail!("it is nested deeper than {DEEPEST}");
        }
        let first = self.next().context("it ends too early")?;
        let start = self.at;
        let kind = match first {
            b'"' => Kind::Text(self.text_here()?),
            b'[' => {
                let mut elements = Vec::new();
                self.at += 1;
                if !self.take(b']') {
                    loop {
                        elements.push(self.value(depth + 1)?);
                        if self.take(b']') {
                            break;
                        }
                        self.comma()?;
                    }
                }
                Kind::List(elements)
            }
            b'{' => {
                let mut members = Vec::new();
                self.at += 1;
                if !self.take(b'}') {
                    loop {
                        if self.next() != Some(b'"') {
                            bail!("there is no key at byte {}", self.at);
                        }
                        let key = self.value(depth + 1)?;
                        if !self.take(b':') {
                            bail!("there is no ':' at byte {}", self.at);
                        }
                        members.push((key, self.value(depth + 1)?));
                        if self.take(b'}') {
                            break;
                        }
                        self.comma()?;
                    }
                }
                Kind::Object(members)
            }
            _ => {
                let rest = &self.text[start..];
                let ends = |c: char| c.is_ascii_whitespace() || ",]}:\"[{".contains(c);
                let token = &rest[..rest.find(ends).unwrap_or(rest.len())];
                serde_json::from_str::<Value>(token).with_context(|| format!("byte {start}"))?;
                self.at += token.len();
                Kind::Scalar
            }
        };
        Ok(Node { start, end: self.at, kind })
    }

    fn comma(&mut self) -> anyhow::Result<()> {
        if self.take(b',') { Ok(()) } else { bail!("there is no ',' at byte {}", self.at) }
    }

    fn text_here(&mut self) -> anyhow::Result<String> {
        let start = self.at;
        let mut escaped = false;
        let inner = self.text.as_bytes()[start + 1..].iter().position(|byte| {
            let ends = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            ends
        });
        let end = start + 1 + inner.context("a string has no end")? + 1;
        self.at = end;
        serde_json::from_str(&self.text[start..end]).with_context(|| format!("byte {start}"))
    }
}

/// The text with another number in place of the one at `path`.
pub(super) fn with_number(text: &str, path: &[&str], number: u64) -> anyhow::Result<String> {
    let (start, end) = place_of(text, path)?;
    Ok(format!("{}{number}{}", &text[..start], &text[end..]))
}

/// The text around the value at `path`, if there is one.
pub(super) fn without_number(text: &str, path: &[&str]) -> String {
    match place_of(text, path) {
        Ok((start, end)) => format!("{}{}", &text[..start], &text[end..]),
        Err(_) => text.to_owned(),
    }
}

fn place_of(text: &str, path: &[&str]) -> anyhow::Result<(usize, usize)> {
    let tree = parse(text)?;
    let mut node = &tree;
    for wanted in path {
        let Kind::Object(members) = &node.kind else { bail!("there is no '{wanted}'") };
        // Of keys that come twice the last counts.
        let found = members.iter().rev().find(|(key, _)| key.string().as_deref() == Some(*wanted));
        node = &found.with_context(|| format!("there is no '{wanted}'"))?.1;
    }
    Ok((node.start, node.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_both_ways(fused: &str, separate: &str) {
        assert_eq!(renamed(fused, Names::Separate).unwrap().text, separate);
        assert_eq!(renamed(separate, Names::Fused).unwrap().text, fused);
    }

    #[test]
    fn lists_and_keys_follow_in_both_directions() {
        assert_both_ways(
            r#"{
  "quantization_config": {"ignore": ["lm_head", "model.layers.0.linear_attn.in_proj_ba"], "x": "in_proj_ba",
    "modules_to_not_convert": [
      "model.layers.0.linear_attn.in_proj_qkvz",
      "\"in_proj_qkvz", "my_in_proj_ba", "re:.*\\.in_proj_ba$", "*in_proj_ba"
    ]},
  "é": ["in_proj_qkvz"], "extra_config" : {"linear_attn.in_proj_ba.weight" :  {"bits": 16}}
}
"#,
            r#"{
  "quantization_config": {"ignore": ["lm_head", "model.layers.0.linear_attn.in_proj_b", "model.layers.0.linear_attn.in_proj_a"], "x": "in_proj_ba",
    "modules_to_not_convert": [
      "model.layers.0.linear_attn.in_proj_qkv",
      "model.layers.0.linear_attn.in_proj_z",
      "\"in_proj_qkvz", "my_in_proj_ba", "re:.*\\.in_proj_b$",
      "re:.*\\.in_proj_a$", "*in_proj_b",
      "*in_proj_a"
    ]},
  "é": ["in_proj_qkv", "in_proj_z"], "extra_config" : {"linear_attn.in_proj_b.weight" :  {"bits": 16}, "linear_attn.in_proj_a.weight" :  {"bits": 16}}
}
"#,
        );
        assert_both_ways("[]", "[]");
        assert_both_ways(
            r#" [[["in_proj_ba"]], 1e-06, -1, null] "#,
            r#" [[["in_proj_b", "in_proj_a"]], 1e-06, -1, null] "#,
        );
    }

    #[test]
    fn what_is_sorted_stays_sorted() {
        assert_both_ways(
            r#"{"a": 1, "in_proj_ba.bias": 2, "in_proj_ba.weight": 3}"#,
            r#"{"a": 1, "in_proj_a.bias": 2, "in_proj_a.weight": 3, "in_proj_b.bias": 2, "in_proj_b.weight": 3}"#,
        );
        assert_eq!(
            renamed(r#"["*.in_proj_a", "a", "*.in_proj_b"]"#, Names::Fused).unwrap().text,
            r#"["*.in_proj_ba", "a"]"#
        );
    }

    #[test]
    fn what_cannot_follow_is_told() {
        for (text, to, left) in [
            (r#"["*.in_proj_b", "in_proj_a"]"#, Names::Fused, vec!["*.in_proj_b", "in_proj_a"]),
            (r#"["a.in_proj_ba"]"#, Names::Separate, vec!["a.in_proj_ba"]),
            (r#"{"in_proj_b": 1, "in_proj_a": 2}"#, Names::Fused, vec!["in_proj_b", "in_proj_a"]),
            (r#"{"x": "in_proj_ba"}"#, Names::Separate, vec!["in_proj_ba"]),
            (r#"["a*in_proj_ba?", "in_proj_bar"]"#, Names::Separate, vec!["a*in_proj_ba?"]),
            (r#"{"target_modules": ".*in_proj_(ba|z)"}"#, Names::Separate, vec![".*in_proj_(ba|z)"]),
            (r#"["in_proj_ba", "in_proj_b"]"#, Names::Separate, vec!["in_proj_ba"]),
            (r#"["in_proj_qkvz"]"#, Names::Fused, vec![]),
        ] {
            let renamed = renamed(text, to).unwrap();
            assert_eq!(
                (renamed.text.as_str(), renamed.left),
                (text, left.iter().map(|s| s.to_string()).collect())
            );
        }
    }

    #[test]
    fn patterns_are_judged_by_what_they_match() {
        let modules = |whole: &str, parts: [&str; 2]| {
            (vec![format!("model.{whole}")], parts.map(|part| format!("model.{part}")).to_vec())
        };
        let modules = [
            modules("in_proj_qkvz", ["in_proj_qkv", "in_proj_z"]),
            modules("in_proj_ba", ["in_proj_b", "in_proj_a"]),
        ];
        for (pattern, follows) in [
            ("re:.*", true),
            ("re:.*in_proj.*", true),
            ("re:.*in_proj_[qz].*", true),
            ("re:.*in_proj_ba$", true),
            ("re:.*\\.in_proj_qkv", false),
            ("re:.*in_proj_qkv$", false),
            ("re:.*in_proj_(ba|qkvz)", false),
            ("re:.*in_proj_b[a]?$", false),
            ("re:.*out_proj", true),
            ("re:(?!x)in_proj_z", false),
        ] {
            let text = Value::from(vec![pattern]).to_string();
            assert_eq!(patterns_left(&text, Names::Separate, &modules).is_empty(), follows, "{pattern}");
        }
    }

    #[test]
    fn an_index_says_in_which_file_a_tensor_is_now() {
        let whole = "linear_attn.in_proj_ba.weight";
        let index = r#"{"weight_map": {"linear_attn.in_proj_b.weight" : "1" , "linear_attn.in_proj_a.weight": "2", "x.in_proj_b": "3"}, "metadata": {"total_size": 5}}"#;
        let file_of = |name: &str| (name == whole).then(|| "1".to_owned());
        let fused = renamed_index(index, Names::Fused, &file_of).unwrap();
        assert_eq!(
            fused,
            r#"{"weight_map": {"linear_attn.in_proj_ba.weight" : "1" , "x.in_proj_b": "3"}, "metadata": {"total_size": 5}}"#
        );
        let text = with_number(&fused, &["metadata", "total_size"], 17).unwrap();
        assert_eq!(text, fused.replace('5', "17"));
        assert!(with_number(&fused, &["metadata", "no"], 17).is_err());
        // One part alone is enough.
        let one = r#"{"weight_map": {"linear_attn.in_proj_a.weight": "2"}}"#;
        assert_eq!(
            renamed_index(one, Names::Fused, &file_of).unwrap(),
            r#"{"weight_map": {"linear_attn.in_proj_ba.weight": "1"}}"#
        );
        let parts = |name: &str| name.contains("_attn.in_proj_").then(|| "9".to_owned());
        assert_eq!(
            renamed_index(r#"{"weight_map": {"linear_attn.in_proj_ba.bias": "1"}}"#, Names::Separate, &parts)
                .unwrap(),
            r#"{"weight_map": {"linear_attn.in_proj_b.bias": "9", "linear_attn.in_proj_a.bias": "9"}}"#
        );
    }

    #[test]
    fn texts_that_are_no_json() {
        let deep = "[".repeat(100_000);
        for broken in
            ["", "\"", "\"\\\"", "[\"in_proj_ba", "[1 2]", "{1:2}", "{\"a\" 1}", "[1]]", "nul", &deep]
        {
            assert!(renamed(broken, Names::Separate).is_err(), "{broken:.20}");
        }
    }
}
