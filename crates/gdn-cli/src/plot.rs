//! The picture of a benchmark.

use std::path::Path;

use anyhow::{Context, anyhow};
use plotters::prelude::*;

/// Bytes read and written in a second, for one number of tokens.
pub(crate) struct Point {
    pub(crate) tokens: usize,
    pub(crate) op: f64,
    pub(crate) copy: f64,
}

/// Draws bytes per second over tokens, of the op and of the copy, as SVG.
pub(crate) fn throughput(path: &Path, title: &str, measured: &[Point]) -> anyhow::Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, measured).map_err(|e| anyhow!("cannot draw: {e}"))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn draw(svg: &mut String, title: &str, measured: &[Point]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (800, 450)).into_drawing_area();
    root.fill(&WHITE)?;
    let points = |bytes_per_second: fn(&Point) -> f64| {
        measured.iter().map(move |p| (p.tokens as f64, bytes_per_second(p) / 1e9)).collect::<Vec<_>>()
    };
    let (split, copy) = (points(|p| p.op), points(|p| p.copy));
    let most = split.iter().chain(&copy).map(|(_, y)| *y).fold(1.0, f64::max);
    let tokens = measured.iter().map(|p| p.tokens as f64);
    let (first, last) = (tokens.clone().fold(f64::MAX, f64::min), tokens.fold(1.0, f64::max));
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((first..last.max(first * 1.01)).log_scale(), 0.0..most * 1.08)?;
    chart.configure_mesh().x_desc("tokens").y_desc("GB/s, read and written").draw()?;
    for (name, points, color) in [("split", split, RED), ("copy of the same bytes", copy, BLUE)] {
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}
