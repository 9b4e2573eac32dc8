//! A small fixed pool of threads.
//!
//! [`ThreadPool::parallel_for`] hands out task indices one at a time, so that a core which is slow or busy with
//! something else simply takes fewer. The calling thread works too, and never waits for a worker that has not
//! started: when a foreign process holds the other cores, the caller does all the work at its own speed.
//! Workers spin for a few microseconds, then yield, then park. No call allocates.

use crate::arch::Isa;
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Spins of a waiting thread before it starts to yield, and yields before it parks.
const SPINS: u32 = 200;
const YIELDS: u32 = 40;

/// Set in [`Shared::state`] while workers may join the job; the epoch lies above it, the count of joined
/// workers below.
const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize, usize) + Sync),
    tasks: usize,
}

struct Shared {
    /// epoch << 32 | OPEN | joined workers
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    caller: UnsafeCell<Option<Thread>>,
    next: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` and `caller` are written by the submitting thread only while `OPEN` is clear and no worker has
// joined, and read by workers only between joining and leaving.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only followed while the submitting call keeps its referent alive.
unsafe impl Send for Shared {}

/// A fixed number of threads that run indexed tasks, and the instruction set that kernels use on them.
///
/// ```
/// use lightering_kernels::ThreadPool;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// let pool = ThreadPool::new(2);
/// let sum = AtomicUsize::new(0);
/// pool.parallel_for(10, &|task, _worker| {
///     sum.fetch_add(task, Ordering::Relaxed);
/// });
/// assert_eq!(sum.into_inner(), 45);
/// ```
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    submit: Mutex<()>,
    isa: Isa,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).field("isa", &self.isa).finish()
    }
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller counted as one of them; 0 is taken as 1. Where the system
    /// refuses to start a thread the pool is smaller.
    pub fn new(threads: usize) -> ThreadPool {
        ThreadPool::with_isa(threads, Isa::best())
    }

    /// As [`ThreadPool::new`], with the instruction set capped at `isa`.
    pub fn with_isa(threads: usize, isa: Isa) -> ThreadPool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            caller: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                let builder =
                    std::thread::Builder::new().name(format!("lighter-{index}")).stack_size(512 << 10);
                builder.spawn(move || work(&shared, index)).ok()
            })
            .collect();
        ThreadPool { shared, workers, submit: Mutex::new(()), isa: isa.min(Isa::detected()) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set that kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(index, worker)` once for each `index < tasks`, and returns when all calls have returned.
    /// `worker < self.threads()` differs between calls that run at the same time. Runs inline when there is
    /// one thread or one task, and when called from several threads at once or from inside a task.
    ///
    /// # Panics
    /// Panics when a task panics, after the others have ended.
    pub fn parallel_for(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            return (0..tasks).for_each(|index| task(index, 0));
        }
        let Ok(_guard) = self.submit.try_lock() else {
            return (0..tasks).for_each(|index| task(index, 0));
        };
        let shared = &*self.shared;
        let epoch = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        // SAFETY: the state is closed and nobody has joined, so no worker looks at these cells. The transmute
        // only forgets the lifetime of the closure; this call does not return before all workers have left.
        unsafe {
            let task = std::mem::transmute::<
                *const (dyn Fn(usize, usize) + Sync),
                *const (dyn Fn(usize, usize) + Sync + 'static),
            >(task);
            *shared.job.get() = Some(Job { task, tasks });
            *shared.caller.get() = Some(std::thread::current());
        }
        shared.next.store(0, Ordering::Relaxed);
        shared.state.store(epoch << 32 | OPEN, Ordering::Release);
        for worker in self.workers.iter().take(tasks - 1) {
            worker.thread().unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(|| {
            claim(shared, tasks, |index| task(index, 0));
        }));
        if own.is_err() {
            shared.next.store(tasks, Ordering::Relaxed);
        }
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut waits = 0;
        while shared.state.load(Ordering::Acquire) & COUNT != 0 {
            pause(&mut waits);
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(panic) {
            drop(_guard);
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so joining cannot fail; if it did, nothing is left to do.
            let _ = worker.join();
        }
    }
}

fn claim(shared: &Shared, tasks: usize, run: impl Fn(usize)) {
    loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= tasks {
            return;
        }
        run(index);
    }
}

fn pause(waits: &mut u32) {
    *waits += 1;
    if *waits < SPINS {
        std::hint::spin_loop();
    } else if *waits < SPINS + YIELDS {
        std::thread::yield_now();
    } else {
        std::thread::park();
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let mut waits = 0;
        let state = loop {
            if shared.stop.load(Ordering::Acquire) {
                return;
            }
            let state = shared.state.load(Ordering::Acquire);
            if state >> 32 != seen {
                break state;
            }
            pause(&mut waits);
        };
        if state & OPEN == 0 {
            seen = state >> 32;
            continue;
        }
        if shared.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        seen = state >> 32;
        // SAFETY: this worker has joined, so the submitting thread leaves both cells alone until it has left.
        let (job, caller) = unsafe { (*shared.job.get(), (*shared.caller.get()).clone()) };
        if let Some(job) = job {
            let result = catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: the submitting call keeps the closure alive until this worker has left.
                let task = unsafe { &*job.task };
                claim(shared, job.tasks, |index| task(index, worker));
            }));
            if let Err(panic) = result {
                shared.next.store(job.tasks, Ordering::Relaxed);
                *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
        }
        let left = shared.state.fetch_sub(1, Ordering::AcqRel) - 1;
        if left & (OPEN | COUNT) == 0
            && let Some(caller) = caller
        {
            caller.unpark();
        }
    }
}

/// A pointer that tasks on several threads may use, each for its own part of the buffer.
#[derive(Clone, Copy)]
pub(crate) struct Shareable<T>(pub(crate) *mut T);

impl<T> Shareable<T> {
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

// SAFETY: the pointer itself may move between threads; who dereferences it says why that is sound.
unsafe impl<T: Send> Send for Shareable<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shareable<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 3, 5] {
            let pool = ThreadPool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..200 {
                    pool.parallel_for(tasks, &|index, worker| {
                        assert!(worker < threads);
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 200));
            }
        }
    }

    #[test]
    fn nested_calls_run_inline() {
        let pool = ThreadPool::new(2);
        let sum = AtomicUsize::new(0);
        pool.parallel_for(4, &|_, _| {
            pool.parallel_for(4, &|_, _| {
                sum.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 16);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(3);
        for bad in [0, 5, 19] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.parallel_for(20, &|index, _| assert!(index != bad, "task {bad} fails"));
            }));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.parallel_for(20, &|index, _| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 190);
        }
    }
}
