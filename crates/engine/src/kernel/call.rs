use lightering_graph::StoredTensor;
use lightering_kernels::{
    Activation, AttentionMask, ByteInput, ByteOutput, ByteWeights, ConvInput, ConvShape, Epilogue, Matrices,
    Operand, PoolKind, PoolShape, Residual, Step, ThreadPool, activate, attention, conv_packed_bytes_len,
    conv2d, conv2d_bytes, dequantize_row, elementwise, gemm, gemm_bytes, global_average_pool, layer_norm,
    matmul, packed_bytes_len, pool2d, rms_norm, softmax,
};
use lightering_tier::{ByteSource, ChunkStore};
use lightering_units::BlockFormat;

use super::{Broadcast, Bytes8, ChainStep, Columns, Kernel};
use crate::EngineError;
use crate::experts::{self, ExpertWeights, ExpertsShape};
use crate::ops::{self, OpContext, OpError, TensorView, TensorViewMut};
use crate::program::Instruction;

/// One call: the instruction, its operands, and what it may use.
pub(crate) struct Call<'a> {
    pub instruction: &'a Instruction,
    pub inputs: &'a [Option<TensorView<'a>>],
    /// The table of a [`Kernel::GatherStored`].
    pub stored: Option<(StoredTensor, &'a dyn ByteSource)>,
    /// Where experts are that are not all in memory.
    pub experts: Option<&'a ChunkStore>,
    pub threads: &'a ThreadPool,
    pub context: &'a OpContext<'a>,
}

impl<'a> Call<'a> {
    /// Computes the results.
    pub fn run(
        &self,
        outputs: &mut [Option<TensorViewMut<'_>>],
        workspace: &mut [u8],
    ) -> Result<(), EngineError> {
        let node = &*self.instruction.node;
        let done = match &self.instruction.kernel {
            Kernel::Generic | Kernel::Language => {
                ops::compute(&node.op, self.inputs, outputs, workspace, self.context)
            }
            Kernel::GatherStored => return self.gather_stored(outputs),
            Kernel::Dynamic | Kernel::SpillStart(_) | Kernel::SpillEnd(_) => {
                Err(OpError::Invalid("a node that the session itself carries out has no call".to_owned()))
            }
            Kernel::Conv { shape, batch, activation, planes, columns } => {
                return self.conv(shape, *batch, *activation, *planes, *columns, outputs, workspace);
            }
            Kernel::MatMul { rows, k, n, activation, columns } => {
                return self.matmul(*rows, *k, *n, *activation, *columns, outputs);
            }
            Kernel::BlockMatMul { format, k, n, columns } => {
                let (x, y) = (self.f32(0)?, self.result(outputs)?);
                let Some(Some(w)) = self.inputs.get(1) else { return Err(self.missing("the weight")) };
                let bias = self.optional_f32(2).map(|b| &b[columns.first..]);
                let y = &mut y[columns.first..];
                let shape = [*k, *n];
                ops::language::block_matmul(
                    self.threads,
                    *format,
                    shape,
                    x,
                    w.bytes,
                    bias,
                    y,
                    columns.total,
                    workspace,
                );
                Ok(())
            }
            Kernel::Experts { shape, group } => return self.experts(shape, *group, outputs, workspace),
            Kernel::BlockGatherStored { format } => return self.gather_blocks(*format, outputs, workspace),
            Kernel::Pool { shape, batch, kind } => return self.pool(shape, *batch, *kind, outputs),
            Kernel::GlobalAverage { batch, pixels, channels } => {
                let (x, y) = (self.f32(0)?, self.result(outputs)?);
                for b in 0..*batch {
                    let image = &x[b * pixels * channels..][..pixels * channels];
                    let target = &mut y[b * channels..][..*channels];
                    global_average_pool(self.threads, *pixels, *channels, image, *channels, target);
                }
                Ok(())
            }
            Kernel::Chain { n, steps } => return self.chain(*n, steps, outputs),
            Kernel::Product { batch, shape, a_step, b_step, transposed, activation } => {
                let (a, b, c) = (self.f32(0)?, self.f32(1)?, self.result(outputs)?);
                let [m, n, k] = *shape;
                let b_row = if *transposed { k } else { n };
                matmul(
                    self.threads,
                    *batch,
                    *shape,
                    a,
                    Matrices { batch_stride: *a_step, row_stride: k },
                    b,
                    Matrices { batch_stride: *b_step, row_stride: b_row },
                    *transposed,
                    c,
                    Matrices { batch_stride: m * n, row_stride: n },
                    &Epilogue { bias: self.optional_f32(2), residual: None, activation: *activation },
                    bytemuck::cast_slice_mut(workspace),
                );
                Ok(())
            }
            Kernel::Attention { batch, shape, at, mask } => {
                let (q, k, v, y) = (self.f32(0)?, self.f32(1)?, self.f32(2)?, self.result(outputs)?);
                let scratch = bytemuck::cast_slice_mut(workspace);
                for b in 0..*batch {
                    let mask = mask.and_then(|m| {
                        let data = &self.optional_f32(3)?[b * m.batch..];
                        Some(AttentionMask { data, head_stride: m.head, row_stride: m.row })
                    });
                    attention(
                        self.threads,
                        shape,
                        &q[b * at.batch[0]..][..at.batch[0]],
                        at.q,
                        &k[b * at.batch[1]..][..at.batch[1]],
                        at.k,
                        &v[b * at.batch[2]..][..at.batch[2]],
                        at.v,
                        mask,
                        &mut y[b * at.batch[3]..][..at.batch[3]],
                        at.y,
                        scratch,
                    );
                }
                Ok(())
            }
            Kernel::Softmax { n, .. } => {
                let (x, y) = (self.f32(0)?, self.result(outputs)?);
                softmax(self.threads, x.len() / n, *n, x, *n, y, *n);
                Ok(())
            }
            Kernel::LayerNorm { n, epsilon, .. } => {
                let (x, y) = (self.f32(0)?, self.result(outputs)?);
                let (gain, bias) = (self.optional_f32(1), self.optional_f32(2));
                layer_norm(self.threads, x.len() / n, *n, x, *n, gain, bias, *epsilon, y, *n);
                Ok(())
            }
            Kernel::RmsNorm { n, epsilon, .. } => {
                let (x, y) = (self.f32(0)?, self.result(outputs)?);
                rms_norm(self.threads, x.len() / n, *n, x, *n, self.optional_f32(1), *epsilon, y, *n);
                Ok(())
            }
            Kernel::ByteConv { shape, batch, bytes, columns } => {
                return self.byte_conv(shape, *batch, bytes, *columns, outputs);
            }
            Kernel::ByteMatMul { rows, k, n, bytes } => {
                return self.byte_matmul(*rows, *k, *n, bytes, outputs);
            }
            Kernel::Train(kernel) => return self.train(kernel, outputs, workspace),
            Kernel::Activate { activation } => {
                let y = self.result(outputs)?;
                if self.instruction.in_place == 0 {
                    y.copy_from_slice(self.f32(0)?);
                }
                activate(self.threads, *activation, y);
                Ok(())
            }
        };
        done.map_err(|e| EngineError::at(node, e))
    }

    pub(super) fn missing(&self, what: &str) -> EngineError {
        EngineError::Internal(format!("{}: {what} is missing", self.instruction.node.name))
    }

    /// Operand `index` as f32 elements.
    pub(super) fn f32(&self, index: usize) -> Result<&'a [f32], EngineError> {
        self.optional_f32(index).ok_or_else(|| self.missing("an operand"))
    }

    pub(super) fn optional_f32(&self, index: usize) -> Option<&'a [f32]> {
        self.inputs.get(index).and_then(Option::as_ref).map(|v| bytemuck::cast_slice(v.bytes))
    }

    fn result<'b>(&self, outputs: &'b mut [Option<TensorViewMut<'_>>]) -> Result<&'b mut [f32], EngineError> {
        match outputs.first_mut() {
            Some(Some(y)) => Ok(y.as_mut_slice()),
            _ => Err(self.missing("the result")),
        }
    }

    fn conv(
        &self,
        shape: &ConvShape,
        batch: usize,
        activation: Activation,
        planes: bool,
        columns: Columns,
        outputs: &mut [Option<TensorViewMut<'_>>],
        workspace: &mut [u8],
    ) -> Result<(), EngineError> {
        let (x, packed, y) = (self.f32(0)?, self.f32(1)?, self.result(outputs)?);
        let residual = self.optional_f32(3);
        let scratch = bytemuck::cast_slice_mut(workspace);
        let (rows, first_row) = match &self.instruction.stripe {
            None => (0..shape.out_h, 0),
            Some(s) => (s.output_rows.clone(), s.input_first_rows[0]),
        };
        let image_in = x.len() / batch.max(1);
        let image_out = rows.len() * shape.out_w * columns.total;
        let bias = self.optional_f32(2).map(|b| &b[columns.first..]);
        for b in 0..batch {
            let data = &x[b * image_in..][..image_in];
            let input = if planes {
                ConvInput::Nchw { data, channel_stride: image_in / shape.in_c.max(1), first_row }
            } else {
                ConvInput::Nhwc { data, pixel_stride: shape.in_c, first_row }
            };
            let epilogue = Epilogue {
                bias,
                residual: residual.map(|r| Residual {
                    data: &r[b * image_out..][columns.first..image_out],
                    stride: columns.total,
                }),
                activation,
            };
            let target = &mut y[b * image_out..][columns.first..image_out];
            conv2d(
                self.threads,
                shape,
                input,
                packed,
                target,
                columns.total,
                rows.clone(),
                &epilogue,
                scratch,
            );
        }
        Ok(())
    }

    fn matmul(
        &self,
        rows: usize,
        k: usize,
        n: usize,
        activation: Activation,
        columns: Columns,
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (a, packed, c) = (self.f32(0)?, self.f32(1)?, self.result(outputs)?);
        // A program made for many rows may run for fewer.
        let rows =
            self.instruction.stripe.as_ref().map_or(rows, |s| s.output_rows.len()).min(a.len() / k.max(1));
        let epilogue = Epilogue {
            bias: self.optional_f32(2).map(|b| &b[columns.first..]),
            residual: self
                .optional_f32(3)
                .map(|r| Residual { data: &r[columns.first..], stride: columns.total }),
            activation,
        };
        gemm(self.threads, rows, n, k, a, k, packed, &mut c[columns.first..], columns.total, &epilogue);
        Ok(())
    }

    fn chain(
        &self,
        n: usize,
        steps: &[ChainStep],
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let y = self.result(outputs)?;
        // Without operands that repeat, `n` is all of the result, which in a run for fewer rows is shorter.
        let n = n.min(y.len().max(1));
        let x = if self.instruction.in_place > 0 { None } else { Some((self.f32(0)?, n)) };
        let mut program = Vec::with_capacity(steps.len());
        for step in steps {
            program.push(match *step {
                ChainStep::Unary(activation) => Step::Unary(activation),
                ChainStep::Binary(op, operand, way) => {
                    let data = self.f32(operand)?;
                    Step::Binary(
                        op,
                        match way {
                            Broadcast::Scalar => Operand::Scalar(data[0]),
                            Broadcast::Column => Operand::Column(data),
                            Broadcast::Row => Operand::Row(data),
                            Broadcast::Shared(repeat) => Operand::Shared { data, repeat },
                            Broadcast::Full => Operand::Full { data, stride: n },
                        },
                    )
                }
            });
        }
        elementwise(self.threads, y.len() / n, n, x, &program, y, n);
        Ok(())
    }

    /// The bytes of operand 0, the packed weights with their column sums, the bias, and the bytes of the result.
    fn byte_operands<'b>(
        &self,
        panels: usize,
        outputs: &'b mut [Option<TensorViewMut<'_>>],
    ) -> Result<(&'a [u8], &'a [i8], &'a [i32], Option<&'a [i32]>, &'b mut [u8]), EngineError> {
        let (Some(Some(x)), Some(Some(w)), Some(Some(y))) =
            (self.inputs.first(), self.inputs.get(3), outputs.first_mut())
        else {
            return Err(self.missing("an operand"));
        };
        let (packed, sums) = w.bytes.split_at(panels.next_multiple_of(64));
        let bias = self.inputs.get(8).and_then(Option::as_ref).map(|b| bytemuck::cast_slice(b.bytes));
        Ok((x.bytes, bytemuck::cast_slice(packed), bytemuck::cast_slice(sums), bias, &mut *y.bytes))
    }

    fn byte_conv(
        &self,
        shape: &ConvShape,
        batch: usize,
        p: &Bytes8,
        columns: Columns,
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (x, packed, sums, bias, y) = self.byte_operands(conv_packed_bytes_len(shape), outputs)?;
        let (rows, first_row) = match &self.instruction.stripe {
            None => (0..shape.out_h, 0),
            Some(s) => (s.output_rows.clone(), s.input_first_rows[0]),
        };
        let (image_in, image_out) = (x.len() / batch.max(1), rows.len() * shape.out_w * columns.total);
        let bias = bias.map(|b| &b[columns.first..]);
        for b in 0..batch {
            let input = ByteInput {
                data: &x[b * image_in..][..image_in],
                signed: p.x_signed,
                zero: p.x_zero,
                stride: shape.in_c,
            };
            let weights = ByteWeights { packed, sums: &sums[..shape.out_c], zeros: p.w_zeros.as_deref() };
            let output = byte_output(&mut y[b * image_out..][columns.first..image_out], columns.total, p);
            conv2d_bytes(self.threads, shape, input, first_row, weights, bias, output, rows.clone());
        }
        Ok(())
    }

    fn byte_matmul(
        &self,
        rows: usize,
        k: usize,
        n: usize,
        p: &Bytes8,
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (x, packed, sums, bias, y) = self.byte_operands(packed_bytes_len(k, n), outputs)?;
        let rows = self.instruction.stripe.as_ref().map_or(rows, |s| s.output_rows.len());
        let input = ByteInput { data: x, signed: p.x_signed, zero: p.x_zero, stride: k };
        let weights = ByteWeights { packed, sums: &sums[..n], zeros: p.w_zeros.as_deref() };
        gemm_bytes(self.threads, rows, n, k, input, weights, bias, byte_output(y, n, p));
        Ok(())
    }

    fn pool(
        &self,
        shape: &PoolShape,
        batch: usize,
        kind: PoolKind,
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (x, y) = (self.f32(0)?, self.result(outputs)?);
        let (rows, first_row) = match &self.instruction.stripe {
            None => (0..shape.out_h, 0),
            Some(s) => (s.output_rows.clone(), s.input_first_rows[0]),
        };
        let c = shape.channels;
        let (image_in, image_out) = (x.len() / batch.max(1), rows.len() * shape.out_w * c);
        for b in 0..batch {
            let image = &x[b * image_in..][..image_in];
            let target = &mut y[b * image_out..][..image_out];
            pool2d(self.threads, shape, kind, image, c, first_row, target, c, rows.clone());
        }
        Ok(())
    }

    fn experts(
        &self,
        shape: &ExpertsShape,
        group: Option<u32>,
        outputs: &mut [Option<TensorViewMut<'_>>],
        workspace: &mut [u8],
    ) -> Result<(), EngineError> {
        let (x, weights, y) = (self.f32(0)?, self.f32(2)?, self.result(outputs)?);
        let bytes = |i: usize| match self.inputs.get(i) {
            Some(Some(view)) => Ok(view.bytes),
            _ => Err(self.missing("an operand")),
        };
        let source = match (group, self.experts) {
            (Some(group), Some(store)) => ExpertWeights::Stored { store, group },
            _ => ExpertWeights::Resident([bytes(3)?, bytes(4)?, bytes(5)?]),
        };
        let ids = bytemuck::cast_slice(bytes(1)?);
        let scratch = bytemuck::cast_slice_mut(workspace);
        experts::compute(self.threads, shape, &source, x, ids, weights, y, scratch).map_err(|e| match e {
            EngineError::Tier(error) => {
                EngineError::Experts { node: self.instruction.node.name.clone(), error }
            }
            other => other,
        })
    }

    /// Rows of a table in blocks, each read from the store into the scratch and decoded from there.
    fn gather_blocks(
        &self,
        format: BlockFormat,
        outputs: &mut [Option<TensorViewMut<'_>>],
        workspace: &mut [u8],
    ) -> Result<(), EngineError> {
        let node = &*self.instruction.node;
        let (Some((table, source)), Some(Some(ids))) = (self.stored, self.inputs.get(1)) else {
            return Err(self.missing("an operand of the gather"));
        };
        let rows = self.instruction.inputs[0].as_ref().map_or(0, |o| o.dims[0]);
        let row_bytes = table.size.to_usize() / rows.max(1);
        let result = self.result(outputs)?;
        let width = result.len() / ids.dims[0].max(1);
        for (id, target) in ids.as_slice::<i32>().iter().zip(result.chunks_exact_mut(width.max(1))) {
            let row = usize::try_from(*id).ok().filter(|&row| row < rows).ok_or_else(|| {
                let problem = format!("token {id} is not in a vocabulary of {rows}");
                EngineError::at(node, OpError::Invalid(problem))
            })?;
            let blocks = &mut workspace[..row_bytes];
            source.read_at(table.offset + (row * row_bytes) as u64, blocks).map_err(|error| {
                EngineError::Io { weight: node.name.clone(), source_name: source.name(), error }
            })?;
            dequantize_row(format, blocks, target);
        }
        Ok(())
    }

    fn gather_stored(&self, outputs: &mut [Option<TensorViewMut<'_>>]) -> Result<(), EngineError> {
        let node = &*self.instruction.node;
        let invalid = |problem: String| EngineError::at(node, OpError::Invalid(problem));
        let (Some((table, source)), Some(Some(indices)), Some(Some(result))) =
            (self.stored, self.inputs.get(1), outputs.first_mut())
        else {
            return Err(self.missing("an operand of the gather"));
        };
        let rows = self.instruction.inputs[0].as_ref().map_or(0, |o| o.dims[0]);
        let row_bytes = table.size.to_usize() / rows.max(1);
        for (i, target) in result.bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            let index = match indices.dtype {
                lightering_units::DType::I32 => i64::from(indices.as_slice::<i32>()[i]),
                _ => indices.as_slice::<i64>()[i],
            };
            let row = if index < 0 { index + rows as i64 } else { index };
            if row < 0 || row >= rows as i64 {
                return Err(invalid(format!("index {index} is outside the table's {rows} rows")));
            }
            source.read_at(table.offset + row as u64 * row_bytes as u64, target).map_err(|error| {
                EngineError::Io { weight: node.name.clone(), source_name: source.name(), error }
            })?;
        }
        Ok(())
    }
}

/// Where the sums of an 8-bit product go.
fn byte_output<'a>(data: &'a mut [u8], stride: usize, p: &'a Bytes8) -> ByteOutput<'a> {
    ByteOutput::Bytes { data, stride, signed: p.y_signed, scale: &p.scale, zero: p.y_zero, limits: p.limits }
}
