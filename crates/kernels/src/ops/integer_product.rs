//! Matrix products and convolutions of 8-bit integers, generic over signedness: the reference that the vector
//! kernels are compared with, and the path for whatever they do not take.

use super::quantize::{QuantizedInteger, quantize_value};

/// One matrix product `[rows, depth] · [depth, columns]` out of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductShape {
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub columns: usize,
    /// Summed over.
    pub depth: usize,
}

/// Zero points or scales of one matrix: one for all, or one per row (column).
fn broadcast<T: Copy>(values: &[T], index: usize) -> T {
    values[if values.len() == 1 { 0 } else { index }]
}

/// One row of `(a − a_zero) · (b − b_zero)`, in wrapping 32-bit arithmetic as accumulators of this width do.
///
/// `a` is `[depth]`, `b` is `[depth, columns]`, `b_zeros` holds one zero point or one per column.
pub fn integer_product_row<A: QuantizedInteger, B: QuantizedInteger>(
    a: &[A],
    a_zero: i32,
    b: &[B],
    b_zeros: &[B],
    out: &mut [i32],
) {
    let columns = out.len();
    out.fill(0);
    let mut sum = 0i32;
    for (a, b) in a.iter().zip(b.chunks_exact(columns.max(1))) {
        let a = a.to_i32() - a_zero;
        sum = sum.wrapping_add(a);
        for (out, b) in out.iter_mut().zip(b) {
            *out = out.wrapping_add(a * b.to_i32());
        }
    }
    for (j, out) in out.iter_mut().enumerate() {
        *out = out.wrapping_sub(sum.wrapping_mul(broadcast(b_zeros, j).to_i32()));
    }
}

/// As [`integer_product_row`] for `b` given as `[columns, depth]`.
pub fn integer_product_row_transposed<A: QuantizedInteger, B: QuantizedInteger>(
    a: &[A],
    a_zero: i32,
    b: &[B],
    b_zeros: &[B],
    out: &mut [i32],
) {
    for (j, (out, b)) in out.iter_mut().zip(b.chunks_exact(a.len().max(1))).enumerate() {
        let zero = broadcast(b_zeros, j).to_i32();
        let products = a.iter().zip(b).map(|(a, b)| (a.to_i32() - a_zero).wrapping_mul(b.to_i32() - zero));
        *out = products.fold(0i32, i32::wrapping_add);
    }
}

/// `out = (a − a_zero) · (b − b_zero)`; `a_zeros` holds one zero point or one per row, `b_zeros` one or one per
/// column.
pub fn integer_product<A: QuantizedInteger, B: QuantizedInteger>(
    shape: ProductShape,
    a: &[A],
    a_zeros: &[A],
    b: &[B],
    b_zeros: &[B],
    out: &mut [i32],
) {
    for row in 0..shape.rows {
        integer_product_row(
            &a[row * shape.depth..][..shape.depth],
            broadcast(a_zeros, row).to_i32(),
            b,
            b_zeros,
            &mut out[row * shape.columns..][..shape.columns],
        );
    }
}

/// Rounds a row of sums to the result's scale: `y = saturate(round(sum · multiplier) + zero)`, where the multiplier
/// is `a_scale · b_scale / y_scale` (one, or one per column).
pub fn requantize_row<Q: QuantizedInteger>(
    sums: &[i32],
    multipliers: &[f32],
    zero: i32,
    (low, high): (i32, i32),
    out: &mut [Q],
) {
    for (j, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
        let scaled = sum as f32 * broadcast(multipliers, j);
        *out = Q::from_i32(quantize_value(scaled, 1.0, zero, low, high));
    }
}

/// Geometry of a convolution over up to three spatial axes (unused leading ones have size 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntegerConvShape {
    /// Channels of the input.
    pub channels: usize,
    /// Channels of the result.
    pub filters: usize,
    /// Independent groups of channels.
    pub groups: usize,
    /// Spatial size of the input.
    pub input: [usize; 3],
    /// Spatial size of the result.
    pub output: [usize; 3],
    /// Window.
    pub kernel: [usize; 3],
    /// Step per result element.
    pub strides: [usize; 3],
    /// Step per window element.
    pub dilations: [usize; 3],
    /// Rows before the input; negative crops.
    pub pads: [i64; 3],
    /// The input is `[input…, channels]` rather than `[channels, input…]`.
    pub channels_last: bool,
}

/// The sums of one filter over one picture: `x` is `[channels, input…]` (or channels last), `w` is `[channels/groups, kernel…]` of
/// filter `filter`, `out` is `[output…]`. Outside the picture lies `x_zero`.
pub fn integer_conv_plane<X: QuantizedInteger, W: QuantizedInteger>(
    shape: &IntegerConvShape,
    filter: usize,
    x: &[X],
    x_zero: i32,
    w: &[W],
    w_zero: i32,
    out: &mut [i32],
) {
    out.fill(0);
    let per_group = shape.channels / shape.groups;
    let first_channel = filter / (shape.filters / shape.groups) * per_group;
    let [_, height, width] = shape.input;
    let plane = shape.input.iter().product::<usize>();
    let position = |axis: usize, out: usize, tap: usize| {
        let at = (out * shape.strides[axis] + tap * shape.dilations[axis]) as i64 - shape.pads[axis];
        (at >= 0 && at < shape.input[axis] as i64).then_some(at as usize)
    };
    for channel in 0..per_group {
        let channel_at = first_channel + channel;
        let (x, pixel) = if shape.channels_last {
            (&x[channel_at..], shape.channels)
        } else {
            (&x[channel_at * plane..][..plane], 1)
        };
        let w = &w[channel * shape.kernel.iter().product::<usize>()..];
        for kd in 0..shape.kernel[0] {
            for kh in 0..shape.kernel[1] {
                for kw in 0..shape.kernel[2] {
                    let weight = w[(kd * shape.kernel[1] + kh) * shape.kernel[2] + kw].to_i32() - w_zero;
                    for od in 0..shape.output[0] {
                        let Some(id) = position(0, od, kd) else { continue };
                        for oh in 0..shape.output[1] {
                            let Some(ih) = position(1, oh, kh) else { continue };
                            let row = &x[(id * height + ih) * width * pixel..];
                            let out =
                                &mut out[(od * shape.output[1] + oh) * shape.output[2]..][..shape.output[2]];
                            for (ow, out) in out.iter_mut().enumerate() {
                                if let Some(iw) = position(2, ow, kw) {
                                    let value = (row[iw * pixel].to_i32() - x_zero).wrapping_mul(weight);
                                    *out = out.wrapping_add(value);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_points_are_subtracted() {
        let a: Vec<u8> = (0..12).map(|i| (i * 37 % 251) as u8).collect();
        let b: Vec<i8> = (0..20).map(|i| (i * 53 % 255) as u8 as i8).collect();
        let (a_zeros, b_zeros) = ([7u8, 9, 200], [1i8, -3, 5, 0, 100]);
        let shape = ProductShape { rows: 3, columns: 5, depth: 4 };
        let mut out = [0i32; 15];
        integer_product(shape, &a, &a_zeros, &b, &b_zeros, &mut out);
        for i in 0..3 {
            for j in 0..5 {
                let expected: i32 = (0..4)
                    .map(|k| {
                        (i32::from(a[i * 4 + k]) - i32::from(a_zeros[i]))
                            * (i32::from(b[k * 5 + j]) - i32::from(b_zeros[j]))
                    })
                    .sum();
                assert_eq!(out[i * 5 + j], expected);
            }
            let transposed: Vec<i8> = (0..20).map(|i| b[i % 4 * 5 + i / 4]).collect();
            let mut row = [0i32; 5];
            integer_product_row_transposed(
                &a[i * 4..][..4],
                a_zeros[i].into(),
                &transposed,
                &b_zeros,
                &mut row,
            );
            assert_eq!(row, out[i * 5..][..5]);
        }
    }

    #[test]
    fn channels_may_come_last() {
        let first = IntegerConvShape {
            channels: 4,
            filters: 2,
            groups: 2,
            input: [1, 4, 5],
            output: [1, 2, 3],
            kernel: [1, 3, 2],
            strides: [1, 2, 2],
            dilations: [1; 3],
            pads: [0, 1, 1],
            channels_last: false,
        };
        let last = IntegerConvShape { channels_last: true, ..first };
        let x: Vec<u8> = (0..80).map(|i| (i * 91 % 251) as u8).collect();
        let swapped: Vec<u8> = (0..80).map(|i| x[i % 4 * 20 + i / 4]).collect();
        let w: Vec<i8> = (0..12).map(|i| (i * 23 % 17) as i8 - 8).collect();
        for filter in 0..2 {
            let (mut a, mut b) = ([0i32; 6], [1i32; 6]);
            integer_conv_plane(&first, filter, &x, 3, &w, 1, &mut a);
            integer_conv_plane(&last, filter, &swapped, 3, &w, 1, &mut b);
            assert_eq!(a, b);
        }
    }

    #[test]
    fn padding_is_the_zero_point() {
        let shape = IntegerConvShape {
            channels: 1,
            filters: 1,
            groups: 1,
            input: [1, 3, 3],
            output: [1, 3, 3],
            kernel: [1, 3, 3],
            strides: [1; 3],
            dilations: [1; 3],
            pads: [0, 1, 1],
            channels_last: false,
        };
        let x: Vec<u8> = (2..11).collect();
        let mut out = [0i32; 9];
        integer_conv_plane(&shape, 0, &x, 1, &[1u8; 9], 0, &mut out);
        assert_eq!(out, [12, 21, 16, 27, 45, 33, 24, 39, 28]);
    }
}
