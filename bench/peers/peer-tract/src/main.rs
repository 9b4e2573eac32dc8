//! tract behind the common harness.

use anyhow::{Context, Result, bail};
use peer_harness::{Dtype, Engine, Value};
use std::path::Path;
use std::sync::Arc;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::multithread::{Executor, set_default_executor};

struct Tract {
    plan: Arc<TypedSimplePlan>,
    inputs: TVec<TValue>,
    names: Vec<String>,
    outputs: TVec<TValue>,
}

fn tensor_in(tensor: &peer_harness::Tensor) -> Result<Tensor> {
    let dt = match tensor.dtype {
        Dtype::F32 => DatumType::F32,
        Dtype::F64 => DatumType::F64,
        Dtype::F16 => DatumType::F16,
        Dtype::U8 => DatumType::U8,
        Dtype::I8 => DatumType::I8,
        Dtype::U16 => DatumType::U16,
        Dtype::I16 => DatumType::I16,
        Dtype::I32 => DatumType::I32,
        Dtype::I64 => DatumType::I64,
        Dtype::U32 => DatumType::U32,
        Dtype::U64 => DatumType::U64,
        Dtype::Bool => DatumType::Bool,
        Dtype::String => {
            let strings = tensor.strings.clone();
            return Ok(tract_ndarray::ArrayD::from_shape_vec(tensor.shape.clone(), strings)?.into_tensor());
        }
        Dtype::Bf16 => bail!("unsupported element type bf16"),
    };
    // SAFETY: the harness has checked that the bytes are exactly the elements of this type and shape.
    Ok(unsafe { Tensor::from_raw_dt(dt, &tensor.shape, &tensor.bytes)? })
}

fn tensor_out(tensor: &Tensor) -> Result<peer_harness::Tensor> {
    let tensor = if tensor.datum_type() == DatumType::TDim {
        tensor.cast_to::<i64>()?.into_owned()
    } else {
        tensor.clone()
    };
    let dt = tensor.datum_type().unquantized();
    let dtype = match dt {
        DatumType::F32 => Dtype::F32,
        DatumType::F64 => Dtype::F64,
        DatumType::F16 => Dtype::F16,
        DatumType::U8 => Dtype::U8,
        DatumType::I8 => Dtype::I8,
        DatumType::U16 => Dtype::U16,
        DatumType::I16 => Dtype::I16,
        DatumType::I32 => Dtype::I32,
        DatumType::I64 => Dtype::I64,
        DatumType::U32 => Dtype::U32,
        DatumType::U64 => Dtype::U64,
        DatumType::Bool => Dtype::Bool,
        DatumType::String => Dtype::String,
        other => bail!("unsupported output type {other:?}"),
    };
    let shape = tensor.shape().to_vec();
    if dtype == Dtype::String {
        let strings = tensor.to_plain_array_view::<String>()?.iter().cloned().collect();
        return Ok(peer_harness::Tensor { dtype, shape, bytes: Vec::new(), strings });
    }
    let bytes = tensor.as_bytes().to_vec();
    Ok(peer_harness::Tensor { dtype, shape, bytes, strings: Vec::new() })
}

impl Engine for Tract {
    const NAME: &'static str = "tract";
    const VERSION: &'static str = "0.23.9";
    const STRICT_DTYPES: bool = true;
    /// First all inputs at run time; then integer and boolean inputs as constants, because tract's own suite too hands
    /// it shapes, axes and repeats that way; then all inputs but the first as constants, as weights and scales would be.
    const ATTEMPTS: usize = 3;

    fn load(model: &Path, inputs: &[(String, Value)], threads: usize, attempt: usize) -> Result<Self> {
        if threads > 1 {
            set_default_executor(Executor::multithread(threads));
        }
        let mut graph = tract_onnx::onnx().with_ignore_output_shapes(true).model_for_path(model)?;
        let mut run_inputs = tvec![];
        let mut run_outlets = vec![];
        for (position, outlet) in graph.input_outlets()?.to_vec().into_iter().enumerate() {
            let name = graph.node(outlet.node).name.clone();
            let (_, value) =
                inputs.iter().find(|(n, _)| *n == name).with_context(|| format!("no input {name}"))?;
            let Value::Tensor(value) = value else { bail!("unsupported sequence or optional input") };
            let integer = matches!(value.dtype, Dtype::I32 | Dtype::I64 | Dtype::Bool);
            let tensor = tensor_in(value)?;
            graph.set_input_fact(position, InferenceFact::dt_shape(tensor.datum_type(), tensor.shape()))?;
            if (attempt == 1 && integer) || (attempt == 2 && position > 0) {
                let constant =
                    tract_onnx::tract_core::ops::konst::Const::new(tensor.clone().into_arc_tensor())?;
                graph.node_mut(outlet.node).op = Box::new(constant);
                graph.set_outlet_fact(outlet, InferenceFact::from(tensor))?;
            } else {
                run_inputs.push(tensor.into_tvalue());
                run_outlets.push(outlet);
            }
        }
        graph.set_input_outlets(&run_outlets)?;
        let names: Vec<String> = graph
            .output_outlets()?
            .iter()
            .map(|o| graph.outlet_label(*o).unwrap_or(&graph.node(o.node).name).to_owned())
            .collect();
        let plan = graph.into_optimized()?.into_runnable()?;
        Ok(Tract { plan, inputs: run_inputs, names, outputs: tvec![] })
    }

    fn run(&mut self) -> Result<()> {
        self.outputs = self.plan.run(self.inputs.clone())?;
        Ok(())
    }

    fn outputs(&self) -> Result<Vec<(String, Value)>> {
        self.names
            .iter()
            .zip(&self.outputs)
            .map(|(n, v)| Ok((n.clone(), Value::Tensor(tensor_out(v)?))))
            .collect()
    }
}

fn main() -> Result<()> {
    peer_harness::main::<Tract>()
}
