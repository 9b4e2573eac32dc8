//! Compute on slices that the caller owns.
