use std::sync::Arc;

use super::broadcast::shown;
use crate::{DType, Dim, Node, Shape, Tensor, TensorType, ValueType};

/// The outcome of a shape rule; the problem is later told together with the node.
pub(super) type Rule<T> = Result<T, String>;

/// An integer that shape arithmetic yields: a number, a symbol's size, or open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SymbolicInt {
    /// A number.
    Value(i64),
    /// The size that a symbol will be bound to.
    Symbol(Arc<str>),
    /// Not known.
    Unknown,
}

impl From<&Dim> for SymbolicInt {
    fn from(dim: &Dim) -> SymbolicInt {
        match dim {
            Dim::Fixed(n) => i64::try_from(*n).map_or(SymbolicInt::Unknown, SymbolicInt::Value),
            Dim::Symbol(s) => SymbolicInt::Symbol(s.clone()),
            Dim::Unknown(()) => SymbolicInt::Unknown,
        }
    }
}

/// What is known of an operand before the node runs.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Fact<'a> {
    /// Its type.
    pub ty: &'a ValueType,
    /// Its elements, if it is a constant in memory.
    pub value: Option<&'a Tensor>,
    /// Its elements as far as shape arithmetic knows them, for integers of rank 0 or 1.
    pub symbolic: Option<&'a [SymbolicInt]>,
}

impl<'a> Fact<'a> {
    /// Only the type is known.
    pub fn of(ty: &'a ValueType) -> Fact<'a> {
        Fact { ty, value: None, symbolic: None }
    }

    /// The elements are known if `value` is given.
    pub fn new(ty: &'a ValueType, value: Option<&'a Tensor>) -> Fact<'a> {
        Fact { ty, value, symbolic: None }
    }
}

/// A set of element types, for checks and their messages.
#[derive(Clone, Copy, Debug)]
pub(super) enum Class {
    Float,
    Integer,
    Numeric,
    NumericOrBool,
    Bool,
    Text,
    Any,
    /// 8-bit integers.
    Byte,
}

impl Class {
    pub fn contains(self, d: DType) -> bool {
        match self {
            Class::Float => d.is_float(),
            Class::Integer => d.is_integer(),
            Class::Numeric => d.is_float() || d.is_integer(),
            Class::NumericOrBool => d.is_float() || d.is_integer() || d == DType::Bool,
            Class::Bool => d == DType::Bool,
            Class::Text => d == DType::String,
            Class::Any => true,
            Class::Byte => matches!(d, DType::I8 | DType::U8),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Class::Float => "a floating-point type",
            Class::Integer => "an integer type",
            Class::Numeric => "a numeric type",
            Class::NumericOrBool => "a numeric type or bool",
            Class::Bool => "bool",
            Class::Text => "string",
            Class::Any => "any type",
            Class::Byte => "i8 or u8",
        }
    }
}

/// A tensor operand as far as it is known.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub role: &'static str,
    pub dtype: Option<DType>,
    pub shape: Option<Shape>,
}

impl Known {
    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(Vec::len)
    }

    /// Dimension `i`; unknown when the rank is or does not reach.
    pub fn dim(&self, i: usize) -> Dim {
        self.shape.as_ref().and_then(|s| s.get(i)).cloned().unwrap_or(Dim::UNKNOWN)
    }

    /// Refuses element types outside `class`.
    pub fn require(&self, class: Class) -> Rule<()> {
        match self.dtype {
            Some(d) if !class.contains(d) => {
                Err(format!("{} has element type {d}, expected {}", self.role, class.name()))
            }
            _ => Ok(()),
        }
    }

    /// Refuses ranks other than `rank`.
    pub fn require_rank(&self, rank: usize) -> Rule<()> {
        self.require_ranks(rank, rank)
    }

    /// Refuses ranks outside `least..=most`.
    pub fn require_ranks(&self, least: usize, most: usize) -> Rule<()> {
        match &self.shape {
            Some(s) if s.len() < least || s.len() > most => {
                let expected = match most {
                    usize::MAX => format!("at least {least}"),
                    _ if least == most => least.to_string(),
                    _ => format!("{least} to {most}"),
                };
                Err(format!("{} has shape {}, expected rank {expected}", self.role, shown(s)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses shapes that cannot be `expected`; what is not known passes.
    pub fn require_shape(&self, expected: &[Dim]) -> Rule<()> {
        if let Some(s) = &self.shape
            && (s.len() != expected.len() || s.iter().zip(expected).any(|(a, b)| unify(a, b).is_none()))
        {
            return Err(format!("{} has shape {}, expected {}", self.role, shown(s), shown(expected)));
        }
        Ok(())
    }

    /// Refuses anything that does not hold exactly one element.
    pub fn require_single(&self) -> Rule<()> {
        match &self.shape {
            Some(s) if s.len() > 1 || s.iter().any(|d| d.fixed().is_some_and(|n| n != 1)) => {
                Err(format!("{} has shape {}, expected one element", self.role, shown(s)))
            }
            _ => Ok(()),
        }
    }

    /// Number of elements of the whole operand, if it is known and does not overflow.
    pub fn elements(&self) -> Option<usize> {
        self.shape.as_ref()?.iter().try_fold(1usize, |n, d| n.checked_mul(d.fixed()?))
    }

    pub fn to_type(&self) -> ValueType {
        typed(self.dtype, self.shape.clone())
    }
}

/// The more precise of two dimensions that must be equal; `None` when they contradict each other.
pub(super) fn unify(a: &Dim, b: &Dim) -> Option<Dim> {
    match (a, b) {
        (Dim::Fixed(n), Dim::Fixed(m)) if n != m => None,
        (Dim::Fixed(_), _) | (Dim::Symbol(_), Dim::Symbol(_) | Dim::Unknown(())) => Some(a.clone()),
        _ => Some(b.clone()),
    }
}

/// What is true of both dimensions.
fn join_dim(a: &Dim, b: &Dim) -> Dim {
    if a == b { a.clone() } else { Dim::UNKNOWN }
}

/// The most precise type that both types belong to, or `None` when they have nothing in common.
pub(super) fn join(a: &ValueType, b: &ValueType) -> Option<ValueType> {
    Some(match (a, b) {
        (ValueType::Unknown, _) | (_, ValueType::Unknown) => ValueType::Unknown,
        (ValueType::Tensor(x), ValueType::Tensor(y)) if x.dtype == y.dtype => {
            let shape = match (&x.shape, &y.shape) {
                (Some(s), Some(t)) if s.len() == t.len() => {
                    Some(s.iter().zip(t).map(|(a, b)| join_dim(a, b)).collect())
                }
                _ => None,
            };
            TensorType { dtype: x.dtype, shape }.into()
        }
        (ValueType::Sequence(x), ValueType::Sequence(y)) => ValueType::Sequence(Box::new(join(x, y)?)),
        (ValueType::Optional(x), ValueType::Optional(y)) => ValueType::Optional(Box::new(join(x, y)?)),
        // A value that is there is one that may be absent.
        (ValueType::Optional(x), y) | (y, ValueType::Optional(x)) => {
            ValueType::Optional(Box::new(join(x, y)?))
        }
        (ValueType::Map { .. }, ValueType::Map { .. }) if a == b => a.clone(),
        _ => return None,
    })
}

/// A tensor type, or nothing known when not even the element type is.
pub(super) fn typed(dtype: Option<DType>, shape: Option<Shape>) -> ValueType {
    match dtype {
        Some(dtype) => TensorType { dtype, shape }.into(),
        None => ValueType::Unknown,
    }
}

/// `rank` dimensions that nobody knows.
pub(super) fn open(rank: usize) -> Shape {
    vec![Dim::UNKNOWN; rank]
}

/// `dim · n`, keeping a symbol times 1.
pub(super) fn times(dim: &Dim, n: usize) -> Rule<Dim> {
    Ok(match dim {
        Dim::Fixed(d) => Dim::Fixed(d.checked_mul(n).ok_or_else(|| format!("size {d} times {n} overflows"))?),
        _ if n == 1 => dim.clone(),
        _ => Dim::UNKNOWN,
    })
}

/// `dim / n`, which must be exact.
pub(super) fn divided(dim: &Dim, n: usize, what: &str) -> Rule<Dim> {
    Ok(match dim {
        _ if n == 0 => return Err(format!("{what} cannot be divided by 0")),
        Dim::Fixed(d) if d % n != 0 => return Err(format!("{what} is {d}, expected a multiple of {n}")),
        Dim::Fixed(d) => Dim::Fixed(d / n),
        _ if n == 1 => dim.clone(),
        _ => Dim::UNKNOWN,
    })
}

/// `a + b`, keeping a symbol plus 0.
pub(super) fn plus(a: &Dim, b: &Dim) -> Rule<Dim> {
    Ok(match (a, b) {
        (Dim::Fixed(x), Dim::Fixed(y)) => {
            Dim::Fixed(x.checked_add(*y).ok_or_else(|| format!("size {x} plus {y} overflows"))?)
        }
        (Dim::Fixed(0), other) | (other, Dim::Fixed(0)) => other.clone(),
        _ => Dim::UNKNOWN,
    })
}

/// `axis` counted from the front.
pub(super) fn axis_of(axis: i64, rank: usize, what: &str) -> Rule<usize> {
    let r = rank as i64;
    if axis < -r || axis >= r {
        return Err(match rank {
            0 => format!("{what} is {axis}, but the operand has no dimensions"),
            _ => format!("{what} is {axis}, expected {} to {}", -r, r - 1),
        });
    }
    Ok(if axis < 0 { (axis + r) as usize } else { axis as usize })
}

/// Axes counted from the front; each may occur once.
pub(super) fn axes_of(axes: &[i64], rank: usize) -> Rule<Vec<usize>> {
    let mut seen = vec![false; rank];
    axes.iter()
        .map(|&a| {
            let axis = axis_of(a, rank, "axis")?;
            if std::mem::replace(&mut seen[axis], true) {
                return Err(format!("axis {a} is given twice in {axes:?}"));
            }
            Ok(axis)
        })
        .collect()
}

/// A size that arithmetic on shapes yields.
pub(super) fn size_of(n: i64, what: &str) -> Rule<usize> {
    usize::try_from(n).map_err(|_| format!("{what} is {n}, expected at least 0"))
}

/// Longest constant that is read for axes, sizes and the like.
const LIST_LENGTH_MAX: usize = 1 << 16;

/// Ranks above this are not written out when they come from the length of an unknown list.
pub(super) const RANK_MAX: usize = 64;

/// The operands of a node with what is known of them.
pub(super) struct Operands<'a> {
    pub node: &'a Node,
    pub facts: &'a [Option<Fact<'a>>],
}

impl<'a> Operands<'a> {
    /// What is known of operand `i`, if it is there.
    pub fn fact(&self, i: usize) -> Option<Fact<'a>> {
        self.facts.get(i).copied().flatten()
    }

    /// The type of operand `i`, which must be there.
    pub fn required(&self, i: usize, role: &str) -> Rule<&'a ValueType> {
        self.fact(i).map(|f| f.ty).ok_or_else(|| format!("operand {i} ({role}) is missing"))
    }

    /// Operand `i`, which must be there and a tensor.
    pub fn tensor(&self, i: usize, role: &'static str) -> Rule<Known> {
        match self.required(i, role)? {
            ValueType::Tensor(t) => Ok(Known { role, dtype: Some(t.dtype), shape: t.shape.clone() }),
            ValueType::Unknown => Ok(Known { role, dtype: None, shape: None }),
            other => Err(format!("{role} is {other}, expected a tensor")),
        }
    }

    /// Operand `i`, which must be a tensor if it is there.
    pub fn optional(&self, i: usize, role: &'static str) -> Rule<Option<Known>> {
        self.fact(i).map(|_| self.tensor(i, role)).transpose()
    }

    /// The elements of operand `i`, if it is a constant in memory.
    pub fn value(&self, i: usize) -> Option<&'a Tensor> {
        self.fact(i)?.value
    }

    /// The integers that operand `i` holds as far as they are known, which must be a list or a single number.
    pub fn symbolic(&self, i: usize, role: &'static str) -> Rule<Option<Vec<SymbolicInt>>> {
        let Some(known) = self.optional(i, role)? else { return Ok(None) };
        known.require(Class::Integer)?;
        known.require_ranks(0, 1)?;
        if let Some(t) = self.value(i) {
            if t.dims().len() > 1 || t.len() > LIST_LENGTH_MAX {
                return Err(format!("{role} has {} elements, expected a short list", t.len()));
            }
            let ints = t.to_i64s().ok_or_else(|| format!("{role} holds a number beyond the range of i64"))?;
            return Ok(Some(ints.into_iter().map(SymbolicInt::Value).collect()));
        }
        Ok(self.fact(i).and_then(|f| f.symbolic).map(<[_]>::to_vec))
    }

    /// The integers that operand `i` holds, if all are known.
    pub fn ints(&self, i: usize, role: &'static str) -> Rule<Option<Vec<i64>>> {
        let symbolic = self.symbolic(i, role)?;
        Ok(symbolic.and_then(|list| {
            list.iter().map(|s| if let SymbolicInt::Value(n) = s { Some(*n) } else { None }).collect()
        }))
    }

    /// The single integer that operand `i` holds, if it is known.
    pub fn int(&self, i: usize, role: &'static str) -> Rule<Option<i64>> {
        if let Some(known) = self.optional(i, role)? {
            known.require_single()?;
        }
        Ok(self.ints(i, role)?.and_then(|v| v.first().copied()))
    }

    /// Whether operand `i` is there.
    pub fn has(&self, i: usize) -> bool {
        self.fact(i).is_some()
    }

    /// Number of elements of the list operand `i`, if it is known.
    pub fn length(&self, i: usize) -> Option<usize> {
        match self.fact(i)?.ty.tensor()?.shape.as_deref()? {
            [] => Some(1),
            [d] => d.fixed(),
            _ => None,
        }
    }
}

/// The element type that all operands share, if one is known.
pub(super) fn same_dtype(operands: &[&Known]) -> Rule<Option<DType>> {
    let mut found: Option<(&Known, DType)> = None;
    for k in operands {
        match (found, k.dtype) {
            (Some((first, d)), Some(e)) if d != e => {
                return Err(format!(
                    "{} has element type {d} and {} {e}, expected the same",
                    first.role, k.role
                ));
            }
            (None, Some(d)) => found = Some((k, d)),
            _ => {}
        }
    }
    Ok(found.map(|(_, d)| d))
}
