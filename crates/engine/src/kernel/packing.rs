use std::sync::Arc;

use lightering_kernels::{ConvShape, conv_packed_len, packed_len};

/// How the elements of a weight lie in the arena.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Packing {
    /// As stored: row-major.
    Plain,
    /// Not at all: rows are read from the store when they are asked for.
    Stored,
    /// Panels of a convolution from `[out, in/groups, height, width]`.
    Conv { shape: ConvShape, scale: Option<Scale> },
    /// Panels of a matrix product from `[k, n]`.
    Kn { k: usize, n: usize, scale: Option<Scale> },
    /// Panels of a matrix product from `[n, k]`.
    Nk { k: usize, n: usize, scale: Option<Scale> },
}

/// Factors per output channel, compared and hashed by their bits.
#[derive(Clone, Debug)]
pub(crate) struct Scale(pub Arc<[f32]>);

impl Scale {
    fn bits(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().map(|x| x.to_bits())
    }
}

impl PartialEq for Scale {
    fn eq(&self, other: &Scale) -> bool {
        self.bits().eq(other.bits())
    }
}

impl Eq for Scale {}

impl std::hash::Hash for Scale {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.bits().for_each(|b| b.hash(state));
    }
}

const F32: usize = size_of::<f32>();

impl Packing {
    /// Bytes that `plain` bytes take when packed.
    pub fn packed_bytes(&self, plain: usize) -> usize {
        match self {
            Packing::Plain => plain,
            Packing::Stored => 0,
            Packing::Conv { shape, .. } => conv_packed_len(shape) * F32,
            Packing::Kn { k, n, .. } | Packing::Nk { k, n, .. } => packed_len(*k, *n) * F32,
        }
    }

    /// Whether the stored bytes go to their place unchanged.
    pub fn is_plain(&self) -> bool {
        *self == Packing::Plain
    }

    /// Bytes of one stored row: the unit in which a weight is packed.
    fn row_bytes(&self) -> usize {
        match self {
            Packing::Plain | Packing::Stored => 1,
            Packing::Conv { shape, .. } => {
                shape.kernel[0] * shape.kernel[1] * (shape.in_c / shape.groups) * F32
            }
            Packing::Kn { n, .. } => n * F32,
            Packing::Nk { k, .. } => k * F32,
        }
    }

    /// Largest piece, of at most `room` bytes if one row is not larger, in which the stored bytes can be packed.
    pub fn piece_bytes(&self, room: usize) -> usize {
        let row = self.row_bytes().max(1);
        (room / row).max(1) * row
    }

    /// Packs the stored bytes from offset `at` on; both ends are at borders of rows.
    pub fn pack_piece(&self, at: usize, piece: &[u8], target: &mut [u8]) {
        let row = at / self.row_bytes().max(1);
        match self {
            Packing::Plain | Packing::Stored => target[at..at + piece.len()].copy_from_slice(piece),
            Packing::Conv { shape, scale } => lightering_kernels::pack_conv_rows(
                shape,
                row,
                bytemuck::cast_slice(piece),
                scale.as_ref().map(|s| &*s.0),
                &mut bytemuck::cast_slice_mut(target)[..conv_packed_len(shape)],
            ),
            Packing::Kn { k, n, scale } => lightering_kernels::pack_kn_rows(
                *k,
                *n,
                row,
                bytemuck::cast_slice(piece),
                scale.as_ref().map(|s| &*s.0),
                &mut bytemuck::cast_slice_mut(target)[..packed_len(*k, *n)],
            ),
            Packing::Nk { k, n, scale } => lightering_kernels::pack_nk_rows(
                *k,
                *n,
                row,
                bytemuck::cast_slice(piece),
                scale.as_ref().map(|s| &*s.0),
                &mut bytemuck::cast_slice_mut(target)[..packed_len(*k, *n)],
            ),
        }
    }

    /// Packs a weight that is in memory.
    pub fn pack_whole(&self, stored: &[u8], target: &mut [u8]) {
        self.pack_piece(0, stored, target);
    }
}
