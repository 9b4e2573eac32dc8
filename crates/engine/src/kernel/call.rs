use lightering_graph::StoredTensor;
use lightering_kernels::{
    Activation, ConvInput, ConvShape, Epilogue, PoolKind, PoolShape, Residual, ThreadPool, activate, conv2d,
    gemm, global_average_pool, pool2d,
};
use lightering_tier::ByteSource;

use super::Kernel;
use crate::EngineError;
use crate::ops::{self, OpContext, OpError, TensorView, TensorViewMut};
use crate::program::Instruction;

/// One call: the instruction, its operands, and what it may use.
pub(crate) struct Call<'a> {
    pub instruction: &'a Instruction,
    pub inputs: &'a [Option<TensorView<'a>>],
    /// The table of a [`Kernel::GatherStored`].
    pub stored: Option<(StoredTensor, &'a dyn ByteSource)>,
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
            Kernel::Generic => ops::compute(&node.op, self.inputs, outputs, workspace, self.context),
            Kernel::GatherStored => return self.gather_stored(outputs),
            Kernel::Dynamic => Err(OpError::Invalid("a dynamic node has no call".to_owned())),
            Kernel::Conv { shape, batch, activation, planes } => {
                return self.conv(shape, *batch, *activation, *planes, outputs, workspace);
            }
            Kernel::MatMul { rows, k, n, activation } => {
                return self.matmul(*rows, *k, *n, *activation, outputs);
            }
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
            Kernel::Activate { activation } => {
                let y = self.result(outputs)?;
                if !self.instruction.in_place {
                    y.copy_from_slice(self.f32(0)?);
                }
                activate(self.threads, *activation, y);
                Ok(())
            }
        };
        done.map_err(|e| EngineError::at(node, e))
    }

    fn missing(&self, what: &str) -> EngineError {
        EngineError::Internal(format!("{}: {what} is missing", self.instruction.node.name))
    }

    /// Operand `index` as f32 elements.
    fn f32(&self, index: usize) -> Result<&'a [f32], EngineError> {
        self.optional_f32(index).ok_or_else(|| self.missing("an operand"))
    }

    fn optional_f32(&self, index: usize) -> Option<&'a [f32]> {
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
        let image_out = rows.len() * shape.out_w * shape.out_c;
        for b in 0..batch {
            let data = &x[b * image_in..][..image_in];
            let input = if planes {
                ConvInput::Nchw { data, channel_stride: image_in / shape.in_c.max(1), first_row }
            } else {
                ConvInput::Nhwc { data, pixel_stride: shape.in_c, first_row }
            };
            let epilogue = Epilogue {
                bias: self.optional_f32(2),
                residual: residual
                    .map(|r| Residual { data: &r[b * image_out..][..image_out], stride: shape.out_c }),
                activation,
            };
            let target = &mut y[b * image_out..][..image_out];
            conv2d(self.threads, shape, input, packed, target, shape.out_c, rows.clone(), &epilogue, scratch);
        }
        Ok(())
    }

    fn matmul(
        &self,
        rows: usize,
        k: usize,
        n: usize,
        activation: Activation,
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (a, packed, c) = (self.f32(0)?, self.f32(1)?, self.result(outputs)?);
        let rows = self.instruction.stripe.as_ref().map_or(rows, |s| s.output_rows.len());
        let epilogue = Epilogue {
            bias: self.optional_f32(2),
            residual: self.optional_f32(3).map(|data| Residual { data, stride: n }),
            activation,
        };
        gemm(self.threads, rows, n, k, a, k, packed, c, n, &epilogue);
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
