//! Forests of decision trees.

use std::sync::atomic::{AtomicBool, Ordering};

use lightering_graph::{Aggregate, BranchMode, TreeBranch, TreeChild, TreeEnsemble};
use lightering_kernels::ThreadPool;
use lightering_kernels::ops::real::Real;
use lightering_kernels::ops::rows::parallel_rows;

use super::OpError;
use super::operands::invalid;

/// Rows that walk through one tree after another, so that a tree stays in the cache while they do.
const ROWS_PER_TASK: usize = 32;

/// An element of a table that trees look at.
pub(super) trait Feature: Copy + Sync {
    /// As trees compare it.
    fn value(self) -> f64;
}

macro_rules! feature {
    ($($t:ty),*) => {$(
        impl Feature for $t {
            #[inline(always)]
            fn value(self) -> f64 {
                self as f64
            }
        }
    )*};
}
feature!(f32, f64, i32, i64);

#[inline(always)]
fn holds(trees: &TreeEnsemble, branch: &TreeBranch, x: f64) -> bool {
    let member = || {
        let (first, end) = (branch.members.0 as usize, branch.members.1 as usize);
        trees.members.get(first..end).is_some_and(|set| set.contains(&x))
    };
    let condition = match branch.mode {
        BranchMode::LessOrEqual => x <= branch.value,
        BranchMode::Less => x < branch.value,
        BranchMode::GreaterOrEqual => x >= branch.value,
        BranchMode::Greater => x > branch.value,
        BranchMode::Equal => x == branch.value,
        BranchMode::NotEqual => x != branch.value,
        BranchMode::Member => member(),
    };
    condition || (branch.missing_is_true && x.is_nan())
}

/// The leaf that a row reaches, or `None` when the tree refers to a column, node or leaf that does not exist or runs
/// in a circle.
#[inline(always)]
fn walk<X: Feature>(trees: &TreeEnsemble, mut at: TreeChild, row: &[X]) -> Option<(u32, u32)> {
    for _ in 0..=trees.branches.len() {
        match at {
            TreeChild::Leaf(leaf) => return trees.leaves.get(leaf as usize).copied(),
            TreeChild::Node(node) => {
                let branch = trees.branches.get(node as usize)?;
                let x = row.get(branch.feature as usize)?.value();
                at = if holds(trees, branch, x) { branch.if_true } else { branch.if_false };
            }
        }
    }
    None
}

/// Aggregates the leaves of all trees per row: `x` is `[rows, columns]`, `out` is `[rows, targets]`. Base values are
/// added, the post-transform is not applied. Takes `O(rows · trees · depth)`; rows are shared out over the threads.
pub(super) fn evaluate<X: Feature, Y: Real>(
    pool: &ThreadPool,
    trees: &TreeEnsemble,
    columns: usize,
    x: &[X],
    out: &mut [Y],
) -> Result<(), OpError> {
    let targets = trees.targets;
    if !matches!(trees.base_values.len(), 0 | 1) && trees.base_values.len() != targets {
        return invalid(format!("{} base values for {targets} targets", trees.base_values.len()));
    }
    let broken = AtomicBool::new(false);
    parallel_rows(pool, out, targets, ROWS_PER_TASK, &|first, out| {
        let start = match trees.aggregate {
            Aggregate::Sum | Aggregate::Average => 0.0,
            Aggregate::Min => f64::INFINITY,
            Aggregate::Max => f64::NEG_INFINITY,
        };
        out.fill(Y::from_f64(start));
        for &root in &trees.roots {
            for (r, out) in out.chunks_exact_mut(targets).enumerate() {
                let row = &x[(first + r) * columns..][..columns];
                let weights =
                    walk(trees, root, row).and_then(|(a, b)| trees.weights.get(a as usize..b as usize));
                let Some(weights) = weights else {
                    return broken.store(true, Ordering::Relaxed);
                };
                for &(target, weight) in weights {
                    let Some(sum) = out.get_mut(target as usize) else {
                        return broken.store(true, Ordering::Relaxed);
                    };
                    let old = sum.to_f64();
                    *sum = Y::from_f64(match trees.aggregate {
                        Aggregate::Sum | Aggregate::Average => old + weight,
                        Aggregate::Min => old.min(weight),
                        Aggregate::Max => old.max(weight),
                    });
                }
            }
        }
        for out in out.chunks_exact_mut(targets) {
            for (target, sum) in out.iter_mut().enumerate() {
                let mut value = sum.to_f64();
                if trees.aggregate == Aggregate::Average {
                    value /= trees.roots.len().max(1) as f64;
                }
                // A target that no leaf talks of.
                if value.is_infinite() && value == start {
                    value = 0.0;
                }
                let base = match trees.base_values.len() {
                    0 => 0.0,
                    1 => trees.base_values[0],
                    _ => trees.base_values[target],
                };
                *sum = Y::from_f64(value + base);
            }
        }
    });
    if broken.into_inner() {
        return invalid(
            "a tree refers to a column, node, leaf or target that does not exist, or runs in a circle",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightering_graph::PostTransform;

    /// A complete tree of the given depth over three columns.
    fn forest(trees: usize, depth: u32) -> TreeEnsemble {
        let mut f = TreeEnsemble {
            roots: Vec::new(),
            branches: Vec::new(),
            leaves: Vec::new(),
            weights: Vec::new(),
            members: Vec::new(),
            targets: 2,
            aggregate: Aggregate::Sum,
            base_values: vec![0.5, -0.25],
            post_transform: PostTransform::None,
        };
        for tree in 0..trees {
            let (node, leaf) = (f.branches.len() as u32, f.leaves.len() as u32);
            let inner = (1u32 << depth) - 1;
            f.roots.push(if depth == 0 { TreeChild::Leaf(leaf) } else { TreeChild::Node(node) });
            let child = |i: u32| {
                if i < inner { TreeChild::Node(node + i) } else { TreeChild::Leaf(leaf + i - inner) }
            };
            for i in 0..inner {
                f.branches.push(TreeBranch {
                    feature: (i + tree as u32) % 3,
                    mode: [BranchMode::LessOrEqual, BranchMode::Greater, BranchMode::Less][i as usize % 3],
                    value: f64::from((i * 7 + tree as u32) % 11) / 11.0,
                    members: (0, 0),
                    missing_is_true: i % 2 == 0,
                    if_true: child(2 * i + 1),
                    if_false: child(2 * i + 2),
                });
            }
            for i in 0..1u32 << depth {
                let first = f.weights.len() as u32;
                f.weights.push((i % 2, f64::from(i) * 0.125 - 1.0));
                f.leaves.push((first, first + 1));
            }
        }
        f
    }

    fn naive(f: &TreeEnsemble, row: &[f32]) -> [f64; 2] {
        let mut out = [f.base_values[0], f.base_values[1]];
        for &root in &f.roots {
            let mut at = root;
            while let TreeChild::Node(n) = at {
                let b = f.branches[n as usize];
                let x = f64::from(row[b.feature as usize]);
                let yes = match b.mode {
                    BranchMode::LessOrEqual => x <= b.value,
                    BranchMode::Greater => x > b.value,
                    _ => x < b.value,
                };
                at = if yes || (x.is_nan() && b.missing_is_true) { b.if_true } else { b.if_false };
            }
            let TreeChild::Leaf(leaf) = at else { unreachable!() };
            let (target, weight) = f.weights[f.leaves[leaf as usize].0 as usize];
            out[target as usize] += weight;
        }
        out
    }

    #[test]
    fn forests_match_naive_walking() {
        for (trees, depth) in [(1, 0), (1, 1), (5, 3), (20, 6)] {
            let f = forest(trees, depth);
            let rows = 100;
            let mut x: Vec<f32> =
                (0..rows * 3).map(|i| ((i as f32 * 12.9898).sin() * 43758.547).fract().abs()).collect();
            x[5] = f32::NAN;
            for threads in [1, 3] {
                let mut out = vec![0f32; rows * 2];
                evaluate(&ThreadPool::new(threads), &f, 3, &x, &mut out).unwrap();
                for (row, out) in x.chunks(3).zip(out.chunks(2)) {
                    let expected = naive(&f, row);
                    assert!((expected[0] - f64::from(out[0])).abs() < 1e-5);
                    assert!((expected[1] - f64::from(out[1])).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn broken_trees_are_errors() {
        let pool = ThreadPool::new(1);
        let mut out = [0f32; 2];
        let mut f = forest(1, 2);
        assert!(evaluate(&pool, &f, 2, &[0.5f32; 2], &mut out).is_err());
        f.branches[1].if_true = TreeChild::Node(0);
        f.branches[1].if_false = TreeChild::Node(0);
        f.branches[2].if_true = TreeChild::Node(0);
        f.branches[2].if_false = TreeChild::Node(0);
        assert!(evaluate(&pool, &f, 3, &[0.5f32; 3], &mut out).is_err());
    }
}
