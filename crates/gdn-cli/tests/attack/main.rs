//! What a user, a full disk, a kill or somebody hostile can do to the command's files: nothing half-written
//! is ever published, every end is a clean one, and the same command goes on from there.

mod ends;
mod faults;
mod hostile;
mod rules;
mod scene;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod syscalls;
