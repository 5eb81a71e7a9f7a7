//! Text for people and programs.

use anyhow::{Context, Result};
use std::{fmt::Display, io::Write};

/// Writes a line to standard output. A reader that has gone away (`| head`) is no error; a full disk is.
///
/// # Errors
/// When standard output can't be written.
pub fn say(line: impl Display) -> Result<()> {
    write(format!("{line}\n").as_bytes())
}

/// As [`say`], bytes as they stand.
///
/// # Errors
/// As [`say`].
pub fn write(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("standard output"),
    }
}

/// Tells an error on standard error, in one line whatever its causes say.
pub fn complain(error: &anyhow::Error) {
    eprintln!("error: {}", one_line(format_args!("{error:#}")));
}

/// Tells on standard error what went otherwise than asked but did not fail, in one line.
pub fn warn(warning: impl Display) {
    eprintln!("warning: {}", one_line(warning));
}

fn one_line(text: impl Display) -> String {
    text.to_string().replace('\n', " ")
}
