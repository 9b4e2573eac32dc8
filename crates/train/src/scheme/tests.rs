use std::collections::HashMap;

use lightering_engine::{Evaluator, PlanOptions};
use lightering_graph::passes::BatchNormMode;
use lightering_graph::{
    BinaryOp, ConvAttributes, DType, Graph, Layout, Op, Padding, Tensor, TensorType, UnaryOp, UpdateRule,
    ValueId,
};
use lightering_meter::{MachineProfile, MemoryPool};

use lightering_units::Flops;

use super::*;
use crate::{Architecture, Feature, LABEL, Loss, Random, Step, Trainer, build_step};

const SGD: UpdateRule = UpdateRule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };

fn evaluator() -> Evaluator {
    Evaluator::new(MemoryPool::unbounded(), Vec::new())
}

fn mobile_net() -> Graph {
    let input =
        Feature { name: "image".into(), dtype: DType::F32, dims: vec![3, 32, 32], normalisation: None };
    let label = Feature { name: LABEL.into(), dtype: DType::I64, dims: vec![], normalisation: None };
    let architecture: Architecture = "mobilenetv2:width=0.35".parse().unwrap();
    architecture.build(&input, &label, 10, Some(2), 7).unwrap()
}

fn label() -> TensorType {
    TensorType::fixed(DType::I64, &[2])
}

fn options(updates: &Updates) -> StepOptions {
    let mut options = StepOptions::new("crossentropy".parse::<Loss>().unwrap(), SGD);
    options.batch_norm = BatchNormMode::Frozen;
    updates.install(&mut options);
    options
}

fn step_of(graph: &Graph, updates: &Updates) -> Step {
    build_step(graph, &label(), &evaluator(), &options(updates)).unwrap()
}

fn updates(graph: &Graph, scheme: &str) -> Updates {
    let anatomy = Anatomy::of(graph, &evaluator()).unwrap();
    let scheme: Scheme = scheme.parse().unwrap();
    scheme.updates(&anatomy, &evaluator(), &mut |_| Ok(None)).unwrap()
}

/// The parameters of a step after one step, by name.
fn trained(step: &Step, dims: &[usize]) -> HashMap<String, Vec<u8>> {
    let plan = PlanOptions::new(MachineProfile::conservative(), 1);
    let mut trainer = Trainer::new(step.clone(), Vec::new(), &plan, SGD, false).unwrap();
    let mut image = Tensor::zeros(DType::F32, dims);
    let mut random = Random::new(3);
    image.as_mut_slice::<f32>().iter_mut().for_each(|x| *x = random.normal() as f32);
    let label = Tensor::from_slice(&[2], &[1i64, 4]);
    trainer.step([("image", &image), (LABEL, &label)].into_iter(), 0.05, |_| ()).unwrap();
    let names: Vec<String> = trainer.states().map(|(name, _)| name.to_owned()).collect();
    names
        .into_iter()
        .map(|name| {
            let mut bytes = Vec::new();
            trainer.read_state(&name, &mut |piece| bytes.extend_from_slice(piece)).unwrap();
            (name, bytes)
        })
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_sparse_update_is_that_slice_of_the_full_one_and_leaves_all_else_alone() {
    let graph = mobile_net();
    let anatomy = Anatomy::of(&graph, &evaluator()).unwrap();
    let count = anatomy.layers.len();
    // A pointwise, a depthwise and the dense layer.
    let scheme = SparseScheme {
        n_bias_update: 4,
        weight_idx: vec![count - 4, count - 3, count - 1],
        weight_ratio: vec![0.25, 0.5, 0.125],
        ..SparseScheme::default()
    };
    let sparse = Scheme::Sparse(Sparse::Given(scheme));
    let updates = sparse.updates(&anatomy, &evaluator(), &mut |_| Ok(None)).unwrap();
    let changes = updates.changes.clone().unwrap();
    // The same parameters, all of each.
    let whole = changes.keys().map(|name| (name.clone(), Change::Whole)).collect();
    let full = Updates { changes: Some(whole), ..updates.clone() };
    let full = trained(&step_of(&graph, &full), &[2, 3, 32, 32]);
    let step = step_of(&graph, &updates);
    assert!(
        !step.graph.iter_nodes().any(|(_, n)| n.name.starts_with("slice/")),
        "gradients are computed from slices, not sliced"
    );
    let slices = trained(&step, &[2, 3, 32, 32]);
    assert_eq!(slices.len(), changes.len());
    let mut kinds = 0;
    for (name, bytes) in &slices {
        let before = floats(anatomy.read(name, &evaluator()).unwrap().as_bytes());
        let (after, whole) = (floats(bytes), floats(&full[name]));
        let dims = anatomy.read(name, &evaluator()).unwrap().dims().to_vec();
        let mut moved = false;
        let largest = before.iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        for i in 0..before.len() {
            let taken = match &changes[name] {
                Change::Whole => true,
                Change::Channels { axis, channels } => {
                    kinds += usize::from(i == 0);
                    let inner: usize = dims[axis + 1..].iter().product();
                    channels.contains(&(i / inner % dims[*axis]))
                }
            };
            if taken {
                let rounding = 1e-5 * largest + f32::EPSILON * whole[i].abs();
                assert!((after[i] - whole[i]).abs() <= rounding, "{name}[{i}]: {} {}", after[i], whole[i]);
                moved |= after[i] != before[i];
            } else {
                assert_eq!(after[i].to_bits(), before[i].to_bits(), "{name}[{i}]");
            }
        }
        assert!(moved, "{name} learns");
    }
    assert_eq!(kinds, 3);
}

#[test]
fn early_apply_keeps_one_gradient_and_changes_no_bit() {
    let graph = mobile_net();
    let early = step_of(&graph, &Updates::default());
    let mut late = options(&Updates::default());
    late.early_apply = false;
    let late = build_step(&graph, &label(), &evaluator(), &late).unwrap();
    let (a, b) = (StepSummary::of(&early), StepSummary::of(&late));
    let largest =
        Anatomy::of(&graph, &evaluator()).unwrap().parameters.iter().map(|p| p.elements).max().unwrap();
    assert_eq!(a.gradients, Bytes(4 * largest as u64));
    assert_eq!(b.gradients, b.gradients_in_all);
    assert!(b.gradients > a.gradients);
    assert_eq!(trained(&early, &[2, 3, 32, 32]), trained(&late, &[2, 3, 32, 32]));
}

#[test]
fn the_backward_pass_of_the_last_layers_is_no_deeper_than_they_are() {
    let graph = mobile_net();
    let full = StepSummary::of(&step_of(&graph, &Updates::default()));
    let mut previous = Flops(0.0);
    for k in [1, 4, 10, 30] {
        let step = step_of(&graph, &updates(&graph, &format!("last:{k}")));
        let s = StepSummary::of(&step);
        let gradients = |op: &str| step.graph.iter_nodes().filter(|(_, n)| n.op.name() == op).count();
        assert_eq!(gradients("ConvWeightGrad"), k - 1, "one per convolution of the last {k} layers");
        // Not below the first of them.
        assert_eq!(gradients("ConvInputGrad"), (k - 1).saturating_sub(1));
        assert!(s.backward_flops.0 > previous.0 && s.backward_flops.0 < full.backward_flops.0);
        assert!(s.saved_activations < full.saved_activations);
        previous = s.backward_flops;
    }
}

#[test]
fn biases_alone_keep_signs_and_no_inputs() {
    let graph = mobile_net();
    let bias = step_of(&graph, &updates(&graph, "bias"));
    let s = StepSummary::of(&bias);
    let full = StepSummary::of(&step_of(&graph, &Updates::default()));
    assert!(bias.graph.iter_nodes().any(|(_, n)| n.op.name() == "SignMask"));
    assert!(!bias.graph.iter_nodes().any(|(_, n)| n.op.name() == "ConvWeightGrad"));
    assert!(
        s.saved_activations.0 * 12 < full.saved_activations.0,
        "{} {}",
        s.saved_activations,
        full.saved_activations
    );
}

#[test]
fn wrong_schemes_are_refused_with_what_is_wrong() {
    let graph = mobile_net();
    let anatomy = Anatomy::of(&graph, &evaluator()).unwrap();
    for text in ["", "last:0", "bias:x", "full:3", "zo", "sparse:"] {
        assert!(text.parse::<Scheme>().is_err(), "{text}");
    }
    for (text, expected) in [
        (r#"{"parameters": {"nothing": 1}}"#, "nothing"),
        (r#"{"weight_idx": [999], "weight_ratio": [1]}"#, "999"),
        (r#"{"weight_idx": [1], "weight_ratio": []}"#, "1 layers and 0 ratios"),
        (r#"{"weight_idx": [1], "weight_ratio": [1.5]}"#, "1.5"),
        (r#"{"weight_idx": [1], "weight_ratio": [0]}"#, "share 0"),
    ] {
        let scheme = SparseScheme::from_json("s.json", text).unwrap();
        let error = scheme.changes(&anatomy, &evaluator()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(SparseScheme::from_json("s.json", r#"{"biases": 3}"#).is_err());
}

/// One inverted residual block of 8 channels, widened six times, on 16x16 pixels, with a classifier.
fn block(third: bool) -> Graph {
    let mut g = Graph::new("block");
    let mut random = Random::new(1);
    let mut floats = |g: &mut Graph, name: &str, dims: &[usize], one: f32| -> ValueId {
        let mut t = Tensor::zeros(DType::F32, dims);
        let values = t.as_mut_slice::<f32>();
        values.iter_mut().for_each(|x| *x = one + 0.2 * random.normal() as f32);
        g.add_constant(name, t)
    };
    let x = g.add_input("image", TensorType::fixed(DType::F32, &[2, 8, 16, 16]));
    let mut conv = |g: &mut Graph,
                    name: &str,
                    x: ValueId,
                    w: [usize; 4],
                    groups: usize,
                    act: Option<UnaryOp>| {
        let weight = floats(g, &format!("{name}.weight"), &w, 0.0);
        let pad = (w[2] / 2) as i64;
        let padding = Padding::Explicit(vec![pad; 4]);
        let a =
            ConvAttributes { groups, padding, layout: Layout::ChannelsFirst, ..ConvAttributes::default() };
        let y = g.add_node(format!("{name}.conv"), Op::Conv(a), &[x, weight], 1)[0];
        let scale = floats(g, &format!("{name}.scale"), &[w[0]], 1.0);
        let shift = floats(g, &format!("{name}.shift"), &[w[0]], 0.0);
        let mean = floats(g, &format!("{name}.mean"), &[w[0]], 0.0);
        let variance =
            g.add_constant(format!("{name}.variance"), Tensor::from_slice(&[w[0]], &vec![1f32; w[0]]));
        let norm = Op::BatchNorm { epsilon: 1e-5, momentum: 0.9, training: false };
        let y = g.add_node(format!("{name}.norm"), norm, &[y, scale, shift, mean, variance], 1)[0];
        match act {
            Some(op) => g.add_node(format!("{name}.act"), Op::Unary(op), &[y], 1)[0],
            None => y,
        }
    };
    let act = Some(if third { UnaryOp::HardSwish } else { UnaryOp::ClipTo { min: 0.0, max: 6.0 } });
    let y = conv(&mut g, "expand", x, [48, 8, 1, 1], 1, act);
    let mut y = conv(&mut g, "depthwise", y, [48, 1, 3, 3], 48, act);
    if third {
        let pool =
            Op::GlobalPool { kind: lightering_graph::PoolKind::Average, layout: Layout::ChannelsFirst };
        let z = g.add_node("se.pool", pool, &[y], 1)[0];
        let z = conv(&mut g, "se.down", z, [12, 48, 1, 1], 1, Some(UnaryOp::Relu));
        let z = conv(&mut g, "se.up", z, [48, 12, 1, 1], 1, None);
        let z = g.add_node("se.gate", Op::Unary(UnaryOp::Sigmoid), &[z], 1)[0];
        y = g.add_node("se.scale", Op::Binary(BinaryOp::Mul), &[y, z], 1)[0];
    }
    let y = conv(&mut g, "project", y, [8, 48, 1, 1], 1, None);
    let y = g.add_node("add", Op::Binary(BinaryOp::Add), &[y, x], 1)[0];
    let pool = Op::GlobalPool { kind: lightering_graph::PoolKind::Average, layout: Layout::ChannelsFirst };
    let y = g.add_node("pool", pool, &[y], 1)[0];
    let flat = g.add_node("flat", Op::Flatten { axis: 1 }, &[y], 1)[0];
    let w = g.add_constant("fc.weight", Tensor::from_slice(&[8, 10], &[0.1f32; 80]));
    let logits =
        g.add_node("fc", Op::MatMul(lightering_graph::MatMulAttributes::default()), &[flat, w], 1)[0];
    g.outputs = vec![logits];
    g.infer().unwrap();
    g
}

#[test]
fn mobiletl_halves_what_a_block_keeps() {
    for (third, from, to) in [(false, 0.443, 0.483), (true, 0.513, 0.553)] {
        let graph = block(third);
        let anatomy = Anatomy::of(&graph, &evaluator()).unwrap();
        assert_eq!(anatomy.blocks.len(), 1, "{:?}", anatomy.blocks);
        assert!(anatomy.blocks[0].residual && anatomy.blocks[0].squeeze.is_empty() != third);
        let mut standard = options(&Updates::default());
        standard.batch_norm = BatchNormMode::Train;
        let standard = build_step(&graph, &label(), &evaluator(), &standard).unwrap();
        let mut tl = options(&updates(&graph, "mobiletl:1"));
        tl.rule = SGD;
        let tl = build_step(&graph, &label(), &evaluator(), &tl).unwrap();
        let (a, b) = (StepSummary::of(&standard), StepSummary::of(&tl));
        // The block's input is an input of the step, kept in both: 8 channels of 16x16 pixels, two samples.
        let input = (2 * 8 * 16 * 16 * 4) as f64;
        let (a, b) = (a.saved_activations.0 as f64 + input, b.saved_activations.0 as f64 + input);
        let saved = 1.0 - b / a;
        assert!((from..=to).contains(&saved), "third {third}: {saved} ({a} -> {b}, unit {input})");
    }
}

#[test]
fn frozen_norms_with_exact_activations_have_the_exact_gradient() {
    let graph = block(true);
    let anatomy = Anatomy::of(&graph, &evaluator()).unwrap();
    let exact = Scheme::MobileTl(MobileTl { blocks: Some(1), mask: ActMask::Exact, train_squeeze: true });
    let mut updates = exact.updates(&anatomy, &evaluator(), &mut |_| Ok(None)).unwrap();
    assert!(updates.rules.is_empty());
    updates.batch_norm_of.clear();
    let tl = trained(&step_of(&graph, &updates), &[2, 8, 16, 16]);
    let full = trained(&step_of(&graph, &Updates::default()), &[2, 8, 16, 16]);
    assert!(tl.len() < full.len() && tl.contains_key("expand.shift") && !tl.contains_key("expand.scale"));
    for (name, bytes) in &tl {
        for (a, b) in floats(bytes).iter().zip(floats(&full[name])) {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{name}: {a} {b}");
        }
    }
}

#[test]
fn without_blocks_the_last_layers_learn_and_the_message_says_so() {
    let input = Feature { name: "x".into(), dtype: DType::F32, dims: vec![16], normalisation: None };
    let label = Feature { name: LABEL.into(), dtype: DType::I64, dims: vec![], normalisation: None };
    let mlp: Architecture = "mlp:hidden=8,layers=3".parse().unwrap();
    let graph = mlp.build(&input, &label, 10, Some(2), 7).unwrap();
    let updates = updates(&graph, "mobiletl:1");
    assert!(updates.notes[0].contains("no inverted residual block"), "{:?}", updates.notes);
    assert!(!updates.changes.unwrap().is_empty());
}

#[test]
fn the_search_comes_close_to_the_best_of_all_schemes() {
    let graph = mobile_net();
    let anatomy = Anatomy::of(&graph, &evaluator()).unwrap();
    let mut random = Random::new(5);
    let chosen: Vec<usize> = (0..5).map(|i| anatomy.layers.len() - 2 - 3 * i).collect();
    let mut contributions = Contributions::default();
    let mut sum = 0.0;
    for _ in 0..=anatomy.layers.len() {
        contributions.bias.push(sum);
        sum += 0.05 * random.uniform();
    }
    for &i in &chosen {
        let whole = random.between(0.5, 2.0);
        contributions.weight.insert(i, [0.4 * whole, 0.6 * whole, 0.85 * whole, whole]);
    }
    // Bytes that are no function of the search's own estimate.
    let cost = |s: &SparseScheme| {
        let weights = s.weight_idx.iter().zip(&s.weight_ratio).map(|(i, r)| {
            1000.0
                + r * (anatomy.layers[*i].inputs + anatomy.layers[*i].dims.iter().product::<usize>()) as f64
        });
        500.0 * s.n_bias_update as f64 + weights.sum::<f64>()
    };
    let everything =
        SparseScheme { weight_idx: chosen.clone(), weight_ratio: vec![1.0; 5], ..SparseScheme::default() };
    let budget = 0.5 * cost(&everything);
    let mut best = 0.0f64;
    for code in 0..5usize.pow(5) {
        let genes: Vec<usize> = (0..5).map(|i| code / 5usize.pow(i) % 5).collect();
        let taken = || chosen.iter().zip(&genes).filter(|(_, g)| **g > 0);
        let mut scheme = SparseScheme {
            weight_idx: taken().map(|(i, _)| *i).collect(),
            weight_ratio: taken().map(|(_, g)| RATIOS[g - 1]).collect(),
            ..SparseScheme::default()
        };
        for k in 0..=anatomy.layers.len() {
            scheme.n_bias_update = k;
            if cost(&scheme) <= budget {
                best = best.max(contributions.gain(&scheme));
            }
        }
    }
    let mut peak = |s: &SparseScheme| Ok((cost(s) <= budget).then(|| Bytes(cost(s) as u64)));
    let found = search(&anatomy, &contributions, SearchOptions::default(), &mut peak).unwrap();
    assert!(found.gain >= 0.98 * best, "{} of {best}, {} plans", found.gain, found.plans);
    assert_eq!(found, search(&anatomy, &contributions, SearchOptions::default(), &mut peak).unwrap());
    let text = serde_json::to_string(&found.scheme).unwrap();
    assert_eq!(SparseScheme::from_json("again", &text).unwrap(), found.scheme);
}
