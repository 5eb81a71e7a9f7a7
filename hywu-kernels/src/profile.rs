use crate::{
    Error, Result,
    cuda::{Gpu, Watched},
};
use indexmap::IndexMap;
use std::{
    fmt,
    time::{Duration, Instant},
};

/// Times of everything that a device does in runs of something, a training step say; made by
/// [`Device::profile`](crate::Device::profile). [`Display`](fmt::Display) gives a table.
///
/// Two marks on the device around every operation make the host slower, by a few microseconds each, and short kernels look longer by
/// about one: shares tell more than sums, and the time without a profile is another.
pub struct Profile {
    gpu: &'static Gpu,
    sums: Sums,
}

/// What has been seen so far.
#[derive(Default)]
struct Sums {
    operations: IndexMap<String, Operation>,
    runs: u64,
    /// From the start of each run to the end of its work.
    all: Duration,
    /// That the host waited for the device.
    waited: Duration,
    /// Milliseconds from the end of an operation to the start of the next.
    idle: f64,
}

/// The launches of a kernel with one grid, or copies in one direction.
#[derive(Default)]
struct Operation {
    count: u64,
    milliseconds: f64,
}

impl Profile {
    pub(crate) fn new(gpu: &'static Gpu) -> Self {
        Self { gpu, sums: Sums::default() }
    }

    /// Runs `body` and times what it does, on whichever thread. Within it no [`Replay`](crate::Replay) launches anything as a whole. A
    /// body that fails is not counted.
    ///
    /// # Errors
    /// Those of `body`; those of the device.
    pub fn run<T, E: From<Error>>(&mut self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.gpu.watch();
        let start = Instant::now();
        let result = body();
        let done = self.gpu.synchronize();
        let all = start.elapsed();
        let watched = self.gpu.watched();
        let value = result?;
        done?;
        self.sums.add(all, watched?);
        Ok(value)
    }
}

impl Sums {
    fn add(&mut self, all: Duration, watched: Watched) {
        self.runs += 1;
        self.all += all;
        self.waited += watched.waited;
        for span in watched.spans {
            let operation = self.operations.entry(span.name).or_default();
            operation.count += 1;
            operation.milliseconds += f64::from(span.milliseconds);
            self.idle += f64::from(span.idle);
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sums.fmt(f)
    }
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.runs == 0 {
            return f.write_str("nothing was timed");
        }
        let runs = self.runs as f64;
        let a_run = |time: Duration| time.as_secs_f64() * 1e3 / runs;
        let busy: f64 = self.operations.values().map(|o| o.milliseconds).sum();
        let count: u64 = self.operations.values().map(|o| o.count).sum();
        writeln!(
            f,
            "{} steps of {:.3} ms: {:.1} operations in {:.3} ms, {:.3} ms between them, host waiting {:.3} ms",
            self.runs,
            a_run(self.all),
            count as f64 / runs,
            busy / runs,
            self.idle / runs,
            a_run(self.waited)
        )?;
        write!(f, "  a step    ms a step   share    mean us  operation [grid] x threads")?;
        let mut rows: Vec<_> = self.operations.iter().collect();
        rows.sort_by(|a, b| b.1.milliseconds.total_cmp(&a.1.milliseconds));
        for (name, Operation { count, milliseconds }) in rows {
            let share = if busy > 0.0 { 100.0 * milliseconds / busy } else { 0.0 };
            let (times, mean) = (*count as f64 / runs, 1e3 * milliseconds / *count as f64);
            write!(f, "\n{times:8.1} {:12.4} {share:6.1}% {mean:10.2}  {name}", milliseconds / runs)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Span;

    #[test]
    fn times_are_added_up_by_operation_and_told_a_run() {
        let span = |name: &str, milliseconds, idle| Span { name: name.to_owned(), milliseconds, idle };
        let mut sums = Sums::default();
        assert_eq!(sums.to_string(), "nothing was timed");
        for factor in [1.0, 3.0] {
            let spans =
                vec![span("a", 0.25 * factor, 0.0), span("b", factor, 0.5), span("a", 0.25 * factor, 1.5)];
            sums.add(Duration::from_millis(4), Watched { spans, waited: Duration::from_millis(1) });
        }
        let text = sums.to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let first =
            "2 steps of 4.000 ms: 3.0 operations in 3.000 ms, 2.000 ms between them, host waiting 1.000 ms";
        assert_eq!(lines[0].join(" "), first);
        assert_eq!(lines[2], ["1.0", "2.0000", "66.7%", "2000.00", "b"]);
        assert_eq!(lines[3], ["2.0", "1.0000", "33.3%", "500.00", "a"]);
        assert_eq!(lines.len(), 4);
    }
}
