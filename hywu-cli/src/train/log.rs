//! The log of a run: a CSV file, and the loss as a picture.

use anyhow::{Context, Result, anyhow};
use hywu_generator::TrainStats;
use hywu_kernels::optim::StepStats;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

const HEADER: &str = "step,loss,lr,grad_norm,samples_per_second";
/// Longest log, in bytes: some ten million rows.
const MAX_BYTES: u64 = 1 << 30;
/// Smoothing of the plotted curve: weight of the past.
const SMOOTH: f64 = 0.95;

/// What came since the last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    sum: f64,
    count: u64,
}

impl Window {
    /// Takes a step in.
    pub fn add(&mut self, stats: &TrainStats) {
        self.sum += f64::from(stats.loss);
        self.count += 1;
    }
    /// Mean loss.
    pub fn loss(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

/// Writes `log.csv` and `loss.svg`.
pub struct Log {
    csv: PathBuf,
    svg: PathBuf,
    /// What came since the last row.
    pub window: Window,
}

impl Log {
    /// The log of the run in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self { csv: folder.join("log.csv"), svg: folder.join("loss.svg"), window: Window::default() }
    }

    /// Adds a row with the mean loss since the last one.
    pub fn row(&mut self, step: u64, stats: &StepStats, rate: f64) -> Result<()> {
        let fail = |e| hywu_core::Error::io(&self.csv, e);
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&self.csv).map_err(fail)?;
        let header =
            if file.metadata().map_err(fail)?.len() == 0 { format!("{HEADER}\n") } else { String::new() };
        let (loss, lr, norm) = (self.window.loss(), stats.lr, stats.grad_norm);
        file.write_all(format!("{header}{step},{loss:.6},{lr:.6e},{norm:.4},{rate:.2}\n").as_bytes())
            .map_err(fail)?;
        self.window = Window::default();
        Ok(())
    }

    /// Drops rows after `step`: a run that was killed may have logged more than its checkpoint knows.
    pub fn truncate(&self, step: u64) -> Result<()> {
        let rows = self.rows()?;
        let kept: String =
            rows.into_iter().filter(|(at, ..)| *at <= step).map(|(.., line)| line + "\n").collect();
        hywu_core::write_atomic(&self.csv, |w| write!(w, "{HEADER}\n{kept}"))?;
        Ok(())
    }

    /// (step, loss, line) of every row.
    fn rows(&self) -> Result<Vec<(u64, f64, String)>> {
        if !self.csv.exists() {
            return Ok(Vec::new());
        }
        let text = hywu_core::read_text(&self.csv, MAX_BYTES)?;
        let parse = |line: &str| {
            let mut cells = line.split(',');
            let step = cells.next()?.parse().ok()?;
            Some((step, cells.next()?.parse().ok()?, line.to_owned()))
        };
        // A row that was cut by a kill is not a row.
        Ok(text.lines().skip(1).filter_map(parse).collect())
    }

    /// Draws the loss over the steps, raw and smoothed, on a logarithmic axis.
    pub fn plot(&self, title: &str) -> Result<()> {
        let rows: Vec<(f64, f64)> =
            self.rows()?.iter().filter(|r| r.1.is_finite() && r.1 > 0.0).map(|r| (r.0 as f64, r.1)).collect();
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(()) };
        let (low, high) = rows.iter().fold((f64::MAX, f64::MIN), |(l, h), r| (l.min(r.1), h.max(r.1)));
        let mut smooth = first.1;
        let curve: Vec<(f64, f64)> = rows
            .iter()
            .map(|&(x, y)| {
                smooth = SMOOTH * smooth + (1.0 - SMOOTH) * y;
                (x, smooth)
            })
            .collect();
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (900, 480)).into_drawing_area();
            let draw = || -> Result<(), DrawingAreaErrorKind<_>> {
                root.fill(&WHITE)?;
                let mut chart = ChartBuilder::on(&root)
                    .caption(format!("training loss: {title}"), ("sans-serif", 20))
                    .margin(12)
                    .x_label_area_size(36)
                    .y_label_area_size(64)
                    .build_cartesian_2d(0.0..last.0.max(1.0), (low * 0.95..high * 1.05).log_scale())?;
                chart.configure_mesh().x_desc("step").y_desc("loss").draw()?;
                chart.draw_series(LineSeries::new(rows.iter().copied(), RGBColor(190, 205, 225)))?;
                chart.draw_series(LineSeries::new(
                    curve.iter().copied(),
                    RGBColor(20, 70, 150).stroke_width(2),
                ))?;
                root.present()
            };
            draw().map_err(|e| anyhow!("{e}")).context("the plot of the loss")?;
        }
        hywu_core::write_atomic(&self.svg, |w| w.write_all(svg.as_bytes()))?;
        Ok(())
    }
}
