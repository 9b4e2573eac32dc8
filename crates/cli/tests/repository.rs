//! Rules of the repository that are checked rather than remembered.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository root exists")
}

/// The floor of every crate; an arrow may only point to a lower one.
const FLOORS: [(&str, u32); 11] = [
    ("units", 0),
    ("meter", 0),
    ("graph", 1),
    ("kernels", 1),
    ("tier", 1),
    ("formats", 2),
    ("engine", 2),
    ("train", 3),
    ("lm", 4),
    ("server", 5),
    ("cli", 6),
];

/// Arrows within a floor that are wanted, each with its reason in ARCHITECTURE.md.
const SIDEWAYS: [(&str, &str); 1] = [("meter", "units")];

#[test]
fn layers_point_down() {
    let floors: BTreeMap<&str, u32> = FLOORS.into_iter().collect();
    let mut crates = 0;
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let floor =
            *floors.get(name.as_str()).unwrap_or_else(|| panic!("crate {name} has no floor in this test"));
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        // Tests may look anywhere; only what ships has layers.
        let shipped = manifest.split("[dev-dependencies]").next().unwrap();
        for line in shipped.lines() {
            let Some(rest) = line.trim().strip_prefix("lightering-") else { continue };
            let target = rest.split(['.', ' ', '=']).next().unwrap();
            let below = floors[target] < floor || SIDEWAYS.contains(&(name.as_str(), target));
            assert!(below, "crate {name} (floor {floor}) depends on {target} (floor {})", floors[target]);
        }
        crates += 1;
    }
    assert_eq!(crates, FLOORS.len(), "a crate of the table is missing");
}

fn sources(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !matches!(name, "target" | ".git" | "corpus" | "artifacts") {
            sources(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

#[test]
fn modules_are_named_after_what_they_hold() {
    let mut files = Vec::new();
    sources(&root().join("crates"), "rs", &mut files);
    assert!(files.len() > 20);
    for file in files {
        let stem = file.file_stem().unwrap().to_str().unwrap();
        assert!(!matches!(stem, "utils" | "util" | "helpers" | "common" | "misc"), "{}", file.display());
    }
}

#[test]
fn only_kernels_and_tier_use_unsafe() {
    let mut files = Vec::new();
    sources(&root().join("crates"), "rs", &mut files);
    for file in files.iter().filter(|f| f.ends_with("src/lib.rs") || f.ends_with("src/main.rs")) {
        let text = fs::read_to_string(file).unwrap();
        let path = file.display().to_string();
        let may = path.contains("/kernels/") || path.contains("/tier/");
        assert!(may || text.contains("#![forbid(unsafe_code)]"), "{path} does not forbid unsafe code");
    }
}

#[test]
fn documents_name_files_that_exist() {
    let root = root();
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root.join(document)).unwrap_or_else(|e| panic!("{document}: {e}"));
        for part in text.split("](").skip(1) {
            let target = part.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(root.join(target).exists(), "{document} links to {target}, which does not exist");
        }
    }
}
