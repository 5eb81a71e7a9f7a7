//! The `hywu` binary: arguments in, exit codes out (0 done, 1 failed, 2 wrong usage, 130 interrupted).

use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod commands {
    pub mod completions;
    pub mod generate;
    pub mod inspect;
}

/// Instance-specific weight generation for photo editing
#[derive(Parser)]
#[command(name = "hywu", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(commands::generate::GenerateArgs),
    Inspect(commands::inspect::InspectArgs),
    Completions(commands::completions::CompletionsArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => commands::generate::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // One line, whatever the cause says.
            eprintln!("error: {}", format!("{e:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
