//! What happened before what: clocks of threads, and who touched a place last.
//!
//! A thread stamps what it does with its own count, which goes up whenever it lets others know (a barrier, an
//! arrival). What it knows of each other thread is that one's stamp at the time. Two touches of a place, one
//! of them a write, race unless the later thread knew of the earlier touch.

use std::{boxed::Box, cell::RefCell, format, rc::Rc, string::String, vec, vec::Vec};

/// Something a thread of a cluster did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) thread: u16,
    pub(super) at: u32,
}

impl Event {
    const NONE: Self = Self { thread: u16::MAX, at: 0 };
}

/// What is known of every thread: its stamp.
pub(super) type Known = Rc<[u32]>;

/// The clocks of the threads of a cluster, and one more for the engine that does bulk copies.
pub(super) struct Clocks {
    threads: Vec<Clock>,
    nothing: Known,
}

struct Clock {
    known: Known,
    now: u32,
    /// Its fences towards asynchronous units: each made what was stamped lower visible to them.
    fences: Vec<u32>,
}

impl Clocks {
    pub(super) fn new(threads: usize) -> Self {
        let nothing: Known = vec![0; threads + 1].into();
        let clock = || Clock { known: Rc::clone(&nothing), now: 1, fences: Vec::new() };
        Self { threads: (0..=threads).map(|_| clock()).collect(), nothing }
    }

    /// As they were made.
    pub(super) fn reset(&mut self) {
        for clock in &mut self.threads {
            *clock = Clock { known: Rc::clone(&self.nothing), now: 1, fences: Vec::new() };
        }
    }

    pub(super) fn nothing(&self) -> Known {
        Rc::clone(&self.nothing)
    }

    /// The engine's number.
    pub(super) fn engine(&self) -> usize {
        self.threads.len() - 1
    }

    /// What a thread knows and did: what it sets to work comes after that.
    pub(super) fn sum_of(&self, thread: usize) -> Known {
        let clock = &self.threads[thread];
        let mut known = Rc::clone(&clock.known);
        Rc::make_mut(&mut known)[thread] = clock.now;
        known
    }

    /// The engine works for somebody who knew this, and tells nobody of it: what it reads is its own doing, of which
    /// those know that wait until it is done.
    pub(super) fn engine_works_for<T>(of: &RefCell<Self>, known: &Known, work: impl FnOnce() -> T) -> T {
        let replace = |known| {
            let mut clocks = of.borrow_mut();
            let engine = clocks.engine();
            std::mem::replace(&mut clocks.threads[engine].known, known)
        };
        let before = replace(Rc::clone(known));
        let done = work();
        replace(before);
        done
    }

    /// What a thread does now.
    pub(super) fn event(&self, thread: usize) -> Event {
        Event { thread: thread as u16, at: self.threads[thread].now }
    }

    pub(super) fn knows(&self, thread: usize, event: Event) -> bool {
        let other = usize::from(event.thread);
        event == Event::NONE || other == thread || event.at <= self.threads[thread].known[other]
    }

    /// Everything that a thread did and knows, told to `to`.
    pub(super) fn tell(&mut self, thread: usize, to: &mut Known) {
        let clock = &mut self.threads[thread];
        if !Rc::ptr_eq(to, &clock.known) {
            *to = joined(to, &clock.known);
        }
        let told = Rc::make_mut(to);
        told[thread] = told[thread].max(clock.now);
        clock.now += 1;
    }

    /// The other way.
    pub(super) fn learn(&mut self, thread: usize, from: &Known) {
        let clock = &mut self.threads[thread];
        if !Rc::ptr_eq(from, &clock.known) {
            clock.known = if Rc::ptr_eq(&clock.known, &self.nothing) {
                Rc::clone(from)
            } else {
                joined(&clock.known, from)
            };
        }
    }

    /// They tell one another.
    pub(super) fn meet(&mut self, threads: &[usize]) {
        let Some(first) = threads.first() else { return };
        let mut all = Rc::clone(&self.threads[*first].known);
        for thread in threads {
            let known = &self.threads[*thread].known;
            if !Rc::ptr_eq(known, &all) && !Rc::ptr_eq(known, &self.nothing) {
                all = joined(&all, known);
            }
        }
        let told = Rc::make_mut(&mut all);
        for thread in threads {
            told[*thread] = told[*thread].max(self.threads[*thread].now);
        }
        for thread in threads {
            let clock = &mut self.threads[*thread];
            clock.known = Rc::clone(&all);
            clock.now += 1;
        }
    }

    /// A thread is at a barrier, and goes on: what it did and knows now.
    pub(super) fn arrive(&mut self, thread: usize) -> Arrival {
        let clock = &mut self.threads[thread];
        clock.now += 1;
        Arrival { thread, known: Rc::clone(&clock.known), at: clock.now - 1 }
    }

    /// The same, but of what it did and knows nothing is passed on.
    pub(super) fn arrive_relaxed(&self, thread: usize) -> Arrival {
        Arrival { thread, known: self.nothing(), at: 0 }
    }

    /// What those that arrived did and know, together.
    pub(super) fn gathered(&self, arrivals: &[Arrival]) -> Known {
        let mut all = self.nothing();
        let mut last = self.nothing();
        for Arrival { known, .. } in arrivals {
            if !Rc::ptr_eq(known, &last) {
                all = joined(&all, known);
                last = Rc::clone(known);
            }
        }
        let told = Rc::make_mut(&mut all);
        for Arrival { thread, at, .. } in arrivals {
            told[*thread] = told[*thread].max(*at);
        }
        all
    }

    /// A thread that arrived learns what was gathered.
    pub(super) fn leave(&mut self, arrival: &Arrival, gathered: &Known) {
        let clock = &mut self.threads[arrival.thread];
        if Rc::ptr_eq(&clock.known, &arrival.known) {
            clock.known = Rc::clone(gathered);
        } else {
            clock.known = joined(&clock.known, gathered);
        }
    }

    /// What a thread wrote so far can be seen by asynchronous units, once others know of it.
    pub(super) fn fence(&mut self, thread: usize) {
        let clock = &mut self.threads[thread];
        clock.now += 1;
        clock.fences.push(clock.now);
    }

    /// Whether an asynchronous unit that `thread` sets to work sees a write.
    pub(super) fn fenced(&self, thread: usize, write: Event) -> bool {
        let other = usize::from(write.thread);
        // What the engine itself wrote it sees.
        if write == Event::NONE || other == self.engine() {
            return true;
        }
        let known = if other == thread { u32::MAX } else { self.threads[thread].known[other] };
        self.threads[other].fences.iter().any(|fence| write.at < *fence && *fence <= known)
    }
}

/// Which threads have waited for the launch before.
#[derive(Default)]
pub(super) struct Waits {
    events: Vec<Event>,
}

impl Waits {
    pub(super) fn reset(&mut self) {
        self.events.clear();
    }

    /// A thread waits.
    pub(super) fn add(&mut self, clocks: &Clocks, thread: usize) {
        self.events.push(clocks.event(thread));
    }

    /// Whether one of these threads has waited.
    pub(super) fn any_of(&self, threads: core::ops::Range<usize>) -> bool {
        self.events.iter().any(|event| threads.contains(&usize::from(event.thread)))
    }

    /// Whether a thread has waited, or knows of one that has.
    pub(super) fn known_to(&self, clocks: &Clocks, thread: usize) -> bool {
        self.events.iter().any(|event| clocks.knows(thread, *event))
    }
}

/// A thread at a barrier that it does not stay at.
pub(super) struct Arrival {
    thread: usize,
    known: Known,
    at: u32,
}

impl Arrival {
    pub(super) fn thread(&self) -> usize {
        self.thread
    }
}

fn joined(a: &Known, b: &Known) -> Known {
    a.iter().zip(b.iter()).map(|(a, b)| *a.max(b)).collect()
}

/// Who touched a place: the last write, and the threads that read it since.
#[derive(Clone, Debug)]
pub(super) struct Touches {
    pub(super) write: Event,
    /// Reads of which no later reader knows, as long as they are two.
    reads: [Event; 2],
    /// Where they are more: the stamp of each thread's last read, 0 for none.
    many: Option<Box<[u32]>>,
}

impl Touches {
    pub(super) const NONE: Self = Self { write: Event::NONE, reads: [Event::NONE; 2], many: None };

    pub(super) fn forget_write(&mut self) {
        self.write = Event::NONE;
    }

    pub(super) fn forget_reads(&mut self) {
        self.reads = [Event::NONE; 2];
        self.many = None;
    }

    /// A thread reads it. Else why it must not.
    pub(super) fn read(&mut self, clocks: &Clocks, thread: usize) -> Result<(), String> {
        if !clocks.knows(thread, self.write) {
            return Err(format!("which thread {} has written, with no barrier between", self.write.thread));
        }
        let me = clocks.event(thread);
        if let Some(many) = &mut self.many {
            many[thread] = me.at;
        } else if let Some(known) = self.reads.iter_mut().find(|read| clocks.knows(thread, **read)) {
            // Who knows of this read knows of that one too.
            *known = me;
        } else {
            let mut many: Box<[u32]> = vec![0; clocks.threads.len()].into();
            for read in self.reads.iter().chain([&me]) {
                many[usize::from(read.thread)] = read.at;
            }
            self.many = Some(many);
        }
        Ok(())
    }

    /// A thread writes it. Else why it must not.
    pub(super) fn write(&mut self, clocks: &Clocks, thread: usize) -> Result<(), String> {
        self.may_be_written(clocks, thread)?;
        self.forget_reads();
        self.write = clocks.event(thread);
        Ok(())
    }

    pub(super) fn may_be_written(&self, clocks: &Clocks, thread: usize) -> Result<(), String> {
        let by = |event: Event, did: &str| {
            Err(format!("which thread {} has {did}, with no barrier between", event.thread))
        };
        if !clocks.knows(thread, self.write) {
            return by(self.write, "written");
        }
        let stamps = (0..).zip(self.many.iter().flatten()).map(|(thread, at)| Event { thread, at: *at });
        let reads = self.reads.iter().copied().chain(stamps);
        match reads.into_iter().find(|read| !clocks.knows(thread, *read)) {
            Some(read) => by(read, "read"),
            None => Ok(()),
        }
    }
}
