//! How the classical operators are spelled.

use lightering_graph::{
    Aggregate, BranchMode, DType, Labels, MlOp, Node, PostTransform, RowNorm, SvmKernel, Tensor, TreeChild,
    TreeEnsemble,
};

use super::attributes::NodeWriter;
use super::{Exporter, unsupported};
use crate::Result;

const DOMAIN: &str = "ai.onnx.ml";

pub(super) fn name(op: &MlOp) -> &'static str {
    match op {
        MlOp::ArrayFeatureExtractor => "ArrayFeatureExtractor",
        MlOp::Binarizer { .. } => "Binarizer",
        MlOp::CategoryMapper { .. } => "CategoryMapper",
        MlOp::DictVectorizer { .. } => "DictVectorizer",
        MlOp::FeatureVectorizer { .. } => "FeatureVectorizer",
        MlOp::Imputer { .. } => "Imputer",
        MlOp::LabelEncoder { .. } => "LabelEncoder",
        MlOp::LinearClassifier { .. } => "LinearClassifier",
        MlOp::LinearRegressor { .. } => "LinearRegressor",
        MlOp::Normalizer { .. } => "Normalizer",
        MlOp::OneHotEncoder { .. } => "OneHotEncoder",
        MlOp::Scaler { .. } => "Scaler",
        MlOp::SvmClassifier { .. } => "SVMClassifier",
        MlOp::SvmRegressor { .. } => "SVMRegressor",
        MlOp::TreeEnsembleClassifier { .. } => "TreeEnsembleClassifier",
        MlOp::TreeEnsembleRegressor { trees } if needs_newest(trees) => "TreeEnsemble",
        MlOp::TreeEnsembleRegressor { .. } => "TreeEnsembleRegressor",
        MlOp::ZipMap { .. } => "ZipMap",
        _ => "",
    }
}

/// Sets of members and double precision have a spelling in the newest operator only.
fn needs_newest(trees: &TreeEnsemble) -> bool {
    trees.branches.iter().any(|b| b.mode == BranchMode::Member)
}

pub(super) fn write(e: &mut Exporter, n: NodeWriter, node: &Node, op: &MlOp) -> Result<NodeWriter> {
    e.need(DOMAIN, 4);
    let n = n.domain(DOMAIN);
    Ok(match op {
        MlOp::ArrayFeatureExtractor => n,
        MlOp::Binarizer { threshold } => n.float("threshold", *threshold),
        MlOp::CategoryMapper { ints, strings, default_int, default_string } => n
            .ints("cats_int64s", ints)
            .strings("cats_strings", strings)
            .int("default_int64", *default_int)
            .string("default_string", default_string),
        MlOp::DictVectorizer { vocabulary } => labels(n, vocabulary, "int64_vocabulary", "string_vocabulary"),
        MlOp::FeatureVectorizer { dimensions } => n.sizes("inputdimensions", dimensions),
        MlOp::Imputer { values, missing } => match values.dtype() {
            DType::I64 => n
                .ints("imputed_value_int64s", values.as_slice())
                .int("replaced_value_int64", missing.as_slice::<i64>()[0]),
            DType::F32 => n
                .floats("imputed_value_floats", values.as_slice())
                .float("replaced_value_float", missing.as_slice::<f32>()[0]),
            _ => return Err(unsupported(node, "imputed values of this type")),
        },
        MlOp::LabelEncoder { keys, values, default } => {
            n.tensor("keys_tensor", keys).tensor("values_tensor", values).tensor("default_tensor", default)
        }
        MlOp::LinearClassifier { coefficients, intercepts, labels: names, post_transform } => {
            labels(n, names, "classlabels_ints", "classlabels_strings")
                .floats("coefficients", coefficients)
                .floats_if_any("intercepts", intercepts)
                .string("post_transform", transform(*post_transform))
        }
        MlOp::LinearRegressor { coefficients, intercepts, targets, post_transform } => n
            .floats("coefficients", coefficients)
            .floats_if_any("intercepts", intercepts)
            .size("targets", *targets)
            .string("post_transform", transform(*post_transform)),
        MlOp::Normalizer { norm } => n.string(
            "norm",
            match norm {
                RowNorm::Max => "MAX",
                RowNorm::L1 => "L1",
                RowNorm::L2 => "L2",
            },
        ),
        MlOp::OneHotEncoder { categories, zeros } => {
            labels(n, categories, "cats_int64s", "cats_strings").flag("zeros", *zeros)
        }
        MlOp::Scaler { offset, scale } => n.floats_if_any("offset", offset).floats_if_any("scale", scale),
        MlOp::SvmClassifier {
            kernel: k,
            support_vectors,
            vectors_per_class,
            coefficients,
            rho,
            prob_a,
            prob_b,
            labels: names,
            post_transform,
        } => labels(kernel(n, *k), names, "classlabels_ints", "classlabels_strings")
            .floats_if_any("support_vectors", support_vectors)
            .sizes_if_any("vectors_per_class", vectors_per_class)
            .floats("coefficients", coefficients)
            .floats_if_any("rho", rho)
            .floats_if_any("prob_a", prob_a)
            .floats_if_any("prob_b", prob_b)
            .string("post_transform", transform(*post_transform)),
        MlOp::SvmRegressor {
            kernel: k,
            support_vectors,
            vectors,
            coefficients,
            rho,
            one_class,
            post_transform,
        } => kernel(n, *k)
            .floats_if_any("support_vectors", support_vectors)
            .size("n_supports", *vectors)
            .floats("coefficients", coefficients)
            .floats("rho", &[*rho])
            .flag("one_class", *one_class)
            .string("post_transform", transform(*post_transform)),
        MlOp::TreeEnsembleClassifier { trees, labels: names, .. } => {
            let n = labels(n, names, "classlabels_int64s", "classlabels_strings");
            by_node_id(n, node, trees, "class")?
        }
        MlOp::TreeEnsembleRegressor { trees } if needs_newest(trees) => {
            e.need(DOMAIN, 5);
            indexed(n, node, trees)?
        }
        MlOp::TreeEnsembleRegressor { trees } => {
            let aggregate = match trees.aggregate {
                Aggregate::Sum => "SUM",
                Aggregate::Average => "AVERAGE",
                Aggregate::Min => "MIN",
                Aggregate::Max => "MAX",
            };
            by_node_id(
                n.size("n_targets", trees.targets).string("aggregate_function", aggregate),
                node,
                trees,
                "target",
            )?
        }
        MlOp::ZipMap { labels: names } => labels(n, names, "classlabels_int64s", "classlabels_strings"),
        _ => return Err(unsupported(node, "this operator")),
    })
}

fn labels(n: NodeWriter, labels: &Labels, ints: &str, strings: &str) -> NodeWriter {
    match labels {
        Labels::Ints(v) => n.ints(ints, v),
        Labels::Strings(v) => n.strings(strings, v),
    }
}

fn transform(transform: PostTransform) -> &'static str {
    match transform {
        PostTransform::None => "NONE",
        PostTransform::Softmax => "SOFTMAX",
        PostTransform::Logistic => "LOGISTIC",
        PostTransform::SoftmaxZero => "SOFTMAX_ZERO",
        PostTransform::Probit => "PROBIT",
    }
}

fn kernel(n: NodeWriter, kernel: SvmKernel) -> NodeWriter {
    let (name, params) = match kernel {
        SvmKernel::Linear => ("LINEAR", [0.0; 3]),
        SvmKernel::Poly { gamma, coef0, degree } => ("POLY", [gamma, coef0, degree]),
        SvmKernel::Rbf { gamma } => ("RBF", [gamma, 0.0, 0.0]),
        SvmKernel::Sigmoid { gamma, coef0 } => ("SIGMOID", [gamma, coef0, 0.0]),
    };
    n.string("kernel_type", name).floats("kernel_params", &params)
}

/// Doubles as floats where nothing is lost, else as a tensor.
fn numbers(n: NodeWriter, floats: &str, tensor: &str, values: &[f64]) -> NodeWriter {
    let narrow: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    if narrow.iter().zip(values).all(|(a, b)| f64::from(*a) == *b || b.is_nan()) {
        n.floats(floats, &narrow)
    } else {
        n.tensor(tensor, &Tensor::from_slice(&[values.len()], values))
    }
}

/// The spelling by tree and node id. The nodes of a tree are numbered in the order in which they are met.
fn by_node_id(n: NodeWriter, node: &Node, trees: &TreeEnsemble, weights_of: &str) -> Result<NodeWriter> {
    let (mut tree_ids, mut node_ids, mut features, mut modes) = (vec![], vec![], vec![], vec![]);
    let (mut values, mut true_ids, mut false_ids, mut missing) = (vec![], vec![], vec![], vec![]);
    let (mut leaf_trees, mut leaf_nodes, mut leaf_targets, mut leaf_weights) =
        (vec![], vec![], vec![], vec![]);
    for (tree, &root) in trees.roots.iter().enumerate() {
        let tree = tree as i64;
        let mut next_id = 1;
        let mut waiting = std::collections::VecDeque::from([(root, 0)]);
        while let Some((child, id)) = waiting.pop_front() {
            tree_ids.push(tree);
            node_ids.push(id);
            match child {
                TreeChild::Node(index) => {
                    let branch = &trees.branches[index as usize];
                    modes.push(
                        match branch.mode {
                            BranchMode::LessOrEqual => "BRANCH_LEQ",
                            BranchMode::Less => "BRANCH_LT",
                            BranchMode::GreaterOrEqual => "BRANCH_GTE",
                            BranchMode::Greater => "BRANCH_GT",
                            BranchMode::Equal => "BRANCH_EQ",
                            BranchMode::NotEqual => "BRANCH_NEQ",
                            BranchMode::Member => {
                                return Err(unsupported(node, "sets of members in a classifier"));
                            }
                        }
                        .to_owned(),
                    );
                    features.push(i64::from(branch.feature));
                    values.push(branch.value);
                    missing.push(branch.missing_is_true);
                    true_ids.push(next_id);
                    false_ids.push(next_id + 1);
                    waiting.push_back((branch.if_true, next_id));
                    waiting.push_back((branch.if_false, next_id + 1));
                    next_id += 2;
                }
                TreeChild::Leaf(index) => {
                    modes.push("LEAF".to_owned());
                    features.push(0);
                    values.push(0.0);
                    missing.push(false);
                    true_ids.push(0);
                    false_ids.push(0);
                    let (from, to) = trees.leaves[index as usize];
                    for (target, weight) in &trees.weights[from as usize..to as usize] {
                        leaf_trees.push(tree);
                        leaf_nodes.push(id);
                        leaf_targets.push(i64::from(*target));
                        leaf_weights.push(*weight);
                    }
                }
            }
        }
    }
    let n = n
        .ints("nodes_treeids", &tree_ids)
        .ints("nodes_nodeids", &node_ids)
        .ints("nodes_featureids", &features)
        .strings("nodes_modes", &modes)
        .ints("nodes_truenodeids", &true_ids)
        .ints("nodes_falsenodeids", &false_ids)
        .flags("nodes_missing_value_tracks_true", &missing)
        .ints(&format!("{weights_of}_treeids"), &leaf_trees)
        .ints(&format!("{weights_of}_nodeids"), &leaf_nodes)
        .ints(&format!("{weights_of}_ids"), &leaf_targets)
        .string("post_transform", transform(trees.post_transform));
    let n = numbers(n, "nodes_values", "nodes_values_as_tensor", &values);
    let n = numbers(
        n,
        &format!("{weights_of}_weights"),
        &format!("{weights_of}_weights_as_tensor"),
        &leaf_weights,
    );
    Ok(if trees.base_values.is_empty() {
        n
    } else {
        numbers(n, "base_values", "base_values_as_tensor", &trees.base_values)
    })
}

/// The spelling by index. Numbers are floats where nothing is lost, else doubles.
fn indexed(n: NodeWriter, node: &Node, trees: &TreeEnsemble) -> Result<NodeWriter> {
    if trees.leaves.iter().any(|(from, to)| to - from != 1) || !trees.base_values.is_empty() {
        return Err(unsupported(node, "sets of members with several weights per leaf or base values"));
    }
    let roots: Option<Vec<i64>> = trees
        .roots
        .iter()
        .map(|r| match r {
            TreeChild::Node(index) => Some(i64::from(*index)),
            TreeChild::Leaf(_) => None,
        })
        .collect();
    let Some(roots) = roots else { return Err(unsupported(node, "a tree that is one leaf")) };
    let child = |c: TreeChild| match c {
        TreeChild::Node(index) => (i64::from(index), 0),
        TreeChild::Leaf(index) => (i64::from(index), 1),
    };
    let (mut members, mut modes) = (Vec::new(), Vec::new());
    for branch in &trees.branches {
        modes.push(match branch.mode {
            BranchMode::LessOrEqual => 0u8,
            BranchMode::Less => 1,
            BranchMode::GreaterOrEqual => 2,
            BranchMode::Greater => 3,
            BranchMode::Equal => 4,
            BranchMode::NotEqual => 5,
            BranchMode::Member => 6,
        });
        if branch.mode == BranchMode::Member {
            let (from, to) = branch.members;
            members.extend(&trees.members[from as usize..to as usize]);
            members.push(f64::NAN);
        }
    }
    let splits: Vec<f64> = trees.branches.iter().map(|b| b.value).collect();
    let weights: Vec<f64> = trees.leaves.iter().map(|(from, _)| trees.weights[*from as usize].1).collect();
    let targets: Vec<i64> =
        trees.leaves.iter().map(|(from, _)| i64::from(trees.weights[*from as usize].0)).collect();
    let all = splits.iter().chain(&weights).chain(&members);
    let narrow = all.into_iter().all(|v| v.is_nan() || f64::from(*v as f32) == *v);
    let tensor = |values: &[f64]| {
        if narrow {
            let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
            Tensor::from_slice(&[values.len()], &values)
        } else {
            Tensor::from_slice(&[values.len()], values)
        }
    };
    let list = |f: &dyn Fn(&lightering_graph::TreeBranch) -> i64| -> Vec<i64> {
        trees.branches.iter().map(f).collect()
    };
    let missing: Vec<bool> = trees.branches.iter().map(|b| b.missing_is_true).collect();
    Ok(n.ints("tree_roots", &roots)
        .ints("nodes_featureids", &list(&|b| i64::from(b.feature)))
        .tensor("nodes_splits", &tensor(&splits))
        .tensor("nodes_modes", &Tensor::from_slice(&[modes.len()], &modes))
        .ints("nodes_truenodeids", &list(&|b| child(b.if_true).0))
        .ints("nodes_trueleafs", &list(&|b| child(b.if_true).1))
        .ints("nodes_falsenodeids", &list(&|b| child(b.if_false).0))
        .ints("nodes_falseleafs", &list(&|b| child(b.if_false).1))
        .flags("nodes_missing_value_tracks_true", &missing)
        .ints("leaf_targetids", &targets)
        .tensor("leaf_weights", &tensor(&weights))
        .tensor("membership_values", &tensor(&members))
        .size("n_targets", trees.targets)
        .int(
            "aggregate_function",
            match trees.aggregate {
                Aggregate::Average => 0,
                Aggregate::Sum => 1,
                Aggregate::Min => 2,
                Aggregate::Max => 3,
            },
        )
        .int(
            "post_transform",
            match trees.post_transform {
                PostTransform::None => 0,
                PostTransform::Softmax => 1,
                PostTransform::Logistic => 2,
                PostTransform::SoftmaxZero => 3,
                PostTransform::Probit => 4,
            },
        ))
}
