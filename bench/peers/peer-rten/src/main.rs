//! rten behind the common harness.

use anyhow::{Result, anyhow, bail};
use peer_harness::{Dtype, Engine, Tensor, Value};
use rten::{Model, ModelOptions, NodeId, RunOptions, Sequence, ThreadPool, ValueOrView, ValueView};
use rten_tensor::prelude::*;
use std::path::Path;
use std::sync::Arc;

struct Rten {
    model: Model,
    inputs: Vec<(NodeId, rten::Value)>,
    output_ids: Vec<NodeId>,
    outputs: Vec<rten::Value>,
    pool: Arc<ThreadPool>,
}

/// rten's documented narrowing: 64-bit integers and booleans become i32, doubles become floats.
fn tensor_in(tensor: &Tensor) -> Result<rten::Value> {
    let shape = tensor.shape.as_slice();
    Ok(match tensor.dtype {
        Dtype::F32 | Dtype::F64 => {
            let data: Vec<f32> = tensor.to_f64().into_iter().map(|x| x as f32).collect();
            rten_tensor::Tensor::from_data(shape, data).into()
        }
        Dtype::I32 | Dtype::I64 | Dtype::Bool => {
            let narrow = |x: i64| x.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
            let data: Vec<i32> = tensor.to_i64().into_iter().map(narrow).collect();
            rten_tensor::Tensor::from_data(shape, data).into()
        }
        Dtype::I8 => {
            let data: Vec<i8> = tensor.bytes.iter().map(|&b| b as i8).collect();
            rten_tensor::Tensor::from_data(shape, data).into()
        }
        Dtype::U8 => rten_tensor::Tensor::from_data(shape, tensor.bytes.clone()).into(),
        other => bail!("unsupported element type {other:?}"),
    })
}

fn value_in(value: &Value) -> Result<rten::Value> {
    match value {
        Value::Tensor(tensor) => tensor_in(tensor),
        Value::Sequence(items) => {
            let items: Vec<rten::Value> = items.iter().map(value_in).collect::<Result<_>>()?;
            let Some(first) = items.first() else { return Ok(Sequence::new(rten::DataType::Float).into()) };
            let rten::ValueType::Tensor(dtype) = first.dtype() else { bail!("unsupported nested sequence") };
            let mut sequence = Sequence::new(dtype);
            for (index, item) in items.into_iter().enumerate() {
                sequence.insert(index, item).map_err(|e| anyhow!("{e:?}"))?;
            }
            Ok(sequence.into())
        }
        Value::Absent => bail!("unsupported empty optional"),
    }
}

fn value_out(value: ValueView<'_>) -> Result<Value> {
    Ok(match value {
        ValueView::FloatTensor(t) => Value::Tensor(Tensor::f32(t.shape().to_vec(), &t.to_vec())),
        ValueView::Int32Tensor(t) => Value::Tensor(Tensor::i32(t.shape().to_vec(), &t.to_vec())),
        ValueView::Int8Tensor(t) => Value::Tensor(Tensor::i8(t.shape().to_vec(), &t.to_vec())),
        ValueView::UInt8Tensor(t) => Value::Tensor(Tensor::u8(t.shape().to_vec(), &t.to_vec())),
        ValueView::Sequence(s) => Value::Sequence(s.iter().map(value_out).collect::<Result<_>>()?),
        _ => bail!("unsupported output kind"),
    })
}

impl Engine for Rten {
    const NAME: &'static str = "rten";
    const VERSION: &'static str = "0.27.0";
    const STRICT_DTYPES: bool = false;

    fn load(model: &Path, inputs: &[(String, Value)], threads: usize, _attempt: usize) -> Result<Self> {
        let model = ModelOptions::with_all_ops().prepack_weights(true).load_file(model)?;
        let inputs = inputs
            .iter()
            .map(|(name, value)| Ok((model.node_id(name)?, value_in(value)?)))
            .collect::<Result<_>>()?;
        let output_ids = model.output_ids().to_vec();
        let pool = Arc::new(ThreadPool::with_num_threads(threads));
        Ok(Rten { model, inputs, output_ids, outputs: Vec::new(), pool })
    }

    fn run(&mut self) -> Result<()> {
        let inputs = self.inputs.iter().map(|(id, v)| (*id, ValueOrView::View(v.as_view()))).collect();
        let mut options = RunOptions::default();
        options.thread_pool = Some(self.pool.clone());
        self.outputs = self.model.run(inputs, &self.output_ids, Some(options))?;
        Ok(())
    }

    fn outputs(&self) -> Result<Vec<(String, Value)>> {
        let name = |id: NodeId| {
            self.model.node_info(id).and_then(|i| i.name().map(str::to_owned)).unwrap_or_default()
        };
        self.output_ids
            .iter()
            .zip(&self.outputs)
            .map(|(id, v)| Ok((name(*id), value_out(v.as_view())?)))
            .collect()
    }
}

fn main() -> Result<()> {
    peer_harness::main::<Rten>()
}
