//! Measuring: medians of contenders that take turns, and how times are written.

use std::time::Instant;

/// The least time a sample takes: shorter work is repeated within a sample, so that the clock's own cost is
/// lost in it.
const SAMPLE_SECONDS: f64 = 100e-6;

/// The median seconds of one run of each of `N` contenders, measured in turns for about `budget` seconds.
/// `run` is given a contender and how often to run it.
pub(crate) fn medians<const N: usize, E>(
    budget: f64,
    mut run: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<[f64; N], E> {
    let mut sample = |contender: usize, repeats: usize| {
        let start = Instant::now();
        run(contender, repeats)?;
        Ok(start.elapsed().as_secs_f64() / repeats as f64)
    };
    let mut repeats = [1; N];
    for (contender, repeats) in repeats.iter_mut().enumerate() {
        sample(contender, 1)?;
        let once = sample(contender, 1)?.max(1e-9);
        *repeats = (SAMPLE_SECONDS / once).ceil().clamp(1.0, 1e6) as usize;
    }
    let mut samples: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    let start = Instant::now();
    // What a contender leaves in the caches (of memcpy, lines that are yet to be written back) slows whoever
    // comes next: in steps of 1, then of 2, each follows each of the others as often.
    const { assert!(N == 2 || N == 3, "steps from 1 to N - 1 meet every contender where N is a prime") };
    let (mut round, mut contender) = (0, 0);
    while round < 11 || (start.elapsed().as_secs_f64() < budget && round < 2001) {
        for _ in 0..N {
            contender = (contender + 1 + round % (N - 1)) % N;
            samples[contender].push(sample(contender, repeats[contender])?);
        }
        round += 1;
    }
    Ok(samples.map(median))
}

/// The median of numbers, one at least.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Seconds, as people write them.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.2} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// Bytes that can be had without swapping, where the system tells.
pub(crate) fn available_memory() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
}
