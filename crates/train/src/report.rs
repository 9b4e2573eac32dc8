//! A page with the curves of a training: one file that needs nothing else, written anew every few seconds.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::TrainError;
use crate::durable;

/// Points kept per curve; when there are more, neighbours are averaged.
pub const POINTS_MAX: usize = 2_000;
/// Seconds after which a page of a running training loads itself again.
const RELOAD_SECONDS: u32 = 5;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 30.0;
const COLOURS: [&str; 4] = ["var(--blue)", "var(--amber)", "var(--teal)", "var(--red)"];

/// A curve over steps.
#[derive(Clone, Debug, PartialEq)]
struct Curve {
    name: String,
    /// Step and value.
    points: Vec<(f64, f64)>,
    /// How many values each point stands for, and those of the one that is not complete.
    stride: u32,
    pending: (f64, f64, u32),
    last: f64,
}

impl Curve {
    fn add(&mut self, step: f64, value: f64) {
        self.last = value;
        if !value.is_finite() {
            return;
        }
        let (steps, values, count) = &mut self.pending;
        *steps += step;
        *values += value;
        *count += 1;
        if *count < self.stride {
            return;
        }
        let n = f64::from(*count);
        self.points.push((*steps / n, *values / n));
        self.pending = (0.0, 0.0, 0);
        if self.points.len() >= POINTS_MAX {
            self.points = self
                .points
                .chunks(2)
                .map(|c| {
                    let n = c.len() as f64;
                    (c.iter().map(|p| p.0).sum::<f64>() / n, c.iter().map(|p| p.1).sum::<f64>() / n)
                })
                .collect();
            self.stride *= 2;
        }
    }
}

/// Curves that share axes.
#[derive(Clone, Debug, PartialEq)]
struct Panel {
    title: String,
    unit: String,
    curves: Vec<Curve>,
    limit: Option<(String, f64)>,
}

/// The page of one training.
///
/// ```
/// use lightering_train::Report;
/// let mut report = Report::new("cnn on Fashion-MNIST");
/// report.add("Loss", "nats", "training", 1, 2.3);
/// report.limit("Memory", "MiB", "budget", 64.0);
/// report.fact("Seed", "0");
/// assert!(report.to_html(true).contains("<svg"));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    title: String,
    facts: Vec<(String, String)>,
    panels: Vec<Panel>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with as many digits as a reader wants.
fn short(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.2e}")
    } else {
        let digits = (3 - libm::log10(size).floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

impl Report {
    /// A page without curves.
    pub fn new(title: impl Into<String>) -> Report {
        Report { title: title.into(), facts: Vec::new(), panels: Vec::new() }
    }

    /// States something, or states it anew.
    pub fn fact(&mut self, name: &str, value: impl Into<String>) {
        match self.facts.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = value.into(),
            None => self.facts.push((name.to_owned(), value.into())),
        }
    }

    fn panel(&mut self, title: &str, unit: &str) -> &mut Panel {
        let at = self.panels.iter().position(|p| p.title == title).unwrap_or_else(|| {
            let (title, unit) = (title.to_owned(), unit.to_owned());
            self.panels.push(Panel { title, unit, curves: Vec::new(), limit: None });
            self.panels.len() - 1
        });
        &mut self.panels[at]
    }

    /// Adds a value to a curve of a panel; both are made when they are new. Values that are not finite leave a note, but
    /// no point.
    pub fn add(&mut self, panel: &str, unit: &str, curve: &str, step: u64, value: f64) {
        let panel = self.panel(panel, unit);
        let at = panel.curves.iter().position(|c| c.name == curve).unwrap_or_else(|| {
            panel.curves.push(Curve {
                name: curve.to_owned(),
                points: Vec::new(),
                stride: 1,
                pending: (0.0, 0.0, 0),
                last: f64::NAN,
            });
            panel.curves.len() - 1
        });
        panel.curves[at].add(step as f64, value);
    }

    /// Draws a dashed line across a panel: the budget.
    pub fn limit(&mut self, panel: &str, unit: &str, name: &str, value: f64) {
        self.panel(panel, unit).limit = Some((name.to_owned(), value));
    }

    /// The page. While the training is `running` it loads itself again every few seconds.
    pub fn to_html(&self, running: bool) -> String {
        let mut out = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
        out.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
        out.push_str("<meta name=\"color-scheme\" content=\"light dark\">\n");
        // Writing to a String cannot fail.
        if running {
            let _ = writeln!(out, "<meta http-equiv=\"refresh\" content=\"{RELOAD_SECONDS}\">");
        }
        let title = escape(&self.title);
        let _ = writeln!(out, "<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>");
        let state = if running { "running" } else { "finished" };
        let _ = writeln!(out, "<header><h1>{title}</h1><span>{state}</span></header>");
        if !self.facts.is_empty() {
            out.push_str("<section class=\"card facts\"><dl>\n");
            for (name, value) in &self.facts {
                let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
            }
            out.push_str("</dl></section>\n");
        }
        out.push_str("<section class=\"grid\">\n");
        for panel in &self.panels {
            draw(panel, &mut out);
        }
        out.push_str("</section>\n</main>\n</body>\n</html>\n");
        out
    }

    /// Writes the page, so that whoever loads it sees the old one or the new one, whole.
    ///
    /// # Errors
    /// The file cannot be written; the old one is then still there.
    pub fn write(&self, path: &Path, running: bool) -> Result<(), TrainError> {
        let page = self.to_html(running);
        durable::replace(path, &durable::create, &mut |out| {
            out.write_all(page.as_bytes())
                .map_err(|source| TrainError::Io { place: path.display().to_string(), source })
        })
    }
}

/// Writes a report at most every so often.
#[derive(Clone, Debug)]
pub struct ReportFile {
    path: PathBuf,
    every_seconds: f64,
    last: Option<f64>,
}

impl ReportFile {
    /// A page at `path` that is written at most every `every_seconds`.
    pub fn new(path: impl Into<PathBuf>, every_seconds: f64) -> ReportFile {
        ReportFile { path: path.into(), every_seconds, last: None }
    }

    /// Writes the page if it is time, `now` being the seconds of any clock that only goes forward. True if it did.
    ///
    /// # Errors
    /// As [`Report::write`].
    pub fn update(&mut self, report: &Report, now: f64) -> Result<bool, TrainError> {
        if self.last.is_some_and(|last| now - last < self.every_seconds) {
            return Ok(false);
        }
        report.write(&self.path, true)?;
        self.last = Some(now);
        Ok(true)
    }

    /// Writes the page of a finished training.
    ///
    /// # Errors
    /// As [`Report::write`].
    pub fn finish(&self, report: &Report) -> Result<(), TrainError> {
        report.write(&self.path, false)
    }
}

fn draw(panel: &Panel, out: &mut String) {
    let title = escape(&panel.title);
    let unit = if panel.unit.is_empty() { String::new() } else { format!(" ({})", escape(&panel.unit)) };
    let _ = writeln!(out, "<div class=\"card\"><h2>{title}{unit}</h2>");
    let points = || panel.curves.iter().flat_map(|c| &c.points);
    let limit = panel.limit.as_ref().map(|l| l.1).filter(|l| l.is_finite());
    let fold =
        |f: fn(f64, f64) -> f64, values: &mut dyn Iterator<Item = f64>, start: f64| values.fold(start, f);
    let (x0, x1) = (
        fold(f64::min, &mut points().map(|p| p.0), f64::INFINITY),
        fold(f64::max, &mut points().map(|p| p.0), f64::NEG_INFINITY),
    );
    let mut values = points().map(|p| p.1).chain(limit);
    let (mut y0, mut y1) =
        values.by_ref().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if x1.is_finite() {
        // A budget is seen against nothing used.
        if limit.is_some() {
            y0 = y0.min(0.0);
        }
        if y1 - y0 < 1e-12 * y1.abs().max(1e-12) {
            let room = y1.abs().max(1.0) * 0.05;
            (y0, y1) = (y0 - room, y1 + room);
        }
        let (plot_w, plot_h) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let x = |step: f64| LEFT + if x1 > x0 { (step - x0) / (x1 - x0) } else { 0.5 } * plot_w;
        let y = |value: f64| TOP + (y1 - value) / (y1 - y0) * plot_h;
        let _ = writeln!(out, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">");
        for i in 0..=4 {
            let value = y0 + (y1 - y0) * f64::from(i) / 4.0;
            let at = y(value);
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"var(--line)\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                at + 4.0,
                short(value)
            );
        }
        for (step, anchor) in [(x0, "start"), (x1, "end")] {
            let at = if anchor == "start" { LEFT } else { WIDTH - RIGHT };
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">step {}</text>",
                HEIGHT - 10.0,
                step.round()
            );
        }
        if let Some(limit) = limit {
            let at = y(limit);
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"var(--red)\" \
                 stroke-dasharray=\"6 4\"/>",
                WIDTH - RIGHT
            );
        }
        for (i, curve) in panel.curves.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            if let [(px, py)] = curve.points[..] {
                let _ = writeln!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    x(px),
                    y(py)
                );
                continue;
            }
            let line: Vec<String> =
                curve.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
                line.join(" ")
            );
        }
        out.push_str("</svg>\n");
    }
    out.push_str("<div class=\"legend\">");
    for (i, curve) in panel.curves.iter().enumerate() {
        let last = if curve.last.is_finite() { short(curve.last) } else { "not a finite number".into() };
        let _ = write!(
            out,
            "<span><b style=\"background:{}\"></b>{}: {last}</span>",
            COLOURS[i % COLOURS.len()],
            escape(&curve.name)
        );
    }
    if let Some((name, value)) = &panel.limit {
        let _ = write!(
            out,
            "<span><b style=\"background:var(--red)\"></b>{}: {}</span>",
            escape(name),
            short(*value)
        );
    }
    out.push_str("</div></div>\n");
}

/// The look of the server's dashboard.
const STYLE: &str = "
:root { --paper:#f6f7f9; --card:#fff; --ink:#1b2430; --soft:#64707f; --line:#e1e5ea; --blue:#2468c8; --teal:#0f8f80; --amber:#b97400; --red:#c23b32; }
@media (prefers-color-scheme: dark) { :root { --paper:#11161c; --card:#1a212a; --ink:#e6ebf1; --soft:#93a0af; --line:#2a333e; --blue:#6ba5f5; --teal:#4cc9b8; --amber:#e5b04c; --red:#f0776d; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:15px/1.45 system-ui, sans-serif; }
main { max-width:1180px; margin:0 auto; padding:20px 16px 40px; }
header { display:flex; flex-wrap:wrap; gap:6px 14px; align-items:baseline; margin-bottom:16px; }
h1 { font-size:20px; margin:0; font-weight:650; overflow-wrap:anywhere; }
header span, dt { color:var(--soft); }
.grid { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap:12px; }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 14px; min-width:0; }
.card h2 { font-size:13px; font-weight:550; color:var(--soft); margin:0 0 6px; }
.facts { margin-bottom:12px; } dl { display:flex; flex-wrap:wrap; gap:6px 24px; margin:0; }
dt { font-size:13px; } dd { margin:0; font-variant-numeric:tabular-nums; overflow-wrap:anywhere; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--soft); font:11px system-ui, sans-serif; font-variant-numeric:tabular-nums; }
.legend { display:flex; gap:14px; color:var(--soft); font-size:13px; margin-top:6px; flex-wrap:wrap; font-variant-numeric:tabular-nums; }
.legend b { display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:5px; }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_keep_their_shape_and_their_size() {
        let mut report = Report::new("<b>");
        for step in 0..100_000u64 {
            report.add("Loss", "nats", "training", step, step as f64);
        }
        let curve = &report.panels[0].curves[0];
        assert!(curve.points.len() < POINTS_MAX && curve.points.len() >= POINTS_MAX / 2);
        assert!(curve.points.iter().all(|(x, y)| (x - y).abs() < 1e-6), "averages stay on the line");
        report.add("Loss", "nats", "training", 100_000, f64::NAN);
        report.add("Loss", "nats", "validation", 5, 3.0);
        report.limit("Memory", "MiB", "budget", 64.0);
        report.fact("Seed", "1");
        report.fact("Seed", "2 & 3");
        let page = report.to_html(true);
        assert!(page.contains("&lt;b&gt;") && page.contains("2 &amp; 3") && !page.contains("<dd>1<"));
        assert!(page.contains("not a finite number") && page.contains("http-equiv=\"refresh\""));
        assert!(page.contains("polyline") && page.contains("<circle"));
        assert!(!page.contains("NaN") && !page.contains("inf") && !page.contains("://"), "{page}");
        assert!(!report.to_html(false).contains("refresh"));
    }

    #[test]
    fn pages_are_written_now_and_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        let mut file = ReportFile::new(&path, 2.0);
        let mut report = Report::new("t");
        assert!(file.update(&report, 10.0).unwrap());
        report.fact("Loss", "0.5");
        assert!(!file.update(&report, 11.0).unwrap());
        assert!(!std::fs::read_to_string(&path).unwrap().contains("0.5"));
        assert!(file.update(&report, 12.0).unwrap());
        file.finish(&report).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("finished"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn numbers_are_short() {
        let check = |v: f64, expected: &str| assert_eq!(short(v), expected);
        check(0.0, "0");
        check(1234.5678, "1235");
        check(0.1, "0.1");
        check(2.34567, "2.346");
        check(1e-5, "1.00e-5");
        check(-12.0, "-12");
    }
}
