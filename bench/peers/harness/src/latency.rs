//! One model in one process: time of load and of each run, CPU time, peak memory, outputs.

use crate::{Engine, Value, options, read_npy, write_npy};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Peak resident bytes of this process as the kernel counts them.
pub fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().nth(1)).and_then(|v| v.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn cpu_seconds() -> f64 {
    // SAFETY: getrusage writes the whole structure that is handed to it and keeps no pointer.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

pub fn main<E: Engine>(arguments: &[String]) -> Result<()> {
    let (positional, named) = options(arguments)?;
    let [model] = positional.as_slice() else { bail!("one MODEL") };
    let mut inputs = Vec::new();
    let (mut threads, mut warmup, mut runs, mut output_dir) = (1usize, 3usize, 10usize, None);
    for (name, value) in &named {
        match name.as_str() {
            "input" => {
                let (name, file) = value.split_once('=').context("--input NAME=FILE.npy")?;
                inputs.push((name.to_owned(), Value::Tensor(read_npy(Path::new(file))?)));
            }
            "threads" => threads = value.parse()?,
            "warmup" => warmup = value.parse()?,
            "runs" => runs = value.parse()?,
            "output-dir" => output_dir = Some(PathBuf::from(value)),
            other => bail!("unknown option --{other}"),
        }
    }
    let fixed_bytes = peak_resident_bytes();
    let start = Instant::now();
    let mut engine = E::load(Path::new(model), &inputs, threads, 0)?;
    let load_seconds = start.elapsed().as_secs_f64();
    for _ in 0..warmup {
        engine.run()?;
    }
    let cpu = cpu_seconds();
    let mut run_seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        engine.run()?;
        run_seconds.push(start.elapsed().as_secs_f64());
    }
    let cpu_seconds = (cpu_seconds() - cpu) / runs.max(1) as f64;
    let peak_resident_bytes = peak_resident_bytes();
    let mut files = serde_json::Map::new();
    if let Some(dir) = output_dir {
        std::fs::create_dir_all(&dir)?;
        for (index, (name, value)) in engine.outputs()?.iter().enumerate() {
            if let Value::Tensor(tensor) = value {
                let path = dir.join(format!("{index}.npy"));
                write_npy(&path, tensor)?;
                files.insert(name.clone(), path.display().to_string().into());
            }
        }
    }
    let report = serde_json::json!({
        "engine": E::NAME, "version": E::VERSION, "model": model, "threads": threads,
        "load_seconds": load_seconds, "run_seconds": run_seconds, "cpu_seconds_per_run": cpu_seconds,
        "fixed_resident_bytes": fixed_bytes, "peak_resident_bytes": peak_resident_bytes, "outputs": files,
    });
    println!("{report}");
    Ok(())
}
