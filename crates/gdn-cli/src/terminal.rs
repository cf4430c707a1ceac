//! What the command says: results on standard output, notes and faults on standard error.

use std::io::{self, Write};

use anyhow::Context;

/// What is wrong, and a line for each fault.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}", faults.join("; "))]
pub(crate) struct Faults {
    pub(crate) what: String,
    pub(crate) faults: Vec<String>,
}

/// Whoever reads our standard output has had enough of it, which is no error.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
pub(crate) struct ReaderGone;

/// Writes to standard output. (`println!` would panic where nobody reads.)
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        result => result.context("cannot write to standard output"),
    }
}

/// A line on standard error. Where nobody can read it, the work goes on all the same.
pub(crate) fn note(text: &str) {
    to_stderr("gdn: ", text);
}

pub(crate) fn to_stderr(before: &str, text: &str) {
    let _ = io::stderr().write_all(format!("{before}{}\n", one_line(text)).as_bytes());
}

/// The longest line that is printed, in characters.
const LONGEST_LINE: usize = 4000;

/// The text as one line that a terminal can show: names from files may have anything in them, and be of any
/// length. What is no printable character is escaped; of a line that is too long the middle is left out.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::new();
    for char in text.chars() {
        match char {
            '"' | '\'' | '\\' => line.push(char),
            _ => line.extend(char.escape_debug()),
        }
    }
    let half = LONGEST_LINE / 2;
    let (first, last) = (line.char_indices().nth(half), line.char_indices().rev().nth(half));
    match (first, last) {
        (Some((first, _)), Some((last, _))) if first < last => {
            format!("{} [{} bytes left out] {}", &line[..first], last - first, &line[last..])
        }
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_a_terminal_can_show() {
        let hostile = "a'\"\\ü\n\u{1b}[31m\u{202e}\u{0}\u{7f}\r";
        assert_eq!(one_line(hostile), "a'\"\\ü\\n\\u{1b}[31m\\u{202e}\\0\\u{7f}\\r");
        for (chars, cut) in
            [(LONGEST_LINE - 1, false), (LONGEST_LINE, false), (LONGEST_LINE + 2, true), (1 << 20, true)]
        {
            let line = one_line(&format!("{}end", "ü".repeat(chars - 3)));
            assert!(line.chars().count() <= LONGEST_LINE + 40 && line.ends_with("end"), "{chars}");
            assert_eq!(line.contains("left out"), cut, "{chars}");
        }
    }
}
