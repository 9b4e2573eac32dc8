//! Runs an ONNX model with `.npy` inputs, in order: the whole road from file to answer on one page.
//!
//! `cargo run --release -p lightering-engine --example run_onnx -- MODEL [--memory SIZE] [--threads N] [--runs N]
//! [--expect FOLDER] [--profile] INPUT.npy…`

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;

use lightering_engine::{
    Bindings, PlanOptions, PrepareOptions, RuntimeValue, Session, SessionOptions, prepare,
};
use lightering_formats::{npy, onnx};
use lightering_meter::{MachineProfile, MemoryPool};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut files, mut budget, mut threads, mut runs, mut profile) = (Vec::new(), None, 1, 1, false);
    let (mut expect, mut svg) = (None, None);
    while let Some(a) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match a.as_str() {
            "--memory" => budget = Some(value().parse()?),
            "--threads" => threads = value().parse()?,
            "--runs" => runs = value().parse()?,
            "--expect" => expect = Some(value()),
            "--svg" => svg = Some(value()),
            "--profile" => profile = true,
            _ => files.push(a),
        }
    }
    let before = lightering_meter::process::memory();
    let model = onnx::ModelFile::open(&files[0])?;
    let onnx::Imported { mut graph, sources } = onnx::import(&model)?;
    let mut bindings = Bindings::default();
    let mut feed = HashMap::new();
    for (&input, file) in graph.inputs.iter().zip(&files[1..]) {
        let tensor = npy::read(&mut BufReader::new(File::open(file)?))?;
        bindings.types.push((input, tensor.tensor_type()));
        feed.insert(graph.value(input).name.clone(), RuntimeValue::Tensor(tensor));
    }
    let memory = MemoryPool::unbounded();
    for report in prepare(&mut graph, &bindings, &sources, &memory, &PrepareOptions::default())? {
        if report.changes > 0 {
            eprintln!("{}: {}", report.name, report.changes);
        }
    }
    let options = SessionOptions {
        profile,
        ..SessionOptions::new(PlanOptions {
            budget,
            ..PlanOptions::new(MachineProfile::load_or_conservative()?, threads)
        })
    };
    drop(model);
    let mut session = Session::new(&graph, sources, &options)?;
    eprint!("{}", session.plan());
    if let Some(path) = svg {
        std::fs::write(path, session.plan().to_svg())?;
    }
    let mut times = Vec::new();
    let mut outputs = Vec::new();
    let mut by_kernel: HashMap<String, (f64, usize)> = HashMap::new();
    let mut slowest = Vec::new();
    for _ in 0..runs {
        let mut values = Vec::new();
        let report = session.run(&mut feed, &mut |name, view| {
            values.push((name.to_owned(), view.to_value()));
            Ok(())
        })?;
        times.push(report.seconds.0);
        outputs = values;
        slowest.clear();
        for (seconds, i) in report.instruction_seconds.iter().zip(&session.plan().instructions) {
            let entry = by_kernel.entry(format!("{} {}", i.op, i.kernel)).or_default();
            entry.0 += seconds.0;
            entry.1 += 1;
            slowest.push((seconds.0, i.name.clone(), i.op.clone(), i.kernel.clone(), i.seconds.0));
        }
    }
    times.sort_by(f64::total_cmp);
    let after = lightering_meter::process::memory();
    println!(
        "median {:.2} ms, best {:.2} ms; {before:?} {after:?}",
        times[times.len() / 2] * 1e3,
        times[0] * 1e3
    );
    let mut kernels: Vec<_> = by_kernel.into_iter().collect();
    kernels.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    for (name, (seconds, calls)) in kernels {
        println!("{:9.3} ms  {:4} calls  {name}", seconds / f64::from(runs) * 1e3, calls / runs as usize);
    }
    slowest.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (seconds, name, op, kernel, predicted) in slowest.iter().take(12) {
        println!("{:9.3} ms (predicted {:.3})  {op} {kernel} {name}", seconds * 1e3, predicted * 1e3);
    }
    for (i, (name, value)) in outputs.iter().enumerate() {
        let Some(tensor) = value.tensor() else { continue };
        println!("{name}: {}", tensor.tensor_type());
        if let Some(folder) = &expect {
            let file = File::open(format!("{folder}/output_{i}.npy"))?;
            let expected = npy::read(&mut BufReader::new(file))?;
            let (a, b) = (tensor.to_f64s().unwrap_or_default(), expected.to_f64s().unwrap_or_default());
            let largest = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let worst = a.iter().zip(&b).fold(0.0f64, |m, (x, y)| m.max((x - y).abs()));
            println!(
                "  largest difference {worst:.3e}, {:.3e} of the largest magnitude",
                worst / largest.max(1e-30)
            );
        }
    }
    Ok(())
}
