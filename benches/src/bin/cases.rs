//! This project's side of the comparisons with PyTorch: prints `{"threads": n, "parameters": those of the backbone, "ms": {case: median
//! milliseconds}, "details": .., "failures": ..}`, a case a line as soon as it is timed, so that a run that is cut off has not been in
//! vain. `benches/peer/torch_peer.py` runs the same cases; `benches/peer/compare_cpu.py` and `compare_gpu.py` run both in turn.

use clap::Parser;
use hywu_benches::{
    Result, attempt,
    cases::{self, Case, low_rank},
    edit, smoke,
    timing::Bench,
};
use hywu_kernels::Device;
use serde_json::{Map, Value, json};
use std::{
    collections::HashMap,
    io::{Write, stdout},
    panic,
    process::ExitCode,
};

/// Times this project's ops and models.
#[derive(Parser)]
struct Args {
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Threads on the CPU.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only cases whose names start so, or so: words with commas between.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Few calls of small shapes: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Every token count of low-rank linear with every rank and every number of instances, and attention at all shapes.
    #[arg(long)]
    all: bool,
    /// Without the cases that are one of many or long: those that a second round repeats.
    #[arg(long)]
    few: bool,
    /// A tenth of a second for each case.
    #[arg(long)]
    brief: bool,
    /// Only says which cases there are.
    #[arg(long)]
    list: bool,
    /// Only checks results, where there is a check: also from operands that are hard to get right.
    #[arg(long)]
    check: bool,
    /// Every op once forward and backward at ragged shapes, untimed: what compute-sanitizer looks at.
    #[arg(long)]
    smoke: bool,
    /// Whole edits with the bundled model.
    #[arg(long)]
    edit: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    // The main thread is one of the workers: handing every call to another thread costs more than a small op.
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).use_current_thread().build_global()?;
    if !args.list {
        args.device.check()?;
    }
    // Panics are reported as the case's error; only the place is missing there.
    panic::set_hook(Box::new(|info| {
        if let Some(place) = info.location() {
            eprintln!("panic at {place}");
        }
    }));
    if args.smoke {
        let failed = smoke::run(args.device, args.only.first().map_or("", String::as_str));
        return Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if args.edit {
        let rows = attempt(|| edit::run(args.device, 3))?;
        println!("{:#}", json!({ "device": args.device.to_string(), "edits": rows }));
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::new(args.device, args.quick);
    let bench = if args.brief { bench.shorter() } else { bench };
    let wanted = |case: &Case| {
        let named = args.only.is_empty() || args.only.iter().any(|start| case.name.starts_with(start));
        named && !(args.few && case.is_once)
    };
    let wanted = cases::all(&bench, args.all).into_iter().filter(wanted);
    if args.list {
        wanted.for_each(|case| println!("{}", case.name));
        return Ok(ExitCode::SUCCESS);
    }
    if args.check {
        let mut failed = 0;
        for case in wanted {
            match attempt(|| Ok(case.check(&bench)? | case.check_hard(&bench)?)) {
                Ok(true) => println!("right: {}", case.name),
                Ok(false) => {}
                Err(e) => {
                    failed += 1;
                    println!("WRONG: {}: {e}", case.name);
                }
            }
        }
        return Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    print!("{{\"device\": \"{}\", \"threads\": {}, ", args.device, args.threads);
    print!("\"parameters\": {}, \"ms\": {{", cases::parameters()?);
    let (mut details, mut failures) = (Map::new(), Map::new());
    let mut medians = HashMap::new();
    for case in wanted {
        match attempt(|| case.run(&bench)) {
            Ok(times) => {
                let comma = if details.is_empty() { "" } else { "," };
                print!("{comma}\n  {}: {:.6}", Value::from(case.name.as_str()), times.median);
                stdout().flush()?;
                // What the case has used stays with this process until the next one begins.
                let held = bench.device.memory()?.map(|(free, total)| total - free);
                let detail = json!({
                    "p10": times.p10, "p90": times.p90, "samples": times.samples, "calls": times.calls,
                    "copies": times.copies, "bytes": case.floor.bytes, "flops": case.floor.flops,
                    "device_memory": held,
                });
                medians.insert(case.name.clone(), times.median);
                details.insert(case.name, detail);
            }
            Err(e) => {
                eprintln!("{}: {e}", case.name);
                failures.insert(case.name, Value::from(e.to_string()));
            }
        }
    }
    let failed = !failures.is_empty();
    let merge_or_fuse = Value::from(low_rank::merge_or_fuse(&bench, args.all, &medians));
    print!("\n}}, \"merge_or_fuse\": {merge_or_fuse}, ");
    println!("\"details\": {}, \"failures\": {}}}", Value::from(details), Value::from(failures));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
