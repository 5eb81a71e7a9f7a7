//! Instructions to token ids, and the static embedding table behind the ids.

use crate::{Error, Result};
use ahash::AHashMap;
use hywu_kernels::Tensor;
use safetensors::SafeTensors;
use tokenizers::{
    Tokenizer, models::wordpiece::WordPiece, normalizers::BertNormalizer,
    pre_tokenizers::bert::BertPreTokenizer,
};

static VOCABULARY: &str = include_str!("../../assets/text/vocab.txt");
static TABLE: &[u8] = include_bytes!("../../assets/text/table.safetensors");
/// Id of "nothing here".
pub(crate) const PAD: u32 = 0;

/// Tokens of each instruction of `length` ids without the padding behind them, at least 1.
pub(crate) fn lengths(ids: &[u32], length: usize) -> Vec<usize> {
    let used = |ids: &[u32]| ids.iter().rposition(|id| *id != PAD).map_or(1, |last| last + 1);
    ids.chunks(length).map(used).collect()
}

/// Splits instructions into word pieces: the vocabulary of all-MiniLM-L6-v2 (Apache-2.0), lower-cased, without accents.
pub struct TextEncoder {
    tokenizer: Tokenizer,
    length: usize,
}

impl TextEncoder {
    /// Where vocabulary and table come from, and their licence.
    pub const SOURCE: &str =
        "word pieces and token table distilled from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)";

    /// The encoder in the binary, for instructions of up to `length` tokens.
    ///
    /// # Errors
    /// None in practice: the vocabulary is part of the binary.
    pub fn bundled(length: usize) -> Result<Self> {
        let bad = |e: tokenizers::Error| Error::Invalid(format!("the bundled vocabulary: {e}"));
        let vocabulary = VOCABULARY.lines().zip(0u32..).map(|(token, id)| (token.to_owned(), id));
        let model = WordPiece::builder()
            .vocab(vocabulary.collect::<AHashMap<_, _>>())
            .unk_token("[UNK]".into())
            .build()
            .map_err(bad)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(Some(BertNormalizer::default())).map_err(bad)?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        Ok(Self { tokenizer, length })
    }

    /// Token embeddings [vocabulary, 64]: every token of the vocabulary through all-MiniLM-L6-v2, reduced by PCA and weighted
    /// by rarity (`scripts/make_text_table.py`). Stored in bytes, each row with its own scale.
    ///
    /// # Errors
    /// None in practice: the table is part of the binary.
    pub fn table() -> Result<Tensor> {
        let bad = |e: safetensors::SafeTensorError| Error::Invalid(format!("the bundled text table: {e}"));
        let file = SafeTensors::deserialize(TABLE).map_err(bad)?;
        let (rows, scale) = (file.tensor("table").map_err(bad)?, file.tensor("scale").map_err(bad)?);
        let bytes: &[i8] = bytemuck::cast_slice(rows.data());
        // The file has no alignment of its own.
        let scale = scale.data().chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>);
        let channels = rows.shape().last().copied().unwrap_or(1).max(1);
        Ok(Tensor::build(rows.shape(), |out| {
            for ((out, row), scale) in out.chunks_mut(channels).zip(bytes.chunks(channels)).zip(scale) {
                out.iter_mut().zip(row).for_each(|(out, v)| *out = f32::from(*v) * scale);
            }
        }))
    }

    /// The ids of an instruction, padded to the encoder's length.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an instruction without a word, or with more tokens than fit.
    pub fn encode(&self, instruction: &str) -> Result<Vec<u32>> {
        let fail = |e: tokenizers::Error| Error::Invalid(format!("instruction {instruction:?}: {e}"));
        let encoding = self.tokenizer.encode(instruction, false).map_err(fail)?;
        let mut ids = encoding.get_ids().to_vec();
        if ids.is_empty() {
            let what = "the instruction is empty; say what to change, for example \"make it warmer\"";
            return Err(Error::Invalid(what.into()));
        }
        if ids.len() > self.length {
            let what = format!(
                "the instruction has {} tokens; at most {} fit, say it shorter",
                ids.len(),
                self.length
            );
            return Err(Error::Invalid(what));
        }
        ids.resize(self.length, PAD);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_known_pieces() {
        let encoder = TextEncoder::bundled(20).expect("bundled");
        let ids = encoder.encode("Remove the BLUR, café!").expect("short");
        assert_eq!(ids.len(), 20);
        let words: Vec<&str> = ids.iter().filter_map(|&id| VOCABULARY.lines().nth(id as usize)).collect();
        assert_eq!(words[..6], ["remove", "the", "blur", ",", "cafe", "!"]);
        assert!(words[6..].iter().all(|w| *w == "[PAD]"));
    }

    #[test]
    fn empty_and_endless_instructions_are_refused() {
        let encoder = TextEncoder::bundled(4).expect("bundled");
        assert!(encoder.encode(" \t").expect_err("empty").to_string().contains("empty"));
        let long = encoder.encode("one two three four five").expect_err("long").to_string();
        assert!(long.contains("5 tokens") && long.contains("at most 4"), "{long}");
    }

    #[test]
    fn the_table_covers_the_vocabulary() {
        let table = TextEncoder::table().expect("bundled");
        assert_eq!(table.shape(), [VOCABULARY.lines().count(), 64]);
    }
}
