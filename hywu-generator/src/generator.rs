use crate::{GeneratorConfig, Result, config::Shape, mixing::Tables};
use hywu_core::{
    Adapter, AdapterSpec, Checkpoint, Dtype, Error, Philox, TensorWriter, replace_folder_atomic, write_atomic,
};
use hywu_kernels::{
    Bound, Device, LoraVars, ParamSet, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Rotary, attention},
        elementwise::add,
        low_rank_linear::linear,
        parameter_tokens::{detokenise, repeat_batch, split_tokens, token_grid},
        rms_norm::rms_norm,
        swiglu::silu,
    },
};
use std::{
    path::Path,
    sync::{Arc, Mutex},
};

/// Added to the mean square in every norm.
pub(crate) const EPS: f32 = 1e-6;

/// Files of a generator's folder.
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

/// The config and the checkpoint of a folder.
///
/// # Errors
/// A missing or damaged one; [`Error::Checkpoint`] when the folder was replaced meanwhile.
pub(crate) fn open_folder(folder: &Path) -> Result<(GeneratorConfig, Checkpoint)> {
    let read = || GeneratorConfig::read(folder.join(CONFIG));
    let (config, checkpoint) = (read()?, Checkpoint::open(folder)?);
    // The checkpoint holds its files open. Between two readings of one config they are that config's.
    if read()? != config {
        return Err(Error::checkpoint(folder, "the folder was replaced while it was read; try again").into());
    }
    Ok((config, checkpoint))
}

/// The parameter generator (FORMAT.md): condition in, adapter out.
pub struct Generator {
    /// Sizes and map.
    pub config: GeneratorConfig,
    /// The weights, under their published names.
    pub params: ParamSet,
    spec: AdapterSpec,
    shape: Shape,
    /// Rotary tables of the last pass.
    rotary: Mutex<Option<(Device, usize, Arc<Rotaries>)>>,
}

/// Those that don't depend on the condition, and that of its keys.
type Rotaries = (Tables, Rotary);

impl Generator {
    /// A fresh generator whose adapters are no-ops (lora_b = 0) with lora_a of the usual size (standard deviation
    /// in^-1/2, with the widest module's input width for all).
    ///
    /// # Errors
    /// A bad config, or one whose weights don't fit in memory.
    pub fn new(config: GeneratorConfig, seed: u64) -> Result<Self> {
        let params = ParamSet::zeros(&config.weights()?)?;
        let mut this = Self::with(config, params)?;
        let (spec, c) = (this.spec.clone(), this.shape.c as f32);
        let blocks = this.config.num_pg_layers as f32;
        let widest = spec.modules.iter().map(|m| m.in_dim).max().unwrap_or(1) as f32;
        let philox = Philox::new(seed);
        for (stream, (name, tensor)) in this.params.iter_mut().enumerate() {
            let fan_in = tensor.dim_back(1) as f32;
            let deviation = match name {
                n if n.contains("norm") => {
                    tensor.data_mut().fill(1.0);
                    continue;
                }
                n if n.contains("proj_out_B") => 0.0,
                "model.proj_out_A.weight" => (c * widest).powf(-0.5),
                n if n.ends_with(".bias") => 0.0,
                // A norm follows, so the size is free; small codes learn faster.
                n if n.contains("_pos") => 0.1,
                // The ends of residual branches start small, so that depth does not blow up the sum.
                // Attention starts out as the mean of all the condition's tokens, in which most of what tells instances apart
                // cancels. At the size of the other branches adapters would be 92 % alike, and skills would be learnt as one.
                n if n.contains("self_attn_cross.W_o") => 2.0 * (fan_in * blocks).powf(-0.5),
                n if n.contains("W_o") || n.contains("fc2") => (fan_in * 4.0 * blocks).powf(-0.5),
                _ => fan_in.powf(-0.5),
            };
            let data = tensor.data_mut();
            philox.fill_normal(stream as u64, 0, data);
            data.iter_mut().for_each(|v| *v *= deviation);
        }
        Ok(this)
    }

    pub(crate) fn with(config: GeneratorConfig, params: ParamSet) -> Result<Self> {
        let (spec, shape) = config.sizes()?;
        Ok(Self { config, params, spec, shape, rotary: Mutex::default() })
    }

    /// Reads a folder with `config.json` and the weights (one file or shards; f32, f16 or bf16).
    ///
    /// # Errors
    /// Anything missing, damaged, unused, of the wrong shape or not finite.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let (config, checkpoint) = open_folder(folder.as_ref())?;
        Self::from_checkpoint(config, &checkpoint)
    }

    /// Takes the weights of `checkpoint`.
    ///
    /// # Errors
    /// A bad config; weights that are missing, unused, of the wrong shape, not finite or too large for the memory.
    pub fn from_checkpoint(config: GeneratorConfig, checkpoint: &Checkpoint) -> Result<Self> {
        let params = ParamSet::from_checkpoint(&config.weights()?, checkpoint, "")?;
        Self::with(config, params)
    }

    /// Writes a folder with `config.json` and `model.safetensors`. It appears whole, in place of an older one if there is one.
    ///
    /// # Errors
    /// A folder that can't be written, or that holds something else; it is then as it was.
    pub fn save(&self, folder: impl AsRef<Path>, dtype: Dtype) -> Result<()> {
        replace_folder_atomic(folder, &[CONFIG, WEIGHTS], |folder| {
            let text = serde_json::to_vec_pretty(&self.config).map_err(|e| Error::Config(e.to_string()))?;
            write_atomic(folder.join(CONFIG), |w| w.write_all(&text))?;
            let mut writer = TensorWriter::new();
            self.params.store(&mut writer, "", dtype)?;
            Ok(writer.write(folder.join(WEIGHTS))?)
        })
    }

    /// The same generator on a device, its weights kept and computed with in `dtype` (on the CPU f32).
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        Self::with(self.config.clone(), self.params.to(device, dtype)?)
    }

    /// The same generator on a device, to be trained there: weights kept in f32, computed with in `dtype` (on the CPU f32).
    ///
    /// # Errors
    /// As [`Generator::to`].
    pub fn to_mixed(&self, device: Device, dtype: Dtype) -> Result<Self> {
        Self::with(self.config.clone(), self.params.to_mixed(device, dtype)?)
    }

    /// The modules that it writes an adapter for.
    pub fn spec(&self) -> &AdapterSpec {
        &self.spec
    }

    /// The adapter of a condition [b, 1, L, input_dim] or [b, L, input_dim], on the host.
    ///
    /// The weights may be others at the next call, so nothing is kept for it. For many conditions with the same weights there is
    /// [`Generator::inference`], with [`Inference::keeping_start`](crate::Inference::keeping_start).
    ///
    /// # Errors
    /// A condition of another shape, or with NaN or infinity; [`Error::Memory`](crate::Error::Memory) when it needs more than is free.
    pub fn generate(&self, condition: &Tensor) -> Result<Adapter> {
        self.inference()?.generate(condition)
    }

    /// The same on a tape, with the weights as `bound` there (FORMAT.md section 4).
    ///
    /// # Errors
    /// A condition of another shape.
    pub fn forward(&self, tape: &Tape, bound: &Bound, condition: &Tensor) -> Result<LoraVars> {
        let (d, n) = (self.config.d_model, self.config.num_base_model_layers);
        let Shape { a, t, s, c, .. } = self.shape;
        let (b, l) = self.config.batch_and_length(condition.shape())?;
        let rotaries = self.rotaries(l, bound.device())?;
        let (tables, keys) = &*rotaries;
        let norm =
            |x: &Var, name: &str| rms_norm(tape, x, Some(bound.get(&format!("{name}.weight"))?), EPS, None);
        let dense = |x: &Var, name: &str| {
            let (w, bias) = (bound.get(&format!("{name}.weight"))?, bound.get(&format!("{name}.bias"))?);
            linear(tape, x, w, Some(bias))
        };
        let input = condition.to(bound.device(), bound.dtype())?.reshape(&[b, l, self.config.input_dim])?;
        let input = Var::constant(input);
        let e = norm(&dense(&input, "hidden_in")?, "model.norm_input")?;
        let (hw, layer) = (bound.get("model.hw_pos.weight")?, bound.get("model.layer_pos.weight")?);
        let grid = token_grid(tape, hw, layer, self.config.dim_accumulation)?;
        let mut x = repeat_batch(tape, &norm(&grid, "model.norm_tokens")?, b)?;
        for i in 0..self.config.num_pg_layers {
            let block = format!("model.blocks.{i}");
            for (index, kind) in ["self_attn_n", "self_attn_hw", "self_attn_cross"].into_iter().enumerate() {
                let h = norm(&x, &format!("{block}.norm{}", index + 1))?;
                let memory = if index == 2 { &e } else { &h };
                let q = dense(&h, &format!("{block}.{kind}.W_q"))?;
                let k = dense(memory, &format!("{block}.{kind}.W_k"))?;
                let v = dense(memory, &format!("{block}.{kind}.W_v"))?;
                let args = self.mixing(index, b, l, tables, keys);
                let mixed = attention(tape, &args, &q, &k, &v, None)?.reshape(&[b, n, s, d])?;
                x = add(tape, &x, &dense(&mixed, &format!("{block}.{kind}.W_o"))?)?;
            }
            let h = norm(&x, &format!("{block}.norm4"))?;
            let h = silu(tape, &dense(&h, &format!("{block}.feed_forward.fc1"))?)?;
            x = add(tape, &x, &dense(&h, &format!("{block}.feed_forward.fc2"))?)?;
        }
        debug_assert_eq!(x.shape(), [b, n, s, d]);
        let rows = norm(&x, "model.norm_final")?.reshape(&[b, n, t, self.config.rank, c])?;
        let (rows_a, rows_b) = split_tokens(tape, &rows, a)?;
        let (a, b) = (dense(&rows_a, "model.proj_out_A")?, dense(&rows_b, "model.proj_out_B")?);
        Ok(detokenise(tape, &self.spec, &a, &b)?)
    }

    /// The rotary tables for a condition of l tokens on a device: every step of a training run needs the same.
    fn rotaries(&self, l: usize, device: Device) -> Result<Arc<Rotaries>> {
        // A panic elsewhere can't leave it half-changed.
        let mut kept = self.rotary.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((at, length, tables)) = &*kept
            && (*at, *length) == (device, l)
        {
            return Ok(tables.clone());
        }
        let tables = Tables::new(&self.config, self.shape, device)?;
        let made = Arc::new((tables, Tables::keys(&self.config, self.shape, l, device)?));
        *kept = Some((device, l, made.clone()));
        Ok(made)
    }

    /// The three attentions of a block on [b, N, S, d]: over layers, over a layer's positions, to the condition [b, L, d]. None needs a
    /// transposed copy.
    fn mixing(&self, index: usize, b: usize, l: usize, tables: &Tables, keys: &Rotary) -> Attention {
        let (config, s) = (&self.config, self.shape.s);
        let (n, d) = (config.num_base_model_layers, config.d_model);
        match index {
            0 => {
                let rows = config.rows(0, [n * s * d, d], s * d);
                config.mixing([b, s], [n; 2], [rows; 2], [&tables.layer; 2])
            }
            1 => {
                let rows = config.rows(0, [n * s * d, s * d], d);
                config.mixing([b, n], [s; 2], [rows; 2], [&tables.token; 2])
            }
            _ => {
                let rows = [n * s, l].map(|tokens| config.rows(0, [tokens * d, 0], d));
                config.mixing([b, 1], [n * s, l], rows, [&tables.queries, keys])
            }
        }
    }
}
