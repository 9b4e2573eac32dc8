//! Damaged files: whatever is done to a good file, reading it ends in a result. The fuzz targets do the same for longer.
//!
//! Each test does a fixed number of rounds, the same in every run. `LIGHTER_FUZZ_SECONDS=10` adds ten seconds of new
//! damage to each; a failure names the `LIGHTER_FUZZ_SEED` that repeats it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lightering_formats::image::{Picture, Preprocess};
use lightering_formats::npy;
use lightering_formats::onnx::proto::{Message, TypeProto};
use lightering_formats::onnx::{ModelFile, export, import, read_value, write_value};

/// A small generator (xorshift), so that the damage is the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|p| (p.clone(), std::fs::read(p).unwrap())).collect()
}

fn damage(random: &mut Random, bytes: &[u8], donor: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(out.len());
        // Changes of length break the lengths around them, so most rounds only change bytes.
        match random.below(16) {
            0 => out.truncate(at),
            1..7 if !out.is_empty() => out[at] ^= 1 << random.below(8),
            7..10 if !out.is_empty() => out[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            10..13 if !out.is_empty() && !donor.is_empty() => out[at] = donor[random.below(donor.len())],
            13 => {
                let from = random.below(donor.len());
                let piece = &donor[from..donor.len().min(from + 1 + random.below(40))];
                out.splice(at..at, piece.iter().copied());
            }
            14 => {
                let end = out.len().min(at + 1 + random.below(40));
                out.drain(at..end);
            }
            _ => {
                let end = out.len().min(at + 1 + random.below(40));
                let piece = out[at..end].to_vec();
                let to = random.below(out.len());
                out.splice(to..to, piece);
            }
        }
    }
    out
}

fn check(target: &str, rounds: usize, run: impl Fn(&[u8])) {
    let slow = std::env::var_os("LIGHTER_SLOW").is_some_and(|v| v == "1");
    let rounds = if slow { rounds * 100 } else { rounds };
    let seeds = seeds(target);
    assert!(!seeds.is_empty());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (_, bytes) in &seeds {
        run(bytes);
    }
    let round = |random: &mut Random| {
        let (seed, donor) = (&seeds[random.below(seeds.len())].1, &seeds[random.below(seeds.len())].1);
        run(&damage(random, seed, donor));
    };
    for _ in 0..rounds {
        round(&mut random);
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let began = Instant::now();
    let limit = Duration::from_secs(number("LIGHTER_FUZZ_SECONDS").unwrap_or(0));
    let fresh =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let mut seed = number("LIGHTER_FUZZ_SEED").unwrap_or_else(fresh);
    while began.elapsed() < limit {
        // Seen only when the round fails.
        println!("LIGHTER_FUZZ_SEED={seed}");
        round(&mut Random(seed.max(1)));
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
}

#[test]
fn models() {
    check("onnx_model", 20_000, |bytes| {
        let Ok(file) = ModelFile::from_bytes(bytes.to_vec()) else { return };
        let _ = file.write_to(&mut Vec::new());
        let Ok(imported) = import(&file) else { return };
        imported.graph.verify().unwrap();
        let Ok(model) = export(&imported.graph, &imported.sources) else { return };
        if let Ok(bytes) = model.to_writer(None).and_then(|w| w.into_bytes()) {
            let _ = import(&ModelFile::from_bytes(bytes).unwrap());
        }
    });
}

#[test]
fn test_data() {
    let element = Box::new(TypeProto::Tensor { elem_type: 1, shape: None });
    check("tensor_pb", 10_000, |bytes| {
        let bytes = bytes.to_vec();
        for declared in
            [TypeProto::Unset, TypeProto::Sequence(element.clone()), TypeProto::Optional(element.clone())]
        {
            let Ok(value) = read_value(&bytes, &declared) else { continue };
            let mut out = Vec::new();
            if write_value("v", &value, &mut out).is_ok() {
                read_value(&out, &declared).unwrap();
            }
        }
    });
}

#[test]
fn arrays() {
    check("npy", 10_000, |bytes| {
        let _ = npy::read(&mut &bytes[..]);
    });
    check("npz", 3_000, |bytes| {
        let _ = npy::read_npz(std::io::Cursor::new(bytes));
    });
}

#[test]
fn pictures() {
    let how: Preprocess = "resize=9x7,fit=letterbox,filter=bicubic".parse().unwrap();
    check("image", 2_000, |bytes| {
        let Ok(picture) = Picture::decode(bytes) else { return };
        if u64::from(picture.width()) * u64::from(picture.height()) < 1 << 20 {
            how.apply(&picture).unwrap();
        }
    });
}
