//! The loss curve as an SVG: loss on a logarithmic axis (left), right answers in percent (right).

use std::fmt::Write;

use crate::train::Point;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 56.0;
/// The loss axis runs from 10^LOSS_LOW to 10^LOSS_HIGH nats.
const LOSS_LOW: f64 = -3.0;
const LOSS_HIGH: f64 = 1.0;

/// The whole SVG document.
pub fn svg(curve: &[Point]) -> String {
    let steps = curve.last().map_or(1, |p| p.step) as f64;
    let x = |step: usize| MARGIN + (WIDTH - 2.0 * MARGIN) * step as f64 / steps;
    let y = |share: f64| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * share.clamp(0.0, 1.0);
    let loss = |loss: f64| y((loss.max(1e-9).log10() - LOSS_LOW) / (LOSS_HIGH - LOSS_LOW));
    let line = |points: Vec<(f64, f64)>, colour: &str| {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        format!("<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/>\n", points.join(" "))
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let mut label = |x: f64, y: f64, anchor: &str, colour: &str, text: String| {
        let _ =
            writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>");
    };
    for power in LOSS_LOW as i32..=LOSS_HIGH as i32 {
        let value = 10f64.powi(power);
        label(MARGIN - 6.0, loss(value) + 4.0, "end", "#a33", format!("{value}"));
    }
    for percent in [0, 25, 50, 75, 100] {
        label(WIDTH - MARGIN + 6.0, y(f64::from(percent) / 100.0) + 4.0, "start", "#36a", format!("{percent}%"));
    }
    for quarter in 0..=4 {
        let step = (steps * f64::from(quarter) / 4.0) as usize;
        label(x(step), HEIGHT - MARGIN + 18.0, "middle", "#333", format!("{step}"));
    }
    label(MARGIN, 30.0, "start", "#a33", "training loss, nats a token".into());
    label(WIDTH - MARGIN, 30.0, "end", "#36a", "greedy answers right, phrasings never trained".into());
    label(WIDTH / 2.0, HEIGHT - 10.0, "middle", "#333", "step".into());
    let (right, bottom) = (WIDTH - 2.0 * MARGIN, HEIGHT - 2.0 * MARGIN);
    let _ = writeln!(
        out,
        "<rect x=\"{MARGIN}\" y=\"{MARGIN}\" width=\"{right}\" height=\"{bottom}\" fill=\"none\" stroke=\"#999\"/>"
    );
    out += &line(curve.iter().map(|p| (x(p.step), loss(p.loss))).collect(), "#a33");
    out += &line(curve.iter().filter_map(|p| p.exact.map(|e| (x(p.step), y(e)))).collect(), "#36a");
    out + "</svg>\n"
}
