//! Global memory: buffers at addresses of their own, which are no addresses of the host.

use core::{
    cell::{Cell, OnceCell, RefCell},
    ops::Range,
};
use std::{format, string::String, vec, vec::Vec};

use super::{
    logistic::Logistic,
    order::{Clocks, Touches, Waits},
};

/// What fills a buffer before anything is stored to it.
pub const POISON: u8 = 0xA5;
/// No two buffers are nearer to one another than this.
const GAP: u64 = 1 << 20;

/// Global memory, as the kernels of several launches see it.
#[derive(Default)]
pub struct Memory {
    buffers: RefCell<Vec<Buffer>>,
    last: Cell<usize>,
    /// Clusters that have run.
    clusters: Cell<u32>,
    launches: RefCell<Vec<Past>>,
    beside: RefCell<Beside>,
    pub(super) logistic: Logistic,
}

/// A launch, as later ones know it.
struct Past {
    /// Its first cluster.
    first: u32,
    /// Launches that may still run when it begins and are done when it has waited.
    at_first: Vec<usize>,
    /// Those that may still run when it is done, as it began early behind one that did not wait for them.
    left: Vec<usize>,
    /// Whether each block has waited in the end, and before it lets the next launch start.
    has_waited: bool,
    lets_late: bool,
}

/// The clusters of launches before that may still run, those of a launch in one range.
#[derive(Default)]
struct Beside {
    /// The first cluster of the launch that all this is for.
    first: u32,
    always: Vec<Range<u32>>,
    /// Until one waits for them.
    at_first: Vec<Range<u32>>,
}

impl Beside {
    /// Whether what a cluster did may not be done yet, as one sees it who has waited or has not.
    fn may_run(&self, cluster: u32, has_waited: impl FnOnce() -> bool) -> bool {
        let has = |ranges: &[Range<u32>]| ranges.iter().any(|range| range.contains(&cluster));
        cluster < self.first && (has(&self.always) || has(&self.at_first) && !has_waited())
    }
}

/// Rows of bytes, and nothing between them: the gap between two rows belongs to nobody and takes no memory.
struct Buffer {
    address: u64,
    row_bytes: usize,
    row_stride: u64,
    bytes: Vec<u8>,
    /// One a byte: [`NEVER`], [`BEFORE`] or [`NOW`].
    stored: Vec<u8>,
    kind: Kind,
}

const NEVER: u8 = 0;
/// In a launch before this one.
const BEFORE: u8 = 1;
const NOW: u8 = 2;

enum Kind {
    Input,
    Output,
    /// Written, a byte more than once if it is the same each time.
    Agreed,
    /// Read and written; `once` says that a byte is stored once a launch.
    State {
        once: bool,
        readable: bool,
        touched: Vec<Touched>,
    },
}

/// Two bytes of a state.
#[derive(Clone)]
struct Touched {
    /// The cluster that wrote it, and the one that read it.
    writer: u32,
    reader: u32,
    by: Touches,
}

const NOBODY: u32 = u32::MAX;
const SEVERAL: u32 = u32::MAX - 1;

/// Who touches memory: a thread of a cluster.
pub(super) struct Who<'a> {
    pub(super) cluster: u32,
    pub(super) thread: usize,
    pub(super) clocks: &'a RefCell<Clocks>,
    pub(super) waits: &'a RefCell<Waits>,
}

/// How the bytes of a buffer lie.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Bytes past a multiple of 256 at which the buffer begins.
    pub misalignment: u64,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes from a row to the next, at least `row_bytes`.
    pub row_stride: u64,
}

impl Place {
    /// All in one piece.
    pub fn dense(bytes: usize) -> Self {
        Self { misalignment: 0, row_bytes: bytes, row_stride: bytes as u64 }
    }
}

impl Buffer {
    fn end(&self) -> u64 {
        let rows = self.bytes.len().div_ceil(self.row_bytes.max(1)) as u64;
        self.address + rows * self.row_stride
    }

    /// Where in `bytes` the bytes at an address are, if they all are in one row.
    fn find(&self, at: u64, bytes: usize) -> Option<usize> {
        let offset = at.checked_sub(self.address)?;
        let (row, within) =
            (offset.checked_div(self.row_stride)?, offset.checked_rem(self.row_stride)? as usize);
        let start = usize::try_from(row).ok()?.checked_mul(self.row_bytes)?.checked_add(within)?;
        (within + bytes <= self.row_bytes && start + bytes <= self.bytes.len()).then_some(start)
    }

    /// Marks that bytes of a state are touched. Else why they must not be.
    fn touch(
        &mut self,
        start: usize,
        bytes: usize,
        write: bool,
        who: &Who<'_>,
        beside: &Beside,
    ) -> Result<(), String> {
        let Kind::State { touched, .. } = &mut self.kind else { return Ok(()) };
        if bytes < 2 {
            return Err(String::from("a byte of a state, which is touched by two bytes or more"));
        }
        let (clocks, waits, first) = (who.clocks.borrow(), who.waits.borrow(), beside.first);
        let known = OnceCell::new();
        let has_waited = || *known.get_or_init(|| waits.known_to(&clocks, who.thread));
        for touched in &mut touched[start / 2..(start + bytes) / 2] {
            if beside.may_run(touched.writer, has_waited) {
                return Err(String::from("which a launch before has written that may still run"));
            }
            if write && beside.may_run(touched.reader, has_waited) {
                return Err(String::from("which a launch before has read that may still run"));
            }
            // What other launches before did is done.
            if touched.writer < first {
                touched.writer = NOBODY;
                touched.by.forget_write();
            }
            if touched.reader < first {
                touched.reader = NOBODY;
                touched.by.forget_reads();
            }
            if touched.writer != NOBODY && touched.writer != who.cluster {
                return Err(String::from(
                    "which another block has written in this launch: blocks run in any order",
                ));
            }
            if write {
                if touched.reader != NOBODY && touched.reader != who.cluster {
                    return Err(String::from(
                        "which another block has read in this launch: blocks run in any order",
                    ));
                }
                touched.by.write(&clocks, who.thread)?;
                touched.writer = who.cluster;
            } else {
                if touched.reader == NOBODY || touched.reader == who.cluster {
                    touched.by.read(&clocks, who.thread)?;
                    touched.reader = who.cluster;
                } else {
                    touched.reader = SEVERAL;
                }
            }
        }
        Ok(())
    }
}

impl Memory {
    /// No buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same on a machine of such numbers.
    pub fn of(logistic: Logistic) -> Self {
        Self { logistic, ..Self::default() }
    }

    /// A buffer that kernels read. Its address.
    pub fn input(&self, bytes: &[u8], place: Place) -> u64 {
        self.add(bytes.to_vec(), place, Kind::Input)
    }

    /// A buffer that kernels write, full of [`POISON`]; each byte once a launch. What a launch wrote, later
    /// ones read. Its address.
    pub fn output(&self, bytes: usize, place: Place) -> u64 {
        self.add(vec![POISON; bytes], place, Kind::Output)
    }

    /// A buffer that kernels read and then write, each byte once a launch. No block touches what another one
    /// writes, and no thread without a barrier between. Its address.
    pub fn state(&self, bytes: &[u8], place: Place) -> u64 {
        let touched = Self::untouched(bytes.len());
        self.add(bytes.to_vec(), place, Kind::State { once: true, readable: true, touched })
    }

    /// A buffer that kernels write and then read, as often as they like, by the other rules of a state. Its
    /// address.
    pub fn scratch(&self, bytes: usize, place: Place) -> u64 {
        let touched = Self::untouched(bytes);
        self.add(vec![POISON; bytes], place, Kind::State { once: false, readable: false, touched })
    }

    /// A buffer that kernels write, where several threads may write one byte if they write the same there. Its
    /// address.
    pub fn agreed(&self, bytes: usize, place: Place) -> u64 {
        self.add(vec![POISON; bytes], place, Kind::Agreed)
    }

    fn untouched(bytes: usize) -> Vec<Touched> {
        vec![Touched { writer: NOBODY, reader: NOBODY, by: Touches::NONE }; bytes.div_ceil(2)]
    }

    fn add(&self, bytes: Vec<u8>, place: Place, kind: Kind) -> u64 {
        let mut buffers = self.buffers.borrow_mut();
        // Past 2^32, so that an address cut to 32 bits hits nothing.
        let end = buffers.last().map_or(1 << 33, Buffer::end);
        let Place { misalignment, row_bytes, row_stride } = place;
        let whole = misalignment.is_multiple_of(2) && row_bytes.is_multiple_of(2);
        assert!(whole || !matches!(kind, Kind::State { .. }), "a state at an odd address: {place:?}");
        let address = (end + GAP).next_multiple_of(256) + misalignment;
        buffers.push(Buffer {
            address,
            row_bytes,
            row_stride,
            stored: vec![NEVER; bytes.len()],
            bytes,
            kind,
        });
        address
    }

    /// The rows of the buffer at `address` one after the other, and for each byte 1 where it was ever stored
    /// to, else 0.
    ///
    /// # Panics
    /// Where no buffer begins at `address`.
    pub fn read(&self, address: u64) -> (Vec<u8>, Vec<u8>) {
        let buffers = self.buffers.borrow();
        let buffer =
            buffers.iter().find(|b| b.address == address).expect("the address a buffer was made with");
        (buffer.bytes.clone(), buffer.stored.iter().map(|stored| u8::from(*stored != NEVER)).collect())
    }

    /// A launch begins, see [`Launch::beside`](super::Launch::beside) and [`Launch::early`](super::Launch::early).
    pub(super) fn begin(&self, beside: u64, early: usize) {
        let (mut launches, first) = (self.launches.borrow_mut(), self.clusters.get());
        for buffer in &mut *self.buffers.borrow_mut() {
            buffer.stored.iter_mut().for_each(|stored| *stored = (*stored).min(BEFORE));
            let Kind::State { touched, .. } = &mut buffer.kind else { continue };
            // One of several stands for their launch, which is the last one.
            for touched in touched.iter_mut().filter(|touched| touched.reader == SEVERAL) {
                touched.reader = first - 1;
            }
        }
        let number = launches.len();
        let (mut at_first, mut left) = (Vec::new(), Vec::new());
        if early > 0 {
            let before = &launches[number - early];
            at_first.push(number - early);
            left.extend(&before.left);
            if !before.lets_late {
                at_first.extend(&before.at_first);
            }
            if !before.has_waited {
                left.extend(&before.at_first);
            }
        }
        launches.push(Past { first, at_first, left, has_waited: true, lets_late: true });
        let clusters = |launch: usize| launches[launch].first..launches[launch + 1].first;
        let Past { at_first, left, .. } = &launches[number];
        let beside = (0..64.min(number)).filter(|i| beside >> i & 1 == 1).map(|i| number - 1 - i);
        let always = beside.chain(left.iter().copied()).map(clusters).collect();
        let at_first = at_first.iter().copied().map(clusters).collect();
        *self.beside.borrow_mut() = Beside { first, always, at_first };
    }

    /// A block of this launch ends, or lets the next launch start, and has not waited for the one before.
    pub(super) fn has_not_waited(&self, is_end: bool) {
        if let Some(launch) = self.launches.borrow_mut().last_mut() {
            launch.lets_late = false;
            launch.has_waited &= !is_end;
        }
    }

    /// The number of a cluster that begins.
    pub(super) fn next_cluster(&self) -> u32 {
        let number = self.clusters.get();
        self.clusters.set(number + 1);
        number
    }

    fn access<R>(
        &self,
        at: u64,
        bytes: usize,
        align: u64,
        act: impl FnOnce(&mut Buffer, usize) -> Result<R, String>,
    ) -> Result<R, String> {
        if !at.is_multiple_of(align) {
            return Err(format!("not a multiple of {align}"));
        }
        let mut buffers = self.buffers.borrow_mut();
        let last = self.last.get();
        let found = buffers.get(last).and_then(|b| Some((last, b.find(at, bytes)?)));
        let search = || buffers.iter().enumerate().find_map(|(i, b)| Some((i, b.find(at, bytes)?)));
        let Some((i, offset)) = found.or_else(search) else {
            return Err(String::from("outside every row of every buffer"));
        };
        self.last.set(i);
        act(&mut buffers[i], offset)
    }

    /// Reads bytes. Else why they must not be read.
    pub(super) fn load(&self, who: &Who<'_>, at: u64, align: u64, value: &mut [u8]) -> Result<(), String> {
        let beside = self.beside.borrow();
        self.access(at, value.len(), align, |buffer, start| {
            let range = start..start + value.len();
            let stored = &buffer.stored[range.clone()];
            match buffer.kind {
                Kind::Input | Kind::State { readable: true, .. } => {}
                _ if stored.contains(&NEVER) => return Err(String::from("of bytes that nobody has written")),
                Kind::Output | Kind::Agreed if stored.contains(&NOW) => {
                    return Err(String::from("of an output of this launch, which is only written"));
                }
                _ => {}
            }
            buffer.touch(start, value.len(), false, who, &beside)?;
            value.copy_from_slice(&buffer.bytes[range]);
            Ok(())
        })
    }

    /// Writes bytes. Else why they must not be written.
    pub(super) fn store(&self, who: &Who<'_>, at: u64, align: u64, value: &[u8]) -> Result<(), String> {
        let beside = self.beside.borrow();
        self.access(at, value.len(), align, |buffer, start| {
            let range = start..start + value.len();
            let again = buffer.stored[range.clone()].contains(&NOW);
            match buffer.kind {
                Kind::Input => return Err(String::from("into an input")),
                Kind::Output if again => return Err(String::from("of a byte that was stored already")),
                _ => {}
            }
            if matches!(buffer.kind, Kind::Agreed) {
                let mut bytes = range.clone().zip(value);
                if bytes.any(|(i, byte)| buffer.stored[i] == NOW && buffer.bytes[i] != *byte) {
                    return Err(String::from("of another value than was stored already"));
                }
            }
            buffer.touch(start, value.len(), true, who, &beside)?;
            if again && matches!(buffer.kind, Kind::State { once: true, .. }) {
                return Err(String::from("of a byte that was stored already"));
            }
            buffer.stored[range.clone()].fill(NOW);
            buffer.bytes[range].copy_from_slice(value);
            Ok(())
        })
    }

    /// Where an address is, for a message.
    pub(super) fn nearest(&self, at: u64) -> String {
        let buffers = self.buffers.borrow();
        buffers.iter().rev().find(|b| b.address <= at).map_or(String::new(), |b| {
            format!(", {} bytes into a buffer of {} bytes", at - b.address, b.bytes.len())
        })
    }
}
