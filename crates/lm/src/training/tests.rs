use std::sync::Arc;

use lightering_engine::{Evaluator, ExpertOptions, PlanOptions, RuntimeValue, interpret};
use lightering_graph::{CacheFormat, DType, Tensor, TensorType, UpdateRule};
use lightering_kernels::ThreadPool;
use lightering_meter::{MachineProfile, MemoryPool};
use lightering_tier::ByteSource;
use lightering_train::{Dataset, LABEL, Loss, Random, StepOptions, Trainer, build_step};
use lightering_units::BlockFormat;

use super::*;
use crate::{
    CacheOptions, Decoder, DecoderOptions, SoleSequence, SyntheticOptions, TokenModel, Tokenizer,
    write_synthetic,
};

const TIME: usize = 12;

fn toy(like: &str, format: BlockFormat) -> Arc<dyn ByteSource> {
    let mut bytes = Vec::new();
    let options = SyntheticOptions {
        tiny: true,
        layers: Some(2),
        vocabulary: Some(300),
        format,
        ..SyntheticOptions::like(like)
    };
    write_synthetic(&options, &mut bytes).unwrap();
    Arc::new(bytes)
}

fn tokens() -> Vec<i64> {
    (0..TIME as i64).map(|i| (i * i * 7 + 3) % 256).collect()
}

/// Logits of the engine that answers, one row after the other.
fn answered(source: &Arc<dyn ByteSource>) -> Vec<f32> {
    let file = lightering_formats::gguf::GgufFile::read(&**source).unwrap();
    let cache =
        CacheOptions { format: CacheFormat::F32, page_len: 16, pages: 1, window_pages: 0, context: TIME };
    let options = DecoderOptions { cache, rows: TIME, wanted: TIME };
    let decoder = Decoder::new(&file, source.clone(), options).unwrap();
    let plan = PlanOptions::new(MachineProfile::conservative(), 1);
    let mut model = decoder.start(&plan, &ExpertOptions::default(), false).unwrap();
    let sequence = SoleSequence::of(&model);
    let rows: Vec<_> = tokens().iter().enumerate().map(|(i, &t)| sequence.row(t as u32, i, true)).collect();
    let mut logits = vec![0.0; TIME * model.vocabulary_len()];
    let n = model.vocabulary_len();
    model.step(&rows, &mut |row, values| logits[row * n..][..n].copy_from_slice(values)).unwrap();
    logits
}

/// Logits of the graph that learns.
fn trained(source: &Arc<dyn ByteSource>, method: &Method) -> crate::Result<Vec<f32>> {
    let made = TrainingModel::open(source.clone())?.graph(1, TIME, method, 3)?;
    let given = [(made.graph.inputs[0], RuntimeValue::Tensor(Tensor::from_slice(&[1, TIME], &tokens())))];
    let pool = MemoryPool::unbounded();
    let result = interpret(&made.graph, &given, &made.sources, &pool, &ThreadPool::new(1)).unwrap();
    Ok(result[0].tensor().unwrap().as_slice::<f32>().to_vec())
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let size = a.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / size
}

#[test]
fn logits_are_those_of_inference() {
    let mut compared = Vec::new();
    for name in crate::synthetic_names() {
        let source = toy(name, BlockFormat::F32);
        match trained(&source, &Method::Full) {
            Ok(logits) => {
                let error = difference(&answered(&source), &logits);
                assert!(error < 1e-3, "{name}: {error}");
                compared.push(name);
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("not supported"), "{name}: {error}");
            }
        }
    }
    for family in
        ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-270m", "gpt2", "phi-3-mini", "mixtral-8x7b"]
    {
        assert!(compared.contains(&family), "{family} is not among {compared:?}");
    }
}

#[test]
fn frozen_blocks_compute_what_inference_does() {
    let name = "qwen2.5-0.5b";
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0] {
        let source = toy(name, format);
        let method: Method = "lora:rank=2".parse().unwrap();
        // B is zero in the beginning.
        assert!(difference(&answered(&source), &trained(&source, &method).unwrap()) < 1e-3);
    }
}

fn rule() -> UpdateRule {
    UpdateRule::Adam { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0, decoupled: true }
}

fn trainer(model: &TrainingModel, made: &TrainingGraph, batch: usize) -> Trainer {
    let label = TensorType::fixed(DType::I64, &[batch, TIME]);
    let options = StepOptions {
        decay_matrices_only: true,
        clip: Some(1.0),
        scheme: Some(made.scheme.clone()),
        ..StepOptions::new("crossentropy".parse::<Loss>().unwrap(), rule())
    };
    let evaluator = Evaluator::new(MemoryPool::unbounded(), made.sources.clone());
    let step = build_step(&made.graph, &label, &evaluator, &options).unwrap();
    assert_eq!(step.parameters.len(), made.scheme.len(), "{}", model.parameters().architecture);
    let plan = PlanOptions::new(MachineProfile::conservative(), 1);
    Trainer::new(step, made.sources.clone(), &plan, rule(), false).unwrap()
}

fn batch(batch: usize) -> [Tensor; 2] {
    let all: Vec<i64> = (0..batch * (TIME + 1)).map(|i| (i as i64 * 5) % 23 + 60).collect();
    let rows = |shift: usize| -> Vec<i64> {
        all.chunks(TIME + 1).flat_map(|row| row[shift..shift + TIME].to_vec()).collect()
    };
    [0, 1].map(|shift| Tensor::from_slice(&[batch, TIME], &rows(shift)))
}

fn steps(trainer: &mut Trainer, count: usize, rate: f32) -> Vec<f32> {
    let [tokens, labels] = batch(2);
    let given = [("tokens", &tokens), (LABEL, &labels)];
    (0..count).map(|_| trainer.step(given.into_iter(), rate, |_| ()).unwrap().loss).collect()
}

#[test]
fn every_method_learns_and_its_file_answers_as_the_graph_did() {
    let folder = tempfile::tempdir().unwrap();
    let name = "qwen3-0.6b";
    let source = toy(name, BlockFormat::F32);
    for method in ["full", "last:1", "lora:rank=4,alpha=8", "lora:rank=2,matrices=attention,layers=1"] {
        let method: Method = method.parse().unwrap();
        let model = TrainingModel::open(source.clone()).unwrap();
        let made = model.graph(2, TIME, &method, 1).unwrap();
        let mut trainer = trainer(&model, &made, 2);
        let losses = steps(&mut trainer, 30, 1e-2);
        assert!(losses[29] < 0.7 * losses[0], "{method}: {losses:?}");
        // A trained model's file, and the graph with what was learned, agree.
        let path = folder.path().join("trained.gguf");
        write_gguf(&model, &made, &trainer, None, &path).unwrap();
        let written: Arc<dyn ByteSource> = Arc::new(std::fs::read(&path).unwrap());
        let [mut one, mut labels] = batch(2);
        for (t, &token) in one.as_mut_slice::<i64>().iter_mut().zip(&tokens()) {
            *t = token;
        }
        labels.as_mut_slice::<i64>().fill(1);
        let mut logits = Vec::new();
        let given = [("tokens", &one), (LABEL, &labels)];
        trainer.evaluate(given.into_iter(), |p| logits = p.data[..p.data.len() / 2].to_vec()).unwrap();
        let error = difference(&answered(&written), &logits);
        assert!(error < 2e-3, "{method}: {error}");
        if let Method::Lora(_) = method {
            let path = folder.path().join("adapter.safetensors");
            write_adapter(&made, &trainer, &path).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let file = lightering_formats::safetensors::SafetensorsFile::read(&bytes).unwrap();
            assert_eq!(file.tensors.len(), 2 * made.adapters.len());
        }
    }
}

#[test]
fn a_new_model_learns_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let text = "the cat sat on the mat. the dog sat on the log. ".repeat(40);
    for (shape, format) in [
        ("lm:llama:layers=2,width=64,heads=4,kv_heads=2,tied=no", None),
        ("lm:moe:layers=2,width=64,heads=4,experts=4", Some(BlockFormat::Q8_0)),
    ] {
        let vocabulary = train_byte_pairs(&text, 280).unwrap();
        let model = shape.parse::<NewModel>().unwrap().describe(&vocabulary, 64).unwrap();
        let made = model.graph(2, TIME, &Method::Full, 1).unwrap();
        let mut trainer = trainer(&model, &made, 2);
        let losses = steps(&mut trainer, 40, 1e-2);
        assert!(losses[0] > 4.0 && losses[39] < 1.0, "{shape}: {losses:?}");
        let path = folder.path().join("new.gguf");
        let report = write_gguf(&model, &made, &trainer, format, &path).unwrap();
        assert_eq!(report.changed, model.file().tensors.len());
        let written: Arc<dyn ByteSource> = Arc::new(std::fs::read(&path).unwrap());
        let file = lightering_formats::gguf::GgufFile::read(&*written).unwrap();
        let tokenizer = Tokenizer::from_gguf(&file.metadata).unwrap();
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false, false).unwrap()).unwrap(), text);
        let [mut one, labels] = batch(2);
        for (t, &token) in one.as_mut_slice::<i64>().iter_mut().zip(&tokens()) {
            *t = token;
        }
        let mut logits = Vec::new();
        let given = [("tokens", &one), (LABEL, &labels)];
        trainer.evaluate(given.into_iter(), |p| logits = p.data[..p.data.len() / 2].to_vec()).unwrap();
        // Weights of 16 or 8 bits; a router may choose otherwise where two experts are nearly as good.
        let answer = answered(&written);
        let rows = answer.chunks(answer.len() / TIME).zip(logits.chunks(logits.len() / TIME));
        let close = rows.filter(|(a, b)| difference(a, b) < 0.05).count();
        assert!(close + 2 >= TIME, "{shape}: {close} rows of {TIME}");
    }
}

#[test]
fn a_resumed_training_goes_on_with_the_same_losses() {
    let folder = tempfile::tempdir().unwrap();
    let name = "qwen2.5-0.5b";
    let source = toy(name, BlockFormat::Q8_0);
    let method: Method = "lora:rank=2".parse().unwrap();
    let model = TrainingModel::open(source).unwrap();
    let made = model.graph(2, TIME, &method, 1).unwrap();
    let mut first = trainer(&model, &made, 2);
    steps(&mut first, 3, 1e-2);
    let checkpoints = lightering_train::Checkpoints::new(folder.path(), 1).unwrap();
    let state = lightering_train::TrainState { step: 3, ..Default::default() };
    first.save(&checkpoints, &state).unwrap();
    let expected = steps(&mut first, 3, 1e-2);
    let mut second = trainer(&model, &made, 2);
    second.restore(&checkpoints.latest_good().unwrap().unwrap().checkpoint).unwrap();
    assert_eq!(steps(&mut second, 3, 1e-2), expected);
}

#[test]
fn the_router_is_evened_out() {
    let text = "abc abd abe bcd bce bcf ".repeat(30);
    let vocabulary = train_byte_pairs(&text, 258).unwrap();
    // How uneven the router is after some steps, by the loss without the other term.
    let evenness = |balance: f32| {
        let shape = format!("lm:moe:layers=1,width=32,heads=2,experts=4,used=1,balance={balance},z=0");
        let model = shape.parse::<NewModel>().unwrap().describe(&vocabulary, 64).unwrap();
        let made = model.graph(2, TIME, &Method::Full, 1).unwrap();
        let mut trainer = trainer(&model, &made, 2);
        steps(&mut trainer, 60, 1e-2);
        let [tokens, labels] = batch(2);
        let given = [("tokens", &tokens), (LABEL, &labels)];
        let plain = trainer.evaluate(given.into_iter(), |_| ()).unwrap().loss;
        let both = trainer.step(given.into_iter(), 0.0, |_| ()).unwrap().loss;
        (both - plain) / balance
    };
    // 1 when all experts are used alike, 4 when one is used alone.
    let (weak, strong) = (evenness(1e-6 * 1e4), evenness(1.0));
    assert!((0.9..1.15).contains(&strong), "{strong}");
    assert!(strong < weak + 0.05, "{strong} with the loss, {weak} with hardly any");
}

#[test]
fn vocabularies_of_texts() {
    let text = "low lower lowest newer newest wider widest low low new new";
    let data = train_byte_pairs(text, 270).unwrap();
    assert_eq!(data, train_byte_pairs(text, 270).unwrap());
    assert!(data.tokens.len() <= 270 && data.merges[0] == "l o", "{:?}", data.merges);
    let tokenizer = Tokenizer::new(data).unwrap();
    let ids = tokenizer.encode("lowest é\u{1f600}", false, false).unwrap();
    assert!(ids.len() < "lowest é\u{1f600}".len());
    assert_eq!(tokenizer.decode(&ids).unwrap(), "lowest é\u{1f600}");
    assert!(train_byte_pairs("abcdefg", 300).unwrap_err().to_string().contains("repeats"));
    assert!(train_byte_pairs(text, 100).unwrap_err().to_string().contains("258"));
}

#[test]
fn windows_of_texts() {
    let [train, held] = TokenText::split((0..100).collect(), 8, 0.2, 100).unwrap();
    assert_eq!((train.len(), held.len()), (9, 2));
    let read = |set: &TokenText, index: usize, seed: u64| {
        let (mut tokens, mut label) = (vec![0i64; 8], vec![0i64; 8]);
        let mut targets = [bytemuck::cast_slice_mut(&mut tokens), bytemuck::cast_slice_mut(&mut label)];
        set.read(index, &mut Random::new(seed), &mut targets).unwrap();
        (tokens, label)
    };
    assert_eq!(read(&held, 1, 0), ((88..96).collect(), (89..97).collect()));
    for seed in 0..50 {
        let (tokens, label) = read(&train, 8, seed);
        assert!(tokens[1..] == label[..7] && label[7] < 80 && tokens[0] >= 64);
    }
    let short = TokenText::split((0..17).collect(), 8, 0.1, 100).err().unwrap().to_string();
    assert!(short.contains("17 tokens"), "{short}");
    assert!(TokenText::split((0..100).collect(), 8, 1.5, 100).is_err());
}

#[test]
fn slips_are_explained() {
    for (text, part) in [
        ("lorra", "full, lora or last"),
        ("last:0", "last:K"),
        ("last", "last:K"),
        ("lora:rank=0", "rank"),
        ("lora:rank=x", "whole number"),
        ("lora:alpha=-1", "alpha"),
        ("lora:matrices=none", "attention"),
        ("lora:dropout=1", "rank, alpha"),
    ] {
        let error = text.parse::<Method>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    for text in ["full", "last:3", "lora:rank=4,alpha=8,matrices=ffn,layers=2"] {
        assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
    }
    for (text, part) in [
        ("lm:gpt", "llama or moe"),
        ("lm:llama:experts=3", "layers, width"),
        ("lm:llama:width=30,heads=4", "divide"),
        ("lm:moe:experts=2,used=3", "at most"),
        ("lm:llama:layers=0", "from 1"),
        ("llama", "lm:llama"),
    ] {
        let error = text.parse::<NewModel>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let name = "qwen2.5-0.5b";
    let model = TrainingModel::open(toy(name, BlockFormat::F32)).unwrap();
    let error =
        |time, method: &str| model.graph(1, time, &method.parse().unwrap(), 0).err().unwrap().to_string();
    assert!(error(1 << 24, "full").contains("context"));
    assert!(error(TIME, "last:9").contains("at most the 2"));
}
