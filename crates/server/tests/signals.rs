//! A signal ends the server gracefully. Alone in its process, since signals reach all servers of one.
#![cfg(unix)]

#[allow(dead_code, reason = "one test needs little of it")]
mod client;

use std::process::Command;
use std::sync::atomic::Ordering;

use client::start;
use serde_json::json;

#[test]
fn sigterm_drains() {
    let server = start(|toy, _, _| toy.controls.delay_us.store(2000, Ordering::Relaxed));
    let body = json!({"prompt": "x", "max_tokens": 100, "stream": true, "ignore_eos": true}).to_string();
    let mut connection = server.connect();
    connection.send("POST", "/v1/completions", &[], Some(body.as_bytes()));
    assert_eq!(connection.head().status, 200);
    let mut text = connection.chunk().unwrap();
    let process = std::process::id().to_string();
    assert!(Command::new("kill").args(["-TERM", &process]).status().unwrap().success());
    while let Some(chunk) = connection.chunk() {
        text.extend(chunk);
    }
    assert!(String::from_utf8(text).unwrap().ends_with("data: [DONE]\n\n"));
    assert_eq!(server.join().connections_cut, 0);
}
