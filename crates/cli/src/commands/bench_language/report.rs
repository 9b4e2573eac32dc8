//! The report of a benchmark as one HTML page, with nothing from elsewhere.

use super::LanguageBenchReport;
use super::sustained::Sustained;
use lightering_units::Bytes;
use std::fmt::Write as _;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1c2430;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}\
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #dde3ea}td:first-child,th:first-child{text-align:left}\
.cards{display:flex;flex-wrap:wrap;gap:1rem}.card{border:1px solid #dde3ea;border-radius:.5rem;padding:.6rem 1rem;min-width:9rem}\
.card b{display:block;font-size:1.4rem}.card span{color:#5b6776}svg{width:100%;height:auto}.warning{color:#a33}\
@media(prefers-color-scheme:dark){body{color:#e6eaf0;background:#14181e}td,th,.card{border-color:#2b333d}.card span{color:#9aa7b5}}";

/// Rows of the table of operators.
const OPERATORS_MAX: usize = 20;
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 160.0;

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn table(out: &mut String, header: &[&str], rows: &[Vec<String>]) {
    out.push_str("<table><tr>");
    for cell in header {
        let _ = write!(out, "<th>{}</th>", escaped(cell));
    }
    out.push_str("</tr>");
    for row in rows {
        out.push_str("<tr>");
        for cell in row {
            let _ = write!(out, "<td>{}</td>", escaped(cell));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

fn cards(out: &mut String, cards: &[(String, &str)]) {
    out.push_str("<div class=\"cards\">");
    for (value, what) in cards {
        let _ =
            write!(out, "<div class=\"card\"><b>{}</b><span>{}</span></div>", escaped(value), escaped(what));
    }
    out.push_str("</div>");
}

/// Bars side by side, each with what is told when the pointer rests on it.
fn bars(out: &mut String, what: &str, bars: &[(f64, String)]) {
    let most = bars.iter().map(|(value, _)| *value).fold(0.0, f64::max);
    let _ =
        write!(out, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", escaped(what));
    let step = WIDTH / bars.len().max(1) as f64;
    for (i, (value, note)) in bars.iter().enumerate() {
        let height = if most > 0.0 { value / most * (HEIGHT - 4.0) } else { 0.0 };
        let _ = write!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#3b82c4\"><title>{}</title></rect>",
            i as f64 * step,
            HEIGHT - height,
            (step - 1.0).max(0.5),
            escaped(note)
        );
    }
    out.push_str("</svg>");
}

/// A line of the speed, and one of the fixed work, each as a part of its own largest value.
fn lines(out: &mut String, sustained: &Sustained) {
    let windows = &sustained.windows;
    let end = windows.last().map_or(1.0, |w| w.at_seconds).max(1e-9);
    let _ = write!(out, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"speed over time\">");
    let speed = windows.iter().map(|w| (w.at_seconds, w.tokens_per_second)).collect::<Vec<_>>();
    let fixed = windows.iter().map(|w| (w.at_seconds, w.fixed_per_second)).collect::<Vec<_>>();
    for (points, color) in [(fixed, "#c99a3b"), (speed, "#3b82c4")] {
        let most = points.iter().map(|p| p.1).fold(0.0, f64::max).max(1e-9);
        let _ = write!(out, "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"2\" points=\"");
        for (at, value) in points {
            let _ = write!(out, "{:.1},{:.1} ", at / end * WIDTH, HEIGHT - value / most * (HEIGHT - 4.0));
        }
        out.push_str("\"/>");
    }
    out.push_str(
        "</svg><p>Blue: tokens a second; ochre: fixed work a second; each as a part of its highest.</p>",
    );
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", seconds * 1e3)
}

/// The page.
pub fn html(report: &LanguageBenchReport, model: &str) -> String {
    let mut out = String::new();
    let title = format!("lighter bench: {}", escaped(model));
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    );
    let t = &report.token_seconds;
    cards(
        &mut out,
        &[
            (format!("{:.1}", report.prompt_tokens_per_second), "tokens/s of the prompt"),
            (format!("{:.1}", report.tokens_per_second), "tokens/s of the answer"),
            (milliseconds(report.first_token.p50.0), "to the first token, median"),
            (milliseconds(t.p50.0), "from token to token, median"),
            (format!("{:.1} %", report.stall_share * 100.0), "of the time waiting for weights"),
        ],
    );
    let _ = write!(
        out,
        "<p>A prompt of {} tokens and {} tokens of answer, {} rounds.</p><h2>Latency</h2>",
        report.prompt_tokens,
        report.tokens,
        report.first_token_seconds.len()
    );
    let row = |name: &str, p: &super::Percentiles| {
        vec![
            name.to_owned(),
            milliseconds(p.p50.0),
            milliseconds(p.p90.0),
            milliseconds(p.p99.0),
            milliseconds(p.max.0),
        ]
    };
    let rows = [row("first token", &report.first_token), row("token to token", t)];
    table(&mut out, &["", "median", "90th percentile", "99th", "longest"], &rows);
    let histogram: Vec<(f64, String)> = report
        .token_histogram
        .iter()
        .map(|b| {
            let range = format!("{} to {}", milliseconds(b.from.0), milliseconds(b.to.0));
            (b.count as f64, format!("{range}: {} tokens", b.count))
        })
        .collect();
    bars(&mut out, "how many tokens took how long", &histogram);
    if let (Some(first), Some(last)) = (report.token_histogram.first(), report.token_histogram.last()) {
        let (from, to) = (milliseconds(first.from.0), milliseconds(last.to.0));
        let _ = write!(out, "<p>How many tokens took how long, from {from} to {to}.</p>");
    }
    out.push_str("<h2>Memory</h2>");
    let rows: Vec<Vec<String>> =
        report.memory.iter().map(|m| vec![m.class.to_owned(), m.bytes.to_string()]).collect();
    table(&mut out, &["class", "planned"], &rows);
    let receipt = &report.receipt;
    let peak = receipt.measured.peak_beyond_fixed_bytes.map_or("not measured".to_owned(), |b| b.to_string());
    let budget = receipt.budget.memory_bytes.map_or("none".to_owned(), |b| b.to_string());
    let _ =
        write!(out, "<p>Budget: {}. Measured peak beyond the program's fixed cost: {}.</p>", budget, peak);
    out.push_str("<h2>Bytes for a token of the answer</h2>");
    let read = report.bytes_read_per_token;
    let memory = (report.weight_bytes_per_token.0 as f64 - read).max(0.0);
    let tier = |name: &str, bytes: f64| vec![name.to_owned(), Bytes(bytes as u64).to_string()];
    table(&mut out, &["tier", "weights"], &[tier("memory", memory), tier("disk", read)]);
    if let Some(e) = &report.experts {
        let _ = write!(
            out,
            "<p>{} of {} experts have a place in memory; {:.1} % of those asked for were there.</p>",
            e.slots,
            e.chunks,
            e.hit_rate * 100.0
        );
    }
    if let Some(sustained) = &report.sustained {
        out.push_str("<h2>Sustained run</h2>");
        lines(&mut out, sustained);
        let _ = write!(
            out,
            "<p>{:+.1} % a minute; the last third was {:.1} % slower than the first, fixed work {:.1} %: {}.</p>",
            sustained.slope_per_minute * 100.0,
            sustained.slowdown * 100.0,
            sustained.fixed_slowdown * 100.0,
            escaped(sustained.verdict.text())
        );
    }
    out.push_str("<h2>Operators</h2>");
    let mut operators: Vec<(String, f64, u64)> = Vec::new();
    for node in &report.profile {
        match operators.iter_mut().find(|(op, ..)| *op == node.op) {
            Some((_, seconds, nodes)) => (*seconds, *nodes) = (*seconds + node.total.0, *nodes + 1),
            None => operators.push((node.op.clone(), node.total.0, 1)),
        }
    }
    operators.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: f64 = operators.iter().map(|(_, seconds, _)| seconds).sum();
    let tokens = report.profile.first().map_or(1, |node| node.count.max(1)) as f64;
    let rows: Vec<Vec<String>> = operators
        .into_iter()
        .take(OPERATORS_MAX)
        .map(|(op, seconds, nodes)| {
            let share = format!("{:.1} %", seconds / all.max(1e-12) * 100.0);
            vec![op, nodes.to_string(), milliseconds(seconds / tokens), share]
        })
        .collect();
    table(&mut out, &["operator", "nodes", "of a token", "share"], &rows);
    out.push_str("</body></html>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_by_others_is_escaped() {
        let mut out = String::new();
        table(&mut out, &["a"], &[vec!["<script>\"&\u{1b}".to_owned()]]);
        assert_eq!(
            out,
            "<table><tr><th>a</th></tr><tr><td>&lt;script&gt;&quot;&amp;\u{fffd}</td></tr></table>"
        );
        let mut out = String::new();
        bars(&mut out, "x", &[]);
        bars(&mut out, "x", &[(0.0, String::new())]);
        assert!(!out.contains("NaN") && !out.contains("inf"), "{out}");
    }
}
