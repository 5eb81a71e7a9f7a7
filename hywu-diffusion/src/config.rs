use crate::{Error, Result};
use hywu_kernels::ops::local_filter::{COEFFICIENTS, FEATURES, HIDDEN};
use serde::{Deserialize, Serialize};

/// Sizes of the mini backbone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackboneConfig {
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Channels of a token.
    pub width: usize,
    /// Blocks that take adapters.
    pub layers: usize,
    /// Channels of an attention head; half of them turn with the row, half with the column.
    pub head_dim: usize,
    /// Hidden channels of the MLP.
    pub mlp_hidden: usize,
    /// Channels of the frozen text table.
    pub text_dim: usize,
    /// Text tokens of an instance.
    pub text_len: usize,
    /// Blocks of the text tower.
    pub text_layers: usize,
    /// Does the condition see a crop at native resolution beside the thumbnail? Noise and blur vanish in a thumbnail.
    pub detail_view: bool,
    /// Side of the squares of image tokens whose mean is one token of the condition; 1 keeps each. A generator's attention starts as
    /// the mean over all tokens, among which the image's drown the few of the instruction.
    #[serde(skip_serializing_if = "keeps_each")]
    pub condition_pool: usize,
}

/// Written down only where it says something, so that a model of before has the hash it had.
fn keeps_each(condition_pool: &usize) -> bool {
    *condition_pool == 1
}

impl Default for BackboneConfig {
    fn default() -> Self {
        Self {
            patch: 8,
            width: 192,
            layers: 6,
            head_dim: 64,
            mlp_hidden: 512,
            text_dim: 64,
            text_len: 20,
            text_layers: 2,
            detail_view: true,
            condition_pool: 1,
        }
    }
}

/// How a weight starts.
pub(crate) enum Init {
    /// One value everywhere.
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
}

impl BackboneConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn validate(&self) -> Result<()> {
        let Self { patch, width, layers, head_dim, mlp_hidden, text_dim, text_len, text_layers, .. } = *self;
        // The upper limits keep every product far from overflow and a damaged file from asking for all memory.
        let ranges = [
            ("patch", patch, 1, 64),
            ("width", width, 4, 8192),
            ("layers", layers, 1, 256),
            ("head_dim", head_dim, 4, 256),
            ("mlp_hidden", mlp_hidden, 1, 32768),
            ("text_dim", text_dim, 1, 8192),
            ("text_len", text_len, 1, 1024),
            ("text_layers", text_layers, 0, 256),
            ("condition_pool", self.condition_pool, 1, 64),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(config(format!("backbone {name} is {value}, expected {low}..={high}")));
            }
        }
        if !head_dim.is_multiple_of(4) {
            return Err(config(format!("backbone head_dim is {head_dim}, expected a multiple of 4")));
        }
        if !width.is_multiple_of(head_dim) {
            let what = format!("backbone width is {width}, expected a multiple of head_dim {head_dim}");
            return Err(config(what));
        }
        Ok(())
    }

    /// Number of pictures that [`crate::Backbone::condition`] reads: the thumbnail, and the detail crop.
    pub fn views(&self) -> usize {
        1 + usize::from(self.detail_view)
    }

    /// (path, out, in) of the projections of a block: the adapter targets.
    pub(crate) fn projections(&self) -> [(&'static str, usize, usize); 4] {
        let (w, h) = (self.width, self.mlp_hidden);
        [
            ("self_attn.qkv_proj", 3 * w, w),
            ("self_attn.o_proj", w, w),
            ("mlp.gate_and_up_proj", 2 * h, w),
            ("mlp.down_proj", w, h),
        ]
    }

    /// Name, shape and start of every weight, in order.
    pub(crate) fn parameters(&self) -> Vec<(String, Vec<usize>, Init)> {
        let w = self.width;
        let fan_in = |n: usize| Init::Normal((n as f32).powf(-0.5));
        let mut all = Vec::new();
        let mut dense = |name: &str, out: usize, inner: usize, init: Init| {
            all.push((format!("{name}.weight"), vec![out, inner], init));
            all.push((format!("{name}.bias"), vec![out], Init::Constant(0.0)));
        };
        let pixels = self.patch * self.patch;
        dense("patch_in", w, 8 * pixels, fan_in(8 * pixels));
        dense("text_in", w, self.text_dim, fan_in(self.text_dim));
        dense("time_in", w, w, fan_in(w));
        dense("text_pool", w, w, fan_in(w));
        // Zero modulation: every block starts as the identity (adaLN-zero, arXiv 2212.09748 section 3.2).
        dense("time_out", 8 * w, w, Init::Constant(0.0));
        dense("head", 3 * pixels + COEFFICIENTS, w, Init::Constant(0.0));
        all.push(("text_position".into(), vec![self.text_len, w], Init::Normal(0.02)));
        all.push(("norm.weight".into(), vec![w], Init::Constant(1.0)));
        // Set by `Backbone::calibrate`; no loss depends on them.
        all.push(("condition.mean".into(), vec![w], Init::Constant(0.0)));
        all.push(("condition.scale".into(), vec![w], Init::Constant(1.0)));
        all.push(("pixel_in.weight".into(), vec![HIDDEN, FEATURES], fan_in(FEATURES)));
        let text = (0..self.text_layers).map(|i| format!("text.layers.{i}"));
        for (i, name) in text.chain((0..self.layers).map(|i| format!("model.layers.{i}"))).enumerate() {
            for (path, n) in [
                ("input_norm", w),
                ("self_attn.q_norm", self.head_dim),
                ("self_attn.k_norm", self.head_dim),
                ("mlp_norm", w),
            ] {
                all.push((format!("{name}.{path}.weight"), vec![n], Init::Constant(1.0)));
            }
            for (path, out, inner) in self.projections() {
                all.push((format!("{name}.{path}.weight"), vec![out, inner], fan_in(inner)));
            }
            if i >= self.text_layers {
                all.push((format!("{name}.modulation"), vec![6 * w], Init::Constant(0.0)));
            }
        }
        all
    }
}

fn config(what: String) -> Error {
    hywu_core::Error::Config(what).into()
}
