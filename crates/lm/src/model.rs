//! What schedulers and servers need of a language model: tokens in, logits out, several sequences at once.

use lightering_units::{Bytes, Seconds};

use crate::{Error, ModelStatus, Result};

/// One token of one sequence, to be computed in a step.
///
/// Rows of a sequence come in the order of their positions. A row sees the earlier positions of its own sequence, those
/// of the same step included, and nothing of other sequences; its results do not depend on which rows are beside it.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The token.
    pub token: u32,
    /// Its place in the sequence, from 0.
    pub position: u32,
    /// The cache pages of the sequence, in order: position `p` lies in page `pages[p / page_len]`. Sequences that share
    /// their beginning may share the pages which hold only that.
    pub pages: &'a [u32],
    /// The same for layers that see only a window, where the model keeps pages of their own for them
    /// ([`TokenModel::window`]); entries for positions that this row and later ones do not see may hold anything.
    pub window_pages: &'a [u32],
    /// Whether the logits after this token are wanted.
    pub wants_logits: bool,
}

/// The cache of layers that see only the last positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowCache {
    /// Positions that such a layer sees, that of the row itself included.
    pub len: usize,
    /// Pages for them, apart from those of the other layers.
    pub pages: usize,
}

impl WindowCache {
    /// The first position that a row at `position` sees.
    #[must_use]
    pub fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.len)
    }

    /// Pages of `page_len` positions with which `sequences` side by side never wait for one another, in steps of `rows`
    /// tokens.
    #[must_use]
    pub fn pages_for(len: usize, page_len: usize, sequences: usize, rows: usize) -> usize {
        sequences.saturating_mul(len.div_ceil(page_len) + 3).saturating_add(rows.div_ceil(page_len))
    }

    /// Pages without which not even one sequence gets on, a token at a time.
    #[must_use]
    pub fn least_pages(len: usize, page_len: usize) -> usize {
        len.div_ceil(page_len) + 1
    }
}

/// Which of the two caches a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Of the layers that see everything, or of all layers where windows have no pages of their own.
    Shared,
    /// Of layers with a window that have their own.
    Window,
}

/// The pages of a model that computes one sequence and nothing beside it.
#[derive(Clone, Debug)]
pub struct SoleSequence {
    pages: Vec<u32>,
    window_pages: Vec<u32>,
}

impl SoleSequence {
    /// All pages of `model`; those of windows come round again.
    #[must_use]
    pub fn of(model: &dyn TokenModel) -> SoleSequence {
        let count = u32::try_from(model.page_count()).unwrap_or(u32::MAX);
        let pages: Vec<u32> = (0..count).collect();
        let window_pages = match model.window() {
            Some(window) => pages.iter().map(|page| page % window.pages as u32).collect(),
            None => Vec::new(),
        };
        SoleSequence { pages, window_pages }
    }

    /// The row of a token.
    #[must_use]
    pub fn row(&self, token: u32, position: usize, wants_logits: bool) -> Row<'_> {
        let Self { pages, window_pages } = self;
        let position = u32::try_from(position).unwrap_or(u32::MAX);
        Row { token, position, pages, window_pages, wants_logits }
    }
}

/// What a step took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// From the first row to the last logits.
    pub seconds: Seconds,
    /// Part of it spent waiting for weights.
    pub stall: Seconds,
    /// Weight bytes read from their store.
    pub bytes_read: Bytes,
}

/// A model that turns tokens into logits. It keeps keys and values of past positions in a cache of pages, but knows
/// nothing of sequences: which page belongs to whom is decided by the caller.
pub trait TokenModel: Send {
    /// Tokens of the vocabulary: the length of the logits.
    fn vocabulary_len(&self) -> usize;

    /// Width of the hidden state: the length of an embedding.
    fn embedding_len(&self) -> usize;

    /// Most positions of one sequence.
    fn context_len(&self) -> usize;

    /// Most rows of one step.
    fn rows_max(&self) -> usize;

    /// Most rows of one step whose logits may be wanted; hidden states may be wanted of all.
    fn wanted_rows_max(&self) -> usize;

    /// Positions of one page of the cache.
    fn page_len(&self) -> usize;

    /// Pages of the cache.
    fn page_count(&self) -> usize;

    /// The cache of layers that see only a window, where that has pages of its own; else all layers share their pages.
    fn window(&self) -> Option<WindowCache> {
        None
    }

    /// Bytes of what all layers keep in one page; 0 where that cannot be copied.
    fn page_bytes(&self, kind: PageKind) -> usize {
        let _ = kind;
        0
    }

    /// Copies what a page holds.
    ///
    /// # Errors
    /// When there is no such page, or `bytes` has another length than [`page_bytes`](Self::page_bytes).
    fn read_page(&self, kind: PageKind, page: u32, bytes: &mut [u8]) -> Result<()> {
        let _ = (kind, page, bytes);
        Err(Error::unsupported("this model", "copying pages of its cache"))
    }

    /// Has a page hold what was copied from another one, or from itself earlier.
    ///
    /// # Errors
    /// As [`read_page`](Self::read_page); what the page holds is undefined then.
    fn write_page(&mut self, kind: PageKind, page: u32, bytes: &[u8]) -> Result<()> {
        let _ = (kind, page, bytes);
        Err(Error::unsupported("this model", "copying pages of its cache"))
    }

    /// Computes `rows`, writes their keys and values into their pages, and gives the logits of every wanted row, by
    /// its index in `rows`, in order.
    ///
    /// # Errors
    /// What is wrong with a row, or why it could not be computed; the pages of the given rows are undefined then, all
    /// others are untouched, and the model can be used again.
    fn step(&mut self, rows: &[Row<'_>], logits: &mut dyn FnMut(usize, &mut [f32])) -> Result<StepReport>;

    /// As [`step`](Self::step), but gives the normalised last hidden state, of
    /// [`embedding_len`](Self::embedding_len) values, in place of logits.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn embed(&mut self, rows: &[Row<'_>], hidden: &mut dyn FnMut(usize, &[f32])) -> Result<StepReport>;

    /// What it can tell of its memory and weights; asked a few times in a second at most.
    fn status(&self) -> ModelStatus {
        ModelStatus::default()
    }
}
