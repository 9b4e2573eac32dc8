use proptest::prelude::*;

use super::*;
use crate::Error;

/// A file with every type of value and several formats.
fn sample() -> (Vec<u8>, Metadata) {
    let mut writer = GgufWriter::new();
    let texts = || Array::Strings(vec!["a".into(), String::new(), "größer".into()]);
    for (key, value) in [
        ("general.architecture", Value::from("llama")),
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-3)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-300)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-5)),
        ("f32", Value::F32(0.5)),
        ("bool", Value::Bool(true)),
        ("u64", Value::U64(1 << 40)),
        ("i64", Value::I64(-(1 << 40))),
        ("f64", Value::F64(0.1)),
        ("texts", Value::Array(texts())),
        ("scores", Value::Array(Array::F32(vec![-1.0, 0.0, 3.5]))),
        ("kinds", Value::Array(Array::I32(vec![1, -1]))),
        ("flags", Value::Array(Array::Bool(vec![true, false]))),
        ("bytes", Value::Array(Array::U8(vec![1, 2, 3]))),
        ("wide", Value::Array(Array::U64(vec![7, 8]))),
        ("nested", Value::Array(Array::Arrays(vec![texts(), Array::I16(vec![3])]))),
    ] {
        writer.set(key, value).unwrap();
    }
    writer.tensor("token_embd.weight", &[256, 3], BlockFormat::Q4_K).unwrap();
    writer.tensor("norm", &[5], BlockFormat::F32).unwrap();
    writer.tensor("scalar", &[], BlockFormat::F16).unwrap();
    writer.tensor("experts", &[32, 2, 2], BlockFormat::MXFP4).unwrap();
    let metadata = writer.metadata.clone();
    let mut data = writer.begin(Vec::new()).unwrap();
    let mut byte = 0u8;
    while let Some(tensor) = data.next_tensor() {
        let piece: Vec<u8> = (0..tensor.size.0)
            .map(|_| {
                byte = byte.wrapping_add(1);
                byte
            })
            .collect();
        let (head, tail) = piece.split_at(piece.len() / 3);
        data.write(head).unwrap();
        data.write(tail).unwrap();
    }
    (data.finish().unwrap(), metadata)
}

#[test]
fn files_round_trip() {
    let (bytes, metadata) = sample();
    let file = GgufFile::read(&bytes).unwrap();
    assert_eq!(file.metadata, metadata);
    assert_eq!(file.version, 3);
    let sizes: Vec<u64> = file.tensors.iter().map(|t| t.size.0).collect();
    assert_eq!(sizes, [3 * 144, 20, 2, 4 * 17]);
    let experts = file.tensor("experts").unwrap();
    assert_eq!((experts.row_len(), experts.rows(), experts.format), (32, 4, BlockFormat::MXFP4));
    assert!(file.tensor("absent").is_none());
    // The data of the tensors counts on across their borders.
    let first = (3 * 144u64) as u8;
    assert_eq!(bytes[file.tensor("norm").unwrap().offset as usize], first.wrapping_add(1));
    for tensor in &file.tensors {
        assert!(tensor.offset.is_multiple_of(32) && tensor.offset >= file.data_offset);
    }
}

#[test]
fn getters_name_the_key_and_what_stands_there() {
    let (bytes, _) = sample();
    let m = GgufFile::read(&bytes).unwrap().metadata;
    assert_eq!(m.get_u64("u32").unwrap(), Some(4_000_000_000));
    assert_eq!(m.get_u64("absent").unwrap(), None);
    assert_eq!(m.get_f32("f32").unwrap(), Some(0.5));
    assert_eq!(m.get_bool("bool").unwrap(), Some(true));
    assert_eq!(m.get_strings("texts").unwrap().unwrap()[2], "größer");
    assert_eq!(m.get_f32s("scores").unwrap().unwrap(), [-1.0, 0.0, 3.5]);
    assert_eq!(m.get_i32s("kinds").unwrap().unwrap(), [1, -1]);
    assert_eq!(m.get_u64s("wide").unwrap().unwrap(), [7, 8]);
    for (error, parts) in [
        (m.get_u64("i32").unwrap_err(), ["\"i32\"", "-5"]),
        (m.get_str("texts").unwrap_err(), ["\"texts\"", "array of 3 string"]),
        (m.get_u64s("kinds").unwrap_err(), ["\"kinds\"", "array of 2 i32"]),
        (m.require_str("tokenizer.ggml.model").unwrap_err(), ["tokenizer.ggml.model", "missing"]),
    ] {
        let text = error.to_string();
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let (bytes, _) = sample();
    // The last tensor's padding may be missing, its data may not.
    let last = GgufFile::read(&bytes).unwrap().tensors.iter().map(|t| t.offset + t.size.0).max().unwrap();
    for end in 0..last as usize {
        let error = GgufFile::read(&bytes[..end].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{end}: {error}");
    }
    GgufFile::read(&bytes[..last as usize].to_vec()).unwrap();
}

/// A version 3 header of one tensor behind one key `general.alignment` = 32.
fn one_tensor(dims: &[u64], ggml: u32, offset: u64, data: usize) -> Vec<u8> {
    two_tensors(&[("t", dims, ggml, offset)], data)
}

fn two_tensors(tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.extend(17u64.to_le_bytes());
    out.extend(b"general.alignment");
    out.extend(4u32.to_le_bytes());
    out.extend(32u32.to_le_bytes());
    for (name, dims, ggml, offset) in tensors {
        out.extend((name.len() as u64).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(ggml.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

#[track_caller]
fn refused(bytes: Vec<u8>, part: &str) {
    let error = GgufFile::read(&bytes).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn lying_tensors_are_refused() {
    GgufFile::read(&one_tensor(&[32], 2, 0, 18)).unwrap();
    refused(one_tensor(&[33], 2, 0, 18), "33 elements");
    refused(one_tensor(&[32], 2, 0, 17), "pass the end");
    refused(one_tensor(&[32], 2, 8, 64), "no multiple of 32");
    refused(one_tensor(&[32], 2, u64::MAX - 31, 64), "pass the end");
    refused(one_tensor(&[32, u64::MAX / 16], 2, 0, 64), "overflows");
    refused(one_tensor(&[u64::MAX], 0, 0, 64), "tensor \"t\"");
    refused(one_tensor(&[32, 0], 2, 0, 64), "is 0");
    refused(one_tensor(&[1; 5], 0, 0, 64), "number of dimensions");
    refused(one_tensor(&[256], 16, 0, 640), "tensor \"t\": ggml type 16 (IQ2_XXS) is not supported");
    refused(one_tensor(&[256], 4, 0, 640), "ggml type 4 is not supported");
    refused(two_tensors(&[("a", &[32], 2, 0), ("a", &[32], 2, 32)], 64), "two tensors have this name");
    refused(two_tensors(&[("a", &[32, 2], 2, 0), ("b", &[32], 2, 32)], 64), "overlaps that of tensor \"a\"");
}

#[test]
fn lying_headers_are_refused() {
    let good = one_tensor(&[32], 2, 0, 18);
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    refused(patched(0, b"GGML"), "GGML");
    refused(patched(4, &[0, 0, 0, 3]), "big-endian");
    refused(patched(4, &[1]), "version 1");
    refused(patched(4, &[4]), "version 4");
    refused(patched(8, &[0xff; 8]), "tensors do not fit");
    refused(patched(16, &[0xff; 8]), "number of metadata keys");
    refused(patched(24, &[0xff; 8]), "length in bytes of a key");
    refused(patched(32, &[0xff]), "not valid UTF-8");
    refused(patched(49, &[13]), "value type 13");
    refused(patched(53, &[33]), "a power of two");
    refused(patched(53, &[0]), "a power of two");
    refused(patched(49, &[8]), "metadata key \"general.alignment\"");
}

#[test]
fn deep_arrays_are_refused() {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(0u64.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.extend(b"k");
    for _ in 0..1000 {
        out.extend(9u32.to_le_bytes());
        out.extend(1u64.to_le_bytes());
    }
    // The count of the first array lies behind its element type.
    out.splice(33..33, 9u32.to_le_bytes());
    refused(out, "nesting of arrays");
}

#[test]
fn doubled_keys_are_refused() {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(0u64.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    for _ in 0..2 {
        out.extend(1u64.to_le_bytes());
        out.extend(b"k");
        out.extend(0u32.to_le_bytes());
        out.push(7);
    }
    refused(out, "it stands twice");
}

#[test]
fn the_writer_refuses_what_no_reader_takes() {
    let mut writer = GgufWriter::new();
    assert!(writer.tensor("t", &[100], BlockFormat::Q4_K).is_err());
    writer.tensor("t", &[256], BlockFormat::Q4_K).unwrap();
    assert!(writer.tensor("t", &[256], BlockFormat::Q4_K).is_err());
    let mut data = writer.clone().begin(Vec::new()).unwrap();
    assert!(data.write(&[0; 145]).is_err());
    data.write(&[0; 100]).unwrap();
    assert!(data.finish().unwrap_err().to_string().contains("144 bytes"));
    writer.set("general.alignment", Value::U32(48)).unwrap();
    assert!(writer.begin(Vec::new()).is_err());
}

proptest! {
    #[test]
    fn damaged_files_end_in_a_result(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6), end: prop::sample::Index) {
        let (mut bytes, _) = sample();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let cut = end.index(bytes.len() * 2).min(bytes.len());
        bytes.truncate(cut);
        if let Ok(file) = GgufFile::read(&bytes) {
            for tensor in &file.tensors {
                prop_assert!(tensor.offset + tensor.size.0 <= bytes.len() as u64);
            }
        }
    }

    #[test]
    fn any_bytes_end_in_a_result(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        let _ = GgufFile::read(&bytes);
    }
}
