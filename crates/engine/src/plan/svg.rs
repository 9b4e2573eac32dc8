//! The plan as a picture.

use std::fmt::Write as _;

use super::Plan;
use crate::program::BufferKind;

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 640.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 110.0;
const RIGHT: f64 = 20.0;

fn colour(kind: BufferKind) -> &'static str {
    match kind {
        BufferKind::Input => "#4c9f70",
        BufferKind::Activation => "#4f81bd",
        BufferKind::Experts => "#b0643a",
        BufferKind::State => "#2f7f86",
        BufferKind::Output => "#8064a2",
        BufferKind::Workspace => "#c0c0c0",
        BufferKind::Weight => "#f0b74e",
        BufferKind::Streamed => "#e0713c",
        BufferKind::Staging => "#9c9c7c",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Draws every buffer as a box: instructions to the right, bytes upwards; the peak is a red line, the budget a
/// dashed one. Hovering over a box names it.
pub(super) fn draw(plan: &Plan) -> String {
    let steps = plan.instructions.len().max(1) as f64;
    let top_bytes = plan.arena.0.max(plan.budget.map_or(0, |b| b.0)).max(1) as f64;
    let (plot_w, plot_h) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
    let x = |step: f64| LEFT + step / steps * plot_w;
    let y = |bytes: f64| TOP + plot_h - bytes / top_bytes * plot_h;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    );
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"22\" font-size=\"16\" font-weight=\"bold\">Memory plan: {} at the peak{}</text>",
        plan.predicted_peak,
        plan.budget.map_or(String::new(), |b| format!(", budget {b}"))
    );
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"42\" fill=\"#555\">arena {} ({:.1} % above the largest live set), {} of weights \
         read at each run, predicted {}</text>",
        plan.arena,
        plan.arena_excess() * 100.0,
        plan.streamed_per_run,
        plan.predicted_seconds
    );
    for i in 0..=4 {
        let bytes = top_bytes * f64::from(i) / 4.0;
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" \
             y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>",
            WIDTH - RIGHT,
            y(bytes),
            y(bytes),
            LEFT - 8.0,
            y(bytes) + 4.0,
            lightering_units::Bytes(bytes as u64)
        );
    }
    let mut buffers: Vec<_> = plan.buffers.iter().collect();
    buffers.sort_by_key(|b| std::cmp::Reverse(b.size));
    for b in buffers {
        let (x0, x1) = (x(b.first as f64), x(b.last as f64 + 1.0));
        let (y0, y1) = (y((b.offset + b.size).0 as f64), y(b.offset.0 as f64));
        let (w, h) = ((x1 - x0).max(0.5), (y1 - y0).max(0.5));
        let name = escape(&b.name);
        let _ = writeln!(
            out,
            "<g><title>{name}: {}, instructions {} to {}</title><rect x=\"{x0:.1}\" y=\"{y0:.1}\" width=\"{w:.1}\" \
             height=\"{h:.1}\" fill=\"{}\" fill-opacity=\"0.85\" stroke=\"white\" stroke-width=\"0.5\"/>",
            b.size,
            b.first,
            b.last,
            colour(b.kind)
        );
        // About seven pixels a letter; names that do not fit are left to the hover text.
        if h > 12.0 && w > 7.0 * b.name.chars().count() as f64 {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\" fill=\"#111\">{name}</text>",
                x0 + 3.0,
                y0 + h / 2.0 + 3.5
            );
        }
        out.push_str("</g>\n");
    }
    if let Some(budget) = plan.budget {
        let at = y(budget.0 as f64);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#c00\" \
             stroke-dasharray=\"6 4\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#c00\">budget</text>",
            WIDTH - RIGHT,
            WIDTH - RIGHT,
            at - 4.0
        );
    }
    if let Some(peak) = plan.instructions.get(plan.peak_at) {
        let at = x(plan.peak_at as f64 + 0.5);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#c00\"/><text x=\"{:.1}\" \
             y=\"{:.1}\" fill=\"#c00\" text-anchor=\"{}\">peak at {}: {}</text>",
            TOP + plot_h,
            if at > WIDTH / 2.0 { at - 4.0 } else { at + 4.0 },
            TOP + 12.0,
            if at > WIDTH / 2.0 { "end" } else { "start" },
            escape(&peak.name),
            peak.live
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{} instructions in execution order</text>",
        LEFT + plot_w / 2.0,
        TOP + plot_h + 22.0,
        plan.instructions.len()
    );
    let legend = [
        (BufferKind::Input, "input"),
        (BufferKind::Activation, "activation"),
        (BufferKind::Output, "output"),
        (BufferKind::Workspace, "scratch"),
        (BufferKind::Weight, "weight in memory"),
        (BufferKind::Streamed, "weight streamed"),
        (BufferKind::Staging, "staging"),
    ];
    let mut at = LEFT;
    for (kind, label) in legend {
        let y = HEIGHT - 58.0;
        let _ = writeln!(
            out,
            "<rect x=\"{at:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             fill=\"#333\">{label}</text>",
            y,
            colour(kind),
            at + 17.0,
            y + 10.5
        );
        at += 34.0 + 7.0 * label.len() as f64;
    }
    for (i, d) in plan.decisions.iter().take(2).enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#333\">{}: {} {}</text>",
            HEIGHT - 28.0 + 16.0 * i as f64,
            escape(&d.technique),
            escape(&d.what),
            escape(&d.why)
        );
    }
    out.push_str("</svg>\n");
    out
}
