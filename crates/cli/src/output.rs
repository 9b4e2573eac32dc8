//! Where results go: stdout for the result, as text or as JSON; stderr for progress.

use crate::failure::Outcome;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Set once a result is on stdout, where a second JSON document would spoil the first.
static RESULT_WRITTEN: AtomicBool = AtomicBool::new(false);

/// True when stdout already carries a result.
pub fn result_written() -> bool {
    RESULT_WRITTEN.load(Ordering::Relaxed)
}

/// How the user wants to be answered.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON rather than text on stdout.
    pub json: bool,
    /// No progress.
    pub quiet: bool,
}

impl Output {
    /// Writes the result: the JSON value with `--json`, else the text.
    pub fn result(&self, json: &impl serde::Serialize, text: &str) -> Outcome<()> {
        RESULT_WRITTEN.store(true, Ordering::Relaxed);
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, json).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        } else {
            out.write_all(text.as_bytes())?;
        }
        out.flush()?;
        Ok(())
    }

    /// A line that tells a person what is going on; only on a terminal.
    pub fn progress(&self, steps: u64) -> ProgressBar {
        if self.quiet || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        let style = if steps > 1 { "{bar:24} {pos}/{len} {wide_msg}" } else { "{spinner} {wide_msg}" };
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// `text` for a terminal: control characters, which a file may hold to play tricks, become escapes.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Columns of text, left-aligned for words and right-aligned for numbers.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A table with these column titles; a title that begins with `>` is right-aligned.
    pub fn new(titles: &[&str]) -> Table {
        let right = titles.iter().map(|t| t.starts_with('>')).collect();
        Table { rows: vec![titles.iter().map(|t| t.trim_start_matches('>').to_owned()).collect()], right }
    }

    /// Adds a row.
    pub fn row<S: ToString>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(|c| c.to_string()).collect());
    }

    /// The table as lines, without trailing spaces.
    pub fn text(&self) -> String {
        let columns = self.right.len();
        let width = |cell: &str| cell.chars().count();
        let widths: Vec<usize> = (0..columns)
            .map(|c| self.rows.iter().filter_map(|r| r.get(c)).map(|s| width(s)).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - width(cell));
                if column > 0 {
                    line.push_str("  ");
                }
                if self.right[column] {
                    line.push_str(&pad);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&pad);
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_steers_the_terminal() {
        assert_eq!(printable("Gemma \u{1b}[2J\n\u{9b}é"), "Gemma \\u{1b}[2J\\n\\u{9b}é");
    }

    #[test]
    fn columns_align_by_characters() {
        let mut table = Table::new(&["op", ">time"]);
        table.row(["Conv", "9.0 µs"]);
        table.row(["Add", "12.5 ms"]);
        assert_eq!(table.text(), "op       time\nConv   9.0 µs\nAdd   12.5 ms\n");
    }
}
