//! `lighter bench`

use crate::arguments::BenchArguments;
use crate::commands::run::{energy_model, profile_table};
use crate::failure::{Exit, Failure, Outcome};
use crate::model::{Means, Model, ModelSource, NodeTime, load_profile};
use crate::output::Output;
use crate::probe::Scramble;
use crate::usage::{self, Baseline};
use crate::values::{self, LoadedInput, Port};
use lightering_graph::{DType, Dim, Tensor};
use lightering_meter::{EnergyMeter, MemoryPool, Receipt, Stopwatch};
use lightering_units::{Bytes, Seconds};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Largest input that is filled with generated numbers.
const GENERATED_BYTES_MAX: Bytes = Bytes::mib(1024);

/// Runs when nobody asks for a number.
const RUNS_DEFAULT: u32 = 20;
const WARMUP_DEFAULT: u32 = 3;

/// `--json`
#[derive(Debug, Serialize)]
struct BenchReport {
    schema: &'static str,
    runs: usize,
    median_seconds: Seconds,
    p95_seconds: Seconds,
    min_seconds: Seconds,
    mean_seconds: Seconds,
    seconds: Vec<Seconds>,
    profile: Vec<NodeTime>,
    receipt: Receipt,
}

/// Times the model.
pub fn run(arguments: &BenchArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let source = ModelSource::File(arguments.model.clone());

    let load = Stopwatch::start();
    let model = Model::open(&source)?;
    let ports = model.inputs();
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let (inputs, dimensions) = match load_inputs(arguments, &ports, &pool) {
        Ok(loaded) => loaded,
        Err(failure) => {
            let given = values::bind_dimensions(&resources.dimensions, &[], &ports)?;
            return Err(model.with_smallest(failure, &given, means));
        }
    };
    let mut session = model.plan(&dimensions, &inputs, means, arguments.profile)?;
    let load_seconds = load.elapsed();

    // Before the first run, so that it is a prediction.
    let fixed_assumed = baseline.fixed_cost_assumed(&profile, source.embedded_bytes());
    let (warmup, runs) = (arguments.warmup.unwrap_or(WARMUP_DEFAULT), arguments.runs.unwrap_or(RUNS_DEFAULT));
    let progress = output.progress(u64::from(warmup) + u64::from(runs));
    for _ in 0..warmup {
        session.run(&inputs)?;
        progress.inc(1);
    }
    let energy = EnergyMeter::start(arguments.receipt.energy_model.map(energy_model));
    let mut seconds = Vec::with_capacity(runs as usize);
    let mut outputs = Vec::new();
    for _ in 0..runs {
        drop(std::mem::take(&mut outputs));
        let watch = Stopwatch::start();
        outputs = session.run(&inputs)?;
        seconds.push(watch.elapsed());
        progress.inc(1);
    }
    let mut energy = energy.finish();
    if let Some(joules) = &mut energy.joules {
        joules.0 /= f64::from(runs);
        energy.method.push_str(&format!("; mean of {runs} runs"));
    }
    progress.finish_and_clear();

    let mut sorted = seconds.clone();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let median = quantile(&sorted, 0.5);
    let mut measured = baseline.measured(median, Some(load_seconds), source.embedded_bytes());
    measured.pool_peak_bytes = Some(session.pool_peak().max(pool.peak()));
    let account = usage::Account {
        command: "bench",
        model: source.identity(arguments.receipt.receipt.is_some())?,
        profile: &profile,
        isa: session.isa(),
        threads,
        memory: resources.memory,
        planned: session.planned(),
        fixed_assumed,
        predicted_seconds: session.predicted_seconds(),
        measured,
        bytes_read_by_tier: session.bytes_read_by_tier(),
        energy,
        plan: session.plan_summary(),
        outputs: outputs.iter().flat_map(|(name, value)| values::receipts_of(name, value)).collect(),
    };
    let receipt = account.settle();
    if let Some(path) = &arguments.receipt.receipt {
        receipt.save(path)?;
    }
    let report = BenchReport {
        schema: "lightering.bench/1",
        runs: seconds.len(),
        median_seconds: median,
        p95_seconds: quantile(&sorted, 0.95),
        min_seconds: sorted[0],
        mean_seconds: Seconds(seconds.iter().map(|s| s.0).sum::<f64>() / seconds.len() as f64),
        seconds,
        profile: session.node_times(),
        receipt,
    };
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "median {}, 95th percentile {}, fastest {} ({} runs, {threads} threads, {})\n",
        report.median_seconds, report.p95_seconds, report.min_seconds, report.runs, report.receipt.isa
    );
    if arguments.profile {
        text.push_str(&profile_table(&report.profile));
        text.push('\n');
    }
    text.push_str(&usage::summary(&report.receipt));
    output.result(&report, &text)?;
    usage::check_budget(&report.receipt)?;
    Ok(Exit::Done)
}

/// Reads the inputs that were given and fills the others; also tells the sizes of named dimensions.
fn load_inputs(
    arguments: &BenchArguments,
    ports: &[Port],
    pool: &MemoryPool,
) -> Outcome<(Vec<LoadedInput>, BTreeMap<String, usize>)> {
    let preprocess = arguments.input.preprocess.as_deref();
    let mut inputs = values::load_inputs(&arguments.input.inputs, ports, preprocess, pool)?;
    let dimensions = values::bind_dimensions(&arguments.resources.dimensions, &inputs, ports)?;
    for port in ports {
        if inputs.iter().all(|i| i.name != port.name) {
            inputs.push(generate(port, &dimensions, pool)?);
        }
    }
    Ok((inputs, dimensions))
}

/// The value below which the fraction `q` of sorted times lies (nearest rank).
pub fn quantile(sorted: &[Seconds], q: f64) -> Seconds {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Fills an input: floats in [-1, 1) and bytes from a fixed seed; wider integers and booleans are 1, which is valid
/// as a token, an index or a mask in most models.
fn generate(port: &Port, dimensions: &BTreeMap<String, usize>, pool: &MemoryPool) -> Outcome<LoadedInput> {
    let cannot = |why: String| {
        Failure::input(
            format!("input {:?} ({}) cannot be filled: {why}", port.name, port.ty),
            format!("--input {}=FILE", port.name),
        )
    };
    let Some(ty) = port.ty.tensor() else { return Err(cannot("it is no tensor".into())) };
    let Some(shape) = &ty.shape else { return Err(cannot("its rank is not known".into())) };
    let dims = shape
        .iter()
        .map(|dim| match dim {
            Dim::Fixed(size) => Ok(*size),
            // A batch or a sequence of one is the common least that every model takes.
            Dim::Symbol(name) => Ok(dimensions.get(name.as_ref()).copied().unwrap_or(1)),
            Dim::Unknown(()) => Ok(1),
        })
        .collect::<Outcome<Vec<usize>>>()?;
    let size = dims.iter().try_fold(ty.dtype.size_bytes() as u64, |n, d| n.checked_mul(*d as u64));
    let size = size
        .map(Bytes)
        .filter(|size| *size <= GENERATED_BYTES_MAX)
        .ok_or_else(|| cannot(format!("shape {dims:?} is larger than {GENERATED_BYTES_MAX}")))?;
    let held = pool.reserve(format!("input {}", port.name), size)?;
    let mut tensor = Tensor::zeros(ty.dtype, &dims);
    let mut scramble = Scramble::new(1 + port.name.bytes().map(u64::from).sum::<u64>());
    let mut unit = || (scramble.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
    match ty.dtype {
        DType::F32 => tensor.as_mut_slice::<f32>().iter_mut().for_each(|x| *x = unit()),
        DType::F64 => tensor.as_mut_slice::<f64>().iter_mut().for_each(|x| *x = unit().into()),
        DType::F16 => {
            tensor.as_mut_slice::<half::f16>().iter_mut().for_each(|x| *x = half::f16::from_f32(unit()))
        }
        DType::BF16 => {
            tensor.as_mut_slice::<half::bf16>().iter_mut().for_each(|x| *x = half::bf16::from_f32(unit()));
        }
        DType::U8 | DType::I8 => {
            tensor.as_bytes_mut().iter_mut().for_each(|x| *x = ((unit() + 1.0) * 128.0) as u8);
        }
        DType::I64 | DType::U64 => tensor.as_mut_slice::<u64>().fill(1),
        DType::I32 | DType::U32 => tensor.as_mut_slice::<u32>().fill(1),
        DType::I16 | DType::U16 => tensor.as_mut_slice::<u16>().fill(1),
        DType::Bool | DType::I4 | DType::U4 => tensor.as_bytes_mut().fill(1),
        other => return Err(cannot(format!("there is no rule for {other}"))),
    }
    Ok(LoadedInput { name: port.name.clone(), value: tensor.into(), held })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightering_graph::TensorType;

    #[test]
    fn quantiles_by_nearest_rank() {
        let times: Vec<Seconds> = (1..=20).map(|i| Seconds(f64::from(i))).collect();
        assert_eq!((quantile(&times, 0.5), quantile(&times, 0.95)), (Seconds(10.0), Seconds(19.0)));
        assert_eq!(quantile(&times[..1], 0.95), Seconds(1.0));
    }

    #[test]
    fn generated_inputs_repeat_and_are_bounded() {
        let pool = MemoryPool::unbounded();
        let ty = TensorType { dtype: DType::F32, shape: Some(vec![Dim::Symbol("n".into()), Dim::Fixed(9)]) };
        let port = Port { name: "x".into(), ty: ty.into() };
        let dims = BTreeMap::from([("n".to_owned(), 2)]);
        let (a, b) = (generate(&port, &dims, &pool).unwrap(), generate(&port, &dims, &pool).unwrap());
        assert_eq!(a.value, b.value);
        let values = a.value.tensor().unwrap().as_slice::<f32>();
        assert_eq!(values.len(), 18);
        assert!(values.iter().all(|x| (-1.0..1.0).contains(x)) && values[0] != values[1]);
        let huge = BTreeMap::from([("n".to_owned(), usize::MAX / 16)]);
        assert!(generate(&port, &huge, &pool).unwrap_err().message().contains("larger than"));
    }
}
