//! Tensors as plain bytes with a shape: the common ground of all engines.

use anyhow::{Result, bail};

/// Element types that occur in the backend cases and that some peer can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    U8,
    I8,
    U16,
    I16,
    I32,
    I64,
    String,
    Bool,
    F16,
    F64,
    U32,
    U64,
    Bf16,
}

impl Dtype {
    /// From the number that ONNX gives the type.
    pub fn from_onnx(code: i32) -> Result<Dtype> {
        Ok(match code {
            1 => Dtype::F32,
            2 => Dtype::U8,
            3 => Dtype::I8,
            4 => Dtype::U16,
            5 => Dtype::I16,
            6 => Dtype::I32,
            7 => Dtype::I64,
            8 => Dtype::String,
            9 => Dtype::Bool,
            10 => Dtype::F16,
            11 => Dtype::F64,
            12 => Dtype::U32,
            13 => Dtype::U64,
            16 => Dtype::Bf16,
            other => bail!("ONNX element type {other} is unsupported by this harness"),
        })
    }

    /// Bytes of one element; 0 for strings.
    pub fn size(self) -> usize {
        match self {
            Dtype::U8 | Dtype::I8 | Dtype::Bool => 1,
            Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::I64 | Dtype::F64 | Dtype::U64 => 8,
            Dtype::String => 0,
        }
    }

    fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::F64 | Dtype::Bf16)
    }
}

/// A dense tensor in row-major order, little-endian.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    pub strings: Vec<String>,
}

/// What a graph takes and gives.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Value {
    Tensor(Tensor),
    Sequence(Vec<Value>),
    Absent,
}

macro_rules! from_vec {
    ($($name:ident $rust:ty, $dtype:ident;)*) => {$(
        /// A tensor from elements.
        pub fn $name(shape: Vec<usize>, data: &[$rust]) -> Tensor {
            let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
            Tensor { dtype: Dtype::$dtype, shape, bytes, strings: Vec::new() }
        }
    )*};
}

impl Tensor {
    from_vec! {
        f32 f32, F32;
        f64 f64, F64;
        i32 i32, I32;
        i64 i64, I64;
        u64 u64, U64;
        i8 i8, I8;
        u8 u8, U8;
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements as integers, for integer and boolean types.
    pub fn to_i64(&self) -> Vec<i64> {
        let s = self.dtype.size();
        let chunk = self.bytes.chunks_exact(s.max(1));
        match self.dtype {
            Dtype::U8 | Dtype::Bool => chunk.map(|b| i64::from(b[0])).collect(),
            Dtype::I8 => chunk.map(|b| i64::from(b[0] as i8)).collect(),
            Dtype::U16 => chunk.map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))).collect(),
            Dtype::I16 => chunk.map(|b| i64::from(i16::from_le_bytes([b[0], b[1]]))).collect(),
            Dtype::I32 => chunk.map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Dtype::U32 => chunk.map(|b| i64::from(u32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Dtype::I64 | Dtype::U64 => chunk.map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect(),
            _ => Vec::new(),
        }
    }

    /// Elements as `f64`, for all numeric types.
    pub fn to_f64(&self) -> Vec<f64> {
        let chunk = self.bytes.chunks_exact(self.dtype.size().max(1));
        match self.dtype {
            Dtype::F32 => chunk.map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
            Dtype::F64 => chunk.map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::F16 => chunk.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            Dtype::Bf16 => chunk.map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            Dtype::U64 => chunk.map(|b| u64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Dtype::String => Vec::new(),
            _ => self.to_i64().into_iter().map(|x| x as f64).collect(),
        }
    }
}

/// `numpy.testing.assert_allclose` with the ONNX backend runner's meaning: same shape, and
/// `|got - expected| <= atol + rtol * |expected|`, NaN equal to NaN, infinities equal to themselves.
pub fn compare(expected: &Value, got: &Value, rtol: f64, atol: f64, strict: bool) -> Result<(), String> {
    match (expected, got) {
        (Value::Absent, Value::Absent) => Ok(()),
        (Value::Sequence(e), Value::Sequence(g)) => {
            if e.len() != g.len() {
                return Err(format!("sequence of {} instead of {}", g.len(), e.len()));
            }
            e.iter().zip(g).try_for_each(|(e, g)| compare(e, g, rtol, atol, strict))
        }
        (Value::Tensor(e), Value::Tensor(g)) => {
            if e.shape != g.shape {
                return Err(format!("shape {:?} instead of {:?}", g.shape, e.shape));
            }
            if strict && e.dtype != g.dtype {
                return Err(format!("type {:?} instead of {:?}", g.dtype, e.dtype));
            }
            if !strict && e.dtype.is_float() != g.dtype.is_float() {
                return Err(format!("type {:?} instead of {:?}", g.dtype, e.dtype));
            }
            if e.dtype == Dtype::String || g.dtype == Dtype::String {
                return if e.strings == g.strings { Ok(()) } else { Err("strings differ".to_owned()) };
            }
            let mut wrong = 0usize;
            let mut first = None;
            for (index, (e, g)) in e.to_f64().into_iter().zip(g.to_f64()).enumerate() {
                let same = e == g || (e.is_nan() && g.is_nan()) || (g - e).abs() <= atol + rtol * e.abs();
                if !same {
                    wrong += 1;
                    first.get_or_insert((index, e, g));
                }
            }
            match first {
                None => Ok(()),
                Some((index, e, g)) => Err(format!(
                    "{wrong} of {} elements differ; element {index} is {g}, expected {e}",
                    expected_len(expected)
                )),
            }
        }
        _ => Err("another kind of value".to_owned()),
    }
}

fn expected_len(value: &Value) -> usize {
    match value {
        Value::Tensor(t) => t.len(),
        _ => 0,
    }
}
