//! The scheduler: what a request gets does not depend on the requests beside it, and nothing is left behind.

mod toy;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lightering_lm::{
    Done, Error, Event, Events, FinishReason, GeneratedToken, GenerationRequest, Grammar, PageKind,
    SamplerOptions, Scheduler, SchedulerOptions, SpillFile, SpillStore, SpillWarning, TokenModel, Tokenizer,
    WindowCache, log_probability,
};
use lightering_units::Bytes;
use proptest::prelude::*;
use toy::{Controls, Toy};

fn start(toy: Toy, tokenizer: &Arc<Tokenizer>, options: SchedulerOptions) -> Scheduler {
    Scheduler::start(Box::new(toy), Arc::clone(tokenizer), options).unwrap()
}

fn options() -> SchedulerOptions {
    SchedulerOptions::default()
}

macro_rules! options {
    ($($field:ident: $value:expr),* $(,)?) => {{
        let mut options = options();
        $(options.$field = $value;)*
        options
    }};
}

#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<GeneratedToken>,
    text: String,
    reason: FinishReason,
}

fn collect(events: Events) -> (Answer, Done) {
    let mut tokens = Vec::new();
    let mut text = String::new();
    for event in events {
        match event {
            Event::Token(token) => {
                text.push_str(&token.text);
                tokens.push(token);
            }
            Event::Done(done) => {
                text.push_str(&done.text);
                return (Answer { tokens, text, reason: done.reason.clone() }, *done);
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("the channel ended without an end");
}

fn drained(scheduler: &Scheduler) {
    scheduler.close();
    assert!(scheduler.wait(Duration::from_secs(60)), "it did not finish");
    let state = scheduler.state();
    assert_eq!(
        (state.pages_held, state.window_pages_held, state.running, state.queued),
        (0, 0, 0, 0),
        "{state:?}"
    );
}

fn greedy(prompt: &[u32], count: usize) -> GenerationRequest {
    GenerationRequest {
        prompt: prompt.to_vec(),
        max_tokens: Some(count),
        sampler: SamplerOptions::greedy(),
        ignore_end: true,
        ..GenerationRequest::default()
    }
}

fn alone(toy: &Toy, tokenizer: &Arc<Tokenizer>, request: GenerationRequest) -> Answer {
    let fresh = Toy::new(tokenizer, 4, 256);
    let fresh = Toy { memory: toy.memory, ..fresh };
    let scheduler = start(fresh, tokenizer, options! { prefix_reuse: false });
    collect(scheduler.generate(request).unwrap()).0
}

fn requests() -> impl Strategy<Value = Vec<GenerationRequest>> {
    let prompt =
        (0u32..3, prop::collection::vec(0u32..40, 1..30), 1usize..24).prop_map(|(family, own, cut)| {
            // Families of prompts that begin alike, for prefix reuse.
            let mut prompt: Vec<u32> = (0..24).map(|i| (i * 7 + family) % 60).collect();
            prompt.truncate(cut);
            prompt.extend(own);
            prompt
        });
    let request = (
        prompt,
        1usize..40,
        prop_oneof![Just(0.0f32), Just(0.7)],
        any::<u64>(),
        prop::option::of(0usize..3),
        prop::bool::ANY,
        prop::bool::weighted(0.2),
    )
        .prop_map(|(prompt, count, temperature, seed, logprobs, penalised, stops)| GenerationRequest {
            prompt,
            max_tokens: Some(count),
            sampler: SamplerOptions {
                temperature,
                seed,
                repetition_penalty: if penalised { 1.3 } else { 1.0 },
                ..SamplerOptions::default()
            },
            stop: if stops { vec!["a".into(), "Z".into(), "#".into()] } else { Vec::new() },
            logprobs,
            ..GenerationRequest::default()
        });
    prop::collection::vec(request, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn answers_do_not_depend_on_company(
        requests in requests(),
        rows_max in 1usize..20,
        wanted_rows_max in 1usize..10,
        page_len in 1usize..6,
        scarcity in 0usize..3,
        sequences_max in 1usize..8,
        prefix_reuse in prop::bool::ANY,
        draft_len_max in 0usize..6,
        prefill_rows_max in 0usize..6,
        memory in 1usize..3,
        dropped in prop::collection::vec(prop::bool::weighted(0.15), 12),
        window in prop::option::of((1usize..20, 0usize..30)),
        spill in prop::option::of((1u32..200, 0.0f64..1.0)),
    ) {
        let tokenizer = Arc::new(toy::tokenizer());
        // At the scarcest, one sequence of the longest kind fits and nothing else.
        let page_count = [100usize, 160, 400][scarcity].div_ceil(page_len);
        let mut toy = Toy { rows_max, wanted_rows_max, memory, ..Toy::new(&tokenizer, page_len, page_count) };
        if let Some((len, more)) = window {
            // From hardly enough for one sequence to more than all need.
            toy = toy.with_window(len, WindowCache::least_pages(len, page_len) + more);
        }
        let scheduler_options = options! {
            sequences_max: sequences_max,
            prefix_reuse: prefix_reuse,
            draft_len_max: draft_len_max,
            prefill_rows_max: prefill_rows_max,
            events_max: 3,
        };
        let store = spill.map(|(slots, reliability)| {
            let store: Box<dyn SpillStore> = Box::new(Shelf { slots, reliability, ..Shelf::default() });
            (store, SpillWarning::new(|_| {}))
        });
        let scheduler =
            Scheduler::start_with_spill(Box::new(toy.clone()), Arc::clone(&tokenizer), scheduler_options, store).unwrap();
        let events: Vec<Events> = requests.iter().map(|r| scheduler.generate(r.clone()).unwrap()).collect();
        let threads: Vec<_> = events.into_iter().zip(&dropped).map(|(mut events, dropped)| {
            let dropped = *dropped;
            std::thread::spawn(move || {
                if dropped {
                    let _ = events.recv();
                    return None;
                }
                Some(collect(events))
            })
        }).collect();
        let mut wanted = 0;
        for (thread, request) in threads.into_iter().zip(&requests) {
            let Some((answer, done)) = thread.join().unwrap() else { continue };
            wanted += 1;
            let expected = alone(&toy, &tokenizer, request.clone());
            prop_assert_eq!(&answer, &expected);
            prop_assert_eq!(done.usage.prompt_tokens, request.prompt.len());
            prop_assert!(done.timings.accepted_tokens <= done.timings.drafted_tokens);
        }
        drained(&scheduler);
        let counters = scheduler.state().counters;
        let ended = counters.requests_stopped + counters.requests_length + counters.requests_cancelled;
        prop_assert_eq!(ended as usize, requests.len());
        prop_assert!((counters.requests_stopped + counters.requests_length) as usize >= wanted);
        prop_assert_eq!(counters.requests_failed, 0);
    }
}

#[test]
fn scarce_pages_lead_to_preemption_and_the_same_answers() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 20);
    let scheduler = start(toy.clone(), &tokenizer, options! { prefix_reuse: false });
    let requests: Vec<_> = (0..6).map(|i| greedy(&[i, i + 1, i + 2, 9, 9, i], 60)).collect();
    let events: Vec<_> = requests.iter().map(|r| scheduler.generate(r.clone()).unwrap()).collect();
    let done: Vec<_> = events.into_iter().map(collect).collect();
    for ((answer, _), request) in done.iter().zip(requests) {
        assert_eq!(*answer, alone(&toy, &tokenizer, request));
    }
    assert!(done.iter().any(|(_, done)| done.timings.preemptions > 0));
    assert!(scheduler.state().counters.preemptions > 0);
    drained(&scheduler);
}

#[test]
fn requests_that_begin_alike_share_pages() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 64);
    let scheduler = start(toy.clone(), &tokenizer, options());
    let prompt: Vec<u32> = (0..21).collect();
    let (first, done) = collect(scheduler.generate(greedy(&prompt, 5)).unwrap());
    assert_eq!(done.usage.cached_tokens, 0);
    let (second, done) = collect(scheduler.generate(greedy(&prompt, 5)).unwrap());
    assert_eq!(first, second);
    assert_eq!(done.usage.cached_tokens, 20, "five full pages");
    // The answer's pages count too: a conversation goes on where it was.
    let mut longer = prompt.clone();
    longer.extend(first.tokens.iter().map(|t| t.id));
    let (_, done) = collect(scheduler.generate(greedy(&longer, 5)).unwrap());
    assert_eq!(done.usage.cached_tokens, 24);
    let (_, done) = collect(scheduler.generate(greedy(&prompt[..20], 5)).unwrap());
    assert_eq!(done.usage.cached_tokens, 16, "the last token has to be computed");
    drained(&scheduler);
    assert!(scheduler.state().pages_cached > 0);
}

#[test]
fn windows_let_go_of_what_no_later_token_sees() {
    let tokenizer = Arc::new(toy::tokenizer());
    // A sequence of 300 positions in 5 pages of 4, for a window of 10.
    let toy = Toy::new(&tokenizer, 4, 256).with_window(10, 5);
    let scheduler = start(toy.clone(), &tokenizer, options());
    let prompt: Vec<u32> = (0..100).collect();
    let (first, done) = collect(scheduler.generate(greedy(&prompt, 200)).unwrap());
    assert_eq!(first, alone(&toy, &tokenizer, greedy(&prompt, 200)));
    assert_eq!(done.timings.preemptions, 0);
    // Going on behind the answer finds its end; another way from the middle does not, since that window is gone.
    let mut longer = prompt.clone();
    longer.extend(first.tokens.iter().map(|t| t.id));
    let (_, done) = collect(scheduler.generate(greedy(&longer, 5)).unwrap());
    assert_eq!(done.usage.cached_tokens, 296);
    let (again, done) = collect(scheduler.generate(greedy(&prompt, 5)).unwrap());
    assert_eq!(again.tokens, first.tokens[..5]);
    assert_eq!(done.usage.cached_tokens, 0);
    drained(&scheduler);
    assert_eq!(scheduler.state().window_pages_total, 5);
    let little = Toy::new(&tokenizer, 4, 256).with_window(10, 3);
    let error = Scheduler::start(Box::new(little), tokenizer, options()).unwrap_err();
    assert!(error.to_string().contains("at least 4"), "{error}");
}

/// A store in memory that fails now and then.
#[derive(Default)]
struct Shelf {
    slots: u32,
    /// How much of what is asked for is done.
    reliability: f64,
    pages: std::collections::HashMap<u32, Vec<u8>>,
    asked: u32,
}

impl Shelf {
    fn ask(&mut self) -> std::io::Result<()> {
        self.asked += 1;
        // Fractions of a golden angle are spread evenly.
        match f64::from(self.asked) * 0.618_034 % 1.0 < self.reliability {
            true => Ok(()),
            false => Err(std::io::ErrorKind::StorageFull.into()),
        }
    }
}

impl SpillStore for Shelf {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn write(&mut self, slot: u32, fill: &mut dyn FnMut(&mut [u8])) -> std::io::Result<()> {
        assert!(slot < self.slots);
        let mut bytes = vec![0; 128];
        fill(&mut bytes);
        self.pages.remove(&slot);
        self.ask()?;
        self.pages.insert(slot, bytes);
        Ok(())
    }

    fn read(&mut self, slot: u32, take: &mut dyn FnMut(&[u8])) -> std::io::Result<()> {
        self.ask()?;
        take(&self.pages[&slot]);
        Ok(())
    }
}

#[test]
fn what_pages_held_comes_back_from_the_spill() {
    let tokenizer = Arc::new(toy::tokenizer());
    let folder = tempfile::tempdir().unwrap();
    for window in [false, true] {
        let mut toy = Toy::new(&tokenizer, 4, 24);
        if window {
            toy = toy.with_window(10, 8);
        }
        let page_bytes = toy.page_bytes(PageKind::Shared);
        let file = SpillFile::create(folder.path(), Bytes::mib(1), page_bytes).unwrap();
        assert!(SpillFile::create(folder.path(), Bytes(100), page_bytes).is_err());
        let warning = SpillWarning::new(|warning| panic!("{warning}"));
        let scheduler = Scheduler::start_with_spill(
            Box::new(toy.clone()),
            Arc::clone(&tokenizer),
            options(),
            Some((Box::new(file), warning)),
        )
        .unwrap();
        let prompts: Vec<Vec<u32>> = (0..3).map(|i| (0..60).map(|t| (t * (i + 2)) % 90).collect()).collect();
        let answers: Vec<_> =
            prompts.iter().map(|p| collect(scheduler.generate(greedy(p, 20)).unwrap()).0).collect();
        // Each of them needs all the pages, so that only the file has kept the others.
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let (again, done) = collect(scheduler.generate(greedy(prompt, 20)).unwrap());
            assert_eq!(again, *answer);
            assert_eq!(done.usage.cached_tokens, 56, "all of the prompt but its last page");
            assert_eq!(again, alone(&toy, &tokenizer, greedy(prompt, 20)));
        }
        // Sequences whose pages are taken go on where they were.
        let computed = scheduler.state().counters.prefill_tokens;
        let events: Vec<_> = prompts.iter().map(|p| scheduler.generate(greedy(p, 36)).unwrap()).collect();
        let done: Vec<_> = events.into_iter().map(collect).collect();
        for ((answer, _), prompt) in done.iter().zip(&prompts) {
            assert_eq!(*answer, alone(&toy, &tokenizer, greedy(prompt, 36)));
        }
        drained(&scheduler);
        let counters = scheduler.state().counters;
        assert!(counters.pages_spilled >= 3 * 14 && counters.pages_restored >= 3 * 14, "{counters:?}");
        assert!(counters.prefill_tokens - computed < 100, "{counters:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_told_once_and_pages_are_computed_again() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 24);
    let warnings = Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = Arc::clone(&warnings);
    let warning = SpillWarning::new(move |warning| told.lock().unwrap().push(warning.to_owned()));
    let store = Shelf { slots: 100, reliability: 0.0, ..Shelf::default() };
    let model = Box::new(toy.clone());
    let spill = Some((Box::new(store) as Box<dyn SpillStore>, warning));
    let scheduler = Scheduler::start_with_spill(model, Arc::clone(&tokenizer), options(), spill).unwrap();
    for i in [0, 1, 0, 1] {
        let prompt: Vec<u32> = (0..60).map(|t| (t * (i + 2)) % 90).collect();
        let (answer, _) = collect(scheduler.generate(greedy(&prompt, 20)).unwrap());
        assert_eq!(answer, alone(&toy, &tokenizer, greedy(&prompt, 20)));
    }
    drained(&scheduler);
    let warnings = warnings.lock().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("computed again"), "{warnings:?}");
    assert_eq!(scheduler.state().counters.pages_spilled, 0);
}

#[test]
fn drafts_are_accepted_where_the_text_repeats() {
    let tokenizer = Arc::new(toy::tokenizer());
    // What comes next depends on one token only, so the text runs into a loop soon.
    let toy = Toy { memory: 1, ..Toy::new(&tokenizer, 4, 256) };
    let controls = Arc::clone(&toy.controls);
    let scheduler = start(toy.clone(), &tokenizer, options! { draft_len_max: 6 });
    let request = greedy(&[1, 2, 3], 200);
    let (answer, done) = collect(scheduler.generate(request.clone()).unwrap());
    assert_eq!(answer, alone(&toy, &tokenizer, request.clone()));
    assert_eq!(answer.tokens.len(), 200);
    let steps = controls.steps.load(Ordering::Relaxed);
    assert!(steps < 100, "{steps} steps for 200 tokens");
    assert!(done.timings.accepted_tokens > 100, "{:?}", done.timings);
    assert!(done.timings.accepted_tokens <= done.timings.drafted_tokens);
    let without = GenerationRequest { draft_len_max: Some(0), ..request };
    let (same, done) = collect(scheduler.generate(without).unwrap());
    assert_eq!(same, answer);
    assert_eq!(done.timings.drafted_tokens, 0);
}

#[test]
fn a_failed_step_fails_its_requests_and_nothing_else() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 2, 64);
    let controls = Arc::clone(&toy.controls);
    let scheduler = start(toy.clone(), &tokenizer, options());
    let request = greedy(&[1, 2, 3, 4, 5], 8);
    collect(scheduler.generate(request.clone()).unwrap());
    controls.fail.store(true, Ordering::Relaxed);
    let (answer, _) = collect(scheduler.generate(request.clone()).unwrap());
    let FinishReason::Error(message) = answer.reason else { panic!("{:?}", answer.reason) };
    assert!(message.contains("layer 3, expert 5"), "{message}");
    // The pages that it shared with the cache hold nothing now; using them would be found out.
    let (answer, done) = collect(scheduler.generate(request.clone()).unwrap());
    assert_eq!(answer, alone(&toy, &tokenizer, request));
    assert_eq!(done.usage.cached_tokens, 0);
    drained(&scheduler);
    let counters = scheduler.state().counters;
    assert_eq!((counters.steps_failed, counters.requests_failed), (1, 1));
}

#[test]
fn a_failed_step_spoils_no_sequence_that_shares_its_pages() {
    let tokenizer = Arc::new(toy::tokenizer());
    // One row per step: of two sequences with a common beginning, only one is in the step that fails.
    let toy = Toy { rows_max: 1, wanted_rows_max: 1, ..Toy::new(&tokenizer, 2, 64) };
    let controls = Arc::clone(&toy.controls);
    controls.delay_us.store(500, Ordering::Relaxed);
    let scheduler = start(toy.clone(), &tokenizer, options());
    let prompt: Vec<u32> = (0..9).collect();
    let mut first = scheduler.generate(greedy(&prompt, 100)).unwrap();
    first.recv().unwrap();
    let mut second = scheduler.generate(greedy(&prompt, 100)).unwrap();
    second.recv().unwrap();
    controls.fail.store(true, Ordering::Relaxed);
    let rest: Vec<_> = [first, second].map(collect).into_iter().collect();
    let failed = rest.iter().filter(|(answer, _)| matches!(answer.reason, FinishReason::Error(_))).count();
    assert_eq!(failed, 1);
    let expected = alone(&toy, &tokenizer, greedy(&prompt, 100));
    let (answer, done) = rest.into_iter().find(|(answer, _)| answer.reason == FinishReason::Length).unwrap();
    assert_eq!(answer.tokens, expected.tokens[1..]);
    assert_eq!(done.timings.preemptions, 1);
    drained(&scheduler);
}

#[test]
fn a_panic_ends_the_channels() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 2, 64);
    toy.controls.panic.store(true, Ordering::Relaxed);
    let scheduler = start(toy, &tokenizer, options());
    let mut events = scheduler.generate(greedy(&[1, 2], 8)).unwrap();
    assert_eq!(events.recv(), None);
    assert!(scheduler.wait(Duration::from_secs(10)));
    assert!(!scheduler.is_open());
    assert!(matches!(scheduler.generate(greedy(&[1, 2], 8)), Err(Error::Closed)));
}

#[test]
fn a_receiver_that_does_not_read_stalls_nobody() {
    let tokenizer = Arc::new(toy::tokenizer());
    // One place, and pages for hardly more than one sequence.
    let toy = Toy::new(&tokenizer, 4, 30);
    let scheduler = start(toy.clone(), &tokenizer, options! { sequences_max: 1, events_max: 4 });
    let mut slow: Vec<_> = (0..3).map(|i| scheduler.generate(greedy(&[7, i], 90)).unwrap()).collect();
    for i in 0..10 {
        let request = greedy(&[i, 5], 90);
        let (answer, _) = collect(scheduler.generate(request.clone()).unwrap());
        assert_eq!(answer, alone(&toy, &tokenizer, request));
    }
    // They are still served once they read.
    let last = slow.pop().unwrap();
    assert_eq!(collect(last).0, alone(&toy, &tokenizer, greedy(&[7, 2], 90)));
    drop(slow);
    drained(&scheduler);
    assert_eq!(scheduler.state().counters.requests_cancelled, 2);
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 8);
    let controls = Arc::clone(&toy.controls);
    controls.delay_us.store(2000, Ordering::Relaxed);
    let scheduler = start(toy, &tokenizer, options! { sequences_max: 1, queue_max: 2 });
    let refused = |request: GenerationRequest| scheduler.generate(request).unwrap_err();
    assert!(matches!(refused(greedy(&[], 1)), Error::Invalid { .. }));
    assert!(matches!(refused(greedy(&[9999], 1)), Error::Invalid { .. }));
    assert!(matches!(refused(greedy(&[1], 0)), Error::Invalid { .. }));
    assert!(matches!(refused(greedy(&[1; 10], 23)), Error::TooLong { prompt: 10, answer: 23, limit: 32 }));
    assert!(matches!(refused(greedy(&[1; 33], 1)), Error::TooLong { .. }));
    let stops = |stop: Vec<String>| GenerationRequest { stop, ..greedy(&[1], 1) };
    assert!(matches!(refused(stops(vec![String::new()])), Error::Invalid { .. }));
    assert!(matches!(refused(stops(vec!["x".into(); 17])), Error::Limit { .. }));
    let mut request = greedy(&[1], 1);
    request.sampler.logit_bias.insert(9999, 1.0);
    assert!(matches!(refused(request), Error::Invalid { .. }));
    let full = GenerationRequest { max_tokens: None, ..greedy(&[1; 10], 1) };
    let mut running = scheduler.generate(full).unwrap();
    running.recv().unwrap();
    // One is parked as the next, two wait.
    let mut waiting = Vec::new();
    let error = loop {
        match scheduler.generate(greedy(&[1], 8)) {
            Ok(events) => waiting.push(events),
            Err(error) => break error,
        }
        assert!(waiting.len() < 20);
    };
    assert!(matches!(error, Error::Busy { waiting: 2, limit: 2 }), "{error}");
    assert_eq!(scheduler.state().counters.requests_refused, 1);
    let (answer, done) = collect(running);
    assert_eq!((answer.reason, done.usage.generated_tokens), (FinishReason::Length, 22));
    waiting.into_iter().for_each(|events| assert_eq!(collect(events).0.tokens.len(), 8));
    scheduler.close();
    assert!(matches!(scheduler.generate(greedy(&[1], 1)), Err(Error::Closed)));
    drained(&scheduler);
}

#[test]
fn dropping_the_scheduler_cancels_what_is_left() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 256);
    toy.controls.delay_us.store(1000, Ordering::Relaxed);
    let scheduler = start(toy, &tokenizer, options! { sequences_max: 1 });
    let mut running = scheduler.generate(greedy(&[1], 1000)).unwrap();
    running.recv().unwrap();
    let waiting = scheduler.generate(greedy(&[1], 1000)).unwrap();
    drop(scheduler);
    assert_eq!(collect(running).0.reason, FinishReason::Cancelled);
    assert_eq!(collect(waiting).0.reason, FinishReason::Cancelled);
}

#[test]
fn long_prompts_do_not_hold_up_running_sequences() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy { rows_max: 16, ..Toy::new(&tokenizer, 4, 512) };
    let controls: Arc<Controls> = Arc::clone(&toy.controls);
    controls.delay_us.store(200, Ordering::Relaxed);
    let scheduler = start(toy, &tokenizer, options! { prefill_rows_max: 5 });
    let mut running = scheduler.generate(greedy(&[1, 2], 400)).unwrap();
    running.recv().unwrap();
    controls.rows_seen.store(0, Ordering::Relaxed);
    let mut long = scheduler.generate(greedy(&vec![3; 300], 1)).unwrap();
    long.recv().unwrap();
    assert_eq!(controls.rows_seen.load(Ordering::Relaxed), 6, "one running row and five of the prompt");
    assert_eq!(collect(running).0.tokens.len(), 399);
}

#[test]
fn answers_keep_to_their_grammar_and_tell_probabilities() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy::new(&tokenizer, 4, 256);
    let scheduler = start(toy, &tokenizer, options! { draft_len_max: 4 });
    let request = GenerationRequest {
        prompt: vec![4, 5],
        constraint: Some(Grammar::from_regex("(ab|cd){3}x?").unwrap()),
        logprobs: Some(2),
        sampler: SamplerOptions::greedy(),
        ..GenerationRequest::default()
    };
    let (answer, _) = collect(scheduler.generate(request).unwrap());
    assert_eq!(answer.reason, FinishReason::Stop);
    assert!([6, 7].contains(&answer.text.len()), "{:?}", answer.text);
    assert!(answer.text.as_bytes()[..6].chunks(2).all(|pair| pair == b"ab" || pair == b"cd"));
    for token in &answer.tokens {
        assert_eq!(token.top.len(), 2);
        assert!(token.log_probability.unwrap() <= token.top[0].log_probability);
        assert!(token.top[0].log_probability <= 0.0);
    }
    assert!(log_probability(&[0.0, 0.0], 0).is_ok());
}

#[test]
fn prompts_are_told_with_their_probabilities() {
    let tokenizer = Arc::new(toy::tokenizer());
    let toy = Toy { wanted_rows_max: 3, ..Toy::new(&tokenizer, 4, 24) };
    let scheduler = start(toy.clone(), &tokenizer, options());
    let (plain, _) = collect(scheduler.generate(greedy(&[5, 6], 30)).unwrap());
    let mut prompt = vec![5, 6];
    prompt.extend(plain.tokens.iter().map(|t| t.id));
    let others: Vec<_> = (0..3).map(|i| scheduler.generate(greedy(&[i], 40)).unwrap()).collect();
    let request = GenerationRequest { prompt_logprobs: Some(2), logprobs: Some(2), ..greedy(&prompt, 3) };
    let mut events: Vec<Event> = scheduler.generate(request).unwrap().collect();
    others.into_iter().for_each(|events| assert_eq!(collect(events).0.tokens.len(), 40));
    let Event::Prompt(told) = events.remove(0) else { panic!("{:?}", events[0]) };
    assert_eq!(told.iter().map(|t| t.id).collect::<Vec<_>>(), prompt);
    assert_eq!((told[0].log_probability, told[0].top.len()), (None, 0));
    for token in &told[1..] {
        assert_eq!(token.top.len(), 2);
        assert!(token.log_probability.unwrap() <= token.top[0].log_probability);
    }
    // What was chosen greedily is the likeliest in its place.
    for token in &told[2..] {
        assert_eq!(
            (token.id, token.log_probability),
            (token.top[0].token, Some(token.top[0].log_probability))
        );
    }
    let Event::Done(done) = events.last().unwrap() else { panic!("{events:?}") };
    assert_eq!(done.usage.cached_tokens, 0, "logits of all of the prompt are wanted");
    drained(&scheduler);
}

#[test]
fn the_end_of_a_grammar_ends_an_answer_that_ignores_ends() {
    let tokenizer = Arc::new(toy::tokenizer());
    let scheduler = start(Toy::new(&tokenizer, 4, 64), &tokenizer, options());
    let constraint = Some(Grammar::from_regex("(ab){2}").unwrap());
    let (answer, _) =
        collect(scheduler.generate(GenerationRequest { constraint, ..greedy(&[4], 30) }).unwrap());
    assert_eq!((answer.text.as_str(), answer.reason), ("abab", FinishReason::Stop));
}

#[test]
fn embeddings_have_length_one_and_do_not_depend_on_company() {
    let tokenizer = Arc::new(toy::tokenizer());
    let embedding = |events: Events| {
        let events: Vec<Event> = events.collect();
        let [Event::Embedding(values), Event::Done(done)] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!(done.reason, FinishReason::Stop);
        values.clone()
    };
    let scheduler = start(Toy::new(&tokenizer, 4, 24), &tokenizer, options());
    let texts: Vec<Vec<u32>> = (0..5u32).map(|i| (0..40 + i).map(|t| (t * t + i) % 90).collect()).collect();
    let answers: Vec<_> = (0..3).map(|i| scheduler.generate(greedy(&[i, 8], 60)).unwrap()).collect();
    let together: Vec<_> = texts.iter().map(|t| scheduler.embed(t.clone()).unwrap()).collect();
    let together: Vec<_> = together.into_iter().map(embedding).collect();
    answers.into_iter().for_each(|events| assert_eq!(collect(events).0.tokens.len(), 60));
    for (text, values) in texts.iter().zip(&together) {
        let scheduler = start(Toy::new(&tokenizer, 4, 64), &tokenizer, options());
        let own = embedding(scheduler.embed(text.clone()).unwrap());
        assert_eq!(own, *values);
        assert!((own.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
    }
    drained(&scheduler);
    assert!(scheduler.state().counters.embedded_tokens >= 210);
}
