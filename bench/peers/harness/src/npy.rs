//! NumPy's .npy files, version 1.0, in row-major order.

use crate::value::{Dtype, Tensor};
use anyhow::{Context, Result, bail};
use std::path::Path;

/// Reads one array.
pub fn read_npy(path: &Path) -> Result<Tensor> {
    let file = std::fs::read(path).with_context(|| path.display().to_string())?;
    if file.len() < 10 || &file[..6] != b"\x93NUMPY" || file[6] != 1 {
        bail!("{}: not a version 1 .npy file", path.display());
    }
    let end = 10 + usize::from(u16::from_le_bytes([file[8], file[9]]));
    let header = String::from_utf8_lossy(&file[10..end]).into_owned();
    if header.contains("'fortran_order': True") {
        bail!("{}: column-major", path.display());
    }
    let after = |key: &str| header.split_once(key).map(|(_, rest)| rest).context("broken .npy header");
    let descr = after("'descr': '")?.split('\'').next().unwrap_or_default().to_owned();
    let dtype = match descr.as_str() {
        "<f4" => Dtype::F32,
        "<f8" => Dtype::F64,
        "<f2" => Dtype::F16,
        "|u1" => Dtype::U8,
        "|i1" => Dtype::I8,
        "|b1" => Dtype::Bool,
        "<i4" => Dtype::I32,
        "<i8" => Dtype::I64,
        other => bail!("{}: element type {other}", path.display()),
    };
    let shape = after("'shape': (")?.split(')').next().unwrap_or_default();
    let shape: Vec<usize> = shape
        .split(',')
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    Ok(Tensor { dtype, shape, bytes: file[end..].to_vec(), strings: Vec::new() })
}

/// Writes one array.
pub fn write_npy(path: &Path, tensor: &Tensor) -> Result<()> {
    let descr = match tensor.dtype {
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
        Dtype::F16 => "<f2",
        Dtype::U8 => "|u1",
        Dtype::I8 => "|i1",
        Dtype::Bool => "|b1",
        Dtype::I32 => "<i4",
        Dtype::I64 => "<i8",
        other => bail!("{other:?} has no .npy form here"),
    };
    let shape: String = tensor.shape.iter().map(|d| format!("{d},")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(&tensor.bytes);
    std::fs::write(path, file).with_context(|| path.display().to_string())
}
