//! The server and what all of its requests share.

use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lightering_lm::{ChatTemplate, ModelStatus, Scheduler};
use tokio::sync::{Semaphore, watch};

use crate::keys::Keys;
use crate::metrics::HttpCounters;
use crate::{Error, Result, ServerOptions, connection, routes};

/// The unit in which the memory of bodies is handed out.
pub(crate) const BODY_UNIT: u64 = 1024;

/// Threads that render templates, tokenize and compile grammars.
const PREPARING_THREADS: usize = 4;

/// What requests share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub scheduler: Scheduler,
    pub template: ChatTemplate,
    pub options: ServerOptions,
    pub keys: Keys,
    pub http: HttpCounters,
    /// Memory for bodies, in [`BODY_UNIT`]s.
    pub bodies: Arc<Semaphore>,
    pub connections: AtomicUsize,
    pub started: Instant,
    pub draining: AtomicBool,
}

impl Shared {
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed) || !self.scheduler.is_open()
    }

    /// What the model tells of itself, with the memory of the whole process where that is known.
    pub fn status(&self) -> ModelStatus {
        let mut status = self.scheduler.model_status();
        status.memory_budget = self.options.memory_budget.or(status.memory_budget);
        status.memory_used = self.options.memory_used.as_ref().map(|probe| probe()).or(status.memory_used);
        status
    }
}

/// Stops a server from outside.
#[derive(Debug, Clone)]
pub struct Stop {
    stage: watch::Sender<Stage>,
}

impl Stop {
    /// Takes no more requests, lets answers end for as long as the options say, then ends.
    pub fn drain(&self) {
        self.stage.send_if_modified(|stage| {
            let is_new = *stage == Stage::Serving;
            if is_new {
                *stage = Stage::Draining;
            }
            is_new
        });
    }

    /// Cancels what is under way and ends.
    pub fn now(&self) {
        self.stage.send_replace(Stage::Ending);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Serving,
    Draining,
    Ending,
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Connections that had to be cut off.
    pub connections_cut: usize,
}

/// Serves one model.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    stage: watch::Sender<Stage>,
}

impl Server {
    /// A server for the model of `scheduler`, with its chat template.
    #[must_use]
    pub fn new(scheduler: Scheduler, template: ChatTemplate, options: ServerOptions) -> Server {
        let units = usize::try_from(options.bodies_bytes_max.0 / BODY_UNIT).unwrap_or(Semaphore::MAX_PERMITS);
        let shared = Shared {
            scheduler,
            template,
            keys: Keys::new(&options.api_keys),
            http: HttpCounters::default(),
            bodies: Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))),
            connections: AtomicUsize::new(0),
            started: Instant::now(),
            draining: AtomicBool::new(false),
            options,
        };
        Server { shared: Arc::new(shared), stage: watch::channel(Stage::Serving).0 }
    }

    /// Stops it from outside.
    #[must_use]
    pub fn stop(&self) -> Stop {
        Stop { stage: self.stage.clone() }
    }

    /// Serves on a listener until SIGTERM or SIGINT arrives or [`stop`](Server::stop) is used; then drains. A second signal
    /// ends it at once.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses threads, the listener or the signals.
    pub fn run(self, listener: TcpListener) -> Result<Drain> {
        let io = |what| move |source| Error::Io { what, source };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(PREPARING_THREADS)
            .thread_name("server")
            .enable_all()
            .build()
            .map_err(io("starting the threads of the server"))?;
        listener.set_nonblocking(true).map_err(io("preparing the listener"))?;
        let shared = Arc::clone(&self.shared);
        let drained = runtime.block_on(async {
            let listener =
                tokio::net::TcpListener::from_std(listener).map_err(io("preparing the listener"))?;
            let signals = signals().map_err(io("listening for signals"))?;
            let stop = self.stop();
            tokio::spawn(signals(stop));
            let stage = self.stage.subscribe();
            Ok(connection::accept(listener, routes::router(Arc::clone(&self.shared)), self.shared, stage)
                .await)
        });
        // What still prepares a request has nobody to give it to.
        runtime.shutdown_timeout(Duration::from_millis(100));
        drop(shared);
        drained
    }
}

#[cfg(unix)]
fn signals() -> std::io::Result<impl FnOnce(Stop) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(move |stop: Stop| {
        let wait = async move {
            for again in [false, true] {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                if again { stop.now() } else { stop.drain() }
            }
        };
        Box::pin(wait) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
    })
}

#[cfg(not(unix))]
fn signals() -> std::io::Result<impl FnOnce(Stop) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>> {
    Ok(move |stop: Stop| {
        let wait = async move {
            for again in [false, true] {
                if tokio::signal::ctrl_c().await.is_err() {
                    return;
                }
                if again { stop.now() } else { stop.drain() }
            }
        };
        Box::pin(wait) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
    })
}
