//! Steps that run beside each other, each in a process of its own whose output is shown as a whole when it
//! ends.

use std::{
    collections::HashSet,
    env,
    process::{Command, Stdio},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context, bail};

use crate::shell::SKIPPED;

/// What is to be run under a name, what it shares with no other step at the same time, and the step that must have passed
/// before.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) uses: Option<&'static str>,
    pub(crate) after: Option<&'static str>,
}

/// What the lanes know of each other.
#[derive(Default)]
struct State {
    waiting: Vec<Step>,
    in_use: HashSet<&'static str>,
    passed: HashSet<&'static str>,
    /// With what they said.
    failed: Vec<(&'static str, String)>,
    skipped: Vec<String>,
}

impl State {
    /// The first step that waits for nobody.
    fn next(&mut self) -> Option<Step> {
        let free = |step: &Step| {
            step.uses.is_none_or(|what| !self.in_use.contains(what))
                && step.after.is_none_or(|other| self.passed.contains(other))
        };
        let at = self.waiting.iter().position(free)?;
        let step = self.waiting.remove(at);
        self.in_use.extend(step.uses);
        Some(step)
    }
}

/// Runs steps in so many lanes, in their order as far as what they use allows, by this program with the
/// arguments that `arguments` has for a name. What they skipped.
///
/// # Errors
/// A step that failed: those that run come to their end, no more are started, and its output is shown last,
/// where one looks first and what keeps only the end of a long output has it.
pub(crate) fn run(
    steps: Vec<Step>,
    lanes: usize,
    arguments: impl Fn(&str) -> Vec<String> + Sync,
) -> anyhow::Result<Vec<String>> {
    let program = env::current_exe().context("this program")?;
    let one = |step: Step| -> anyhow::Result<(bool, String)> {
        let mut command = Command::new(&program);
        let (mut output, pipe) = std::io::pipe()?;
        command.args(arguments(step.name)).stdin(Stdio::null()).stdout(pipe.try_clone()?).stderr(pipe);
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        // It holds the ends that are written to.
        drop(command);
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut output, &mut text)?;
        Ok((child.wait()?.success(), String::from_utf8_lossy(&text).into_owned()))
    };
    let state = Mutex::new(State { waiting: steps, ..State::default() });
    let changed = Condvar::new();
    let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
    let lane = || {
        loop {
            let mut all: MutexGuard<'_, State> = lock();
            let step = loop {
                // A step that waits for one that failed waits for ever.
                if all.waiting.is_empty() || !all.failed.is_empty() {
                    return;
                }
                match all.next() {
                    Some(step) => break step,
                    None => all = changed.wait(all).unwrap_or_else(PoisonError::into_inner),
                }
            };
            println!("== {}: started", step.name);
            drop(all);
            let began = Instant::now();
            let ended = one(step);
            let mut all = lock();
            if let Some(what) = step.uses {
                all.in_use.remove(what);
            }
            let (passed, text) = ended.unwrap_or_else(|why| (false, format!("{why:#}\n")));
            let how = if passed { "passed" } else { "FAILED" };
            if passed {
                print!("\n== {}\n{text}", step.name);
            }
            println!("== {}: {how} in {:.0} s\n", step.name, began.elapsed().as_secs_f64());
            all.skipped.extend(text.lines().filter_map(|line| line.strip_prefix(SKIPPED)).map(str::to_owned));
            if passed {
                all.passed.insert(step.name);
            } else {
                all.failed.push((step.name, text));
            }
            changed.notify_all();
        }
    };
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(lane);
        }
    });
    let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !state.failed.is_empty() {
        for (name, text) in &state.failed {
            print!("\n== {name}\n{text}");
        }
        let names: Vec<_> = state.failed.iter().map(|(name, _)| *name).collect();
        let left: Vec<_> = state.waiting.iter().map(|step| step.name).collect();
        let left = if left.is_empty() { "none".to_owned() } else { left.join(", ") };
        bail!("{} failed; not started: {left}", names.join(" and "));
    }
    Ok(state.skipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_by_one_step_waits_in_others() {
        let step = |name, uses| Step { name, uses, after: None };
        let waiting = vec![step("clippy", Some("debug")), step("tests", Some("debug")), step("Miri", None)];
        let mut state = State { waiting, ..State::default() };
        let mut next = || state.next().map(|step| step.name);
        assert_eq!([next(), next(), next()], [Some("clippy"), Some("Miri"), None]);
        state.in_use.remove("debug");
        assert_eq!(state.next().map(|step| step.name), Some("tests"));
        assert!(state.next().is_none() && state.waiting.is_empty());
    }

    #[test]
    fn a_step_behind_another_one_waits_until_that_has_passed() {
        let step = |name, after| Step { name, uses: None, after };
        let waiting = vec![step("vLLM", Some("Python")), step("Python", None), step("Miri", None)];
        let mut state = State { waiting, ..State::default() };
        let mut next = || state.next().map(|step| step.name);
        assert_eq!([next(), next(), next()], [Some("Python"), Some("Miri"), None]);
        state.passed.insert("Python");
        assert_eq!(state.next().map(|step| step.name), Some("vLLM"));
        // And is not waited for where that failed.
        let steps = vec![step("--no-such-flag", None), step("behind it", Some("--no-such-flag"))];
        let failed = run(steps, 2, |name| vec![name.to_owned()]).unwrap_err();
        assert_eq!(failed.to_string(), "--no-such-flag failed; not started: behind it");
    }

    #[test]
    fn a_step_that_fails_is_named_and_the_rest_is_not_started() {
        // This program's own tests stand in for steps: of a name that none has, none is run, and all pass.
        let steps = ["--no-such-flag", "there is no such test"];
        let failed = run(steps.map(|name| Step { name, uses: None, after: None }).into(), 1, |name| {
            vec![name.to_owned()]
        });
        let said = failed.unwrap_err().to_string();
        assert_eq!(said, "--no-such-flag failed; not started: there is no such test");
        let passes = vec![Step { name: "there is no such test", uses: Some("it"), after: None }; 3];
        assert_eq!(run(passes, 2, |name| vec![name.to_owned()]).unwrap(), Vec::<String>::new());
    }
}
