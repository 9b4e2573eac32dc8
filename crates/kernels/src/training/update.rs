//! Steps of optimizers, in place, in one sweep.

use super::{get, over_chunks, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::threads::{Shareable, ThreadPool};

/// What changes from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate.
    pub rate: f32,
    /// Factor of the gradient.
    pub scale: f32,
    /// `1 - beta1^t`
    pub correction1: f32,
    /// `1 - beta2^t`
    pub correction2: f32,
}

impl Schedule {
    /// From `[rate, scale, correction1, correction2]`.
    pub fn from_values(v: [f32; 4]) -> Schedule {
        Schedule { rate: v[0], scale: v[1], correction1: v[2], correction2: v[3] }
    }
}

/// Attributes of Adam.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamRule {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// The decay acts on the parameter instead of the gradient.
    pub decoupled: bool,
}

/// Which values of a parameter a gradient belongs to: `[outer, channels of axis, inner]`.
#[derive(Clone, Copy, Debug)]
pub struct UpdatePlace<'a> {
    /// Sizes before the axis multiplied.
    pub outer: usize,
    /// Size of the axis.
    pub axis: usize,
    /// Sizes behind the axis multiplied.
    pub inner: usize,
    /// Channels along the axis, ascending; `None` for all.
    pub channels: Option<&'a [usize]>,
}

impl<'a> UpdatePlace<'a> {
    /// All `len` values.
    pub fn all(len: usize) -> UpdatePlace<'a> {
        UpdatePlace { outer: 1, axis: 1, inner: len, channels: None }
    }

    /// Values that are updated.
    pub fn values(&self) -> usize {
        self.outer * self.channels.map_or(self.axis, <[usize]>::len) * self.inner
    }

    fn check(&self, parameter: usize, gradient: usize) {
        assert!(parameter >= self.outer * self.axis * self.inner, "the parameter is too short");
        assert!(gradient >= self.values(), "the gradient is too short");
        if let Some(list) = self.channels {
            let ascending = list.windows(2).all(|w| w[0] < w[1]);
            assert!(
                ascending && list.last().is_none_or(|&c| c < self.axis),
                "channels must ascend below {}",
                self.axis
            );
        }
    }

    /// Calls `f(place in the parameter, place in the gradient, count)` for the runs that values `first..first + count` of
    /// the gradient are made of.
    #[inline(always)]
    fn runs(&self, first: usize, count: usize, mut f: impl FnMut(usize, usize, usize)) {
        let Some(list) = self.channels else { return f(first, first, count) };
        let mut at = first;
        while at < first + count {
            let (line, offset) = (at / self.inner, at % self.inner);
            let (outer, channel) = (line / list.len(), list[line % list.len()]);
            let n = (self.inner - offset).min(first + count - at);
            f((outer * self.axis + channel) * self.inner + offset, at, n);
            at += n;
        }
    }
}

/// The rules of one sweep over `n` values; moments that a rule does not have are null.
#[derive(Clone, Copy)]
enum Rule {
    Accumulate,
    Sgd { momentum: f32, nesterov: bool, weight_decay: f32 },
    Adam(AdamRule),
    Lion { beta1: f32, beta2: f32, weight_decay: f32 },
}

struct Sweep {
    rule: Rule,
    schedule: Schedule,
    p: *mut f32,
    m: *mut f32,
    v: *mut f32,
    g: *const f32,
    n: usize,
}

impl Kernel for Sweep {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Schedule { rate, scale, correction1, correction2 } = self.schedule;
        let scale = s.splat(scale);
        macro_rules! sweep {
            (|$i:ident, $n:ident, $p:ident, $g:ident| $new:expr) => {{
                let mut $i = 0;
                while $i < self.n {
                    let $n = S::LANES.min(self.n - $i);
                    // SAFETY: who builds the kernel vouches for `n` values of everything that the rule has.
                    unsafe {
                        let $p = get(s, self.p.add($i), $n);
                        let $g = s.mul(get(s, self.g.add($i), $n), scale);
                        let new = $new;
                        put(s, self.p.add($i), $n, new);
                    }
                    $i += S::LANES;
                }
            }};
        }
        match self.rule {
            Rule::Accumulate => sweep!(|i, n, p, g| s.add(p, g)),
            Rule::Sgd { momentum, nesterov, weight_decay } => {
                let (back, decay) = (s.splat(-rate), s.splat(weight_decay));
                let momentum = s.splat(momentum);
                if self.m.is_null() {
                    sweep!(|i, n, p, g| s.fma(s.fma(p, decay, g), back, p))
                } else {
                    sweep!(|i, n, p, g| {
                        let g = s.fma(p, decay, g);
                        let v = s.fma(get(s, self.m.add(i), n), momentum, g);
                        put(s, self.m.add(i), n, v);
                        let step = if nesterov { s.fma(v, momentum, g) } else { v };
                        s.fma(step, back, p)
                    })
                }
            }
            Rule::Adam(a) => {
                let coupled = s.splat(if a.decoupled { 0.0 } else { a.weight_decay });
                let keep = s.splat(if a.decoupled { 1.0 - rate * a.weight_decay } else { 1.0 });
                let (b1, r1) = (s.splat(a.beta1), s.splat(1.0 - a.beta1));
                let (b2, r2) = (s.splat(a.beta2), s.splat(1.0 - a.beta2));
                let back = s.splat(-rate / correction1);
                let root = s.splat(1.0 / correction2.sqrt());
                let epsilon = s.splat(a.epsilon);
                sweep!(|i, n, p, g| {
                    let g = s.fma(p, coupled, g);
                    let m = s.fma(get(s, self.m.add(i), n), b1, s.mul(g, r1));
                    let v = s.fma(get(s, self.v.add(i), n), b2, s.mul(s.mul(g, g), r2));
                    put(s, self.m.add(i), n, m);
                    put(s, self.v.add(i), n, v);
                    let size = s.fma(s.sqrt(v), root, epsilon);
                    s.fma(s.div(m, size), back, s.mul(p, keep))
                })
            }
            Rule::Lion { beta1, beta2, weight_decay } => {
                let keep = s.splat(1.0 - rate * weight_decay);
                let (b1, r1) = (s.splat(beta1), s.splat(1.0 - beta1));
                let (b2, r2) = (s.splat(beta2), s.splat(1.0 - beta2));
                let (zero, back) = (s.splat(0.0), s.splat(-rate));
                sweep!(|i, n, p, g| {
                    let m = get(s, self.m.add(i), n);
                    let u = s.fma(m, b1, s.mul(g, r1));
                    put(s, self.m.add(i), n, s.fma(m, b2, s.mul(g, r2)));
                    let step = s.select(s.lt(zero, u), back, zero);
                    let step = s.select(s.lt(u, zero), s.splat(rate), step);
                    s.fma(p, keep, step)
                })
            }
        }
    }
}

fn step(
    pool: &ThreadPool,
    rule: Rule,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    moments: [Option<&mut [f32]>; 2],
    gradient: &[f32],
) {
    place.check(parameter.len(), gradient.len());
    let values = place.values();
    let moments = moments.map(|m| {
        assert!(m.as_ref().is_none_or(|m| m.len() >= values), "a moment is too short");
        Shareable(m.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr))
    });
    let p = Shareable(parameter.as_mut_ptr());
    let at = |q: Shareable<f32>, n: usize| if q.get().is_null() { q.get() } else { q.get().wrapping_add(n) };
    over_chunks(pool, values, &|first, count| {
        place.runs(first, count, |to, from, n| {
            dispatch(
                pool.isa(),
                Sweep {
                    rule,
                    schedule,
                    p: p.get().wrapping_add(to),
                    m: at(moments[0], from),
                    v: at(moments[1], from),
                    g: gradient[from..].as_ptr(),
                    n,
                },
            );
        });
    });
}

/// `parameter += gradient · scale`
///
/// # Panics
/// As [`sgd_step`].
pub fn accumulate(
    pool: &ThreadPool,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    gradient: &[f32],
) {
    step(pool, Rule::Accumulate, schedule, place, parameter, [None, None], gradient);
}

/// One step of stochastic gradient descent; `velocity` is there when `momentum` is not 0.
///
/// # Panics
/// Panics when a slice is too short or the channels do not ascend.
pub fn sgd_step(
    pool: &ThreadPool,
    momentum: f32,
    nesterov: bool,
    weight_decay: f32,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    velocity: Option<&mut [f32]>,
    gradient: &[f32],
) {
    let rule = Rule::Sgd { momentum, nesterov, weight_decay };
    step(pool, rule, schedule, place, parameter, [velocity, None], gradient);
}

/// One step of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019).
///
/// # Panics
/// As [`sgd_step`].
pub fn adam_step(
    pool: &ThreadPool,
    rule: &AdamRule,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
) {
    step(pool, Rule::Adam(*rule), schedule, place, parameter, [Some(first), Some(second)], gradient);
}

/// One step of Lion (Chen et al., 2023).
///
/// # Panics
/// As [`sgd_step`].
pub fn lion_step(
    pool: &ThreadPool,
    [beta1, beta2]: [f32; 2],
    weight_decay: f32,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    momentum: &mut [f32],
    gradient: &[f32],
) {
    let rule = Rule::Lion { beta1, beta2, weight_decay };
    step(pool, rule, schedule, place, parameter, [Some(momentum), None], gradient);
}

/// Values of a block of 8-bit state.
const BLOCK: usize = 256;
/// Its bytes: a scale, then the values.
const BLOCK_BYTES: usize = BLOCK + 4;

/// One block of Adam with moments in bytes: the first as `sign · (q / 127)² · scale`, the root of the second as
/// `(q / 255)² · scale`. Squares keep small values apart, which equal steps would round to zero.
struct Adam8 {
    rule: AdamRule,
    schedule: Schedule,
    p: *mut [f32; BLOCK],
    g: *const [f32; BLOCK],
    first: *mut u8,
    second: *mut u8,
}

impl Kernel for Adam8 {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let a = self.rule;
        // SAFETY: who builds the kernel vouches for blocks of 256 values and 260 bytes.
        let (p, g, first, second) = unsafe {
            (
                &mut *self.p,
                &*self.g,
                std::slice::from_raw_parts_mut(self.first, BLOCK_BYTES),
                std::slice::from_raw_parts_mut(self.second, BLOCK_BYTES),
            )
        };
        let scale_of = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let (mut m, mut r) = ([0f32; BLOCK], [0f32; BLOCK]);
        let step = scale_of(first) / (127.0 * 127.0);
        for (m, &q) in m.iter_mut().zip(&first[4..]) {
            let q = f32::from(q as i8);
            *m = q * q.abs() * step;
        }
        let step = scale_of(second) / (255.0 * 255.0);
        for (r, &q) in r.iter_mut().zip(&second[4..]) {
            let q = f32::from(q);
            *r = q * q * step;
        }
        let keep = s.splat(1.0 - self.schedule.rate * a.weight_decay);
        let (b1, r1) = (s.splat(a.beta1), s.splat(1.0 - a.beta1));
        let (b2, r2) = (s.splat(a.beta2), s.splat(1.0 - a.beta2));
        let back = s.splat(-self.schedule.rate / self.schedule.correction1);
        let root = s.splat(1.0 / self.schedule.correction2.sqrt());
        let (epsilon, factor) = (s.splat(a.epsilon), s.splat(self.schedule.scale));
        let (mut top_m, mut top_r) = (s.splat(0.0), s.splat(0.0));
        let mut i = 0;
        while i < BLOCK {
            // SAFETY: blocks are a whole number of vectors.
            unsafe {
                let g = s.mul(s.load(g.as_ptr().add(i)), factor);
                let m_new = s.fma(s.load(m.as_ptr().add(i)), b1, s.mul(g, r1));
                let before = s.load(r.as_ptr().add(i));
                let v = s.fma(s.mul(before, before), b2, s.mul(s.mul(g, g), r2));
                let r_new = s.sqrt(v);
                s.store(m.as_mut_ptr().add(i), m_new);
                s.store(r.as_mut_ptr().add(i), r_new);
                top_m = s.max(top_m, s.abs(m_new));
                top_r = s.max(top_r, r_new);
                let size = s.fma(r_new, root, epsilon);
                let to = p.as_mut_ptr().add(i);
                s.store(to, s.fma(s.div(m_new, size), back, s.mul(s.load(to), keep)));
            }
            i += S::LANES;
        }
        let (top_m, top_r) = (s.maximum(top_m), s.maximum(top_r));
        first[..4].copy_from_slice(&top_m.to_le_bytes());
        second[..4].copy_from_slice(&top_r.to_le_bytes());
        let (per_m, per_r) =
            (if top_m > 0.0 { 1.0 / top_m } else { 0.0 }, if top_r > 0.0 { 1.0 / top_r } else { 0.0 });
        for (q, m) in first[4..].iter_mut().zip(&m) {
            let size = ((m.abs() * per_m).sqrt() * 127.0 + 0.5).min(127.0) as i32;
            *q = (if *m < 0.0 { -size } else { size }) as i8 as u8;
        }
        for (q, r) in second[4..].iter_mut().zip(&r) {
            // A root that is not zero stays so: the step divides by it.
            let size = ((r * per_r).sqrt() * 255.0 + 0.5).min(255.0);
            *q = (if *r > 0.0 { size.max(1.0) } else { size }) as i32 as u8;
        }
    }
}

/// One step of Adam with both moments in blocks of 256 bytes behind a scale (Dettmers et al., 2022); the decay is
/// decoupled.
///
/// # Panics
/// As [`sgd_step`].
pub fn adam8_step(
    pool: &ThreadPool,
    rule: &AdamRule,
    schedule: Schedule,
    place: &UpdatePlace<'_>,
    parameter: &mut [f32],
    first: &mut [u8],
    second: &mut [u8],
    gradient: &[f32],
) {
    place.check(parameter.len(), gradient.len());
    let values = place.values();
    let blocks = values.div_ceil(BLOCK);
    assert!(
        first.len() >= blocks * BLOCK_BYTES && second.len() >= blocks * BLOCK_BYTES,
        "a moment is too short"
    );
    let p = Shareable(parameter.as_mut_ptr());
    let (first, second) = (Shareable(first.as_mut_ptr()), Shareable(second.as_mut_ptr()));
    let per_task =
        if pool.threads() == 1 { blocks } else { 64.max(blocks.div_ceil(pool.threads() * 8)) }.max(1);
    pool.parallel_for(blocks.div_ceil(per_task), &|task, _| {
        for block in task * per_task..blocks.min((task + 1) * per_task) {
            let at = block * BLOCK;
            let count = BLOCK.min(values - at);
            let (mut local, mut g) = ([0f32; BLOCK], [0f32; BLOCK]);
            g[..count].copy_from_slice(&gradient[at..at + count]);
            place.runs(at, count, |to, from, n| {
                // SAFETY: blocks are disjoint parts of the parameter; the run lies inside it.
                unsafe {
                    std::ptr::copy_nonoverlapping(p.get().add(to), local.as_mut_ptr().add(from - at), n);
                }
            });
            let kernel = Adam8 {
                rule: *rule,
                schedule,
                p: &raw mut local,
                g: &raw const g,
                first: first.get().wrapping_add(block * BLOCK_BYTES),
                second: second.get().wrapping_add(block * BLOCK_BYTES),
            };
            dispatch(pool.isa(), kernel);
            place.runs(at, count, |to, from, n| {
                // SAFETY: as above.
                unsafe {
                    std::ptr::copy_nonoverlapping(local.as_ptr().add(from - at), p.get().add(to), n);
                }
            });
        }
    });
}
