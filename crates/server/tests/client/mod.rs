//! A server with the toy model in this process, and a client that writes HTTP/1.1 by hand.

#[path = "../../../lm/tests/toy/mod.rs"]
#[allow(dead_code, reason = "the scheduler's tests use the rest")]
pub mod toy;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lightering_lm::{ChatTemplate, Scheduler, SchedulerOptions};
use lightering_server::{Drain, Server, ServerOptions, Stop};
use serde_json::Value;
use toy::{Controls, Toy};

/// ChatML, with the tools in front.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub struct Running {
    pub address: SocketAddr,
    pub stop: Stop,
    pub controls: Arc<Controls>,
    thread: Option<JoinHandle<Drain>>,
}

pub fn start(change: impl FnOnce(&mut Toy, &mut SchedulerOptions, &mut ServerOptions)) -> Running {
    let tokenizer = Arc::new(toy::tokenizer());
    let mut toy = Toy::new(&tokenizer, 8, 512);
    let (mut scheduling, mut serving) = (SchedulerOptions::default(), ServerOptions::named("toy"));
    change(&mut toy, &mut scheduling, &mut serving);
    toy.cells = vec![None; toy.page_len * toy.page_count];
    let controls = Arc::clone(&toy.controls);
    let scheduler = Scheduler::start(Box::new(toy), tokenizer, scheduling).unwrap();
    let template = ChatTemplate::new(Some(TEMPLATE), "", "<|im_end|>").unwrap();
    let server = Server::new(scheduler, template, serving);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let stop = server.stop();
    let thread = std::thread::spawn(move || server.run(listener).unwrap());
    Running { address, stop, controls, thread: Some(thread) }
}

impl Running {
    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        Connection { reader: BufReader::new(stream) }
    }

    pub fn get(&self, path: &str) -> Response {
        self.connect().request("GET", path, &[], None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.connect().request("POST", path, &[], Some(body.to_string().as_bytes()))
    }

    pub fn counters(&self) -> Value {
        self.get("/dashboard/state").json()["scheduler"]["counters"].clone()
    }

    /// Waits until the state of the scheduler says so.
    pub fn until(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let state = self.get("/dashboard/state").json();
            if holds(&state["scheduler"]) {
                return;
            }
            assert!(Instant::now() < deadline, "{what} did not happen: {state}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn join(mut self) -> Drain {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.now();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

pub struct Connection {
    reader: BufReader<TcpStream>,
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The data of all events of a stream.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let events = self.text().split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events
            .map(|event| {
                assert!(!event.contains('\n'), "{event:?}");
                event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")).to_owned()
            })
            .collect()
    }
}

impl Connection {
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(body) = body {
            head.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        self.write(&bytes);
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).unwrap();
    }

    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Response {
        self.send(method, path, headers, body);
        self.response()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn head(&mut self) -> Response {
        let status_line = self.line();
        let status = status_line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{status_line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Response { status, headers, body: Vec::new() }
    }

    /// The next chunk of a chunked body; `None` at its end.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(&self.line(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }

    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                response.body.extend(chunk);
            }
        } else {
            let length = response.header("content-length").and_then(|v| v.parse().ok()).unwrap();
            response.body = vec![0; length];
            self.reader.read_exact(&mut response.body).unwrap();
        }
        response
    }
}
