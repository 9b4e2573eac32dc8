//! Rotary position embedding (Su et al., "RoFormer", 2021) and the ways of stretching it over longer contexts.
//!
//! Angles do not depend on the layer, so they are computed once for the rows of a step and serve all layers that share
//! base and scaling. The formulas are those of ggml's `rope_yarn` and `ggml_rope_cache_init`, but in double precision,
//! where ggml multiplies its way from one angle to the next in single precision.

use std::f64::consts::PI;

use crate::arch::{Kernel, Simd, dispatch};
use crate::threads::{Shareable, ThreadPool};

/// How positions beyond those of the training are brought within it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling<'a> {
    /// They are not.
    None,
    /// Positions are divided by `factor` (Chen et al., 2023).
    Linear {
        /// New context by that of the training.
        factor: f32,
    },
    /// Slow angles are divided by `factor`, fast ones kept, and those between mixed (YaRN: Peng et al., 2023).
    Yarn {
        /// New context by that of the training.
        factor: f32,
        /// Positions of the training.
        original_context: usize,
        /// Turns within the original context from which on an angle is kept; 32 in the paper.
        beta_fast: f32,
        /// Turns up to which an angle is divided by the whole factor; 1 in the paper.
        beta_slow: f32,
        /// Multiplies the paper's own factor of cosines and sines, `1 + 0.1 · ln(factor)`.
        magnitude: f32,
    },
    /// Each angle is divided by a factor of its own: Llama 3 (see [`llama3_rope_factors`]) and LongRoPE.
    Factors {
        /// Factors, `[dims / 2]`.
        factors: &'a [f32],
        /// Multiplies cosines and sines.
        magnitude: f32,
    },
}

/// The angle of each pair at position 1, and the factor of cosines and sines.
fn frequency(pair: usize, dims: usize, base: f64, scaling: &RopeScaling<'_>) -> f64 {
    let plain = libm::pow(base, -((2 * pair) as f64) / dims as f64);
    match *scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / f64::from(factor),
        RopeScaling::Factors { factors, .. } => plain / f64::from(factors[pair]),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
            // The pair that makes so many turns within the original context.
            let pair_of = |turns: f32| {
                let ratio = original_context as f64 / (f64::from(turns) * 2.0 * PI);
                dims as f64 * libm::log(ratio) / (2.0 * libm::log(base))
            };
            let low = libm::floor(pair_of(beta_fast)).max(0.0);
            let high = libm::ceil(pair_of(beta_slow)).min(dims as f64 - 1.0);
            let ramp = ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            plain / f64::from(factor) * ramp + plain * (1.0 - ramp)
        }
    }
}

/// Cosines and sines of the rows at `positions`: `out` is `[rows, dims]`, for each row the `dims / 2` cosines, then as
/// many sines, with the factor that the scaling asks for.
///
/// # Panics
/// Panics when `dims` is odd, `out` is too short, or there are factors for fewer than `dims / 2` pairs.
pub fn rope_angles(positions: &[i32], dims: usize, base: f32, scaling: &RopeScaling<'_>, out: &mut [f32]) {
    assert!(dims.is_multiple_of(2), "{dims} elements are no pairs");
    let need = positions.len() * dims;
    assert!(out.len() >= need, "out has {} values, {need} needed", out.len());
    if let RopeScaling::Factors { factors, .. } = scaling {
        assert!(factors.len() >= dims / 2, "{} factors for {} pairs", factors.len(), dims / 2);
    }
    let magnitude = match *scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => 1.0,
        RopeScaling::Factors { magnitude, .. } => f64::from(magnitude),
        RopeScaling::Yarn { factor, magnitude, .. } => {
            f64::from(magnitude) * (1.0 + 0.1 * libm::log(f64::from(factor)))
        }
    };
    for pair in 0..dims / 2 {
        let frequency = frequency(pair, dims, f64::from(base), scaling);
        for (row, &position) in out.chunks_exact_mut(dims.max(1)).zip(positions) {
            let (sin, cos) = libm::sincos(f64::from(position) * frequency);
            row[pair] = (cos * magnitude) as f32;
            row[dims / 2 + pair] = (sin * magnitude) as f32;
        }
    }
}

/// The factors of Llama 3.1 and later for [`RopeScaling::Factors`], `[dims / 2]`: `factor` for angles that turn fewer
/// than `low_freq_factor` times within the original context, 1 for more than `high_freq_factor` times, and their mixture
/// between.
///
/// # Panics
/// Panics when `out` has fewer than `dims / 2` values.
pub fn llama3_rope_factors(
    dims: usize,
    base: f32,
    factor: f32,
    low_freq_factor: f32,
    high_freq_factor: f32,
    original_context: usize,
    out: &mut [f32],
) {
    for (pair, out) in out[..dims / 2].iter_mut().enumerate() {
        let turns =
            original_context as f64 * frequency(pair, dims, f64::from(base), &RopeScaling::None) / (2.0 * PI);
        let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
        let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        *out = (1.0 / ((1.0 - kept) / f64::from(factor) + kept)) as f32;
    }
}

/// Which elements of a head form pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopePairing {
    /// Element `i` and element `i + dims / 2` (GPT-NeoX, Qwen, Gemma, Phi).
    Halves,
    /// Element `2 i` and element `2 i + 1` (Llama in GGUF files).
    Interleaved,
}

/// Which elements of rows are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeShape {
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Heads, one after another from the beginning of a row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The first rotated element of each head.
    pub offset: usize,
    /// Rotated elements of each head.
    pub dims: usize,
    /// Which of them form pairs.
    pub pairing: RopePairing,
}

impl RopeShape {
    /// All elements of `heads` heads of `head_dim` elements, rows without gaps.
    pub fn whole(heads: usize, head_dim: usize, pairing: RopePairing) -> RopeShape {
        RopeShape { row_stride: heads * head_dim, heads, head_dim, offset: 0, dims: head_dim, pairing }
    }
}

struct RotateRow<'a> {
    shape: &'a RopeShape,
    x: &'a mut [f32],
    angles: &'a [f32],
}

impl Kernel for RotateRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let RopeShape { heads, head_dim, offset, dims, pairing, .. } = *self.shape;
        let (cos, sin) = self.angles.split_at(dims / 2);
        for head in 0..heads {
            let x = &mut self.x[head * head_dim + offset..][..dims];
            match pairing {
                RopePairing::Halves => {
                    let (a, b) = x.split_at_mut(dims / 2);
                    let (b, cos, sin) = (&mut b[..a.len()], &cos[..a.len()], &sin[..a.len()]);
                    for i in 0..a.len() {
                        let (x, y) = (a[i], b[i]);
                        a[i] = x * cos[i] - y * sin[i];
                        b[i] = y * cos[i] + x * sin[i];
                    }
                }
                RopePairing::Interleaved => {
                    let pairs = x.as_chunks_mut::<2>().0;
                    let (cos, sin) = (&cos[..pairs.len()], &sin[..pairs.len()]);
                    for i in 0..pairs.len() {
                        let [x, y] = pairs[i];
                        pairs[i] = [x * cos[i] - y * sin[i], y * cos[i] + x * sin[i]];
                    }
                }
            }
        }
    }
}

/// Rotates each pair of each head of the rows of `x` by its angle; `angles`, `[rows, dims]`, are those of
/// [`rope_angles`]. The result has the same bits for every instruction set and number of threads.
///
/// # Panics
/// Panics before anything is written when `x` or `angles` is too short, rows overlap or heads have fewer elements than
/// are rotated.
pub fn rotate(pool: &ThreadPool, shape: &RopeShape, x: &mut [f32], rows: usize, angles: &[f32]) {
    let RopeShape { row_stride, heads, head_dim, offset, dims, .. } = *shape;
    let width = heads * head_dim;
    assert!(dims.is_multiple_of(2), "{dims} elements are no pairs");
    assert!(offset + dims <= head_dim, "{dims} elements from {offset} on, heads have {head_dim}");
    assert!(row_stride >= width || rows <= 1, "rows of {width} overlap at a distance of {row_stride}");
    if rows == 0 || dims == 0 {
        return;
    }
    let need = (rows - 1) * row_stride + width;
    assert!(x.len() >= need, "x has {} values, {need} needed", x.len());
    assert!(angles.len() >= rows * dims, "angles are {} values, {} needed", angles.len(), rows * dims);
    let x = Shareable(x.as_mut_ptr());
    let task = |row: usize, _: usize| {
        // SAFETY: rows were checked to lie in x and not to overlap; each is one task's.
        let x = unsafe { std::slice::from_raw_parts_mut(x.get().add(row * row_stride), width) };
        dispatch(pool.isa(), RotateRow { shape, x, angles: &angles[row * dims..][..dims] });
    };
    if rows * heads * dims < 50_000 {
        (0..rows).for_each(|row| task(row, 0));
    } else {
        pool.parallel_for(rows, &task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::gemm::tests::values;
    use proptest::prelude::*;

    /// `rope_yarn` and `ggml_rope_cache_init` of ggml (ops.cpp), in its own words but in double precision.
    fn ggml(
        position: i32,
        dims: usize,
        base: f64,
        freq_scale: f64,
        ext_factor: f64,
        context: f64,
        beta: [f64; 2],
        factors: Option<&[f32]>,
        attn_factor: f64,
    ) -> Vec<f32> {
        let corr_dim = |n_rot: f64| dims as f64 * (context / (n_rot * 2.0 * PI)).ln() / (2.0 * base.ln());
        let corr = [corr_dim(beta[0]).floor().max(0.0), corr_dim(beta[1]).ceil().min(dims as f64 - 1.0)];
        let mut out = vec![0.0; dims];
        let mut theta = f64::from(position);
        for i0 in (0..dims).step_by(2) {
            let extrapolated = theta / factors.map_or(1.0, |f| f64::from(f[i0 / 2]));
            let interpolated = freq_scale * extrapolated;
            let (mut angle, mut mscale) = (interpolated, attn_factor);
            if ext_factor != 0.0 {
                let y = ((i0 / 2) as f64 - corr[0]) / (corr[1] - corr[0]).max(0.001);
                let mix = (1.0 - y.clamp(0.0, 1.0)) * ext_factor;
                angle = interpolated * (1.0 - mix) + extrapolated * mix;
                mscale *= 1.0 + 0.1 * (1.0 / freq_scale).ln();
            }
            out[i0 / 2] = (angle.cos() * mscale) as f32;
            out[dims / 2 + i0 / 2] = (angle.sin() * mscale) as f32;
            theta *= base.powf(-2.0 / dims as f64);
        }
        out
    }

    #[test]
    fn angles_are_those_of_ggml() {
        let positions = [0, 1, 7, 1000, 8191];
        let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 * 0.25).collect();
        for base in [10_000.0f32, 1_000_000.0] {
            let beta = [32.0, 1.0];
            let cases: [(RopeScaling<'_>, [f64; 4], Option<&[f32]>); 4] = [
                (RopeScaling::None, [1.0, 0.0, 4096.0, 1.0], None),
                (RopeScaling::Linear { factor: 8.0 }, [0.125, 0.0, 4096.0, 1.0], None),
                (
                    RopeScaling::Yarn {
                        factor: 4.0,
                        original_context: 4096,
                        beta_fast: 32.0,
                        beta_slow: 1.0,
                        magnitude: 1.25,
                    },
                    [0.25, 1.0, 4096.0, 1.25],
                    None,
                ),
                (
                    RopeScaling::Factors { factors: &factors, magnitude: 1.5 },
                    [1.0, 0.0, 4096.0, 1.5],
                    Some(&factors),
                ),
            ];
            for (scaling, [scale, ext, context, attn], factors) in cases {
                let mut out = vec![f32::NAN; positions.len() * 64];
                rope_angles(&positions, 64, base, &scaling, &mut out);
                for (position, out) in positions.iter().zip(out.chunks_exact(64)) {
                    let want = ggml(*position, 64, f64::from(base), scale, ext, context, beta, factors, attn);
                    for (got, want) in out.iter().zip(want) {
                        assert!((got - want).abs() < 1e-6, "{scaling:?} at {position}: {got}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn factors_of_llama_3_are_those_of_its_code() {
        let mut out = [f32::NAN; 64];
        llama3_rope_factors(128, 500_000.0, 8.0, 1.0, 4.0, 8192, &mut out);
        for (pair, got) in out.into_iter().enumerate() {
            // `apply_scaling` of the reference code, by wavelengths.
            let wavelength = 2.0 * PI * 500_000f64.powf(2.0 * pair as f64 / 128.0);
            let want = if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                8.0
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / 8.0 + smooth)
            };
            assert!((f64::from(got) - want).abs() < 1e-6, "pair {pair}: {got}, not {want}");
        }
        assert_eq!((out[0], out[63]), (1.0, 8.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pairs_turn_and_the_rest_stays(
            rows in 1usize..20, heads in 1usize..5, pairs in 1usize..40, before in 0usize..3, behind in 0usize..3,
            gap in 0usize..3, interleaved: bool, big: bool, seed in 0u64..1000,
        ) {
            let rows = if big { rows * 40 } else { rows };
            let (dims, head_dim) = (2 * pairs, before + 2 * pairs + behind);
            let pairing = if interleaved { RopePairing::Interleaved } else { RopePairing::Halves };
            let row_stride = heads * head_dim + gap;
            let shape = RopeShape { row_stride, heads, head_dim, offset: before, dims, pairing };
            let x = values(rows * row_stride, seed);
            let angles = values(rows * dims, seed + 1);
            let mut want = x.clone();
            for row in 0..rows {
                for head in 0..heads {
                    for pair in 0..pairs {
                        let from = row * row_stride + head * head_dim + before;
                        let (i, j) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                        let (cos, sin) = (angles[row * dims + pair], angles[row * dims + pairs + pair]);
                        let (a, b) = (x[from + i], x[from + j]);
                        want[from + i] = a * cos - b * sin;
                        want[from + j] = b * cos + a * sin;
                    }
                }
            }
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let mut y = x.clone();
                rotate(&ThreadPool::with_isa(2, isa), &shape, &mut y, rows, &angles);
                prop_assert_eq!(&y, &want);
            }
        }
    }
}
