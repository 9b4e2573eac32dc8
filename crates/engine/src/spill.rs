//! Tensors that wait on the disk between two uses that are far apart: written by a thread of their own while the next
//! layers compute, read back by the loader as streamed weights are (SSDTrain, arXiv 2408.10013, section 3).

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use lightering_graph::{SourceId, StoredTensor};
use lightering_tier::{ARENA_ALIGNMENT, Arena, ByteSource, SpillFile};
use lightering_units::Bytes;

use crate::EngineError;
use crate::plan::Assignment;
use crate::program::{Program, Storage, WeightOrigin};

/// Stack of the writing thread; the pages through which it copies lie there.
const WRITER_STACK_BYTES: usize = 256 << 10;

/// Largest piece in which a state is read and written outside of runs.
const PIECE_BYTES: usize = 64 << 10;

struct Desk {
    file: Arc<SpillFile>,
    arena: Arc<Arena>,
    /// Per spill: where it lies in the arena and in the file.
    places: Vec<(Range<usize>, u64)>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Per spill: asked for and not on the disk yet.
    pending: Vec<bool>,
    error: Option<EngineError>,
}

impl Desk {
    fn write(&self, spill: usize) -> Result<(), EngineError> {
        let (range, offset) = &self.places[spill];
        let bytes = self.arena.read(range.clone()).map_err(|e| EngineError::Internal(e.to_string()))?;
        self.file.write_at(*offset, &bytes).map_err(EngineError::Spill)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_until_closed(&self, queue: &Receiver<usize>) {
        while let Ok(spill) = queue.recv() {
            let result = self.write(spill);
            let mut state = self.state();
            state.pending[spill] = false;
            if let Err(error) = result {
                state.error.get_or_insert(error);
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}

/// Writes spilled tensors; see the module's page.
pub(crate) struct Spiller {
    desk: Arc<Desk>,
    jobs: Option<SyncSender<usize>>,
    thread: Option<JoinHandle<()>>,
}

/// Where each spill of a program lies in its file, and the size of that file. A spill begins at the same place within a
/// page as in the arena, so that its pages are written from there.
fn places(program: &Program, assignment: &Assignment) -> (Vec<(Range<usize>, u64)>, Bytes) {
    let page = ARENA_ALIGNMENT as u64;
    let mut end = 0u64;
    let places = program
        .spills
        .iter()
        .map(|spill| {
            let info = &program.tensors[spill.tensor];
            let start = match info.storage {
                Storage::Buffer { buffer, offset } => assignment.buffer_offset[buffer] + offset,
                Storage::Weight(weight) => assignment.weight_offset[weight],
                _ => unreachable!("only what lies in the arena is spilled"),
            };
            let at = end + start as u64 % page;
            end = (at + info.size_bytes() as u64).next_multiple_of(page);
            (start..start + info.size_bytes(), at)
        })
        .collect();
    (places, Bytes(end))
}

impl Spiller {
    /// Makes the file in `folder`, which becomes source `source` of the program, and starts the writing thread.
    pub fn new(
        program: &mut Program,
        assignment: &Assignment,
        arena: Arc<Arena>,
        folder: &Path,
        source: usize,
    ) -> Result<(Spiller, Arc<SpillFile>), EngineError> {
        let (places, size) = places(program, assignment);
        let file = Arc::new(SpillFile::create(folder, size).map_err(EngineError::Spill)?);
        let source = SourceId(u32::try_from(source).expect("fewer than 2^32 files"));
        for (spill, (range, at)) in program.spills.iter().zip(&places) {
            let stored = StoredTensor { source, offset: *at, size: Bytes(range.len() as u64) };
            program.weights[spill.weight].origin = WeightOrigin::Stored(stored);
        }
        let (jobs, queue) = sync_channel(places.len().max(1));
        let state = Mutex::new(State { pending: vec![false; places.len()], error: None });
        let desk = Arc::new(Desk { file: file.clone(), arena, places, state, changed: Condvar::new() });
        let writer = desk.clone();
        let thread = std::thread::Builder::new()
            .name("lighter-spill".to_owned())
            .stack_size(WRITER_STACK_BYTES)
            .spawn(move || writer.write_until_closed(&queue))
            .map_err(EngineError::Memory)?;
        Ok((Spiller { desk, jobs: Some(jobs), thread: Some(thread) }, file))
    }

    /// Gives pieces of a tensor's place in the file to `piece` to be filled, and writes them.
    pub fn fill(
        &self,
        spill: usize,
        mut piece: impl FnMut(&mut [u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let (range, offset) = &self.desk.places[spill];
        let mut buffer = vec![0u8; PIECE_BYTES];
        let mut done = 0;
        while done < range.len() {
            // Pieces end where pages of the file do, because a write takes its pages for itself.
            let head = (offset + done as u64) as usize % ARENA_ALIGNMENT;
            let size = (range.len() - done).min(PIECE_BYTES - head);
            piece(&mut buffer[..size])?;
            self.desk.file.write_at(offset + done as u64, &buffer[..size]).map_err(EngineError::Spill)?;
            done += size;
        }
        Ok(())
    }

    /// Reads a tensor from its place in the file, piece by piece.
    pub fn read(&self, spill: usize, mut piece: impl FnMut(&[u8])) -> Result<(), EngineError> {
        let (range, offset) = &self.desk.places[spill];
        let mut buffer = vec![0u8; PIECE_BYTES];
        let mut done = 0;
        while done < range.len() {
            let size = (range.len() - done).min(PIECE_BYTES);
            let read = self.desk.file.read_at(offset + done as u64, &mut buffer[..size]);
            read.map_err(EngineError::Spill)?;
            piece(&buffer[..size]);
            done += size;
        }
        Ok(())
    }

    /// Reads a tensor's place in the file piece by piece, has each piece changed, and writes it back.
    pub fn change(&self, spill: usize, change: &mut dyn FnMut(usize, &mut [u8])) -> Result<(), EngineError> {
        let (_, offset) = &self.desk.places[spill];
        let mut read = 0u64;
        let mut failed = None;
        self.fill(spill, |piece| {
            if let Err(e) = self.desk.file.read_at(offset + read, piece) {
                failed = Some(e);
                return Err(EngineError::Internal("a state cannot be read".to_owned()));
            }
            change(read as usize, piece);
            read += piece.len() as u64;
            Ok(())
        })
        .map_err(|e| failed.take().map_or(e, EngineError::Spill))
    }

    /// Has a tensor written; it must stay as it is until [`Spiller::finish`].
    pub fn start(&self, spill: usize) -> Result<(), EngineError> {
        self.desk.state().pending[spill] = true;
        match self.jobs.as_ref().map(|jobs| jobs.send(spill)) {
            Some(Ok(())) => Ok(()),
            _ => Err(EngineError::Internal("the thread that spills is gone".to_owned())),
        }
    }

    /// Waits until a tensor is on the disk.
    pub fn finish(&self, spill: usize) -> Result<(), EngineError> {
        let mut state = self.desk.state();
        while state.pending[spill] && state.error.is_none() {
            state = self.desk.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.take().map_or(Ok(()), Err)
    }

    /// Waits until nothing is being written, so that an interrupted run leaves the arena free.
    pub fn settle(&self) {
        let mut state = self.desk.state();
        while state.pending.iter().any(|&p| p) {
            state = self.desk.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error = None;
    }

    /// Bytes written so far.
    pub fn bytes_written(&self) -> Bytes {
        self.desk.file.bytes_written()
    }
}

impl Drop for Spiller {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the thread would have left the run waiting; there is nothing to add.
            let _ = thread.join();
        }
    }
}
