//! How a call is timed. PyTorch's side (`peer/torch_peer.py`) follows the same rules.

use crate::{Result, normal};
use hywu_core::Dtype;
use hywu_kernels::{
    Device, Event, Tape, Tensor, Var,
    ops::{elementwise::scale, noise::noise_window},
};
use std::time::Instant;

/// Inputs and outputs of consecutive calls add up to more than this: three times the L2 cache of an H200.
const ROTATED_BYTES: f64 = 3.0 * 60e6;
/// Most copies of the inputs.
const MOST_COPIES: usize = 64;
/// A sample lasts at least this long, so that the clock's resolution (0.5 us) does not count.
const SAMPLE_MS: f64 = 0.2;
/// Bound on the time that all samples of a case take, and of one among many ([`Bench::shorter`]).
const CASE_MS: [f64; 2] = [1500.0, 100.0];
/// Calls before the samples.
const WARM_UP: [usize; 2] = [10, 3];

/// Where cases run, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// The device.
    pub device: Device,
    /// Few calls of small shapes: shows that everything runs, not how fast.
    pub quick: bool,
    /// One case of many, each of which gets less time.
    short: bool,
}

/// Milliseconds a call.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median over the samples.
    pub median: f64,
    /// A tenth of the samples is faster.
    pub p10: f64,
    /// A tenth of the samples is slower.
    pub p90: f64,
    /// Number of samples.
    pub samples: usize,
    /// Calls in a sample.
    pub calls: usize,
    /// Copies of the inputs that took turns.
    pub copies: usize,
}

impl Times {
    fn of(mut samples: Vec<f64>, calls: usize, copies: usize) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |part: f64| samples[(part * (samples.len() - 1) as f64).round() as usize];
        let median = samples[samples.len() / 2];
        Self { median, p10: at(0.1), p90: at(0.9), samples: samples.len(), calls, copies }
    }
}

impl Bench {
    /// For a device.
    pub fn new(device: Device, quick: bool) -> Self {
        Self { device, quick, short: false }
    }

    /// The same with less time for a case.
    pub fn shorter(self) -> Self {
        Self { short: true, ..self }
    }

    /// What is computed in: bf16 on a CUDA device, f32 on the CPU.
    pub fn dtype(&self) -> Dtype {
        if self.device == Device::Cpu { Dtype::F32 } else { Dtype::Bf16 }
    }

    /// Random normal values times `factor`, where the cases run. A device draws them itself: gigabytes would take long to be sent.
    ///
    /// # Errors
    /// Those of the device.
    pub fn tensor(&self, seed: u64, shape: &[usize], factor: f32) -> hywu_kernels::Result<Tensor> {
        let numel: usize = shape.iter().product();
        let Some(width) = shape.last().filter(|_| self.device != Device::Cpu && numel > 0) else {
            return normal(seed, shape, factor).to(self.device, self.dtype());
        };
        let noise = noise_window(self.device, seed, 0, 0, numel / width, *width, 1)?;
        let scaled = scale(&Tape::inference(), &Var::constant(noise), factor)?;
        scaled.value().cast(self.dtype())?.reshape(shape)
    }

    /// The same as a constant.
    ///
    /// # Errors
    /// Those of the device.
    pub fn constant(&self, seed: u64, shape: &[usize], factor: f32) -> hywu_kernels::Result<Var> {
        Ok(Var::constant(self.tensor(seed, shape, factor)?))
    }

    /// Times `call`. `seconds` is how long it goes on at the CPU; `bytes`, what one call reads and writes, says how many copies of the
    /// inputs take turns on a device; `inputs` makes each of them.
    ///
    /// # Errors
    /// Those of `inputs` and `call`.
    pub fn time<I, O>(
        &self,
        seconds: f64,
        bytes: f64,
        mut inputs: impl FnMut(u64) -> Result<I>,
        mut call: impl FnMut(&I) -> Result<O>,
    ) -> Result<Times> {
        if self.device == Device::Cpu {
            let inputs = inputs(0)?;
            return cpu_times(seconds, || call(&inputs).map(drop));
        }
        let copies = if self.quick { 2 } else { ((ROTATED_BYTES / bytes) as usize + 1).min(MOST_COPIES) };
        let inputs = (0..copies as u64).map(&mut inputs).collect::<Result<Vec<I>>>()?;
        // Outputs live until their place comes again: else each call would write where the one before did, in the cache.
        let mut outputs: Vec<Option<O>> = (0..copies).map(|_| None).collect();
        let mut turn = 0;
        self.device_times(copies, || {
            outputs[turn] = Some(call(&inputs[turn])?);
            turn = (turn + 1) % copies;
            Ok(())
        })
    }

    fn event(&self) -> Result<Event> {
        Ok(self.device.event()?.ok_or("the CPU has no events")?)
    }

    fn device_times(&self, copies: usize, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
        let mut sample = |calls: usize| -> Result<[Event; 2]> {
            let start = self.event()?;
            (0..calls).try_for_each(|_| call())?;
            Ok([start, self.event()?])
        };
        let lasted = |[start, end]: &[Event; 2]| -> Result<f64> { Ok(f64::from(end.since(start)?)) };
        // The first calls load kernels and fill the memory pool.
        let short = usize::from(self.short);
        lasted(&sample(if self.quick { 1 } else { WARM_UP[short] })?)?;
        let (mut calls, mut number) = (1, 3);
        if !self.quick {
            let mut ms = lasted(&sample(calls)?)?;
            while ms < SAMPLE_MS && calls < 4096 {
                calls *= 2;
                ms = lasted(&sample(calls)?)?;
            }
            number = ((CASE_MS[short] / ms) as usize).clamp(5, 100);
        }
        // Nothing waits between the samples, so that the device never runs dry.
        let samples = (0..number).map(|_| sample(calls)).collect::<Result<Vec<_>>>()?;
        let each = samples.iter().map(|s| Ok(lasted(s)? / calls as f64)).collect::<Result<Vec<f64>>>()?;
        Ok(Times::of(each, calls, copies))
    }
}

/// Many calls after a warm-up.
fn cpu_times(seconds: f64, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
    (0..3).try_for_each(|_| call())?;
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 7 || (start.elapsed().as_secs_f64() < seconds && times.len() < 1000) {
        let t = Instant::now();
        call()?;
        times.push(1e3 * t.elapsed().as_secs_f64());
    }
    Ok(Times::of(times, 1, 1))
}
