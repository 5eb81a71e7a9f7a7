//! How far long work is: a bar on a terminal, elsewhere a line now and then.

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use std::{
    cell::RefCell,
    io::IsTerminal,
    time::{Duration, Instant},
};

/// Parts of the work that a bar tells apart.
const PARTS: u64 = 10_000;
/// Time from one line to the next.
const PAUSE: Duration = Duration::from_secs(30);

/// Work on its way.
pub struct Watch {
    start: Instant,
    shown: Shown,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    /// And when the last one was.
    Lines(Instant),
}

impl Watch {
    /// Work that starts now.
    pub fn new(quiet: bool) -> Self {
        let start = Instant::now();
        let shown = if quiet {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("[{bar:30}] {percent} %, {elapsed} so far, {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            Shown::Bar(ProgressBar::new(PARTS).with_style(style))
        } else {
            Shown::Lines(start)
        };
        Self { start, shown }
    }

    /// So much of it is done.
    pub fn at(&mut self, done: f64, total: f64) {
        let (share, taken) = (done / total, self.start.elapsed());
        let left = rest(taken, share).map(|left| format!("{} left", HumanDuration(left)));
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_position((PARTS as f64 * share) as u64);
                bar.set_message(left.unwrap_or_default());
            }
            Shown::Lines(last) if last.elapsed() >= PAUSE => {
                *last = Instant::now();
                let left = left.map(|left| format!(", {left}")).unwrap_or_default();
                eprintln!("{:.1} %, {} so far{left}", 100.0 * share, HumanDuration(taken));
            }
            Shown::Lines(_) => {}
        }
    }

    /// It is over, one way or the other; how long it took.
    pub fn finish(self) -> Duration {
        if let Shown::Bar(bar) = self.shown {
            bar.finish_and_clear();
        }
        self.start.elapsed()
    }
}

/// Steps of work in parts that follow one another, each with a name.
pub struct Parts {
    shown: ShownParts,
    /// The part that is on its way, when it began, and when it was last told of.
    at: RefCell<Option<(String, Instant, Instant)>>,
}

enum ShownParts {
    Bar(ProgressBar),
    Lines,
}

impl Parts {
    /// Work that starts now.
    pub fn new() -> Self {
        let shown = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg}, {eta} left")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ShownParts::Bar(ProgressBar::new(1).with_style(style))
        } else {
            ShownParts::Lines
        };
        Self { shown, at: RefCell::new(None) }
    }

    /// So many steps of this part are done; `note` is what else there is to say of it.
    pub fn at(&self, part: &str, note: &str, done: u64, total: u64) {
        let mut at = self.at.borrow_mut();
        let now = Instant::now();
        let new = at.as_ref().is_none_or(|(last, ..)| last != part);
        if new {
            *at = Some((part.to_owned(), now, now));
        }
        let Some((_, start, told)) = &mut *at else { return };
        match &self.shown {
            ShownParts::Bar(bar) => {
                if new {
                    bar.reset();
                }
                bar.set_message(if note.is_empty() { part.to_owned() } else { format!("{part}, {note}") });
                bar.set_length(total);
                bar.set_position(done);
            }
            ShownParts::Lines if new || told.elapsed() >= PAUSE => {
                *told = now;
                let left = rest(start.elapsed(), done as f64 / total.max(1) as f64).filter(|_| !new);
                let left = left.map(|left| format!("{} left", HumanDuration(left)));
                let notes: Vec<&str> =
                    [note, left.as_deref().unwrap_or_default()].into_iter().filter(|n| !n.is_empty()).collect();
                eprintln!("{}", [&[format!("{part}: {done} of {total}").as_str()][..], &notes].concat().join(", "));
            }
            ShownParts::Lines => {}
        }
    }

    /// It is over, one way or the other.
    pub fn finish(self) {
        if let ShownParts::Bar(bar) = self.shown {
            bar.finish_and_clear();
        }
    }
}

/// Tells that something is waited for while `work` does it, of which nobody knows how far it is.
pub fn waiting<T>(quiet: bool, what: &'static str, work: impl FnOnce() -> T) -> T {
    if quiet {
        return work();
    }
    if !std::io::stderr().is_terminal() {
        eprintln!("{what}");
        return work();
    }
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    let done = work();
    bar.finish_and_clear();
    done
}

/// How long the rest takes when a share of the work took `taken`: as long as what was done, for what it was. A mean of the last steps
/// alone would swell in every long one.
fn rest(taken: Duration, share: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(taken.as_secs_f64() * (1.0 - share) / share).ok()
}

#[cfg(test)]
mod tests {
    use super::rest;
    use std::time::Duration;

    #[test]
    fn the_rest_takes_as_long_as_what_was_done() {
        let seconds = Duration::from_secs;
        assert_eq!(rest(seconds(30), 0.25), Some(seconds(90)));
        assert_eq!(rest(seconds(30), 1.0), Some(seconds(0)));
        // A step that took long counts for what it was among all.
        assert_eq!(rest(seconds(60), 0.5), Some(seconds(60)));
        // Nothing is known before anything is done; sums may end a little beyond the total.
        assert_eq!(rest(seconds(30), 0.0), None);
        assert!(rest(seconds(30), 1.0 + 1e-12).is_none_or(|left| left < seconds(1)));
        assert_eq!(rest(seconds(30), f64::NAN), None);
    }
}
