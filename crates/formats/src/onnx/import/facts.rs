//! What the import itself must know of values: element type and rank, where some operator's old or composed spelling
//! depends on them. Full inference is the graph's business; what is not known here is no error.

use lightering_graph::{BinaryOp, DType, MlOp, Op, UnaryOp, ValueType};

/// Element type (of the elements, for a sequence) and rank, as far as known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fact {
    pub dtype: Option<DType>,
    pub rank: Option<usize>,
}

impl Fact {
    pub fn of(ty: &ValueType) -> Fact {
        match ty {
            ValueType::Tensor(t) => Fact { dtype: Some(t.dtype), rank: t.shape.as_ref().map(Vec::len) },
            ValueType::Sequence(inner) | ValueType::Optional(inner) => {
                Fact { dtype: Fact::of(inner).dtype, rank: None }
            }
            ValueType::Map { .. } | ValueType::Unknown => Fact::default(),
        }
    }

    fn new(dtype: DType, rank: Option<usize>) -> Fact {
        Fact { dtype: Some(dtype), rank }
    }

    fn unranked(self) -> Fact {
        Fact { rank: None, ..self }
    }

    fn with_rank(self, rank: Option<usize>) -> Fact {
        Fact { rank, ..self }
    }
}

/// The most outputs that an operator has.
pub(super) fn output_count(op: &Op) -> usize {
    match op {
        Op::Split { .. } | Op::If { .. } | Op::Loop { .. } | Op::Scan { .. } | Op::SequenceMap { .. } => {
            usize::MAX
        }
        Op::Dropout { .. } | Op::Pool(_) | Op::TopK { .. } | Op::StringSplit { .. } => 2,
        Op::SoftmaxCrossEntropyLoss(_) | Op::Rnn(_) | Op::Gru(_) => 2,
        Op::BatchNorm { .. } | Op::LayerNorm { .. } | Op::Lstm(_) | Op::DynamicQuantizeLinear => 3,
        Op::Attention(_) | Op::Unique { .. } => 4,
        Op::Ml(op) => match **op {
            MlOp::LinearClassifier { .. }
            | MlOp::SvmClassifier { .. }
            | MlOp::TreeEnsembleClassifier { .. } => 2,
            _ => 1,
        },
        _ => 1,
    }
}

fn broadcast(ranks: impl Iterator<Item = Option<usize>>) -> Option<usize> {
    ranks.reduce(|a, b| Some(a?.max(b?))).flatten()
}

/// What is known of output `index` of `op`.
pub(super) fn infer(op: &Op, inputs: &[Fact], index: usize) -> Fact {
    let input = |i: usize| inputs.get(i).copied().unwrap_or_default();
    let x = input(0);
    let any_dtype = |range: &[usize]| range.iter().find_map(|i| input(*i).dtype);
    let wide = || broadcast(inputs.iter().map(|f| f.rank));
    match op {
        Op::Unary(UnaryOp::IsInf { .. } | UnaryOp::IsNan) => Fact::new(DType::Bool, x.rank),
        Op::Binary(
            BinaryOp::Equal
            | BinaryOp::Greater
            | BinaryOp::GreaterOrEqual
            | BinaryOp::Less
            | BinaryOp::LessOrEqual,
        ) => Fact::new(DType::Bool, wide()),
        Op::Binary(BinaryOp::Pow) => Fact { dtype: x.dtype, rank: wide() },
        Op::Binary(_) => Fact { dtype: any_dtype(&[0, 1]), rank: wide() },
        Op::Variadic(_) => Fact { dtype: inputs.iter().find_map(|f| f.dtype), rank: wide() },
        Op::Where => Fact { dtype: any_dtype(&[1, 2]), rank: wide() },
        Op::Cast { to, .. } => Fact::new(*to, x.rank),
        Op::Dropout { .. } if index == 1 => Fact::new(DType::Bool, x.rank),
        Op::MatMul(_) => {
            let rank = match (x.rank, input(1).rank) {
                (Some(a), Some(b)) if a >= 2 && b >= 2 => Some(a.max(b)),
                _ => None,
            };
            Fact { dtype: any_dtype(&[0, 1]), rank }
        }
        Op::Gemm(_) => Fact { dtype: any_dtype(&[0, 1]), rank: Some(2) },
        Op::MatMulInteger => Fact::new(DType::I32, wide()),
        Op::ConvInteger(_) => Fact::new(DType::I32, x.rank),
        Op::QLinearMatMul(_) => Fact { dtype: input(7).dtype, rank: None },
        Op::QLinearConv(_) => Fact { dtype: input(7).dtype, rank: x.rank },
        Op::QLinearBinary { .. } => Fact { dtype: input(7).dtype, rank: None },
        Op::QLinearUnary(_) | Op::QLinearPool(_) => Fact { dtype: input(4).dtype, rank: x.rank },
        Op::Pool(_) if index == 1 => Fact::new(DType::I64, x.rank),
        Op::BatchNorm { .. } if index > 0 => Fact { dtype: input(3).dtype, rank: Some(1) },
        Op::LayerNorm { .. } if index > 0 => Fact::new(DType::F32, x.rank),
        Op::Reduce { keep_dims: true, .. } => x,
        Op::ArgReduce { keep_dims, .. } => {
            let rank = if *keep_dims { x.rank } else { x.rank.and_then(|r| r.checked_sub(1)) };
            Fact::new(DType::I64, rank)
        }
        Op::Flatten { .. } => x.with_rank(Some(2)),
        Op::Gather { .. } => {
            let rank = x.rank.zip(input(1).rank).and_then(|(a, b)| (a + b).checked_sub(1));
            x.with_rank(rank)
        }
        Op::GatherElements { .. } => x.with_rank(input(1).rank),
        Op::EyeLike { dtype, .. } => Fact { dtype: dtype.or(x.dtype), rank: Some(2) },
        Op::OneHot { .. } => Fact { dtype: input(2).dtype, rank: x.rank.map(|r| r + 1) },
        Op::Range => x.with_rank(Some(1)),
        Op::ConstantOfShape { value } => Fact::new(value.dtype(), None),
        Op::Shape { .. } => Fact::new(DType::I64, Some(1)),
        Op::Size | Op::SequenceLength => Fact::new(DType::I64, Some(0)),
        Op::NonZero | Op::NonMaxSuppression { .. } => Fact::new(DType::I64, Some(2)),
        Op::Unique { .. } if index > 0 => Fact::new(DType::I64, Some(1)),
        Op::TopK { .. } if index == 1 => Fact::new(DType::I64, x.rank),
        Op::Random(a) => Fact { dtype: a.dtype.or(x.dtype), rank: a.dims.as_ref().map(Vec::len).or(x.rank) },
        Op::Bernoulli { dtype, .. } => Fact { dtype: dtype.or(x.dtype), rank: x.rank },
        Op::Multinomial { dtype, .. } => Fact::new(*dtype, Some(2)),
        Op::MelWeightMatrix { dtype } => Fact::new(*dtype, Some(2)),
        Op::Window { dtype, .. } => Fact::new(*dtype, Some(1)),
        Op::SequenceEmpty { dtype } => Fact::new(*dtype, None),
        Op::OptionalHasElement => Fact::new(DType::Bool, Some(0)),
        Op::QuantizeLinear(a) => {
            Fact { dtype: Some(a.output_dtype.or(input(2).dtype).unwrap_or(DType::U8)), rank: x.rank }
        }
        Op::DequantizeLinear(a) => Fact { dtype: a.output_dtype.or(input(1).dtype), rank: x.rank },
        Op::DynamicQuantizeLinear => match index {
            0 => Fact::new(DType::U8, x.rank),
            1 => Fact::new(DType::F32, Some(0)),
            _ => Fact::new(DType::U8, Some(0)),
        },
        Op::StringNormalizer(_) => Fact::new(DType::String, x.rank),
        Op::StringSplit { .. } if index == 1 => Fact::new(DType::I64, x.rank),
        Op::RegexFullMatch { .. } => Fact::new(DType::Bool, x.rank),
        Op::TfIdfVectorizer(_) => Fact::new(DType::F32, x.rank),
        Op::ImageDecode { .. } => Fact::new(DType::U8, Some(3)),
        // The type stays, and so does the rank.
        Op::Unary(_)
        | Op::Clip
        | Op::Elementwise(_)
        | Op::Dropout { .. }
        | Op::Conv(_)
        | Op::ConvTranspose(_)
        | Op::DeformConv { .. }
        | Op::Pool(_)
        | Op::GlobalPool { .. }
        | Op::MaxUnpool { .. }
        | Op::BatchNorm { .. }
        | Op::InstanceNorm { .. }
        | Op::GroupNorm { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::LpNorm { .. }
        | Op::MeanVarianceNorm { .. }
        | Op::Lrn { .. }
        | Op::Softmax { .. }
        | Op::Hardmax { .. }
        | Op::CumSum { .. }
        | Op::RotaryEmbedding { .. }
        | Op::Transpose { .. }
        | Op::Tile
        | Op::Concat { .. }
        | Op::Split { .. }
        | Op::Slice
        | Op::Pad { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::TensorScatter { .. }
        | Op::DepthToSpace { .. }
        | Op::SpaceToDepth { .. }
        | Op::Resize(_)
        | Op::GridSample { .. }
        | Op::CenterCropPad { .. }
        | Op::ReverseSequence { .. }
        | Op::Trilu { .. }
        | Op::TopK { .. }
        | Op::StringConcat => x,
        Op::Attention(_) if index == 0 => x,
        // These have results of their own kinds, known to the node that makes them.
        Op::If { .. } | Op::Loop { .. } | Op::Scan { .. } | Op::SequenceMap { .. } | Op::Ml(_) => {
            Fact::default()
        }
        // The type stays.
        _ => x.unranked(),
    }
}
