use std::sync::Arc;
use std::time::Duration;

use lightering_units::Bytes;

/// Tells how much memory is held now.
pub type MemoryProbe = Arc<dyn Fn() -> Bytes + Send + Sync>;

/// What a server allows.
#[derive(Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// The name by which clients ask for the model.
    pub model_id: String,
    /// Keys of which clients have to show one (`Authorization: Bearer …`); none are asked for when empty.
    pub api_keys: Vec<String>,
    /// The largest body of a request.
    pub body_bytes_max: Bytes,
    /// The largest sum of all bodies that are read or prepared at one time.
    pub bodies_bytes_max: Bytes,
    /// Most connections at one time.
    pub connections_max: usize,
    /// The longest time that a client may take to send a head, or a body.
    pub read_limit: Duration,
    /// The longest time for which a client may take nothing of what is sent to it.
    pub write_limit: Duration,
    /// How often a stream says that it is still there while it has nothing to say.
    pub keep_alive: Duration,
    /// The longest time for which answers may go on after the signal to stop.
    pub drain_limit: Duration,
    /// The budget that the process keeps to, for the dashboard and the metrics; the model's own word counts if not given.
    pub memory_budget: Option<Bytes>,
    /// What the process holds of it.
    pub memory_used: Option<MemoryProbe>,
}

impl ServerOptions {
    /// The usual limits, for a model of this name.
    #[must_use]
    pub fn named(model_id: impl Into<String>) -> ServerOptions {
        ServerOptions {
            model_id: model_id.into(),
            api_keys: Vec::new(),
            body_bytes_max: Bytes(4 << 20),
            bodies_bytes_max: Bytes(64 << 20),
            connections_max: 512,
            read_limit: Duration::from_secs(30),
            write_limit: Duration::from_secs(60),
            keep_alive: Duration::from_secs(15),
            drain_limit: Duration::from_secs(30),
            memory_budget: None,
            memory_used: None,
        }
    }
}

impl std::fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys do not belong into logs.
        f.debug_struct("ServerOptions")
            .field("model_id", &self.model_id)
            .field("api_keys", &self.api_keys.len())
            .field("body_bytes_max", &self.body_bytes_max)
            .field("connections_max", &self.connections_max)
            .finish_non_exhaustive()
    }
}
