//! `report.html`: the report for people, one file that needs no network and no scripts.

mod inside;
mod outcome;
mod pictures;
mod plot;
mod training;
mod words;

use super::report::{Interval, Report};
use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::path::Path;

const STYLE: &str = include_str!("style.css");
/// Its name in the folder of the report.
pub const FILE: &str = "report.html";

/// Sections: address, title and content; none where nothing was measured.
type Section = (&'static str, &'static str, Option<Markup>);

/// Writes the page into the folder of the report, whose pictures are taken into it.
///
/// # Errors
/// Pictures that can't be read, or a file that can't be written.
pub fn write(report: &Report, folder: &Path) -> Result<()> {
    let page = page(report, folder)?;
    hywu_core::write_atomic(folder.join(FILE), |w| w.write_all(page.as_bytes()))?;
    Ok(())
}

/// The page itself; the files that the report names are in `folder`.
///
/// # Errors
/// Pictures that can't be read.
pub fn page(report: &Report, folder: &Path) -> Result<String> {
    let pictures = (!report.pictures.is_empty()).then(|| pictures::grid(report, folder)).transpose()?;
    let sections: Vec<Section> = vec![
        ("quality", "How close edits come", outcome::quality(report)),
        ("skills", "Skill by skill", outcome::skills(report)),
        ("wins", "Pairs of edits", outcome::wins(report)),
        ("pictures", "Edits to look at", pictures),
        ("conflict", "Do skills contradict each other?", inside::conflict(report)),
        ("condition", "Is it the condition?", inside::condition(report)),
        ("structure", "How generated adapters lie", inside::structure(report)),
        ("instance", "Instance, not task", inside::instance(report)),
        ("forgetting", "Skills that arrive one after the other", training::forgetting(report)),
        ("phrasing", "New words for the skills", outcome::phrasing(report)),
        ("cost", "What it costs", training::cost(report)),
        ("training", "How it was trained", training::training(report)),
    ];
    let there: Vec<(&str, &str, Markup)> =
        sections.into_iter().filter_map(|(id, title, content)| Some((id, title, content?))).collect();
    let setup = &report.setup;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "HY-WU's claims, measured on " (setup.model) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Generated weights or shared weights?" }
                p.soft {
                    "One frozen backbone (" (setup.model) "), the same batches for every method, "
                    (count(setup.settings.steps, "step")) ", " (count(setup.settings.seeds.len() as u64, "seed")) ", "
                    (count(setup.tested_on.len() as u64, "photo")) " that nothing was trained on. In brackets: 95 % intervals."
                }
                nav { @for (id, title, _) in &there { a href={ "#" (id) } { (title) } } }
                (words::answer(report))
                (aims(report))
                @for (id, title, content) in &there {
                    section id=(id) { h2 { (title) } (content) }
                }
                (footer(report))
            }
        }
    };
    Ok(page.into_string())
}

fn aims(report: &Report) -> Markup {
    let rows = words::aims(report);
    html! {
        @if !rows.is_empty() {
            h3 { "What the project set out to reach" }
            (table(&["aim", "measured", "reached"], rows.iter().map(|(aim, found, met)| html! {
                td.text { (aim) } td { (found) }
                td { @if *met { span.yes { "yes" } } @else { span.no { "no" } } }
            })))
        }
    }
}

fn footer(report: &Report) -> Markup {
    let s = &report.setup;
    let (names, m) = (|names: &[String]| names.join(", "), &s.settings.measure);
    html! {
        footer {
            h2 { "Setup" }
            p { "Backbone " (s.model) " (" (s.hash) "), computed on " (s.device) ". Pictures of " (m.side) " x " (m.side) " pixels, "
                (count(m.steps as u64, "sampling step")) ". All numbers are in report.json." }
            @if let Some(own) = &s.settings.backbone {
                p { "The backbone was trained for it, from nothing, for " (count(own.steps, "step")) " on: " (names(&own.data.skills)) "." }
            }
            p { "Tested on " (names(&s.tested_on)) "." }
            p { "Learning rates chosen on " (names(&s.validated_on)) "." }
            p { "Trained on " (names(&s.trained_on)) "." }
        }
    }
}

/// "1 step", "20 steps".
fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A table with its own scroll bar; `rows` give the cells.
fn table(head: &[&str], rows: impl Iterator<Item = Markup>) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { @for name in head { th { (name) } } } }
                tbody { @for row in rows { tr { (row) } } }
            }
        }
    }
}

/// A cell with a mean and its interval.
fn cell(v: &Interval, digits: usize, best: bool) -> Markup {
    html! {
        td.best[best] {
            (format!("{:.digits$}", v.mean)) " "
            span.range { "(" (format!("{:.digits$}", v.lo)) " to " (format!("{:.digits$}", v.hi)) ")" }
        }
    }
}

/// A figure with the words below it.
fn figure(content: Markup, caption: &str) -> Markup {
    html! { figure { (content) @if !caption.is_empty() { figcaption { (caption) } } } }
}

/// Colours and their names.
fn key<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> Markup {
    html! { ul.key { @for (class, label) in entries { li { i class=(class) {} (label) } } } }
}

/// The key of all methods.
fn methods(report: &Report) -> Markup {
    key(report.methods.iter().map(|m| (m.method.name(), m.label.as_str())))
}

/// A point without an interval.
fn exact(v: f64) -> Interval {
    Interval { mean: v, lo: v, hi: v }
}
