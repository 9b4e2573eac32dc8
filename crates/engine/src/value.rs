use lightering_graph::{DType, Tensor, TensorType, ValueType};

/// What a graph value holds while the graph runs outside the arena: inputs, outputs, and everything whose size
/// nobody knows beforehand.
#[derive(Clone, Debug, PartialEq)]
pub enum RuntimeValue {
    /// A tensor.
    Tensor(Tensor),
    /// A list; the type is that of its elements, which an empty list still has.
    Sequence(ValueType, Vec<RuntimeValue>),
    /// A value that may be absent; the type is that of the content.
    Optional(ValueType, Option<Box<RuntimeValue>>),
    /// Keys and values side by side; keys are `i64` or text.
    Map(Tensor, Tensor),
}

impl RuntimeValue {
    /// The tensor, if this is one.
    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            RuntimeValue::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// The type of this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            RuntimeValue::Tensor(t) => t.tensor_type().into(),
            RuntimeValue::Sequence(ty, _) => ValueType::Sequence(Box::new(ty.clone())),
            RuntimeValue::Optional(ty, _) => ValueType::Optional(Box::new(ty.clone())),
            RuntimeValue::Map(k, v) => ValueType::Map { key: k.dtype(), value: v.dtype() },
        }
    }

    /// A list of tensors of one element type.
    pub fn tensor_sequence(dtype: DType, tensors: Vec<Tensor>) -> RuntimeValue {
        RuntimeValue::Sequence(
            TensorType::unranked(dtype).into(),
            tensors.into_iter().map(RuntimeValue::Tensor).collect(),
        )
    }
}

impl From<Tensor> for RuntimeValue {
    fn from(t: Tensor) -> RuntimeValue {
        RuntimeValue::Tensor(t)
    }
}
