//! The index and other JSON files, by what they say.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use gdn::Projection;
use serde_json::{Map, Value};

use super::{
    super::{
        names::{ModuleName, Names, fused_name, part_names},
        resume::same_bytes,
    },
    view::View,
};
use crate::files::read_text;

/// What is wrong with the index of a checkpoint that should say what the source's says, if anything is. Both
/// have one.
pub(super) fn index_fault(source: &View<'_>, destination: &View<'_>) -> Option<String> {
    let (Some(before), Some(after)) = (&source.checkpoint.index, &destination.checkpoint.index) else {
        return None;
    };
    // For each name that must be there, the files of the tensors it is made from.
    let mut wanted: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    // A part that the index does not name, as it does the other, is named once they were one.
    let mut allowed = BTreeSet::new();
    for tensor in before.weight_map.keys() {
        let Some(module) = ModuleName::parse(tensor) else {
            wanted.insert(tensor.clone(), source.checkpoint.files_of(tensor));
            continue;
        };
        let [whole, first, second] = [None, Some(0), Some(1)].map(|part| module.of(part));
        let files = [&whole, &first, &second].into_iter().flat_map(|name| source.checkpoint.files_of(name));
        let files: BTreeSet<&str> = files.collect();
        let names = match (module.part, destination.names) {
            (_, Names::Fused) => vec![whole],
            (Some(_), Names::Separate) => {
                allowed.extend([first, second]);
                vec![tensor.clone()]
            }
            (None, Names::Separate) => vec![first, second],
        };
        for name in names {
            wanted.insert(name, files.clone());
        }
    }
    for (tensor, files) in &wanted {
        match after.weight_map.get(tensor) {
            None => return Some(format!("it does not name '{tensor}'")),
            Some(file) if !files.contains(file.as_str()) => {
                let files = files.iter().copied().collect::<Vec<_>>().join(" or ");
                return Some(format!("it says '{tensor}' is in {file}, not in {files}"));
            }
            Some(_) => {}
        }
    }
    let may_be = |tensor: &&String| wanted.contains_key(*tensor) || allowed.contains(*tensor);
    if let Some(tensor) = after.weight_map.keys().find(|tensor| !may_be(tensor)) {
        return Some(format!("it names '{tensor}', which it should not"));
    }
    let data = |view: &View<'_>| -> i128 {
        view.checkpoint.shards.iter().map(|shard| i128::from(shard.input.data_len())).sum()
    };
    let more = data(destination) - data(source);
    let size = |json: &Value| json.pointer("/metadata/total_size").and_then(Value::as_u64).map(i128::from);
    if let Some(total) = size(&before.json)
        && size(&after.json) != Some(total + more)
    {
        let got = after.json.pointer("/metadata/total_size").unwrap_or(&Value::Null);
        return Some(format!("its total_size is {got}, it should be {}", total + more));
    }
    let rest = |json: &Value| {
        let mut json = json.clone();
        json["weight_map"] = Value::Null;
        if let Some(metadata) = json.get_mut("metadata").and_then(Value::as_object_mut)
            && metadata.get("total_size").is_some_and(Value::is_u64)
        {
            metadata.remove("total_size");
        }
        json
    };
    (rest(&before.json) != rest(&after.json)).then(|| "what it says beside its weight_map changed".to_owned())
}

/// Two files beside the tensors.
pub(super) enum Found {
    /// The same bytes, as there is nothing in them that would follow.
    Same,
    /// Names in them followed, or stand in another order.
    SaysTheSame,
    Fault(String),
}

/// Compares a file with what it was, in a checkpoint whose projections have these names now.
pub(super) fn compare(before: &Path, after: &Path, name: &str, names: Names) -> anyhow::Result<Found> {
    let is_same = same_bytes(before, after)?;
    let fault = || Found::Fault("is not what it should be".to_owned());
    if !name.ends_with(".json") {
        return Ok(if is_same { Found::Same } else { fault() });
    }
    let [before, after] = [before, after].map(|path| read_text(path, name));
    let (before, after) = (before?, after?);
    let [one, other] = [&before, &after].map(|text| serde_json::from_str::<Value>(text).ok());
    let (Some(one), Some(other)) = (one, other) else {
        return Ok(if is_same { Found::Same } else { fault() });
    };
    let wanted = followed(&one, names);
    if is_same && wanted == sorted(&one) {
        return Ok(Found::Same);
    }
    if !is_same && !mentions(&before) {
        return Ok(fault());
    }
    Ok(match difference(&wanted, &sorted(&other)) {
        None => Found::SaysTheSame,
        Some(path) => Found::Fault(format!("is not what it should be at '{path}'")),
    })
}

/// Whether there is a name of a projection in a text.
fn mentions(text: &str) -> bool {
    Projection::ALL.into_iter().any(|projection| {
        text.contains(fused_name(projection)) || part_names(projection).iter().any(|part| text.contains(part))
    })
}

/// What a value says once projections have these names; lists in an order of their own.
fn followed(value: &Value, names: Names) -> Value {
    match value {
        Value::Array(elements) => {
            let there: Vec<&str> = elements.iter().filter_map(Value::as_str).collect();
            let all = elements.iter().flat_map(|element| match element.as_str() {
                None => vec![followed(element, names)],
                Some(string) => become_of(string, names, &|name| there.contains(&name)).map_or_else(
                    || vec![element.clone()],
                    |names| names.into_iter().map(Value::from).collect(),
                ),
            });
            let mut seen = Vec::new();
            for element in all {
                // The parts that became one.
                let joined =
                    element.as_str().is_some_and(|name| !there.contains(&name)) && seen.contains(&element);
                if !joined {
                    seen.push(element);
                }
            }
            sorted(&Value::Array(seen))
        }
        Value::Object(members) => {
            let alike = |name: &str, other: &str| members.get(name) == members.get(other);
            let mut result = Map::new();
            for (key, value) in members {
                let has =
                    |name: &str| members.contains_key(name) && (names == Names::Separate || alike(name, key));
                let keys = become_of(key, names, &|name| {
                    // A name that is there already is in the way, whatever it says.
                    has(name) || (is_whole(name) && members.contains_key(name))
                });
                for key in keys.unwrap_or_else(|| vec![key.clone()]) {
                    result.insert(key, followed(value, names));
                }
            }
            Value::Object(result)
        }
        other => other.clone(),
    }
}

fn is_whole(name: &str) -> bool {
    split(name).is_some_and(|(_, _, part, _)| part.is_none())
}

/// A name as what is before the projection's name, the projection, which part it is, and what is behind.
fn split(string: &str) -> Option<(&str, Projection, Option<usize>, &str)> {
    let names = Projection::ALL.into_iter().flat_map(|projection| {
        let parts = part_names(projection).into_iter().enumerate().map(|(number, name)| (name, Some(number)));
        parts.chain([(fused_name(projection), None)]).map(move |(name, part)| (projection, name, part))
    });
    names.into_iter().find_map(|(projection, name, part)| {
        let (before, behind) = string.rsplit_once(name)?;
        let layer = before.trim_end_matches('.').rsplit(['.', '*', '/', '\\', ':']).next()?;
        let ends = behind.is_empty() || behind == "*" || behind == "$" || behind.starts_with('.');
        let begins =
            before.is_empty() || before.ends_with(['.', '*', '/']) && ["", "linear_attn"].contains(&layer);
        (begins && ends).then_some((before, projection, part, behind))
    })
}

/// The names that a name beside others becomes. `None` where it stays.
fn become_of(string: &str, names: Names, has: &dyn Fn(&str) -> bool) -> Option<Vec<String>> {
    let (before, projection, part, behind) = split(string)?;
    let whole = format!("{before}{}{behind}", fused_name(projection));
    let parts = part_names(projection).map(|name| format!("{before}{name}{behind}"));
    match (names, part) {
        (Names::Separate, None) if !parts.iter().any(|part| has(part)) => Some(parts.to_vec()),
        (Names::Fused, Some(_)) if parts.iter().all(|part| has(part)) && !has(&whole) => Some(vec![whole]),
        _ => None,
    }
}

/// A value whose lists of strings are in an order of their own.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(elements) => {
            let mut elements: Vec<Value> = elements.iter().map(sorted).collect();
            if elements.iter().all(Value::is_string) {
                elements.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
            Value::Array(elements)
        }
        Value::Object(members) => {
            Value::Object(members.iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        other => other.clone(),
    }
}

/// Where two values differ first.
fn difference(wanted: &Value, got: &Value) -> Option<String> {
    match (wanted, got) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            keys.into_iter().find_map(|key| match (one.get(key), other.get(key)) {
                (Some(one), Some(other)) => difference(one, other).map(|path| format!("{key}/{path}")),
                _ => Some(key.clone()),
            })
        }
        (one, other) => (one != other).then(String::new),
    }
    .map(|path| path.trim_end_matches('/').to_owned())
}
