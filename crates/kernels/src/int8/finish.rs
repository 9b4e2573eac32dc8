//! What becomes of exact sums: bytes, i32 or f32.

use super::PANEL;
use crate::arch::{Bytes, Requantization};
use crate::epilogue::{Activation, check_rows};

/// Where the sums of a product of bytes go. Rows (pixels) lie `stride` apart; scales have one value, or one per
/// column.
#[derive(Debug)]
pub enum ByteOutput<'a> {
    /// `saturate(round_half_even(sum * scale) + zero)`, as ONNX `QLinearConv`; `scale` is
    /// `a_scale * w_scale / out_scale`.
    Bytes {
        /// The bytes; signed ones in two's complement.
        data: &'a mut [u8],
        /// Distance between rows.
        stride: usize,
        /// Whether the bytes are signed.
        signed: bool,
        /// Factors.
        scale: &'a [f32],
        /// Zero point, a value of the type.
        zero: i32,
        /// Lowest and highest value, for a fused ReLU or clip; further limited by the type.
        limits: Option<(i32, i32)>,
    },
    /// The sums, as ONNX `MatMulInteger` and `ConvInteger`.
    I32 {
        /// The sums.
        data: &'a mut [i32],
        /// Distance between rows.
        stride: usize,
    },
    /// `activation(sum * scale + bias)`, for activations that were quantized on the way in.
    F32 {
        /// The results.
        data: &'a mut [f32],
        /// Distance between rows.
        stride: usize,
        /// Factors.
        scale: &'a [f32],
        /// Added after scaling.
        bias: Option<&'a [f32]>,
        /// Applied last; only `None`, `Relu` and `Clip` (others in a pass of their own).
        activation: Activation,
    },
}

#[derive(Clone, Copy)]
enum Target {
    Bytes { data: *mut u8, how: Requantization },
    I32 { data: *mut i32 },
    F32 { data: *mut f32, low: f32, high: f32 },
}

/// A checked [`ByteOutput`] with the bias.
#[derive(Clone, Copy)]
pub(super) struct Sink<'a> {
    target: Target,
    stride: usize,
    first: usize,
    scale: &'a [f32],
    float_bias: Option<&'a [f32]>,
    bias: Option<&'a [i32]>,
}

// SAFETY: tasks write disjoint rows or columns.
unsafe impl Sync for Sink<'_> {}

impl<'a> Sink<'a> {
    pub(super) fn new(
        output: ByteOutput<'a>,
        bias: Option<&'a [i32]>,
        rows: usize,
        columns: usize,
    ) -> Sink<'a> {
        assert!(bias.is_none_or(|b| b.len() >= columns), "too few bias values for {columns} columns");
        let check_scale = |scale: &[f32]| {
            assert!(
                scale.len() == 1 || scale.len() >= columns,
                "{} scales for {columns} columns",
                scale.len()
            );
        };
        match output {
            ByteOutput::Bytes { data, stride, signed, scale, zero, limits } => {
                check_rows("output", data.len(), rows, columns, stride);
                check_scale(scale);
                let (type_low, type_high, shift) = if signed { (-128, 127, 128) } else { (0, 255, 0) };
                let (low, high) = limits.unwrap_or((type_low, type_high));
                assert!((type_low..=type_high).contains(&zero), "zero point {zero} outside the type");
                let high = high.clamp(type_low, type_high);
                let low = low.clamp(type_low, high);
                let how = Requantization {
                    high: (high - zero) as f32,
                    zero: (zero + shift) as i16,
                    low: (low + shift) as u8,
                    flip: shift as u8,
                };
                let target = Target::Bytes { data: data.as_mut_ptr(), how };
                Sink { target, stride, first: 0, scale, float_bias: None, bias }
            }
            ByteOutput::I32 { data, stride } => {
                check_rows("output", data.len(), rows, columns, stride);
                let target = Target::I32 { data: data.as_mut_ptr() };
                Sink { target, stride, first: 0, scale: &[1.0], float_bias: None, bias }
            }
            ByteOutput::F32 { data, stride, scale, bias: float_bias, activation } => {
                check_rows("output", data.len(), rows, columns, stride);
                check_scale(scale);
                assert!(
                    float_bias.is_none_or(|b| b.len() >= columns),
                    "too few bias values for {columns} columns"
                );
                let (low, high, more) = activation.split();
                assert!(!more, "{activation:?} cannot be fused into a product of bytes");
                let target = Target::F32 { data: data.as_mut_ptr(), low, high };
                Sink { target, stride, first: 0, scale, float_bias, bias }
            }
        }
    }

    /// The same output seen from column `first` on.
    pub(super) fn columns_from(&self, first: usize) -> Sink<'a> {
        Sink { first: self.first + first, ..*self }
    }

    /// Where the bytes of row `row` from column `column` on go and how they come about; `None` for other results.
    #[inline(always)]
    pub(super) fn bytes(&self, row: usize, column: usize) -> Option<(*mut u8, Requantization)> {
        match self.target {
            Target::Bytes { data, how } => {
                Some((data.wrapping_add(row * self.stride + self.first + column), how))
            }
            _ => None,
        }
    }

    /// Writes a row of `n` sums from column `column` on; `row_sum` is the sum of the row's activations where the
    /// weights have zero points.
    ///
    /// # Safety
    /// The output holds the row, and no other thread writes it.
    #[inline(always)]
    pub(super) unsafe fn finish<T: Bytes>(
        &self,
        t: T,
        c: &Columns,
        sums: &mut [i32; PANEL],
        n: usize,
        row_sum: i32,
        row: usize,
        column: usize,
    ) {
        let n = n.min(PANEL);
        let at = row * self.stride + self.first + column;
        if c.has_zeros && !matches!(self.target, Target::Bytes { .. }) {
            for (sum, zero) in sums.iter_mut().zip(&c.zeros) {
                *sum = sum.wrapping_sub(zero.wrapping_mul(row_sum));
            }
        }
        match self.target {
            Target::Bytes { data, how } => {
                let mut i = 0;
                while i < n {
                    // SAFETY: by contract; the panel's arrays hold whole groups of four vectors.
                    unsafe {
                        let mut parts = [t.zero(); 4];
                        for v in 0..4 {
                            let at = i + v * T::LANES;
                            parts[v] =
                                t.add(t.load(sums.as_ptr().add(at)), t.load(c.offset.as_ptr().add(at)));
                            if c.has_zeros {
                                let zeros = t.load(c.zeros.as_ptr().add(at));
                                parts[v] = t.subtract_product(parts[v], zeros, row_sum);
                            }
                        }
                        let scales = c.scale.as_ptr().add(i);
                        t.requantize::<true>(parts, scales, how, data.add(at + i), (4 * T::LANES).min(n - i));
                    }
                    i += 4 * T::LANES;
                }
            }
            Target::I32 { data } => {
                // SAFETY: by contract.
                let out = unsafe { std::slice::from_raw_parts_mut(data.add(at), n) };
                for (out, (sum, offset)) in out.iter_mut().zip(sums.iter().zip(&c.offset)) {
                    *out = sum.wrapping_add(*offset);
                }
            }
            Target::F32 { data, low, high } => {
                // SAFETY: by contract.
                let out = unsafe { std::slice::from_raw_parts_mut(data.add(at), n) };
                for (i, out) in out.iter_mut().enumerate() {
                    let y = sums[i].wrapping_add(c.offset[i]) as f32 * c.scale[i] + c.bias[i];
                    let y = if y < low { low } else { y };
                    *out = if y > high { high } else { y };
                }
            }
        }
    }
}

/// What is the same for all rows of a panel; aligned, for vectors that cross cache lines cost twice.
#[repr(align(64))]
pub(super) struct Columns {
    pub(super) offset: [i32; PANEL],
    zeros: [i32; PANEL],
    pub(super) has_zeros: bool,
    pub(super) scale: [f32; PANEL],
    bias: [f32; PANEL],
}

impl Columns {
    /// For the columns `column..column + n`; `zero` is the zero point of the activations, `k` the number of
    /// products per sum.
    pub(super) fn new(
        sums: &[i32],
        weight_zeros: Option<&[i32]>,
        zero: i32,
        k: usize,
        sink: &Sink<'_>,
        column: usize,
        n: usize,
    ) -> Columns {
        let mut c = Columns {
            offset: [0; PANEL],
            zeros: [0; PANEL],
            has_zeros: false,
            scale: [sink.scale[0]; PANEL],
            bias: [0.0; PANEL],
        };
        for i in 0..n {
            let j = column + i;
            let weight_zero = weight_zeros.map_or(0, |z| z[j]);
            c.zeros[i] = weight_zero;
            c.has_zeros |= weight_zero != 0;
            let constant = (k as i32).wrapping_mul(weight_zero).wrapping_sub(sums[j]).wrapping_mul(zero);
            c.offset[i] = constant.wrapping_add(sink.bias.map_or(0, |b| b[sink.first + j]));
            if sink.scale.len() > 1 {
                c.scale[i] = sink.scale[sink.first + j];
            }
            c.bias[i] = sink.float_bias.map_or(0.0, |b| b[sink.first + j]);
        }
        c
    }
}
