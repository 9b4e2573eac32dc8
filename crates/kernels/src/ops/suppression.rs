//! Greedy non-maximum suppression of boxes.

/// How the four numbers of a box are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoxFormat {
    /// `[y1, x1, y2, x2]`, any two opposite corners.
    Corners,
    /// `[x centre, y centre, width, height]`.
    Centre,
}

/// `[y low, x low, y high, x high]`.
fn bounds(b: [f32; 4], format: BoxFormat) -> [f32; 4] {
    match format {
        BoxFormat::Corners => [b[0].min(b[2]), b[1].min(b[3]), b[0].max(b[2]), b[1].max(b[3])],
        BoxFormat::Centre => {
            let (w, h) = (b[2] / 2.0, b[3] / 2.0);
            [b[1] - h, b[0] - w, b[1] + h, b[0] + w]
        }
    }
}

/// Area of the intersection over area of the union; 0 for empty boxes.
pub fn intersection_over_union(a: [f32; 4], b: [f32; 4], format: BoxFormat) -> f32 {
    let (a, b) = (bounds(a, format), bounds(b, format));
    let height = a[2].min(b[2]) - a[0].max(b[0]);
    let width = a[3].min(b[3]) - a[1].max(b[1]);
    let area = |b: [f32; 4]| (b[2] - b[0]) * (b[3] - b[1]);
    let intersection = height * width;
    let union = area(a) + area(b) - intersection;
    if height <= 0.0 || width <= 0.0 || area(a) <= 0.0 || area(b) <= 0.0 || union <= 0.0 {
        return 0.0;
    }
    intersection / union
}

/// Keeps at most `max_kept` boxes of one class, best scores first (of equals the earlier one), dropping each box
/// that overlaps a kept one by more than `iou_threshold` or scores no more than `score_threshold`.
///
/// `order` is scratch with one element per box; the indices of the kept boxes are its first elements afterwards,
/// and their number is returned. Boxes are `[boxes, 4]`. Takes `O(n log n + n · kept)`.
pub fn suppress(
    boxes: &[f32],
    scores: &[f32],
    format: BoxFormat,
    max_kept: usize,
    iou_threshold: f32,
    score_threshold: Option<f32>,
    order: &mut [u32],
) -> usize {
    let corners = |i: u32| -> [f32; 4] {
        let at = 4 * i as usize;
        [boxes[at], boxes[at + 1], boxes[at + 2], boxes[at + 3]]
    };
    let mut candidates = 0;
    for (i, &score) in (0u32..).zip(scores) {
        if score_threshold.is_none_or(|t| score > t) {
            order[candidates] = i;
            candidates += 1;
        }
    }
    order[..candidates]
        .sort_unstable_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    let mut kept = 0;
    for next in 0..candidates {
        if kept >= max_kept {
            break;
        }
        let candidate = order[next];
        let overlaps = order[..kept]
            .iter()
            .any(|&k| intersection_over_union(corners(candidate), corners(k), format) > iou_threshold);
        if !overlaps {
            order[kept] = candidate;
            kept += 1;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_each_cluster_is_kept() {
        let boxes = [0.0, 0.0, 1.0, 1.0, 0.0, 0.1, 1.0, 1.1, 0.0, 10.0, 1.0, 11.0f32];
        let scores = [0.5, 0.9, 0.7];
        let mut order = [0; 3];
        let kept = suppress(&boxes, &scores, BoxFormat::Corners, 9, 0.5, None, &mut order);
        assert_eq!(order[..kept], [1, 2]);
        let kept = suppress(&boxes, &scores, BoxFormat::Corners, 1, 0.5, None, &mut order);
        assert_eq!(order[..kept], [1]);
        let kept = suppress(&boxes, &scores, BoxFormat::Corners, 9, 0.95, Some(0.6), &mut order);
        assert_eq!(order[..kept], [1, 2]);
    }
}
