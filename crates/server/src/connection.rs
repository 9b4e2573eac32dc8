//! Connections: how many there may be, how slow they may be, and how they end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use crate::state::{Drain, Shared, Stage};

/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// How long the listener rests when the system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// So many connections are refused politely at one time, and each for so long.
const REFUSALS_MAX: usize = 64;
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\nconnection: close\r\ncontent-length: 117\r\n\r\n{\"error\":{\"message\":\"too many connections; try again later\",\"type\":\"server_error\",\"param\":null,\"code\":\"overloaded\"}}\n";

/// Accepts connections until the stage says otherwise, then waits for those that are open.
pub(crate) async fn accept(
    listener: TcpListener,
    router: Router,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
) -> Drain {
    let places = Arc::new(Semaphore::new(shared.options.connections_max));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    let mut open = JoinSet::new();
    while *stage.borrow_and_update() == Stage::Serving {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stage.changed() => continue,
            Some(_) = open.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let (router, shared, stage) = (router.clone(), Arc::clone(&shared), stage.clone());
                    open.spawn(serve(stream, router, shared, stage, place));
                }
                Err(_) => {
                    // Whoever cannot even be refused properly just sees the connection close.
                    if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
                        tokio::spawn(refuse(stream, place));
                    }
                }
            },
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
    drop(listener);
    shared.draining.store(true, Ordering::Relaxed);
    shared.scheduler.close();
    let all_closed = async { while open.join_next().await.is_some() {} };
    let ending = async {
        let _ = stage.wait_for(|stage| *stage == Stage::Ending).await;
    };
    tokio::select! {
        _ = timeout(shared.options.drain_limit, all_closed) => {}
        () = ending => {}
    }
    let connections_cut = open.len();
    open.shutdown().await;
    Drain { connections_cut }
}

/// Says that there are too many already.
async fn refuse(mut stream: TcpStream, _place: OwnedSemaphorePermit) {
    let mut buffer = [0; 4096];
    let exchange = async {
        stream.write_all(TOO_MANY).await?;
        stream.shutdown().await?;
        // Closing with unread input would reset the connection before the answer is read.
        while stream.read(&mut buffer).await? > 0 {}
        io::Result::Ok(())
    };
    // A client that does not listen is left alone.
    let _ = timeout(REFUSAL_LIMIT, exchange).await;
}

async fn serve(
    stream: TcpStream,
    router: Router,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
    _place: OwnedSemaphorePermit,
) {
    let _counted = Counted::new(&shared);
    // Tokens are sent one by one; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(PatientStream { stream, limit: shared.options.write_limit, waiting: None });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(shared.options.read_limit)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    if *stage.borrow_and_update() == Stage::Serving {
        tokio::select! {
            // What a client did wrong is no event for the server.
            _ = connection.as_mut() => return,
            _ = stage.changed() => {}
        }
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// Counts a connection while it is open.
struct Counted<'s>(&'s Shared);

impl Counted<'_> {
    fn new(shared: &Shared) -> Counted<'_> {
        shared.connections.fetch_add(1, Ordering::Relaxed);
        Counted(shared)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that fails when its client takes nothing for too long.
struct PatientStream {
    stream: TcpStream,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl PatientStream {
    fn patient<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.waiting = None;
            return result;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        match waiting.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for PatientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PatientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.patient(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.patient(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(context);
        self.patient(context, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::TOO_MANY;

    #[test]
    fn the_ready_made_refusal_is_well_formed() {
        let text = std::str::from_utf8(TOO_MANY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
        let value: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(value["error"]["code"], "overloaded");
    }
}
