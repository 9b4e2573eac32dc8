//! ONNX-ML operators.

use super::broadcast::shown;
use super::operands::*;
use crate::{DType, Dim, Labels, MlOp, Shape, TensorType, ValueType};

fn label_dtype(labels: &Labels) -> DType {
    match labels {
        Labels::Ints(_) => DType::I64,
        Labels::Strings(_) => DType::String,
    }
}

fn label_count(labels: &Labels) -> usize {
    match labels {
        Labels::Ints(v) => v.len(),
        Labels::Strings(v) => v.len(),
    }
}

/// `[rows, features]`; a list is one row.
fn rows(x: &Known) -> Rule<Dim> {
    x.require_ranks(1, 2)?;
    Ok(match x.rank() {
        Some(1) => Dim::Fixed(1),
        Some(_) => x.dim(0),
        None => Dim::UNKNOWN,
    })
}

/// The last dimension.
fn features(x: &Known) -> Dim {
    x.rank().and_then(|r| r.checked_sub(1)).map_or(Dim::UNKNOWN, |last| x.dim(last))
}

fn require_features(x: &Known, expected: usize) -> Rule<()> {
    match features(x) {
        Dim::Fixed(n) if n != expected => Err(format!("x has {n} features, expected {expected}")),
        _ => Ok(()),
    }
}

fn floats(shape: Shape) -> ValueType {
    TensorType { dtype: DType::F32, shape: Some(shape) }.into()
}

fn classifier(rows: Dim, labels: &Labels, scores: usize) -> Vec<ValueType> {
    let names = TensorType { dtype: label_dtype(labels), shape: Some(vec![rows.clone()]) };
    vec![names.into(), floats(vec![rows, Dim::Fixed(scores)])]
}

pub(super) fn classic(o: &Operands<'_>, op: &MlOp) -> Rule<Vec<ValueType>> {
    if let MlOp::DictVectorizer { vocabulary } = op {
        return match o.required(0, "map")? {
            ValueType::Map { value, .. } => {
                let shape = vec![Dim::Fixed(1), Dim::Fixed(label_count(vocabulary))];
                Ok(vec![typed(Some(*value), Some(shape))])
            }
            ValueType::Unknown => Ok(vec![ValueType::Unknown]),
            other => Err(format!("the operand is {other}, expected a map")),
        };
    }
    let x = o.tensor(0, "x")?;
    let same = |dtype: Option<DType>| vec![typed(dtype, x.shape.clone())];
    Ok(match op {
        MlOp::ArrayFeatureExtractor => {
            let indices = o.tensor(1, "indices")?;
            indices.require(Class::Integer)?;
            x.require_ranks(1, usize::MAX)?;
            let count = indices.elements().map_or(Dim::UNKNOWN, Dim::Fixed);
            let shape = x.shape.as_ref().map(|s| match s.len() {
                1 => vec![Dim::Fixed(1), count],
                n => [&s[..n - 1], &[count]].concat(),
            });
            vec![typed(x.dtype, shape)]
        }
        MlOp::Binarizer { .. } => {
            x.require(Class::Numeric)?;
            same(x.dtype)
        }
        MlOp::CategoryMapper { .. } => match x.dtype {
            Some(DType::String) => same(Some(DType::I64)),
            Some(DType::I64) => same(Some(DType::String)),
            Some(d) => return Err(format!("x has element type {d}, expected string or i64")),
            None => same(None),
        },
        MlOp::DictVectorizer { .. } => return Err("expected a map".to_owned()),
        MlOp::FeatureVectorizer { dimensions } => {
            if dimensions.len() != o.facts.len() {
                return Err(format!("{} column counts for {} operands", dimensions.len(), o.facts.len()));
            }
            let mut batch = Dim::UNKNOWN;
            for (i, &d) in dimensions.iter().enumerate() {
                let k = o.tensor(i, "operand")?;
                let count = rows(&k)?;
                batch = unify(&batch, &count)
                    .ok_or_else(|| format!("operands have {batch} and {count} rows, expected the same"))?;
                require_features(&k, d)?;
            }
            let columns = dimensions.iter().try_fold(0usize, |n, &d| n.checked_add(d));
            vec![floats(vec![batch, Dim::Fixed(columns.ok_or("there are too many columns")?)])]
        }
        MlOp::Imputer { values, .. } => {
            if let (Dim::Fixed(n), m) = (features(&x), values.len())
                && m != 1
                && m != n
            {
                return Err(format!("{m} replacement values for {n} features"));
            }
            if let Some(d) = x.dtype.filter(|d| *d != values.dtype()) {
                return Err(format!("x has element type {d}, but the replacements {}", values.dtype()));
            }
            same(x.dtype)
        }
        MlOp::LabelEncoder { keys, values, .. } => {
            if let Some(d) = x.dtype.filter(|d| *d != keys.dtype()) {
                return Err(format!("x has element type {d}, but the keys {}", keys.dtype()));
            }
            same(Some(values.dtype()))
        }
        MlOp::LinearClassifier { coefficients, intercepts, labels, .. } => {
            x.require(Class::Numeric)?;
            let rows = rows(&x)?;
            let classes = match intercepts.len() {
                0 => label_count(labels).max(1),
                n => n,
            };
            if !coefficients.len().is_multiple_of(classes) {
                return Err(format!(
                    "{} coefficients do not divide into {classes} classes",
                    coefficients.len()
                ));
            }
            require_features(&x, coefficients.len() / classes)?;
            // One row of coefficients for two classes: the other class is its complement.
            let scores = if classes == 1 && label_count(labels) == 2 { 2 } else { classes };
            classifier(rows, labels, scores)
        }
        MlOp::LinearRegressor { coefficients, targets, .. } => {
            x.require(Class::Numeric)?;
            let rows = rows(&x)?;
            if *targets == 0 || !coefficients.len().is_multiple_of(*targets) {
                return Err(format!(
                    "{} coefficients do not divide into {targets} targets",
                    coefficients.len()
                ));
            }
            require_features(&x, coefficients.len() / targets)?;
            vec![floats(vec![rows, Dim::Fixed(*targets)])]
        }
        MlOp::Normalizer { .. } => {
            x.require(Class::Numeric)?;
            x.require_ranks(1, 2)?;
            same(Some(DType::F32))
        }
        MlOp::OneHotEncoder { categories, .. } => {
            let shape = x.shape.clone().map(|mut s| {
                s.push(Dim::Fixed(label_count(categories)));
                s
            });
            vec![typed(Some(DType::F32), shape)]
        }
        MlOp::Scaler { offset, scale } => {
            x.require(Class::Numeric)?;
            for (list, what) in [(offset, "offsets"), (scale, "scales")] {
                if let Dim::Fixed(n) = features(&x)
                    && list.len() != 1
                    && list.len() != n
                {
                    return Err(format!(
                        "{} {what} for x {}",
                        list.len(),
                        shown(x.shape.as_deref().unwrap_or(&[]))
                    ));
                }
            }
            same(Some(DType::F32))
        }
        MlOp::SvmClassifier { vectors_per_class, support_vectors, prob_a, labels, .. } => {
            x.require(Class::Numeric)?;
            let rows = rows(&x)?;
            let vectors = vectors_per_class.iter().try_fold(0usize, |n, &v| n.checked_add(v));
            let vectors = vectors.ok_or("there are too many support vectors")?;
            if vectors > 0 {
                if !support_vectors.len().is_multiple_of(vectors) {
                    return Err(format!(
                        "{} numbers do not divide into {vectors} vectors",
                        support_vectors.len()
                    ));
                }
                require_features(&x, support_vectors.len() / vectors)?;
            }
            let classes = label_count(labels);
            // Without probabilities, the scores are those of the pairs of classes.
            let scores = match classes {
                n if vectors == 0 || !prob_a.is_empty() => n,
                n if n > 2 => n.checked_mul(n - 1).ok_or("there are too many classes")? / 2,
                _ => 2,
            };
            classifier(rows, labels, scores)
        }
        MlOp::SvmRegressor { vectors, support_vectors, .. } => {
            x.require(Class::Numeric)?;
            let rows = rows(&x)?;
            if *vectors > 0 {
                if !support_vectors.len().is_multiple_of(*vectors) {
                    return Err(format!(
                        "{} numbers do not divide into {vectors} vectors",
                        support_vectors.len()
                    ));
                }
                require_features(&x, support_vectors.len() / vectors)?;
            }
            vec![floats(vec![rows, Dim::Fixed(1)])]
        }
        MlOp::TreeEnsembleClassifier { trees, labels, .. } => {
            x.require(Class::Numeric)?;
            require_tree_features(&x, trees)?;
            classifier(rows(&x)?, labels, label_count(labels))
        }
        MlOp::TreeEnsembleRegressor { trees } => {
            x.require(Class::Numeric)?;
            require_tree_features(&x, trees)?;
            // f64 in, f64 out, as the newest ONNX definition says; the older one is followed by a cast on import.
            let dtype = x.dtype.map(|d| if d.is_float() { d } else { DType::F32 });
            vec![typed(dtype, Some(vec![rows(&x)?, Dim::Fixed(trees.targets)]))]
        }
        MlOp::ZipMap { labels } => {
            rows(&x)?;
            require_features(&x, label_count(labels))?;
            let map = ValueType::Map { key: label_dtype(labels), value: DType::F32 };
            vec![ValueType::Sequence(Box::new(map))]
        }
    })
}

/// Every feature that a tree asks for exists.
fn require_tree_features(x: &Known, trees: &crate::TreeEnsemble) -> Rule<()> {
    match (features(x), trees.branches.iter().map(|b| b.feature).max()) {
        (Dim::Fixed(n), Some(most)) if most as usize >= n => {
            Err(format!("a tree asks for feature {most}, but x has {n}"))
        }
        _ => Ok(()),
    }
}
