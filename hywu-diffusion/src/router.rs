//! Which skill an instruction asks for, told by its words alone.

use crate::{Backbone, Error, KnownSkill, Result, TextEncoder, skills::HUES, text::lengths};
use hywu_core::Dtype;
use hywu_kernels::{
    Device, Tape, Tensor, Var,
    ops::{
        elementwise::{mask_tokens, mean_tokens},
        embedding::embedding,
    },
};

/// Instructions that are embedded at once.
const BATCH: usize = 64;
/// Every phrasing is an example in each of these, so that politeness points at no skill.
const ASKED: [&str; 4] = ["{}", "please {}", "{} please", "can you {}"];
/// What the words count against the text tower's summary. Of 474 ways to ask for ten skills of one's own this finds 472, of 984 held-out
/// ways to ask for the table's 955; 1 finds 469 and 953, 4 finds 472 and 951. Centroids instead of neighbours find 456 and 936.
const WORDS: f32 = 2.0;

/// Tells skills by the nearest of their training phrasings; nothing is trained.
///
/// An instruction is embedded as two directions of unit length: the mean of its tokens in the frozen text table, which has a place for
/// words that the model was never taught, and the text tower's summary, which knows "blur it" from "remove the blur". What is near is
/// told by the sum of their cosines, that of the words twice.
#[derive(Clone)]
pub struct Router {
    /// [examples, text_dim + width], skill by skill, both parts of unit length.
    examples: Tensor,
    /// How many there are of each skill.
    counts: Vec<usize>,
}

impl Router {
    /// For these skills, by the text tower of `backbone`.
    ///
    /// # Errors
    /// No skills; phrasings that are empty or too long for `text`; those of the device.
    pub fn new(skills: &[KnownSkill], backbone: &Backbone, text: &TextEncoder) -> Result<Self> {
        let (mut ids, mut counts) = (Vec::new(), Vec::new());
        for skill in skills {
            let before = ids.len();
            for (i, phrase) in skill.phrasings().into_iter().enumerate() {
                for (k, wording) in ASKED.iter().enumerate() {
                    // Where there is a colour to be named, all of them in turn.
                    let hue = HUES[(i * ASKED.len() + k) % HUES.len()].0;
                    let said = wording.replace("{}", &phrase.replace("{from}", hue).replace("{to}", hue));
                    match text.encode(&said) {
                        Ok(said) => ids.extend(said),
                        Err(e) if k == 0 => return Err(e),
                        // A phrasing may be so long that no more words fit.
                        Err(_) => {}
                    }
                }
            }
            counts.push((ids.len() - before) / backbone.config.text_len);
        }
        let examples = embed(backbone, &ids)?;
        let examples = Tensor::new(&[examples.len(), row_width(backbone)], examples.concat())?;
        Self::from_examples(&examples, counts, backbone)
    }

    /// With what [`Router::examples`] and [`Router::counts`] gave; rounded to f16, so that a file of half the size decides alike.
    ///
    /// # Errors
    /// No examples, counts that don't add up, a tensor of another width or with values that are not finite.
    pub fn from_examples(examples: &Tensor, counts: Vec<usize>, backbone: &Backbone) -> Result<Self> {
        let mut examples = examples.to_host()?;
        let all = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count)).unwrap_or(usize::MAX);
        let wanted = [all, row_width(backbone)];
        if wanted[0] == 0 || examples.shape() != wanted {
            let (got, expected) = (examples.shape(), format!("{wanted:?}, at least one example"));
            return Err(hywu_kernels::Error::shape("router", "examples", got, expected).into());
        }
        if examples.data().iter().any(|v| !v.is_finite()) {
            return Err(Error::Invalid(
                "the examples of instructions hold values that are not finite".into(),
            ));
        }
        examples.data_mut().iter_mut().for_each(|v| *v = Dtype::F16.round(*v));
        Ok(Self { examples, counts })
    }

    /// What tells the skills apart: [examples, text_dim + width], skill by skill.
    pub fn examples(&self) -> &Tensor {
        &self.examples
    }

    /// How many examples there are of each skill.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// The place of the nearest skill for each instruction; `ids` [instructions * text_len], `backbone` as in [`Router::new`].
    ///
    /// # Errors
    /// Ids that don't fit; those of the device.
    pub fn nearest(&self, backbone: &Backbone, ids: &[u32]) -> Result<Vec<usize>> {
        let (width, at) = (row_width(backbone), backbone.config.text_dim);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let of: Vec<usize> = self
            .counts
            .iter()
            .enumerate()
            .flat_map(|(skill, &count)| std::iter::repeat_n(skill, count))
            .collect();
        let place = |embedded: Vec<f32>| {
            let nearness =
                |e: &[f32]| WORDS * dot(&e[..at], &embedded[..at]) + dot(&e[at..], &embedded[at..]);
            let near = self.examples.data().chunks_exact(width).map(nearness).zip(&of);
            near.max_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |(_, skill)| *skill)
        };
        Ok(embed(backbone, ids)?.into_iter().map(place).collect())
    }
}

fn row_width(backbone: &Backbone) -> usize {
    backbone.config.text_dim + backbone.config.width
}

/// [text_dim + width] for each instruction, both parts of unit length.
fn embed(backbone: &Backbone, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let (length, at) = (backbone.config.text_len, backbone.config.text_dim);
    if !ids.len().is_multiple_of(length) {
        return Err(Error::Invalid(format!("{} token ids, expected a multiple of {length}", ids.len())));
    }
    let table = Var::constant(backbone.text_table.clone());
    let mut all = Vec::new();
    for ids in ids.chunks(BATCH * length) {
        let tape = Tape::inference();
        let bound = backbone.params.bind(&tape, false)?;
        let (instructions, lengths) = (ids.len() / length, lengths(ids, length));
        let summary = backbone.summary(&tape, &backbone.text_tokens(&tape, &bound, ids, instructions)?)?;
        let words = embedding(&tape, &table, ids, &[instructions, length])?;
        let words = mean_tokens(&tape, &mask_tokens(&tape, &words, &lengths)?)?;
        let on_host = |x: &Var| x.value().to(Device::Cpu, Dtype::F32);
        let (words, summary) = (on_host(&words)?, on_host(&summary)?);
        for (words, summary) in words.data().chunks(at).zip(summary.data().chunks(backbone.config.width)) {
            let mut both = [words, summary].concat();
            unit_parts(&mut both, at);
            all.push(both);
        }
    }
    Ok(all)
}

/// Brings what lies before and behind `at` to length 1 each; zero stays.
fn unit_parts(v: &mut [f32], at: usize) {
    let (words, summary) = v.split_at_mut(at);
    for part in [words, summary] {
        let norm = part.iter().map(|x| x * x).sum::<f32>().sqrt();
        part.iter_mut().for_each(|x| *x /= norm.max(f32::MIN_POSITIVE));
    }
}
