//! The shared memory of a block: bytes, who touched them, and what asynchronous units are about to do with
//! them.

use std::{collections::BTreeMap, format, string::String, vec, vec::Vec};

use super::order::{Clocks, Known, Touches};
use crate::gpu::EMPTY;

/// Two bytes of it.
#[derive(Clone)]
struct Half {
    by: Touches,
    written: bool,
    /// A copy is on its way here.
    arriving: bool,
    /// Asynchronous units that may still read it.
    leaving: u16,
    /// Part of an mbarrier.
    mbarrier: bool,
}

impl Half {
    const FRESH: Self =
        Self { by: Touches::NONE, written: false, arriving: false, leaving: 0, mbarrier: false };
}

/// An mbarrier.
pub(super) struct Mbarrier {
    arrivals: u32,
    /// Arrivals that this phase still waits for.
    left: u32,
    /// Bytes announced and not yet landed; the other way round it is negative.
    bytes: i64,
    phase: u32,
    /// What those know that arrived in this phase, and what those know that waited for the phases before.
    gathering: Known,
    passed: Known,
}

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Load,
    Store,
}

/// The shared memory of a block.
pub(super) struct Shared {
    bytes: Vec<u8>,
    halves: Vec<Half>,
    mbarriers: BTreeMap<u32, Mbarrier>,
}

impl Shared {
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            bytes: vec![super::POISON; bytes],
            halves: vec![Half::FRESH; bytes.div_ceil(2)],
            mbarriers: BTreeMap::new(),
        }
    }

    pub(super) fn reset(&mut self) {
        self.bytes.fill(super::POISON);
        self.halves.fill(Half::FRESH);
        self.mbarriers.clear();
    }

    /// The halves of an access, which is within and aligned.
    fn halves(&mut self, at: u32, bytes: usize, align: u32) -> Result<&mut [Half], String> {
        if !at.is_multiple_of(align) {
            return Err(format!("not a multiple of {align}"));
        }
        let (first, len) = (at as usize / 2, self.bytes.len());
        self.halves
            .get_mut(first..first + bytes / 2)
            .filter(|_| at as usize + bytes <= len)
            .ok_or_else(|| format!("outside the {len} bytes of shared memory"))
    }

    /// An ordinary access by a thread. Else why it must not be.
    fn touch(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        bytes: usize,
        act: Act,
    ) -> Result<(), String> {
        for half in self.halves(at, bytes, bytes as u32)? {
            if half.mbarrier {
                return Err(String::from("which are an mbarrier's"));
            }
            if half.arriving {
                return Err(String::from("to which a copy is in flight that nobody has waited for"));
            }
            match act {
                Act::Load => {
                    if !half.written {
                        return Err(String::from("which nobody has written"));
                    }
                    half.by.read(clocks, thread)?;
                }
                Act::Store => {
                    if half.leaving > 0 {
                        return Err(String::from("which a product or a bulk store still reads"));
                    }
                    half.by.write(clocks, thread)?;
                    half.written = true;
                }
            }
        }
        Ok(())
    }

    pub(super) fn load(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        value: &mut [u8],
    ) -> Result<(), String> {
        self.touch(clocks, thread, at, value.len(), Act::Load)?;
        value.copy_from_slice(&self.bytes[at as usize..][..value.len()]);
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        value: &[u8],
    ) -> Result<(), String> {
        self.touch(clocks, thread, at, value.len(), Act::Store)?;
        self.bytes[at as usize..][..value.len()].copy_from_slice(value);
        Ok(())
    }

    /// A thread of the cluster sends a word, once, to where its block made room for it. Whoever reads it may,
    /// but knows of nothing else by that.
    pub(super) fn send(&mut self, clocks: &Clocks, thread: usize, at: u32, value: u32) -> Result<(), String> {
        let is_empty = self.bytes.get(at as usize..at as usize + 4) == Some(&EMPTY.to_ne_bytes());
        self.touch(clocks, thread, at, 4, Act::Store)?;
        if !is_empty {
            return Err(String::from("where no message is waited for"));
        }
        self.bytes[at as usize..][..4].copy_from_slice(&value.to_ne_bytes());
        self.halves(at, 4, 4)?.iter_mut().for_each(|half| half.by.forget_write());
        Ok(())
    }

    /// Whether none of four words is empty. What is wrong with them the load behind finds.
    pub(super) fn are_there(&self, at: u32) -> bool {
        let words = self.bytes.get(at as usize..at as usize + 16).unwrap_or_default();
        words.chunks_exact(4).all(|word| word != EMPTY.to_ne_bytes())
    }

    /// A copy sets out for these bytes.
    pub(super) fn set_out(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        bytes: usize,
        align: u32,
    ) -> Result<(), String> {
        for half in self.halves(at, bytes, align)? {
            if half.mbarrier {
                return Err(String::from("which are an mbarrier's"));
            }
            if half.arriving {
                return Err(String::from("to which another copy is in flight"));
            }
            if half.leaving > 0 {
                return Err(String::from("which a product or a bulk store still reads"));
            }
            half.by.may_be_written(clocks, thread)?;
            half.arriving = true;
        }
        Ok(())
    }

    /// It lands; from now on they were written by `thread`.
    pub(super) fn land(&mut self, clocks: &Clocks, thread: usize, at: u32, value: &[u8]) {
        self.bytes[at as usize..][..value.len()].copy_from_slice(value);
        for half in &mut self.halves[at as usize / 2..][..value.len() / 2] {
            half.arriving = false;
            half.written = true;
            half.by.forget_reads();
            half.by.write = clocks.event(thread);
        }
    }

    /// An asynchronous unit that `thread` sets to work begins to read these bytes. What they are.
    pub(super) fn lend(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        value: &mut [u8],
    ) -> Result<(), String> {
        for half in self.halves(at, value.len(), 2)? {
            if half.arriving {
                return Err(String::from("to which a copy is in flight that nobody has waited for"));
            }
            if !half.written {
                return Err(String::from("which nobody has written"));
            }
            half.by.read(clocks, thread)?;
            if !clocks.fenced(thread, half.by.write) {
                return Err(format!(
                    "which thread {} has stored without a fence_async before the barrier",
                    half.by.write.thread
                ));
            }
            half.leaving += 1;
        }
        value.copy_from_slice(&self.bytes[at as usize..][..value.len()]);
        Ok(())
    }

    /// It has read them.
    pub(super) fn give_back(&mut self, at: u32, bytes: usize) {
        for half in &mut self.halves[at as usize / 2..][..bytes / 2] {
            half.leaving -= 1;
        }
    }

    pub(super) fn mbarrier_init(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        at: u32,
        arrivals: u32,
    ) -> Result<(), String> {
        if arrivals == 0 {
            return Err(String::from("an mbarrier of no arrivals"));
        }
        self.touch(clocks, thread, at, 8, Act::Store)?;
        for half in self.halves(at, 8, 8)? {
            half.mbarrier = true;
        }
        let (gathering, passed) = (clocks.nothing(), clocks.nothing());
        self.mbarriers
            .insert(at, Mbarrier { arrivals, left: arrivals, bytes: 0, phase: 0, gathering, passed });
        Ok(())
    }

    /// The mbarrier at `at`, for a thread that knows of its making.
    fn mbarrier(&mut self, clocks: &Clocks, thread: usize, at: u32) -> Result<&mut Mbarrier, String> {
        let made = self.halves.get(at as usize / 2).map(|half| half.by.write);
        let mbarrier = self.mbarriers.get_mut(&at).ok_or("where there is no mbarrier")?;
        if !made.is_some_and(|made| clocks.knows(thread, made)) {
            return Err(String::from("an mbarrier that was made with no barrier between"));
        }
        Ok(mbarrier)
    }

    pub(super) fn arrive(
        &mut self,
        clocks: &mut Clocks,
        thread: usize,
        at: u32,
        bytes: u32,
    ) -> Result<(), String> {
        let mbarrier = self.mbarrier(clocks, thread, at)?;
        if mbarrier.left == 0 {
            return Err(String::from("an arrival more than the mbarrier waits for"));
        }
        clocks.tell(thread, &mut mbarrier.gathering);
        mbarrier.left -= 1;
        mbarrier.bytes += i64::from(bytes);
        mbarrier.advance();
        Ok(())
    }

    /// Bytes have landed that the engine brought.
    pub(super) fn landed(&mut self, clocks: &mut Clocks, at: u32, bytes: u32) {
        let engine = clocks.engine();
        if let Some(mbarrier) = self.mbarriers.get_mut(&at) {
            clocks.tell(engine, &mut mbarrier.gathering);
            mbarrier.bytes -= i64::from(bytes);
            mbarrier.advance();
        }
    }

    /// Whether the phase of this parity is over; if so, the thread knows what those knew that ended it.
    pub(super) fn passed(
        &mut self,
        clocks: &mut Clocks,
        thread: usize,
        at: u32,
        parity: u32,
    ) -> Result<bool, String> {
        let mbarrier = self.mbarrier(clocks, thread, at)?;
        let over = mbarrier.phase % 2 != parity;
        if over {
            clocks.learn(thread, &mbarrier.passed);
        }
        Ok(over)
    }

    /// Whether there is an mbarrier there that a thread may use.
    pub(super) fn has_mbarrier(&mut self, clocks: &Clocks, thread: usize, at: u32) -> Result<(), String> {
        self.mbarrier(clocks, thread, at).map(|_| ())
    }
}

impl Mbarrier {
    /// Ends the phase, where all have come and landed.
    fn advance(&mut self) {
        if self.left == 0 && self.bytes == 0 {
            self.left = self.arrivals;
            self.phase += 1;
            self.passed = self.gathering.clone();
        }
    }
}
