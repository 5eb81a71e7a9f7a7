mod adapters;

use crate::{BackboneConfig, Error, Result, config::Init, text::lengths};
use hywu_core::{Checkpoint, Dtype, Philox, TensorWriter};
use hywu_kernels::{
    Bound, Device, LoraVars, ParamSet, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Layout, QkNorm, Rotary, attention, rotary_table},
        elementwise::{
            add, add_row, cast, concat_channels, concat_tokens, gated_residual, mask_tokens, mean_tokens,
            repeat_each, slice_channels, slice_tokens, standardise,
        },
        embedding::embedding,
        local_filter::{COEFFICIENTS, FEATURES, HIDDEN, local_filter, pixel_features},
        low_rank_linear::{LowRankLinear, Shrink, Shrunk, linear},
        patchify::{patchify, unpatchify},
        rms_norm::{Modulation, rms_norm, rms_norm_shrink},
        swiglu::{silu, swiglu, swiglu_shrink},
        timestep::timestep_embedding,
    },
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

const OP: &str = "backbone";
const EPS: f32 = 1e-6;
/// Names of the blocks that take adapters start so.
const LAYERS: &str = "model.layers.";
const TEXT_LAYERS: &str = "text.layers.";
/// Rotary coordinates of the text start here in both axes, beyond every image token's.
const TEXT_ORIGIN: usize = 64;
/// Metadata key of the config in a checkpoint.
const CONFIG_KEY: &str = "backbone";

/// The mini backbone: a transformer in pixel space that reads a noisy picture, the source picture and an instruction,
/// and predicts the clean edited picture (x-prediction as in arXiv 2511.13720).
///
/// A patch of [x_t | source | position] is one token, the text tokens stand in the same sequence. Blocks are pre-norm
/// attention and SwiGLU; one embedding of timestep and instruction modulates all of them, with a learnt offset per block
/// (adaLN-single, PixArt-alpha, arXiv 2310.00426 section 2.3), and the norm before the head. The prediction is `source + local
/// filter of the source + residual`.
#[derive(Clone)]
pub struct Backbone {
    /// Sizes.
    pub config: BackboneConfig,
    /// The weights that training changes.
    pub params: ParamSet,
    /// Token embeddings [vocabulary, text_dim], frozen.
    pub text_table: Tensor,
    /// Rotary tables of the pictures seen so far, by (rows, columns) of patches.
    rotary: Arc<Mutex<HashMap<[usize; 2], Rotary>>>,
}

/// Rotary tables that are kept; pictures come in few sizes.
const MOST_TABLES: usize = 64;

/// What a forward pass works with.
struct Call<'a> {
    tape: &'a Tape,
    bound: &'a Bound,
    adapters: &'a LoraVars,
}

/// Scale, shift and gate of a block's two branches, each [batch, width].
type BlockModulation = [Var; 6];

/// What a block works on.
enum Sequence<'a> {
    /// Image and text tokens, modulated.
    Image(&'a BlockModulation),
    /// Text tokens alone, so many of each instance.
    Text(&'a [usize]),
}

impl Backbone {
    /// A backbone with fresh weights that depend on `seed` alone. It starts as the identity: prediction = source.
    ///
    /// # Errors
    /// A config that can't work, or a table that is not [vocabulary, text_dim].
    pub fn new(config: BackboneConfig, text_table: Tensor, seed: u64) -> Result<Self> {
        let mut backbone = Self::zeroed(config, text_table)?;
        let inits: Vec<Init> = backbone.config.parameters().into_iter().map(|(_, _, init)| init).collect();
        for (stream, ((_, tensor), init)) in backbone.params.iter_mut().zip(inits).enumerate() {
            match init {
                Init::Constant(value) => tensor.data_mut().fill(value),
                Init::Normal(std) => {
                    Philox::new(seed).fill_normal(stream as u64, 0, tensor.data_mut());
                    tensor.data_mut().iter_mut().for_each(|w| *w *= std);
                }
            }
        }
        Ok(backbone)
    }

    fn zeroed(config: BackboneConfig, text_table: Tensor) -> Result<Self> {
        config.validate()?;
        match text_table.shape() {
            [vocabulary, dim] if *vocabulary > 0 && *dim == config.text_dim => {}
            got => {
                let expected = format!("[vocabulary, {}]", config.text_dim);
                return Err(hywu_kernels::Error::shape(OP, "text table", got, expected).into());
            }
        }
        let mut params = ParamSet::new();
        for (name, shape, _) in config.parameters() {
            params.insert(name, Tensor::zeros(&shape));
        }
        Ok(Self { config, params, text_table, rotary: Arc::default() })
    }

    /// The same backbone on a device. Its weights are kept in f32 there and computed with in `dtype` (on the CPU f32), so it can be used
    /// and trained.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        let params = self.params.to_mixed(device, dtype)?;
        let text_table = self.text_table.to(device, dtype)?;
        Ok(Self { config: self.config.clone(), params, text_table, rotary: Arc::default() })
    }

    /// Reads what [`Backbone::store`] wrote.
    ///
    /// # Errors
    /// No config in the metadata or one that can't work; missing, unused, wrongly shaped or non-finite tensors.
    pub fn load(checkpoint: &Checkpoint, text_table: Tensor) -> Result<Self> {
        let bad = |what: String| hywu_core::Error::checkpoint(checkpoint.path(), what);
        let text = checkpoint
            .metadata()
            .get(CONFIG_KEY)
            .ok_or_else(|| bad(format!("no `{CONFIG_KEY}` in the metadata: not a backbone")))?;
        let config = serde_json::from_str(text).map_err(|e| bad(format!("metadata `{CONFIG_KEY}`: {e}")))?;
        let mut backbone = Self::zeroed(config, text_table)?;
        backbone.params.load(checkpoint, "")?;
        Ok(backbone)
    }

    /// Adds config and weights (not the text table) to a file.
    ///
    /// # Errors
    /// None in practice: the config is plain numbers.
    pub fn store(&self, writer: &mut TensorWriter, dtype: Dtype) -> Result<()> {
        let config = serde_json::to_string(&self.config).map_err(|e| Error::Invalid(e.to_string()))?;
        writer.meta(CONFIG_KEY, config);
        self.params.store(writer, "", dtype)?;
        Ok(())
    }

    /// Is this a weight of the text tower, which makes tokens of an instruction?
    pub fn in_text_tower(name: &str) -> bool {
        name.starts_with("text") && !name.starts_with("text_pool")
    }

    /// The text tower: `ids` of [`instances`, text_len] tokens -> [instances, text_len, width], zero at the padding
    /// (id 0) after the last token.
    ///
    /// # Errors
    /// A wrong number of ids, or one outside the vocabulary.
    pub fn text_tokens(&self, tape: &Tape, bound: &Bound, ids: &[u32], instances: usize) -> Result<Var> {
        let c = &self.config;
        let (length, width) = (c.text_len, c.width);
        if instances == 0 || ids.len() != instances * length {
            let expected = format!("[{instances} * {length}], at least one instance");
            return Err(hywu_kernels::Error::shape(OP, "text ids", &[ids.len()], expected).into());
        }
        let table = Var::constant(self.text_table.clone());
        let x = embedding(tape, &table, ids, &[instances, length])?;
        let x = linear(tape, &x, bound.get("text_in.weight")?, Some(bound.get("text_in.bias")?))?;
        let row = bound.get("text_position")?.reshape(&[length * width])?;
        let mut x = add_row(tape, &x.reshape(&[instances, length * width])?, &row)?
            .reshape(&[instances, length, width])?;
        let rotary = self.rotary(0, 0)?;
        let call = Call { tape, bound, adapters: &LoraVars::none() };
        // Padding stays out: it is no key of the tower's attention, and zero where the tower ends.
        let lengths = lengths(ids, length);
        for i in 0..c.text_layers {
            let name = format!("{TEXT_LAYERS}{i}");
            x = self.block(&call, &name, &x, &rotary, Sequence::Text(&lengths))?;
        }
        Ok(mask_tokens(tape, &x, &lengths)?)
    }

    /// An instruction as a whole: the mean of its text tokens [instances, text_len, width], brought to unit size.
    ///
    /// # Errors
    /// Tokens of another shape.
    pub fn summary(&self, tape: &Tape, text: &Var) -> Result<Var> {
        Ok(rms_norm(tape, &mean_tokens(tape, text)?, None, EPS, None)?)
    }

    /// Rotary tables: image tokens at (row, column), then text token i at (64 + i, 64 + i).
    fn rotary(&self, rows: usize, columns: usize) -> Result<Rotary> {
        // A panic elsewhere can't leave the map half-changed: every use is a look or an insertion.
        let mut known = self.rotary.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(table) = known.get(&[rows, columns]) {
            return Ok(table.clone());
        }
        let image = (0..rows).flat_map(|y| (0..columns).map(move |x| vec![y as u32, x as u32]));
        let text = (0..self.config.text_len).map(|i| vec![(TEXT_ORIGIN + i) as u32; 2]);
        let positions: Vec<Vec<u32>> = image.chain(text).collect();
        let table = rotary_table(&positions, &[self.config.head_dim / 2; 2])?.to(self.text_table.device())?;
        if known.len() >= MOST_TABLES {
            known.clear();
        }
        known.insert([rows, columns], table.clone());
        Ok(table)
    }

    /// One block: x + gate * attention(norm(x)), then x + gate * mlp(norm(x)); text has no modulation and gates of 1.
    fn block(
        &self,
        call: &Call<'_>,
        name: &str,
        x: &Var,
        rotary: &Rotary,
        sequence: Sequence<'_>,
    ) -> Result<Var> {
        let Call { tape, bound, adapters } = *call;
        let (modulation, lengths) = match sequence {
            Sequence::Image(modulation) => (Some(modulation), None),
            Sequence::Text(lengths) => (None, Some(lengths.to_vec())),
        };
        let weight = |path: &str| bound.get(&format!("{name}.{path}.weight"));
        let lora = |path: &str| adapters.get(&format!("{name}.{path}"));
        let project = |x: &Var, path: &str, shrunk: Option<&Shrunk>| {
            let (weight, lora) = (weight(path)?, lora(path));
            LowRankLinear { x, weight: weight.into(), bias: None, lora, segments: None, shrunk }.forward(tape)
        };
        // Where there is an adapter, what makes x makes its product with the adapter's A too.
        let norm_project = |x: &Var, norm: &str, branch: usize, path: &str| {
            let modulation =
                modulation.map(|m| Modulation { scale: &m[3 * branch], shift: &m[3 * branch + 1] });
            let norm = Some(weight(norm)?);
            let Some(lora) = lora(path) else {
                return project(&rms_norm(tape, x, norm, EPS, modulation)?, path, None);
            };
            let (y, shrunk) = rms_norm_shrink(tape, x, norm, EPS, modulation, &Shrink::by(lora, None))?;
            project(&y, path, Some(&shrunk))
        };
        let swiglu_project = |x: &Var, path: &str| {
            let Some(lora) = lora(path) else { return project(&swiglu(tape, x)?, path, None) };
            let (y, shrunk) = swiglu_shrink(tape, x, &Shrink::by(lora, None))?;
            project(&y, path, Some(&shrunk))
        };
        let residual = |x: &Var, y: &Var, branch: usize| match modulation {
            Some(m) => gated_residual(tape, x, y, &m[3 * branch + 2]),
            None => add(tape, x, y),
        };
        let qkv = norm_project(x, "input_norm", 0, "self_attn.qkv_proj")?;
        let args = Attention { key_lengths: lengths, ..self.attention(x.shape()[0], x.shape()[1], rotary) };
        let qk = QkNorm { q: weight("self_attn.q_norm")?.clone(), k: weight("self_attn.k_norm")?.clone() };
        let y = attention(tape, &args, &qkv, &qkv, &qkv, Some(&qk))?;
        let x = residual(x, &project(&y, "self_attn.o_proj", None)?, 0)?;
        let y = norm_project(&x, "mlp_norm", 1, "mlp.gate_and_up_proj")?;
        let y = swiglu_project(&y, "mlp.down_proj")?;
        Ok(residual(&x, &y, 1)?)
    }

    /// Attention over a fused projection [batch, tokens, q | k | v].
    fn attention(&self, batch: usize, tokens: usize, rotary: &Rotary) -> Attention {
        let (width, head) = (self.config.width, self.config.head_dim);
        let part = |i: usize, parts: usize| Layout {
            offset: i * width,
            batch: [tokens * parts * width, 0],
            token: parts * width,
            head,
        };
        Attention {
            batch: [batch, 1],
            queries: tokens,
            keys: tokens,
            heads: width / head,
            kv_heads: width / head,
            head_dim: head,
            q: part(0, 3),
            k: part(1, 3),
            v: part(2, 3),
            out: part(0, 1),
            out_shape: vec![batch, tokens, width],
            key_lengths: None,
            ragged: None,
            causal: None,
            rotary: Some((rotary.clone(), rotary.clone())),
        }
    }

    /// The shared modulation [batch, 8 * width] (six parts for the blocks, two for the head) of the timesteps and of the
    /// instructions' meaning as a whole, the mean of the text tokens (as in arXiv 2403.03206 section 4).
    fn modulation(&self, call: &Call<'_>, t: &[f32], text: &Var) -> Result<Var> {
        let Call { tape, bound, .. } = *call;
        let project = |x: &Var, name: &str| {
            let weight = |part: &str| bound.get(&format!("{name}.{part}"));
            linear(tape, x, weight("weight")?, Some(weight("bias")?))
        };
        let time = timestep_embedding(t, self.config.width).to(bound.device(), bound.dtype())?;
        let time = project(&Var::constant(time), "time_in")?;
        let text = project(&self.summary(tape, text)?, "text_pool")?;
        let x = silu(tape, &add(tape, &time, &text)?)?;
        Ok(linear(tape, &x, bound.get("time_out.weight")?, Some(bound.get("time_out.bias")?))?)
    }

    /// Batch, height and width of the inputs, after checking every shape.
    fn check_inputs(
        &self,
        [x_t, source, position]: [&Tensor; 3],
        t: &[f32],
        text: &Var,
    ) -> Result<[usize; 3]> {
        let c = &self.config;
        let &[batch, height, width, 3] = source.shape() else {
            return Err(hywu_kernels::Error::shape(
                OP,
                "source",
                source.shape(),
                "[batch, height, width, 3]",
            )
            .into());
        };
        let largest = TEXT_ORIGIN * c.patch;
        let fits = |n: usize| n > 0 && n <= largest && n.is_multiple_of(c.patch);
        if batch == 0 || !fits(height) || !fits(width) {
            let expected = format!(
                "a non-empty batch of pictures with sides that are multiples of {}, up to {largest}",
                c.patch
            );
            return Err(hywu_kernels::Error::shape(OP, "source", source.shape(), expected).into());
        }
        for (what, tensor, channels) in [("x_t", x_t, 3), ("position", position, 2)] {
            let expected = [batch, height, width, channels];
            if tensor.shape() != expected {
                return Err(
                    hywu_kernels::Error::shape(OP, what, tensor.shape(), format!("{expected:?}")).into()
                );
            }
        }
        if t.len() != batch {
            return Err(hywu_kernels::Error::shape(OP, "timesteps", &[t.len()], format!("[{batch}]")).into());
        }
        match *text.shape() {
            [n, l, w] if n > 0 && batch.is_multiple_of(n) && [l, w] == [c.text_len, c.width] => {}
            _ => {
                let expected = format!("[a divisor of {batch}, {}, {}]", c.text_len, c.width);
                return Err(hywu_kernels::Error::shape(OP, "text tokens", text.shape(), expected).into());
            }
        }
        Ok([batch, height, width])
    }

    /// The last hidden states before the final norm, [batch, image tokens + text_len, width], and the shared modulation; arguments
    /// as [`Backbone::predict`].
    ///
    /// # Errors
    /// As [`Backbone::predict`].
    #[allow(clippy::too_many_arguments)]
    pub fn hidden(
        &self,
        tape: &Tape,
        bound: &Bound,
        x_t: &Tensor,
        source: &Tensor,
        position: &Tensor,
        t: &[f32],
        text: &Var,
        adapters: &LoraVars,
    ) -> Result<(Var, Var)> {
        let [batch, height, width] = self.check_inputs([x_t, source, position], t, text)?;
        self.check_adapters(adapters, batch)?;
        let c = &self.config;
        let call = Call { tape, bound, adapters };
        let [x_t, source, position] = [x_t, source, position].map(|x| placed(bound, x, bound.dtype()));
        let input = concat_channels(tape, &[&x_t?, &source?, &position?])?;
        let patches = patchify(tape, &input, c.patch)?;
        let image = linear(tape, &patches, bound.get("patch_in.weight")?, Some(bound.get("patch_in.bias")?))?;
        let repeated;
        let text = if text.shape()[0] == batch {
            text
        } else {
            repeated = repeat_each(tape, text, batch / text.shape()[0])?;
            &repeated
        };
        let mut x = concat_tokens(tape, &[&image, text])?;
        let rotary = self.rotary(height / c.patch, width / c.patch)?;
        let modulation = self.modulation(&call, t, text)?;
        let shared = slice_channels(tape, &modulation, 0, 6 * c.width)?;
        for i in 0..c.layers {
            let name = format!("{LAYERS}{i}");
            let all = add_row(tape, &shared, bound.get(&format!("{name}.modulation"))?)?;
            let part = |j: usize| slice_channels(tape, &all, j * c.width, c.width);
            let own = [part(0)?, part(1)?, part(2)?, part(3)?, part(4)?, part(5)?];
            x = self.block(&call, &name, &x, &rotary, Sequence::Image(&own))?;
        }
        Ok((x, modulation))
    }

    /// The predicted clean picture x_hat [batch, height, width, 3] for any height and width that are multiples of the patch.
    ///
    /// `x_t`, `source` [batch, height, width, 3]; `position` [batch, height, width, 2]: (y, x) of every pixel in the whole
    /// picture, -1..1; `t` per batch entry in [0, 1]; `text` [instances, text_len, width] of [`Backbone::text_tokens`], each
    /// instance serving batch / instances consecutive entries, as an adapter of a batch does.
    ///
    /// # Errors
    /// Shapes that don't fit, or adapters that don't: they must cover the modules of [`Backbone::adapter_spec`], but for those that they
    /// skip, and nothing else.
    #[allow(clippy::too_many_arguments)]
    pub fn predict(
        &self,
        tape: &Tape,
        bound: &Bound,
        x_t: &Tensor,
        source: &Tensor,
        position: &Tensor,
        t: &[f32],
        text: &Var,
        adapters: &LoraVars,
    ) -> Result<Var> {
        // Brought to a device once. The picture itself stays in f32: to round its values to bf16 would show.
        let source = placed(bound, source, Dtype::F32)?;
        let (x, modulation) = self.hidden(tape, bound, x_t, source.value(), position, t, text, adapters)?;
        let (p, w) = (self.config.patch, self.config.width);
        let (height, width) = (source.shape()[1], source.shape()[2]);
        let tokens = (height / p) * (width / p);
        let x = slice_tokens(tape, &x, 0, tokens)?;
        let part = |i: usize| slice_channels(tape, &modulation, i * w, w);
        let modulation = Some(Modulation { scale: &part(6)?, shift: &part(7)? });
        let x = rms_norm(tape, &x, Some(bound.get("norm.weight")?), EPS, modulation)?;
        let x = linear(tape, &x, bound.get("head.weight")?, Some(bound.get("head.bias")?))?;
        let residual = slice_channels(tape, &x, 0, 3 * p * p)?;
        let coef = slice_channels(tape, &x, 3 * p * p, COEFFICIENTS)?;
        let features = cast(tape, &Var::constant(pixel_features(source.value(), p)?), bound.dtype())?;
        let features = patchify(tape, &features, p)?;
        let batch = source.shape()[0];
        let pixels = features.reshape(&[batch, tokens * p * p, FEATURES])?;
        let hidden = linear(tape, &pixels, bound.get("pixel_in.weight")?, None)?;
        let hidden = hidden.reshape(&[batch, tokens, p * p * HIDDEN])?;
        let source = patchify(tape, &source, p)?;
        let change = add(tape, &local_filter(tape, &coef, features.value(), &hidden)?, &residual)?;
        let change = cast(tape, &change, Dtype::F32)?;
        Ok(unpatchify(tape, &add(tape, &change, &source)?, p, height, width)?)
    }

    /// What the generator reads: the backbone's own last hidden states over each view and the text, [instances, 1, length, width],
    /// every channel with the mean and the scale of [`Backbone::calibrate`].
    ///
    /// `views` are [`BackboneConfig::views`] pictures [instances, height, width, 3] each, shown as a whole picture at t = 0 with
    /// x_t = 0; their token sequences follow one another, image tokens pooled as [`BackboneConfig::condition_pool`] says, then text.
    /// `ids` [instances * text_len].
    ///
    /// # Errors
    /// A wrong number of views, or shapes that don't fit.
    pub fn condition(&self, views: &[&Tensor], ids: &[u32]) -> Result<Tensor> {
        let states = self.states(views, ids)?.cast(Dtype::F32)?;
        let (mean, scale) = (self.params.get("condition.mean")?, self.params.get("condition.scale")?);
        Ok(standardise(&states, mean, scale)?)
    }

    /// Measures the mean and the deviation of every channel of the condition over these examples (arguments as
    /// [`Backbone::condition`]), so that it comes out with mean 0 and deviation 1. A transformer's residual stream has a few channels
    /// that are a hundred times as large as the rest and hardly vary ("Massive activations", arXiv 2402.17762); they would drown
    /// in the generator's first norm what tells instances apart.
    ///
    /// # Errors
    /// As [`Backbone::condition`]; a backbone that is not on the CPU.
    pub fn calibrate(&mut self, views: &[&Tensor], ids: &[u32]) -> Result<()> {
        if self.params.device() != Device::Cpu {
            return Err(Error::Invalid("a backbone is calibrated on the CPU; see Backbone::to".into()));
        }
        let states = self.states(views, ids)?.to_host()?;
        let width = self.config.width;
        let count = (states.numel() / width) as f64;
        let (mut mean, mut square) = (vec![0.0f64; width], vec![0.0f64; width]);
        for token in states.data().chunks_exact(width) {
            for (v, (m, s)) in token.iter().zip(mean.iter_mut().zip(&mut square)) {
                *m += f64::from(*v) / count;
                *s += f64::from(*v) * f64::from(*v) / count;
            }
        }
        for (name, tensor) in self.params.iter_mut() {
            let values = mean.iter().zip(&square).zip(tensor.data_mut());
            match name {
                "condition.mean" => values.for_each(|((m, _), out)| *out = *m as f32),
                "condition.scale" => values.for_each(|((m, s), out)| {
                    *out = (1.0 / (s - m * m).max(1e-12).sqrt()) as f32;
                }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Image tokens in squares of [`BackboneConfig::condition_pool`] become their mean; the text after them stays.
    fn pooled(&self, tape: &Tape, states: &Var, rows: usize, columns: usize) -> Result<Var> {
        let (p, width, count) = (self.config.condition_pool, self.config.width, states.shape()[0]);
        if p == 1 {
            return Ok(states.clone());
        }
        let image = slice_tokens(tape, states, 0, rows * columns)?.reshape(&[count, rows, columns, width])?;
        let squares = patchify(tape, &image, p)?;
        let tokens = squares.shape()[1];
        let means = mean_tokens(tape, &squares.reshape(&[count * tokens, p * p, width])?)?;
        let text = slice_tokens(tape, states, rows * columns, states.shape()[1] - rows * columns)?;
        Ok(concat_tokens(tape, &[&means.reshape(&[count, tokens, width])?, &text])?)
    }

    /// The condition as the blocks leave it.
    fn states(&self, views: &[&Tensor], ids: &[u32]) -> Result<Tensor> {
        let wanted = self.config.views();
        if views.len() != wanted {
            return Err(Error::Invalid(format!("the condition reads {wanted} views, got {}", views.len())));
        }
        let tape = Tape::inference();
        let bound = self.params.bind(&tape, false)?;
        let instances = views[0].shape().first().copied().unwrap_or(0);
        let text = self.text_tokens(&tape, &bound, ids, instances)?;
        // Views of one size go through together, those of an instance one after the other.
        let see = |views: &[&Tensor]| {
            let &[n, height, width, 3] = views[0].shape() else {
                let expected = "[instances, height, width, 3]";
                return Err(hywu_kernels::Error::shape(OP, "view", views[0].shape(), expected).into());
            };
            if n != instances {
                let expected = format!("{instances} instances");
                return Err(hywu_kernels::Error::shape(OP, "view", views[0].shape(), expected).into());
            }
            let line = |view: &&Tensor| {
                Ok(placed(&bound, view, bound.dtype())?.reshape(&[n, 1, height * width * 3])?)
            };
            let lines = views.iter().map(line).collect::<Result<Vec<Var>>>()?;
            let (all, count) = (concat_tokens(&tape, &lines.iter().collect::<Vec<_>>())?, n * views.len());
            let all = all.value().reshape(&[count, height, width, 3])?;
            let x_t = all.zeros_like(all.shape())?;
            let position = placed(&bound, &whole_positions(height, width), bound.dtype())?;
            let (position, t) = (repeat_each(&tape, &position, count)?, vec![0.0; count]);
            let none = LoraVars::none();
            let (states, _) = self.hidden(&tape, &bound, &x_t, &all, position.value(), &t, &text, &none)?;
            let states =
                self.pooled(&tape, &states, height / self.config.patch, width / self.config.patch)?;
            Ok(states.reshape(&[n, views.len() * states.shape()[1], self.config.width])?)
        };
        let alike = views.chunk_by(|a, b| a.shape() == b.shape());
        let states = alike.map(see).collect::<Result<Vec<Var>>>()?;
        let states = concat_tokens(&tape, &states.iter().collect::<Vec<_>>())?;
        let shape = [instances, 1, states.shape()[1], self.config.width];
        Ok(states.value().reshape(&shape)?)
    }
}

/// An input where the weights are, in `dtype`.
fn placed(bound: &Bound, x: &Tensor, dtype: Dtype) -> Result<Var> {
    Ok(Var::constant(x.to(bound.device(), dtype)?))
}

/// Coordinate of the centre of pixel `i` of `n`: -1 at one edge of the picture, 1 at the other.
pub fn pixel_position(i: usize, n: usize) -> f32 {
    (2 * i + 1) as f32 / n as f32 - 1.0
}

/// (y, x) of every pixel of a whole picture: [1, height, width, 2].
fn whole_positions(height: usize, width: usize) -> Tensor {
    Tensor::build(&[1, height, width, 2], |out| {
        for (i, pixel) in out.chunks_exact_mut(2).enumerate() {
            let (y, x) = (i / width, i % width);
            pixel.copy_from_slice(&[pixel_position(y, height), pixel_position(x, width)]);
        }
    })
}
