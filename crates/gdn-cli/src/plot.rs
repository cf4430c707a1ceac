//! The picture of a benchmark.

use std::path::Path;

use anyhow::{Context, anyhow};
use plotters::prelude::*;

/// A line, and what it is called.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Draws lines as SVG, the first axis logarithmic. `axes` are what is on them.
pub(crate) fn lines(path: &Path, title: &str, axes: [&str; 2], series: &[Series]) -> anyhow::Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, axes, series).map_err(|e| anyhow!("cannot draw: {e}"))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

const COLORS: [RGBColor; 6] =
    [RED, BLUE, RGBColor(0, 150, 80), RGBColor(230, 140, 0), RGBColor(130, 60, 180), BLACK];

fn draw(
    svg: &mut String,
    title: &str,
    [x_name, y_name]: [&str; 2],
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (800, 450)).into_drawing_area();
    root.fill(&WHITE)?;
    let points = || series.iter().flat_map(|series| &series.points);
    let most = points().map(|(_, y)| *y).fold(1.0, f64::max);
    let (first, last) =
        points().fold((f64::MAX, 1.0f64), |(first, last), (x, _)| (first.min(*x), last.max(*x)));
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((first..last.max(first * 1.01)).log_scale(), 0.0..most * 1.08)?;
    chart.configure_mesh().x_desc(x_name).y_desc(y_name).draw()?;
    for (Series { name, points }, color) in series.iter().zip(COLORS.into_iter().cycle()) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, color.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}
