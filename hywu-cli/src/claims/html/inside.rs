//! Sections on what happens inside: gradients, conditions, adapters.

use super::{cell, figure, key, plot, table, words};
use crate::claims::{
    instance::{HiddenAmount, HiddenPoint},
    report::{Condition, Conflict, Interval, Method, Report},
    structure::{Point, Structure},
};
use maud::{Markup, html};

/// Side of a small plot.
const SMALL: [f64; 2] = [340.0, 300.0];
/// Side of a map.
const MAP: [f64; 2] = [520.0, 470.0];
/// Colours for skills in the style sheet.
const HUES: usize = 10;

/// Cosines of gradients.
pub(super) fn conflict(report: &Report) -> Option<Markup> {
    if report.conflict.is_empty() {
        return None;
    }
    let title = |c: &Conflict| {
        let when = if c.trained { "after training" } else { "before training" };
        format!("{}, {when}", words::label(report, c.method))
    };
    Some(html! {
        p { "Each skill alone has a gradient on the shared weights. Where the cosine of two of them is negative, a step for one skill undoes the other. The paper reports about -0.30 on average for conflicting pairs." }
        (table(&["weights of", "conflicting pairs", "all pairs"], report.conflict.iter().map(|c| html! {
            td { (title(c)) } (cell(&c.conflicting, 3, false)) (cell(&c.all, 3, false))
        })))
        @for c in &report.conflict {
            @if c.trained {
                h3 { (title(c)) }
                (figure(plot::heat("cosines of gradients", &c.skills, &c.cosine),
                    "Cosine of the gradients of two skills, in hundredths, mean over seeds. Red: against each other. Skills that contradict each other stand side by side."))
            } @else {
                details { summary { (title(c)) }
                    (figure(plot::heat("cosines of gradients", &c.skills, &c.cosine), "As above."))
                }
            }
        }
    })
}

fn told(condition: Condition) -> &'static str {
    match condition {
        Condition::Own => "its own adapter",
        Condition::OtherSkill => "adapter of another skill",
        Condition::OtherPhoto => "same skill, adapter of another photo",
        Condition::Mean => "mean adapter of all instances",
        Condition::TextOnly => "adapter from the text alone",
        Condition::ImageOnly => "adapter from the picture alone",
    }
}

/// Other adapters, other strengths.
pub(super) fn condition(report: &Report) -> Option<Markup> {
    if report.condition.is_empty() && report.strength.is_empty() {
        return None;
    }
    let others = report.condition.iter().filter(|v| v.condition != Condition::Own);
    let bars: Vec<plot::Row> = others
        .map(|v| {
            let title = format!("{}: {} dB lost", told(v.condition), words::with_range(&v.loss, 2));
            let mark = plot::Mark { class: "hywu".into(), value: v.loss, title };
            plot::Row { label: told(v.condition).into(), marks: vec![mark] }
        })
        .collect();
    let strength = plot::Series {
        label: "HY-WU".into(),
        class: "hywu".into(),
        points: report.strength.iter().map(|s| (f64::from(s.strength), s.psnr)).collect(),
        marked: None,
    };
    let axes = plot::Axes { x: "factor on the adapter", y: "PSNR in dB", log_x: false, log_y: false };
    Some(html! {
        p { "The same trained generator, but with an adapter that is not this instance's. The backbone always sees the true picture and instruction." }
        @if !report.condition.is_empty() {
            (table(&["adapter", "PSNR in dB", "lost in dB"], report.condition.iter().map(|v| html! {
                td { (told(v.condition)) } (cell(&v.psnr, 2, false)) (cell(&v.loss, 2, false))
            })))
            (figure(plot::bars("PSNR lost with other adapters", "PSNR lost, dB", plot::WIDTH, &bars), "What it costs not to have the instance's own adapter."))
        }
        @if !report.strength.is_empty() {
            (figure(plot::lines("PSNR by strength", &axes, [540.0, 280.0], &[strength]), "The adapter scaled: 0 is the backbone alone, 1 what was trained."))
        }
    })
}

/// The colour of a skill, and whether it is hollow: contradicting skills share a colour, the second of them is a ring. Skills in no pair
/// take what colours there are.
fn look(report: &Report, skill: &str) -> (String, bool) {
    let pairs = &report.setup.pairs;
    let place =
        pairs.iter().enumerate().find_map(|(k, pair)| Some((k, pair.iter().position(|s| s == skill)?)));
    let (hue, second) = place.unwrap_or((pairs.len() + skill.len(), 0));
    (format!("s{}", hue % HUES), second == 1)
}

/// Maps, purity and cosines of adapters.
pub(super) fn structure(report: &Report) -> Option<Markup> {
    let s = report.structure.as_ref()?;
    let map = |what: &str, names: [&str; 2], at: fn(&Point) -> [f64; 2]| {
        let spots: Vec<plot::Spot> = s
            .points
            .iter()
            .zip(&report.adapters)
            .map(|(p, label)| {
                let (class, hollow) = look(report, &s.skills[p.skill]);
                let photo = report.setup.tested_on.get(label.photo).map_or("", String::as_str);
                plot::Spot { at: at(p), class, hollow, title: format!("{}: {photo}", label.skill) }
            })
            .collect();
        plot::scatter(what, names, MAP, &spots, &middles(s, at), false)
    };
    let percent = |v: f64| format!("{:.0} %", v * 100.0);
    let rows = [
        ("nearest other adapter is of the same skill", percent(s.nearest)),
        ("share of the same skill among the five nearest", percent(s.five_nearest)),
        ("both by chance", percent(s.chance)),
        ("cosine of two adapters of one skill", format!("{:.3}", s.within)),
        ("cosine of two adapters of different skills", format!("{:.3}", s.across)),
        ("the same without what all have in common, one skill", format!("{:.3}", s.centred_within)),
        ("the same without what all have in common, different skills", format!("{:.3}", s.centred_across)),
        ("share of the squared norm that all have in common", percent(s.common)),
        ("share of the variance between skills", percent(s.between_skills)),
        ("share of the variance within skills: between instances", percent(1.0 - s.between_skills)),
    ];
    let shares = s.shares.iter().take(2).map(|v| percent(*v)).collect::<Vec<_>>();
    Some(html! {
        p { "Each point is the update B A that the generator wrote for one instance (compared as a whole, not by its factors). Skills that contradict each other have one colour; the second of them is a ring." }
        div.beside {
            (figure(map("principal components of adapters", ["first component", "second component"], |p| p.pca),
                &format!("Principal components; the first two hold {} of the variance.", words::list(&shares))))
            (figure(map("neighbour embedding of adapters", ["", ""], |p| p.neighbours),
                "t-SNE of the first 50 components: near means similar, distances between groups mean little."))
        }
        (key_of_skills(report, s))
        (table(&["", ""], rows.into_iter().map(|(what, v)| html! { td { (what) } td { (v) } })))
        (figure(plot::heat("cosines of adapters", &s.skills, &s.cosine), "Mean cosine of the adapters of two skills, in hundredths."))
    })
}

/// The name of each skill at the median of its points.
fn middles(s: &Structure, at: fn(&Point) -> [f64; 2]) -> Vec<(String, [f64; 2])> {
    let of = |skill: usize, axis: usize| {
        let mut own: Vec<f64> = s.points.iter().filter(|p| p.skill == skill).map(|p| at(p)[axis]).collect();
        own.sort_by(f64::total_cmp);
        own.get(own.len() / 2).copied().unwrap_or(0.0)
    };
    s.skills.iter().enumerate().map(|(k, name)| (name.clone(), [of(k, 0), of(k, 1)])).collect()
}

fn key_of_skills(report: &Report, s: &Structure) -> Markup {
    let looks: Vec<(String, &str)> = s
        .skills
        .iter()
        .map(|name| {
            let (class, hollow) = look(report, name);
            (if hollow { format!("{class} hollow") } else { class }, name.as_str())
        })
        .collect();
    key(looks.iter().map(|(class, name)| (class.as_str(), *name)))
}

/// Hidden amounts.
pub(super) fn instance(report: &Report) -> Option<Markup> {
    if report.hidden.is_empty() {
        return None;
    }
    let gain =
        |skill: &str| -> Option<Interval> { Some(words::gain(report, Method::Oracle, Some(skill))?.gain) };
    let plot_of = |h: &HiddenAmount| {
        let spot = |p: &HiddenPoint| plot::Spot {
            at: [p.truth, p.told],
            class: format!("s{}", p.photo % HUES),
            hollow: false,
            title: format!(
                "{}: {:.3}, told {:.3}",
                report.setup.tested_on.get(p.photo).map_or("", String::as_str),
                p.truth,
                p.told
            ),
        };
        let spots: Vec<plot::Spot> = h.points.iter().map(spot).collect();
        let names = [h.amount.as_str(), "told by the adapter"];
        let caption = format!("{}: R² {}", h.skill, words::with_range(&h.r2, 2));
        figure(plot::scatter(&caption, names, SMALL, &spots, &[], true), &caption)
    };
    Some(html! {
        p { "Within one skill, asked for in the same words, does the adapter know what only this picture shows? An amount that chance drew for the damage is regressed on the adapters (ridge regression on whole updates, each photo told by the others alone). R² is the share of its variance that is told so: 1 is all, 0 is what the mean tells, below zero is worse. The last column is what this is good for: HY-WU against a LoRA of this one skill, which is the same for every picture." }
        (table(&["skill", "hidden amount", "R²", "correlation with the first component", "HY-WU minus the skill's own LoRA, dB"],
            report.hidden.iter().map(|h| html! {
                td { (h.skill) } td.text { (h.amount) } (cell(&h.r2, 2, false)) td { (format!("{:.2}", h.component.abs())) }
                @if let Some(v) = gain(&h.skill) { (cell(&v, 2, false)) } @else { td { "-" } }
            })))
        div.beside { @for h in &report.hidden { (plot_of(h)) } }
        p.soft { "Each photo has a colour of its own; the dashed line is a perfect guess." }
    })
}
