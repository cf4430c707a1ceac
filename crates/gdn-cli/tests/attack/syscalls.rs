//! A process whose system calls on files are counted; one of them fails, or the process dies in it. The
//! kernel asks the test before each call (seccomp's user notification), so the command itself is the one that
//! users have.

use std::{
    io,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Output, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::{Pid, Signal, kill_process},
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Done,
    /// Not done; its result is this error.
    Fails(i32),
    /// Not done; the process is killed.
    Kills,
}

macro_rules! calls {
    ($($(#[$on:meta])* $name:ident),*) => { &[$($(#[$on])* (libc::$name, stringify!($name))),*] };
}

/// The calls that are counted: all with which files, folders and threads are read, made and changed.
const CALLS: &[(libc::c_long, &str)] = calls![
    SYS_openat,
    SYS_read,
    SYS_pread64,
    SYS_readv,
    SYS_write,
    SYS_pwrite64,
    SYS_writev,
    SYS_lseek,
    SYS_statx,
    SYS_newfstatat,
    SYS_fstat,
    SYS_getdents64,
    SYS_mmap,
    SYS_msync,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_fsync,
    SYS_fdatasync,
    SYS_renameat,
    SYS_renameat2,
    SYS_unlinkat,
    SYS_linkat,
    SYS_mkdirat,
    SYS_flock,
    SYS_fchmod,
    SYS_fstatfs,
    SYS_statfs,
    SYS_copy_file_range,
    SYS_sendfile,
    SYS_splice,
    SYS_readlinkat,
    SYS_clone,
    SYS_clone3,
    #[cfg(target_arch = "x86_64")]
    SYS_open,
    #[cfg(target_arch = "x86_64")]
    SYS_stat,
    #[cfg(target_arch = "x86_64")]
    SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    SYS_rename,
    #[cfg(target_arch = "x86_64")]
    SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    SYS_link,
    #[cfg(target_arch = "x86_64")]
    SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    SYS_readlink
];

/// The first thing that a Rust program does of itself. What comes before is the loader's.
const FIRST: &[libc::c_long] = &[
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Allows everything, and asks first about [`CALLS`] and [`FIRST`].
fn filter() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let numbers: Vec<libc::c_long> =
        CALLS.iter().map(|(number, _)| *number).chain(FIRST.iter().copied()).collect();
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (i, number) in numbers.iter().enumerate() {
        let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let to_ask = u8::try_from(numbers.len() - i).unwrap();
        program.push(libc::sock_filter {
            code: code as u16,
            jt: to_ask,
            jf: 0,
            k: u32::try_from(*number).unwrap(),
        });
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    program
}

/// Puts the filter onto this process, for good, and gives what its questions come out of.
fn install(program: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: both calls only read what they are given, which lives as long as they take.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        match libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) {
            -1 => Err(io::Error::last_os_error()),
            listener => Ok(OwnedFd::from_raw_fd(listener as i32)),
        }
    }
}

/// Runs a command; `fate` says what becomes of each call, by its number from 0 on and its name. With the
/// output comes how many calls there were.
pub fn run(command: &mut Command, mut fate: impl FnMut(usize, &str) -> Fate) -> io::Result<(Output, usize)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let program = filter();
    let before_exec = move || {
        let listener = install(&program)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        let sent = [listener.as_fd()];
        message.push(SendAncillaryMessage::ScmRights(&sent));
        sendmsg(&theirs, &[io::IoSlice::new(&[0])], &mut message, SendFlags::empty())?;
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls alone, and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&ours, &mut [io::IoSliceMut::new(&mut [0])], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    let listener = message.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut listeners) => listeners.next(),
        _ => None,
    });
    let listener = listener.ok_or_else(|| io::Error::other("the process sent nothing"))?;

    let (mut started, mut calls) = (false, 0);
    while let Some((id, number, arguments)) = next(&listener)? {
        let mut this = Fate::Done;
        // Memory without a file is the allocator's business.
        let counts = number != libc::SYS_mmap || arguments[4] as u32 != u32::MAX;
        if FIRST.contains(&number) {
            started = true;
        } else if started && counts {
            let name = CALLS.iter().find(|(known, _)| *known == number).map_or("?", |(_, name)| name);
            this = fate(calls, name.trim_start_matches("SYS_"));
            calls += 1;
        }
        match this {
            Fate::Done => answer(&listener, id, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)?,
            Fate::Fails(error) => answer(&listener, id, -error, 0)?,
            Fate::Kills => kill_process(Pid::from_child(&child), Signal::KILL)?,
        }
    }
    Ok((child.wait_with_output()?, calls))
}

/// The next question: its id, and the call's number and arguments. `None` where nobody is left to ask.
fn next(listener: &OwnedFd) -> io::Result<Option<(u64, libc::c_long, [u64; 6])>> {
    loop {
        let mut wait = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut wait, None)?;
        if !wait[0].revents().contains(PollFlags::IN) {
            return Ok(None);
        }
        // SAFETY: plain numbers; the kernel wants them to be zeros.
        let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills in what it is given, which is of the size that it has had from the start.
        let got =
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut question) };
        match (got, io::Error::last_os_error()) {
            (0, _) => {
                return Ok(Some((question.id, libc::c_long::from(question.data.nr), question.data.args)));
            }
            // Who asked is dead, or was interrupted.
            (_, error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            (_, error) => return Err(error),
        }
    }
}

fn answer(listener: &OwnedFd, id: u64, error: i32, flags: u32) -> io::Result<()> {
    let mut answer = libc::seccomp_notif_resp { id, val: 0, error, flags };
    const { assert!(size_of::<libc::seccomp_notif_resp>() == 24) };
    // SAFETY: the kernel reads what it is given.
    let sent = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    match (sent, io::Error::last_os_error()) {
        (0, _) => Ok(()),
        // Nobody waits for the answer any more.
        (_, error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        (_, error) => Err(error),
    }
}
