//! From `TensorProto` to host tensors and back.

use lightering_graph::{DType, Tensor};
use lightering_tier::ByteSource;

use super::proto::{Payload, TensorData, TensorProto};
use crate::protobuf::{Reader, Span};
use crate::tensor::checked_size;
use crate::{Error, Result};

/// The element type with ONNX's number.
pub fn dtype_from_onnx(number: i32) -> Option<DType> {
    Some(match number {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        8 => DType::String,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        14 => DType::Complex64,
        15 => DType::Complex128,
        16 => DType::BF16,
        17 => DType::F8E4M3FN,
        18 => DType::F8E4M3FNUZ,
        19 => DType::F8E5M2,
        20 => DType::F8E5M2FNUZ,
        21 => DType::U4,
        22 => DType::I4,
        23 => DType::F4E2M1,
        _ => return None,
    })
}

/// ONNX's number of an element type.
pub fn dtype_to_onnx(dtype: DType) -> i32 {
    (1..24).find(|n| dtype_from_onnx(*n) == Some(dtype)).expect("every DType has an ONNX number")
}

fn is_four_bit(dtype: DType) -> bool {
    matches!(dtype, DType::U4 | DType::I4 | DType::F4E2M1)
}

/// The element type and shape that a tensor declares, checked.
pub(crate) fn tensor_type(proto: &TensorProto) -> Result<(DType, Vec<usize>)> {
    let place = format!("tensor {:?}", proto.name);
    let dtype = dtype_from_onnx(proto.data_type).ok_or_else(|| {
        Error::invalid(&place, format!("element type {}", proto.data_type), "an element type from 1 to 23")
    })?;
    let shape = proto
        .dims
        .iter()
        .map(|&d| {
            usize::try_from(d)
                .map_err(|_| Error::invalid(&place, format!("dimension {d}"), "a dimension of 0 or more"))
        })
        .collect::<Result<Vec<_>>>()?;
    checked_size(&place, dtype, &shape)?;
    Ok((dtype, shape))
}

/// Bytes of raw data that hold `count` elements.
pub(crate) fn raw_size(dtype: DType, count: usize) -> usize {
    if is_four_bit(dtype) { count.div_ceil(2) } else { count * dtype.size_bytes() }
}

/// Where a tensor's elements stand in the model's file exactly as they are in memory, if they do.
pub(crate) fn direct_span(proto: &TensorProto, dtype: DType) -> Option<Span> {
    match (&proto.data, dtype) {
        (_, DType::Bool) => None,
        (TensorData::Raw(Payload::Span(span)), dtype) if !is_four_bit(dtype) => Some(*span),
        (TensorData::Floats(Payload::Span(span)), DType::F32 | DType::Complex64)
        | (TensorData::Doubles(Payload::Span(span)), DType::F64 | DType::Complex128) => Some(*span),
        _ => None,
    }
}

/// How [`decode_tensor`] reads the raw data of a tensor in another file: fills the buffer, which has the size that the
/// type and shape ask for.
pub type ReadExternal<'a> = &'a dyn Fn(&TensorProto, &mut [u8]) -> Result<()>;

/// Decodes a tensor. Its payload, where it was left in the file, is read from `source`, and that of a tensor in another
/// file through `external`.
pub fn decode_tensor(proto: &TensorProto, source: &dyn ByteSource, external: ReadExternal) -> Result<Tensor> {
    let (dtype, shape) = tensor_type(proto)?;
    let place = format!("tensor {:?}", proto.name);
    let (count, _) = checked_size(&place, dtype, &shape)?;
    let wrong_count = |found: u64, wanted: u64, unit: &str| {
        Error::invalid(
            &place,
            format!("{found} {unit} for {dtype} elements of shape {shape:?}"),
            format!("{wanted} {unit}"),
        )
    };
    if dtype == DType::String {
        let strings = match &proto.data {
            TensorData::Strings(strings) => strings.as_slice(),
            TensorData::Empty => &[],
            _ => {
                return Err(Error::invalid(&place, "texts that are not in string_data", "string_data"));
            }
        };
        if strings.len() != count {
            return Err(wrong_count(strings.len() as u64, count as u64, "texts"));
        }
        let strings = strings
            .iter()
            .map(|s| {
                String::from_utf8(s.clone()).map_err(|_| Error::corrupt(&place, "a text is not valid UTF-8"))
            })
            .collect::<Result<Vec<_>>>()?;
        return Ok(Tensor::from_strings(&shape, strings));
    }
    let wanted = raw_size(dtype, count);
    // Nothing is read or allocated before the size of the payload is known to fit the shape.
    let fixed = |payload: &Payload| -> Result<Tensor> {
        if payload.size_bytes() != wanted as u64 {
            return Err(wrong_count(payload.size_bytes(), wanted as u64, "bytes"));
        }
        from_raw(dtype, &shape, &mut |bytes| load(&place, payload, source, bytes))
    };
    let varints = |payload: &Payload, put: fn(u64, &mut [u8])| -> Result<Tensor> {
        // The typed fields hold one number per element, save that 4-bit elements come in pairs.
        let numbers = if is_four_bit(dtype) { count.div_ceil(2) } else { count };
        let size = payload.size_bytes();
        if size < numbers as u64 || size > 10 * numbers as u64 {
            return Err(wrong_count(size, numbers as u64, "bytes of varints, at least"));
        }
        from_raw(dtype, &shape, &mut |raw| {
            let mut bytes = vec![0; size as usize];
            load(&place, payload, source, &mut bytes)?;
            let mut found = 0;
            let mut slots = raw.chunks_exact_mut(if is_four_bit(dtype) { 1 } else { dtype.size_bytes() });
            Reader::new(&bytes).packed_varints(Span { offset: 0, size_bytes: size }, |_, v| {
                found += 1;
                if let Some(slot) = slots.next() {
                    put(v, slot);
                }
                Ok(())
            })?;
            if found == numbers { Ok(()) } else { Err(wrong_count(found as u64, numbers as u64, "numbers")) }
        })
    };
    /// The low bytes of a number: two's complement narrows without a look at the sign.
    fn low(value: u64, slot: &mut [u8]) {
        let width = slot.len();
        slot.copy_from_slice(&value.to_le_bytes()[..width]);
    }
    let misplaced = |field: &str| {
        Error::invalid(&place, format!("{dtype} elements in {field}"), "raw_data or the field of that type")
    };
    match &proto.data {
        TensorData::Empty if count == 0 => Ok(Tensor::zeros(dtype, &shape)),
        TensorData::Empty => Err(wrong_count(0, wanted as u64, "bytes")),
        TensorData::Raw(payload) => fixed(payload),
        TensorData::External(_) => from_raw(dtype, &shape, &mut |bytes| external(proto, bytes)),
        TensorData::Floats(payload) => match dtype {
            DType::F32 | DType::Complex64 => fixed(payload),
            _ => Err(misplaced("float_data")),
        },
        TensorData::Doubles(payload) => match dtype {
            DType::F64 | DType::Complex128 => fixed(payload),
            _ => Err(misplaced("double_data")),
        },
        TensorData::Int32s(payload) => match dtype {
            DType::I32 | DType::I16 | DType::U16 | DType::F16 | DType::BF16 => varints(payload, low),
            // Any value but 0 is true, so the low byte alone would not do.
            DType::Bool => varints(payload, |v, slot| slot[0] = u8::from(v != 0)),
            dtype if dtype.size_bytes() == 1 => varints(payload, low),
            _ => Err(misplaced("int32_data")),
        },
        TensorData::Int64s(payload) => match dtype {
            DType::I64 => varints(payload, low),
            _ => Err(misplaced("int64_data")),
        },
        TensorData::Uint64s(payload) => match dtype {
            DType::U64 | DType::U32 => varints(payload, low),
            _ => Err(misplaced("uint64_data")),
        },
        TensorData::Strings(_) => Err(misplaced("string_data")),
    }
}

/// A tensor whose raw data `fill` provides; 4-bit pairs are spread to bytes and booleans made 0 or 1.
fn from_raw(dtype: DType, shape: &[usize], fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(dtype, shape);
    if !is_four_bit(dtype) {
        fill(tensor.as_bytes_mut())?;
        if dtype == DType::Bool {
            tensor.as_bytes_mut().iter_mut().for_each(|b| *b = u8::from(*b != 0));
        }
        return Ok(tensor);
    }
    let mut raw = vec![0; raw_size(dtype, tensor.len())];
    fill(&mut raw)?;
    // The shift pair extends the sign of the low and of the high half.
    let split: fn(u8) -> [u8; 2] = match dtype {
        DType::I4 => |b| [(((b << 4) as i8) >> 4) as u8, ((b as i8) >> 4) as u8],
        _ => |b| [b & 15, b >> 4],
    };
    let halves = raw.iter().flat_map(|b| split(*b));
    tensor.as_bytes_mut().iter_mut().zip(halves).for_each(|(out, half)| *out = half);
    Ok(tensor)
}

/// The raw-data form of in-memory elements.
pub(crate) fn pack(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    if is_four_bit(dtype) {
        bytes.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).unwrap_or(&0) & 15) << 4).collect()
    } else {
        bytes.to_vec()
    }
}

fn load(place: &str, payload: &Payload, source: &dyn ByteSource, out: &mut [u8]) -> Result<()> {
    let source = match payload {
        Payload::Stored(store, _) => &*store.0,
        _ => source,
    };
    match payload {
        Payload::Inline(bytes) => out.copy_from_slice(bytes),
        Payload::Span(span) | Payload::Stored(_, span) => {
            source.read_at(span.offset, out).map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    Error::corrupt(place, "its data lies outside of the file")
                }
                _ => Error::io(place, e),
            })?;
        }
    }
    Ok(())
}

/// A tensor as a message, its elements in `raw_data` (texts in `string_data`).
pub fn encode_tensor(name: &str, tensor: &Tensor) -> TensorProto {
    let data = if tensor.is_empty() {
        TensorData::Empty
    } else if tensor.dtype() == DType::String {
        TensorData::Strings(tensor.as_strings().iter().map(|s| s.clone().into_bytes()).collect())
    } else {
        TensorData::Raw(Payload::Inline(pack(tensor.dtype(), tensor.as_bytes())))
    };
    TensorProto {
        dims: tensor.dims().iter().map(|d| *d as i64).collect(),
        data_type: dtype_to_onnx(tensor.dtype()),
        name: name.to_owned(),
        data,
        metadata_props: Vec::new(),
    }
}
