//! Forests: both ONNX spellings become one flat form, checked so that walking it always ends.

use std::collections::HashMap;

use lightering_graph::{Aggregate, BranchMode, PostTransform, Tensor, TreeBranch, TreeChild, TreeEnsemble};

use super::Importer;
use super::ml::post_transform;
use super::node::NodeReader;
use crate::Result;

/// Numbers from one of two attributes: floats, or a tensor that may be double.
fn numbers(im: &Importer, n: &NodeReader, floats: &str, tensor: &str) -> Result<Vec<f64>> {
    if let Some(proto) = n.tensor_ref(tensor)? {
        let t = im.file.tensor(proto).map_err(|e| e.within(n.place()))?;
        n.ignore(floats);
        return t
            .to_f64s()
            .ok_or_else(|| n.invalid(format!("attribute {tensor:?} of type {}", t.dtype()), "numbers"));
    }
    Ok(n.floats(floats)?.into_iter().map(f64::from).collect())
}

fn lengths(n: &NodeReader, count: usize, lists: &[(&str, usize)]) -> Result<()> {
    match lists.iter().find(|(_, length)| *length != count) {
        None => Ok(()),
        Some((name, length)) => {
            Err(n.invalid(format!("attribute {name:?} of {length} entries"), format!("{count}")))
        }
    }
}

fn feature(n: &NodeReader, id: i64) -> Result<u32> {
    u32::try_from(id).map_err(|_| n.invalid(format!("feature {id}"), "a column of the input"))
}

/// Checks that from every root each inner node is met at most once, which makes walks finite.
fn check_trees(n: &NodeReader, trees: &TreeEnsemble) -> Result<()> {
    let mut met = vec![false; trees.branches.len()];
    let mut stack = trees.roots.clone();
    while let Some(child) = stack.pop() {
        let TreeChild::Node(index) = child else { continue };
        let index = index as usize;
        if std::mem::replace(&mut met[index], true) {
            return Err(n.invalid(format!("node {index} has two parents"), "trees"));
        }
        stack.push(trees.branches[index].if_true);
        stack.push(trees.branches[index].if_false);
    }
    if let Some(lost) = met.iter().position(|m| !m) {
        return Err(n.invalid(format!("no root leads to inner node {lost}"), "trees"));
    }
    Ok(())
}

/// The spelling of `TreeEnsembleClassifier` and `TreeEnsembleRegressor`: nodes by tree and node id.
pub(super) fn by_node_id(
    im: &Importer,
    n: &NodeReader,
    weights_of: &str,
    targets: usize,
) -> Result<TreeEnsemble> {
    let ints = |name: &str| n.ints(name).map(|v| v.unwrap_or(&[]));
    let tree_ids = ints("nodes_treeids")?;
    let node_ids = ints("nodes_nodeids")?;
    let features = ints("nodes_featureids")?;
    let true_ids = ints("nodes_truenodeids")?;
    let false_ids = ints("nodes_falsenodeids")?;
    let missing = ints("nodes_missing_value_tracks_true")?;
    let modes = n.strings("nodes_modes")?.unwrap_or_default();
    let values = numbers(im, n, "nodes_values", "nodes_values_as_tensor")?;
    // How often each branch was taken in training says nothing of the result.
    n.ignore("nodes_hitrates");
    n.ignore("nodes_hitrates_as_tensor");
    let count = tree_ids.len();
    lengths(
        n,
        count,
        &[
            ("nodes_nodeids", node_ids.len()),
            ("nodes_featureids", features.len()),
            ("nodes_truenodeids", true_ids.len()),
            ("nodes_falsenodeids", false_ids.len()),
            ("nodes_modes", modes.len()),
            ("nodes_values", values.len()),
        ],
    )?;
    if !missing.is_empty() {
        lengths(n, count, &[("nodes_missing_value_tracks_true", missing.len())])?;
    }
    let leaf_trees = ints(&format!("{weights_of}_treeids"))?;
    let leaf_nodes = ints(&format!("{weights_of}_nodeids"))?;
    let leaf_targets = ints(&format!("{weights_of}_ids"))?;
    let leaf_weights =
        numbers(im, n, &format!("{weights_of}_weights"), &format!("{weights_of}_weights_as_tensor"))?;
    lengths(
        n,
        leaf_trees.len(),
        &[
            ("leaf node ids", leaf_nodes.len()),
            ("leaf targets", leaf_targets.len()),
            ("leaf weights", leaf_weights.len()),
        ],
    )?;

    let mut children = vec![TreeChild::Leaf(0); count];
    let mut index_of: HashMap<(i64, i64), usize> = HashMap::new();
    let (mut branch_count, mut leaf_count) = (0u32, 0u32);
    for i in 0..count {
        if index_of.insert((tree_ids[i], node_ids[i]), i).is_some() {
            return Err(
                n.invalid(format!("node {} of tree {} twice", node_ids[i], tree_ids[i]), "each node once")
            );
        }
        if modes[i] == "LEAF" {
            children[i] = TreeChild::Leaf(leaf_count);
            leaf_count += 1;
        } else {
            children[i] = TreeChild::Node(branch_count);
            branch_count += 1;
        }
    }
    let mut per_leaf: Vec<Vec<(u32, f64)>> = vec![Vec::new(); leaf_count as usize];
    for i in 0..leaf_trees.len() {
        let place = index_of.get(&(leaf_trees[i], leaf_nodes[i])).map(|i| children[*i]);
        let Some(TreeChild::Leaf(leaf)) = place else {
            return Err(n.invalid(
                format!("a weight for node {} of tree {}", leaf_nodes[i], leaf_trees[i]),
                "weights for leaves only",
            ));
        };
        let target = usize::try_from(leaf_targets[i]).ok().filter(|t| *t < targets).ok_or_else(|| {
            n.invalid(format!("a weight for target {}", leaf_targets[i]), format!("targets below {targets}"))
        })?;
        per_leaf[leaf as usize].push((target as u32, leaf_weights[i]));
    }
    let mut is_child = vec![false; count];
    let mut branches = Vec::with_capacity(branch_count as usize);
    for i in 0..count {
        let mode = match modes[i].as_str() {
            "LEAF" => continue,
            "BRANCH_LEQ" => BranchMode::LessOrEqual,
            "BRANCH_LT" => BranchMode::Less,
            "BRANCH_GTE" => BranchMode::GreaterOrEqual,
            "BRANCH_GT" => BranchMode::Greater,
            "BRANCH_EQ" => BranchMode::Equal,
            "BRANCH_NEQ" => BranchMode::NotEqual,
            other => {
                return Err(n.invalid(
                    format!("a node of mode {other:?}"),
                    "BRANCH_LEQ, …_LT, …_GTE, …_GT, …_EQ, …_NEQ or LEAF",
                ));
            }
        };
        let mut child = |id: i64| {
            let index = *index_of.get(&(tree_ids[i], id)).ok_or_else(|| {
                n.invalid(
                    format!("child {id} of node {} of tree {}", node_ids[i], tree_ids[i]),
                    "a node of that tree",
                )
            })?;
            is_child[index] = true;
            Ok(children[index])
        };
        branches.push(TreeBranch {
            feature: feature(n, features[i])?,
            mode,
            value: values[i],
            members: (0, 0),
            missing_is_true: missing.get(i).is_some_and(|m| *m != 0),
            if_true: child(true_ids[i])?,
            if_false: child(false_ids[i])?,
        });
    }
    // The root of a tree is the node that is nobody's child.
    let mut roots: Vec<(i64, TreeChild)> = Vec::new();
    let mut root_of: HashMap<i64, usize> = HashMap::new();
    for i in (0..count).filter(|i| !is_child[*i]) {
        if root_of.insert(tree_ids[i], i).is_some() {
            return Err(n.invalid(format!("tree {} has two roots", tree_ids[i]), "one"));
        }
        roots.push((tree_ids[i], children[i]));
    }
    if let Some(lost) = tree_ids.iter().find(|t| !root_of.contains_key(t)) {
        return Err(n.invalid(format!("tree {lost} has no root"), "a node that is no other's child"));
    }
    let (mut leaves, mut weights) = (Vec::new(), Vec::new());
    for leaf in per_leaf {
        let start = weights.len() as u32;
        weights.extend(leaf);
        leaves.push((start, weights.len() as u32));
    }
    let aggregate = if weights_of == "target" {
        n.choice(
            "aggregate_function",
            "SUM",
            &[
                ("SUM", Aggregate::Sum),
                ("AVERAGE", Aggregate::Average),
                ("MIN", Aggregate::Min),
                ("MAX", Aggregate::Max),
            ],
        )?
    } else {
        Aggregate::Sum
    };
    let base_values = numbers(im, n, "base_values", "base_values_as_tensor")?;
    if !base_values.is_empty() && base_values.len() != targets && base_values.len() != 1 {
        return Err(n.invalid(format!("{} base values", base_values.len()), format!("{targets}, 1 or none")));
    }
    let out = TreeEnsemble {
        roots: roots.into_iter().map(|(_, root)| root).collect(),
        branches,
        leaves,
        weights,
        members: Vec::new(),
        targets,
        aggregate,
        base_values,
        post_transform: post_transform(n)?,
    };
    check_trees(n, &out)?;
    Ok(out)
}

fn tensor(im: &Importer, n: &NodeReader, name: &str) -> Result<Option<Tensor>> {
    n.tensor_ref(name)?.map(|p| im.file.tensor(p).map_err(|e| e.within(n.place()))).transpose()
}

/// The spelling of `TreeEnsemble`: inner nodes and leaves by index.
pub(super) fn indexed(im: &Importer, n: &NodeReader) -> Result<TreeEnsemble> {
    let number_tensor = |name: &str| -> Result<Vec<f64>> {
        let t = tensor(im, n, name)?.ok_or_else(|| n.no_attribute(name))?;
        t.to_f64s().ok_or_else(|| n.invalid(format!("attribute {name:?} of type {}", t.dtype()), "numbers"))
    };
    let roots = n.ints_required("tree_roots")?;
    let features = n.ints_required("nodes_featureids")?;
    let splits = number_tensor("nodes_splits")?;
    let modes = number_tensor("nodes_modes")?;
    let true_ids = n.ints_required("nodes_truenodeids")?;
    let true_leaves = n.ints_required("nodes_trueleafs")?;
    let false_ids = n.ints_required("nodes_falsenodeids")?;
    let false_leaves = n.ints_required("nodes_falseleafs")?;
    let missing = n.ints("nodes_missing_value_tracks_true")?.unwrap_or(&[]);
    let targets_of = n.ints_required("leaf_targetids")?;
    let leaf_weights = number_tensor("leaf_weights")?;
    n.ignore("nodes_hitrates");
    let targets = n.size("n_targets", 1)?;
    let count = features.len();
    lengths(
        n,
        count,
        &[
            ("nodes_splits", splits.len()),
            ("nodes_modes", modes.len()),
            ("nodes_truenodeids", true_ids.len()),
            ("nodes_trueleafs", true_leaves.len()),
            ("nodes_falsenodeids", false_ids.len()),
            ("nodes_falseleafs", false_leaves.len()),
        ],
    )?;
    if !missing.is_empty() {
        lengths(n, count, &[("nodes_missing_value_tracks_true", missing.len())])?;
    }
    lengths(n, targets_of.len(), &[("leaf_weights", leaf_weights.len())])?;
    let child = |id: i64, is_leaf: i64| {
        let limit = if is_leaf != 0 { targets_of.len() } else { count };
        let index = usize::try_from(id)
            .ok()
            .filter(|i| *i < limit)
            .ok_or_else(|| n.invalid(format!("child {id}"), format!("an index below {limit}")))?;
        Ok(if is_leaf != 0 { TreeChild::Leaf(index as u32) } else { TreeChild::Node(index as u32) })
    };
    // Sets of members stand one after another, each closed by a NaN, in the order of the nodes that use them.
    let mut members = Vec::new();
    let mut sets = Vec::new();
    if let Some(t) = tensor(im, n, "membership_values")? {
        let values =
            t.to_f64s().ok_or_else(|| n.invalid("membership values that are no numbers", "numbers"))?;
        let mut start = 0;
        for value in values {
            if value.is_nan() {
                sets.push((start, members.len() as u32));
                start = members.len() as u32;
            } else {
                members.push(value);
            }
        }
        if start != members.len() as u32 {
            sets.push((start, members.len() as u32));
        }
    }
    let mut sets = sets.into_iter();
    let mut branches = Vec::with_capacity(count);
    for i in 0..count {
        let mode = match modes[i] as i64 {
            0 => BranchMode::LessOrEqual,
            1 => BranchMode::Less,
            2 => BranchMode::GreaterOrEqual,
            3 => BranchMode::Greater,
            4 => BranchMode::Equal,
            5 => BranchMode::NotEqual,
            6 => BranchMode::Member,
            other => return Err(n.invalid(format!("a node of mode {other}"), "0 to 6")),
        };
        let set = if mode == BranchMode::Member {
            sets.next()
                .ok_or_else(|| n.invalid("a set of members is missing", "one for each node of mode 6"))?
        } else {
            (0, 0)
        };
        branches.push(TreeBranch {
            feature: feature(n, features[i])?,
            mode,
            value: splits[i],
            members: set,
            missing_is_true: missing.get(i).is_some_and(|m| *m != 0),
            if_true: child(true_ids[i], true_leaves[i])?,
            if_false: child(false_ids[i], false_leaves[i])?,
        });
    }
    let mut weights = Vec::new();
    for (target, weight) in targets_of.iter().zip(leaf_weights) {
        let target = usize::try_from(*target).ok().filter(|t| *t < targets).ok_or_else(|| {
            n.invalid(format!("a leaf of target {target}"), format!("targets below {targets}"))
        })?;
        weights.push((target as u32, weight));
    }
    let aggregate = match n.int("aggregate_function", 1)? {
        0 => Aggregate::Average,
        1 => Aggregate::Sum,
        2 => Aggregate::Min,
        3 => Aggregate::Max,
        other => return Err(n.invalid(format!("attribute \"aggregate_function\" is {other}"), "0 to 3")),
    };
    let transform = match n.int("post_transform", 0)? {
        0 => PostTransform::None,
        1 => PostTransform::Softmax,
        2 => PostTransform::Logistic,
        3 => PostTransform::SoftmaxZero,
        4 => PostTransform::Probit,
        other => return Err(n.invalid(format!("attribute \"post_transform\" is {other}"), "0 to 4")),
    };
    let roots = roots.iter().map(|r| child(*r, 0)).collect::<Result<Vec<_>>>()?;
    let out = TreeEnsemble {
        roots,
        branches,
        leaves: (0..weights.len() as u32).map(|i| (i, i + 1)).collect(),
        weights,
        members,
        targets,
        aggregate,
        base_values: Vec::new(),
        post_transform: transform,
    };
    check_trees(n, &out)?;
    Ok(out)
}
