use std::sync::Arc;

use lightering_kernels::{ConvShape, conv_packed_bytes_len, conv_packed_len, packed_bytes_len, packed_len};

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
    /// Panels of an 8-bit convolution, then the sum of each column's weights (i32) from the next multiple of 64 on.
    ByteConv { shape: ConvShape, signed: bool },
    /// The same for an 8-bit matrix product from `[k, n]` or, transposed, `[n, k]`.
    ByteMatrix { k: usize, n: usize, signed: bool, transposed: bool },
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
            Packing::ByteConv { shape, .. } => self.sums_at() + shape.out_c * size_of::<i32>(),
            Packing::ByteMatrix { n, .. } => self.sums_at() + n * size_of::<i32>(),
        }
    }

    /// Where the sums of columns start in packed 8-bit weights.
    pub fn sums_at(&self) -> usize {
        match self {
            Packing::ByteConv { shape, .. } => conv_packed_bytes_len(shape).next_multiple_of(64),
            Packing::ByteMatrix { k, n, .. } => packed_bytes_len(*k, *n).next_multiple_of(64),
            _ => 0,
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
            Packing::ByteConv { shape, .. } => {
                shape.kernel[0] * shape.kernel[1] * (shape.in_c / shape.groups)
            }
            Packing::ByteMatrix { k, transposed: true, .. } => *k,
            // Sums run over whole columns, so this rare spelling is packed in one piece.
            Packing::ByteMatrix { k, n, .. } => k * n,
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
            Packing::ByteConv { shape, signed } => {
                let (panels, sums) = target.split_at_mut(self.sums_at());
                lightering_kernels::pack_conv_bytes_rows(
                    shape,
                    row,
                    piece,
                    *signed,
                    bytemuck::cast_slice_mut(panels),
                    &mut bytemuck::cast_slice_mut(sums)[..shape.out_c],
                );
            }
            Packing::ByteMatrix { k, n, signed, transposed: true } => {
                let (panels, sums) = target.split_at_mut(self.sums_at());
                lightering_kernels::pack_bytes_rows(
                    *k,
                    *n,
                    row,
                    piece,
                    *signed,
                    bytemuck::cast_slice_mut(panels),
                    &mut bytemuck::cast_slice_mut(sums)[..*n],
                );
            }
            Packing::ByteMatrix { k, n, signed, transposed } => {
                let (panels, sums) = target.split_at_mut(self.sums_at());
                lightering_kernels::pack_bytes(
                    *k,
                    *n,
                    piece,
                    *signed,
                    *transposed,
                    bytemuck::cast_slice_mut(panels),
                    &mut bytemuck::cast_slice_mut(sums)[..*n],
                );
            }
        }
    }

    /// Packs a weight that is in memory.
    pub fn pack_whole(&self, stored: &[u8], target: &mut [u8]) {
        self.pack_piece(0, stored, target);
    }
}
