//! Sections on what edits look like: quality, pairs, words.

use super::{cell, count, figure, methods, plot, table, words};
use crate::claims::report::{Interval, Method, Metric, Report, ScoreRow};
use maud::{Markup, html};

/// Width of one of two plots side by side.
const HALF: f64 = 520.0;

fn scores<'a>(report: &'a Report, skill: Option<&'a str>) -> impl Iterator<Item = &'a ScoreRow> {
    report.quality.scores.iter().filter(move |s| s.skill.as_deref() == skill)
}

/// The skills that were measured, in order.
fn names(report: &Report) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in report.quality.scores.iter().filter_map(|s| s.skill.as_deref()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn best(values: impl Iterator<Item = f64>, highest: bool) -> f64 {
    if highest { values.fold(f64::MIN, f64::max) } else { values.fold(f64::MAX, f64::min) }
}

/// All skills together.
pub(super) fn quality(report: &Report) -> Option<Markup> {
    let all: Vec<&ScoreRow> = scores(report, None).collect();
    if all.is_empty() {
        return None;
    }
    let top = [
        best(all.iter().map(|s| s.psnr.mean), true),
        best(all.iter().map(|s| s.ssim.mean), true),
        best(all.iter().map(|s| s.distance.mean), false),
    ];
    let mark = |method: Method, value: Interval, what: &str| plot::Mark {
        class: method.name().into(),
        value,
        title: format!("{}: {} {what}", words::label(report, method), words::with_range(&value, 2)),
    };
    let row = |method: Method, value: Interval| plot::Row {
        label: words::label(report, method).into(),
        marks: vec![mark(method, value, "dB")],
    };
    let dots: Vec<plot::Row> = all.iter().map(|s| row(s.method, s.psnr)).collect();
    let gains: Vec<plot::Row> =
        report.quality.gains.iter().filter(|g| g.skill.is_none()).map(|g| row(g.against, g.gain)).collect();
    Some(html! {
        p { "PSNR, SSIM and a perceptual distance (differences of gradients at several scales; lower is better) against the true edit, mean over all skills. The best of each column is bold." }
        (table(&["method", "PSNR in dB", "SSIM", "perceptual distance"], all.iter().map(|s| html! {
            td { (words::label(report, s.method)) }
            (cell(&s.psnr, 2, s.psnr.mean == top[0]))
            (cell(&s.ssim, 3, s.ssim.mean == top[1]))
            (cell(&s.distance, 4, s.distance.mean == top[2]))
        })))
        (figure(plot::dots("PSNR of each method", "PSNR in dB, all skills", &dots), "PSNR against the true edit: mean and 95 % interval."))
        (figure(plot::bars("gain of HY-WU over each method", "PSNR of HY-WU minus that of the other method, dB", plot::WIDTH, &gains),
            "The same edits compared one by one: right of zero HY-WU is better. Such differences are surer than the means above, since photos and seeds are the same on both sides."))
    })
}

/// Every skill.
pub(super) fn skills(report: &Report) -> Option<Markup> {
    let names = names(report);
    if names.is_empty() {
        return None;
    }
    let dots: Vec<plot::Row> = names
        .iter()
        .map(|skill| {
            let mark = |s: &ScoreRow| plot::Mark {
                class: s.method.name().into(),
                value: s.psnr,
                title: format!(
                    "{skill}, {}: {} dB",
                    words::label(report, s.method),
                    words::with_range(&s.psnr, 2)
                ),
            };
            plot::Row { label: (*skill).into(), marks: scores(report, Some(skill)).map(mark).collect() }
        })
        .collect();
    let against = |method: Method| -> Vec<plot::Row> {
        let row = |skill: &&str| {
            let gain = words::gain(report, method, Some(skill))?.gain;
            let class = match words::verdict(&gain) {
                words::Verdict::Better => "good",
                words::Verdict::Open => "same",
                words::Verdict::Worse => "bad",
            };
            let title = format!("{skill}: {} dB", words::with_range(&gain, 2));
            let mark = plot::Mark { class: class.into(), value: gain, title };
            Some(plot::Row { label: (*skill).into(), marks: vec![mark] })
        };
        names.iter().filter_map(row).collect()
    };
    let mut head = vec!["skill"];
    head.extend(report.methods.iter().map(|m| m.label.as_str()));
    Some(html! {
        (methods(report))
        (figure(plot::dots("PSNR by skill and method", "PSNR in dB", &dots), "PSNR against the true edit, by skill."))
        h3 { "HY-WU against other methods" }
        p.soft { "Green: the interval is above zero. Red: below. Gray: no difference can be told." }
        div.beside {
            @for (method, rows) in words::SHARED.iter().chain(&[Method::Oracle]).map(|m| (*m, against(*m))) {
                @if !rows.is_empty() {
                    (figure(plot::bars("gain of HY-WU by skill", "gain of HY-WU in dB", HALF, &rows),
                        &format!("HY-WU against {}.", words::label(report, method))))
                }
            }
        }
        details { summary { "PSNR in numbers, dB" }
            (table(&head, names.iter().map(|skill| {
                let of = |method: Method| scores(report, Some(skill)).find(|s| s.method == method);
                let top = best(scores(report, Some(skill)).map(|s| s.psnr.mean), true);
                html! {
                    td { (skill) }
                    @for m in &report.methods {
                        @if let Some(s) = of(m.method) { (cell(&s.psnr, 1, s.psnr.mean == top)) } @else { td { "-" } }
                    }
                }
            })))
        }
    })
}

/// Good, same and bad.
pub(super) fn wins(report: &Report) -> Option<Markup> {
    let wins = &report.quality.wins;
    if wins.is_empty() {
        return None;
    }
    let metrics = [
        (Metric::Psnr, "By PSNR (within 0.1 dB is the same)"),
        (Metric::Ssim, "By SSIM (within 0.002 is the same)"),
        (Metric::Distance, "By perceptual distance (within 0.002 is the same)"),
    ];
    let rows = |metric: Metric| -> Vec<(String, Vec<f64>)> {
        let own = wins.iter().filter(|w| w.metric == metric);
        own.map(|w| (words::label(report, w.against).to_owned(), vec![w.good.mean, w.same.mean, w.bad.mean]))
            .collect()
    };
    Some(html! {
        p { "The same example edited by HY-WU and by another method: how often is HY-WU's edit better, the same or worse?" }
        (super::key([("good", "better"), ("same", "the same"), ("bad", "worse")].into_iter()))
        @for (metric, title) in metrics {
            @let rows = rows(metric);
            @if !rows.is_empty() {
                h3 { (title) }
                (figure(plot::stacks(title, &["good", "same", "bad"], &rows), ""))
            }
        }
        details { summary { "In numbers, %" }
            (table(&["against", "by", "better", "the same", "worse"], wins.iter().map(|w| {
                let hundred = |v: &Interval| Interval { mean: v.mean * 100.0, lo: v.lo * 100.0, hi: v.hi * 100.0 };
                let by = match w.metric { Metric::Psnr => "PSNR", Metric::Ssim => "SSIM", Metric::Distance => "distance" };
                html! {
                    td { (words::label(report, w.against)) } td { (by) }
                    (cell(&hundred(&w.good), 0, false)) (cell(&hundred(&w.same), 0, false)) (cell(&hundred(&w.bad), 0, false))
                }
            })))
        }
    })
}

/// Which skill new phrasings are taken for.
pub(super) fn phrasing(report: &Report) -> Option<Markup> {
    if report.phrasing.is_empty() {
        return None;
    }
    let (right, asked) = report.phrasing.iter().fold((0, 0), |(r, a), p| (r + p.right, a + p.asked));
    Some(html! {
        p { (right) " of " (count(asked as u64, "phrasing")) " that were never trained on were taken for the right skill: the result is nearest to what that skill's first training phrasing gives for the same picture." }
        (table(&["skill", "right", "asked", "others taken for"], report.phrasing.iter().map(|p| html! {
            td { (p.skill) } td { (p.right) } td { (p.asked) }
            td.text { (p.taken_for.iter().map(|(s, n)| format!("{s} ({n})")).collect::<Vec<_>>().join(", ")) }
        })))
    })
}
