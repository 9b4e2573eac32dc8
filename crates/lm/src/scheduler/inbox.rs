//! Where requests wait for the scheduler's thread, and how that is woken.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::channel::EventSender;
use super::{GenerationRequest, Task};
use crate::{Constraint, Error, Result, Sampler};

/// What was asked, checked.
#[derive(Debug)]
pub(super) enum Job {
    Generation {
        request: Box<GenerationRequest>,
        answer_len: usize,
        sampler: Box<Sampler>,
        constraint: Option<Box<Constraint>>,
        drafts_max: usize,
    },
    Embedding {
        tokens: Vec<u32>,
    },
}

impl Job {
    pub fn generation(
        request: GenerationRequest,
        answer_len: usize,
        sampler: Sampler,
        constraint: Option<Constraint>,
        drafts_max: usize,
    ) -> Job {
        Job::Generation {
            request: Box::new(request),
            answer_len,
            sampler: Box::new(sampler),
            constraint: constraint.map(Box::new),
            drafts_max,
        }
    }

    pub fn embedding(tokens: Vec<u32>) -> Job {
        Job::Embedding { tokens }
    }
}

/// A job with its way back.
#[derive(Debug)]
pub(super) struct Waiting {
    pub job: Job,
    pub sender: EventSender,
    pub submitted: Instant,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Something happened that the thread has not looked at yet.
    changed: bool,
    closed: bool,
    abandoned: bool,
    ended: bool,
}

#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

impl Inbox {
    pub fn new(limit: usize) -> Inbox {
        Inbox { state: Mutex::default(), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn submit(&self, job: Job, sender: EventSender) -> Result<()> {
        let mut state = self.lock();
        if state.closed || state.ended {
            return Err(Error::Closed);
        }
        if state.waiting.len() >= self.limit {
            state.waiting.retain(|waiting| !waiting.sender.is_cancelled());
        }
        if state.waiting.len() >= self.limit {
            return Err(Error::Busy { waiting: state.waiting.len(), limit: self.limit });
        }
        state.waiting.push_back(Waiting { job, sender, submitted: Instant::now() });
        state.changed = true;
        self.changed.notify_all();
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    pub fn is_open(&self) -> bool {
        let state = self.lock();
        !state.closed && !state.ended
    }

    pub fn signal(&self) {
        self.lock().changed = true;
        self.changed.notify_all();
    }

    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.changed = true;
        self.changed.notify_all();
    }

    /// Closes, and has everything cancelled.
    pub fn abandon(&self) {
        self.lock().abandoned = true;
        self.close();
    }

    pub fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }

    /// Whether nothing waits and nothing will.
    pub fn is_exhausted(&self) -> bool {
        let state = self.lock();
        state.closed && state.waiting.is_empty()
    }

    /// The request that waits longest and is still wanted, and those before it that nobody wants any more.
    pub fn take(&self, unwanted: &mut Vec<Waiting>) -> Option<Waiting> {
        let mut state = self.lock();
        while let Some(waiting) = state.waiting.pop_front() {
            if !waiting.sender.is_cancelled() {
                return Some(waiting);
            }
            unwanted.push(waiting);
        }
        None
    }

    /// Sleeps until something happened since the last call.
    pub fn wait(&self) {
        let mut state = self.lock();
        while !state.changed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.changed = false;
    }

    /// Says that the thread has ended; what still waits is dropped, so that its receivers see that.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
        self.changed.notify_all();
    }

    /// Waits for the end, `until` at most, and says whether it came.
    pub fn wait_ended(&self, until: Instant) -> bool {
        let mut state = self.lock();
        while !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Waiting {
    /// What the thread keeps of it.
    pub fn into_task<'t>(self, tokenizer: &'t crate::Tokenizer) -> Task<'t> {
        Task::new(self, tokenizer)
    }
}
