//! Weights from their store into the arena: all at once before the first run, or one after the other on a thread of
//! its own while earlier layers compute.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use lightering_tier::{Arena, ByteSource};

use crate::EngineError;
use crate::plan::Assignment;
use crate::program::{Program, Weight, WeightOrigin};

/// Everything that reading a weight needs.
struct Shelf {
    arena: Arc<Arena>,
    sources: Vec<Arc<dyn ByteSource>>,
    weights: Vec<Weight>,
    offsets: Vec<usize>,
    staging: std::ops::Range<usize>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Per weight: in its place since the run began.
    ready: Vec<bool>,
    /// Per weight: asked for since the run began, or before it for this run.
    requested: Vec<bool>,
    /// Per weight: asked for during this run for the next one.
    ahead: Vec<bool>,
    /// Asked for and not ready yet.
    under_way: usize,
    error: Option<EngineError>,
}

impl Shelf {
    fn load(&self, w: usize) -> Result<(), EngineError> {
        let weight = &self.weights[w];
        if weight.size == 0 {
            return Ok(());
        }
        let conflict =
            |e: lightering_tier::ArenaConflict| EngineError::Internal(format!("{}: {e}", weight.name));
        let range = self.offsets[w]..self.offsets[w] + weight.size;
        let mut target = self.arena.write(range).map_err(conflict)?;
        match &weight.origin {
            WeightOrigin::Inline(tensor) => weight.packing.pack_whole(tensor.as_bytes(), &mut target),
            WeightOrigin::Stored(stored) => {
                let source = self.sources.get(stored.source.0 as usize).ok_or_else(|| {
                    EngineError::Internal(format!("{}: there is no source {}", weight.name, stored.source.0))
                })?;
                let read = |offset: u64, buffer: &mut [u8]| {
                    source.read_at(stored.offset + offset, buffer).map_err(|error| EngineError::Io {
                        weight: weight.name.to_string(),
                        source_name: source.name(),
                        error,
                    })
                };
                let size = stored.size.to_usize();
                if weight.packing.is_plain() {
                    return read(0, &mut target[..size]);
                }
                let mut staging = self.arena.write(self.staging.clone()).map_err(conflict)?;
                // The planner sizes the staging area for the largest piece that cannot be divided.
                let piece = weight.packing.piece_bytes(staging.len()).min(size.max(1));
                let mut at = 0;
                while at < size {
                    let piece = piece.min(size - at);
                    read(at as u64, &mut staging[..piece])?;
                    weight.packing.pack_piece(at, &staging[..piece], &mut target);
                    at += piece;
                }
            }
        }
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_until_closed(&self, queue: &Mutex<Receiver<usize>>) {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(w) = next else { return };
            // A panic must reach the run that waits for this weight, or it would wait for ever.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.load(w)))
                .unwrap_or_else(|_| {
                    let name = &self.weights[w].name;
                    Err(EngineError::Internal(format!("{name}: reading it panicked")))
                });
            let mut state = self.state();
            state.under_way -= 1;
            match result {
                Ok(()) => state.ready[w] = true,
                Err(error) => {
                    state.error.get_or_insert(error);
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// Stack of a reading thread: a few calls deep, and a page or two of buffer.
const READER_STACK_BYTES: usize = 256 << 10;

/// Loads weights; see the module's page.
pub(crate) struct Loader {
    shelf: Arc<Shelf>,
    jobs: Option<SyncSender<usize>>,
    threads: Vec<JoinHandle<()>>,
}

/// Threads that read weights which need no packing: so many requests keep a disk busy.
const READERS: usize = 4;

impl Loader {
    /// Puts the resident weights in their places and, if others are streamed, starts the reading thread.
    pub fn new(
        program: &Program,
        assignment: &Assignment,
        arena: Arc<Arena>,
        sources: Vec<Arc<dyn ByteSource>>,
    ) -> Result<Loader, EngineError> {
        let shelf = Arc::new(Shelf {
            arena,
            sources,
            weights: program.weights.clone(),
            offsets: assignment.weight_offset.clone(),
            staging: assignment.staging.clone(),
            state: Mutex::new(State {
                ready: vec![false; program.weights.len()],
                requested: vec![false; program.weights.len()],
                ahead: vec![false; program.weights.len()],
                under_way: 0,
                error: None,
            }),
            changed: Condvar::new(),
        });
        for (w, load) in assignment.loads.iter().enumerate() {
            if load.is_none() {
                shelf.load(w)?;
                shelf.state().ready[w] = true;
            }
        }
        let streamed = assignment.loads.iter().flatten().count();
        if streamed == 0 {
            return Ok(Loader { shelf, jobs: None, threads: Vec::new() });
        }
        let (jobs, queue) = sync_channel::<usize>(streamed);
        // All packed weights pass through one staging area, and so through one thread.
        let packed = assignment.loads.iter().zip(&program.weights);
        let packed = packed.filter(|(load, _)| load.is_some()).any(|(_, w)| !w.packing.is_plain());
        let queue = Arc::new(Mutex::new(queue));
        let mut loader = Loader { shelf, jobs: Some(jobs), threads: Vec::new() };
        for _ in 0..if packed { 1 } else { READERS } {
            let (shelf, queue) = (loader.shelf.clone(), queue.clone());
            let thread = std::thread::Builder::new()
                .name("lighter-loader".to_owned())
                .stack_size(READER_STACK_BYTES)
                .spawn(move || shelf.read_until_closed(&queue))
                .map_err(EngineError::Memory)?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Forgets which of the streamed weights are in place, those excepted that were read for this run.
    pub fn begin_run(&self, streamed: impl Iterator<Item = usize>) {
        let mut state = self.shelf.state();
        for w in streamed {
            let ahead = std::mem::take(&mut state.ahead[w]);
            state.requested[w] = ahead;
            state.ready[w] &= ahead;
        }
    }

    /// Asks for a weight for the next run; from now on its place must not be used by this one.
    pub fn request_ahead(&self, w: usize) {
        let mut state = self.shelf.state();
        state.ahead[w] = true;
        state.ready[w] = false;
        drop(state);
        self.send(w);
    }

    /// Asks for a weight; its place must be free from now on.
    pub fn request(&self, w: usize) {
        let before = std::mem::replace(&mut self.shelf.state().requested[w], true);
        if !before {
            self.send(w);
        }
    }

    fn send(&self, w: usize) {
        self.shelf.state().under_way += 1;
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(w).is_ok());
        if !sent {
            let mut state = self.shelf.state();
            state.under_way -= 1;
            state.error.get_or_insert(EngineError::Internal("the reading thread is gone".to_owned()));
        }
    }

    /// Waits until a weight is in its place.
    pub fn wait(&self, w: usize) -> Result<(), EngineError> {
        let mut state = self.shelf.state();
        loop {
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if state.ready[w] {
                return Ok(());
            }
            state = self.shelf.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until nothing is being read, so that an interrupted run leaves the arena free.
    pub fn settle(&self) {
        let mut state = self.shelf.state();
        while state.under_way > 0 {
            state = self.shelf.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error = None;
        state.ahead.fill(false);
    }

    /// Reads a few bytes of a stored constant directly, for tables that stay in their store.
    pub fn source(&self, index: usize) -> Option<&Arc<dyn ByteSource>> {
        self.shelf.sources.get(index)
    }

    /// All stores.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.shelf.sources
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A panic in the thread has already been reported by the run that waited for it.
            let _ = thread.join();
        }
    }
}
