//! Linear quantisation to and from small integer and float formats.

use super::real::Real;

/// Which scale belongs to which element of a tensor seen as `[outer, axis, inner]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleLayout {
    /// Product of the dimensions before the axis.
    pub outer: usize,
    /// Size of the axis.
    pub axis: usize,
    /// Product of the dimensions after the axis.
    pub inner: usize,
    /// How scales lie along the axis.
    pub granularity: Granularity,
}

/// How many elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// All.
    Tensor,
    /// Those with the same position on the axis: scales are `[axis]`.
    Axis,
    /// This many neighbours along the axis: scales are `[outer, ceil(axis / block), inner]`.
    Block(usize),
}

impl ScaleLayout {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.outer * self.axis * self.inner
    }

    /// Number of scales.
    pub fn scales(&self) -> usize {
        match self.granularity {
            Granularity::Tensor => 1,
            Granularity::Axis => self.axis,
            Granularity::Block(block) => self.outer * self.axis.div_ceil(block) * self.inner,
        }
    }

    /// Calls `run(first element, count, first scale, scales advance with elements)` for each run of elements whose
    /// scales are the same or neighbours.
    fn for_each_run(&self, mut run: impl FnMut(usize, usize, usize, bool)) {
        match self.granularity {
            Granularity::Tensor => run(0, self.elements(), 0, false),
            Granularity::Axis => {
                for row in 0..self.outer * self.axis {
                    run(row * self.inner, self.inner, row % self.axis, false);
                }
            }
            Granularity::Block(block) => {
                let blocks = self.axis.div_ceil(block);
                for outer in 0..self.outer {
                    for a in 0..self.axis {
                        let element = (outer * self.axis + a) * self.inner;
                        run(element, self.inner, (outer * blocks + a / block) * self.inner, true);
                    }
                }
            }
        }
    }
}

/// Scales of any floating-point type.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [half::f16]),
    /// Half the bits of single precision.
    BF16(&'a [half::bf16]),
    /// Double precision.
    F64(&'a [f64]),
}

impl Scales<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Scales::F32(s) => s.len(),
            Scales::F16(s) => s.len(),
            Scales::BF16(s) => s.len(),
            Scales::F64(s) => s.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them.
    #[inline(always)]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Scales::F32(s) => s[index],
            Scales::F16(s) => s[index].to_f32(),
            Scales::BF16(s) => s[index].to_f32(),
            Scales::F64(s) => s[index] as f32,
        }
    }
}

/// Element types that can be quantised.
pub trait Quantizable: bytemuck::Pod + Send + Sync {
    /// As single precision.
    fn widened(self) -> f32;
}

macro_rules! quantizable {
    ($($t:ty => $f:expr),*) => {$(
        impl Quantizable for $t {
            #[inline(always)]
            fn widened(self) -> f32 {
                $f(self)
            }
        }
    )*};
}
quantizable!(f32 => |x| x, f64 => |x| x as f32, half::f16 => half::f16::to_f32, half::bf16 => half::bf16::to_f32, i32 => |x| x as f32);

/// Integer types that quantised values have, in their in-memory form.
pub trait QuantizedInteger: bytemuck::Pod + Send + Sync {
    /// Widened.
    fn to_i32(self) -> i32;
    /// Narrowed; the value is in range.
    fn from_i32(value: i32) -> Self;
}

macro_rules! quantized_integer {
    ($($t:ty),*) => {$(
        impl QuantizedInteger for $t {
            #[inline(always)]
            fn to_i32(self) -> i32 {
                self as i32
            }
            #[inline(always)]
            fn from_i32(value: i32) -> Self {
                value as $t
            }
        }
    )*};
}
quantized_integer!(i8, u8, i16, u16, i32);

/// `(x / scale).round() + zero`, ties to even, saturated to `low..=high`; `NaN` gives `low`.
///
/// Clamping comes before rounding: the bounds are integers, so the order makes no difference, and afterwards the
/// value is small enough to round by adding and subtracting `1.5 · 2^23`.
#[inline(always)]
pub fn quantize_value(x: f32, scale: f32, zero: i32, low: i32, high: i32) -> i32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = (x / scale).max((low - zero) as f32).min((high - zero) as f32);
    ((clamped + ROUND) - ROUND) as i32 + zero
}

/// Quantises to integers: `y = saturate(round(x / scale) + zero, low, high)`.
///
/// `x` and `y` have [`ScaleLayout::elements`] elements, `scales` has [`ScaleLayout::scales`], and `zeros` as many
/// or none. Bounds and zero points lie within ±65535.
pub fn quantize<X: Quantizable, Q: QuantizedInteger>(
    layout: &ScaleLayout,
    x: &[X],
    scales: Scales<'_>,
    zeros: Option<&[Q]>,
    (low, high): (i32, i32),
    y: &mut [Q],
) {
    assert!(x.len() == layout.elements() && y.len() == x.len() && scales.len() == layout.scales());
    layout.for_each_run(|first, count, scale, advances| {
        let (x, y) = (&x[first..first + count], &mut y[first..first + count]);
        if advances {
            for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                let zero = zeros.map_or(0, |z| z[scale + i].to_i32());
                *y = Q::from_i32(quantize_value(x.widened(), scales.get(scale + i), zero, low, high));
            }
        } else {
            let zero = zeros.map_or(0, |z| z[scale].to_i32());
            let scale = scales.get(scale);
            for (y, x) in y.iter_mut().zip(x) {
                *y = Q::from_i32(quantize_value(x.widened(), scale, zero, low, high));
            }
        }
    });
}

/// Quantises to a format of 8 or 4 bits that `encode` knows: `y = encode(x / scale + zero)`. `table` holds the
/// value of each code and is read for the zero points.
pub fn quantize_coded<X: Quantizable>(
    layout: &ScaleLayout,
    x: &[X],
    scales: Scales<'_>,
    zeros: Option<&[u8]>,
    table: &[f32; 256],
    encode: impl Fn(f32) -> u8,
    y: &mut [u8],
) {
    assert!(x.len() == layout.elements() && y.len() == x.len() && scales.len() == layout.scales());
    layout.for_each_run(|first, count, scale, advances| {
        for i in 0..count {
            let at = if advances { scale + i } else { scale };
            let zero = zeros.map_or(0.0, |z| table[usize::from(z[at])]);
            y[first + i] = encode(x[first + i].widened() / scales.get(at) + zero);
        }
    });
}

/// Back from integers: `y = (x − zero) · scale`. Sizes as for [`quantize`].
pub fn dequantize<Q: QuantizedInteger, Y: Real>(
    layout: &ScaleLayout,
    x: &[Q],
    scales: Scales<'_>,
    zeros: Option<&[Q]>,
    y: &mut [Y],
) {
    assert!(x.len() == layout.elements() && y.len() == x.len() && scales.len() == layout.scales());
    layout.for_each_run(|first, count, scale, advances| {
        let (x, y) = (&x[first..first + count], &mut y[first..first + count]);
        if advances {
            for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                let zero = zeros.map_or(0, |z| z[scale + i].to_i32());
                *y = Y::from_f32(x.to_i32().wrapping_sub(zero) as f32 * scales.get(scale + i));
            }
        } else {
            let zero = zeros.map_or(0, |z| z[scale].to_i32());
            let scale = scales.get(scale);
            for (y, x) in y.iter_mut().zip(x) {
                *y = Y::from_f32(x.to_i32().wrapping_sub(zero) as f32 * scale);
            }
        }
    });
}

/// Back from a format of 8 or 4 bits whose codes stand for the values of `table`: `y = (table[x] − zero) · scale`.
pub fn dequantize_coded<Y: Real>(
    layout: &ScaleLayout,
    x: &[u8],
    scales: Scales<'_>,
    zeros: Option<&[u8]>,
    table: &[f32; 256],
    y: &mut [Y],
) {
    assert!(x.len() == layout.elements() && y.len() == x.len() && scales.len() == layout.scales());
    layout.for_each_run(|first, count, scale, advances| {
        for i in 0..count {
            let at = if advances { scale + i } else { scale };
            let zero = zeros.map_or(0.0, |z| table[usize::from(z[at])]);
            y[first + i] = Y::from_f32((table[usize::from(x[first + i])] - zero) * scales.get(at));
        }
    });
}

/// Scale and zero point that map the range of `x`, widened to hold 0, onto `u8`.
pub fn dynamic_scale(x: &[f32]) -> (f32, u8) {
    let (low, high) = x.iter().fold((0f32, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    let zero = (-low / scale).clamp(0.0, 255.0).round_ties_even();
    (scale, zero as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_tensor(n: usize) -> ScaleLayout {
        ScaleLayout { outer: 1, axis: n, inner: 1, granularity: Granularity::Tensor }
    }

    #[test]
    fn ties_go_to_even_and_values_saturate() {
        let x = [0.5f32, 1.5, 2.5, -0.5, 1e9, -1e9, f32::INFINITY];
        let mut y = [0u8; 7];
        quantize(&per_tensor(7), &x, Scales::F32(&[1f32]), Some(&[10u8]), (0, 255), &mut y);
        assert_eq!(y, [10, 12, 12, 10, 255, 0, 255]);
    }

    #[test]
    fn a_round_trip_is_within_half_a_step() {
        for step in [0.01f32, 0.3, 2.0] {
            let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.731).sin() * 120.0 * step).collect();
            let mut q = vec![0i8; x.len()];
            let mut back = vec![0f32; x.len()];
            let layout = per_tensor(x.len());
            quantize(&layout, &x, Scales::F32(&[step]), Some(&[3i8]), (-128, 127), &mut q);
            dequantize(&layout, &q, Scales::F32(&[step]), Some(&[3i8]), &mut back);
            for (a, b) in x.iter().zip(&back) {
                assert!((a - b).abs() <= step * 0.5001, "{a} {b}");
            }
        }
    }

    #[test]
    fn axis_and_block_scales_reach_their_elements() {
        let x: Vec<f32> = (0..2 * 3 * 2).map(|i| i as f32).collect();
        let axis = ScaleLayout { outer: 2, axis: 3, inner: 2, granularity: Granularity::Axis };
        let scales = [1f32, 2.0, 4.0];
        let mut y = vec![0f32; 12];
        let q: Vec<i32> = (0..12).collect();
        dequantize(&axis, &q, Scales::F32(&scales), None, &mut y);
        for (i, y) in y.iter().enumerate() {
            assert_eq!(*y, x[i] * scales[i / 2 % 3]);
        }
        let block = ScaleLayout { granularity: Granularity::Block(2), ..axis };
        assert_eq!(block.scales(), 8);
        let scales: Vec<f32> = (1..9).map(|s| s as f32).collect();
        dequantize(&block, &q, Scales::F32(&scales), None, &mut y);
        for (i, y) in y.iter().enumerate() {
            let (outer, a, inner) = (i / 6, i / 2 % 3, i % 2);
            assert_eq!(*y, x[i] * scales[(outer * 2 + a / 2) * 2 + inner]);
        }
    }
}
