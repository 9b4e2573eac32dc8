//! The server as clients see it: every path, every refusal, and clients that behave badly.

mod client;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use client::{Running, start, toy};
use lightering_units::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

fn plain() -> Running {
    start(|_, _, _| {})
}

fn chat(change: Value) -> Value {
    let mut body = json!({
        "model": "toy",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hello <|im_end|>"}],
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": true,
    });
    for (name, value) in change.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn a_chat_is_answered_as_a_whole_and_as_events_alike() {
    let server = plain();
    let whole = server.post("/v1/chat/completions", &chat(json!({}))).ok();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "toy");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["logprobs"], Value::Null);
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty());
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + 24,
        "{usage}"
    );
    let change = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.post("/v1/chat/completions", &chat(change)).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let events: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(events.iter().all(|e| e["object"] == "chat.completion.chunk" && e["id"] == events[0]["id"]));
    let (end, parts) = events.split_last().unwrap();
    assert_eq!(end["choices"], json!([]));
    assert_eq!(end["usage"]["completion_tokens"], 24);
    assert!(end["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0, "{end}");
    assert!(parts.iter().all(|part| part["usage"] == Value::Null));
    let (finish, parts) = parts.split_last().unwrap();
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    let streamed: String =
        parts.iter().map(|part| part["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(streamed, text);
    assert!(parts.iter().all(|part| part["choices"][0]["finish_reason"] == Value::Null));
    let without = server.post("/v1/chat/completions", &chat(json!({"stream": true}))).events();
    assert!(!without.concat().contains("usage"));
}

#[test]
fn contents_may_come_in_parts_and_tools_reach_the_template() {
    let server = plain();
    let count = |change| {
        let answer = server.post("/v1/chat/completions", &chat(change)).ok();
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let text = count(json!({"messages": [{"role": "user", "content": "ab"}]}));
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(count(json!({"messages": [{"role": "user", "content": parts}]})), text);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let plain = count(json!({}));
    assert!(count(json!({"tools": tools})) > plain + 40);
    assert_eq!(count(json!({"tools": tools, "tool_choice": "none"})), plain);
    // What is spelled like a control token is many tokens, since it stays text.
    assert!(plain > 30, "{plain}");
}

#[test]
fn log_probabilities_are_told() {
    let server = plain();
    let answer =
        server.post("/v1/chat/completions", &chat(json!({"logprobs": true, "top_logprobs": 3}))).ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 24);
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"], "greedy takes the likeliest");
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
    let body = json!({"prompt": "abc", "logprobs": 2, "max_tokens": 5, "temperature": 0, "ignore_eos": true});
    let answer = server.post("/v1/completions", &body).ok();
    let logprobs = &answer["choices"][0]["logprobs"];
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().unwrap().len(), 5, "{field}");
    }
}

#[test]
fn completions_take_text_and_tokens_and_stop_where_told() {
    let server = plain();
    let text = |body: &Value| {
        let answer = server.post("/v1/completions", body).ok();
        assert_eq!(answer["object"], "text_completion");
        (
            answer["choices"][0]["text"].as_str().unwrap().to_owned(),
            answer["choices"][0]["finish_reason"].as_str().unwrap().to_owned(),
        )
    };
    let body = |change: Value| {
        let mut body = json!({"prompt": "abc", "temperature": 0, "max_tokens": 30, "ignore_eos": true});
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let (full, reason) = text(&body(json!({})));
    assert_eq!(reason, "length");
    let ids: Vec<u32> = toy::tokenizer().encode("abc", false, false).unwrap();
    assert_eq!(text(&body(json!({"prompt": ids}))).0, full);
    assert_eq!(text(&body(json!({"prompt": ["abc"]}))).0, full);
    // A stop string out of the middle of the answer.
    let stop: String = full.chars().skip(8).take(2).collect();
    let (short, reason) = text(&body(json!({"stop": [stop, "never there"]})));
    assert_eq!(reason, "stop");
    assert_eq!(short, full[..full.find(&stop).unwrap()]);
    let events = server.post("/v1/completions", &body(json!({"stream": true, "stop": stop}))).events();
    let joined: String = events[..events.len() - 1]
        .iter()
        .map(|e| serde_json::from_str::<Value>(e).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(joined, short);
    // The same seed gives the same text, another one does not.
    let seeded = |seed: u64| text(&body(json!({"temperature": 1.0, "seed": seed}))).0;
    assert_eq!(seeded(5), seeded(5));
    assert_ne!(seeded(5), seeded(6));
    // A bias of 10000 decides everything.
    let (biased, _) = text(&body(json!({"logit_bias": {"5": 10000}, "max_tokens": 4})));
    assert_eq!(biased, toy::tokenizer().decode(&[5, 5, 5, 5]).unwrap());
    let defaults = server.post("/v1/completions", &json!({"prompt": "x", "ignore_eos": true})).ok();
    assert_eq!(defaults["usage"]["completion_tokens"], 16);
}

#[test]
fn several_prompts_get_several_answers_each_with_its_own_seed() {
    let server = plain();
    let body = |prompt: Value, change: Value| {
        let mut body =
            json!({"prompt": prompt, "max_tokens": 12, "seed": 3, "temperature": 1, "ignore_eos": true});
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let one = |prompt: &str, seed: u64| {
        let answer = server.post("/v1/completions", &body(json!(prompt), json!({"seed": seed}))).ok();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let expected: Vec<String> =
        ["abc", "xy"].iter().flat_map(|prompt| [one(prompt, 3), one(prompt, 4)]).collect();
    let both = json!(["abc", "xy"]);
    let answer = server.post("/v1/completions", &body(both.clone(), json!({"n": 2, "best_of": 2}))).ok();
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let texts: Vec<&str> = choices.iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, expected);
    assert_eq!(answer["usage"]["prompt_tokens"], 5, "each prompt counts once");
    assert_eq!(answer["usage"]["completion_tokens"], 48);
    let change = json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let events = server.post("/v1/completions", &body(both, change)).events();
    assert_eq!(events.iter().filter(|event| *event == "[DONE]").count(), 1);
    let (mut texts, mut ends) = (vec![String::new(); 4], 0);
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event).unwrap();
        match event["choices"].get(0) {
            Some(choice) => {
                texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
                ends += u32::from(choice["finish_reason"] == "length");
            }
            None => assert_eq!(event["usage"]["completion_tokens"], 48),
        }
    }
    assert_eq!((texts, ends), (expected, 4));
    let answer =
        server.post("/v1/chat/completions", &chat(json!({"n": 3, "temperature": 1, "seed": 1}))).ok();
    let texts: Vec<&Value> =
        answer["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!(texts.len(), 3);
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
}

#[test]
fn prompts_are_echoed_with_their_log_probabilities() {
    let server = plain();
    let body = |change: Value| {
        let mut body =
            json!({"prompt": "abcde", "max_tokens": 4, "temperature": 0, "ignore_eos": true, "echo": true});
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let post = |change| server.post("/v1/completions", &body(change)).ok()["choices"][0].clone();
    let answer = post(json!({"echo": false}))["text"].as_str().unwrap().to_owned();
    assert_eq!(post(json!({}))["text"], format!("abcde{answer}"));
    let whole = post(json!({"logprobs": 2}));
    let logprobs = &whole["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 9);
    assert_eq!(logprobs["text_offset"].as_array().unwrap()[..6], [0, 1, 2, 3, 4, 5].map(Value::from));
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    assert!(logprobs["token_logprobs"].as_array().unwrap()[1..].iter().all(|p| p.as_f64().unwrap() <= 0.0));
    // Scoring alone: what the answer would be scored as a prompt.
    let scored = post(json!({"prompt": whole["text"], "max_tokens": 0, "logprobs": 2}));
    assert_eq!((&scored["text"], &scored["finish_reason"]), (&whole["text"], &json!("length")));
    // The last token of the answer is only a part of a character, and spelled otherwise in the text.
    for field in ["token_logprobs", "tokens"] {
        assert_eq!(
            scored["logprobs"][field].as_array().unwrap()[..8],
            logprobs[field].as_array().unwrap()[..8]
        );
    }
    let ids: Vec<u32> = toy::tokenizer().encode("abcde", false, false).unwrap();
    assert_eq!(post(json!({"prompt": ids, "logprobs": 2})), whole);
    let events = server.post("/v1/completions", &body(json!({"logprobs": 2, "stream": true}))).events();
    let (mut text, mut told) = (String::new(), Vec::new());
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event).unwrap();
        text += event["choices"][0]["text"].as_str().unwrap();
        told.extend(
            event["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default(),
        );
    }
    assert_eq!(Value::from(text), whole["text"]);
    assert_eq!(Value::from(told), logprobs["token_logprobs"]);
}

#[test]
fn calls_of_tools_are_told_as_such() {
    let server = plain();
    let tools =
        json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"const": "weather"},
            "arguments": {
                "type": "object",
                "properties": {"warm": {"type": "boolean"}},
                "required": ["warm"],
                "additionalProperties": false,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let body = |change: Value| {
        let mut body = chat(json!({"response_format": format, "max_tokens": 200, "tools": tools, "seed": 1}));
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let choice = |change| server.post("/v1/chat/completions", &body(change)).ok()["choices"][0].clone();
    let whole = choice(json!({}));
    assert_eq!(whole["finish_reason"], "tool_calls");
    assert_eq!(whole["message"]["content"], Value::Null);
    let call = &whole["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["warm"].is_boolean());
    let events =
        server.post("/v1/chat/completions", &body(json!({"stream": true, "logprobs": true}))).events();
    let events: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let calls: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0]["index"], &calls[0]["function"]), (&json!(0), &call["function"]));
    assert!(
        events.iter().all(|e| e["choices"][0]["delta"]["content"].as_str().unwrap_or_default().is_empty())
    );
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // Without tools, and with others, it is text.
    let other = json!([{"type": "function", "function": {"name": "other"}}]);
    for change in [json!({"tools": null}), json!({"tools": other}), json!({"tool_choice": "none"})] {
        let choice = choice(change);
        assert_eq!(choice["finish_reason"], "stop");
        assert!(choice["message"]["content"].as_str().unwrap().contains("weather"));
        assert_eq!(choice["message"].get("tool_calls"), None);
    }
}

#[test]
fn answers_keep_to_a_schema() {
    let server = plain();
    let schema = json!({
        "type": "object",
        "properties": {"zeta": {"enum": ["x", "yy"]}, "alpha": {"type": "boolean"}},
        "required": ["zeta", "alpha"],
        "additionalProperties": false,
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    for seed in 0..4 {
        let change = json!({"response_format": format, "seed": seed, "temperature": 1, "max_tokens": 400, "ignore_eos": false});
        let answer = server.post("/v1/chat/completions", &chat(change)).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop");
        let value: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(["x", "yy"].contains(&value["zeta"].as_str().unwrap()));
        assert!(value["alpha"].is_boolean());
    }
}

#[test]
fn embeddings_come_as_numbers_and_as_base64() {
    let server = plain();
    let input = json!(["one", "two", "three", "four", "five", "six"]);
    let numbers = server.post("/v1/embeddings", &json!({"input": input, "model": "toy"})).ok();
    let data = numbers["data"].as_array().unwrap();
    assert_eq!(data.len(), 6);
    assert_eq!(numbers["usage"]["prompt_tokens"], 3 + 3 + 5 + 4 + 4 + 3);
    for (index, entry) in data.iter().enumerate() {
        assert_eq!(entry["index"], index);
        let values = entry["embedding"].as_array().unwrap();
        assert_eq!(values.len(), toy::EMBEDDING_LEN);
        let square: f64 = values.iter().map(|v| v.as_f64().unwrap().powi(2)).sum();
        assert!((square - 1.0).abs() < 1e-5);
    }
    let single = server.post("/v1/embeddings", &json!({"input": "three"})).ok();
    assert_eq!(single["data"][0]["embedding"], data[2]["embedding"]);
    let coded = server.post("/v1/embeddings", &json!({"input": "three", "encoding_format": "base64"})).ok();
    let coded = coded["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(coded.len(), (4 * toy::EMBEDDING_LEN).div_ceil(3) * 4);
    let first = data[2]["embedding"][0].as_f64().unwrap() as f32;
    let digit = |c: u8| {
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
            .iter()
            .position(|d| *d == c)
            .unwrap() as u64
    };
    let bits = coded.bytes().take(6).fold(0, |bits, c| bits << 6 | digit(c)) >> 4;
    assert_eq!(f32::from_le_bytes((bits as u32).to_be_bytes()), first);
}

#[test]
fn the_rest_of_the_interface() {
    let server = plain();
    assert_eq!(server.get("/health").ok()["status"], "ok");
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "toy");
    assert_eq!(server.get("/v1/models/toy").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/other").status, 404);
    server.post("/v1/chat/completions", &chat(json!({}))).ok();
    let metrics = server.get("/metrics");
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let value = |name: &str| -> f64 {
        let line = metrics.text().lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("{name}")).split(' ').nth(1).unwrap().parse().unwrap()
    };
    assert_eq!(value("lighter_lm_generated_tokens_total"), 24.0);
    assert_eq!(value("lighter_lm_requests_total{end=\"length\"}"), 1.0);
    assert_eq!(value("lighter_lm_first_token_seconds_count"), 1.0);
    assert_eq!(value("lighter_lm_first_token_seconds_bucket{le=\"+Inf\"}"), 1.0);
    assert_eq!(value("lighter_lm_inter_token_seconds_count"), 23.0);
    assert_eq!(value("lighter_lm_memory_budget_bytes"), f64::from(1 << 20));
    assert_eq!(value("lighter_server_responses_total{path=\"/v1/chat/completions\",status=\"200\"}"), 1.0);
    for line in metrics.text().lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok() && name.starts_with("lighter_"), "{line}");
    }
    let page = server.get("/");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(
        page.text().contains("<!doctype html>") && !page.text().contains("http"),
        "everything is in the page"
    );
    let state = server.get("/dashboard/state").ok();
    assert_eq!(state["schema"], "lightering.dashboard/1");
    assert_eq!(state["status"]["memory_used"], 1 << 19);
    assert_eq!(state["scheduler"]["counters"]["generated_tokens"], 24);
    assert_eq!(state["limits"]["sequences_max"], 16);
}

#[test]
fn wrong_requests_are_refused_by_name() {
    let server = start(|toy, _, _| toy.context_len = 300);
    let check = |path: &str, body: &Value, status: u16, code: Value, param: Value| {
        let response = server.post(path, body);
        let error = response.json()["error"].clone();
        assert_eq!(
            (response.status, &error["code"], &error["param"]),
            (status, &code, &param),
            "{body}: {error}"
        );
        assert!(error["message"].as_str().unwrap().len() > 10, "{error}");
        assert!(["invalid_request_error", "rate_limit_error"].contains(&error["type"].as_str().unwrap()));
    };
    let path = "/v1/chat/completions";
    let null = Value::Null;
    let many_bias: Value =
        (0..2000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    for (change, code, param) in [
        (json!({"n": 9}), null.clone(), "n"),
        (json!({"n": 0}), null.clone(), "n"),
        (json!({"messages": []}), null.clone(), "messages"),
        (json!({"messages": null}), null.clone(), "messages"),
        (json!({"messages": "hi"}), null.clone(), "messages"),
        (json!({"messages": [{"content": "x"}]}), null.clone(), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            null.clone(),
            "messages[0].content",
        ),
        (json!({"temperature": "hot"}), null.clone(), "temperature"),
        (json!({"top_logprobs": 2}), null.clone(), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), null.clone(), "top_logprobs"),
        (json!({"stop": 5}), null.clone(), "stop"),
        (json!({"stream": "yes"}), null.clone(), "stream"),
        (json!({"logit_bias": {"x": 1}}), null.clone(), "logit_bias"),
        (json!({"logit_bias": many_bias}), null.clone(), "logit_bias"),
        (json!({"tool_choice": "required"}), json!("unsupported_parameter"), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), json!("unsupported_parameter"), "tool_choice"),
        (json!({"functions": [{"name": "f"}]}), json!("unsupported_parameter"), "functions"),
        (json!({"modalities": ["audio"]}), json!("unsupported_parameter"), "modalities"),
        (json!({"response_format": {"type": "xml"}}), null.clone(), "response_format"),
        (json!({"response_format": {"type": "json_schema"}}), null.clone(), "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}),
            json!("unsupported_value"),
            "response_format",
        ),
        (json!({"no_such_field": 1}), json!("unknown_parameter"), "no_such_field"),
    ] {
        check(path, &chat(change), 400, code, json!(param));
    }
    // These are found by the floors below, which know no fields.
    for change in [
        json!({"temperature": -1}),
        json!({"top_p": 2}),
        json!({"max_tokens": 0}),
        json!({"stop": ["", "x"]}),
        json!({"stop": vec!["x"; 17]}),
        json!({"logit_bias": {"99999": 1}}),
    ] {
        check(path, &chat(change), 400, null.clone(), null.clone());
    }
    check(path, &chat(json!({"model": "gpt-4"})), 404, json!("model_not_found"), json!("model"));
    check(path, &chat(json!({"max_tokens": 400})), 400, json!("context_length_exceeded"), null.clone());
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(500)}], "max_tokens": null});
    check(path, &chat(long), 400, json!("context_length_exceeded"), null.clone());
    let path = "/v1/completions";
    check(path, &json!({}), 400, null.clone(), json!("prompt"));
    check(path, &json!({"prompt": vec!["a"; 20], "n": 8}), 400, null.clone(), json!("prompt"));
    check(path, &json!({"prompt": []}), 400, null.clone(), json!("prompt"));
    check(path, &json!({"prompt": ""}), 400, null.clone(), json!("prompt"));
    check(path, &json!({"prompt": [99999]}), 400, null.clone(), null.clone());
    check(path, &json!({"prompt": "a", "best_of": 2}), 400, json!("unsupported_parameter"), json!("best_of"));
    check(path, &json!({"prompt": "a", "max_tokens": 0}), 400, null.clone(), null.clone());
    check(path, &json!({"prompt": "a", "logprobs": 30}), 400, null.clone(), json!("logprobs"));
    let path = "/v1/embeddings";
    check(path, &json!({"input": []}), 400, null.clone(), json!("input"));
    check(path, &json!({"input": ["a", ""]}), 400, null.clone(), json!("input"));
    check(path, &json!({"input": "a", "dimensions": 3}), 400, null.clone(), json!("dimensions"));
    check(
        path,
        &json!({"input": "a", "encoding_format": "hex"}),
        400,
        null.clone(),
        json!("encoding_format"),
    );
    check(path, &json!({"input": "x".repeat(500)}), 400, json!("context_length_exceeded"), json!("input"));
    check("/v1/nothing", &json!({}), 404, json!("unknown_url"), null.clone());
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    for body in ["", "[]", "{", "nonsense", "\u{0}", "{\"messages\": \"\\ud800\"}"] {
        let response = server.connect().request("POST", "/v1/chat/completions", &[], Some(body.as_bytes()));
        assert_eq!(response.status, 400, "{body:?}");
        assert_eq!(response.json()["error"]["type"], "invalid_request_error");
    }
    let deep = "[".repeat(100_000);
    let response = server.connect().request("POST", "/v1/completions", &[], Some(deep.as_bytes()));
    assert_eq!(response.status, 400);
    let deep = format!("{{\"messages\":[{{\"role\":\"user\",\"x\":{}}}]}}", "[".repeat(100_000));
    let response = server.connect().request("POST", "/v1/chat/completions", &[], Some(deep.as_bytes()));
    assert_eq!(response.status, 400);
}

#[test]
fn keys_are_asked_for() {
    let server = start(|_, _, serving| serving.api_keys = vec!["secret".into()]);
    for path in ["/v1/models", "/metrics", "/dashboard/state", "/nothing"] {
        let response = server.get(path);
        assert_eq!(response.status, 401, "{path}");
        assert_eq!(response.json()["error"]["code"], "invalid_api_key");
    }
    let ask =
        |key: &str| server.connect().request("GET", "/v1/models", &[("authorization", key)], None).status;
    assert_eq!(ask("Bearer wrong"), 401);
    assert_eq!(ask("Bearer secret"), 200);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn bodies_have_a_limit() {
    let server = start(|_, _, serving| serving.body_bytes_max = Bytes(2000));
    let text = "x".repeat(3000);
    let response = server.post("/v1/completions", &json!({"prompt": text}));
    assert_eq!(response.status, 413);
    assert_eq!(response.json()["error"]["code"], "request_too_large");
    // Without a length in front, the limit is found while reading.
    let mut connection = server.connect();
    connection.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..30 {
        connection.write(format!("64\r\n{}\r\n", "y".repeat(100)).as_bytes());
    }
    connection.write(b"0\r\n\r\n");
    assert_eq!(connection.response().status, 413);
    // A connection that was refused something is as good as before.
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let response = connection.request("POST", "/v1/completions", &[], Some(body.as_bytes()));
    assert_eq!(response.status, 200);
}

#[test]
fn bodies_have_a_time_limit_and_a_sum() {
    let server = start(|_, _, serving| {
        serving.read_limit = Duration::from_secs(3);
        serving.bodies_bytes_max = Bytes(4 << 20);
    });
    let mut slow = server.connect();
    slow.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 4000000\r\n\r\n");
    assert_eq!(slow.head().status, 100, "its room is taken now");
    let body = json!({"prompt": "x".repeat(600_000), "max_tokens": 1});
    let response = server.post("/v1/completions", &body);
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
    assert_eq!(response.json()["error"]["code"], "overloaded");
    assert_eq!(slow.response().status, 408);
    let response = server.post("/v1/completions", &body);
    assert_eq!(response.json()["error"]["code"], "context_length_exceeded", "the room is back");
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let server = start(|toy, scheduling, _| {
        toy.controls.delay_us.store(3000, Ordering::Relaxed);
        (scheduling.sequences_max, scheduling.queue_max) = (1, 1);
    });
    let body = chat(json!({"stream": true, "max_tokens": 500})).to_string();
    let mut open = Vec::new();
    let refusal = loop {
        let mut connection = server.connect();
        connection.send("POST", "/v1/chat/completions", &[], Some(body.as_bytes()));
        let head = connection.head();
        if head.status != 200 {
            break head;
        }
        open.push(connection);
        assert!(open.len() < 20);
    };
    assert_eq!(refusal.status, 429);
    assert!(refusal.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert!((2..=3).contains(&open.len()));
    drop(open);
    server.until("cancelling", |state| {
        state["running"] == 0 && state["queued"] == 0 && state["pages_held"] == 0
    });
    assert_eq!(server.post("/v1/chat/completions", &chat(json!({}))).status, 200);
}

#[test]
fn a_client_that_goes_away_takes_its_request_with_it() {
    let server = start(|toy, _, _| toy.controls.delay_us.store(1000, Ordering::Relaxed));
    for stream in [true, false] {
        let body = chat(json!({"stream": stream, "max_tokens": 3000})).to_string();
        let mut connection = server.connect();
        connection.send("POST", "/v1/chat/completions", &[], Some(body.as_bytes()));
        server.until("starting", |state| state["running"] == 1);
        drop(connection);
        server.until("cancelling", |state| state["running"] == 0 && state["pages_held"] == 0);
    }
    let counters = server.counters();
    assert_eq!(counters["requests_cancelled"], 2);
    assert!(counters["generated_tokens"].as_u64().unwrap() < 6000);
}

#[test]
fn a_client_that_does_not_read_stalls_nobody_and_is_cut_off() {
    let server = start(|toy, scheduling, serving| {
        (toy.context_len, toy.page_count) = (16_000, 2_200);
        scheduling.sequences_max = 1;
        scheduling.events_max = 8;
        serving.write_limit = Duration::from_millis(500);
    });
    let change = json!({"stream": true, "max_tokens": 15_000, "logprobs": true, "top_logprobs": 20});
    let mut lazy = server.connect();
    lazy.send("POST", "/v1/chat/completions", &[], Some(chat(change).to_string().as_bytes()));
    server.until("starting", |state| state["running"] == 1);
    for _ in 0..3 {
        server.post("/v1/chat/completions", &chat(json!({}))).ok();
    }
    server.until("cutting off", |state| state["counters"]["requests_cancelled"] == 1);
    assert!(server.counters()["generated_tokens"].as_u64().unwrap() < 15_000);
}

#[test]
fn failures_of_the_model_are_told() {
    let server = plain();
    server.controls.fail.store(true, Ordering::Relaxed);
    let response = server.post("/v1/chat/completions", &chat(json!({})));
    assert_eq!(response.status, 500);
    let error = &response.json()["error"];
    assert_eq!(error["type"], "server_error");
    assert!(error["message"].as_str().unwrap().contains("layer 3, expert 5"), "{error}");
    server.controls.fail.store(true, Ordering::Relaxed);
    let events = server.post("/v1/chat/completions", &chat(json!({"stream": true}))).events();
    assert!(events.last().unwrap().contains("layer 3, expert 5"), "{events:?}");
    assert_eq!(server.post("/v1/chat/completions", &chat(json!({}))).status, 200, "it lives on");
    server.controls.panic.store(true, Ordering::Relaxed);
    assert_eq!(server.post("/v1/chat/completions", &chat(json!({}))).status, 500);
    // The request ends while the thread of the model still does.
    let start = std::time::Instant::now();
    while server.get("/health").status != 503 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the server does not notice that its model is gone"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.post("/v1/chat/completions", &chat(json!({}))).status, 503);
}

#[test]
fn draining_lets_answers_end_and_takes_no_more() {
    let server = start(|toy, _, _| toy.controls.delay_us.store(2000, Ordering::Relaxed));
    let body = chat(json!({"stream": true, "max_tokens": 200})).to_string();
    let mut connection = server.connect();
    connection.send("POST", "/v1/chat/completions", &[], Some(body.as_bytes()));
    let head = connection.head();
    assert_eq!(head.status, 200);
    let mut text = connection.chunk().unwrap();
    server.stop.drain();
    while let Some(chunk) = connection.chunk() {
        text.extend(chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(text.contains("\"finish_reason\":\"length\""));
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
    assert_eq!(server.join().connections_cut, 0);
}

#[test]
fn draining_has_a_time_limit() {
    let server = start(|toy, _, serving| {
        toy.controls.delay_us.store(2000, Ordering::Relaxed);
        serving.drain_limit = Duration::from_millis(100);
    });
    let body = chat(json!({"stream": true, "max_tokens": 4000})).to_string();
    let mut connection = server.connect();
    connection.send("POST", "/v1/chat/completions", &[], Some(body.as_bytes()));
    assert_eq!(connection.head().status, 200);
    server.stop.drain();
    assert_eq!(server.join().connections_cut, 1);
}

#[test]
fn connections_have_a_limit() {
    let server = start(|_, _, serving| serving.connections_max = 2);
    let mut first = server.connect();
    assert_eq!(first.request("GET", "/health", &[], None).status, 200);
    let mut second = server.connect();
    assert_eq!(second.request("GET", "/health", &[], None).status, 200);
    let response = server.get("/health");
    assert_eq!((response.status, response.json()["error"]["code"].as_str()), (503, Some("overloaded")));
    assert_eq!(response.header("retry-after"), Some("2"));
    drop(first);
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.get("/health").status != 200 {
        assert!(Instant::now() < deadline, "the place was not given back");
    }
}

#[test]
fn streams_that_wait_say_that_they_are_there() {
    let server = start(|toy, _, serving| {
        toy.controls.delay_us.store(300_000, Ordering::Relaxed);
        serving.keep_alive = Duration::from_millis(50);
    });
    let response = server.post("/v1/chat/completions", &chat(json!({"stream": true, "max_tokens": 1})));
    assert!(response.text().contains("\n\n: waiting\n\n"), "{}", response.text());
    assert_eq!(response.events().last().unwrap(), "[DONE]");
}

#[test]
fn many_clients_at_once_get_what_each_would_get_alone() {
    let server = start(|_, scheduling, _| scheduling.draft_len_max = 3);
    let ask = |index: usize, server: &Running| {
        let change = json!({
            "messages": [{"role": "user", "content": format!("client {}", index % 7)}],
            "max_tokens": 20 + index % 5,
            "stream": index.is_multiple_of(2),
        });
        let response = server.post("/v1/chat/completions", &chat(change));
        if !index.is_multiple_of(2) {
            return response.ok()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        }
        let events = response.events();
        assert_eq!(events.last().unwrap(), "[DONE]");
        let text = |event: &String| {
            let value: Value = serde_json::from_str(event).unwrap();
            value["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
        };
        events[..events.len() - 1].iter().map(text).collect()
    };
    let together: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..32)
            .map(|index| {
                scope.spawn({
                    let server = &server;
                    move || ask(index, server)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (index, text) in together.into_iter().enumerate() {
        assert_eq!(text, ask(index, &server), "client {index}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1, ..ProptestConfig::default() })]
    #[test]
    fn damaged_requests_do_no_harm(
        damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>(), 0usize..3), 300),
    ) {
        let server = plain();
        let schema = json!({"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}}});
        let bodies = [
            ("/v1/chat/completions", chat(json!({"max_tokens": 4, "response_format": schema, "logit_bias": {"4": 1.5}}))),
            ("/v1/completions", json!({"prompt": "Zürich 😀", "max_tokens": 4, "stop": ["\n\n"], "stream": true})),
            ("/v1/embeddings", json!({"input": ["a", "b"], "encoding_format": "base64"})),
        ];
        let mut connection = server.connect();
        for (at, byte, cut, which) in damages {
            let (path, body) = &bodies[which];
            let mut body = body.to_string().into_bytes();
            let at = at.index(body.len());
            if cut { body.truncate(at) } else { body[at] = byte }
            let response = connection.request("POST", path, &[], Some(&body));
            prop_assert!(response.status < 500, "{}: {}", response.status, response.text());
        }
        prop_assert_eq!(server.get("/health").status, 200);
        server.until("the end of everything", |state| state["running"] == 0 && state["pages_held"] == 0);
    }
}
