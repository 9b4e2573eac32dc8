//! `lighter serve` as a process: what it refuses, and a model that is asked over HTTP until a signal ends it.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

fn lighter(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lighter"));
    command.args(arguments).env_remove("LIGHTER_API_KEY").stdin(Stdio::null());
    command
}

fn refused(arguments: &[&str], parts: &[&str]) {
    let output = lighter(arguments).output().expect("the executable starts");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}\n{error}");
    for part in parts {
        assert!(error.contains(part), "{arguments:?}: {part:?} is missing from\n{error}");
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("a temporary file");
        path.to_string_lossy().into_owned()
    };
    let text = write("model.txt", "no model");
    refused(&["serve", &text, "--port", "0"], &["is no GGUF file", "lighter inspect"]);
    let keys = write("keys", "\n \n");
    refused(&["serve", &text, "--port", "0", "--api-key-file", &keys], &["no keys"]);
    refused(&["serve", &text, "--api-key", " "], &["visible characters"]);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    refused(&["serve", &text, "--port", &port], &["listening on 127.0.0.1", "another --host or --port"]);
}

/// The trained mixture of experts of the test data.
fn model() -> Option<PathBuf> {
    let data = std::env::var_os("LIGHTER_TEST_DATA")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/lighter-test-data")))?;
    let model = data.join("moe-tiny/moe-tiny-f16.gguf");
    if model.is_file() {
        return Some(model);
    }
    eprintln!("skipped: {} is not there", model.display());
    None
}

/// Ends the server also when a test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(address: &str, path: &str, key: &str, body: Option<&Value>) -> (u16, Vec<u8>) {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a socket");
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-length: {length}\r\n\r\n{body}").expect("a socket");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let at = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let status = String::from_utf8_lossy(&answer[9..12]).parse().expect("a status");
    (status, answer.split_off(at + 4))
}

#[test]
fn a_model_is_served_until_a_signal() {
    let Some(model) = model() else { return };
    let model = model.to_string_lossy().into_owned();
    let flags = [
        "--port",
        "0",
        "--json",
        "--memory",
        "64MiB",
        "--context",
        "256",
        "--parallel",
        "2",
        "--name",
        "tiny",
    ];
    let mut command = lighter(&[&["serve", model.as_str()][..], &flags[..]].concat());
    command.env("LIGHTER_API_KEY", "secret").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = Running(command.spawn().expect("the executable starts"));
    let mut text = String::new();
    let mut lines = BufReader::new(server.0.stdout.take().expect("a pipe"));
    while !text.ends_with("}\n") {
        if lines.read_line(&mut text).expect("a pipe") == 0 {
            let mut error = String::new();
            server.0.stderr.take().expect("a pipe").read_to_string(&mut error).expect("a pipe");
            panic!("it did not start: {error}");
        }
    }
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["schema"], "lightering.serve/1");
    assert_eq!(
        (&report["model"], &report["keys"], &report["parallel"]),
        (&json!("tiny"), &json!(1), &json!(2))
    );
    let address = report["url"].as_str().and_then(|url| url.strip_prefix("http://")).expect("an address");
    assert_eq!(ask(address, "/v1/models", "wrong", None).0, 401);
    let body = json!({"prompt": "ROMEO:", "max_tokens": 24, "temperature": 0});
    let (status, answer) = ask(address, "/v1/completions", "secret", Some(&body));
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_else(|e| panic!("{status}: {e}"));
    let text = answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}"));
    // The same without a server and without a limit.
    let alone =
        lighter(&["generate", &model, "ROMEO:", "-n", "24", "--temperature", "0", "--context", "256"]);
    let alone = { alone }.output().expect("the executable starts");
    assert_eq!(String::from_utf8_lossy(&alone.stdout), format!("{text}\n"));
    let (_, state) = ask(address, "/dashboard/state", "secret", None);
    let state: Value = serde_json::from_slice(&state).expect("JSON");
    assert_eq!(state["scheduler"]["counters"]["generated_tokens"], answer["usage"]["completion_tokens"]);
    assert_eq!(state["status"]["memory_budget"], 64 << 20);
    let used = state["status"]["memory_used"].as_u64().expect("a number");
    assert!((1 << 20..64 << 20).contains(&used), "{used}");
    let process = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &process]).status().expect("kill").success());
    assert_eq!(server.0.wait().expect("an end").code(), Some(0));
    assert!(TcpStream::connect(address).is_err());
}
