//! From `TensorProto` to host tensors and back.

use lightering_tier::ByteSource;
use lightering_units::DType;

use super::proto::{Payload, TensorData, TensorProto};
use crate::protobuf::{Reader, Span};
use crate::tensor::checked_size;
use crate::{Error, HostTensor, Result, TensorValues};

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

/// Decodes a tensor. Its payload, where it was left in the file, is read from `source`; `external` returns the bytes of
/// a tensor in another file given how many there must be.
pub fn decode_tensor(
    proto: &TensorProto,
    source: &dyn ByteSource,
    external: &dyn Fn(&TensorProto, usize) -> Result<Vec<u8>>,
) -> Result<HostTensor> {
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
        return HostTensor::from_strings(&shape, strings);
    }
    let wanted = raw_size(dtype, count);
    // Nothing is read or allocated before the size of the payload is known to fit the shape.
    let fixed = |payload: &Payload| -> Result<Vec<u8>> {
        if payload.size_bytes() != wanted as u64 {
            return Err(wrong_count(payload.size_bytes(), wanted as u64, "bytes"));
        }
        load(&place, payload, source)
    };
    let varints = |payload: &Payload| -> Result<Vec<u64>> {
        // The typed fields hold one number per element, save that 4-bit elements come in pairs.
        let numbers = if is_four_bit(dtype) { count.div_ceil(2) } else { count };
        if payload.size_bytes() < numbers as u64 || payload.size_bytes() > 10 * numbers as u64 {
            return Err(wrong_count(payload.size_bytes(), numbers as u64, "bytes of varints, at least"));
        }
        let bytes = load(&place, payload, source)?;
        let mut out = Vec::with_capacity(numbers);
        let span = Span { offset: 0, size_bytes: bytes.len() as u64 };
        Reader::new(&bytes).packed_varints(span, |_, v| {
            out.push(v);
            Ok(())
        })?;
        if out.len() != numbers {
            return Err(wrong_count(out.len() as u64, numbers as u64, "numbers"));
        }
        Ok(out)
    };
    let misplaced = |field: &str, expected: &str| {
        Error::invalid(&place, format!("{dtype} elements in {field}"), format!("raw_data or {expected}"))
    };
    let raw = match &proto.data {
        TensorData::Empty if count == 0 => Vec::new(),
        TensorData::Empty => return Err(wrong_count(0, wanted as u64, "bytes")),
        TensorData::Raw(payload) => fixed(payload)?,
        TensorData::External(_) => {
            let bytes = external(proto, wanted)?;
            if bytes.len() != wanted {
                return Err(wrong_count(bytes.len() as u64, wanted as u64, "bytes"));
            }
            bytes
        }
        TensorData::Floats(payload) => match dtype {
            DType::F32 | DType::Complex64 => fixed(payload)?,
            _ => return Err(misplaced("float_data", "the field of that type")),
        },
        TensorData::Doubles(payload) => match dtype {
            DType::F64 | DType::Complex128 => fixed(payload)?,
            _ => return Err(misplaced("double_data", "the field of that type")),
        },
        TensorData::Int32s(payload) => match dtype {
            DType::I32 => varints(payload)?.iter().flat_map(|v| (*v as u32).to_le_bytes()).collect(),
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => {
                varints(payload)?.iter().flat_map(|v| (*v as u16).to_le_bytes()).collect()
            }
            dtype if dtype.size_bytes() == 1 => varints(payload)?.iter().map(|v| *v as u8).collect(),
            _ => return Err(misplaced("int32_data", "the field of that type")),
        },
        TensorData::Int64s(payload) => match dtype {
            DType::I64 => varints(payload)?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => return Err(misplaced("int64_data", "the field of that type")),
        },
        TensorData::Uint64s(payload) => match dtype {
            DType::U64 => varints(payload)?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::U32 => varints(payload)?.iter().flat_map(|v| (*v as u32).to_le_bytes()).collect(),
            _ => return Err(misplaced("uint64_data", "the field of that type")),
        },
        TensorData::Strings(_) => return Err(misplaced("string_data", "the field of that type")),
    };
    HostTensor::from_bytes(dtype, &shape, unpack(dtype, count, raw))
}

/// The in-memory form of raw data: 4-bit pairs spread to bytes, booleans made 0 or 1.
pub(crate) fn unpack(dtype: DType, count: usize, raw: Vec<u8>) -> Vec<u8> {
    match dtype {
        DType::Bool => raw.into_iter().map(|b| u8::from(b != 0)).collect(),
        DType::U4 | DType::F4E2M1 => raw.iter().flat_map(|b| [b & 15, b >> 4]).take(count).collect(),
        // The shift pair extends the sign of the low and of the high half.
        DType::I4 => raw
            .iter()
            .flat_map(|b| [(((b << 4) as i8) >> 4) as u8, ((*b as i8) >> 4) as u8])
            .take(count)
            .collect(),
        _ => raw,
    }
}

/// The raw-data form of in-memory elements.
pub(crate) fn pack(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    if is_four_bit(dtype) {
        bytes.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).unwrap_or(&0) & 15) << 4).collect()
    } else {
        bytes.to_vec()
    }
}

fn load(place: &str, payload: &Payload, source: &dyn ByteSource) -> Result<Vec<u8>> {
    match payload {
        Payload::Inline(bytes) => Ok(bytes.clone()),
        Payload::Span(span) => {
            if span.offset.checked_add(span.size_bytes).is_none_or(|end| end > source.len_bytes().0) {
                return Err(Error::corrupt(place, "its data lies outside of the file"));
            }
            let mut out = vec![0; span.size_bytes as usize];
            source.read_at(span.offset, &mut out).map_err(|e| Error::io(place, e))?;
            Ok(out)
        }
    }
}

/// A tensor as a message, its elements in `raw_data` (texts in `string_data`).
pub fn encode_tensor(name: &str, tensor: &HostTensor) -> TensorProto {
    let data = match tensor.values() {
        TensorValues::Bytes(bytes) if bytes.is_empty() => TensorData::Empty,
        TensorValues::Bytes(bytes) => TensorData::Raw(Payload::Inline(pack(tensor.dtype(), bytes))),
        TensorValues::Strings(strings) => {
            TensorData::Strings(strings.iter().map(|s| s.clone().into_bytes()).collect())
        }
    };
    TensorProto {
        dims: tensor.shape().iter().map(|d| *d as i64).collect(),
        data_type: dtype_to_onnx(tensor.dtype()),
        name: name.to_owned(),
        data,
        metadata_props: Vec::new(),
    }
}
