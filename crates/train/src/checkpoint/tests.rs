use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;

fn state(step: u64, metric: Option<f64>) -> TrainState {
    let position = Position { epoch: 1, batch: step };
    TrainState { step, metric, position, seed: 7, total_steps: 100, ..TrainState::default() }
}

fn tensors() -> Vec<NewTensor> {
    let tensor =
        |name: &str, dtype, dims: &[usize]| NewTensor { name: name.into(), dtype, dims: dims.to_vec() };
    vec![
        tensor("w", DType::F32, &[3, 5]),
        tensor("w:m", DType::F32, &[3, 5]),
        tensor("q", DType::U8, &[1, 260]),
    ]
}

/// Writes the step's number everywhere, in two pieces.
fn fill(step: u64) -> impl FnMut(&NewTensor, &mut dyn Write) -> io::Result<()> {
    move |tensor, out| {
        let size = tensor.dims.iter().product::<usize>() * tensor.dtype.size_bytes();
        out.write_all(&[step as u8; 4])?;
        out.write_all(&vec![step as u8; size - 4])
    }
}

fn save(to: &Checkpoints, step: u64, metric: Option<f64>) -> PathBuf {
    to.save(&state(step, metric), &tensors(), &mut fill(step)).unwrap()
}

fn check_latest(folder: &Checkpoints, step: u64) -> Vec<String> {
    let found = folder.latest_good().unwrap().unwrap();
    assert_eq!(found.checkpoint.state.step, step);
    let mut w = [0; 60];
    found.checkpoint.read("w:m", &mut w).unwrap();
    assert_eq!(w, [step as u8; 60]);
    found.damaged
}

fn bytes_of(step: u64) -> Vec<u8> {
    let mut out = Vec::new();
    write_checkpoint(&state(step, Some(0.25)), &tensors(), &mut out, &mut fill(step)).unwrap();
    out
}

#[test]
fn what_is_saved_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let all = Checkpoints::new(folder.path().join("new"), 2).unwrap();
    assert!(all.latest_good().unwrap().is_none());
    let mut saved = state(3, Some(0.1 + 0.2));
    saved.early_stopping = Some(EarlyStopping::new(3, 1e-3, true));
    saved.extra.insert("scale".into(), serde_json::json!(65536.0));
    all.save(&saved, &tensors(), &mut fill(3)).unwrap();
    let found = all.latest_good().unwrap().unwrap();
    assert_eq!(found.checkpoint.state, saved);
    assert_eq!(found.checkpoint.tensors().count(), 3);
    assert!(check_latest(&all, 3).is_empty());
    let missing = found.checkpoint.read("v", &mut []).unwrap_err().to_string();
    assert!(missing.contains("no tensor \"v\""), "{missing}");
    let size = found.checkpoint.read("w", &mut [0; 8]).unwrap_err().to_string();
    assert!(size.contains("[3, 5]") && size.contains("8 bytes"), "{size}");
}

#[test]
fn the_last_ones_and_the_best_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let all = Checkpoints::new(folder.path(), 2).unwrap();
    for (step, loss) in [(1, 0.9), (2, 0.3), (3, 0.5), (4, 0.4), (5, f64::NAN), (6, 0.6)] {
        save(&all, step, Some(loss));
    }
    let steps: Vec<u64> = all.list().unwrap().iter().map(|(s, _)| *s).collect();
    assert_eq!(steps, [6, 5, 2]);
    assert_eq!(all.best().unwrap().unwrap().state.step, 2);
}

#[test]
fn a_full_disk_leaves_the_old_one() {
    struct Full(usize, Vec<u8>);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.0 - self.1.len();
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let size = room.min(bytes.len());
            self.1.extend(&bytes[..size]);
            Ok(size)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl durable::Output for Full {
        fn sync(&mut self) -> io::Result<()> {
            // As a file system that notices late.
            if self.1.len() == self.0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let all = Checkpoints::new(folder.path(), 1).unwrap();
    save(&all, 1, None);
    for room in 0..=bytes_of(2).len() {
        let open = |_: &Path| Ok(Box::new(Full(room, Vec::new())) as Box<dyn durable::Output>);
        let error = all.save_through(&open, &state(2, None), &tensors(), &mut fill(2)).unwrap_err();
        assert!(error.to_string().contains("step-0000000002"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    check_latest(&all, 1);
    if Path::new("/dev/full").exists() {
        let open = |_: &Path| durable::create(Path::new("/dev/full"));
        assert!(all.save_through(&open, &state(2, None), &tensors(), &mut fill(2)).is_err());
        check_latest(&all, 1);
    }
    let failing = all.save(&state(2, None), &tensors(), &mut |_, _| Err(io::Error::other("no tensor")));
    assert!(failing.unwrap_err().to_string().contains("no tensor"));
    check_latest(&all, 1);
}

#[test]
fn an_interruption_anywhere_leaves_one_that_loads() {
    let folder = tempfile::tempdir().unwrap();
    let all = Checkpoints::new(folder.path(), 2).unwrap();
    save(&all, 1, None);
    let new = bytes_of(2);
    let named = folder.path().join("step-0000000002.safetensors");
    let partial = folder.path().join("step-0000000002.safetensors.partial");
    for end in 0..new.len() {
        // Killed while it was written.
        fs::write(&partial, &new[..end]).unwrap();
        assert!(check_latest(&all, 1).is_empty());
        // The power failed, and the name reached the medium before the content.
        fs::write(&named, &new[..end]).unwrap();
        let damaged = check_latest(&all, 1);
        assert!(damaged.len() == 1 && damaged[0].contains("step-0000000002"), "{damaged:?}");
        fs::remove_file(&named).unwrap();
    }
    fs::write(&named, &new).unwrap();
    check_latest(&all, 2);
    save(&all, 3, None);
    assert!(!partial.exists(), "what a killed training left is removed");
    for (_, path) in all.list().unwrap() {
        fs::write(path, &new[..40]).unwrap();
    }
    let error = all.latest_good().unwrap_err().to_string();
    assert!(error.contains("no checkpoint can be loaded") && error.contains("step-0000000003"), "{error}");
}

const CHILD: &str = "LIGHTER_TEST_CHECKPOINT_FOLDER";

/// Not a test of its own: the process that the next test kills.
#[test]
fn saves_until_it_is_killed() {
    let Some(folder) = std::env::var_os(CHILD) else { return };
    let all = Checkpoints::new(PathBuf::from(folder), 2).unwrap();
    for step in 1.. {
        save(&all, step, None);
    }
}

#[test]
fn a_killed_process_leaves_one_that_loads() {
    for round in 0..8u64 {
        let folder = tempfile::tempdir().unwrap();
        let all = Checkpoints::new(folder.path(), 2).unwrap();
        save(&all, 0, None);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint::tests::saves_until_it_is_killed"])
            .env(CHILD, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The child is in the middle of something after any number of files.
        while all.list().unwrap().first().is_none_or(|(step, _)| *step <= round * 3) {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let newest = all.list().unwrap()[0].0;
        assert!(newest > round * 3);
        assert!(check_latest(&all, newest).is_empty());
    }
}

proptest! {
    #[test]
    fn damage_is_noticed(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4), end: prop::sample::Index) {
        let good = bytes_of(5);
        prop_assert_eq!(check_checkpoint(&good).unwrap(), state(5, Some(0.25)));
        let mut bytes = good.clone();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        bytes.truncate(end.index(bytes.len() * 2).min(bytes.len()));
        prop_assert_eq!(check_checkpoint(&bytes).is_ok(), bytes == good);
    }

    #[test]
    fn states_of_any_text_end_in_a_result(text in "\\PC{0,200}", cut: prop::sample::Index) {
        let _ = TrainState::from_json(&text);
        let json = serde_json::to_string(&state(3, Some(0.5))).unwrap();
        prop_assert!(TrainState::from_json(&json[..cut.index(json.len())]).is_err());
    }
}

#[test]
fn other_versions_are_refused() {
    let json = serde_json::to_string(&state(3, None)).unwrap().replace("\"schema\":1", "\"schema\":2");
    assert!(TrainState::from_json(&json).unwrap_err().to_string().contains("version 2"));
}
