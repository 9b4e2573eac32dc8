//! Padding and output sizes of sliding windows: convolution, pooling and their transposes.

use crate::{ConvTransposeAttributes, Dim, Padding};

/// A window that does not fit its input, or attributes that contradict each other.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct WindowError(pub(crate) String);

/// A window operator with nothing left open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedWindow {
    /// All begins, then all ends; negative values crop. For a transposed window they crop the output, and negative
    /// ends add rows that only the bias reaches.
    pub pads: Vec<i64>,
    /// Output size per spatial axis.
    pub output: Vec<usize>,
}

/// One axis of a window: size, distance between windows, distance between taps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
}

impl Axis {
    /// From first to last tap.
    fn extent(self) -> Result<i64, WindowError> {
        let taps = self.kernel.checked_sub(1).ok_or_else(|| WindowError("a kernel size is 0".to_owned()))?;
        if self.stride == 0 || self.dilation == 0 {
            return Err(WindowError("strides and dilations must be at least 1, found 0".to_owned()));
        }
        taps.checked_mul(self.dilation)
            .and_then(|n| i64::try_from(n).ok()?.checked_add(1))
            .filter(|&n| n <= SIZE_MAX)
            .ok_or_else(|| {
                WindowError(format!("a kernel of {} taps {} apart is too large", self.kernel, self.dilation))
            })
    }
}

/// Sizes, strides and pads above this are refused, so that sums and products of a few of them cannot overflow.
const SIZE_MAX: i64 = 1 << 40;

/// `values[i]`, or 1 when the vector is empty.
fn at(values: &[usize], axis: usize, what: &str, rank: usize) -> Result<usize, WindowError> {
    match values.len() {
        0 => Ok(1),
        n if n == rank => Ok(values[axis]),
        n => Err(WindowError(format!("{n} {what} for {rank} spatial dimensions"))),
    }
}

pub(crate) fn axes(
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
) -> Result<Vec<Axis>, WindowError> {
    let rank = kernel.len();
    (0..rank)
        .map(|i| {
            let axis = Axis {
                kernel: kernel[i],
                stride: at(strides, i, "strides", rank)?,
                dilation: at(dilations, i, "dilations", rank)?,
            };
            if axis.extent()? > SIZE_MAX || axis.stride as u64 > SIZE_MAX as u64 {
                return Err(WindowError(format!("stride {} is too large", axis.stride)));
            }
            Ok(axis)
        })
        .collect()
}

fn explicit(padding: &Padding, axis: usize, rank: usize) -> Result<(i64, i64), WindowError> {
    let (begin, end) = match padding {
        Padding::Explicit(p) if p.len() == 2 * rank => (p[axis], p[axis + rank]),
        // An empty list means zeros, as an absent attribute does.
        Padding::Explicit(p) if !p.is_empty() => {
            return Err(WindowError(format!(
                "{} pads for {rank} spatial dimensions, expected {}",
                p.len(),
                2 * rank
            )));
        }
        _ => (0, 0),
    };
    if begin.unsigned_abs().max(end.unsigned_abs()) > SIZE_MAX as u64 {
        return Err(WindowError(format!("pads {begin} and {end} are too large")));
    }
    Ok((begin, end))
}

fn checked_size(size: usize) -> Result<i64, WindowError> {
    i64::try_from(size)
        .ok()
        .filter(|&n| n <= SIZE_MAX)
        .ok_or_else(|| WindowError(format!("a spatial size of {size} is too large")))
}

/// Pads and output size along one axis of known size.
fn resolve_axis(
    input: usize,
    window: Axis,
    padding: &Padding,
    axis: usize,
    rank: usize,
    ceil_mode: bool,
) -> Result<(i64, i64, usize), WindowError> {
    let input = checked_size(input)?;
    let extent = window.extent()?;
    let stride = window.stride as i64;
    if let Padding::SameUpper | Padding::SameLower = padding {
        let output = (input + stride - 1) / stride;
        let total = ((output - 1) * stride + extent - input).max(0);
        let small = total / 2;
        let (begin, end) =
            if *padding == Padding::SameUpper { (small, total - small) } else { (total - small, small) };
        return Ok((begin, end, output as usize));
    }
    let (begin, end) = explicit(padding, axis, rank)?;
    let room = input + begin + end - extent;
    let mut steps = room.div_euclid(stride);
    if ceil_mode {
        steps += i64::from(room.rem_euclid(stride) != 0);
        // The last window must start inside the input or the padding before it.
        if steps * stride >= input + begin {
            steps -= 1;
        }
    }
    if steps < 0 {
        return Err(WindowError(format!(
            "a window of {extent} does not fit into {} (size {input}, pads {begin} and {end})",
            input + begin + end
        )));
    }
    Ok((begin, end, steps as usize + 1))
}

/// The explicit pads and the output sizes of a window that slides over `input`.
///
/// Empty `strides` and `dilations` mean ones. With `ceil_mode` a last window may hang over the end, but it must
/// start inside the input or the padding before it (ONNX 22). The result of a window that does not fit is an error,
/// not an empty tensor.
///
/// # Errors
/// Vectors of the wrong length, zero strides, dilations or kernels, windows larger than the padded input, absurd sizes.
pub fn resolve_window(
    input: &[usize],
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    padding: &Padding,
    ceil_mode: bool,
) -> Result<ResolvedWindow, WindowError> {
    let rank = input.len();
    if kernel.len() != rank {
        return Err(WindowError(format!("{} kernel sizes for {rank} spatial dimensions", kernel.len())));
    }
    let mut pads = vec![0; 2 * rank];
    let mut output = Vec::with_capacity(rank);
    for (i, window) in axes(kernel, strides, dilations)?.into_iter().enumerate() {
        let (begin, end, size) = resolve_axis(input[i], window, padding, i, rank, ceil_mode)?;
        (pads[i], pads[i + rank]) = (begin, end);
        output.push(size);
    }
    Ok(ResolvedWindow { pads, output })
}

/// The same for a dimension that may not be known: a symbol survives when the window keeps the size.
pub(crate) fn window_dim(
    input: &Dim,
    window: Axis,
    padding: &Padding,
    axis: usize,
    rank: usize,
    ceil_mode: bool,
) -> Result<Dim, WindowError> {
    if let Dim::Fixed(n) = input {
        return Ok(Dim::Fixed(resolve_axis(*n, window, padding, axis, rank, ceil_mode)?.2));
    }
    let extent = window.extent()?;
    let keeps = window.stride == 1
        && match padding {
            Padding::SameUpper | Padding::SameLower => true,
            _ => {
                let (begin, end) = explicit(padding, axis, rank)?;
                begin + end == extent - 1
            }
        };
    Ok(if keeps { input.clone() } else { Dim::UNKNOWN })
}

/// Pads and output size of a transposed convolution along one axis.
fn resolve_transposed_axis(
    input: usize,
    window: Axis,
    attributes: &ConvTransposeAttributes,
    axis: usize,
    rank: usize,
) -> Result<(i64, i64, usize), WindowError> {
    let input = checked_size(input)?;
    let extent = window.extent()?;
    let stride = window.stride as i64;
    let extra = match attributes.output_padding.len() {
        0 => 0,
        n if n == rank => checked_size(attributes.output_padding[axis])?,
        n => return Err(WindowError(format!("{n} output paddings for {rank} spatial dimensions"))),
    };
    let padding = &attributes.conv.padding;
    let same = matches!(padding, Padding::SameUpper | Padding::SameLower);
    let too_large = || WindowError("the output of the transposed convolution is too large".to_owned());
    // Without cropping. An input without elements has an output without elements.
    let full = (input - 1).max(0).checked_mul(stride).and_then(|n| n.checked_add(extra + extent));
    let full = full.ok_or_else(too_large)?;
    let wanted = match attributes.output_shape.len() {
        0 if same => Some(input.checked_mul(stride).ok_or_else(too_large)?),
        0 => None,
        n if n == rank => Some(checked_size(attributes.output_shape[axis])?),
        n => return Err(WindowError(format!("{n} output sizes for {rank} spatial dimensions"))),
    };
    let (begin, end) = match wanted {
        Some(size) => {
            let total = full - size;
            if total < 0 {
                (0, total)
            } else if *padding == Padding::SameUpper {
                (total / 2, total - total / 2)
            } else {
                (total - total / 2, total / 2)
            }
        }
        None => explicit(padding, axis, rank)?,
    };
    let output = full - begin - end;
    let output = usize::try_from(output).map_err(|_| {
        WindowError(format!("pads {begin} and {end} crop more than the {full} rows that there are"))
    })?;
    Ok((begin, end, output))
}

/// The explicit pads and the output sizes of a transposed convolution with the given kernel sizes.
///
/// # Errors
/// As for [`resolve_window`].
pub fn resolve_transposed(
    input: &[usize],
    kernel: &[usize],
    attributes: &ConvTransposeAttributes,
) -> Result<ResolvedWindow, WindowError> {
    let rank = input.len();
    if kernel.len() != rank {
        return Err(WindowError(format!("{} kernel sizes for {rank} spatial dimensions", kernel.len())));
    }
    let mut pads = vec![0; 2 * rank];
    let mut output = Vec::with_capacity(rank);
    let windows = axes(kernel, &attributes.conv.strides, &attributes.conv.dilations)?;
    for (i, window) in windows.into_iter().enumerate() {
        let (begin, end, size) = resolve_transposed_axis(input[i], window, attributes, i, rank)?;
        (pads[i], pads[i + rank]) = (begin, end);
        output.push(size);
    }
    Ok(ResolvedWindow { pads, output })
}

/// The same for a dimension that may not be known.
pub(crate) fn transposed_dim(
    input: &Dim,
    window: Axis,
    attributes: &ConvTransposeAttributes,
    axis: usize,
    rank: usize,
) -> Result<Dim, WindowError> {
    // The attributes are checked with a small input even when the size is open.
    let (.., size) =
        resolve_transposed_axis(input.fixed().unwrap_or(1 << 20), window, attributes, axis, rank)?;
    Ok(match input {
        Dim::Fixed(_) => Dim::Fixed(size),
        _ if attributes.output_shape.len() == rank => Dim::Fixed(attributes.output_shape[axis]),
        _ if window.stride == 1 && size == 1 << 20 => input.clone(),
        _ => Dim::UNKNOWN,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ConvAttributes;

    #[track_caller]
    fn check(
        input: usize,
        k: usize,
        s: usize,
        d: usize,
        padding: Padding,
        ceil: bool,
        expected: (i64, i64, usize),
    ) {
        let w = resolve_window(&[input], &[k], &[s], &[d], &padding, ceil).unwrap();
        assert_eq!((w.pads[0], w.pads[1], w.output[0]), expected);
    }

    #[test]
    fn explicit_same_and_ceil() {
        check(5, 3, 1, 1, Padding::Valid, false, (0, 0, 3));
        check(5, 3, 2, 1, Padding::Explicit(vec![1, 1]), false, (1, 1, 3));
        check(5, 3, 1, 2, Padding::Valid, false, (0, 0, 1));
        check(5, 2, 2, 1, Padding::SameUpper, false, (0, 1, 3));
        check(5, 2, 2, 1, Padding::SameLower, false, (1, 0, 3));
        check(6, 1, 3, 1, Padding::SameUpper, false, (0, 0, 2));
        check(4, 3, 2, 1, Padding::Valid, true, (0, 0, 2));
        // The third window would start in the padding at the end.
        check(2, 1, 2, 1, Padding::Explicit(vec![0, 1]), true, (0, 1, 1));
        check(1, 2, 2, 1, Padding::Valid, true, (0, 0, 1));
        check(5, 3, 1, 1, Padding::Explicit(vec![-1, 0]), false, (-1, 0, 2));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |input: usize, k: usize, s: usize, p: Padding| {
            resolve_window(&[input], &[k], &[s], &[], &p, false).unwrap_err().to_string()
        };
        assert_eq!(
            error(2, 3, 1, Padding::Valid),
            "a window of 3 does not fit into 2 (size 2, pads 0 and 0)"
        );
        assert!(error(2, 0, 1, Padding::Valid).contains("kernel size is 0"));
        assert!(error(2, 1, 0, Padding::Valid).contains("at least 1"));
        assert!(error(2, 1, 1, Padding::Explicit(vec![1])).contains("1 pads"));
        assert!(error(2, usize::MAX, 1, Padding::Valid).contains("too large"));
        assert!(error(usize::MAX, 1, 1, Padding::Valid).contains("too large"));
        assert!(error(2, 1, 1, Padding::Explicit(vec![i64::MIN, 0])).contains("too large"));
    }

    #[test]
    fn transposed() {
        let attributes = |stride: usize, padding: Padding, shape: &[usize], extra: &[usize]| {
            let conv = ConvAttributes { strides: vec![stride], padding, ..Default::default() };
            ConvTransposeAttributes { conv, output_padding: extra.to_vec(), output_shape: shape.to_vec() }
        };
        let resolve = |a: &ConvTransposeAttributes| {
            let w = resolve_transposed(&[3], &[3], a).unwrap();
            (w.pads[0], w.pads[1], w.output[0])
        };
        assert_eq!(resolve(&attributes(1, Padding::Valid, &[], &[])), (0, 0, 5));
        assert_eq!(resolve(&attributes(3, Padding::Valid, &[10], &[])), (0, -1, 10));
        assert_eq!(resolve(&attributes(3, Padding::Valid, &[], &[1])), (0, 0, 10));
        assert_eq!(resolve(&attributes(2, Padding::SameUpper, &[], &[])), (0, 1, 6));
        assert_eq!(resolve(&attributes(2, Padding::SameLower, &[], &[])), (1, 0, 6));
        assert_eq!(resolve(&attributes(2, Padding::Explicit(vec![1, 1]), &[], &[])), (1, 1, 5));
        let crop = attributes(1, Padding::Explicit(vec![9, 9]), &[], &[]);
        assert!(resolve_transposed(&[3], &[3], &crop).unwrap_err().to_string().contains("crop more"));
    }
}
