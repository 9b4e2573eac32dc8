//! A model for tests: its logits are a hash of the last few tokens that really are in its pages, and it finds out when
//! pages are used wrongly.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use lightering_lm::{
    Error, ModelStatus, PageKind, Result, Row, StepReport, TokenModel, Tokenizer, VocabularyData, WindowCache,
};
use lightering_units::{Bytes, Seconds};

/// What was written at one position of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    token: u32,
    position: u32,
    /// A hash of all tokens up to here.
    chain: u64,
}

/// Knobs that a test keeps while the scheduler owns the model.
#[derive(Debug, Default)]
pub struct Controls {
    /// Fails the next step.
    pub fail: AtomicBool,
    /// Panics in the next step.
    pub panic: AtomicBool,
    /// Sleeps so many microseconds in each step.
    pub delay_us: AtomicU64,
    /// Steps so far.
    pub steps: AtomicUsize,
    /// The most rows that a step had.
    pub rows_seen: AtomicUsize,
}

#[derive(Debug, Clone)]
pub struct Toy {
    pub vocabulary_len: usize,
    pub context_len: usize,
    pub rows_max: usize,
    pub wanted_rows_max: usize,
    pub page_len: usize,
    pub page_count: usize,
    /// How many of the last tokens decide what comes next.
    pub memory: usize,
    pub controls: Arc<Controls>,
    pub cells: Vec<Option<Cell>>,
    /// What it needs of the last positions only, if it keeps that apart.
    pub window: Option<WindowCache>,
    pub window_cells: Vec<Option<Cell>>,
}

pub const EMBEDDING_LEN: usize = 8;
const CELL_BYTES: usize = 16;

fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Toy {
    pub fn new(tokenizer: &Tokenizer, page_len: usize, page_count: usize) -> Toy {
        Toy {
            vocabulary_len: tokenizer.token_count(),
            context_len: 4096,
            rows_max: 16,
            wanted_rows_max: 8,
            page_len,
            page_count,
            memory: 2,
            controls: Arc::default(),
            cells: vec![None; page_len * page_count],
            window: None,
            window_cells: Vec::new(),
        }
    }

    /// The same with layers that see the last `len` positions only and have `pages` pages of their own.
    pub fn with_window(self, len: usize, pages: usize) -> Toy {
        let window_cells = vec![None; self.page_len * pages];
        Toy { window: Some(WindowCache { len, pages }), window_cells, ..self }
    }

    fn wrong(what: String) -> Error {
        Error::Invalid { place: "toy".into(), what, expected: "correct use of pages".into() }
    }

    fn cell(&self, row: &Row<'_>, position: usize) -> Result<usize> {
        self.cell_in(row.pages, self.page_count, position)
    }

    fn cell_in(&self, pages: &[u32], page_count: usize, position: usize) -> Result<usize> {
        let page = pages.get(position / self.page_len).copied();
        let page = page.filter(|page| (*page as usize) < page_count);
        let page = page.ok_or_else(|| Toy::wrong(format!("no page for position {position}")))?;
        Ok(page as usize * self.page_len + position % self.page_len)
    }

    /// Writes the row's token and gives the hash of what comes next.
    fn write(&mut self, row: &Row<'_>) -> Result<u64> {
        let position = row.position as usize;
        if row.token as usize >= self.vocabulary_len || position >= self.context_len {
            return Err(Toy::wrong(format!("token {} at {position}", row.token)));
        }
        let mut chain = 0;
        let mut last = Vec::new();
        for before in 0..position {
            let cell = self.cells[self.cell(row, before)?];
            let cell = cell.ok_or_else(|| Toy::wrong(format!("position {before} was never written")))?;
            chain = mix(chain, u64::from(cell.token) + 1);
            if cell.chain != chain || cell.position as usize != before {
                return Err(Toy::wrong(format!("position {before} holds something of another sequence")));
            }
            if let Some(window) = self.window
                && before >= window.first_seen(position)
            {
                let at = self.cell_in(row.window_pages, window.pages, before)?;
                if self.window_cells[at] != Some(cell) {
                    return Err(Toy::wrong(format!("the window holds something else at position {before}")));
                }
            }
            last.push(cell.token);
        }
        last.push(row.token);
        chain = mix(chain, u64::from(row.token) + 1);
        let at = self.cell(row, position)?;
        self.cells[at] = Some(Cell { token: row.token, position: row.position, chain });
        if let Some(window) = self.window {
            let in_window = self.cell_in(row.window_pages, window.pages, position)?;
            self.window_cells[in_window] = self.cells[at];
        }
        let from = last.len().saturating_sub(self.memory);
        Ok(last[from..].iter().fold(7, |hash, token| mix(hash, u64::from(*token))))
    }

    fn run(
        &mut self,
        rows: &[Row<'_>],
        wanted_max: usize,
        give: &mut dyn FnMut(&Toy, usize, u64),
    ) -> Result<StepReport> {
        let wanted = rows.iter().filter(|row| row.wants_logits).count();
        assert!(!rows.is_empty() && rows.len() <= self.rows_max, "{} rows", rows.len());
        assert!(wanted <= wanted_max, "{wanted} wanted rows");
        let controls = Arc::clone(&self.controls);
        controls.steps.fetch_add(1, Ordering::Relaxed);
        controls.rows_seen.fetch_max(rows.len(), Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(controls.delay_us.load(Ordering::Relaxed)));
        assert!(!controls.panic.swap(false, Ordering::Relaxed), "the toy was told to panic");
        let fails = controls.fail.swap(false, Ordering::Relaxed);
        let mut hashes = Vec::new();
        for row in rows {
            hashes.push(self.write(row)?);
        }
        if fails {
            // The pages of the rows are undefined now.
            for row in rows {
                for position in 0..=row.position as usize {
                    let at = self.cell(row, position)?;
                    self.cells[at] = None;
                    if let Some(window) =
                        self.window.filter(|w| position >= w.first_seen(row.position as usize))
                    {
                        let at = self.cell_in(row.window_pages, window.pages, position)?;
                        self.window_cells[at] = None;
                    }
                }
            }
            return Err(Toy::wrong("layer 3, expert 5: the disk said no".into()));
        }
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.wants_logits) {
            let _ = row;
            give(self, index, hashes[index]);
        }
        Ok(StepReport {
            seconds: Seconds(0.001),
            stall: Seconds(0.0005),
            bytes_read: Bytes(rows.len() as u64),
        })
    }
}

impl TokenModel for Toy {
    fn vocabulary_len(&self) -> usize {
        self.vocabulary_len
    }

    fn embedding_len(&self) -> usize {
        EMBEDDING_LEN
    }

    fn context_len(&self) -> usize {
        self.context_len
    }

    fn rows_max(&self) -> usize {
        self.rows_max
    }

    fn wanted_rows_max(&self) -> usize {
        self.wanted_rows_max
    }

    fn page_len(&self) -> usize {
        self.page_len
    }

    fn page_count(&self) -> usize {
        self.page_count
    }

    fn window(&self) -> Option<WindowCache> {
        self.window
    }

    fn page_bytes(&self, _: PageKind) -> usize {
        self.page_len * CELL_BYTES
    }

    fn read_page(&self, kind: PageKind, page: u32, bytes: &mut [u8]) -> Result<()> {
        let cells = if kind == PageKind::Window { &self.window_cells } else { &self.cells };
        let cells = &cells[page as usize * self.page_len..][..self.page_len];
        for (cell, bytes) in cells.iter().zip(bytes.chunks_exact_mut(CELL_BYTES)) {
            let cell = cell.ok_or_else(|| Toy::wrong("a page that is copied was never written".into()))?;
            bytes[..4].copy_from_slice(&cell.token.to_le_bytes());
            bytes[4..8].copy_from_slice(&cell.position.to_le_bytes());
            bytes[8..].copy_from_slice(&cell.chain.to_le_bytes());
        }
        Ok(())
    }

    fn write_page(&mut self, kind: PageKind, page: u32, bytes: &[u8]) -> Result<()> {
        let cells = if kind == PageKind::Window { &mut self.window_cells } else { &mut self.cells };
        let cells = &mut cells[page as usize * self.page_len..][..self.page_len];
        for (cell, bytes) in cells.iter_mut().zip(bytes.chunks_exact(CELL_BYTES)) {
            *cell = Some(Cell {
                token: u32::from_le_bytes(bytes[..4].try_into().unwrap()),
                position: u32::from_le_bytes(bytes[4..8].try_into().unwrap()),
                chain: u64::from_le_bytes(bytes[8..].try_into().unwrap()),
            });
        }
        Ok(())
    }

    fn step(&mut self, rows: &[Row<'_>], logits: &mut dyn FnMut(usize, &mut [f32])) -> Result<StepReport> {
        self.run(rows, self.wanted_rows_max, &mut |toy, index, hash| {
            let mut values: Vec<f32> = (0..toy.vocabulary_len as u64)
                .map(|v| (mix(hash, v) >> 40) as f32 / (1 << 21) as f32)
                .collect();
            logits(index, &mut values);
        })
    }

    fn embed(&mut self, rows: &[Row<'_>], hidden: &mut dyn FnMut(usize, &[f32])) -> Result<StepReport> {
        self.run(rows, self.rows_max, &mut |_, index, hash| {
            let values: Vec<f32> = (0..EMBEDDING_LEN as u64)
                .map(|v| (mix(hash, v + 1000) >> 40) as f32 / (1 << 23) as f32 - 1.0)
                .collect();
            hidden(index, &values);
        })
    }

    fn status(&self) -> ModelStatus {
        ModelStatus {
            memory_budget: Some(Bytes(1 << 20)),
            memory_used: Some(Bytes(1 << 19)),
            ..ModelStatus::default()
        }
    }
}

/// Single bytes in the alphabet of GPT-2, one merge, then ChatML's control tokens.
pub fn tokenizer() -> Tokenizer {
    let codes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
    let mut tokens: Vec<String> = codes.map(|code| char::from_u32(code).unwrap().to_string()).collect();
    tokens.extend(["hi", "<|im_end|>", "<|im_start|>"].map(String::from));
    let mut token_types = vec![1; tokens.len()];
    let count = token_types.len();
    token_types[count - 2..].fill(3);
    let eos = Some(count as u32 - 2);
    let (model, pre) = ("gpt2".into(), "gpt-2".into());
    let merges = vec!["h i".into()];
    let data = VocabularyData { model, pre, tokens, token_types, merges, eos, ..VocabularyData::default() };
    Tokenizer::new(data).unwrap()
}
