//! The pass itself (FORMAT.md section 4), part by part.

use super::{Inference, LayerTokens, Progress};
use crate::{Error, Result, generator::EPS, mixing::Tables, size::Cost};
use hywu_core::Dtype;
use hywu_kernels::{
    Bound, Device, Event, Tape, Tensor, Var,
    ops::{
        attention::{Attention, Rotary, attention},
        elementwise::slice_tokens,
        low_rank_linear::linear,
        parameter_tokens::token_grid,
        residual::{Runs, Stream},
        rms_norm::rms_norm,
        swiglu::silu,
    },
};
use std::ops::{ControlFlow, Range};

/// A part of the weights, in the order of their use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// What makes tokens and reads the condition.
    Start,
    /// Of a block, its sub-layer 0..4: attention over layers, inside a layer, to the condition, feed-forward.
    Sublayer(usize, usize),
    /// What writes the tokens.
    End,
}

/// Names of a block's sub-layers.
const SUBLAYERS: [&str; 4] = ["self_attn_n", "self_attn_hw", "self_attn_cross", "feed_forward"];

impl Part {
    /// Tells its weights by their names.
    pub fn owns(self) -> impl Fn(&str) -> bool {
        let prefixes = self.prefixes();
        move |name| prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }
    /// What their names start with.
    fn prefixes(self) -> Vec<String> {
        match self {
            Self::Start => {
                ["hidden_in", "model.norm_input", "model.norm_tokens", "model.hw_pos", "model.layer_pos"]
                    .map(|name| format!("{name}."))
                    .to_vec()
            }
            Self::Sublayer(block, index) => {
                let block = format!("model.blocks.{block}");
                vec![format!("{block}.{}.", SUBLAYERS[index]), format!("{block}.norm{}.", index + 1)]
            }
            Self::End => ["model.norm_final.", "model.proj_out_"].map(String::from).to_vec(),
        }
    }
}

/// Runs of nearly equal length, at most `most` long, that make up 0..total.
fn even(total: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = total.div_ceil(most.max(1));
    (0..count).map(move |i| i * total / count..(i + 1) * total / count)
}

/// A part's weights at work.
struct Layers<'a> {
    bound: &'a Bound,
    tape: Tape,
    prefix: String,
}

impl<'a> Layers<'a> {
    fn new(bound: &'a Bound, prefix: String) -> Self {
        Self { bound, tape: Tape::inference(), prefix }
    }
    fn weight(&self, name: &str) -> Result<&Var> {
        Ok(self.bound.get(&format!("{}{name}", self.prefix))?)
    }
    fn dense(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (w, bias) = (self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?);
        Ok(linear(&self.tape, &Var::constant(x.clone()), w, Some(bias))?.value().clone())
    }
    fn norm(&self, stream: &mut Stream, runs: Runs, name: &str) -> Result<Tensor> {
        Ok(stream.read(runs, self.weight(&format!("{name}.weight"))?.value(), EPS)?)
    }
    fn attention(&self, args: &Attention, q: Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let [q, k, v] = [&q, k, v].map(|x| Var::constant(x.clone()));
        Ok(attention(&self.tape, args, &q, &k, &v, None)?.value().clone())
    }
}

/// A pass on its way.
struct Pass<'a> {
    of: &'a Inference,
    batch: usize,
    length: usize,
    /// Rows at a time of every sub-layer.
    rows: [usize; 4],
    keys: Rotary,
    cost: Cost,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Work that was given out, in FLOPs, of how much.
    given: f64,
    total: f64,
    /// A point in a device's work, and what was given out before it.
    mark: Option<(Event, f64)>,
}

impl Inference {
    /// Runs a pass: the tokens of every instance and layer go to `sink`, in order, as soon as they are there. `condition` is
    /// [b, 1, L, input_dim] or [b, L, input_dim]; `progress` hears of every piece of work when it is done, on a device of every block.
    ///
    /// # Errors
    /// A condition of another shape, or with NaN or infinity; [`Error::Memory`] when it needs more than the limits; weights of a
    /// streamed checkpoint that are not finite; [`Error::Interrupted`] when `progress` breaks; those of `sink` and of the device.
    pub fn each_layer(
        &self,
        condition: &Tensor,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
        sink: &mut dyn FnMut(LayerTokens) -> Result<()>,
    ) -> Result<()> {
        let (batch, length) = self.config.batch_and_length(condition.shape())?;
        if let Some(bad) = condition.to_host()?.data().iter().find(|x| !x.is_finite()) {
            return Err(Error::Condition(format!("it holds {bad}")));
        }
        let (device, dtype) = (self.weights.device(), self.weights.dtype());
        let cost = Cost::new(&self.config, self.shape, length);
        // Of block 0, what does not depend on the condition: once, or not at all.
        let (first, kept) = (cost.sublayers[0] + cost.sublayers[1], self.kept_start());
        let repeated = if kept.is_some() { batch } else { batch - 1 };
        let total = batch as f64 * cost.all() - repeated as f64 * first;
        let mut pass = Pass {
            of: self,
            batch,
            length,
            rows: self.rows(batch, length)?,
            keys: Tables::keys(&self.config, self.shape, length, device)?,
            cost,
            progress,
            given: 0.0,
            total,
            mark: None,
        };
        let condition = condition.to(device, dtype)?.reshape(&[batch, length, self.config.input_dim])?;
        let blocks = self.config.num_pg_layers;
        let weights = self.weights.part(Part::Start)?;
        let after = if kept.is_some() { Part::Sublayer(0, 2) } else { Part::Sublayer(0, 0) };
        self.weights.expect(after)?;
        let e = pass.read_condition(&weights, condition)?;
        let mut stream = match kept {
            Some(kept) => Stream::repeated(kept, batch)?,
            None => pass.tokens(&weights)?,
        };
        self.weights.send()?;
        drop(weights);
        if kept.is_none() {
            stream = pass.start(stream)?;
        }
        for (block, index) in (0..blocks).flat_map(|i| (0..4).map(move |j| (i, j))).skip(2) {
            let last = block + 1 == blocks && index == 3;
            let next = match index {
                _ if last => Part::End,
                3 => Part::Sublayer(block + 1, 0),
                _ => Part::Sublayer(block, index + 1),
            };
            pass.sublayer(block, index, next, &mut stream, &e)?;
            if index == 3 {
                pass.mark()?;
            }
        }
        drop(e);
        let weights = self.weights.part(Part::End)?;
        pass.write(&weights, &mut stream, sink)?;
        pass.finish()
    }

    fn kept_start(&self) -> Option<&Tensor> {
        self.start.as_ref()?.get()
    }
}

impl Pass<'_> {
    /// Counts work, which the CPU has done; a device has only been given it, see [`Pass::mark`].
    fn count(&mut self, flops: f64) -> Result<()> {
        self.given += flops;
        match self.of.weights.device() {
            Device::Cpu => self.report(self.given),
            Device::Cuda(_) => Ok(()),
        }
    }
    /// Tells of work that is done, and asks whether to go on.
    fn report(&mut self, done: f64) -> Result<()> {
        match (self.progress)(Progress { done, total: self.total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }
    /// Waits until a device has come to the mark before, and sets the next. So it always has the work between two marks to go on with,
    /// and never so much more that its end could not be waited for.
    fn mark(&mut self) -> Result<()> {
        let Some(event) = self.of.weights.device().event()? else { return Ok(()) };
        match self.mark.replace((event, self.given)) {
            Some(before) => self.reach(before),
            None => Ok(()),
        }
    }
    /// Waits until a device has done all.
    fn finish(&mut self) -> Result<()> {
        self.mark.take().map_or(Ok(()), |last| self.reach(last))
    }
    fn reach(&mut self, (event, given): (Event, f64)) -> Result<()> {
        event.wait()?;
        self.report(given)
    }
    /// Rows of the stream of an instance.
    fn places(&self) -> usize {
        self.of.config.num_base_model_layers * self.of.shape.s
    }

    /// The condition [b, L, input_dim] as the blocks read it, [b, L, d].
    fn read_condition(&mut self, weights: &Bound, condition: Tensor) -> Result<Tensor> {
        let layers = Layers::new(weights, String::new());
        let e = Var::constant(layers.dense(&condition, "hidden_in")?);
        let e = rms_norm(&layers.tape, &e, Some(layers.weight("model.norm_input.weight")?), EPS, None)?;
        self.count(self.batch as f64 * self.cost.condition)?;
        Ok(e.value().clone())
    }

    /// The stream of one instance at first, in f32 from the start.
    fn tokens(&self, weights: &Bound) -> Result<Stream> {
        let (config, s) = (&self.of.config, self.of.shape.s);
        let (n, d) = (config.num_base_model_layers, config.d_model);
        let layers = Layers::new(weights, String::new());
        let wide =
            |name: &str| -> Result<Var> { Ok(Var::constant(layers.weight(name)?.value().cast(Dtype::F32)?)) };
        let (hw, layer) = (wide("model.hw_pos.weight")?, wide("model.layer_pos.weight")?);
        let norm = wide("model.norm_tokens.weight")?;
        let layer = layer.reshape(&[1, n, self.of.shape.c])?;
        let mut stream = Stream::zeros(weights.device(), n * s, d)?;
        for i in 0..n {
            let of_layer = slice_tokens(&layers.tape, &layer, i, 1)?.reshape(&[1, self.of.shape.c])?;
            let grid = token_grid(&layers.tape, &hw, &of_layer, config.dim_accumulation)?;
            let grid = rms_norm(&layers.tape, &grid.reshape(&[s, d])?, Some(&norm), EPS, None)?;
            stream.add(Runs::of(i * s..(i + 1) * s), grid.value())?;
        }
        Ok(stream)
    }

    /// The stream of the whole batch after the two sub-layers that no condition changes, from that of one instance before them.
    fn start(&mut self, mut stream: Stream) -> Result<Stream> {
        let batch = std::mem::replace(&mut self.batch, 1);
        for index in 0..2 {
            // These two don't look at a condition.
            self.sublayer(0, index, Part::Sublayer(0, index + 1), &mut stream, &Tensor::scalar(0.0))?;
        }
        self.batch = batch;
        match &self.of.start {
            Some(kept) => {
                let value = stream.into_value()?;
                Ok(Stream::repeated(kept.get_or_init(|| value), batch)?)
            }
            None if batch > 1 => Ok(Stream::repeated(stream.value()?, batch)?),
            None => Ok(stream),
        }
    }

    /// A sub-layer of a block; the weights of the next part come meanwhile.
    fn sublayer(
        &mut self,
        block: usize,
        index: usize,
        next: Part,
        stream: &mut Stream,
        e: &Tensor,
    ) -> Result<()> {
        let weights = self.of.weights.part(Part::Sublayer(block, index))?;
        self.of.weights.expect(next)?;
        let layers = Layers::new(&weights, format!("model.blocks.{block}."));
        match index {
            0 => self.over_layers(&layers, stream)?,
            1 => self.inside_layers(&layers, stream)?,
            2 => self.over_condition(&layers, stream, e)?,
            _ => self.feed_forward(&layers, stream)?,
        }
        self.of.weights.send()
    }

    /// Self-attention of some rows, and what becomes of it.
    fn attend(
        &mut self,
        layers: &Layers<'_>,
        stream: &mut Stream,
        runs: Runs,
        kind: usize,
        args: &Attention,
    ) -> Result<()> {
        let name = SUBLAYERS[kind];
        let h = layers.norm(stream, runs, &format!("norm{}", kind + 1))?;
        let [q, k, v] = ["W_q", "W_k", "W_v"].map(|w| layers.dense(&h, &format!("{name}.{w}")));
        drop(h);
        let mixed = layers.attention(args, q?, &k?, &v?)?;
        stream.add(runs, &layers.dense(&mixed, &format!("{name}.W_o"))?)?;
        let share = runs.rows() as f64 / self.places() as f64;
        self.count(share * self.cost.sublayers[kind])
    }

    /// Sub-layer 1: a sequence is a position in all layers, a stride of S rows apart.
    fn over_layers(&mut self, layers: &Layers<'_>, stream: &mut Stream) -> Result<()> {
        let (b, n, s, d) =
            (self.batch, self.of.config.num_base_model_layers, self.of.shape.s, self.of.config.d_model);
        for part in even(s, self.rows[0] / (b * n)) {
            let runs = Runs { first: part.start, count: b * n, length: part.len(), pitch: s };
            let rows = self.of.config.rows(0, [n * part.len() * d, d], part.len() * d);
            let args = self.of.config.mixing([b, part.len()], [n; 2], [rows; 2], [&self.of.tables.layer; 2]);
            self.attend(layers, stream, runs, 0, &args)?;
        }
        Ok(())
    }

    /// Sub-layer 2: a sequence is a layer.
    fn inside_layers(&mut self, layers: &Layers<'_>, stream: &mut Stream) -> Result<()> {
        let (s, d) = (self.of.shape.s, self.of.config.d_model);
        for part in even(self.batch * self.of.config.num_base_model_layers, self.rows[1] / s) {
            let rows = self.of.config.rows(0, [s * d, 0], d);
            let args = self.of.config.mixing([part.len(), 1], [s; 2], [rows; 2], [&self.of.tables.token; 2]);
            self.attend(layers, stream, Runs::of(part.start * s..part.end * s), 1, &args)?;
        }
        Ok(())
    }

    /// Sub-layer 3: all rows of an instance read its condition.
    fn over_condition(&mut self, layers: &Layers<'_>, stream: &mut Stream, e: &Tensor) -> Result<()> {
        let (d, l, places) = (self.of.config.d_model, self.length, self.places());
        let name = SUBLAYERS[2];
        let k = layers.dense(e, &format!("{name}.W_k"))?;
        let v = layers.dense(e, &format!("{name}.W_v"))?;
        // Several instances, or a part of one.
        for entries in even(self.batch, self.rows[2] / places) {
            for part in even(places, self.rows[2]) {
                let runs = Runs {
                    first: entries.start * places + part.start,
                    count: entries.len(),
                    length: part.len(),
                    pitch: places,
                };
                let q = layers.dense(&layers.norm(stream, runs, "norm3")?, &format!("{name}.W_q"))?;
                let rows = self.of.config.rows(0, [part.len() * d, 0], d);
                let keys = self.of.config.rows(entries.start * l * d, [l * d, 0], d);
                let tables = [&self.of.tables.queries.rows(part.clone())?, &self.keys];
                let args = self.of.config.mixing([entries.len(), 1], [part.len(), l], [rows, keys], tables);
                let mixed = layers.attention(&args, q, &k, &v)?;
                stream.add(runs, &layers.dense(&mixed, &format!("{name}.W_o"))?)?;
                self.count(runs.rows() as f64 / places as f64 * self.cost.sublayers[2])?;
            }
        }
        Ok(())
    }

    /// Sub-layer 4: every row alone.
    fn feed_forward(&mut self, layers: &Layers<'_>, stream: &mut Stream) -> Result<()> {
        let places = self.places();
        for part in even(self.batch * places, self.rows[3]) {
            let runs = Runs::of(part);
            let hidden = layers.dense(&layers.norm(stream, runs, "norm4")?, "feed_forward.fc1")?;
            let hidden = silu(&layers.tape, &Var::constant(hidden))?;
            stream.add(runs, &layers.dense(hidden.value(), "feed_forward.fc2")?)?;
            self.count(runs.rows() as f64 / places as f64 * self.cost.sublayers[3])?;
        }
        Ok(())
    }

    /// Writes the tokens of every instance and layer.
    fn write(
        &mut self,
        weights: &Bound,
        stream: &mut Stream,
        sink: &mut dyn FnMut(LayerTokens) -> Result<()>,
    ) -> Result<()> {
        let layers = Layers::new(weights, "model.".into());
        let (config, shape) = (&self.of.config, self.of.shape);
        let (n, r, p) = (config.num_base_model_layers, config.rank, config.output_dim);
        for i in 0..self.batch * n {
            let h = layers.norm(stream, Runs::of(i * shape.s..(i + 1) * shape.s), "norm_final")?;
            let h = Var::constant(h.reshape(&[1, shape.t, r * shape.c])?);
            let project = |start: usize, tokens: usize, name: &str| -> Result<Tensor> {
                let rows = slice_tokens(&layers.tape, &h, start, tokens)?.reshape(&[tokens * r, shape.c])?;
                Ok(layers.dense(rows.value(), name)?.reshape(&[tokens, r, p])?)
            };
            let a = project(0, shape.a, "proj_out_A")?;
            let b = project(shape.a, shape.t - shape.a, "proj_out_B")?;
            sink(LayerTokens { instance: i / n, layer: i % n, a, b })?;
            self.count(self.cost.output / n as f64)?;
            self.mark()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::even;

    #[test]
    fn lots_are_even_and_cover_all() {
        for (total, most) in [(1, 1), (10, 3), (10, 10), (10, 11), (176_512, 4096), (5516, 1), (7, 0)] {
            let parts: Vec<_> = even(total, most).collect();
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, total));
            assert!(parts.windows(2).all(|p| p[0].end == p[1].start));
            let lengths = || parts.iter().map(|p| p.len());
            let (least, longest) = (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0));
            assert!(longest <= most.max(1) && least + 1 >= longest, "{total} {most}: {parts:?}");
            // So kernels that are chosen by the number of rows are the same for all numbers of lots.
            assert!(parts.len() == 1 || 2 * least >= most, "{total} {most}: {parts:?}");
        }
    }
}
