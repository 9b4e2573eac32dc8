//! Arrays as the command line sees them: element type, dimensions and little-endian bytes.

use lightering_units::DType;

/// A borrowed array of fixed-size elements in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct ArrayView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: &'a [usize],
    /// `len() * dtype.size_bytes()` bytes.
    pub bytes: &'a [u8],
}

/// One element, wide enough to compare any type without loss.
#[derive(Clone, Copy, Debug)]
enum Scalar {
    Float(f64),
    Integer(i128),
}

impl Scalar {
    fn value(self) -> f64 {
        match self {
            Scalar::Float(x) => x,
            Scalar::Integer(i) => i as f64,
        }
    }
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scalar::Float(x) => write!(f, "{x}"),
            Scalar::Integer(i) => write!(f, "{i}"),
        }
    }
}

fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("an element has the size of its type")
}

/// How many real parts an element has: 2 for complex types.
fn parts(dtype: DType) -> usize {
    if matches!(dtype, DType::Complex64 | DType::Complex128) { 2 } else { 1 }
}

fn scalar(dtype: DType, bytes: &[u8]) -> Scalar {
    use Scalar::{Float, Integer};
    match dtype {
        DType::F32 | DType::Complex64 => Float(f32::from_le_bytes(fixed(bytes)).into()),
        DType::F64 | DType::Complex128 => Float(f64::from_le_bytes(fixed(bytes))),
        DType::F16 => Float(half::f16::from_le_bytes(fixed(bytes)).to_f64()),
        DType::BF16 => Float(half::bf16::from_le_bytes(fixed(bytes)).to_f64()),
        DType::I8 | DType::I4 => Integer(i8::from_le_bytes(fixed(bytes)).into()),
        DType::I16 => Integer(i16::from_le_bytes(fixed(bytes)).into()),
        DType::U16 => Integer(u16::from_le_bytes(fixed(bytes)).into()),
        DType::I32 => Integer(i32::from_le_bytes(fixed(bytes)).into()),
        DType::U32 => Integer(u32::from_le_bytes(fixed(bytes)).into()),
        DType::I64 => Integer(i64::from_le_bytes(fixed(bytes)).into()),
        DType::U64 => Integer(u64::from_le_bytes(fixed(bytes)).into()),
        // Small float formats are compared by their bits: each value has one spelling.
        DType::U8
        | DType::Bool
        | DType::U4
        | DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F4E2M1 => Integer(bytes[0].into()),
        DType::String => unreachable!("text is not an array of fixed-size elements"),
    }
}

impl ArrayView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn scalar(&self, part: usize) -> Scalar {
        let size = self.dtype.size_bytes() / parts(self.dtype);
        scalar(self.dtype, &self.bytes[part * size..(part + 1) * size])
    }

    /// Element `index` as a number (the real part of a complex one).
    pub fn value(&self, index: usize) -> f64 {
        self.scalar(index * parts(self.dtype)).value()
    }
}

/// How far apart two numbers may be: |actual − expected| ≤ absolute + relative × |expected|.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// `--rtol`.
    pub relative: f64,
    /// `--atol`.
    pub absolute: f64,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// True when type, shape and every element agree.
    pub equal: bool,
    /// Elements compared.
    pub elements: usize,
    /// Elements that differ by more than the tolerance.
    pub mismatched: usize,
    /// Largest |actual − expected| over elements that are numbers on both sides.
    pub max_absolute: f64,
    /// Largest |actual − expected| / |expected| over elements whose expected value is not 0.
    pub max_relative: f64,
    /// The first difference as a sentence; empty when equal.
    pub difference: String,
}

impl Comparison {
    /// Of several parts: equal when all are, with the first difference.
    pub fn all(parts: impl IntoIterator<Item = Comparison>) -> Comparison {
        let mut sum = Comparison {
            equal: true,
            elements: 0,
            mismatched: 0,
            max_absolute: 0.0,
            max_relative: 0.0,
            difference: String::new(),
        };
        for part in parts {
            sum.equal &= part.equal;
            sum.elements += part.elements;
            sum.mismatched += part.mismatched;
            sum.max_absolute = sum.max_absolute.max(part.max_absolute);
            sum.max_relative = sum.max_relative.max(part.max_relative);
            if sum.difference.is_empty() {
                sum.difference = part.difference;
            }
        }
        sum
    }

    /// Not comparable element by element, and why.
    pub fn refused(difference: String) -> Comparison {
        Comparison {
            equal: false,
            elements: 0,
            mismatched: 0,
            max_absolute: 0.0,
            max_relative: 0.0,
            difference,
        }
    }
}

/// Compares element by element. Not-a-number equals not-a-number, an infinity only itself.
pub fn compare(actual: ArrayView<'_>, expected: ArrayView<'_>, tolerance: Tolerance) -> Comparison {
    if actual.dtype != expected.dtype {
        return Comparison::refused(format!("element type is {}, expected {}", actual.dtype, expected.dtype));
    }
    if actual.shape != expected.shape {
        return Comparison::refused(format!("shape is {:?}, expected {:?}", actual.shape, expected.shape));
    }
    let parts = parts(actual.dtype);
    let mut result = Comparison {
        equal: true,
        elements: expected.len(),
        mismatched: 0,
        max_absolute: 0.0,
        max_relative: 0.0,
        difference: String::new(),
    };
    for index in 0..expected.len() {
        let mut same = true;
        for part in index * parts..(index + 1) * parts {
            let (a, e) = (actual.scalar(part), expected.scalar(part));
            let distance = match (a, e) {
                (Scalar::Integer(a), Scalar::Integer(e)) => (a - e).unsigned_abs() as f64,
                _ if a.value() == e.value() || (a.value().is_nan() && e.value().is_nan()) => 0.0,
                _ => (a.value() - e.value()).abs(),
            };
            if distance.is_finite() {
                result.max_absolute = result.max_absolute.max(distance);
                if e.value() != 0.0 && e.value().is_finite() {
                    result.max_relative = result.max_relative.max(distance / e.value().abs());
                }
            }
            let allowed = tolerance.absolute + tolerance.relative * e.value().abs();
            // Written so that a distance that is not a number, or an infinite one, is a difference.
            same &= distance == 0.0 || (distance.is_finite() && distance <= allowed);
            if !same && result.difference.is_empty() {
                result.difference =
                    format!("element {:?} is {a}, expected {e}", position(index, expected.shape));
            }
        }
        result.mismatched += usize::from(!same);
    }
    result.equal = result.mismatched == 0;
    result
}

/// The coordinates of a flat index.
fn position(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (axis, size) in shape.iter().enumerate().rev() {
        at[axis] = index % size.max(&1);
        index /= size.max(&1);
    }
    at
}

/// The `count` largest elements as (index, value), largest first; among equals the first index first.
///
/// Elements that are not numbers come last.
pub fn top_k(array: ArrayView<'_>, count: usize) -> Vec<(usize, f64)> {
    let mut all: Vec<(usize, f64)> = (0..array.len()).map(|index| (index, array.value(index))).collect();
    let key = |x: f64| if x.is_nan() { f64::NEG_INFINITY } else { x };
    all.sort_by(|a, b| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0)));
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn check(actual: &[f32], expected: &[f32], tolerance: (f64, f64)) -> Comparison {
        let shape = [expected.len()];
        let (a, e) = (f32s(actual), f32s(expected));
        let view = |bytes| ArrayView { dtype: DType::F32, shape: &shape, bytes };
        compare(view(&a), view(&e), Tolerance { relative: tolerance.0, absolute: tolerance.1 })
    }

    #[test]
    fn tolerance_is_absolute_plus_relative_to_the_expected() {
        assert!(check(&[1.0625], &[1.0], (0.0625, 0.0)).equal);
        assert!(!check(&[1.0625], &[1.0], (0.03125, 0.0)).equal);
        assert!(check(&[0.5], &[0.0], (0.0, 0.5)).equal);
        let bad = check(&[1.0, 5.0, 9.0], &[1.0, 4.0, 8.0], (0.0, 0.5));
        assert_eq!((bad.mismatched, bad.max_absolute, bad.max_relative), (2, 1.0, 0.25));
        assert_eq!(bad.difference, "element [1] is 5, expected 4");
    }

    #[test]
    fn special_values_equal_only_themselves() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert!(check(&[nan, inf, -inf], &[nan, inf, -inf], (1.0, 1.0)).equal);
        for (a, e) in [(nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (inf, -inf)] {
            assert!(!check(&[a], &[e], (1e30, 1e30)).equal, "{a} against {e}");
        }
    }

    #[test]
    fn type_and_shape_must_agree() {
        let bytes = [0u8; 8];
        let view = |dtype, shape| ArrayView { dtype, shape, bytes: &bytes };
        let tolerance = Tolerance { relative: 0.0, absolute: 0.0 };
        let c = compare(view(DType::F32, &[2]), view(DType::I32, &[2]), tolerance);
        assert_eq!(c.difference, "element type is f32, expected i32");
        let c = compare(view(DType::F32, &[2, 1]), view(DType::F32, &[2]), tolerance);
        assert_eq!(c.difference, "shape is [2, 1], expected [2]");
    }

    #[test]
    fn large_integers_are_compared_without_rounding() {
        let (a, e) = (i64::MAX.to_le_bytes(), (i64::MAX - 1).to_le_bytes());
        let view = |bytes| ArrayView { dtype: DType::I64, shape: &[], bytes };
        let c = compare(view(&a), view(&e), Tolerance { relative: 0.0, absolute: 0.0 });
        assert_eq!((c.mismatched, c.max_absolute), (1, 1.0));
    }

    #[test]
    fn the_largest_come_first_and_ties_keep_their_order() {
        let bytes = f32s(&[0.5, f32::NAN, 2.0, 0.5, -1.0]);
        let view = ArrayView { dtype: DType::F32, shape: &[5], bytes: &bytes };
        assert_eq!(top_k(view, 3), [(2, 2.0), (0, 0.5), (3, 0.5)]);
        assert_eq!(top_k(view, 9).len(), 5);
    }
}
