use lightering_graph::{DType, Tensor};
use proptest::prelude::*;

use super::proto::*;
use super::*;
use crate::protobuf::{Span, push_varint};
use crate::{Error, HostValue};

fn raw(dtype: i32, dims: &[i64], bytes: &[u8]) -> TensorProto {
    TensorProto {
        dims: dims.to_vec(),
        data_type: dtype,
        name: "t".into(),
        data: TensorData::Raw(Payload::Inline(bytes.to_vec())),
        ..Default::default()
    }
}

fn decode(proto: &TensorProto) -> crate::Result<Tensor> {
    let nothing: Vec<u8> = Vec::new();
    decode_tensor(proto, &nothing, &|_, _| unreachable!("no external data here"))
}

fn varints(values: &[i64]) -> Payload {
    let mut out = Vec::new();
    values.iter().for_each(|v| push_varint(&mut out, *v as u64));
    Payload::Inline(out)
}

#[test]
fn four_bit_elements_come_in_pairs() {
    let tensor = decode(&raw(22, &[3], &[0x8f, 0x07])).unwrap();
    assert_eq!(tensor.dtype(), DType::I4);
    assert_eq!(tensor.as_bytes(), [0xff, 0xf8, 0x07]);
    let tensor = decode(&raw(21, &[3], &[0x8f, 0x07])).unwrap();
    assert_eq!(tensor.as_bytes(), [15, 8, 7]);
    let mut proto = raw(21, &[3], &[]);
    proto.data = TensorData::Int32s(varints(&[0x8f, 0x07]));
    assert_eq!(decode(&proto).unwrap().as_bytes(), [15, 8, 7]);
}

#[test]
fn typed_fields_hold_their_types() {
    let check = |data_type: i32, data: TensorData, expected: &[u8]| {
        let proto = TensorProto { dims: vec![2], data_type, data, ..Default::default() };
        assert_eq!(decode(&proto).unwrap().as_bytes(), expected, "{data_type}");
    };
    check(10, TensorData::Int32s(varints(&[0x3c00, 0xbc00])), &[0, 0x3c, 0, 0xbc]);
    check(16, TensorData::Int32s(varints(&[0x3f80, 0xbf80])), &[0x80, 0x3f, 0x80, 0xbf]);
    check(3, TensorData::Int32s(varints(&[-1, 5])), &[255, 5]);
    check(9, TensorData::Int32s(varints(&[2, 0])), &[1, 0]);
    check(5, TensorData::Int32s(varints(&[-2, 5])), &[0xfe, 0xff, 5, 0]);
    check(6, TensorData::Int32s(varints(&[-2, 5])), &[0xfe, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
    check(12, TensorData::Uint64s(varints(&[1, 5])), &[1, 0, 0, 0, 5, 0, 0, 0]);
    check(17, TensorData::Int32s(varints(&[0x7f, 0x80])), &[0x7f, 0x80]);
    let pair = [1f32, 2., 3., 4.].map(f32::to_le_bytes).concat();
    check(14, TensorData::Floats(Payload::Inline(pair.clone())), &pair);
    let misplaced = TensorProto {
        dims: vec![2],
        data_type: 7,
        data: TensorData::Int32s(varints(&[1, 2])),
        ..Default::default()
    };
    assert!(matches!(decode(&misplaced), Err(Error::Invalid { .. })));
}

#[test]
fn sizes_are_checked_before_anything_is_allocated() {
    for dims in [vec![-1], vec![i64::MAX, i64::MAX], vec![1 << 40], vec![3]] {
        let error = decode(&raw(1, &dims, &[0; 8])).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. } | Error::Limit { .. }), "{error}");
    }
    let outside = TensorProto {
        dims: vec![1000],
        data_type: 2,
        data: TensorData::Raw(Payload::Span(Span { offset: u64::MAX - 10, size_bytes: 1000 })),
        ..Default::default()
    };
    assert!(matches!(decode(&outside), Err(Error::Corrupt { .. })));
    assert!(matches!(decode(&raw(99, &[1], &[0])), Err(Error::Invalid { .. })));
}

fn sample_model() -> ModelProto {
    let big: Vec<u8> = (0..4000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let scalar = |dim: Vec<Dimension>| TypeProto::Tensor { elem_type: 1, shape: Some(dim) };
    let body = GraphProto {
        node: vec![NodeProto {
            input: vec!["x".into(), "w".into()],
            output: vec!["b".into()],
            op_type: "Add".into(),
            ..Default::default()
        }],
        name: "body".into(),
        output: vec![ValueInfoProto { name: "b".into(), ..Default::default() }],
        ..Default::default()
    };
    let attribute = |name: &str, value| AttributeProto { name: name.into(), value, ..Default::default() };
    let values = vec![
        attribute("f", AttributeValue::Float(1.5)),
        attribute("zero", AttributeValue::Int(0)),
        attribute("i", AttributeValue::Int(-3)),
        attribute("s", AttributeValue::String(b"text".to_vec())),
        attribute("t", AttributeValue::Tensor(Box::new(raw(7, &[1], &[1, 0, 0, 0, 0, 0, 0, 0])))),
        attribute("g", AttributeValue::Graph(Box::new(body))),
        attribute("fs", AttributeValue::Floats(vec![1.0, -2.0])),
        attribute("is", AttributeValue::Ints(vec![1, -1, i64::MAX])),
        attribute("none", AttributeValue::Ints(vec![])),
        attribute("ss", AttributeValue::Strings(vec![b"a".to_vec(), vec![0xff]])),
        attribute("tp", AttributeValue::Type(Box::new(TypeProto::Sequence(Box::new(scalar(vec![])))))),
    ];
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetId { domain: String::new(), version: 17 }],
        producer_name: "test".into(),
        graph: Some(GraphProto {
            node: vec![NodeProto {
                input: vec!["x".into(), String::new(), "w".into()],
                output: vec!["y".into()],
                name: "n".into(),
                op_type: "Thing".into(),
                domain: "d".into(),
                attribute: values,
                ..Default::default()
            }],
            name: "g".into(),
            initializer: vec![TensorProto {
                dims: vec![4000],
                data_type: 1,
                name: "w".into(),
                data: TensorData::Raw(Payload::Inline(big)),
                ..Default::default()
            }],
            input: vec![ValueInfoProto {
                name: "x".into(),
                value_type: scalar(vec![
                    Dimension::Unknown,
                    Dimension::Value(3),
                    Dimension::Param("n".into()),
                ]),
                ..Default::default()
            }],
            output: vec![ValueInfoProto {
                name: "y".into(),
                value_type: TypeProto::Optional(Box::new(TypeProto::Map {
                    key_type: 7,
                    value_type: Box::new(TypeProto::Tensor { elem_type: 1, shape: None }),
                })),
                ..Default::default()
            }],
            ..Default::default()
        }),
        metadata_props: vec![StringStringEntry { key: "k".into(), value: "v".into() }],
        functions: vec![FunctionProto {
            name: "Thing".into(),
            domain: "d".into(),
            input: vec!["a".into()],
            output: vec!["b".into()],
            attribute: vec!["alpha".into()],
            node: vec![NodeProto {
                op_type: "Relu".into(),
                attribute: vec![AttributeProto {
                    name: "x".into(),
                    ref_attr_name: "alpha".into(),
                    value: AttributeValue::Undefined,
                }],
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_model_round_trips_and_its_weights_stay_in_the_file() {
    let model = sample_model();
    let bytes = model.to_writer(None).unwrap().into_bytes().unwrap();
    let file = ModelFile::from_bytes(bytes.clone()).unwrap();
    let weight = &file.model.graph.as_ref().unwrap().initializer[0];
    assert!(matches!(&weight.data, TensorData::Raw(Payload::Span(span)) if span.size_bytes == 16_000));
    let decoded = file.tensor(weight).unwrap().as_slice::<f32>().to_vec();
    assert!(decoded.iter().enumerate().all(|(i, v)| *v == i as f32));
    let (source, span) = file.locate(weight).unwrap().unwrap();
    let mut four = [0; 4];
    source.read_at(span.offset + 40, &mut four).unwrap();
    assert_eq!(f32::from_le_bytes(four), 10.0);
    // Written again, with the weights copied from the source, the bytes are the same.
    let mut again = Vec::new();
    file.write_to(&mut again).unwrap();
    assert_eq!(again, bytes);
    // All else is equal to what was written.
    let mut read = file.model.clone();
    read.graph.as_mut().unwrap().initializer.clear();
    let mut wrote = model;
    wrote.graph.as_mut().unwrap().initializer.clear();
    assert_eq!(read, wrote);
}

#[test]
fn data_in_two_places_is_refused() {
    let mut w = crate::protobuf::Writer::new();
    w.int(1, 1);
    w.int(2, 1);
    w.bytes(4, &[0; 4]);
    w.bytes(9, &[0; 4]);
    let bytes = w.into_bytes().unwrap();
    assert!(matches!(TensorProto::read(&bytes), Err(Error::Invalid { .. })));
}

#[test]
fn numbers_may_come_unpacked_and_in_parts() {
    let mut w = crate::protobuf::Writer::new();
    w.packed_varints(1, [3, 1]);
    w.int(2, 1);
    w.fixed32(4, 1f32.to_bits());
    w.bytes(4, &[2f32.to_le_bytes(), 3f32.to_le_bytes()].concat());
    let bytes = w.into_bytes().unwrap();
    let tensor = decode(&TensorProto::read(&bytes).unwrap()).unwrap();
    assert_eq!((tensor.dims(), tensor.as_slice::<f32>().to_vec()), (&[3, 1][..], vec![1.0, 2.0, 3.0]));
}

#[cfg(unix)]
#[test]
fn external_data_stays_inside_the_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir_all(folder.join("sub")).unwrap();
    let elements: Vec<u8> = [1f32, 2.0, 3.0].map(f32::to_le_bytes).concat();
    std::fs::write(folder.join("sub/w.bin"), &elements).unwrap();
    std::fs::write(outer.path().join("secret.bin"), &elements).unwrap();
    std::os::unix::fs::symlink(outer.path().join("secret.bin"), folder.join("link.bin")).unwrap();
    let open = |location: &str, offset: u64, length: Option<u64>| {
        let mut model = sample_model();
        let weight = &mut model.graph.as_mut().unwrap().initializer[0];
        weight.dims = vec![2];
        weight.data =
            TensorData::External(ExternalData { location: location.into(), offset, length, checksum: None });
        let path = folder.join("m.onnx");
        save_model(&model, None, &path).unwrap();
        let file = ModelFile::open(path).unwrap();
        let tensor = file.tensor(&file.model.graph.as_ref().unwrap().initializer[0]);
        let located = file.locate(&file.model.graph.as_ref().unwrap().initializer[0]);
        assert_eq!(tensor.is_ok(), located.is_ok());
        tensor
    };
    assert_eq!(open("sub/w.bin", 4, Some(8)).unwrap().as_slice::<f32>().to_vec(), [2.0, 3.0]);
    assert_eq!(open("./sub/w.bin", 0, None).unwrap().as_slice::<f32>().to_vec(), [1.0, 2.0]);
    for location in ["../secret.bin", "sub/../../secret.bin", "/etc/passwd", "link.bin", "sub", "a\0b"] {
        let error = open(location, 0, Some(8)).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. } | Error::Io { .. }), "{location}: {error}");
    }
    assert!(matches!(open("sub/w.bin", 8, Some(8)), Err(Error::Invalid { .. })));
    assert!(matches!(open("sub/w.bin", u64::MAX, Some(8)), Err(Error::Invalid { .. })));
    assert!(matches!(open("sub/w.bin", 0, Some(12)), Err(Error::Invalid { .. })));
    assert!(matches!(open("missing.bin", 0, Some(8)), Err(Error::Io { .. })));
}

#[test]
fn weights_may_be_saved_to_a_second_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = sample_model();
    let graph = model.graph.as_mut().unwrap();
    let mut second = graph.initializer[0].clone();
    second.name = "v".into();
    graph.initializer.push(second);
    let one = folder.path().join("one.onnx");
    save_model(&model, None, &one).unwrap();
    // From a file whose weights are spans.
    let read = ModelFile::open(&one).unwrap();
    let two = folder.path().join("two.onnx");
    save_model_external(&read.model, Some(&**read.source()), &two).unwrap();
    assert!(std::fs::metadata(&two).unwrap().len() < 4096);
    assert_eq!(std::fs::metadata(folder.path().join("two.onnx.data")).unwrap().len(), 4 * 4096 + 16_000);
    let again = ModelFile::open(&two).unwrap();
    let (a, b) =
        (&read.model.graph.as_ref().unwrap().initializer, &again.model.graph.as_ref().unwrap().initializer);
    for (a, b) in a.iter().zip(b) {
        assert!(matches!(b.data, TensorData::External(_)));
        assert_eq!(read.tensor(a).unwrap(), again.tensor(b).unwrap());
    }
    // Onto the file that the weights come from.
    save_model(&read.model, Some(&**read.source()), &one).unwrap();
    assert_eq!(ModelFile::open(&one).unwrap().model, read.model);
}

#[test]
fn values_round_trip_as_test_data() {
    let a = HostValue::Tensor(Tensor::from_slice(&[2], &[1f32, 2.0]));
    let s = HostValue::Tensor(Tensor::from_strings(&[1], vec!["x".into()]));
    let keys = Tensor::from_slice(&[1], &[7i64]);
    let tensor_type = TypeProto::Tensor { elem_type: 1, shape: None };
    let cases = [
        (a.clone(), tensor_type.clone()),
        (HostValue::Sequence(vec![a.clone(), s.clone()]), TypeProto::Sequence(Box::new(tensor_type.clone()))),
        (HostValue::Sequence(vec![]), TypeProto::Sequence(Box::new(tensor_type.clone()))),
        (HostValue::Optional(None), TypeProto::Optional(Box::new(tensor_type.clone()))),
        (
            HostValue::Optional(Some(Box::new(HostValue::Sequence(vec![a.clone()])))),
            TypeProto::Optional(Box::new(TypeProto::Sequence(Box::new(tensor_type.clone())))),
        ),
        (
            HostValue::Sequence(vec![HostValue::Map(keys, vec![a])]),
            TypeProto::Sequence(Box::new(TypeProto::Map { key_type: 7, value_type: Box::new(tensor_type) })),
        ),
    ];
    for (value, declared) in cases {
        let mut bytes = Vec::new();
        write_value("v", &value, &mut bytes).unwrap();
        assert_eq!(read_value(&bytes, &declared).unwrap(), value);
    }
}

proptest! {
    #[test]
    fn tensors_round_trip(shape in prop::collection::vec(0usize..6, 0..4), kind in 1i32..24, seed: u8) {
        let dtype = dtype_from_onnx(kind).unwrap();
        let count = shape.iter().product::<usize>();
        let byte = |i: usize| (i as u8).wrapping_mul(31).wrapping_add(seed);
        let tensor = match dtype {
            DType::String => {
                let texts = (0..count).map(|i| format!("{}", byte(i))).collect();
                Tensor::from_strings(&shape, texts)
            }
            DType::Bool => {
                Tensor::from_bytes(dtype, &shape, &(0..count).map(|i| byte(i) & 1).collect::<Vec<u8>>()).unwrap()
            }
            DType::U4 | DType::F4E2M1 => {
                Tensor::from_bytes(dtype, &shape, &(0..count).map(|i| byte(i) & 15).collect::<Vec<u8>>()).unwrap()
            }
            DType::I4 => {
                let bytes: Vec<u8> = (0..count).map(|i| ((byte(i) << 4) as i8 >> 4) as u8).collect();
                Tensor::from_bytes(dtype, &shape, &bytes).unwrap()
            }
            _ => Tensor::from_bytes(dtype, &shape, &(0..count * dtype.size_bytes()).map(byte).collect::<Vec<u8>>()).unwrap(),
        };
        let bytes = encode_tensor("t", &tensor).to_writer(None).unwrap().into_bytes().unwrap();
        let read = read_value(&bytes, &TypeProto::Unset).unwrap();
        prop_assert_eq!(read, HostValue::Tensor(tensor));
    }

    #[test]
    fn a_damaged_model_ends_in_a_result(flips in prop::collection::vec((0usize..1200, any::<u8>()), 1..8), cut in 0usize..1200) {
        let mut model = sample_model();
        model.graph.as_mut().unwrap().initializer[0].dims = vec![40];
        model.graph.as_mut().unwrap().initializer[0].data = TensorData::Raw(Payload::Inline(vec![1; 160]));
        let mut bytes = model.to_writer(None).unwrap().into_bytes().unwrap();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if cut < bytes.len() {
            bytes.truncate(cut.max(1));
        }
        if let Ok(file) = ModelFile::from_bytes(bytes) {
            for tensor in file.model.graph.iter().flat_map(|g| &g.initializer) {
                let _ = file.tensor(tensor);
            }
            let _ = file.write_to(&mut Vec::new());
        }
    }
}
