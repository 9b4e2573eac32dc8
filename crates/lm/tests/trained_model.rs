//! A trained language model that is always here (`data/README.md`): its text, at any residency and in any steps.

mod greedy;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use greedy::{bits, greedy};
use lightering_engine::ExpertOptions;
use lightering_formats::gguf::GgufFile;
use lightering_lm::{Conversion, ConversionOptions, LanguageModel, Tokenizer};
use lightering_tier::{ByteSource, FileSource};
use lightering_units::Bytes;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/moe-tiny-q4_0.gguf")
}

fn model(source: Arc<dyn ByteSource>, budget: Option<Bytes>, threads: usize, rows: usize) -> LanguageModel {
    greedy::model(source, 128, budget, threads, rows, &ExpertOptions::default())
}

fn file() -> Arc<dyn ByteSource> {
    Arc::new(FileSource::open(&path()).unwrap())
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&GgufFile::read(&*file()).unwrap().metadata).unwrap()
}

/// Prompts, and how the model goes on: recorded from this program.
const RECORDED: [(&str, &str); 3] = [
    (
        "First Citizen:\n",
        "It is the son, and my lord,\nAnd I have been absentleman,\nAnd here I have been absentlem",
    ),
    (
        "Question: A shop sells pens for $2 each. How much do 5 pens cost?\nAnswer:",
        " The total cost of the pair of pairs of pairs of pairs of pairs of pairs of pairs of pairs of pairs of",
    ),
    (
        "fn main() {\n    let mut ",
        "ig = StandardBuilder::new();\n        let mut printer = StandardBuilder::new()\n            .build()\n            .build()\n            .",
    ),
];

#[test]
fn its_text_is_the_recorded_one() {
    let tokenizer = tokenizer();
    let mut model = model(file(), None, 2, 32);
    let texts = RECORDED.map(|(prompt, _)| {
        let ids = tokenizer.encode(prompt, true, false).unwrap();
        tokenizer.decode(&greedy(&mut model, &ids, 40).tokens).unwrap()
    });
    assert_eq!(texts, RECORDED.map(|(_, text)| text));
}

#[test]
fn budgets_threads_and_steps_leave_every_bit_as_it_is() {
    let tokenizer = tokenizer();
    let mut resident = model(file(), None, 1, 8);
    let peak = resident.plan().predicted_peak;
    let mut others =
        vec![("two threads", model(file(), None, 2, 8)), ("single rows", model(file(), None, 1, 1))];
    let mut streamed = 0;
    for (what, percent) in [("nine tenths", 90), ("three quarters", 75), ("six tenths", 60)] {
        let budget = Bytes(peak.0 * percent / 100);
        let limited = model(file(), Some(budget), 2, 8);
        assert!(limited.plan().predicted_peak <= budget, "{what}");
        streamed += usize::from(limited.session().experts().is_some());
        others.push((what, limited));
    }
    assert!(streamed > 0, "no budget was tight enough to leave experts on the disk");
    for (prompt, _) in RECORDED {
        let ids = tokenizer.encode(prompt, true, false).unwrap();
        let text = |model: &mut LanguageModel| {
            let text = greedy(model, &ids, 24);
            (text.tokens, bits(&text.first), bits(&text.last))
        };
        let expected = text(&mut resident);
        for (what, model) in &mut others {
            assert!(text(model) == expected, "{what}, after {prompt:?}");
        }
    }
}

#[test]
fn converted_to_a_wider_format_it_says_the_same() {
    let mut conversion = Conversion::of_gguf(file()).unwrap();
    conversion.set_recipe("F32".parse().unwrap());
    let (bytes, report) = conversion.write(Vec::new(), ConversionOptions::default(), &mut |_| ()).unwrap();
    let widened = report.formats.iter().find(|f| f.from != f.to).unwrap();
    assert_eq!(widened.mean_squared_error, 0.0, "what 4 bits say fits into 32");
    // Rounding it again finds the codes that it came from.
    let mut back = Conversion::of_gguf(Arc::new(bytes)).unwrap();
    back.set_recipe("Q4_0".parse().unwrap());
    let (_, report) = back.write(Vec::new(), ConversionOptions::default(), &mut |_| ()).unwrap();
    let narrowed = report.formats.iter().find(|f| f.from != f.to).unwrap();
    assert!(narrowed.relative_error.unwrap() < 1e-3, "{narrowed:?}");
}
