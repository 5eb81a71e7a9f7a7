//! The `hywu` binary: arguments in, exit codes out (0 done, 1 failed, 2 wrong usage, 130 interrupted).

use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod commands {
    pub mod adapter;
    pub mod claims;
    pub mod completions;
    pub mod edit;
    pub mod eval;
    pub mod generate;
    pub mod info;
    pub mod inspect;
    pub mod train;
}
mod interrupt;
mod output;
mod progress;
mod values;

/// Instance-specific weight generation for photo editing
#[derive(Parser)]
#[command(name = "hywu", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Adapter(commands::adapter::AdapterArgs),
    Edit(commands::edit::EditArgs),
    Generate(commands::generate::GenerateArgs),
    Inspect(commands::inspect::InspectArgs),
    Info(commands::info::InfoArgs),
    Eval(commands::eval::EvalArgs),
    Train(commands::train::TrainArgs),
    Completions(commands::completions::CompletionsArgs),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = start_workers().and_then(|()| run(command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if interrupted(&e) => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(e) => {
            output::complain(&e);
            ExitCode::FAILURE
        }
    }
}

/// Did the user stop it?
fn interrupted(e: &anyhow::Error) -> bool {
    matches!(e.downcast_ref(), Some(hywu_core::Error::Interrupted))
        || matches!(e.downcast_ref(), Some(hywu_diffusion::Error::Interrupted))
        || matches!(e.downcast_ref(), Some(hywu_generator::Error::Interrupted))
}

/// As many workers as processors (RAYON_NUM_THREADS overrides), the main thread among them: handing every call to another thread
/// costs more than a small op.
fn start_workers() -> anyhow::Result<()> {
    Ok(rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?)
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Adapter(args) => commands::adapter::run(&args),
        Command::Edit(args) => commands::edit::run(args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Info(args) => commands::info::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
    }
}
