//! The events of one request, from the scheduler to whoever asked: bounded, for threads and for tasks alike.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::inbox::Inbox;
use super::request::Event;

#[derive(Debug)]
struct State {
    events: VecDeque<Event>,
    sender_gone: bool,
    receiver_gone: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Channel {
    state: Mutex<State>,
    arrived: Condvar,
    capacity: usize,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        self.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

pub(super) fn channel(capacity: usize, inbox: &Arc<Inbox>) -> (EventSender, Events) {
    let state = State { events: VecDeque::new(), sender_gone: false, receiver_gone: false, waker: None };
    let channel = Arc::new(Channel { state: Mutex::new(state), arrived: Condvar::new(), capacity });
    (EventSender { channel: Arc::clone(&channel) }, Events { channel, inbox: Arc::clone(inbox) })
}

/// The scheduler's end.
#[derive(Debug)]
pub(super) struct EventSender {
    channel: Arc<Channel>,
}

impl EventSender {
    /// How many events can be sent before the receiver has to take some.
    pub fn room(&self) -> usize {
        self.channel.capacity.saturating_sub(self.channel.lock().events.len())
    }

    pub fn is_cancelled(&self) -> bool {
        self.channel.lock().receiver_gone
    }

    /// Sends an event. The caller has asked for room before; only the last event may go beyond it.
    pub fn send(&self, event: Event) {
        let mut state = self.channel.lock();
        if !state.receiver_gone {
            state.events.push_back(event);
            self.channel.wake(state);
        }
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.sender_gone = true;
        self.channel.wake(state);
    }
}

/// Receives what happens to a request. Dropping it cancels the request.
#[derive(Debug)]
pub struct Events {
    channel: Arc<Channel>,
    inbox: Arc<Inbox>,
}

impl Events {
    /// Waits for the next event; `None` behind the last one.
    pub fn recv(&mut self) -> Option<Event> {
        let mut state = self.channel.lock();
        loop {
            if let Some(event) = self.pop(&mut state) {
                return Some(event);
            }
            if state.sender_gone {
                return None;
            }
            state = self.channel.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`recv`](Self::recv), for asynchronous tasks: registers the task to be woken when nothing is there yet.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.channel.lock();
        if let Some(event) = self.pop(&mut state) {
            return Poll::Ready(Some(event));
        }
        if state.sender_gone {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn pop(&self, state: &mut State) -> Option<Event> {
        let was_full = state.events.len() >= self.channel.capacity;
        let event = state.events.pop_front()?;
        if was_full {
            // The request was left out of the steps; the scheduler may be asleep because of that.
            self.inbox.signal();
        }
        Some(event)
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.receiver_gone = true;
        state.events.clear();
        drop(state);
        self.inbox.signal();
    }
}
