//! Which file of a crate uses which: a test that no circle forms, and that nothing imports what `lib.rs`
//! re-exports.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::shell::root;

/// Files by the path of their module, as in `["cuda", "split"]`; `[]` is `lib.rs`.
type Files = BTreeMap<Vec<String>, String>;

/// For each file those that it uses.
type Arrows<'a> = BTreeMap<&'a [String], BTreeSet<&'a [String]>>;

/// Reads the files of a folder.
fn read(folder: &Path, module: &[String], files: &mut Files) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            read(&path, &[module, &[stem]].concat(), files);
        } else if path.extension().is_some_and(|extension| extension == "rs") && stem != "main" {
            let name = if matches!(stem.as_str(), "mod" | "lib") {
                module.to_vec()
            } else {
                [module, &[stem]].concat()
            };
            files.insert(name, code(&fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The text without comments, re-exports and tests, which may use what they like.
fn code(text: &str) -> String {
    let text = text.split("\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let statements = text.split_inclusive(';').map(|statement| match statement.find("pub use ") {
        Some(start) => &statement[..start],
        None => statement,
    });
    statements.collect()
}

/// The paths that begin with `crate`, `super` or `self`, those in braces written out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let starts = ["crate::", "super::", "self::"];
    let mut rest = code;
    while let Some(at) = starts.iter().filter_map(|start| rest.find(start)).min() {
        let before = rest[..at].chars().next_back();
        let whole = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':' && c != '$');
        rest = &rest[at..];
        if whole {
            tree(&mut rest, &[], &mut paths);
        } else {
            rest = &rest["self::".len()..];
        }
    }
    paths
}

/// Reads one path, and all that a brace at its end has.
fn tree(rest: &mut &str, before: &[String], paths: &mut Vec<Vec<String>>) {
    let mut path = before.to_vec();
    loop {
        *rest = rest.trim_start();
        if let Some(inside) = rest.strip_prefix('{') {
            *rest = inside;
            while !rest.trim_start().starts_with('}') {
                tree(rest, &path, paths);
                *rest = rest.trim_start().trim_start_matches(',');
            }
            *rest = rest.trim_start().strip_prefix('}').unwrap();
            return;
        }
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if end == 0 {
            // A glob.
            *rest = rest.strip_prefix('*').unwrap_or(rest.get(1..).unwrap_or_default());
            paths.push(path);
            return;
        }
        path.push(rest[..end].to_owned());
        *rest = &rest[end..];
        let Some(next) = rest.strip_prefix("::") else {
            // `as` another name.
            if let Some(renamed) = rest.strip_prefix(" as ") {
                *rest = renamed.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
            }
            paths.push(path);
            return;
        };
        *rest = next;
    }
}

/// The files that each file uses, and the paths that end at what `lib.rs` re-exports.
fn arrows(files: &Files) -> (Arrows<'_>, Vec<String>) {
    let mut arrows = BTreeMap::new();
    let mut through_lib = Vec::new();
    for (module, code) in files {
        let uses: &mut BTreeSet<&[String]> = arrows.entry(&module[..]).or_default();
        for path in paths(code) {
            let mut base = if path[0] == "crate" { Vec::new() } else { module.clone() };
            let mut names = &path[usize::from(path[0] != "super")..];
            while let Some((_, others)) = names.split_first().filter(|(first, _)| *first == "super") {
                base.pop();
                names = others;
            }
            let full = [&base[..], names].concat();
            // The longest beginning that is a file.
            let target = (0..=full.len()).rev().find_map(|len| files.get_key_value(&full[..len]));
            let (target, _) = target.expect("the crate's own file is the beginning of every path");
            if target.is_empty() && !module.is_empty() {
                through_lib.push(format!("{}: {}", module.join("::"), path.join("::")));
            }
            if target != module {
                uses.insert(target);
            }
        }
    }
    (arrows, through_lib)
}

/// A circle of files, if there is one.
fn circle<'a>(arrows: &Arrows<'a>) -> Option<Vec<&'a [String]>> {
    fn visit<'a>(
        file: &'a [String],
        arrows: &Arrows<'a>,
        way: &mut Vec<&'a [String]>,
        done: &mut BTreeSet<&'a [String]>,
    ) -> bool {
        if let Some(start) = way.iter().position(|seen| *seen == file) {
            way.drain(..start);
            return true;
        }
        if done.contains(file) {
            return false;
        }
        way.push(file);
        if arrows[file].iter().any(|next| visit(next, arrows, way, done)) {
            return true;
        }
        way.pop();
        done.insert(file);
        false
    }
    let (mut way, mut done) = (Vec::new(), BTreeSet::new());
    arrows.keys().any(|file| visit(file, arrows, &mut way, &mut done)).then_some(way)
}

fn of(files: &[(&str, &str)]) -> Files {
    let name = |name: &str| name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
    files.iter().map(|(module, text)| (name(module), code(text))).collect()
}

#[test]
fn a_circle_is_found() {
    let straight = [
        ("", "pub use a::A;"),
        ("a", "use crate::b::{self, c::C};"),
        ("b", ""),
        ("b::c", "// use super::super::a;"),
    ];
    let (arrows_of, through_lib) = (of(&straight), |files: &Files| arrows(files).1);
    assert_eq!((circle(&arrows(&arrows_of).0), through_lib(&arrows_of)), (None, vec![]));
    for text in [
        "use super::super::a;",
        "use crate::{a::A};",
        "fn f() { crate::a::f(); }",
        "use super::super::{b::X, a::{Y as Z}};",
    ] {
        let files = of(&[straight[0], straight[1], straight[2], ("b::c", text)]);
        let found = circle(&arrows(&files).0).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(found, [&["a".to_owned()][..], &["b".to_owned(), "c".to_owned()]], "{text}");
    }
    assert_eq!(through_lib(&of(&[straight[0], ("b", "use crate::{a, A};"), ("a", "")])), ["b: crate::A"]);
}

#[test]
fn no_circle_of_files_and_no_import_through_lib() {
    for name in ["crates/gdn", "crates/gdn-cli", "crates/gdn-math"] {
        let mut files = Files::new();
        read(&root().join(name).join("src"), &[], &mut files);
        let (arrows, through_lib) = arrows(&files);
        assert!(arrows.len() > 2, "{name} has files");
        assert_eq!(
            through_lib,
            Vec::<String>::new(),
            "{name}: these are re-exports of lib.rs, name their module"
        );
        assert_eq!(circle(&arrows), None, "{name}: these files use one another in a circle");
    }
}
