//! Blocks decode and encode as the gguf package does it; `tools/block_golden.py` made the file.

use lightering_kernels::{dequantize_row, quantize_row};
use lightering_units::BlockFormat;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn blocks_are_those_of_the_reference() {
    let (mut decoded, mut encoded) = (0, 0);
    for line in include_str!("golden/blocks.txt").lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let format: BlockFormat = fields[1].parse().unwrap();
        let (data, floats) = (bytes(fields[2]), bytes(fields[3]));
        let floats: Vec<f32> = floats.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if fields[0] == "decode" {
            let mut out = vec![f32::NAN; floats.len()];
            dequantize_row(format, &data, &mut out);
            assert_eq!(out, floats, "{format}");
            decoded += 1;
        } else {
            let mut out = vec![0; data.len()];
            quantize_row(format, &floats, &mut out);
            assert_eq!(out, data, "{format}");
            encoded += 1;
        }
    }
    assert_eq!((decoded, encoded), (14, 6));
}
