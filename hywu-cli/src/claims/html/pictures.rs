//! Pictures inside of the page.

use crate::claims::report::Report;
use anyhow::{Context, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use hywu_diffusion::load_picture;
use image::{ExtendedColorType, codecs::jpeg::JpegEncoder};
use maud::{Markup, html};
use std::path::Path;

/// Longest side of a picture in the page.
const SIDE: usize = 160;
/// JPEG quality of it.
const QUALITY: u8 = 88;
/// Most characters of all pictures together.
const BUDGET: usize = 3_500_000;

/// A row for each example: source, truth and every method's edit, with its PSNR. Rows that the page has no room for are left out, and
/// that is said.
///
/// # Errors
/// Pictures that can't be read.
pub(super) fn grid(report: &Report, folder: &Path) -> Result<Markup> {
    let mut rows = Vec::new();
    let mut used = 0;
    for row in &report.pictures {
        let mut cells = vec![
            (uri(folder, &row.source)?, "source".to_owned(), None),
            (uri(folder, &row.target)?, "true edit".to_owned(), None),
        ];
        let best = row.psnr.values().copied().fold(f64::MIN, f64::max);
        for method in &report.methods {
            if let Some(file) = row.edits.get(&method.method) {
                cells.push((uri(folder, file)?, method.label.clone(), row.psnr.get(&method.method).copied()));
            }
        }
        used += cells.iter().map(|c| c.0.len()).sum::<usize>();
        if used > BUDGET {
            break;
        }
        rows.push((row, cells, best));
    }
    let left_out = report.pictures.len() - rows.len();
    Ok(html! {
        @for (row, cells, best) in &rows {
            h3 { (row.skill) span.soft { ": “" (row.instruction) "”" } }
            div.pictures style={ "grid-template-columns:repeat(" (cells.len()) ",minmax(88px,1fr))" } {
                @for (uri, label, psnr) in cells {
                    figure {
                        img src=(uri) alt={ (row.skill) ": " (label) };
                        figcaption {
                            (label)
                            @if let Some(v) = psnr { br; span.yes[v == best] { (format!("{v:.1} dB")) } }
                        }
                    }
                }
            }
        }
        @if left_out > 0 {
            p.soft { (left_out) " more rows are in the folder of the report." }
        }
    })
}

/// A picture of the folder, made small, as a `data:` address.
fn uri(folder: &Path, file: &str) -> Result<String> {
    let picture = load_picture(folder.join(file))?;
    let longest = picture.height.max(picture.width);
    let small = match longest > SIDE {
        true => {
            picture.resize((picture.height * SIDE / longest).max(1), (picture.width * SIDE / longest).max(1))
        }
        false => picture,
    };
    let bytes: Vec<u8> =
        small.rgb.iter().map(|v| ((v.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8).collect();
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .encode(&bytes, small.width as u32, small.height as u32, ExtendedColorType::Rgb8)
        .with_context(|| format!("{file} for the page"))?;
    Ok(format!("data:image/jpeg;base64,{}", BASE64_STANDARD.encode(jpeg)))
}
