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
    bar: Option<ProgressBar>,
    at: RefCell<Option<Part>>,
}

/// A part that is on its way.
struct Part {
    name: String,
    pace: Pace,
    /// When it was last told of.
    told: Instant,
}

impl Parts {
    /// Work that starts now.
    pub fn new() -> Self {
        let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(1).with_style(style));
        Self { bar, at: RefCell::new(None) }
    }

    /// So many steps of this part are done; `note` is what else there is to say of it.
    pub fn at(&self, part: &str, note: &str, done: u64, total: u64) {
        let (mut at, now) = (self.at.borrow_mut(), Instant::now());
        let known = at.take().filter(|known| known.name == part && known.pace.goes_on(done));
        let new = known.is_none();
        let mut part =
            known.unwrap_or_else(|| Part { name: part.to_owned(), pace: Pace::new(done, now), told: now });
        let left = part.pace.rest(done, total, now).map(|left| format!("{} left", HumanDuration(left)));
        let words = [note, left.as_deref().unwrap_or_default()];
        let words: String = words.into_iter().filter(|w| !w.is_empty()).map(|w| format!(", {w}")).collect();
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}{words}", part.name));
            bar.set_length(total);
            bar.set_position(done);
        } else if new || now - part.told >= PAUSE {
            part.told = now;
            eprintln!("{}: {done} of {total}{words}", part.name);
        }
        *at = Some(part);
    }

    /// It is over, one way or the other.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How fast steps follow one another.
struct Pace {
    /// Steps that were done when the clock started: a run may have been resumed.
    first: u64,
    start: Instant,
    last: u64,
}

impl Pace {
    fn new(done: u64, now: Instant) -> Self {
        Self { first: done, start: now, last: done }
    }

    /// Not where a part of the same name has begun anew.
    fn goes_on(&self, done: u64) -> bool {
        done >= self.last
    }

    /// How long the rest takes; nobody knows before the first step.
    fn rest(&mut self, done: u64, total: u64, now: Instant) -> Option<Duration> {
        self.last = done;
        // What comes before the first step is none.
        if done <= self.first {
            (self.first, self.start) = (done, now);
            return None;
        }
        let share = (done - self.first) as f64 / total.saturating_sub(self.first).max(1) as f64;
        rest(now - self.start, share)
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
    use super::{Pace, rest};
    use std::time::{Duration, Instant};

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

    #[test]
    fn the_pace_is_that_of_the_steps_since_the_start() {
        let (start, seconds) = (Instant::now(), Duration::from_secs);
        let mut pace = Pace::new(200, start);
        // A minute passes before the first step of a resumed run.
        assert_eq!(pace.rest(200, 300, start + seconds(60)), None);
        assert_eq!(pace.rest(225, 300, start + seconds(70)), Some(seconds(30)));
        assert!(pace.goes_on(225) && !pace.goes_on(1));
    }
}
