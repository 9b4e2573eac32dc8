//! Cutting tensors of any element type into parts and joining them.

use lightering_graph::{DType, Tensor};

use super::heap::allocate;
use super::operands::invalid;
use super::{OpContext, OpError};

/// `[outer, axis, inner]` of a shape.
fn around(dims: &[usize], axis: usize) -> (usize, usize, usize) {
    (dims[..axis].iter().product(), dims[axis], dims[axis + 1..].iter().product())
}

/// Copies `count` elements between tensors of one element type.
fn copy(from: &Tensor, from_at: usize, to: &mut Tensor, to_at: usize, count: usize) {
    if from.dtype() == DType::String {
        to.as_mut_strings()[to_at..to_at + count]
            .clone_from_slice(&from.as_strings()[from_at..from_at + count]);
    } else {
        let size = from.dtype().size_bytes();
        to.as_bytes_mut()[to_at * size..(to_at + count) * size]
            .copy_from_slice(&from.as_bytes()[from_at * size..(from_at + count) * size]);
    }
}

/// Positions `first..first + len` of an axis, which is kept.
pub(super) fn slice(
    context: &OpContext,
    x: &Tensor,
    axis: usize,
    first: usize,
    len: usize,
) -> Result<Tensor, OpError> {
    let (outer, size, inner) = around(x.dims(), axis);
    if first + len > size {
        return invalid(format!("positions {first}..{} of {size}", first + len));
    }
    let mut dims = x.dims().to_vec();
    dims[axis] = len;
    let mut out = allocate(context, x.dtype(), &dims)?;
    for o in 0..outer {
        copy(x, (o * size + first) * inner, &mut out, o * len * inner, len * inner);
    }
    Ok(out)
}

/// Position `index` of an axis, which is dropped.
pub(super) fn take(context: &OpContext, x: &Tensor, axis: usize, index: usize) -> Result<Tensor, OpError> {
    let mut dims = x.dims().to_vec();
    dims.remove(axis);
    Ok(slice(context, x, axis, index, 1)?.into_shape(&dims))
}

/// Tensors one after another along an axis.
pub(super) fn concat(context: &OpContext, parts: &[&Tensor], axis: usize) -> Result<Tensor, OpError> {
    let Some(first) = parts.first() else { return invalid("nothing to join") };
    let mut dims = first.dims().to_vec();
    dims[axis] = 0;
    for part in parts {
        let fits = part.dtype() == first.dtype()
            && part.dims().len() == dims.len()
            && part.dims().iter().zip(first.dims()).enumerate().all(|(i, (a, b))| i == axis || a == b);
        if !fits {
            return invalid(format!(
                "joining {}{:?} and {}{:?} along axis {axis}",
                first.dtype(),
                first.dims(),
                part.dtype(),
                part.dims()
            ));
        }
        dims[axis] += part.dims()[axis];
    }
    let mut out = allocate(context, first.dtype(), &dims)?;
    let (outer, total, inner) = around(&dims, axis);
    let mut at = 0;
    for part in parts {
        let len = part.dims()[axis];
        for o in 0..outer {
            copy(part, o * len * inner, &mut out, (o * total + at) * inner, len * inner);
        }
        at += len;
    }
    Ok(out)
}

/// Tensors of one shape side by side along a new axis.
pub(super) fn stack(context: &OpContext, parts: &[&Tensor], axis: usize) -> Result<Tensor, OpError> {
    let Some(first) = parts.first() else { return invalid("nothing to stack") };
    if let Some(other) = parts.iter().find(|p| p.dims() != first.dims() || p.dtype() != first.dtype()) {
        return invalid(format!("stacking shapes {:?} and {:?}", first.dims(), other.dims()));
    }
    let mut dims = first.dims().to_vec();
    dims.insert(axis, parts.len());
    let mut out = allocate(context, first.dtype(), &dims)?;
    let (outer, total, inner) = around(&dims, axis);
    for (i, part) in parts.iter().enumerate() {
        for o in 0..outer {
            copy(part, o * inner, &mut out, (o * total + i) * inner, inner);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightering_kernels::ThreadPool;
    use lightering_meter::MemoryPool;

    #[test]
    fn parts_join_to_the_whole() {
        let (pool, threads) = (MemoryPool::unbounded(), ThreadPool::new(1));
        let context =
            &OpContext { threads: &threads, memory: &pool, sources: &[], seed: 0, images: None, nesting: 0 };
        let x = Tensor::from_slice(&[2, 3, 2], &(0..12).collect::<Vec<i32>>());
        for axis in 0..3 {
            let parts: Vec<Tensor> =
                (0..x.dims()[axis]).map(|i| slice(context, &x, axis, i, 1).unwrap()).collect();
            assert_eq!(concat(context, &parts.iter().collect::<Vec<_>>(), axis).unwrap(), x);
            let parts: Vec<Tensor> =
                (0..x.dims()[axis]).map(|i| take(context, &x, axis, i).unwrap()).collect();
            assert_eq!(stack(context, &parts.iter().collect::<Vec<_>>(), axis).unwrap(), x);
        }
    }
}
