//! The gated feed-forward network of one expert, for the rows that were routed to it.

use lightering_units::BlockFormat;

use super::unpack::checked_row_bytes;
use super::{BlockActivations, CHANNELS, block_matmul_scratch_len};
use crate::Activation;
use crate::arch::dispatch;
use crate::elementwise::{Binary, Combine};
use crate::epilogue::ActivateRows;
use crate::threads::{Shareable, ThreadPool};

/// A matrix of weights in blocks, `[n, row_bytes]`, where it lies.
#[derive(Clone, Copy)]
pub struct BlockWeights<'a> {
    /// Format of each row.
    pub format: BlockFormat,
    /// The rows, one for each output channel.
    pub bytes: &'a [u8],
}

impl std::fmt::Debug for BlockWeights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of {}", self.bytes.len(), self.format)
    }
}

/// Weights of `down(activation(gate(x)) · up(x))`: an expert, or the feed-forward network of a dense layer.
#[derive(Clone, Copy, Debug)]
pub struct ExpertFfn<'a> {
    /// Elements of the rows that go in and come out.
    pub width: usize,
    /// Elements between.
    pub hidden: usize,
    /// SiLU for SwiGLU, GELU for GeGLU, ReLU for ReGLU.
    pub activation: Activation,
    /// `[hidden, width]`
    pub gate: BlockWeights<'a>,
    /// `[hidden, width]`
    pub up: BlockWeights<'a>,
    /// `[width, hidden]`
    pub down: BlockWeights<'a>,
}

/// Values of scratch that [`expert_ffn`] needs for up to `rows` rows. It grows with them.
///
/// # Panics
/// Panics when `hidden` is no whole number of blocks of `down`.
pub fn expert_ffn_scratch_len(down: BlockFormat, width: usize, hidden: usize, rows: usize) -> usize {
    checked_row_bytes(down, hidden);
    rows * (2 * hidden + width) + block_matmul_scratch_len(down, hidden, rows)
}

/// `out[slots[i]] = weights[i] · down(activation(gate(x[rows[i]])) · up(x[rows[i]]))` for each `i`.
///
/// `x` was made ready once, for all the rows of a step and all experts; where the formats of `gate` and `up` have blocks
/// of different lengths, `x_up` is `x` made ready for the latter. `out` is `[_, width]`: as each result has a place of
/// its own, whoever adds up the results of a row's experts can do so in a fixed order, in whatever order the experts
/// came. If a slot is named more than once, the last result is kept. `scratch` has [`expert_ffn_scratch_len`] values.
///
/// A result has the same bits whatever other rows are computed in the call.
///
/// # Panics
/// Panics before anything is written to `out` when a slice is too short for its shape, there is no such row, or rows,
/// slots and weights are not as many.
pub fn expert_ffn(
    pool: &ThreadPool,
    expert: &ExpertFfn<'_>,
    x: &BlockActivations<'_>,
    x_up: Option<&BlockActivations<'_>>,
    rows: &[u32],
    slots: &[u32],
    weights: &[f32],
    out: &mut [f32],
    scratch: &mut [f32],
) {
    let ExpertFfn { width, hidden, activation, gate, up, down } = *expert;
    let count = rows.len();
    assert!(slots.len() == count && weights.len() == count, "as many slots and weights as rows");
    let x_up = x_up.unwrap_or(x);
    for (what, weights, x) in [("gate", gate, x), ("up", up, x_up)] {
        assert_eq!(x.k, width, "activations are rows of {} values, not {width}", x.k);
        let fits = weights.format.block_len() == x.block_len;
        assert!(fits, "activations of {what} are for other blocks than {}", weights.format);
    }
    for (what, weights, n, k) in
        [("gate", gate, hidden, width), ("up", up, hidden, width), ("down", down, width, hidden)]
    {
        let need = n * checked_row_bytes(weights.format, k);
        assert!(weights.bytes.len() >= need, "{what} has {} bytes, {need} needed", weights.bytes.len());
    }
    for &slot in slots {
        let places = out.len() / width.max(1);
        assert!((slot as usize) < places, "slot {slot} of {places}");
    }
    let need = expert_ffn_scratch_len(down.format, width, hidden, count);
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
    let (x, x_up) = (x.select(rows), x_up.select(rows));
    if count == 0 || width == 0 {
        return;
    }

    let (gated, rest) = scratch.split_at_mut(count * hidden);
    let (ups, rest) = rest.split_at_mut(count * hidden);
    let (results, rest) = rest.split_at_mut(count * width);
    let isa = pool.isa();
    let (gated_at, ups_at) = (Shareable(gated.as_mut_ptr()), Shareable(ups.as_mut_ptr()));
    pool.parallel_for(hidden.div_ceil(CHANNELS), &|task, _| {
        let first = task * CHANNELS;
        let channels = first..hidden.min(first + CHANNELS);
        let (n, g, u) =
            (channels.len(), gated_at.get().wrapping_add(first), ups_at.get().wrapping_add(first));
        x.part(gate.format, gate.bytes, channels.clone(), g, hidden).run(isa);
        x_up.part(up.format, up.bytes, channels, u, hidden).run(isa);
        dispatch(isa, ActivateRows { activation, data: g, rows: count, n, stride: hidden });
        for row in 0..count {
            let (x, y) = (g.wrapping_add(row * hidden), u.wrapping_add(row * hidden).cast_const());
            dispatch(isa, Combine { op: Binary::Mul, x, n, y, scalar: 0.0 });
        }
    });
    let inner = BlockActivations::new(pool, down.format, hidden, gated, count, rest);
    let (results_at, out_at) = (Shareable(results.as_mut_ptr()), Shareable(out.as_mut_ptr()));
    pool.parallel_for(width.div_ceil(CHANNELS), &|task, _| {
        let first = task * CHANNELS;
        let channels = first..width.min(first + CHANNELS);
        let n = channels.len();
        inner.part(down.format, down.bytes, channels, results_at.get().wrapping_add(first), width).run(isa);
        for row in 0..count {
            // SAFETY: the results have a row for each of `rows`, `out` one for each slot, as checked; both are whole,
            // and no other task touches these channels.
            unsafe {
                let from = results_at.get().add(row * width + first);
                let to = out_at.get().add(slots[row] as usize * width + first);
                for i in 0..n {
                    *to.add(i) = weights[row] * *from.add(i);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::{numbers, random_blocks};
    use super::*;
    use crate::{Isa, block_matmul};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The same bits as from whole products, for any selection of rows.
        #[test]
        fn an_expert_is_its_three_products(
            formats in prop::sample::select(vec![
                [BlockFormat::Q4_K, BlockFormat::Q4_K, BlockFormat::Q6_K],
                [BlockFormat::Q4_K, BlockFormat::Q6_K, BlockFormat::Q5_0],
                [BlockFormat::Q8_0, BlockFormat::Q5_0, BlockFormat::Q8_0],
                [BlockFormat::Q4_K, BlockFormat::Q8_0, BlockFormat::Q4_K],
                [BlockFormat::F16, BlockFormat::BF16, BlockFormat::Q8_0],
                [BlockFormat::MXFP4, BlockFormat::MXFP4, BlockFormat::MXFP4],
            ]),
            blocks in 1usize..3, hidden in 1usize..3, all in 1usize..9, picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            activation in prop::sample::select(vec![Activation::Silu, Activation::GeluTanh, Activation::Relu]), threads in 1usize..4, seed in 0u64..1000,
        ) {
            let (width, hidden) = (256 * blocks, 256 * hidden);
            let gate = random_blocks(formats[0], hidden, width, seed);
            let up = random_blocks(formats[1], hidden, width, seed + 1);
            let down = random_blocks(formats[2], width, hidden, seed + 2);
            let x = numbers(all * width, seed + 3);
            let rows: Vec<u32> = picks.iter().map(|p| p.index(all) as u32).collect();
            let slots: Vec<u32> = (0..rows.len() as u32).map(|i| 2 * i + 1).collect();
            let weights: Vec<f32> = numbers(rows.len(), seed + 4);
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let pool = ThreadPool::with_isa(threads, isa);
                let product = |format, w: &[u8], n: usize, k: usize, x: &[f32]| {
                    let rows = x.len() / k;
                    let mut scratch = vec![f32::NAN; block_matmul_scratch_len(format, k, rows)];
                    let mut y = vec![f32::NAN; rows * n];
                    block_matmul(&pool, format, w, n, k, x, rows, &mut y, &mut scratch);
                    y
                };
                let mut inner = product(formats[0], &gate, hidden, width, &x);
                crate::activate(&pool, activation, &mut inner);
                inner.iter_mut().zip(product(formats[1], &up, hidden, width, &x)).for_each(|(g, u)| *g *= u);
                let whole = product(formats[2], &down, width, hidden, &inner);

                let mut scratches =
                    [formats[0], formats[1]].map(|f| vec![f32::NAN; block_matmul_scratch_len(f, width, all)]);
                let [a, b] = &mut scratches;
                let ready = BlockActivations::new(&pool, formats[0], width, &x, all, a);
                let ready_up = BlockActivations::new(&pool, formats[1], width, &x, all, b);
                let expert = ExpertFfn {
                    width, hidden, activation,
                    gate: BlockWeights { format: formats[0], bytes: &gate },
                    up: BlockWeights { format: formats[1], bytes: &up },
                    down: BlockWeights { format: formats[2], bytes: &down },
                };
                let same = formats[0].block_len() == formats[1].block_len();
                let mut scratch = vec![f32::NAN; expert_ffn_scratch_len(formats[2], width, hidden, rows.len())];
                let mut out = vec![7.0; (2 * rows.len() + 1) * width];
                let x_up = (!same).then_some(&ready_up);
                expert_ffn(&pool, &expert, &ready, x_up, &rows, &slots, &weights, &mut out, &mut scratch);
                for (slot, out) in out.chunks_exact(width).enumerate() {
                    if slot % 2 == 0 {
                        prop_assert!(out.iter().all(|y| *y == 7.0));
                        continue;
                    }
                    let (row, weight) = (rows[slot / 2] as usize, weights[slot / 2]);
                    for (got, want) in out.iter().zip(&whole[row * width..]) {
                        let want = weight * want;
                        prop_assert!(got.to_bits() == want.to_bits(), "{isa:?} {row}: {got}, not {want}");
                    }
                }
            }
        }
    }
}
