//! Any bytes as a safetensors file for `gdn forward` and `gdn split`, and what comes out of that for
//! `gdn merge`: done or refused, never a panic, and nothing is left behind where it is refused. Bytes after a
//! zero byte of their own become the data, so that a header need not say how long it is.

#![no_main]

use std::{cell::OnceCell, fs};

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

thread_local! {
    static DIRECTORY: OnceCell<TempDir> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    DIRECTORY.with(|directory| {
        let directory = directory.get_or_init(|| tempfile::tempdir().expect("a folder for temporary files")).path();
        let path = |name: &str| directory.join(name).to_str().expect("UTF-8").to_owned();
        let (input, parts, back) = (path("in"), path("parts"), path("back"));
        let file = match bytes.iter().position(|byte| *byte == 0) {
            Some(end) => [&(end as u64).to_le_bytes(), &bytes[..end], &bytes[end + 1..]].concat(),
            None => bytes.to_vec(),
        };
        fs::write(&input, file).expect("room for the input");
        gdn_cli::run(["gdn", "forward", &input, "-o", &parts]);
        let _ = fs::remove_file(&parts);
        gdn_cli::run(["gdn", "split", &input, "-o", &parts]);
        if fs::exists(&parts).expect("a folder that is there") {
            gdn_cli::run(["gdn", "merge", &parts, "-o", &back]);
            assert!(fs::exists(&back).expect("a folder that is there"), "what was split can be merged");
            fs::remove_file(&parts).expect("ours");
            fs::remove_file(&back).expect("ours");
        }
        assert_eq!(fs::read_dir(directory).expect("ours").count(), 1, "nothing but the input is left");
    });
});
