use serde::{Deserialize, Serialize};

use crate::Tensor;

/// What is done to raw scores before they are handed out.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PostTransform {
    None,
    Softmax,
    Logistic,
    SoftmaxZero,
    Probit,
}

/// Class labels: numbers or text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Labels {
    /// Numbers.
    Ints(Vec<i64>),
    /// Text.
    Strings(Vec<String>),
}

/// Similarity of a support vector machine.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum SvmKernel {
    Linear,
    Poly { gamma: f32, coef0: f32, degree: f32 },
    Rbf { gamma: f32 },
    Sigmoid { gamma: f32, coef0: f32 },
}

/// Condition of an inner node of a tree; true goes to the first child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BranchMode {
    /// `x <= value`.
    LessOrEqual,
    /// `x < value`.
    Less,
    /// `x >= value`.
    GreaterOrEqual,
    /// `x > value`.
    Greater,
    /// `x == value`.
    Equal,
    /// `x != value`.
    NotEqual,
    /// `x` is one of the node's members.
    Member,
}

/// A child of an inner node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TreeChild {
    /// Index of an inner node.
    Node(u32),
    /// Index of a leaf.
    Leaf(u32),
}

/// An inner node of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TreeBranch {
    /// Column of the input.
    pub feature: u32,
    /// Condition.
    pub mode: BranchMode,
    /// Right-hand side; for `Member`, unused.
    pub value: f64,
    /// For `Member`: range in [`TreeEnsemble::members`].
    pub members: (u32, u32),
    /// A missing value (NaN) counts as true.
    pub missing_is_true: bool,
    /// When true.
    pub if_true: TreeChild,
    /// When false.
    pub if_false: TreeChild,
}

/// How the trees' answers become one.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Aggregate {
    Sum,
    Average,
    Min,
    Max,
}

/// A forest in one flat form, whichever ONNX spelling it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TreeEnsemble {
    /// Where each tree starts.
    pub roots: Vec<TreeChild>,
    /// Inner nodes.
    pub branches: Vec<TreeBranch>,
    /// Per leaf: range in `weights`.
    pub leaves: Vec<(u32, u32)>,
    /// `(target or class index, weight)`.
    pub weights: Vec<(u32, f64)>,
    /// Sets of [`BranchMode::Member`] nodes.
    pub members: Vec<f64>,
    /// Number of targets or classes.
    pub targets: usize,
    /// Over trees.
    pub aggregate: Aggregate,
    /// Added per target; zeros when empty.
    pub base_values: Vec<f64>,
    /// Last.
    pub post_transform: PostTransform,
}

/// Operators of the ONNX-ML domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MlOp {
    /// `(x, indices)`: columns.
    ArrayFeatureExtractor,
    /// `(x)`: 1 above the threshold.
    Binarizer {
        /// The threshold.
        threshold: f32,
    },
    /// `(x)`: between numbers and text.
    CategoryMapper {
        /// Numbers.
        ints: Vec<i64>,
        /// Text.
        strings: Vec<String>,
        /// For unknown text.
        default_int: i64,
        /// For unknown numbers.
        default_string: String,
    },
    /// `(map)`.
    DictVectorizer {
        /// Keys in the order of the columns.
        vocabulary: Labels,
    },
    /// `(x, …)`: columns side by side.
    FeatureVectorizer {
        /// Columns of each operand.
        dimensions: Vec<usize>,
    },
    /// `(x)`: replaces missing values.
    Imputer {
        /// One per column, or one for all; f32 or i64.
        values: Tensor,
        /// What counts as missing; one element of the same type.
        missing: Tensor,
    },
    /// `(x)`: a table.
    LabelEncoder {
        /// One element per entry.
        keys: Tensor,
        /// One element per entry.
        values: Tensor,
        /// One element.
        default: Tensor,
    },
    /// `(x)`; outputs `(label, scores)`.
    LinearClassifier {
        /// `[classes, features]`.
        coefficients: Vec<f32>,
        /// Per class.
        intercepts: Vec<f32>,
        /// Names of the classes.
        labels: Labels,
        /// Last.
        post_transform: PostTransform,
    },
    /// `(x)`.
    LinearRegressor {
        /// `[targets, features]`.
        coefficients: Vec<f32>,
        /// Per target.
        intercepts: Vec<f32>,
        /// Number of targets.
        targets: usize,
        /// Last.
        post_transform: PostTransform,
    },
    /// `(x)`: each row divided by its norm.
    Normalizer {
        /// Which norm.
        norm: RowNorm,
    },
    /// `(x)`: a new last axis.
    OneHotEncoder {
        /// The categories.
        categories: Labels,
        /// Unknown ones become zeros rather than an error.
        zeros: bool,
    },
    /// `(x)`: `(x − offset)·scale` per column.
    Scaler {
        /// Per column, or one for all.
        offset: Vec<f32>,
        /// Per column, or one for all.
        scale: Vec<f32>,
    },
    /// `(x)`; outputs `(label, scores)`.
    SvmClassifier {
        /// Similarity.
        kernel: SvmKernel,
        /// `[vectors, features]`; empty for a linear model.
        support_vectors: Vec<f32>,
        /// Vectors of each class.
        vectors_per_class: Vec<usize>,
        /// Dual coefficients, or `[classes, features]` for a linear model.
        coefficients: Vec<f32>,
        /// Offsets.
        rho: Vec<f32>,
        /// Of the probability fit; empty for none.
        prob_a: Vec<f32>,
        /// Of the probability fit; empty for none.
        prob_b: Vec<f32>,
        /// Names of the classes.
        labels: Labels,
        /// Last.
        post_transform: PostTransform,
    },
    /// `(x)`.
    SvmRegressor {
        /// Similarity.
        kernel: SvmKernel,
        /// `[vectors, features]`; empty for a linear model.
        support_vectors: Vec<f32>,
        /// Number of support vectors; 0 for a linear model.
        vectors: usize,
        /// Dual coefficients, or one per feature for a linear model.
        coefficients: Vec<f32>,
        /// Offset.
        rho: f32,
        /// Outlier detection: the sign only.
        one_class: bool,
        /// Last.
        post_transform: PostTransform,
    },
    /// `(x)`; outputs `(label, scores)`.
    TreeEnsembleClassifier {
        /// The forest.
        trees: TreeEnsemble,
        /// Names of the classes.
        labels: Labels,
        /// All weights belong to one class of a binary problem.
        binary_single_weight: bool,
    },
    /// `(x)`.
    TreeEnsembleRegressor {
        /// The forest.
        trees: TreeEnsemble,
    },
    /// `(scores)`: a sequence of maps.
    ZipMap {
        /// Keys.
        labels: Labels,
    },
}

/// Norm of a row.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RowNorm {
    Max,
    L1,
    L2,
}

impl MlOp {
    /// Fewest and most operands.
    pub fn input_count(&self) -> (usize, usize) {
        match self {
            MlOp::ArrayFeatureExtractor => (2, 2),
            MlOp::FeatureVectorizer { .. } => (1, usize::MAX),
            _ => (1, 1),
        }
    }
}
