//! The domain `ai.onnx.ml`.

use lightering_graph::{DType, Labels, MlOp, Op, PostTransform, RowNorm, SvmKernel, Tensor};

use super::builder::GraphBuilder;
use super::node::NodeReader;
use super::standard::done;
use super::{Importer, trees};
use crate::Result;

pub(super) fn convert(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let op = match n.op_type() {
        "ArrayFeatureExtractor" => MlOp::ArrayFeatureExtractor,
        "Binarizer" => MlOp::Binarizer { threshold: n.float("threshold", 0.0)? },
        "CategoryMapper" => {
            let (ints, strings) = (n.ints("cats_int64s")?, n.strings("cats_strings")?);
            match (ints, strings) {
                (Some(ints), Some(strings)) if ints.len() == strings.len() => MlOp::CategoryMapper {
                    ints: ints.to_vec(),
                    strings,
                    default_int: n.int("default_int64", -1)?,
                    default_string: n.string("default_string", "_Unused")?.to_owned(),
                },
                _ => {
                    return Err(n.invalid(
                        "cats_int64s and cats_strings do not match",
                        "as many of one as of the other",
                    ));
                }
            }
        }
        "DictVectorizer" => {
            MlOp::DictVectorizer { vocabulary: labels(n, "int64_vocabulary", "string_vocabulary")? }
        }
        "FeatureVectorizer" => {
            let dimensions = n.sizes("inputdimensions")?;
            if dimensions.len() != n.inputs.len() {
                return Err(n.invalid(
                    format!("{} input dimensions for {} inputs", dimensions.len(), n.inputs.len()),
                    "one for each",
                ));
            }
            MlOp::FeatureVectorizer { dimensions }
        }
        "Imputer" => imputer(n)?,
        "LabelEncoder" => label_encoder(im, b, n)?,
        "LinearClassifier" => {
            let labels = classes(n, "classlabels_ints", "classlabels_strings")?;
            // Whether one model per class was fitted does not change what is computed.
            n.ignore("multi_class");
            MlOp::LinearClassifier {
                coefficients: required_floats(n, "coefficients")?,
                intercepts: n.floats("intercepts")?,
                labels,
                post_transform: post_transform(n)?,
            }
        }
        "LinearRegressor" => MlOp::LinearRegressor {
            coefficients: required_floats(n, "coefficients")?,
            intercepts: n.floats("intercepts")?,
            targets: positive(n, "targets", n.size("targets", 1)?)?,
            post_transform: post_transform(n)?,
        },
        "Normalizer" => MlOp::Normalizer {
            norm: n.choice(
                "norm",
                "MAX",
                &[("MAX", RowNorm::Max), ("L1", RowNorm::L1), ("L2", RowNorm::L2)],
            )?,
        },
        "OneHotEncoder" => MlOp::OneHotEncoder {
            categories: labels(n, "cats_int64s", "cats_strings")?,
            zeros: n.flag("zeros", true)?,
        },
        "Scaler" => MlOp::Scaler { offset: n.floats("offset")?, scale: n.floats("scale")? },
        "SVMClassifier" => MlOp::SvmClassifier {
            kernel: svm_kernel(n)?,
            support_vectors: n.floats("support_vectors")?,
            vectors_per_class: n.sizes("vectors_per_class")?,
            coefficients: required_floats(n, "coefficients")?,
            rho: n.floats("rho")?,
            prob_a: n.floats("prob_a")?,
            prob_b: n.floats("prob_b")?,
            labels: classes(n, "classlabels_ints", "classlabels_strings")?,
            post_transform: post_transform(n)?,
        },
        "SVMRegressor" => MlOp::SvmRegressor {
            kernel: svm_kernel(n)?,
            support_vectors: n.floats("support_vectors")?,
            vectors: n.size("n_supports", 0)?,
            coefficients: required_floats(n, "coefficients")?,
            rho: n.floats("rho")?.first().copied().unwrap_or(0.0),
            one_class: n.flag("one_class", false)?,
            post_transform: post_transform(n)?,
        },
        "TreeEnsemble" => MlOp::TreeEnsembleRegressor { trees: trees::indexed(im, n)? },
        "TreeEnsembleRegressor" => {
            let targets = positive(n, "n_targets", n.size("n_targets", 1)?)?;
            MlOp::TreeEnsembleRegressor { trees: trees::by_node_id(im, n, "target", targets)? }
        }
        "TreeEnsembleClassifier" => {
            let labels = classes(n, "classlabels_int64s", "classlabels_strings")?;
            let count = label_count(&labels);
            let trees = trees::by_node_id(im, n, "class", count)?;
            // A binary forest often has weights for one class only; the other one's score follows from it.
            let one_class = trees.weights.windows(2).all(|w| w[0].0 == w[1].0);
            let binary_single_weight = count == 2 && one_class && !trees.weights.is_empty();
            MlOp::TreeEnsembleClassifier { trees, labels, binary_single_weight }
        }
        "ZipMap" => MlOp::ZipMap { labels: labels(n, "classlabels_int64s", "classlabels_strings")? },
        _ => return Err(n.unknown_operator()),
    };
    done(b.finish(n, Op::Ml(Box::new(op)), n.inputs.clone()))
}

fn label_count(labels: &Labels) -> usize {
    match labels {
        Labels::Ints(v) => v.len(),
        Labels::Strings(v) => v.len(),
    }
}

fn positive(n: &NodeReader, name: &str, value: usize) -> Result<usize> {
    if value == 0 {
        return Err(n.invalid(format!("attribute {name:?} is 0"), "1 or more"));
    }
    Ok(value)
}

fn required_floats(n: &NodeReader, name: &str) -> Result<Vec<f32>> {
    if n.has(name) { n.floats(name) } else { Err(n.no_attribute(name)) }
}

fn labels(n: &NodeReader, ints: &str, strings: &str) -> Result<Labels> {
    let numbers = n.ints(ints)?.filter(|v| !v.is_empty());
    let texts = n.strings(strings)?.filter(|v| !v.is_empty());
    match (numbers, texts) {
        (Some(v), None) => Ok(Labels::Ints(v.to_vec())),
        (None, Some(v)) => Ok(Labels::Strings(v)),
        _ => Err(n.invalid(format!("both or none of {ints} and {strings}"), "one of them")),
    }
}

/// Class labels; some exporters leave them out for two classes.
fn classes(n: &NodeReader, ints: &str, strings: &str) -> Result<Labels> {
    if n.has(ints) || n.has(strings) { labels(n, ints, strings) } else { Ok(Labels::Ints(vec![0, 1])) }
}

pub(super) fn post_transform(n: &NodeReader) -> Result<PostTransform> {
    n.choice(
        "post_transform",
        "NONE",
        &[
            ("NONE", PostTransform::None),
            ("SOFTMAX", PostTransform::Softmax),
            ("LOGISTIC", PostTransform::Logistic),
            ("SOFTMAX_ZERO", PostTransform::SoftmaxZero),
            ("PROBIT", PostTransform::Probit),
        ],
    )
}

fn svm_kernel(n: &NodeReader) -> Result<SvmKernel> {
    let params = n.floats("kernel_params")?;
    let param = |i: usize| params.get(i).copied().unwrap_or(0.0);
    let (gamma, coef0, degree) = (param(0), param(1), param(2));
    n.choice(
        "kernel_type",
        "LINEAR",
        &[
            ("LINEAR", SvmKernel::Linear),
            ("POLY", SvmKernel::Poly { gamma, coef0, degree }),
            ("RBF", SvmKernel::Rbf { gamma }),
            ("SIGMOID", SvmKernel::Sigmoid { gamma, coef0 }),
        ],
    )
}

fn imputer(n: &NodeReader) -> Result<MlOp> {
    let floats = n.floats("imputed_value_floats")?;
    let ints = n.ints("imputed_value_int64s")?.unwrap_or(&[]);
    let (missing_float, missing_int) =
        (n.float("replaced_value_float", 0.0)?, n.int("replaced_value_int64", 0)?);
    match (floats.is_empty(), ints.is_empty()) {
        (false, true) => Ok(MlOp::Imputer {
            values: Tensor::from_slice(&[floats.len()], &floats),
            missing: Tensor::from_slice(&[1], &[missing_float]),
        }),
        (true, false) => Ok(MlOp::Imputer {
            values: Tensor::from_slice(&[ints.len()], ints),
            missing: Tensor::from_slice(&[1], &[missing_int]),
        }),
        _ => Err(n.invalid("both or none of imputed_value_floats and imputed_value_int64s", "one of them")),
    }
}

fn label_encoder(im: &mut Importer, b: &GraphBuilder, n: &NodeReader) -> Result<MlOp> {
    if n.opset < 2 {
        let classes = n.strings("classes_strings")?.ok_or_else(|| n.no_attribute("classes_strings"))?;
        let numbers: Vec<i64> = (0..classes.len() as i64).collect();
        let texts = Tensor::from_strings(&[classes.len()], classes);
        let numbers = Tensor::from_slice(&[numbers.len()], &numbers);
        let default_int = Tensor::from_slice(&[1], &[n.int("default_int64", -1)?]);
        let default_text =
            Tensor::from_strings(&[1], vec![n.string("default_string", "_Unused")?.to_owned()]);
        let x = n.required(0, "X")?;
        return match b.dtype(x) {
            Some(DType::String) => {
                Ok(MlOp::LabelEncoder { keys: texts, values: numbers, default: default_int })
            }
            Some(DType::I64) => {
                Ok(MlOp::LabelEncoder { keys: numbers, values: texts, default: default_text })
            }
            _ => Err(n.unsupported("an input that is not known to be i64 or text")),
        };
    }
    let list = |what: &str| -> Result<Tensor> {
        let mut found = Vec::new();
        if let Some(v) = n.ints(&format!("{what}_int64s"))? {
            found.push(Tensor::from_slice(&[v.len()], v));
        }
        if let Some(v) = n.strings(&format!("{what}_strings"))? {
            found.push(Tensor::from_strings(&[v.len()], v));
        }
        if n.has(&format!("{what}_floats")) {
            let v = n.floats(&format!("{what}_floats"))?;
            found.push(Tensor::from_slice(&[v.len()], &v));
        }
        if let Some(proto) = n.tensor_ref(&format!("{what}_tensor"))? {
            found.push(im.file.tensor(proto).map_err(|e| e.within(n.place()))?);
        }
        found.retain(|t| !t.is_empty());
        match (found.len(), found.pop()) {
            (1, Some(t)) => Ok(t),
            (count, _) => Err(n.invalid(format!("{count} lists of {what}"), "exactly one")),
        }
    };
    let (keys, values) = (list("keys")?, list("values")?);
    if keys.len() != values.len() {
        return Err(n.invalid(
            format!("{} keys and {} values", keys.len(), values.len()),
            "as many of one as of the other",
        ));
    }
    // All defaults are read, so that none counts as unknown; the one of the values' type is used.
    let int = n.int("default_int64", -1)?;
    let float = n.float("default_float", -0.0)?;
    let text = n.string("default_string", "_Unused")?.to_owned();
    let given = n
        .tensor_ref("default_tensor")?
        .map(|p| im.file.tensor(p))
        .transpose()
        .map_err(|e| e.within(n.place()))?;
    let default = match (given, values.dtype()) {
        (Some(t), dtype) if t.dtype() == dtype && t.len() == 1 => t.into_shape(&[1]),
        (Some(t), dtype) => {
            return Err(n.invalid(
                format!("a default of type {} with {} elements", t.dtype(), t.len()),
                format!("one {dtype}"),
            ));
        }
        (None, DType::I64) => Tensor::from_slice(&[1], &[int]),
        (None, DType::F32) => Tensor::from_slice(&[1], &[float]),
        (None, DType::F64) => Tensor::from_slice(&[1], &[f64::from(float)]),
        (None, DType::I32) => Tensor::from_slice(&[1], &[int as i32]),
        (None, DType::I16) => Tensor::from_slice(&[1], &[int as i16]),
        (None, DType::String) => Tensor::from_strings(&[1], vec![text]),
        (None, other) => return Err(n.unsupported(format!("values of type {other}"))),
    };
    Ok(MlOp::LabelEncoder { keys, values, default })
}
