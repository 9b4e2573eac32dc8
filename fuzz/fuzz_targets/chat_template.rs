//! Any text as a chat template: refused, or it renders in bounded time.
#![no_main]

use lightering_lm::{ChatTemplate, Conversation, Json, Message};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let source = String::from_utf8_lossy(data);
    let Ok(template) = ChatTemplate::new(Some(&source), "<s>", "</s>") else { return };
    let messages = [Message::new("system", "a"), Message::new("user", "b\n"), Message::new("assistant", "c")];
    let tools = Json::from_text(r#"[{"type": "function", "function": {"name": "f", "parameters": {}}}]"#)
        .expect("it is JSON");
    let conversation = Conversation {
        messages: &messages,
        tools: Some(&tools),
        add_generation_prompt: true,
        now_unix_seconds: Some(1_721_984_703),
        ..Conversation::default()
    };
    let _ = template.render(&conversation);
});
