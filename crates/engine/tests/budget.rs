//! Under a budget the answer has the same bits, and the plan stays inside.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use lightering_engine::{
    Bindings, EngineError, PlanOptions, PrepareOptions, RuntimeValue, Session, SessionOptions, prepare,
};
use lightering_graph::{
    BinaryOp, ConvAttributes, DType, GemmAttributes, Graph, Op, Padding, PoolKind, SourceId, StoredTensor,
    Tensor, TensorType, UnaryOp, ValueId,
};
use lightering_meter::{MachineProfile, MemoryPool};
use lightering_tier::ByteSource;
use lightering_units::Bytes;
use proptest::prelude::*;

/// A network whose weights lie in a store, as those of an imported model do.
struct Net {
    graph: Graph,
    store: Vec<u8>,
    state: u32,
}

impl Net {
    fn new() -> Net {
        let mut graph = Graph::new("net");
        graph.sources.push("weights".to_owned());
        Net { graph, store: Vec::new(), state: 12345 }
    }

    fn weight(&mut self, name: &str, dims: &[usize]) -> ValueId {
        let offset = self.store.len() as u64;
        let count: usize = dims.iter().product();
        let scale = 1.0 / ((count / dims[0].max(1)) as f32).sqrt();
        for _ in 0..count {
            self.state = self.state.wrapping_mul(1664525).wrapping_add(1013904223);
            let x = (self.state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            self.store.extend_from_slice(&(x * scale * 3.0).to_le_bytes());
        }
        let stored = StoredTensor { source: SourceId(0), offset, size: Bytes(count as u64 * 4) };
        self.graph.add_stored(name, TensorType::fixed(DType::F32, dims), stored)
    }

    fn conv(
        &mut self,
        x: ValueId,
        channels: (usize, usize),
        kernel: usize,
        stride: usize,
        groups: usize,
    ) -> ValueId {
        let id = self.graph.nodes.len();
        let w = self.weight(&format!("w{id}"), &[channels.1, channels.0 / groups, kernel, kernel]);
        let b = self.weight(&format!("b{id}"), &[channels.1]);
        let pad = (kernel / 2) as i64;
        let attributes = ConvAttributes {
            kernel: vec![kernel; 2],
            strides: vec![stride; 2],
            padding: Padding::Explicit(vec![pad; 4]),
            groups,
            ..ConvAttributes::default()
        };
        let y = self.graph.add_node(format!("conv{id}"), Op::Conv(attributes), &[x, w, b], 1)[0];
        self.graph.add_node(format!("relu{id}"), Op::Unary(UnaryOp::Relu), &[y], 1)[0]
    }

    fn session(&self, budget: Option<Bytes>, threads: usize) -> Result<Session, EngineError> {
        self.session_on(Arc::new(self.store.clone()), budget, threads)
    }

    fn session_on(
        &self,
        store: Arc<dyn ByteSource>,
        budget: Option<Bytes>,
        threads: usize,
    ) -> Result<Session, EngineError> {
        let mut graph = self.graph.clone();
        let sources = vec![store];
        let memory = MemoryPool::unbounded();
        prepare(&mut graph, &Bindings::default(), &sources, &memory, &PrepareOptions::default())?;
        let plan = PlanOptions { budget, ..PlanOptions::new(MachineProfile::conservative(), threads) };
        Session::new(&graph, sources, &SessionOptions::new(plan))
    }
}

/// An inverted-residual network on a picture: the shape of network whose early layers set the peak.
fn mobile(size: usize, width: usize, blocks: usize) -> Net {
    let mut net = Net::new();
    let mut x = net.graph.add_input("x", TensorType::fixed(DType::F32, &[1, 3, size, size]));
    x = net.conv(x, (3, width), 3, 2, 1);
    for block in 0..blocks {
        let wide = width * 6;
        let expanded = net.conv(x, (width, wide), 1, 1, 1);
        let stride = if block == 0 { 2 } else { 1 };
        let depthwise = net.conv(expanded, (wide, wide), 3, stride, wide);
        let projected = net.conv(depthwise, (wide, width), 1, 1, 1);
        x = if stride == 1 {
            net.graph.add_node(format!("add{block}"), Op::Binary(BinaryOp::Add), &[projected, x], 1)[0]
        } else {
            projected
        };
    }
    x = net.conv(x, (width, width * 8), 1, 1, 1);
    let pool = Op::GlobalPool { kind: PoolKind::Average, layout: Default::default() };
    x = net.graph.add_node("pool", pool, &[x], 1)[0];
    x = net.graph.add_node("flat", Op::Flatten { axis: 1 }, &[x], 1)[0];
    let (w, b) = (net.weight("fc", &[100, width * 8]), net.weight("fcb", &[100]));
    let gemm = Op::Gemm(GemmAttributes { alpha: 1.0, beta: 1.0, trans_a: false, trans_b: true });
    x = net.graph.add_node("gemm", gemm, &[x, w, b], 1)[0];
    net.graph.outputs.push(x);
    net
}

fn picture(size: usize) -> HashMap<String, RuntimeValue> {
    let values: Vec<f32> = (0..3 * size * size).map(|i| ((i * 7919) % 255) as f32 / 127.0 - 1.0).collect();
    let tensor = Tensor::from_slice(&[1, 3, size, size], &values);
    HashMap::from([("x".to_owned(), RuntimeValue::Tensor(tensor))])
}

fn check(net: &Net, size: usize, percent: u64, threads: usize) {
    let mut feed = picture(size);
    let mut resident = net.session(None, threads).unwrap();
    let expected = resident.run_to_values(&mut feed).unwrap();
    let peak = resident.plan().predicted_peak;
    let budget = Bytes(peak.0 * percent / 100);
    let mut session = match net.session(Some(budget), threads) {
        Ok(session) => session,
        Err(EngineError::Budget { smallest, .. }) => {
            assert!(smallest > budget, "refused {budget}, although {smallest} would do");
            // What the message names must work.
            net.session(Some(smallest), threads).unwrap()
        }
        Err(e) => panic!("{e}"),
    };
    let limit = session.plan().budget.unwrap();
    assert!(session.plan().predicted_peak <= limit, "{} of {limit}", session.plan().predicted_peak);
    for _ in 0..2 {
        let values = session.run_to_values(&mut feed).unwrap();
        assert_eq!(values, expected, "another answer at {percent} %");
    }
    assert!(session.memory().peak() <= limit);
}

#[test]
fn half_and_a_quarter_of_the_memory_give_the_same_bits() {
    let net = mobile(64, 16, 4);
    for percent in [100, 75, 50, 35, 25] {
        check(&net, 64, percent, 1);
        check(&net, 64, percent, 2);
    }
}

#[test]
fn early_layers_are_split_into_stripes() {
    let net = mobile(96, 8, 2);
    let resident = net.session(None, 1).unwrap();
    let budget = Bytes(resident.plan().predicted_peak.0 / 2);
    let session = net.session(Some(budget), 1).unwrap();
    let techniques: Vec<_> = session.plan().decisions.iter().map(|d| d.technique.as_str()).collect();
    assert!(techniques.contains(&"stripes"), "{techniques:?}");
}

#[test]
fn an_impossible_budget_names_the_smallest_and_the_holders() {
    let error = mobile(64, 16, 2).session(Some(Bytes::kib(20)), 1).err().unwrap();
    let text = error.to_string();
    assert!(matches!(error, EngineError::Budget { .. }), "{text}");
    assert!(text.contains("smallest budget") && text.contains("in the way"), "{text}");
}

#[test]
fn a_wrong_input_is_named() {
    let mut session = mobile(32, 8, 1).session(None, 1).unwrap();
    let mut missing = HashMap::new();
    assert!(session.run_to_values(&mut missing).unwrap_err().to_string().contains("\"x\""));
    let mut wrong = picture(16);
    assert!(session.run_to_values(&mut wrong).unwrap_err().to_string().contains("\"x\""));
    // The session still works.
    session.run_to_values(&mut picture(32)).unwrap();
}

#[test]
fn a_store_that_ends_early_is_an_error_that_names_the_weight() {
    let mut net = mobile(64, 16, 4);
    net.store.truncate(net.store.len() / 2);
    let error = net.session(None, 1).err().unwrap();
    assert!(matches!(error, EngineError::Io { .. }) && error.to_string().contains("\"w"), "{error}");
}

/// A medium that fails while the switch is on.
struct Breaking {
    store: Vec<u8>,
    fault: Mutex<Option<Fault>>,
}

#[derive(Clone, Copy)]
enum Fault {
    Error,
    Panic,
}

impl ByteSource for Breaking {
    fn len_bytes(&self) -> Bytes {
        self.store.len_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let fault = *self.fault.lock().unwrap();
        match fault {
            None => self.store.read_at(offset, buffer),
            Some(Fault::Error) => Err(std::io::Error::other("the disk is gone")),
            Some(Fault::Panic) => panic!("a fault that nobody foresaw"),
        }
    }

    fn name(&self) -> String {
        "breaking".to_owned()
    }
}

#[test]
fn a_fault_of_the_medium_fails_the_run_and_the_session_lives_on() {
    let net = mobile(64, 16, 4);
    let mut resident = net.session(None, 1).unwrap();
    let expected = resident.run_to_values(&mut picture(64)).unwrap();
    let smallest = match net.session(Some(Bytes::kib(20)), 1) {
        Err(EngineError::Budget { smallest, .. }) => smallest,
        other => panic!("{:?}", other.err()),
    };
    let store = Arc::new(Breaking { store: net.store.clone(), fault: Mutex::new(None) });
    let mut session = net.session_on(store.clone(), Some(smallest), 1).unwrap();
    for fault in [Fault::Error, Fault::Panic] {
        *store.fault.lock().unwrap() = Some(fault);
        let error = session.run_to_values(&mut picture(64)).unwrap_err();
        match fault {
            Fault::Error => assert!(error.to_string().contains("the disk is gone"), "{error}"),
            Fault::Panic => assert!(error.to_string().contains("panicked"), "{error}"),
        }
        *store.fault.lock().unwrap() = None;
        assert_eq!(session.run_to_values(&mut picture(64)).unwrap(), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_budget_keeps_the_bits(
        size in 17usize..80,
        width in prop::sample::select(vec![4usize, 8, 12, 20]),
        blocks in 1usize..5,
        percent in 15u64..110,
        threads in 1usize..3,
    ) {
        check(&mobile(size, width, blocks), size, percent, threads);
    }
}

/// Long skips: early results that are needed again at the very end, as in a training step.
fn mirrored(size: usize, depth: usize, rounds: usize) -> Net {
    let mut net = Net::new();
    let mut x = net.graph.add_input("x", TensorType::fixed(DType::F32, &[1, 3, size, size]));
    let mut kept = Vec::new();
    for i in 0..depth {
        x = net.conv(x, (if i == 0 { 3 } else { 16 }, 16), 3, 1, 1);
        kept.push(x);
    }
    for round in 0..rounds {
        for (i, &skip) in kept.iter().enumerate().rev() {
            x = net.graph.add_node(format!("join{round}.{i}"), Op::Binary(BinaryOp::Mul), &[x, skip], 1)[0];
            x = net.conv(x, (16, 16), 3, 1, 1);
        }
    }
    net.graph.outputs.push(x);
    net
}

#[test]
fn tensors_that_wait_on_the_disk_come_back_with_the_same_bits() {
    // With two rounds a tensor waits on the disk twice, the second time from where the first brought it back.
    for (rounds, percent) in [(1, 60), (2, 60), (2, 45)] {
        let net = mirrored(96, 8, rounds);
        let mut feed = picture(96);
        let mut resident = net.session(None, 2).unwrap();
        let expected = resident.run_to_values(&mut feed).unwrap();
        let peak = resident.plan().predicted_peak;
        let folder = tempfile::tempdir().unwrap();
        let mut graph = net.graph.clone();
        let sources: Vec<Arc<dyn ByteSource>> = vec![Arc::new(net.store.clone())];
        let memory = MemoryPool::unbounded();
        prepare(&mut graph, &Bindings::default(), &sources, &memory, &PrepareOptions::default()).unwrap();
        let plan = PlanOptions {
            budget: Some(Bytes(peak.0 * percent / 100)),
            spill: Some(folder.path().to_owned()),
            ..PlanOptions::new(MachineProfile::conservative(), 2)
        };
        let start =
            |plan: &PlanOptions| Session::new(&graph, sources.clone(), &SessionOptions::new(plan.clone()));
        let mut session = match start(&plan) {
            Err(EngineError::Budget { smallest, .. }) => {
                start(&PlanOptions { budget: Some(smallest), ..plan }).unwrap()
            }
            other => other.unwrap(),
        };
        let decision = session.plan().decisions.iter().find(|d| d.technique == "spill");
        let spilled = decision.expect("nothing was spilled").bytes;
        assert!(session.plan().predicted_peak <= session.plan().budget.unwrap());
        for run in 1..=3 {
            let values = session.run_to_values(&mut feed).unwrap();
            assert_eq!(values, expected, "another answer in run {run} at {percent} % with {rounds} rounds");
            assert_eq!(session.bytes_spilled(), Bytes(spilled.0 * run));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_folder_that_cannot_be_spilled_to_is_named() {
    let net = mirrored(96, 8, 1);
    let mut graph = net.graph.clone();
    let sources: Vec<Arc<dyn ByteSource>> = vec![Arc::new(net.store.clone())];
    let memory = MemoryPool::unbounded();
    prepare(&mut graph, &Bindings::default(), &sources, &memory, &PrepareOptions::default()).unwrap();
    let resident = net.session(None, 1).unwrap().plan().predicted_peak;
    let plan = PlanOptions {
        budget: Some(Bytes(resident.0 * 6 / 10)),
        spill: Some("/no/such/folder".into()),
        ..PlanOptions::new(MachineProfile::conservative(), 1)
    };
    let error = Session::new(&graph, sources, &SessionOptions::new(plan)).err().unwrap();
    assert!(matches!(error, EngineError::Spill(_)), "{error}");
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
}
