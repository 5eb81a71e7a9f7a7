//! Plots as SVG inside of the page: colours are the style sheet's, so that they follow light and dark. Lengths are in pixels.

use crate::claims::report::Interval;
use maud::{Markup, html};

/// Width of a plot with rows.
pub const WIDTH: f64 = 720.0;
/// Height of a row.
const ROW: f64 = 24.0;
/// Room for ticks and the axis' name.
const FOOT: f64 = 40.0;
/// Width of a letter of the labels, about.
const LETTER: f64 = 7.0;

/// An axis: values to pixels.
struct Axis {
    values: [f64; 2],
    pixels: [f64; 2],
    log: bool,
}

impl Axis {
    /// Holds all finite `values`, with a margin.
    fn over(values: impl Iterator<Item = f64>, pixels: [f64; 2], log: bool) -> Self {
        let usable = values.filter(|v| v.is_finite() && (!log || *v > 0.0));
        let (mut lo, mut hi) = usable.fold((f64::MAX, f64::MIN), |(lo, hi), v| (lo.min(v), hi.max(v)));
        if lo > hi {
            (lo, hi) = (if log { 1.0 } else { 0.0 }, 10.0);
        }
        if log {
            let margin = (hi / lo).powf(0.04).max(1.05);
            return Self { values: [lo / margin, hi * margin], pixels, log };
        }
        let margin = if hi > lo { (hi - lo) * 0.04 } else { hi.abs().max(1.0) * 0.1 };
        Self { values: [lo - margin, hi + margin], pixels, log }
    }

    fn at(&self, v: f64) -> f64 {
        let f = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let [lo, hi] = self.values.map(f);
        let [from, to] = self.pixels;
        from + (f(v).clamp(lo, hi) - lo) / (hi - lo) * (to - from)
    }

    /// Round values about `apart` pixels from each other: multiples of 1, 2 or 5 times a power of ten; on a logarithmic axis these
    /// numbers themselves, where it is long enough to hold two.
    fn ticks(&self, apart: f64) -> Vec<f64> {
        let [lo, hi] = self.values;
        let most = ((self.pixels[1] - self.pixels[0]).abs() / apart).max(2.0);
        if self.log {
            let decades = lo.log10().floor() as i32..=hi.log10().ceil() as i32;
            let steps: &[f64] = if (hi / lo).log10() > most / 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let all = decades.flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)));
            let inside: Vec<f64> = all.filter(|v| (lo..=hi).contains(v)).collect();
            if inside.len() > 1 {
                return inside;
            }
        }
        let rough = (hi - lo) / most;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|k| k * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        ((lo / step).ceil() as i64..=(hi / step).floor() as i64).map(|k| k as f64 * step).collect()
    }
}

/// A coordinate with a tenth of a pixel.
fn px(v: f64) -> String {
    format!("{v:.1}")
}

/// A tick's value, as short as it can be.
fn tick(v: f64) -> String {
    if v != 0.0 && !(1e-3..1e5).contains(&v.abs()) {
        return format!("{v:.0e}");
    }
    let text = format!("{v:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The picture around a plot.
fn svg(width: f64, height: f64, what: &str, inner: Markup) -> Markup {
    html! {
        svg viewBox={ "0 0 " (px(width)) " " (px(height)) } width=(px(width)) height=(px(height)) role="img" aria-label=(what) { (inner) }
    }
}

fn text(x: f64, y: f64, class: &str, what: &str) -> Markup {
    html! { text x=(px(x)) y=(px(y)) class=(class) { (what) } }
}

fn line(class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) -> Markup {
    html! { line class=(class) x1=(px(x1)) y1=(px(y1)) x2=(px(x2)) y2=(px(y2)) {} }
}

/// Grid, ticks and name of a horizontal axis under a plot that reaches from `top` to `bottom`.
fn x_axis(axis: &Axis, top: f64, bottom: f64, name: &str) -> Markup {
    let middle = (axis.pixels[0] + axis.pixels[1]) / 2.0;
    html! {
        @for v in axis.ticks(70.0) {
            (line("grid", [axis.at(v), top], [axis.at(v), bottom]))
            (text(axis.at(v), bottom + 15.0, "tick mid", &tick(v)))
        }
        (text(middle, bottom + 33.0, "name mid", name))
    }
}

/// The same at the left side of a plot that reaches from `left` to `right`.
fn y_axis(axis: &Axis, left: f64, right: f64, name: &str) -> Markup {
    let middle = (axis.pixels[0] + axis.pixels[1]) / 2.0;
    html! {
        @for v in axis.ticks(36.0) {
            (line("grid", [left, axis.at(v)], [right, axis.at(v)]))
            (text(left - 6.0, axis.at(v) + 4.0, "tick end", &tick(v)))
        }
        text class="name mid" transform={ "translate(13 " (px(middle)) ") rotate(-90)" } { (name) }
    }
}

/// Room for labels at the left.
fn label_width<'a>(labels: impl Iterator<Item = &'a str>) -> f64 {
    12.0 + LETTER * labels.map(|l| l.chars().count()).max().unwrap_or(0) as f64
}

/// A value with its interval.
pub struct Mark {
    /// Class of the style sheet that gives its colour.
    pub class: String,
    /// Value.
    pub value: Interval,
    /// What the pointer shows.
    pub title: String,
}

/// A row of a plot.
pub struct Row {
    /// At its left.
    pub label: String,
    /// In it, drawn in this order.
    pub marks: Vec<Mark>,
}

/// Rows of dots with their intervals as whiskers. Several marks of a row stand below each other.
pub fn dots(what: &str, axis_name: &str, rows: &[Row]) -> Markup {
    let left = label_width(rows.iter().map(|r| r.label.as_str()));
    let ends = rows.iter().flat_map(|r| &r.marks).flat_map(|m| [m.value.lo, m.value.mean, m.value.hi]);
    let axis = Axis::over(ends, [left, WIDTH - 12.0], false);
    let most = rows.iter().map(|r| r.marks.len()).max().unwrap_or(1);
    let height = ROW.max(most as f64 * 6.0 + 6.0);
    let bottom = rows.len() as f64 * height;
    svg(
        WIDTH,
        bottom + FOOT,
        what,
        html! {
            (x_axis(&axis, 0.0, bottom, axis_name))
            @for (i, row) in rows.iter().enumerate() {
                @let top = i as f64 * height;
                (line("grid", [0.0, top], [WIDTH - 12.0, top]))
                (text(left - 8.0, top + height / 2.0 + 4.0, "label end", &row.label))
                @for (k, mark) in row.marks.iter().enumerate() {
                    @let y = top + height * (k as f64 + 1.0) / (row.marks.len() as f64 + 1.0);
                    g class=(mark.class) {
                        title { (mark.title) }
                        (line("whisker", [axis.at(mark.value.lo), y], [axis.at(mark.value.hi), y]))
                        circle class="dot" cx=(px(axis.at(mark.value.mean))) cy=(px(y)) r=(if most > 1 { "3.2" } else { "5" }) {}
                    }
                }
            }
        },
    )
}

/// Bars from zero, each with its interval and its number.
pub fn bars(what: &str, axis_name: &str, width: f64, rows: &[Row]) -> Markup {
    let left = label_width(rows.iter().map(|r| r.label.as_str()));
    let ends = rows.iter().flat_map(|r| &r.marks).flat_map(|m| [m.value.lo, m.value.mean, m.value.hi]);
    let right = width - 60.0;
    let axis = Axis::over(ends.chain([0.0]), [left, right], false);
    let bottom = rows.len() as f64 * ROW;
    svg(
        width,
        bottom + FOOT,
        what,
        html! {
            (x_axis(&axis, 0.0, bottom, axis_name))
            @for (i, row) in rows.iter().enumerate() {
                @let middle = (i as f64 + 0.5) * ROW;
                (text(left - 8.0, middle + 4.0, "label end", &row.label))
                @for mark in &row.marks {
                    @let (zero, end) = (axis.at(0.0), axis.at(mark.value.mean));
                    g class=(mark.class) {
                        title { (mark.title) }
                        rect class="bar" x=(px(zero.min(end))) y=(px(middle - 7.0)) width=(px((end - zero).abs())) height="14" {}
                        (line("whisker ink", [axis.at(mark.value.lo), middle], [axis.at(mark.value.hi), middle]))
                    }
                    (text(right + 8.0, middle + 4.0, "tick", &format!("{:+.2}", mark.value.mean)))
                }
            }
            (line("zero", [axis.at(0.0), 0.0], [axis.at(0.0), bottom]))
        },
    )
}

/// Rows of shares that add up to one, side by side, with the percentage in those that have room for it.
pub fn stacks(what: &str, classes: &[&str], rows: &[(String, Vec<f64>)]) -> Markup {
    let left = label_width(rows.iter().map(|r| r.0.as_str()));
    let axis = Axis { values: [0.0, 1.0], pixels: [left, WIDTH - 12.0], log: false };
    svg(
        WIDTH,
        rows.len() as f64 * ROW + 4.0,
        what,
        html! {
            @for (i, (label, shares)) in rows.iter().enumerate() {
                @let middle = (i as f64 + 0.5) * ROW;
                (text(left - 8.0, middle + 4.0, "label end", label))
                @for (k, (share, class)) in shares.iter().zip(classes).enumerate() {
                    @let before: f64 = shares[..k].iter().sum();
                    @let (from, to) = (axis.at(before), axis.at(before + share));
                    g class=(class) {
                        rect class="bar" x=(px(from)) y=(px(middle - 9.0)) width=(px(to - from)) height="18" {}
                    }
                    @if to - from > 34.0 {
                        (text((from + to) / 2.0, middle + 4.0, "cell mid", &format!("{:.0} %", share * 100.0)))
                    }
                }
            }
        },
    )
}

/// A square table of cosines in colours, with the numbers in hundredths.
pub fn heat(what: &str, names: &[String], values: &[Vec<f64>]) -> Markup {
    const CELL: f64 = 29.0;
    let left = label_width(names.iter().map(String::as_str));
    let (size, top) = (names.len() as f64 * CELL, left * 0.75);
    svg(
        left + size + 40.0,
        top + size + 4.0,
        what,
        html! {
            @for (i, name) in names.iter().enumerate() {
                @let at = (i as f64 + 0.5) * CELL;
                (text(left - 8.0, top + at + 4.0, "label end", name))
                text class="label" transform={ "translate(" (px(left + at)) " " (px(top - 6.0)) ") rotate(-45)" } { (name) }
            }
            @for (i, row) in values.iter().enumerate() {
                @for (j, v) in row.iter().enumerate() {
                    @let (x, y) = (left + j as f64 * CELL, top + i as f64 * CELL);
                    @let colour = if *v < 0.0 { "var(--minus)" } else { "var(--plus)" };
                    @let share = (v.abs().min(1.0) * 85.0).round();
                    g {
                        title { (names[i]) " and " (names[j]) ": " (format!("{v:.3}")) }
                        rect x=(px(x)) y=(px(y)) width=(px(CELL - 1.0)) height=(px(CELL - 1.0))
                            style={ "fill:color-mix(in srgb," (colour) " " (share) "%,var(--cell))" } {}
                        (text(x + CELL / 2.0 - 0.5, y + CELL / 2.0 + 3.0, "cell mid", &hundredths(*v)))
                    }
                }
            }
        },
    )
}

/// A cosine in hundredths; nothing is "-0".
fn hundredths(v: f64) -> String {
    format!("{}", (v * 100.0).round() as i64)
}

/// A curve.
pub struct Series {
    /// Its name in the key.
    pub label: String,
    /// Class of the style sheet that gives its colour.
    pub class: String,
    /// (x, y with its interval); one without width has no whiskers.
    pub points: Vec<(f64, Interval)>,
    /// The point with a ring around it.
    pub marked: Option<usize>,
}

/// The axes of [`lines`].
pub struct Axes<'a> {
    /// Name of the horizontal one.
    pub x: &'a str,
    /// Name of the vertical one.
    pub y: &'a str,
    /// Is the horizontal one logarithmic?
    pub log_x: bool,
    /// Is the vertical one logarithmic?
    pub log_y: bool,
}

/// Curves. Points are drawn where there are few.
pub fn lines(what: &str, axes: &Axes<'_>, [width, height]: [f64; 2], series: &[Series]) -> Markup {
    const FEW: usize = 40;
    let (left, right, top, bottom) = (64.0, width - 14.0, 10.0, height - FOOT);
    let points = || series.iter().flat_map(|s| &s.points);
    let x = Axis::over(points().map(|p| p.0), [left, right], axes.log_x);
    let y = Axis::over(points().flat_map(|p| [p.1.lo, p.1.mean, p.1.hi]), [bottom, top], axes.log_y);
    svg(
        width,
        height,
        what,
        html! {
            (x_axis(&x, top, bottom, axes.x))
            (y_axis(&y, left, right, axes.y))
            @for s in series {
                g class=(s.class) {
                    title { (s.label) }
                    polyline class="curve" points=(path(&x, &y, &s.points)) {}
                    @if s.points.len() <= FEW {
                        @for (k, (at, value)) in s.points.iter().enumerate() {
                            @let here = [x.at(*at), y.at(value.mean)];
                            @if value.hi > value.lo {
                                (line("whisker", [here[0], y.at(value.lo)], [here[0], y.at(value.hi)]))
                            }
                            circle class="dot" cx=(px(here[0])) cy=(px(here[1])) r="3.5" {
                                title { (s.label) ": " (tick(*at)) ", " (format!("{:.4}", value.mean)) }
                            }
                            @if s.marked == Some(k) {
                                circle class="ring" cx=(px(here[0])) cy=(px(here[1])) r="7" {}
                            }
                        }
                    }
                }
            }
        },
    )
}

fn path(x: &Axis, y: &Axis, points: &[(f64, Interval)]) -> String {
    let pair = |(at, v): &(f64, Interval)| format!("{:.1},{:.1}", x.at(*at), y.at(v.mean));
    points.iter().filter(|p| p.1.mean.is_finite()).map(pair).collect::<Vec<_>>().join(" ")
}

/// A point of [`scatter`].
pub struct Spot {
    /// Where.
    pub at: [f64; 2],
    /// Class of the style sheet that gives its colour.
    pub class: String,
    /// A ring instead of a disc.
    pub hollow: bool,
    /// What the pointer shows.
    pub title: String,
}

/// Points, words at places among them, and the diagonal where both axes tell the same.
pub fn scatter(
    what: &str,
    [x_name, y_name]: [&str; 2],
    [width, height]: [f64; 2],
    spots: &[Spot],
    words: &[(String, [f64; 2])],
    diagonal: bool,
) -> Markup {
    let (left, right, top, bottom) = (64.0, width - 14.0, 10.0, height - FOOT);
    let of = |axis: usize| spots.iter().map(move |s| s.at[axis]);
    let (across, down) = match diagonal {
        true => (of(0).chain(of(1)).collect::<Vec<_>>(), of(0).chain(of(1)).collect::<Vec<_>>()),
        false => (of(0).collect(), of(1).collect()),
    };
    let x = Axis::over(across.into_iter(), [left, right], false);
    let y = Axis::over(down.into_iter(), [bottom, top], false);
    let mut places: Vec<[f64; 2]> = words.iter().map(|(_, at)| [x.at(at[0]), y.at(at[1])]).collect();
    spread(&mut places, &words.iter().map(|(w, _)| w.chars().count() as f64 * LETTER).collect::<Vec<_>>());
    svg(
        width,
        height,
        what,
        html! {
            (x_axis(&x, top, bottom, x_name))
            (y_axis(&y, left, right, y_name))
            @if diagonal {
                @let [lo, hi] = x.values;
                (line("zero", [x.at(lo), y.at(lo)], [x.at(hi), y.at(hi)]))
            }
            @for spot in spots {
                circle class={ (if spot.hollow { "ring " } else { "dot " }) (spot.class) } cx=(px(x.at(spot.at[0]))) cy=(px(y.at(spot.at[1]))) r="4" {
                    title { (spot.title) }
                }
            }
            @for ((word, _), at) in words.iter().zip(&places) {
                (text(at[0], at[1], "word mid", word))
            }
        },
    )
}

/// Moves words up and down until no two stand on each other.
fn spread(places: &mut [[f64; 2]], widths: &[f64]) {
    const LINE: f64 = 13.0;
    for _ in 0..60 {
        let mut moved = false;
        for i in 0..places.len() {
            for j in 0..i {
                let near = (places[i][0] - places[j][0]).abs() < (widths[i] + widths[j]) / 2.0;
                let gap = places[i][1] - places[j][1];
                if near && gap.abs() < LINE {
                    let push = (LINE - gap.abs()) / 2.0 + 0.1;
                    let up = if gap < 0.0 { -push } else { push };
                    places[i][1] += up;
                    places[j][1] -= up;
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::over([20.3, 31.9].into_iter(), [0.0, 700.0], false);
        let ticks = axis.ticks(70.0);
        assert!((3..=10).contains(&ticks.len()), "{ticks:?}");
        for t in &ticks {
            assert!((axis.values[0]..=axis.values[1]).contains(t) && (t / 2.0).fract().abs() < 1e-9, "{t}");
        }
        let log = Axis::over([3e-4, 8e-2].into_iter(), [0.0, 300.0], true);
        assert!(log.ticks(70.0).contains(&1e-3) && log.at(1e-3) < log.at(1e-2));
    }

    #[test]
    fn axes_of_nothing_and_of_one_value_still_work() {
        for values in [vec![], vec![f64::NAN], vec![0.0], vec![7.0, 7.0]] {
            for log in [false, true] {
                let axis = Axis::over(values.iter().copied(), [0.0, 100.0], log);
                assert!(
                    axis.values[0] < axis.values[1]
                        && axis.at(7.0).is_finite()
                        && !axis.ticks(20.0).is_empty()
                );
            }
        }
    }

    #[test]
    fn words_are_moved_apart() {
        let mut places = [[50.0, 50.0], [52.0, 50.0], [54.0, 53.0], [400.0, 50.0]];
        spread(&mut places, &[40.0; 4]);
        for i in 0..3 {
            for j in 0..i {
                assert!((places[i][1] - places[j][1]).abs() >= 12.9, "{places:?}");
            }
        }
        assert_eq!(places[3], [400.0, 50.0]);
    }
}
