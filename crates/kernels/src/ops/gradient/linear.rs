//! Linear algebra.

use crate::ops::real::Real;

/// Determinant of the matrix without row `row` and column `column`, by elimination with the largest pivots.
fn minor(x: &[f64], n: usize, row: usize, column: usize, work: &mut [f64]) -> f64 {
    let m = n - 1;
    for i in 0..m {
        for j in 0..m {
            work[i * m + j] = x[(i + usize::from(i >= row)) * n + j + usize::from(j >= column)];
        }
    }
    let mut det = 1.0;
    for k in 0..m {
        let pivot =
            (k..m).max_by(|&a, &b| work[a * m + k].abs().total_cmp(&work[b * m + k].abs())).unwrap_or(k);
        if work[pivot * m + k] == 0.0 {
            return 0.0;
        }
        if pivot != k {
            (0..m).for_each(|j| work.swap(pivot * m + j, k * m + j));
            det = -det;
        }
        det *= work[k * m + k];
        for i in k + 1..m {
            let factor = work[i * m + k] / work[k * m + k];
            for j in k..m {
                work[i * m + j] -= factor * work[k * m + j];
            }
        }
    }
    det
}

/// `dx = dy · cofactors` of each `n × n` matrix; right for singular matrices, too. `scratch` has `2 · n²` elements.
pub fn det_grad<T: Real>(n: usize, x: &[T], dy: &[T], dx: &mut [T], scratch: &mut [f64]) {
    let (matrix, work) = scratch.split_at_mut(n * n);
    for ((x, dy), dx) in x.chunks_exact(n * n).zip(dy).zip(dx.chunks_exact_mut(n * n)) {
        matrix.iter_mut().zip(x).for_each(|(to, from)| *to = from.to_f64());
        for i in 0..n {
            for j in 0..n {
                let sign = if (i + j) % 2 == 0 { 1.0 } else { -1.0 };
                dx[i * n + j] = T::from_f64(dy.to_f64() * sign * minor(matrix, n, i, j, work));
            }
        }
    }
}
