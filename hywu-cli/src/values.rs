//! Values on the command line: a bad one is wrong usage (exit code 2), told with what would be right. The limits are those of
//! [`SampleOptions::validate`].

use hywu_diffusion::SampleOptions;

/// Sampling steps.
pub fn steps(text: &str) -> Result<usize, String> {
    let steps = number(text)?;
    valid(&SampleOptions { steps, ..SampleOptions::default() })?;
    Ok(steps)
}

/// Side of a tile in pixels.
pub fn tile(text: &str) -> Result<usize, String> {
    let tile = number(text)?;
    valid(&SampleOptions::default().with_tile(tile))?;
    Ok(tile)
}

/// A number, not infinite.
pub fn finite(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|f: &f32| f.is_finite());
    number.ok_or_else(|| "a finite number is expected".into())
}

/// Bytes: a number, alone or with a unit such as GB or MiB.
pub fn bytes(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<bytesize::ByteSize>().ok().map(|b| b.as_u64()).filter(|&b| b > 0);
    bytes.ok_or_else(|| "a number of bytes is expected, such as 6GB or 512MiB".into())
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "a whole number is expected".into())
}

fn valid(options: &SampleOptions) -> Result<(), String> {
    options.validate().map_err(|e| e.to_string())
}
