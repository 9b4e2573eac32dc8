use lightering_engine::{Evaluator, PlanOptions};
use lightering_graph::{BinaryOp, MatMulAttributes, Tensor, UnaryOp};
use lightering_kernels::ThreadPool;
use lightering_meter::{MachineProfile, MemoryPool};
use lightering_units::Bytes;

use super::*;
use crate::{Random, StateReader};

const CLASSES: usize = 10;
const WIDTH: usize = 48;

fn weights(random: &mut Random, dims: &[usize], scale: f64) -> Tensor {
    let n = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (random.normal() * scale) as f32).collect();
    Tensor::from_slice(dims, &values)
}

/// Tokens `[4, 6]` to logits: an embedding that is tied to the last layer when `tied`, layers of `hidden`, and an operator
/// without a derivative (rounding) beside the way.
fn model(seed: u64, tied: bool, layers: usize, hidden: usize) -> Graph {
    let mut r = Random::new(seed);
    let mut g = Graph::new("model");
    let x = g.add_input("tokens", TensorType::fixed(DType::I64, &[4, 6]));
    let table = g.add_constant("table", weights(&mut r, &[CLASSES, WIDTH], 0.5));
    let mut h = g.add_node("rows", Op::Gather { axis: 0 }, &[table, x], 1)[0];
    let matmul = || Op::MatMul(MatMulAttributes::default());
    let add = || Op::Binary(BinaryOp::Add);
    let scale = if hidden < 100 { 0.1 } else { 0.01 };
    for i in 0..layers {
        let up = g.add_constant(format!("up{i}"), weights(&mut r, &[WIDTH, hidden], scale));
        let bias = g.add_constant(format!("bias{i}"), weights(&mut r, &[hidden], scale));
        let down = g.add_constant(format!("down{i}"), weights(&mut r, &[hidden, WIDTH], scale));
        let a = g.add_node(format!("up{i}/node"), matmul(), &[h, up], 1)[0];
        let a = g.add_node(format!("bias{i}/node"), add(), &[a, bias], 1)[0];
        let a = g.add_node(format!("relu{i}"), Op::Unary(UnaryOp::Relu), &[a], 1)[0];
        let a = g.add_node(format!("down{i}/node"), matmul(), &[a, down], 1)[0];
        let rounded = g.add_node(format!("round{i}"), Op::Unary(UnaryOp::Round), &[h], 1)[0];
        let kept = g.add_node(format!("keep{i}"), add(), &[h, rounded], 1)[0];
        h = g.add_node(format!("add{i}"), add(), &[a, kept], 1)[0];
    }
    let head = match tied {
        true => table,
        false => g.add_constant("head", weights(&mut r, &[CLASSES, WIDTH], 0.5)),
    };
    let head = g.add_node("turn", Op::Transpose { perm: Some(vec![1, 0]) }, &[head], 1)[0];
    let logits = g.add_node("logits", matmul(), &[h, head], 1)[0];
    g.outputs.push(logits);
    g.infer().unwrap();
    g.verify().unwrap();
    g
}

fn step_of(g: &Graph, settings: ZoSettings) -> ZoStep {
    let label = TensorType::fixed(DType::I64, &[4, 6]);
    let loss = Loss::CrossEntropy { smoothing: 0.0, ignore: None };
    let evaluator = Evaluator::new(MemoryPool::unbounded(), Vec::new());
    build_zo_step(g, &label, loss, settings, &evaluator).unwrap()
}

fn options(threads: usize) -> PlanOptions {
    PlanOptions::new(MachineProfile::conservative(), threads)
}

fn trainer(step: &ZoStep, options: &PlanOptions, seed: u64) -> ZoTrainer {
    ZoTrainer::new(step, Vec::new(), options, seed, false).unwrap()
}

type Batch = Vec<(String, Tensor)>;

fn batch(seed: u64) -> Batch {
    let mut r = Random::new(seed);
    let tokens: Vec<i64> = (0..24).map(|_| r.below(CLASSES) as i64).collect();
    let labels: Vec<i64> = tokens.iter().map(|t| (t + 3) % CLASSES as i64).collect();
    let tensor = |values: &[i64]| Tensor::from_slice(&[4, 6], values);
    vec![("tokens".to_owned(), tensor(&tokens)), (LABEL.to_owned(), tensor(&labels))]
}

fn step_with(trainer: &mut ZoTrainer, batch: &Batch, rate: f32) -> ZoReport {
    trainer.step(batch.iter().map(|(n, t)| (n.as_str(), t)), rate, &mut |_| {}).unwrap()
}

fn step(trainer: &mut ZoTrainer, seed: u64, rate: f32) -> ZoReport {
    step_with(trainer, &batch(seed), rate)
}

fn loss_of(trainer: &mut ZoTrainer, batch: &Batch) -> f32 {
    trainer.evaluate(batch.iter().map(|(n, t)| (n.as_str(), t)), &mut |_| {}).unwrap()
}

fn loss(trainer: &mut ZoTrainer) -> f32 {
    loss_of(trainer, &batch(500))
}

fn states(trainer: &ZoTrainer) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (name, _) in StateReader::states(trainer) {
        let mut bytes = Vec::new();
        trainer.read(&name, &mut |piece| bytes.extend_from_slice(piece)).unwrap();
        all.push((name, bytes));
    }
    all.sort();
    all
}

/// Every loss, every projected gradient, and the weights after `steps` steps.
fn course(
    trainer: &mut ZoTrainer,
    steps: u64,
    rate: f32,
    batch: &dyn Fn(u64) -> Batch,
) -> (Vec<[u32; 3]>, Vec<(String, Vec<u8>)>) {
    let mut seen = Vec::new();
    for i in 0..steps {
        let report = step_with(trainer, &batch(i), rate);
        let g = report.step.gradient.unwrap();
        seen.push([report.losses[0], report.losses[1], g].map(f32::to_bits));
        if i == steps / 2 {
            let loss = loss_of(trainer, &batch(500));
            seen.push([loss.to_bits(), 0, 0]);
        }
    }
    trainer.flush().unwrap();
    (seen, states(trainer))
}

#[test]
fn one_visit_per_step_has_the_bits_of_plain_mezo() {
    let models = [(1, false, 2, 96), (2, true, 2, 96), (3, true, 1, 33), (4, false, 3, 7)];
    for (seed, tied, layers, hidden) in models {
        let g = model(seed, tied, layers, hidden);
        let settings = ZoSettings { decay: 0.01, ..ZoSettings::default() };
        let plain = step_of(&g, ZoSettings { plain: true, ..settings });
        let expected = course(&mut trainer(&plain, &options(1), 7), 12, 1e-4, &batch);
        let found = course(&mut trainer(&step_of(&g, settings), &options(2), 7), 12, 1e-4, &batch);
        assert_eq!(found.0, expected.0, "model {seed}");
        assert_eq!(found.1.len(), 1 + layers * 3 + usize::from(!tied));
        assert!(found.1 == expected.1, "model {seed}");
    }
}

/// What is too large for `budget` waits in `folder`.
fn streamed(budget: u64, folder: &tempfile::TempDir) -> PlanOptions {
    PlanOptions {
        budget: Some(Bytes(budget)),
        spill: Some(folder.path().to_owned()),
        direct_reads: true,
        ..options(2)
    }
}

/// Steps of `g` with its blocks in memory one after the other have the bits of plain MeZO, and each streamed byte is read
/// once and written once per step; returns the bytes of the streamed parameters and the plan's peak.
fn streams(
    g: &Graph,
    dual: &ZoStep,
    plain: &ZoStep,
    budget: u64,
    batch: &dyn Fn(u64) -> Batch,
) -> (u64, u64) {
    let expected = course(&mut trainer(plain, &options(1), 5), 6, 1e-7, batch);
    let folder = tempfile::tempdir().unwrap();
    let mut found = trainer(dual, &streamed(budget, &folder), 5);
    let peak = found.plan().predicted_peak;
    assert!(peak <= Bytes(budget), "{peak}");
    let course = course(&mut found, 6, 1e-7, batch);
    assert_eq!(course.0, expected.0, "{}", g.name);
    assert!(course.1 == expected.1, "{}", g.name);
    let block = found.plan().decisions.iter().find(|d| d.technique == "states on the disk");
    let block = block.expect("states are on the disk").bytes.0;
    let before = found.session().bytes_spilled();
    let report = step_with(&mut found, &batch(7), 1e-4);
    let (read, written) = (report.run.bytes_streamed.0, found.session().bytes_spilled().0 - before.0);
    for moved in [read, written] {
        assert!(moved.abs_diff(block) * 100 <= block, "{moved} bytes moved of {block}");
    }
    (block, peak.0)
}

#[test]
fn blocks_are_read_and_written_once_a_step() {
    let g = model(21, false, 8, 1024);
    let dual = step_of(&g, ZoSettings::default());
    let plain = step_of(&g, ZoSettings { plain: true, ..ZoSettings::default() });
    let all: usize = dual.parameters.iter().map(|p| 4 * p.dims.iter().product::<usize>()).sum();
    let (block, peak) = streams(&g, &dual, &plain, 1_300_000, &batch);
    assert!(all > 3_000_000 && block > 2_000_000, "{block} of {all}");
    assert!(peak < all as u64 / 2, "{peak}");
}

#[test]
fn a_decoder_streams_its_blocks() {
    let feature = |name: &str, dims: &[usize]| crate::Feature {
        name: name.to_owned(),
        dtype: DType::I64,
        dims: dims.to_vec(),
        normalisation: None,
    };
    let (input, label) = (feature("tokens", &[16]), feature(LABEL, &[16]));
    let architecture: crate::Architecture = "gpt:layers=6,dim=128,heads=4".parse().unwrap();
    let mut g = architecture.build(&input, &label, 64, Some(4), 3).unwrap();
    g.infer().unwrap();
    let ty = TensorType::fixed(DType::I64, &[4, 16]);
    let loss = Loss::CrossEntropy { smoothing: 0.0, ignore: None };
    let evaluator = Evaluator::new(MemoryPool::unbounded(), Vec::new());
    let step = |plain| {
        let settings = ZoSettings { plain, ..ZoSettings::default() };
        build_zo_step(&g, &ty, loss, settings, &evaluator).unwrap()
    };
    let (dual, plain) = (step(false), step(true));
    let name = dual.inputs[0].clone();
    let tokens = |i: u64| {
        let mut r = Random::new(i);
        let tokens: Vec<i64> = (0..64).map(|_| r.below(64) as i64).collect();
        let tensor = Tensor::from_slice(&[4, 16], &tokens);
        vec![(name.clone(), tensor.clone()), (LABEL.to_owned(), tensor)]
    };
    let all: usize = dual.parameters.iter().map(|p| 4 * p.dims.iter().product::<usize>()).sum();
    let (_, peak) = streams(&g, &dual, &plain, 2_500_000, &tokens);
    assert!(peak < all as u64 * 6 / 10, "{peak} of {all}");
}

#[test]
fn a_log_makes_the_weights_again_and_survives_being_cut() {
    let g = model(6, true, 1, 40);
    let dual = step_of(&g, ZoSettings { decay: 0.1, ..ZoSettings::default() });
    let mut first = trainer(&dual, &options(1), 3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.zo");
    let mut writer = ZoLogWriter::create(&path, &first.header()).unwrap();
    for i in 0..20 {
        writer.append(&step(&mut first, i, 1e-3).step).unwrap();
    }
    writer.sync().unwrap();
    first.flush().unwrap();
    let log = ZoLog::read(&path).unwrap();
    assert_eq!((log.steps.len(), log.torn), (20, 0));
    let (a, b) = (folder.path().join("a.onnx"), folder.path().join("b.onnx"));
    crate::write_onnx(&first, &g, &[], &a).unwrap();
    apply_log(&g, &[], &log, 0, &ThreadPool::new(2), &b).unwrap();
    assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
    // Killed while it wrote: the last record is not whole, and the training goes on before it.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let log = ZoLog::read(&path).unwrap();
    assert_eq!((log.steps.len(), log.torn), (19, 19));
    let mut again = trainer(&dual, &options(2), 3);
    again.replay(&log.steps).unwrap();
    let mut writer = ZoLogWriter::resume(&path, &log).unwrap();
    writer.append(&step(&mut again, 19, 1e-3).step).unwrap();
    again.flush().unwrap();
    assert!(states(&again) == states(&first));
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn damaged_logs_are_refused_or_end_earlier() {
    let parameters = vec![ZoParameter { name: "w".into(), dims: vec![2, 3], decay: 0.0 }];
    let header = ZoHeader { eps: 1e-3, seed: 1, parameters };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.zo");
    let mut writer = ZoLogWriter::create(&path, &header).unwrap();
    for seed in 0..3 {
        let gradient = (seed != 1).then_some(0.5);
        writer.append(&LoggedStep { seed, gradient, rate: 0.1 }).unwrap();
    }
    let bytes = std::fs::read(&path).unwrap();
    let parse = |bytes: &[u8]| ZoLog::parse("test", &mut &bytes[..], bytes.len() as u64);
    let whole = parse(&bytes).unwrap();
    assert_eq!(whole.steps[1].gradient, None);
    for cut in 0..bytes.len() {
        match parse(&bytes[..cut]) {
            Ok(log) => assert_eq!(log.steps[..], whole.steps[..log.steps.len()]),
            Err(e) => assert!(cut < bytes.len() - 72, "{e}"),
        }
    }
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        match parse(&changed) {
            Ok(log) => assert!(log.steps.len() == 2 && log.header == header, "byte {at}"),
            Err(e) => assert!(e.to_string().starts_with("test: "), "{e}"),
        }
    }
}

#[test]
fn it_learns_past_operators_without_a_derivative() {
    let g = model(8, false, 1, 32);
    let mut trainer = trainer(&step_of(&g, ZoSettings::default()), &options(2), 1);
    let before = loss(&mut trainer);
    for i in 0..600 {
        step(&mut trainer, i, 2e-4);
    }
    let after = loss(&mut trainer);
    assert!(after < 0.9 * before, "{before} to {after}");
}

#[test]
fn steps_without_a_number_are_left_out_and_too_small_an_eps_is_seen() {
    let mut state = ZoState::new(1);
    for _ in 0..4 {
        assert_eq!(state.advance([f32::NAN, 1.0], 1e-3, 0.1).gradient, None);
    }
    assert_eq!(state.rate_factor, 1.0);
    state.advance([f32::INFINITY, 1.0], 1e-3, 0.1);
    assert_eq!((state.rate_factor, state.skipped), (0.5, [5, 0]));
    let step = state.advance([1.5, 1.0], 0.25, 0.1);
    assert_eq!((step.gradient, step.rate), (Some(1.0), 0.05));
    let g = model(9, false, 1, 32);
    let share = |eps| {
        let dual = step_of(&g, ZoSettings { eps, ..ZoSettings::default() });
        trainer(&dual, &options(1), 1).unchanged_share().unwrap()
    };
    assert!(share(1e-3) < 0.01);
    assert!(share(1e-9) > 0.5);
}

#[test]
fn settings_are_read() {
    let s: ZoSettings = "eps=1e-2,decay=0.1,plain=1".parse().unwrap();
    assert_eq!(s, ZoSettings { eps: 1e-2, decay: 0.1, plain: true });
    assert!("eps=0".parse::<ZoSettings>().is_err());
    assert!("speed=1".parse::<ZoSettings>().is_err());
}
