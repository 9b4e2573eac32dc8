//! Every family of decoders at the size of a toy: builds, runs, gives the same bits however it is fed and whatever
//! memory it has, and answers damaged files with errors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightering_engine::{EngineError, ExpertOptions, PlanOptions};
use lightering_formats::gguf::{GgufFile, Value};
use lightering_graph::CacheFormat;
use lightering_lm::{
    CacheOptions, Decoder, DecoderOptions, LanguageModel, PageKind, Row, SoleSequence, SyntheticOptions,
    TokenModel, synthetic_names, write_synthetic,
};
use lightering_meter::MachineProfile;
use lightering_tier::ByteSource;
use lightering_units::{BlockFormat, Bytes};

/// More than the window of the smallest models.
const LEN: usize = 40;
const CONTEXT: usize = 64;
const PAGE: usize = 16;

fn file_of(name: &str, format: BlockFormat) -> Vec<u8> {
    let mut options = SyntheticOptions::like(name);
    options.tiny = true;
    options.format = format;
    let mut file = Vec::new();
    write_synthetic(&options, &mut file).unwrap();
    file
}

/// A file in memory that counts what is read of it.
struct Counted(Vec<u8>, AtomicU64);

impl ByteSource for Counted {
    fn len_bytes(&self) -> Bytes {
        self.0.len_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.0.read_at(offset, buffer)
    }

    fn bytes_read(&self) -> Bytes {
        Bytes(self.1.load(Ordering::Relaxed))
    }

    fn name(&self) -> String {
        "a synthetic model".to_owned()
    }
}

fn decoder(file: &[u8]) -> lightering_lm::Result<Decoder> {
    decoder_with_windows(file, None, 0)
}

fn decoder_with_windows(
    file: &[u8],
    window: Option<u32>,
    window_pages: usize,
) -> lightering_lm::Result<Decoder> {
    let source = Arc::new(Counted(file.to_vec(), AtomicU64::new(0)));
    let mut parsed = GgufFile::read(&*source)?;
    if let Some(window) = window {
        let architecture = parsed.metadata.require_str("general.architecture")?.to_owned();
        parsed.metadata.set(&format!("{architecture}.attention.sliding_window"), Value::U32(window));
    }
    let cache = CacheOptions {
        format: CacheFormat::F16,
        page_len: PAGE,
        pages: 2 * CONTEXT / PAGE,
        window_pages,
        context: CONTEXT,
    };
    Decoder::new(&parsed, source, DecoderOptions { cache, rows: 8, wanted: 2 })
}

fn start(decoder: &Decoder, budget: Option<Bytes>) -> Result<LanguageModel, EngineError> {
    let profile = MachineProfile::conservative();
    decoder.start(&PlanOptions { budget, ..PlanOptions::new(profile, 2) }, &ExpertOptions::default(), false)
}

fn tokens(of: u32) -> Vec<u32> {
    (0..LEN as u32).map(|i| (i * (7 + 4 * of) + 31 * of) % 256).collect()
}

fn pages(of: u32) -> Vec<u32> {
    // Neither in order nor side by side.
    (0..(CONTEXT / PAGE) as u32).rev().map(|page| 2 * page + of).collect()
}

/// The bits of the logits after the last token of the first sequence, fed `chunk` tokens at a time, each step with as
/// many of a second sequence if that is wanted; and the bytes that were read from the file meanwhile.
fn last_logits(model: &mut LanguageModel, chunk: usize, beside: bool) -> (Vec<u32>, Bytes) {
    let sequences = if beside { 2 } else { 1 };
    let (tokens, pages) = ([tokens(0), tokens(1)], [pages(0), pages(1)]);
    let (mut last, mut read) = (Vec::new(), 0);
    for from in (0..LEN).step_by(chunk) {
        let mut rows = Vec::new();
        for i in from..(from + chunk).min(LEN) {
            // The other one first, so that rows are not where they are alone.
            for of in (0..sequences).rev() {
                rows.push(Row {
                    token: tokens[of][i],
                    position: i as u32,
                    pages: &pages[of],
                    window_pages: &[],
                    wants_logits: i + 1 == LEN,
                });
            }
        }
        let mine = rows.len() - 1;
        let report = model
            .step(&rows, &mut |row, logits| {
                assert!(logits.iter().all(|x| x.is_finite()));
                if row == mine {
                    last = logits.iter().map(|x| x.to_bits()).collect();
                }
            })
            .unwrap();
        read += report.bytes_read.0;
    }
    (last, Bytes(read))
}

#[test]
fn windows_in_pages_of_their_own_give_the_same_bits_in_less_memory() {
    let mut with_windows = Vec::new();
    for name in synthetic_names() {
        let file = file_of(name, BlockFormat::Q8_0);
        // Of these all layers have one.
        let window = ["phi-3-mini", "mistral-7b"].contains(&name).then_some(24);
        let shared = decoder_with_windows(&file, window, 0).unwrap();
        let Some(len) = shared.parameters().cached_window() else { continue };
        // Where the tokens go far beyond the window, its three pages come round again.
        if len > CONTEXT - 2 * PAGE {
            continue;
        }
        let apart = decoder_with_windows(&file, window, 3).unwrap();
        let mut results = Vec::new();
        for decoder in [&shared, &apart] {
            let mut model = start(decoder, None).unwrap();
            let (sole, mut bits) = (SoleSequence::of(&model), Vec::new());
            for from in (0..CONTEXT).step_by(8) {
                let row = |i: usize| sole.row((i as u32 * 7 + 3) % 256, i, i % 8 == 7);
                let rows: Vec<Row<'_>> = (from..from + 8).map(row).collect();
                model.step(&rows, &mut |_, logits| bits.extend(logits.iter().map(|x| x.to_bits()))).unwrap();
            }
            results.push((bits, model.plan().predicted_peak));
        }
        assert_eq!(results[0].0, results[1].0, "{name}");
        assert!(results[1].1 < results[0].1, "{name}: {} and {}", results[0].1, results[1].1);
        let error = decoder_with_windows(&file, window, 2).err().unwrap().to_string();
        assert!(error.contains("0, or 3"), "{error}");
        with_windows.push(name);
    }
    // Windows in some layers and in all of them.
    for name in ["gemma-3-270m", "phi-3-mini", "mistral-7b"] {
        assert!(with_windows.contains(&name), "{name} is not among {with_windows:?}");
    }
}

#[test]
fn pages_that_are_copied_hold_the_same_bits() {
    for name in ["gemma-3-270m", "llama-3.2-1b", "deepseek-v2-lite"] {
        let decoder = decoder_with_windows(&file_of(name, BlockFormat::Q8_0), None, 4).unwrap();
        let mut model = start(&decoder, None).unwrap();
        fn row<'a>(i: usize, pages: &'a [u32], window_pages: &'a [u32]) -> Row<'a> {
            let (token, position) = ((i as u32 * 11 + 5) % 256, i as u32);
            Row { token, position, pages, window_pages, wants_logits: i == 31 }
        }
        let last = |model: &mut LanguageModel, from: usize, pages: &[u32], window_pages: &[u32]| {
            let mut bits = Vec::new();
            for from in (from..32).step_by(8) {
                let rows: Vec<_> = (from..from + 8).map(|i| row(i, pages, window_pages)).collect();
                let mut keep = |_, l: &mut [f32]| bits.extend(l.iter().map(|x| x.to_bits()));
                model.step(&rows, &mut keep).unwrap();
            }
            bits
        };
        let expected = last(&mut model, 0, &[0, 1], &[0, 1]);
        for (kind, to) in [(PageKind::Shared, 5), (PageKind::Window, 3)] {
            let size = model.page_bytes(kind);
            assert_eq!(size > 0, kind == PageKind::Shared || name.starts_with("gemma"), "{name}");
            assert!(size <= decoder.page_bytes());
            let mut bytes = vec![0; size];
            if size > 0 {
                model.read_page(kind, 0, &mut bytes).unwrap();
                model.write_page(kind, to, &bytes).unwrap();
                assert!(model.read_page(kind, 99, &mut bytes).is_err());
                assert!(model.write_page(kind, 0, &bytes[1..]).is_err());
                // What the first page held is gone.
                model.write_page(kind, 0, &vec![0; size]).unwrap();
            }
        }
        assert_eq!(last(&mut model, 16, &[5, 1], &[3, 1]), expected, "{name}");
    }
}

#[test]
fn bits_depend_neither_on_chunks_nor_on_neighbours() {
    for name in synthetic_names() {
        for format in [BlockFormat::F16, BlockFormat::Q8_0] {
            let decoder = decoder(&file_of(name, format)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut model = start(&decoder, None).unwrap();
            let (expected, _) = last_logits(&mut model, 1, false);
            let different = expected.iter().collect::<std::collections::HashSet<_>>().len();
            assert!(different > expected.len() / 2, "{name}: only {different} different logits");
            for (chunk, beside) in [(7, false), (8, false), (1, true), (4, true)] {
                let (found, _) = last_logits(&mut model, chunk, beside);
                assert!(
                    found == expected,
                    "{name} {format}: other bits in chunks of {chunk}, beside {beside}"
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_budget() {
    for name in synthetic_names() {
        let decoder = decoder(&file_of(name, BlockFormat::Q8_0)).unwrap();
        let mut resident = start(&decoder, None).unwrap();
        let (expected, _) = last_logits(&mut resident, 5, false);
        let peak = resident.plan().predicted_peak;
        for part in [2, 3] {
            let mut budget = Bytes(peak.0 / part);
            let mut started = start(&decoder, Some(budget));
            // At the size of a toy, a third can be less than attention alone takes; then the least that is said to do.
            if let (3, Err(EngineError::Budget { smallest, .. })) = (part, &started) {
                assert!(smallest.0 < peak.0 / 2, "{name}: {smallest} of {peak} are needed");
                budget = *smallest;
                started = start(&decoder, Some(budget));
            }
            let mut model = started.unwrap_or_else(|e| panic!("{name} at {budget} of {peak}: {e}"));
            assert!(model.plan().predicted_peak <= budget, "{name}");
            let (found, read) = last_logits(&mut model, 5, false);
            assert!(read > Bytes::ZERO, "{name} at {budget} of {peak}: nothing was read");
            assert!(found == expected, "{name}: other bits at 1/{part} of {peak}");
        }
    }
}

/// Where `name` stands in the header, with its length in front.
fn place(file: &[u8], name: &str) -> usize {
    let mut needle = (name.len() as u64).to_le_bytes().to_vec();
    needle.extend(name.as_bytes());
    file.windows(needle.len()).position(|w| w == needle).unwrap() + 8
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    for name in synthetic_names() {
        let file = file_of(name, BlockFormat::Q8_0);
        let parsed = GgufFile::read(&file).unwrap();
        let listed = |t: &str| !t.starts_with("blk.") || t.starts_with("blk.1.");
        let mut named = 0;
        for tensor in parsed.tensors.iter().filter(|t| listed(&t.name)) {
            let at = place(&file, &tensor.name);
            let mut without = file.clone();
            without[at] = b'X';
            // Some tensors may be left out: norms that not all models of an architecture have, biases, factors.
            if let Err(error) = decoder(&without) {
                let text = error.to_string();
                let stem = tensor.name.trim_end_matches(".weight");
                // Where one of two forms of attention is missing, the other one is asked for.
                let other = stem.replace("kv_b", "k_b").replace("attn_qkv", "attn_q");
                let other = other.replace("ffn_gate", "ffn_");
                assert!(
                    text.contains(stem) || text.contains(&other),
                    "{name} without {}: {text}",
                    tensor.name
                );
                named += 1;
            }
            let mut misshapen = file.clone();
            let dims = at + tensor.name.len() + 4;
            let last = dims + 8 * (tensor.dims.len() - 1);
            // A shorter tensor still lies within the file.
            let shorter = tensor.dims.last().unwrap() - 1;
            misshapen[last..last + 8].copy_from_slice(&shorter.to_le_bytes());
            match decoder(&misshapen) {
                Ok(_) => {
                    // Any number of rows will do, or this context does not need it.
                    let free = ["token_embd", "position_embd", "rope_factors_long"]
                        .iter()
                        .any(|f| tensor.name.starts_with(f));
                    assert!(free, "{name}: {} with {shorter} rows is taken", tensor.name);
                }
                Err(error) => {
                    let text = error.to_string();
                    let layer = tensor.name.split('.').take(2).collect::<Vec<_>>().join(".");
                    assert!(
                        text.contains(&layer) || text.contains("weight"),
                        "{name} {}: {text}",
                        tensor.name
                    );
                }
            }
        }
        assert!(named >= 6, "{name}: only {named} tensors are needed");
    }
}

#[test]
fn absurd_numbers_are_errors() {
    for name in synthetic_names() {
        let file = file_of(name, BlockFormat::Q8_0);
        let parsed = GgufFile::read(&file).unwrap();
        let mut refused = 0;
        for (key, value) in parsed.metadata.iter().filter(|(key, _)| !key.starts_with("tokenizer")) {
            let at = place(&file, key) + key.len() + 4;
            let absurd: &[[u8; 4]] = match value {
                Value::U32(_) => &[0, 1, 7, 1 << 20, 1 << 31, u32::MAX].map(u32::to_le_bytes),
                Value::F32(_) => &[f32::NAN, f32::INFINITY, -1.0, 0.0].map(f32::to_le_bytes),
                _ => continue,
            };
            for bytes in absurd {
                let mut damaged = file.clone();
                damaged[at..at + 4].copy_from_slice(bytes);
                // Whatever is taken has been checked against the tensors; what is not says where.
                if let Err(error) = decoder(&damaged) {
                    assert!(error.to_string().len() > 20, "{name} {key}: {error}");
                    refused += 1;
                }
            }
        }
        assert!(refused >= 20, "{name}: only {refused} absurd numbers are refused");
    }
}

#[test]
fn sizes_are_kept_and_names_are_told() {
    let mut options = SyntheticOptions::like("qwen3-30b-a3b");
    options.size_max = Some(Bytes(3 << 30));
    options.vocabulary = Some(1000);
    struct Count(u64);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut written = Count(0);
    let model = write_synthetic(&options, &mut written).unwrap();
    assert!(written.0 <= 3 << 30, "{} bytes", written.0);
    assert!(model.layers[0] >= 5 && model.layers[0] < 48, "{:?}", model.layers);
    options.size_max = Some(Bytes(1 << 20));
    let error = write_synthetic(&options, std::io::sink()).unwrap_err().to_string();
    assert!(error.contains("at least"), "{error}");
    let error = write_synthetic(&SyntheticOptions::like("no such"), std::io::sink()).unwrap_err().to_string();
    assert!(error.contains("mixtral-8x7b"), "{error}");
}
