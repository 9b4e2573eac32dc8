//! NumPy broadcasting of shapes.

use crate::{Dim, Shape};

/// Two dimensions that cannot be broadcast against each other.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{left} does not broadcast with {right}: sizes {a} and {b} differ and neither is 1")]
pub struct BroadcastError {
    left: String,
    right: String,
    a: Dim,
    b: Dim,
}

/// `[2,?,n]`.
pub(crate) fn shown(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// The size that two aligned dimensions broadcast to, or `None` when they cannot.
///
/// A fixed size other than 1 wins over anything that is not known; two unknown ones stay unknown unless they carry
/// the same symbol.
pub fn broadcast_dim(a: &Dim, b: &Dim) -> Option<Dim> {
    Some(match (a, b) {
        (Dim::Fixed(1), other) | (other, Dim::Fixed(1)) => other.clone(),
        (Dim::Fixed(n), Dim::Fixed(m)) if n != m => return None,
        (Dim::Fixed(n), _) | (_, Dim::Fixed(n)) => Dim::Fixed(*n),
        (Dim::Symbol(s), Dim::Symbol(t)) if s == t => a.clone(),
        _ => Dim::UNKNOWN,
    })
}

/// The shape that `a` and `b` broadcast to.
///
/// # Errors
/// When two aligned sizes differ and neither is 1.
pub fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Shape, BroadcastError> {
    let rank = a.len().max(b.len());
    let aligned = |s: &[Dim], i: usize| match (i + s.len()).checked_sub(rank) {
        Some(at) => s[at].clone(),
        None => Dim::Fixed(1),
    };
    (0..rank)
        .map(|i| {
            let (x, y) = (aligned(a, i), aligned(b, i));
            broadcast_dim(&x, &y).ok_or_else(|| BroadcastError {
                left: shown(a),
                right: shown(b),
                a: x,
                b: y,
            })
        })
        .collect()
}

/// The shape that concrete `a` and `b` broadcast to.
///
/// # Errors
/// When two aligned sizes differ and neither is 1.
pub fn broadcast_dims(a: &[usize], b: &[usize]) -> Result<Vec<usize>, BroadcastError> {
    let dims = |s: &[usize]| -> Shape { s.iter().map(|&n| Dim::Fixed(n)).collect() };
    Ok(broadcast(&dims(a), &dims(b))?.iter().map(|d| d.fixed().unwrap_or(1)).collect())
}

/// Whether `from` can be broadcast to exactly `to` (one direction only), as far as both are known.
pub fn broadcasts_to(from: &[Dim], to: &[Dim]) -> bool {
    from.len() <= to.len()
        && from.iter().rev().zip(to.iter().rev()).all(|(f, t)| match (f, t) {
            (Dim::Fixed(n), Dim::Fixed(m)) => n == m || *n == 1,
            _ => true,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numpy_rules() {
        assert_eq!(broadcast_dims(&[2, 1, 3], &[4, 1]).unwrap(), [2, 4, 3]);
        assert_eq!(broadcast_dims(&[], &[4]).unwrap(), [4]);
        assert_eq!(broadcast_dims(&[0], &[1]).unwrap(), [0]);
        let error = broadcast_dims(&[2, 3], &[2]).unwrap_err().to_string();
        assert_eq!(error, "[2,3] does not broadcast with [2]: sizes 3 and 2 differ and neither is 1");
        assert!(broadcast_dims(&[0], &[2]).is_err());
    }

    #[test]
    fn what_is_not_known_stays_open() {
        let n = Dim::Symbol("n".into());
        let m = Dim::Symbol("m".into());
        assert_eq!(broadcast_dim(&n, &n), Some(n.clone()));
        assert_eq!(broadcast_dim(&n, &m), Some(Dim::UNKNOWN));
        assert_eq!(broadcast_dim(&n, &Dim::Fixed(1)), Some(n.clone()));
        assert_eq!(broadcast_dim(&n, &Dim::Fixed(5)), Some(Dim::Fixed(5)));
        assert!(broadcasts_to(std::slice::from_ref(&n), &[Dim::Fixed(3), m]));
        assert!(!broadcasts_to(&[Dim::Fixed(3)], &[Dim::Fixed(1)]));
    }
}
