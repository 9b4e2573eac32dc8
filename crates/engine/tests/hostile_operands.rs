//! Random operators on random operands: any answer or any refusal is fine, a panic is not.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lightering_engine::ops::OpContext;
use lightering_engine::{RuntimeValue, execute_op};
use lightering_graph::*;
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;
use lightering_units::Bytes;

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides.max(1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    fn flag(&mut self) -> bool {
        self.roll(2) == 0
    }

    fn int(&mut self) -> i64 {
        match self.roll(25) {
            0 => self.pick(&[i64::MIN, i64::MAX, 1 << 40, -(1 << 40), 1000]),
            _ => self.roll(6) as i64 - 2,
        }
    }

    fn size(&mut self) -> usize {
        match self.roll(60) {
            0 => self.pick(&[usize::MAX, 1 << 62, 1 << 33]),
            _ => self.roll(4),
        }
    }

    fn float(&mut self) -> f32 {
        match self.roll(12) {
            0 => self.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 1e-40]),
            _ => self.roll(9) as f32 / 2.0 - 2.0,
        }
    }

    fn sizes(&mut self, count: usize) -> Vec<usize> {
        (0..count).map(|_| self.size()).collect()
    }

    fn axes(&mut self) -> Vec<i64> {
        (0..self.roll(3)).map(|_| self.int()).collect()
    }

    fn dtype(&mut self) -> DType {
        if self.roll(3) > 0 { DType::F32 } else { self.pick(&DType::ALL) }
    }

    fn tensor(&mut self, dtype: DType, dims: &[usize]) -> Tensor {
        let count: usize = dims.iter().product();
        if dtype == DType::String {
            return Tensor::from_strings(
                dims,
                (0..count).map(|_| self.pick(&["", "1", "a", "-2.5"]).to_owned()).collect(),
            );
        }
        let mut t = Tensor::zeros(dtype, dims);
        let size = dtype.size_bytes();
        for i in 0..count {
            let bytes: Vec<u8> = match dtype {
                DType::F32 => self.float().to_le_bytes().to_vec(),
                DType::F64 => f64::from(self.float()).to_le_bytes().to_vec(),
                DType::F16 => half::f16::from_f32(self.float()).to_le_bytes().to_vec(),
                DType::BF16 => half::bf16::from_f32(self.float()).to_le_bytes().to_vec(),
                DType::Bool => vec![self.roll(2) as u8],
                DType::I4 => vec![(self.roll(16) as i8 - 8) as u8],
                DType::U4 | DType::F4E2M1 => vec![self.roll(16) as u8],
                _ => self.int().to_le_bytes().repeat(2)[..size].to_vec(),
            };
            t.as_bytes_mut()[i * size..(i + 1) * size].copy_from_slice(&bytes);
        }
        t
    }

    fn dims(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| if self.roll(9) == 0 { 0 } else { 1 + self.roll(4) }).collect()
    }

    fn padding(&mut self, rank: usize) -> Padding {
        match self.roll(5) {
            0 => Padding::SameUpper,
            1 => Padding::SameLower,
            2 => Padding::Valid,
            _ => Padding::Explicit((0..2 * rank).map(|_| self.int()).collect()),
        }
    }

    fn unary(&mut self) -> UnaryOp {
        let (alpha, beta) = (self.float(), self.float());
        let ops = [
            UnaryOp::Abs,
            UnaryOp::Acosh,
            UnaryOp::BitwiseNot,
            UnaryOp::Ceil,
            UnaryOp::Celu { alpha },
            UnaryOp::ClipTo { min: alpha, max: beta },
            UnaryOp::Erf,
            UnaryOp::Exp,
            UnaryOp::Gelu { tanh: true },
            UnaryOp::HardSigmoid { alpha, beta },
            UnaryOp::HardSwish,
            UnaryOp::Identity,
            UnaryOp::IsInf { negative: true, positive: false },
            UnaryOp::IsNan,
            UnaryOp::Neg,
            UnaryOp::Not,
            UnaryOp::Round,
            UnaryOp::Shrink { bias: alpha, lambd: beta },
            UnaryOp::Sign,
            UnaryOp::Softplus,
        ];
        self.pick(&ops)
    }

    fn binary(&mut self) -> BinaryOp {
        let ops = [
            BinaryOp::Add,
            BinaryOp::Div,
            BinaryOp::Mod,
            BinaryOp::FMod,
            BinaryOp::Pow,
            BinaryOp::PRelu,
            BinaryOp::And,
            BinaryOp::BitXor,
            BinaryOp::ShiftLeft,
            BinaryOp::ShiftRight,
            BinaryOp::Equal,
            BinaryOp::Less,
            BinaryOp::Max,
        ];
        self.pick(&ops)
    }

    fn conv(&mut self, rank: usize) -> ConvAttributes {
        ConvAttributes {
            kernel: Vec::new(),
            strides: if self.flag() { self.sizes(rank) } else { Vec::new() },
            dilations: if self.flag() { self.sizes(rank) } else { Vec::new() },
            padding: self.padding(rank),
            groups: self.pick(&[1, 1, 1, 2, 0, usize::MAX]),
            layout: self.pick(&[Layout::ChannelsFirst, Layout::ChannelsFirst, Layout::ChannelsLast]),
            activation: self.flag().then(|| self.unary()),
        }
    }

    fn pool(&mut self, rank: usize) -> PoolAttributes {
        PoolAttributes {
            kind: self.pick(&[
                PoolKind::Max,
                PoolKind::Average,
                PoolKind::Lp(2),
                PoolKind::Lp(0),
                PoolKind::Lp(-3),
            ]),
            kernel: self.sizes(rank),
            strides: if self.flag() { self.sizes(rank) } else { Vec::new() },
            dilations: if self.flag() { self.sizes(rank) } else { Vec::new() },
            padding: self.padding(rank),
            ceil_mode: self.flag(),
            count_include_pad: self.flag(),
            storage_order_column: self.flag(),
            layout: self.pick(&[Layout::ChannelsFirst, Layout::ChannelsFirst, Layout::ChannelsLast]),
        }
    }

    fn resize(&mut self) -> ResizeAttributes {
        ResizeAttributes {
            mode: self.pick(&[ResizeMode::Nearest, ResizeMode::Linear, ResizeMode::Cubic]),
            coordinates: self.pick(&[
                CoordinateMode::HalfPixel,
                CoordinateMode::HalfPixelSymmetric,
                CoordinateMode::PytorchHalfPixel,
                CoordinateMode::AlignCorners,
                CoordinateMode::Asymmetric,
                CoordinateMode::TfCropAndResize,
                CoordinateMode::TfHalfPixelForNearest,
            ]),
            nearest: self.pick(&[NearestMode::Floor, NearestMode::Ceil, NearestMode::RoundPreferCeil]),
            cubic_coeff_a: self.float(),
            exclude_outside: self.flag(),
            extrapolation_value: self.float(),
            antialias: self.flag(),
            axes: self.flag().then(|| self.axes()),
            aspect_ratio: self.pick(&[AspectRatio::Stretch, AspectRatio::NotLarger, AspectRatio::NotSmaller]),
        }
    }

    fn op(&mut self) -> Op {
        let (axis, flag, epsilon) = (self.int(), self.flag(), self.float());
        let reduction = self.pick(&[
            ScatterReduction::None,
            ScatterReduction::Add,
            ScatterReduction::Mul,
            ScatterReduction::Max,
        ]);
        let rank = 1 + self.roll(3);
        match self.roll(62) {
            0 => Op::Unary(self.unary()),
            1 | 2 => Op::Binary(self.binary()),
            3 => Op::Variadic(self.pick(&[VariadicOp::Sum, VariadicOp::Mean, VariadicOp::Max])),
            4 => Op::Where,
            5 => Op::Clip,
            6 => Op::Cast { to: self.pick(&DType::ALL), saturate: flag },
            7 => Op::Elementwise(vec![
                ElementwiseStep::Unary(self.unary()),
                ElementwiseStep::Binary { op: self.binary(), operand: self.roll(4), swapped: flag },
            ]),
            8 | 9 => Op::MatMul(MatMulAttributes {
                trans_a: flag,
                trans_b: self.flag(),
                alpha: epsilon,
                activation: self.flag().then(|| self.unary()),
            }),
            10 => Op::Gemm(GemmAttributes { alpha: 1.0, beta: epsilon, trans_a: flag, trans_b: self.flag() }),
            11 => Op::Einsum {
                equation: self
                    .pick(&[
                        "ij,jk->ik",
                        "...i,...i->...",
                        "ii->i",
                        "i,i",
                        "ij->ji",
                        "a...b",
                        "->",
                        "bij,bjk",
                    ])
                    .to_owned(),
            },
            12 => Op::Det,
            13 | 14 => Op::Conv(self.conv(rank)),
            15 => Op::ConvTranspose(ConvTransposeAttributes {
                conv: self.conv(rank),
                output_padding: if flag { self.sizes(rank) } else { Vec::new() },
                output_shape: if self.roll(4) == 0 { self.sizes(rank) } else { Vec::new() },
            }),
            16 => Op::DeformConv { conv: self.conv(2), offset_groups: self.pick(&[1, 1, 2, 0]) },
            17 => Op::Col2Im {
                dilations: self.sizes(rank),
                pads: self.sizes(2 * rank),
                strides: self.sizes(rank),
            },
            18 | 19 => Op::Pool(self.pool(rank)),
            20 => Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst },
            21 => Op::MaxUnpool {
                kernel: self.sizes(rank),
                strides: self.sizes(rank),
                pads: self.sizes(2 * rank),
            },
            22 => Op::MaxRoiPool { pooled_shape: [self.roll(4), self.roll(4)], spatial_scale: epsilon },
            23 => Op::RoiAlign(RoiAlignAttributes {
                max: flag,
                output_height: self.roll(4),
                output_width: self.roll(4),
                sampling_ratio: self.roll(3),
                spatial_scale: epsilon,
                half_pixel: self.flag(),
            }),
            24 => Op::BatchNorm { epsilon, momentum: 0.9, training: flag },
            25 => Op::InstanceNorm { epsilon },
            26 => Op::GroupNorm { groups: self.roll(4), epsilon },
            27 => Op::LayerNorm { axis, epsilon },
            28 => Op::RmsNorm { axis, epsilon },
            29 => Op::LpNorm { axis, p: self.pick(&[1, 2]) },
            30 => Op::MeanVarianceNorm { axes: self.axes() },
            31 => Op::Lrn { alpha: epsilon, beta: 0.5, bias: 1.0, size: self.size() },
            32 => Op::Softmax { axis, log: flag },
            33 => Op::Hardmax { axis },
            34 => Op::Reduce {
                op: self.pick(&[
                    ReduceOp::Max,
                    ReduceOp::Mean,
                    ReduceOp::LogSumExp,
                    ReduceOp::L2,
                    ReduceOp::Prod,
                ]),
                keep_dims: flag,
                noop_with_empty_axes: self.flag(),
            },
            35 => {
                Op::ArgReduce { largest: flag, axis, keep_dims: self.flag(), select_last_index: self.flag() }
            }
            36 => Op::CumSum { exclusive: flag, reverse: self.flag() },
            37 => Op::Reshape { allow_zero: flag },
            38 => Op::Flatten { axis },
            39 => self.pick(&[Op::Squeeze, Op::Unsqueeze, Op::Expand, Op::Tile]),
            40 => Op::Transpose { perm: self.flag().then(|| self.sizes(rank)) },
            41 => Op::Concat { axis },
            42 => Op::Split { axis },
            43 | 44 => Op::Slice,
            45 => Op::Pad {
                mode: self.pick(&[PadMode::Constant, PadMode::Edge, PadMode::Reflect, PadMode::Wrap]),
            },
            46 => Op::Gather { axis },
            47 => Op::GatherElements { axis },
            48 => Op::GatherNd { batch_dims: self.roll(3) },
            49 => Op::ScatterElements { axis, reduction },
            50 => Op::ScatterNd { reduction },
            51 => Op::TensorScatter { axis, circular: flag },
            52 => Op::DepthToSpace { block: self.size(), crd: flag },
            53 => Op::SpaceToDepth { block: self.size() },
            54 | 55 => Op::Resize(self.resize()),
            56 => Op::GridSample {
                mode: self.pick(&[ResizeMode::Nearest, ResizeMode::Linear, ResizeMode::Cubic]),
                padding: self.pick(&[GridPadding::Zeros, GridPadding::Border, GridPadding::Reflection]),
                align_corners: flag,
            },
            57 => self.pick(&[
                Op::AffineGrid { align_corners: flag },
                Op::CenterCropPad { axes: None },
                Op::ReverseSequence { batch_axis: usize::from(flag), time_axis: usize::from(!flag) },
                Op::Trilu { upper: flag },
            ]),
            58 => self.pick(&[
                Op::EyeLike { dtype: None, k: axis },
                Op::OneHot { axis },
                Op::Range,
                Op::Shape { start: axis, end: Some(1) },
                Op::Size,
            ]),
            59 => Op::TopK { axis, largest: flag, sorted: true },
            60 => self.pick(&[
                Op::NonZero,
                Op::Compress { axis: Some(axis) },
                Op::Compress { axis: None },
                Op::Unique { axis: flag.then_some(axis), sorted: self.0 & 1 == 0 },
            ]),
            _ => Op::ConstantOfShape { value: Tensor::scalar(1f32).into_shape(&[1]) },
        }
    }

    /// Operands that fit often enough: mostly one shape and type, with small lists of integers behind.
    fn operands(&mut self, op: &Op) -> Vec<Option<RuntimeValue>> {
        let (least, most) = op.input_count();
        let count = least + self.roll(most.min(5).saturating_sub(least) + 1);
        let dtype = self.dtype();
        let rank = if matches!(
            op,
            Op::Conv(_)
                | Op::ConvTranspose(_)
                | Op::Pool(_)
                | Op::DeformConv { .. }
                | Op::RoiAlign(_)
                | Op::MaxRoiPool { .. }
                | Op::GridSample { .. }
                | Op::MaxUnpool { .. }
        ) {
            3 + self.roll(3)
        } else {
            self.roll(5)
        };
        let dims = self.dims(rank);
        (0..count)
            .map(|i| {
                if i >= 1 && self.roll(20) == 0 {
                    return None;
                }
                let channels = dims.get(1).copied().unwrap_or(1);
                let t = match self.roll(10) {
                    _ if i == 0 => self.tensor(dtype, &dims),
                    0 | 1 => self.tensor(dtype, &dims),
                    2 | 3 => self.tensor(dtype, &[channels]),
                    4 => self.tensor(dtype, &[]),
                    5 => {
                        let rank = self.roll(4);
                        let dims = self.dims(rank);
                        self.tensor(dtype, &dims)
                    }
                    6 => self.tensor(DType::I64, &[]),
                    7 => {
                        let length = self.roll(4);
                        self.tensor(DType::I64, &[length])
                    }
                    8 => self.tensor(DType::I64, &dims),
                    _ => {
                        let mut own = dims.clone();
                        own.reverse();
                        self.tensor(dtype, &own)
                    }
                };
                Some(t.into())
            })
            .collect()
    }
}

#[test]
fn no_operands_make_an_operator_panic() {
    let threads = ThreadPool::new(2);
    let memory = MemoryPool::with_limit(Bytes::mib(64));
    let context =
        OpContext { threads: &threads, memory: &memory, sources: &[], seed: 0, images: None, nesting: 0 };
    let mut dice = Dice(0x5eed_1234_5678_9abc);
    let rounds = if std::env::var_os("LIGHTER_SLOW").is_some() { 2_000_000 } else { 60_000 };
    let (mut answered, mut panics) = (0, Vec::new());
    std::panic::set_hook(Box::new(|_| {}));
    for _ in 0..rounds {
        let op = dice.op();
        let operands = dice.operands(&op);
        let refs: Vec<Option<&RuntimeValue>> = operands.iter().map(Option::as_ref).collect();
        let outputs = vec![true; 1 + dice.roll(2)];
        match catch_unwind(AssertUnwindSafe(|| execute_op(&op, &refs, &outputs, &context))) {
            Ok(result) => answered += usize::from(result.is_ok()),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                let types: Vec<String> = operands
                    .iter()
                    .map(|v| v.as_ref().map_or("-".to_owned(), |v| v.value_type().to_string()))
                    .collect();
                if panics.len() < 20 {
                    panics.push(format!("{op:?} on {}: {}", types.join(" "), text.unwrap_or_default()));
                }
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(panics.is_empty(), "{}", panics.join("\n"));
    assert!(answered > rounds / 20, "only {answered} of {rounds} were answered, the operands fit too rarely");
    assert_eq!(memory.used(), Bytes::ZERO);
}
