//! Language models over HTTP, in the interface of OpenAI.
//!
//! ```no_run
//! use lightering_lm::{ChatTemplate, Scheduler};
//! use lightering_server::{Server, ServerOptions};
//! # fn with(scheduler: Scheduler) -> Result<(), Box<dyn std::error::Error>> {
//! let template = ChatTemplate::new(None, "", "<|im_end|>")?;
//! let server = Server::new(scheduler, template, ServerOptions::named("smollm2-135m"));
//! let listener = std::net::TcpListener::bind("127.0.0.1:8080")?;
//! server.run(listener)?; // until SIGTERM or SIGINT, then until the last answer is out
//! # Ok(()) }
//! ```
//!
//! | path | what |
//! |---|---|
//! | `/v1/chat/completions`, `/v1/completions` | answers, as a whole or as server-sent events |
//! | `/v1/embeddings` | embeddings |
//! | `/v1/models` | the one model |
//! | `/health` | 200 while requests are taken, 503 while draining |
//! | `/metrics` | counters for Prometheus |
//! | `/` and `/dashboard/state` | the dashboard and what feeds it |
//!
//! Invariants: nothing that a client sends or fails to read holds up another client; every queue and buffer has a limit;
//! a client that goes away takes its request with it; everything that can be asked but is not supported is refused by
//! name. This crate knows no model files and no terminals. The floors are in the repository's ARCHITECTURE.md.
#![forbid(unsafe_code)]

mod answer;
mod base64;
mod chat;
mod completions;
mod connection;
mod dashboard;
mod embeddings;
mod error;
mod fields;
mod keys;
mod metrics;
mod options;
mod refusal;
mod routes;
mod state;
mod tools;

pub use error::{Error, Result};
pub use options::{MemoryProbe, ServerOptions};
pub use state::{Drain, Server, Stop};
