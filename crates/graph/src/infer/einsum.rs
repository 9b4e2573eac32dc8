//! Equations of Einstein sums.

use std::collections::BTreeMap;

use super::broadcast::{broadcast, broadcast_dim, shown};
use crate::{Dim, Shape};

/// One term of an equation: labels, with at most one ellipsis among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EinsumAxis {
    /// A letter.
    Label(char),
    /// All dimensions that the letters do not cover; broadcast among operands.
    Ellipsis,
}

/// A parsed equation such as `bij,bjk->bik`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Einsum {
    /// Axes of each operand.
    pub inputs: Vec<Vec<EinsumAxis>>,
    /// Axes of the result; when the equation has no arrow, the ellipsis, then the letters that occur once, sorted.
    pub output: Vec<EinsumAxis>,
}

/// Longest equation that is read.
const EQUATION_LENGTH_MAX: usize = 4096;

impl Einsum {
    /// Reads an equation; blanks do not count.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    pub fn parse(equation: &str) -> Result<Einsum, String> {
        if equation.len() > EQUATION_LENGTH_MAX {
            return Err(format!("the equation has {} characters", equation.len()));
        }
        let text: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (left, right) = match text.split_once("->") {
            Some((l, r)) => (l, Some(r)),
            None => (text.as_str(), None),
        };
        let term = |text: &str| -> Result<Vec<EinsumAxis>, String> {
            let mut axes = Vec::new();
            let mut rest = text;
            while let Some(c) = rest.chars().next() {
                if let Some(after) = rest.strip_prefix("...") {
                    if axes.contains(&EinsumAxis::Ellipsis) {
                        return Err(format!("two ellipses in the term {text:?} of {equation:?}"));
                    }
                    axes.push(EinsumAxis::Ellipsis);
                    rest = after;
                } else if c.is_ascii_alphabetic() {
                    axes.push(EinsumAxis::Label(c));
                    rest = &rest[1..];
                } else {
                    return Err(format!(
                        "{c:?} in the equation {equation:?}, expected letters, `,`, `...` or `->`"
                    ));
                }
            }
            Ok(axes)
        };
        let inputs = left.split(',').map(term).collect::<Result<Vec<_>, _>>()?;
        let output = match right {
            Some(r) => {
                let output = term(r)?;
                for (i, axis) in output.iter().enumerate() {
                    if output[..i].contains(axis) {
                        return Err(format!("a letter occurs twice in the result of {equation:?}"));
                    }
                    if !inputs.iter().any(|t| t.contains(axis)) {
                        return Err(format!("the result of {equation:?} names an axis that no operand has"));
                    }
                }
                output
            }
            None => {
                let mut counts: BTreeMap<char, usize> = BTreeMap::new();
                for axis in inputs.iter().flatten() {
                    if let EinsumAxis::Label(c) = axis {
                        *counts.entry(*c).or_default() += 1;
                    }
                }
                let ellipsis = inputs.iter().any(|t| t.contains(&EinsumAxis::Ellipsis));
                ellipsis
                    .then_some(EinsumAxis::Ellipsis)
                    .into_iter()
                    .chain(counts.into_iter().filter(|(_, n)| *n == 1).map(|(c, _)| EinsumAxis::Label(c)))
                    .collect()
            }
        };
        Ok(Einsum { inputs, output })
    }

    pub(super) fn output_has_ellipsis(&self) -> bool {
        self.output.contains(&EinsumAxis::Ellipsis)
    }

    /// The shape of the result for operands of these shapes.
    pub(super) fn shape(&self, operands: &[&Shape]) -> Result<Shape, String> {
        let mut sizes: BTreeMap<char, Dim> = BTreeMap::new();
        let mut ellipsis: Shape = Vec::new();
        for (term, shape) in self.inputs.iter().zip(operands) {
            let labels = term.iter().filter(|a| **a != EinsumAxis::Ellipsis).count();
            let covered = match shape.len().checked_sub(labels) {
                Some(n) if n == 0 || term.contains(&EinsumAxis::Ellipsis) => n,
                _ => {
                    return Err(format!(
                        "an operand has shape {}, but its term has {labels} letters",
                        shown(shape)
                    ));
                }
            };
            let mut at = 0;
            for axis in term {
                match axis {
                    EinsumAxis::Ellipsis => {
                        ellipsis =
                            broadcast(&ellipsis, &shape[at..at + covered]).map_err(|e| e.to_string())?;
                        at += covered;
                    }
                    EinsumAxis::Label(c) => {
                        let known = sizes.get(c).cloned().unwrap_or(Dim::Fixed(1));
                        let size = broadcast_dim(&known, &shape[at]).ok_or_else(|| {
                            format!("axis {c:?} has size {known} in one operand and {} in another", shape[at])
                        })?;
                        sizes.insert(*c, size);
                        at += 1;
                    }
                }
            }
        }
        let mut out = Vec::new();
        for axis in &self.output {
            match axis {
                EinsumAxis::Ellipsis => out.extend(ellipsis.iter().cloned()),
                EinsumAxis::Label(c) => out.push(sizes.get(c).cloned().unwrap_or(Dim::UNKNOWN)),
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations() {
        let e = Einsum::parse(" b i j , b j k -> b i k ").unwrap();
        assert_eq!((e.inputs.len(), e.output.len()), (2, 3));
        assert_eq!(Einsum::parse("ba,b").unwrap().output, [EinsumAxis::Label('a')]);
        assert_eq!(Einsum::parse("...ii").unwrap().output, [EinsumAxis::Ellipsis]);
        for bad in ["i->j", "i->ii", "i.j", "......", "1"] {
            assert!(Einsum::parse(bad).is_err(), "{bad}");
        }
    }
}
