//! Where buffers with known lifetimes go in one block of memory.
//!
//! The problem (dynamic storage allocation with known lifetimes) is NP-hard; we start from greedy placements in
//! several orders, which are usually optimal for networks, and then repair: the buffer that sticks out at the top
//! is placed earlier, as long as that helps. The lower bound is the largest sum of sizes alive at one time.

use std::ops::RangeInclusive;

/// A buffer to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Bytes, a multiple of the alignment.
    pub size: usize,
    /// First and last instruction during which the content must be kept.
    pub live: RangeInclusive<usize>,
}

impl Request {
    fn overlaps(&self, other: &Request) -> bool {
        self.live.start() <= other.live.end() && other.live.start() <= self.live.end()
    }
}

/// Offsets of all requests and the size of the block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub offsets: Vec<usize>,
    pub total: usize,
}

/// Largest number of bytes alive at one time: no placement is smaller.
pub(crate) fn max_live(requests: &[Request]) -> usize {
    live_profile(requests).into_iter().max().unwrap_or(0)
}

/// Bytes alive during each instruction.
pub(crate) fn live_profile(requests: &[Request]) -> Vec<usize> {
    let steps = requests.iter().map(|r| r.live.end() + 1).max().unwrap_or(0);
    let mut change = vec![0isize; steps + 1];
    for r in requests {
        change[*r.live.start()] += r.size as isize;
        change[r.live.end() + 1] -= r.size as isize;
    }
    let mut live = 0;
    change[..steps]
        .iter()
        .map(|c| {
            live += c;
            live as usize
        })
        .collect()
}

/// Repairs tried at most; each costs one placement.
const REPAIRS_MAX: usize = 80;
/// Requests × requests × repairs at most, so that planning a graph of ten thousand nodes stays short.
const EFFORT_MAX: usize = 40_000_000;

/// Finds offsets for all requests.
pub(crate) fn place(requests: &[Request]) -> Placement {
    let bound = max_live(requests);
    let duration = |r: &Request| r.live.end() - r.live.start() + 1;
    let mut orders: Vec<Vec<usize>> = Vec::new();
    let mut by = |key: &dyn Fn(&Request) -> (usize, usize)| {
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(key(&requests[i])));
        orders.push(order);
    };
    let steps = requests.iter().map(|r| r.live.end() + 1).max().unwrap_or(0);
    // What stays for the whole run lies at the bottom, where it leaves no gaps; then the largest first.
    by(&|r| (usize::from(duration(r) == steps), r.size));
    by(&|r| (r.size, duration(r)));
    by(&|r| (duration(r), r.size));
    by(&|r| (r.size.saturating_mul(duration(r)), r.size));
    by(&|r| (usize::MAX - r.live.start(), r.size));
    let mut best: Option<(Placement, Vec<usize>)> = None;
    for order in orders {
        let placement = place_in_order(requests, &order);
        if best.as_ref().is_none_or(|(b, _)| placement.total < b.total) {
            best = Some((placement, order));
        }
        if best.as_ref().is_some_and(|(b, _)| b.total == bound) {
            break;
        }
    }
    let Some((mut best, mut order)) = best else { return Placement { offsets: Vec::new(), total: 0 } };
    let repairs = REPAIRS_MAX.min(EFFORT_MAX / (requests.len() * requests.len()).max(1));
    // A fixed seed: the same graph always gets the same plan.
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % n.max(1) as u64) as usize
    };
    for _ in 0..repairs {
        if best.total == bound {
            break;
        }
        // One of the buffers that stick out goes before something that was placed earlier.
        let top: Vec<usize> = (0..order.len())
            .filter(|&p| best.offsets[order[p]] + requests[order[p]].size == best.total)
            .collect();
        let position = top[below(top.len())];
        if position == 0 {
            break;
        }
        let mut candidate = order.clone();
        let i = candidate.remove(position);
        candidate.insert(below(position), i);
        let placement = place_in_order(requests, &candidate);
        // Equal ones are taken, too, so that the search does not stand still on a plateau.
        if placement.total <= best.total {
            (best, order) = (placement, candidate);
        }
    }
    best
}

/// Puts each request, in the given order, into the smallest gap that fits it among those already placed.
fn place_in_order(requests: &[Request], order: &[usize]) -> Placement {
    let mut offsets = vec![usize::MAX; requests.len()];
    // Placed requests sorted by offset, so that gaps are found in one sweep.
    let mut placed: Vec<usize> = Vec::with_capacity(requests.len());
    let mut total = 0;
    for &i in order {
        let request = &requests[i];
        let (mut end, mut best, mut best_gap) = (0usize, usize::MAX, usize::MAX);
        for &j in &placed {
            if !requests[j].overlaps(request) {
                continue;
            }
            let start = offsets[j];
            if start > end {
                let gap = start - end;
                if gap >= request.size && gap < best_gap {
                    (best, best_gap) = (end, gap);
                }
            }
            end = end.max(start + requests[j].size);
        }
        let offset = if best == usize::MAX { end } else { best };
        offsets[i] = offset;
        total = total.max(offset + request.size);
        let at = placed.partition_point(|&j| offsets[j] <= offset);
        placed.insert(at, i);
    }
    Placement { offsets, total }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_valid(requests: &[Request], placement: &Placement) {
        for (i, a) in requests.iter().enumerate() {
            assert!(placement.offsets[i] + a.size <= placement.total);
            for (j, b) in requests.iter().enumerate().skip(i + 1) {
                let (oa, ob) = (placement.offsets[i], placement.offsets[j]);
                let apart = oa + a.size <= ob || ob + b.size <= oa;
                assert!(apart || !a.overlaps(b), "{i} and {j} overlap");
            }
        }
    }

    #[test]
    fn a_chain_needs_two_buffers() {
        let requests: Vec<Request> = (0..10).map(|i| Request { size: 64, live: i..=i + 1 }).collect();
        let placement = place(&requests);
        assert_eq!(placement.total, 128);
        check_valid(&requests, &placement);
    }

    proptest! {
        #[test]
        fn placements_never_overlap_and_stay_near_the_bound(
            raw in prop::collection::vec((1usize..50, 0usize..40, 0usize..12), 0..60),
        ) {
            let requests: Vec<Request> = raw
                .iter()
                .map(|&(size, first, length)| Request { size: size * 64, live: first..=first + length })
                .collect();
            let placement = place(&requests);
            check_valid(&requests, &placement);
            let bound = max_live(&requests);
            prop_assert!(placement.total >= bound);
            // Random lifetimes are harder than those of networks; a factor this large would be a bug.
            prop_assert!(placement.total <= bound + bound / 2 + 64);
        }
    }
}
