//! Several texts and some data as one input.

/// What an input of `formats` holds: texts with a NUL behind each, then data.
pub struct Parts<'a> {
    /// A safetensors header.
    pub header: &'a [u8],
    /// PEFT's config; empty in the formats that have none.
    pub config: &'a [u8],
    /// A module map in TOML.
    pub map: &'a [u8],
    /// Tensors.
    pub data: &'a [u8],
}

impl<'a> Parts<'a> {
    /// Parts that are not there are empty.
    pub fn of(input: &'a [u8]) -> Self {
        let mut parts = input.splitn(4, |&b| b == 0);
        let mut next = || parts.next().unwrap_or_default();
        Self { header: next(), config: next(), map: next(), data: next() }
    }

    /// An input of them.
    pub fn join(&self) -> Vec<u8> {
        [self.header, self.config, self.map, self.data].join(&0)
    }
}

/// A safetensors file whose lengths agree with its header, which chance seldom finds: zeros follow the data.
pub fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    let start = file.len();
    file.extend_from_slice(data);
    file.resize(start + told(header).unwrap_or(data.len()), 0);
    file
}

/// How many bytes of tensors a header tells of, if not too many.
fn told(header: &[u8]) -> Option<usize> {
    let json: serde_json::Value = serde_json::from_slice(header).ok()?;
    let end = |tensor: &serde_json::Value| tensor["data_offsets"][1].as_u64();
    let most = json.as_object()?.values().filter_map(end).max()?;
    usize::try_from(most).ok().filter(|&n| n <= 1 << 16)
}
